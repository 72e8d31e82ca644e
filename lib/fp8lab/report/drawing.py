"""The house's way of drawing: canvas, colours and markers, labels, forest plots, and the words that go with a figure."""

import base64
import functools
import html
import inspect
import io
import itertools
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config.profile import Profile
from ..errors import BadInput
from ..metrics.statistics import Ratio
from ..paths import writing
from ..results.run_folder import Run
from .verdict import card_mark, card_note

# Okabe-Ito colours, told apart also in grey and by marker; a base keeps its own everywhere.
STYLE = {"bf16": ("#0072B2", "o"), "fp8": ("#D55E00", "s"), "fp8-weights": ("#009E73", "^"), "fp8-kv": ("#CC79A7", "D")}
# Other bases, in the order in which a profile has them. One whose name begins with that of a number format has its colour.
_FAMILIES = {"bf16": "#0072B2", "fp8": "#D55E00", "int8": "#009E73", "int4": "#56B4E9", "w4a8": "#E69F00"}
_OTHERS = (("#E69F00", "v"), ("#56B4E9", "P"), ("#117733", "<"), ("#AA4499", ">"), ("#999933", "p"), ("#332288", "h"),
           ("#222222", "d"), ("#A0A0A0", "*"), ("#661100", "8"), ("#6699CC", (4, 1, 0)), ("#C9B037", "H"), ("#00A087", (6, 1, 0)))  # fmt: skip
INK, GREY = "#222222", "#767676"
# In another setup (API server, further flags) a variant keeps its base's colour and marker, drawn otherwise filled.
_FILLINGS = (("full", "-", "full"), ("left", ":", "left half full"), ("none", "--", "hollow"),
             ("bottom", "-.", "lower half full"))  # fmt: skip
# Other figures share a page with text when they are printed; in a tall one the names would be too small to read.
_TALL_INCHES, _OWN_PAGE = 4.5, ";max-height:225mm"
_LEFT, _RIGHT = 0.4, 2.5
# Numbers of an axis without an exponent.
PLAINLY = "{x:,.0f}"


@dataclass(frozen=True)
class Figure:
    """A figure in a page: a real `<img>` with its alternative text and a caption. Plain text elsewhere."""

    name: str
    svg: str
    alt: str
    caption: str
    canvas: Any = field(repr=False, compare=False)

    def save(self, path: str | Path) -> Path:
        """Writes the figure as the file's ending says (.svg, .png, .pdf); returns the path. Raises BadInput for another
        ending, NotWritten."""
        path = Path(path)
        if path.suffix not in (".svg", ".png", ".pdf"):
            raise BadInput(f"{str(path)!r} ends in none of .svg, .png and .pdf; name a file that does, such as c1.svg")
        with writing(path):
            path.write_text(self.svg) if path.suffix == ".svg" else self.canvas.savefig(path, dpi=200)
        return path

    def _repr_html_(self) -> str:
        data = base64.b64encode(self.svg.encode()).decode()
        style = "max-width:100%" + (_OWN_PAGE if self.canvas.get_figheight() > _TALL_INCHES else "")
        image = f'<img src="data:image/svg+xml;base64,{data}" alt="{html.escape(self.alt)}" style="{style}">'
        return f"<figure>{image}<figcaption>{html.escape(self.caption)}</figcaption></figure>"

    def __repr__(self) -> str:
        return f"[figure] {self.alt}\n{self.caption}"


def figure(name: str, title: str, *, height: float = 3.8, rows: int = 1, columns: int = 1) -> Callable:
    """Makes a function `draw(axes, *runs, **options) -> caption` one of runs and options that returns a `Figure`. With
    several `rows` or `columns` the axes are a list. Without a run: arithmetic."""

    def made(draw: Callable[..., str]) -> Callable[..., Figure]:
        @functools.wraps(draw)
        def drawn(*arguments, **options) -> Figure:
            from matplotlib import rc_context, style

            runs = [one for one in arguments if isinstance(one, Run)]
            vector = io.StringIO()
            # The same data give the same file: no date, no random names, nothing of the user's own style.
            with style.context("default"), rc_context({"svg.hashsalt": name}):
                canvas, axes = _canvas(runs, title, height, rows, columns)
                caption = draw(axes, *arguments, **options)
                for one in (one for one in canvas.axes if not one.has_data()):
                    one.set(xticks=[], yticks=[])
                    note(one, "nothing to draw in this run", (0.02, 0.5), (0, 0), xycoords="axes fraction", color=GREY)
                canvas.savefig(vector, format="svg", metadata={"Date": None})
            source = f" Run{'s' * (len(runs) > 1)} {', '.join(run.path.name for run in runs)}." if runs else ""
            return Figure(
                name,
                vector.getvalue(),
                _alt(canvas, canvas.axes[0].get_title(loc="left") or title),
                f"{card_note(*runs)}{caption}{source}",
                canvas,
            )

        # What a caller gives and gets.
        given = list(inspect.signature(draw).parameters.values())[1:]
        drawn.__signature__ = inspect.Signature(given, return_annotation=Figure)
        return drawn

    return made


