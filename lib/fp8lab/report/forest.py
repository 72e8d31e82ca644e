"""A forest plot: ratios with their 95 % intervals, one a line."""

import math
from collections.abc import Sequence

from ..metrics.statistics import Ratio
from ..results.run_folder import Run
from .caption import card_mark
from .drawing import GREY, INK, Figure, caption_of, new_canvas, told_or

_LEFT, _RIGHT = 0.4, 2.5


def forest(
    runs: Sequence[Run],
    name: str,
    title: str,
    rows: Sequence[tuple[str, Ratio]],
    label: str,
    caption: str,
    *,
    said: tuple[str, float] | None = None,
    summary: str = "",
) -> Figure:
    """`rows` are (text, ratio), drawn from the top; filled where the interval leaves out 1. `said` is a (text, ratio)
    without an interval, somebody else's, drawn first as a star. The page is marked when a run is EMULATED. `summary`
    stands for the rows in the alternative text where they are too many to be read out."""
    shown = next((run for run in runs if run.profile.device != "cuda" or card_mark(run)), runs[0])
    lines = sum(1 + text.count("\n") * 0.7 for text, _ in rows) + (1.7 if said else 0)
    canvas, axes = new_canvas(shown, title, height=max(1.6, 0.9 + 0.24 * lines))
    # Over the whole figure: beside long names little room is left above the axes.
    axes.set_title("", loc="left")
    canvas.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    axes.grid(axis="y", visible=False)
    axes.axvline(1, color=INK, lw=1)
    beyond = False
    texts = [text for text, _ in ([said] if said else []) + list(rows)]
    if said:
        axes.plot(said[1], 0, "*", color=INK, mfc="white", ms=12)
    for y, (_, one) in enumerate(rows, start=bool(said)):
        low, high = (one.value, one.value) if math.isnan(one.low) else (one.low, one.high)
        color = INK if one.shown else GREY
        axes.plot([low, high], [y, y], color=color, lw=2.2 if one.shown else 1.2)
        ends = [(_LEFT, "<")] * (low < _LEFT) + [(_RIGHT, ">")] * (high > _RIGHT)
        for end, arrow in ends:
            axes.plot(end, y, arrow, color=color, ms=6, clip_on=False)
        beyond = beyond or bool(ends)
        axes.plot(one.value, y, "o", color=INK, mfc=INK if one.shown else "white", ms=5)
    axes.set_yticks(range(len(texts)), texts, fontsize=7.5)
    axes.set_ylim(max(1, len(texts)) - 0.5, -0.5)
    axes.set_xscale("log")
    ticks = (0.5, 0.7, 1, 1.4, 2)
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.set_xlim(_LEFT, _RIGHT)
    arrows = ";\narrow: it goes on" if beyond else ""
    axes.set_xlabel(f"{label}\n(filled: the interval leaves out 1{arrows})")
    alt = told_or([f"{text}: {one}" for text, one in rows], summary)
    if said:
        alt = f"{said[0]}: {said[1]:.2f}×; {alt}"
    alt = alt.replace("\n", " ")
    return Figure(name, canvas, f"Ratios with intervals. {alt}.", caption_of(caption, *runs))
