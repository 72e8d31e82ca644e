"""The house's way of drawing: canvas, colours and markers, labels, and the words that go with a figure."""

import itertools
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from ..results.evidence import FRONT_ENDS
from ..results.run_folder import Run
from .caption import card_mark, card_note

# Okabe-Ito colours, told apart also in grey and by marker; a variant keeps its own everywhere.
STYLE = {"bf16": ("#0072B2", "o"), "fp8": ("#D55E00", "s"), "fp8-weights": ("#009E73", "^"), "fp8-kv": ("#CC79A7", "D")}
INK, GREY = "#222222", "#767676"
# What a screen reader can be asked to read aloud; a longer text is told in summary.
LONGEST_ALT = 600
# Behind another front end a variant keeps its colour and marker, drawn half full or hollow.
_FRONT_END = {"": ("full", "-"), "-api4": ("left", ":"), "-rust": ("none", "--"), "-rust-graphs": ("bottom", "-.")}
_FILLINGS = {"full": "full", "left": "left half full", "none": "hollow", "bottom": "lower half full"}


@dataclass(frozen=True)
class Figure:
    """A drawn figure with its words: `alt` says what is seen, `caption` what it means."""

    name: str
    canvas: object
    alt: str
    caption: str


def new_canvas(run: Run | None, title: str, height: float = 3.8, rows: int = 1):
    """(canvas, axes) in the house's style; marked across when the run was not made on the GPU that its profile names.
    Without a run: arithmetic. With several `rows` the axes are a list, one below the other over the same x."""
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(6.4, height), layout="constrained")
    mark = run and (card_mark(run) or ("CPU" if run.profile.device != "cuda" else ""))
    each = canvas.subplots(rows, squeeze=False, sharex=True)[:, 0]
    each[0].set_title(title, loc="left", fontsize=11, color=INK)
    for axes in each:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e6e6", lw=0.8)
        axes.set_axisbelow(True)
        if mark:
            axes.text(
                0.5, 0.5, mark, transform=axes.transAxes, ha="center", va="center", rotation=20, fontsize=44, color="#bbbbbb",
                alpha=0.45,
            )  # fmt: skip
    return canvas, list(each) if rows > 1 else each[0]


def variant_style(variant: str) -> dict:
    """How a variant is drawn: colour and marker are the variant's, filling and line its front end's."""
    base, suffix = front_end_of(variant)
    color, marker = STYLE.get(base, (INK, "v"))
    filling, line = _FRONT_END[suffix]
    return {"color": color, "marker": marker, "fillstyle": filling, "ls": line, "lw": 1.6, "ms": 6}


def front_end_of(variant: str) -> tuple[str, str]:
    suffix = next((s for s in FRONT_ENDS if s and variant.endswith(s)), "")
    return variant.removesuffix(suffix), suffix


def fillings_told(variants: Collection[str]) -> str:
    """Which front end the markers of `variants` stand for, as a sentence to go on with; empty where all have the first."""
    suffixes = {front_end_of(variant)[1] for variant in variants}
    told = [f"{_FILLINGS[filling]} for {FRONT_ENDS[s]}" for s, (filling, _) in _FRONT_END.items() if s in suffixes]
    return f" Markers by front end: {'; '.join(told)}." if suffixes - {""} else ""


def label_ends(axes, ends: list[tuple[str, float, float, str]]) -> None:
    """Names lines at their right ends, (name, x, y, colour) each, instead of a legend. Names that would lie on each
    other are moved apart; a thin line leads to each."""
    axes.figure.draw_without_rendering()  # only then is known where things are
    ends = sorted(ends, key=lambda end: end[2])
    at = [axes.transData.transform((x, y))[1] * 72 / axes.figure.dpi for _, x, y, _ in ends]
    apart = list(itertools.accumulate(at, lambda below, own: max(own, below + 11)))
    upward = sum(apart) / len(at) - sum(at) / len(at)
    for (name, x, y, color), own, moved in zip(ends, at, apart, strict=True):
        leader = {"arrowstyle": "-", "color": GREY, "lw": 0.6, "relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 5}
        axes.annotate(
            name, (x, y), (24, moved - upward - own), textcoords="offset points", va="center", fontsize=8.5, color=color,
            arrowprops=leader,
        )  # fmt: skip


def label_where_free(axes, points: list[tuple[str, float, float]]) -> None:
    """Writes a name beside each of `points`, (name, x, y) each, where it lies on no other point and no other name."""
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

    axes.figure.draw_without_rendering()
    pixel, size = axes.figure.dpi / 72, 7
    at = [axes.transData.transform((x, y)) for _, x, y in points]
    taken = [Bbox.from_extents(x - 4 * pixel, y - 4 * pixel, x + 4 * pixel, y + 4 * pixel) for x, y in at]
    taken += [note.get_window_extent() for note in axes.texts if isinstance(note, Annotation)]
    for (name, *point), (x, y) in zip(points, at, strict=True):
        wide, high = 0.62 * size * len(name) * pixel, size * pixel
        for side, left in (("left", x + 6 * pixel), ("right", x - 6 * pixel - wide)):
            box = Bbox.from_bounds(left, y - high / 2, wide, high)
            if not box.count_overlaps(taken):
                offset = (6 if side == "left" else -6, 0)
                axes.annotate(
                    name, point, offset, textcoords="offset points", ha=side, va="center", fontsize=size, color=INK
                )
                taken.append(box)
                break


def legend(axes, where: str) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, loc=where, fontsize=8)


def plainly(value: float, _position: int) -> str:
    return f"{value:,.0f}"


def caption_of(text: str, *runs: Run) -> str:
    """`text` with what every caption says: where it comes from, and that it is emulated, or of another card, if it is."""
    return f"{card_note(*runs)}{text} Run{'s' * (len(runs) > 1)} {', '.join(run.path.name for run in runs)}."


def told_or(what: list[str], summary: str = "") -> str:
    """`what` was seen, item by item; in `summary` where that is too long to be read out."""
    text = "; ".join(what) or "nothing is measured yet"
    return summary if summary and len(text) > LONGEST_ALT else text


def share_range(shares: Mapping[str, float]) -> str:
    """The lowest and the highest of the levels' shares, with the levels."""
    if not shares:
        return "nothing"
    low, high = min(shares, key=shares.get), max(shares, key=shares.get)
    return f"{shares[low]:.0%} ({low}) to {shares[high]:.0%} ({high})"