def _canvas(runs: Sequence[Run], title: str, height: float, rows: int, columns: int):
    """(canvas, axes) in the house's style; marked across when a run was not made on the GPU that its profile names."""
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(6.4 if columns == 1 else 9.2, height), layout="constrained")
    marks = [card_mark(run) or ("CPU" if run.profile.device != "cuda" else "") for run in runs]
    mark = next(filter(None, marks), "")
    every = list(canvas.subplots(rows, columns, squeeze=False, sharex=rows > 1).flat)
    every[0].set_title(title, loc="left", fontsize=11, color=INK)
    for axes in every:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e6e6", lw=0.8)
        axes.set_axisbelow(True)
        if mark:
            style = {"ha": "center", "va": "center", "rotation": 20, "fontsize": 44, "color": "#bbbbbb", "alpha": 0.45}
            axes.text(0.5, 0.5, mark, transform=axes.transAxes, **style)
    return canvas, every if len(every) > 1 else every[0]


def _alt(canvas, title: str) -> str:
    """What is drawn, for those who do not see it: the question, the axes, the names in it."""
    told = []
    for axes in canvas.axes:
        x, y = (" ".join(label.split()) for label in (axes.get_xlabel(), axes.get_ylabel()))
        told.append(" over ".join(filter(None, (y, x))))
        ticks = axes.get_xticklabels() if y else axes.get_yticklabels()
        names = axes.get_legend_handles_labels()[1] or [" ".join(tick.get_text().split()) for tick in ticks]
        if names := [name for name in dict.fromkeys(names) if any(c.isalpha() for c in name)]:
            many = len(names) > 12
            told[-1] += f": {f'{len(names)} rows from {names[0]} to {names[-1]}' if many else ', '.join(names)}"
    return f"{title} Chart of {'; '.join(told)}. The page's tables hold the numbers."


def style_of(profile: Profile, variant: str) -> dict:
    """How a variant is drawn: colour and marker are its base's, filling and line its setup's."""
    color, marker = _base_style(profile, profile.base(variant))
    filling, line, _ = _filling(profile, variant)
    return {"color": color, "marker": marker, "fillstyle": filling, "ls": line, "lw": 1.6, "ms": 6}


def _base_style(profile: Profile, base: str) -> tuple[str, str]:
    if base in STYLE:
        return STYLE[base]
    others = [name for name in dict.fromkeys(map(profile.base, [*profile.variants, base])) if name not in STYLE]
    color, marker = _OTHERS[others.index(base) % len(_OTHERS)]
    return _FAMILIES.get(base.partition("-")[0], color), marker


def _filling(profile: Profile, variant: str) -> tuple[str, str, str]:
    setups = list(dict.fromkeys(map(profile.setup, profile.variants)))
    setup = profile.setup(variant)
    return _FILLINGS[setups.index(setup) % len(_FILLINGS) if setup in setups else 0]


def fillings(profile: Profile, variants: Collection[str]) -> str:
    """Which setup the markers of `variants` stand for, as a sentence to go on with; empty where all have the first."""
    setups = {_filling(profile, v)[2]: profile.setup(v).split(", ") for v in profile.variants if v in variants}
    shared = set.intersection(*map(set, setups.values())) if setups else set()
    own = {filling: [word for word in words if word not in shared] for filling, words in setups.items()}
    told = "; ".join(f"{filling} for {', '.join(words) or 'none of these'}" for filling, words in own.items())
    return f" Markers by {'what not all share' if shared else 'API server'}: {told}." if len(own) > 1 else ""


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
        note(axes, name, (x, y), (24, moved - upward - own), va="center", fontsize=8.5, color=color, arrowprops=leader)


