"""Figures of a step taken apart."""

from collections.abc import Mapping

from ...experiment.anatomy import BatchAnatomy, anatomies, floors_of
from ...metrics.anatomy import KINDS, STAGES
from ...results.run_folder import Run
from .drawing import GREY, INK, figure

_COLOURS = ("#0072B2", "#D55E00", "#CC79A7", "#F0E442", "#56B4E9", "#009E73", "#999999", "#cccccc", "#000000")


@figure("step", "Where does each millisecond of a decode step go?")
def step_figure(axes, run: Run) -> str:
    """By variant and batch the GPU time of a decode step by kind, the floors of all kinds together, and the wall time."""
    held, profiled = _held(run), False
    for y, (variant, one) in enumerate(held):
        axes.barh(y, one.wall_ms, 0.72, color="white", edgecolor=GREY, label="" if y else "step, wall time")
        if step := one.decode:
            _stack(axes, y, step.times, KINDS)
            if floors := floors_of(run, variant, step.work):
                axes.plot(
                    [sum(floors.values())] * 2, [y - 0.36, y + 0.36], color=INK, lw=2, label="" if profiled else "floor"
                )
            profiled = True
    _finish(axes, held, KINDS)
    kinds = (
        "Colours: GPU kernels by kind, from a profiler. Black line: the least that the datasheet allows all of them. "
    )
    return (kinds if profiled else "Kernels were not profiled: no GPU. ") + (
        "Frame: a step's wall time without a profiler; what it has beyond the colours the host adds. The contexts of both "
        "are in the table."
    )


@figure("host", "What does the EngineCore do in the time of a step?")
def host_figure(axes, run: Run) -> str:
    """By variant and batch the milliseconds of a step by what the EngineCore's thread did."""
    held = [pair for pair in _held(run) if pair[1].host]
    for y, (_, one) in enumerate(held):
        _stack(axes, y, {stage: one.wall_ms * sum(each.values()) for stage, each in one.host.items()}, STAGES)
    _finish(axes, held, STAGES)
    if not held:
        return "The EngineCore was not sampled; the table says why."
    return "Shares of the samples of the EngineCore's stacks (py-spy), times a step's wall time."


def _held(run: Run) -> list[tuple[str, BatchAnatomy]]:
    return [(variant, one) for variant, batches in anatomies(run).items() for one in batches]


def _stack(axes, y: int, parts: Mapping[str, float], order: tuple[str, ...]) -> None:
    """A bar of `parts` end to end at `y`; each name has its colour, and stands in the legend once."""
    left, known = 0.0, axes.get_legend_handles_labels()[1]
    for name in (name for name in order if name in parts):
        style = {"color": _COLOURS[order.index(name) % len(_COLOURS)], "label": "" if name in known else name}
        axes.barh(y, parts[name], 0.5, left, **style)
        left += parts[name]


def _finish(axes, held: list[tuple[str, BatchAnatomy]], order: tuple[str, ...]) -> None:
    axes.figure.set_figheight(1.9 + 0.42 * max(1, len(held)))
    axes.grid(axis="y", visible=False)
    axes.set_yticks(range(len(held)), [f"{variant}, {one.batch:,}" for variant, one in held])
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds a step")
    found = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    names = sorted(found, key=lambda name: order.index(name) if name in order else -1)
    # Below the bars, which may be long.
    axes.figure.legend(
        [found[name] for name in names], names, loc="outside lower center", ncols=4, frameon=False, fontsize=8
    )