def label_where_free(
    axes, points: list[tuple[str, float, float]], radius: float = 4.0, *, around: bool = False
) -> None:
    """Writes a name beside each of `points`, (name, x, y) each, or, with `around`, above or below it, where it lies on no
    other point, whose marks reach so many points from their middle, and no other name."""
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

    axes.figure.draw_without_rendering()
    pixel, size = axes.figure.dpi / 72, 7
    reach = radius * pixel
    at = [axes.transData.transform((x, y)) for _, x, y in points]
    taken = [Bbox.from_extents(x - reach, y - reach, x + reach, y + reach) for x, y in at]
    taken += [text.get_window_extent() for text in axes.texts if isinstance(text, Annotation)]
    for (name, *point), (x, y) in zip(points, at, strict=True):
        wide, high = 0.62 * size * len(name) * pixel, size * pixel
        off, line = radius + 2, radius + 2 + size / 2
        places = [("left", off, 0), ("right", -off, 0)]
        places += [("center", 0, by * line) for by in (-1, 1, -1.8, 1.8, -2.6, 2.6)] if around else []
        for side, right, up in places:
            start = x + right * pixel - {"left": 0, "right": wide, "center": wide / 2}[side]
            box = Bbox.from_bounds(start, y + up * pixel - high / 2, wide, high)
            if not box.count_overlaps(taken):
                note(axes, name, point, (right, up), ha=side, va="center", fontsize=size)
                taken.append(box)
                break


def note(axes, text: str, at: Sequence[float], offset: tuple[float, float] = (4, 3), **style) -> None:
    """Writes `text` so many points beside `at`."""
    axes.annotate(text, tuple(at), offset, textcoords="offset points", **{"fontsize": 8, "color": INK} | style)


def log_numbers(axes) -> None:
    """Makes the y axis, of what is drawn already, logarithmic, with the numbers that have room: decades, twice and five times them;
    in a narrow range all."""
    from matplotlib.ticker import LogLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(PLAINLY)
    low, high = axes.get_ylim()
    if wide := high > 4 * low:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_formatter("" if wide else PLAINLY)


def legend(axes, where: str) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, loc=where, fontsize=8)


def name_rows(axes, names: Sequence[str], inches: float, each: float) -> None:
    """Names rows of bars, the first at the top, on a canvas that is so many inches high and for `each` row more."""
    axes.figure.set_figheight(inches + each * max(1, len(names)))
    axes.grid(axis="y", visible=False)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()


def mark(axes, at: Sequence[float], profile: Profile, variant: str) -> None:
    """Marks a level of `variant` at (x, y); the first one of a variant names it in the legend."""
    named = variant in axes.get_legend_handles_labels()[1]
    axes.plot(*at, label=None if named else variant, **style_of(profile, variant) | {"ls": ""})


def forest(axes, rows: Sequence[tuple[str, Ratio]], label: str, said: tuple | None = None) -> None:
    """Ratios with their 95 % intervals, one a line: `rows` are (text, ratio), drawn from the top; filled where the interval
    leaves out 1. `said` is a (text, ratio) without an interval, somebody else's, drawn first as a star."""
    lines = sum(1 + text.count("\n") * 0.7 for text, _ in rows) + (1.7 if said else 0)
    canvas = axes.figure
    canvas.set_figheight(max(2.1, 0.9 + 0.24 * lines))
    # Over the whole figure: beside long names little room is left above the axes.
    canvas.suptitle(axes.get_title(loc="left"), x=0.01, ha="left", fontsize=11, color=INK)
    axes.set_title("", loc="left")
    axes.grid(axis="y", visible=False)
    if texts := [text for text, _ in ([said] if said else []) + list(rows)]:
        axes.axvline(1, color=INK, lw=1)
    beyond, beside = False, {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": 7.5}
    if said:
        axes.plot(said[1], 0, "*", color=INK, mfc="white", ms=12)
        note(axes, f"{said[1]:.2f}", (1, 0), (7, 0), **beside)
    for y, (_, one) in enumerate(rows, start=bool(said)):
        low, high = (one.value, one.value) if math.isnan(one.low) else (one.low, one.high)
        color = INK if one.shown else GREY
        axes.plot([low, high], [y, y], color=color, lw=2.2 if one.shown else 1.2)
        ends = [(_LEFT, "<")] * (low < _LEFT) + [(_RIGHT, ">")] * (high > _RIGHT)
        for end, arrow in ends:
            axes.plot(end, y, arrow, color=color, ms=6, clip_on=False)
        beyond = beyond or bool(ends)
        axes.plot(one.value, y, "o", color=INK, mfc=INK if one.shown else "white", ms=5)
        note(axes, f"{one.value:.2f}", (1, y), (7, 0), **beside)
    axes.set_yticks(range(len(texts)), texts, fontsize=7.5)
    axes.set_ylim(max(1, len(texts)) - 0.5, -0.5)
    axes.set_xscale("log")
    ticks = (0.5, 0.7, 1, 1.4, 2)
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.set_xlim(_LEFT, _RIGHT)
    arrows = ";\narrow: it goes on" if beyond else ""
    axes.set_xlabel(f"{label}\n(logarithmic; filled:\nthe interval leaves out 1{arrows})")
