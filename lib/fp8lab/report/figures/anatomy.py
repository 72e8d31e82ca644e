"""Figures of a step taken apart."""

from ...experiment.anatomy import anatomies
from ...metrics.anatomy import KINDS, STAGES
from ...results.run_folder import Run
from ..tables.anatomy import decode_step, floors_of, kind_times
from .drawing import GREY, INK, figure, legend

_COLOURS = ("#0072B2", "#D55E00", "#CC79A7", "#F0E442", "#56B4E9", "#009E73", "#999999", "#cccccc", "#000000")


@figure("step", "Where does each millisecond of a decode step go?")
def step_figure(axes, run: Run) -> str:
    """By variant and batch the GPU time of a decode step by kind, the floors of all kinds together, and the wall time."""
    held = [(variant, one) for variant, batches in anatomies(run).items() for one in batches]
    named = set()
    for y, (variant, one) in enumerate(held):
        label = None if y else "step, wall time"
        axes.barh(y, one.wall_ms, 0.72, color="white", edgecolor=GREY, label=label)
        step, left = decode_step(one), 0.0
        for kind, ms in (kind_times(step) if step else {}).items():
            axes.barh(y, ms, 0.5, left, color=_COLOURS[KINDS.index(kind)], label=None if kind in named else kind)
            left += ms
            named.add(kind)
        if step and (floors := floors_of(run, variant, step)):
            label = None if "floor" in named else "floor"
            axes.plot([sum(floors.values())] * 2, [y - 0.36, y + 0.36], color=INK, lw=2, label=label)
            named.add("floor")
    _finish(axes, held)
    profiled = any(decode_step(one) for _, one in held)
    kinds = (
        "Colours: GPU kernels by kind, from a profiler. Black line: the least that the datasheet allows all of them."
    )
    kinds = kinds if profiled else "Kernels were not profiled: no GPU."
    return f"{kinds} Frame: a step's wall time without a profiler; what it has beyond the colours the host adds."


@figure("host", "What does the EngineCore do in the time of a step?")
def host_figure(axes, run: Run) -> str:
    """By variant and batch the milliseconds of a step by what the EngineCore's thread did."""
    held = [(variant, one) for variant, batches in anatomies(run).items() for one in batches if one.host]
    named = set()
    for y, (_, one) in enumerate(held):
        left = 0.0
        for stage in (stage for stage in STAGES if stage in one.host):
            ms = one.wall_ms * sum(one.host[stage].values())
            style = {"color": _COLOURS[STAGES.index(stage) % len(_COLOURS)], "label": None if stage in named else stage}
            axes.barh(y, ms, 0.6, left, **style)
            left += ms
            named.add(stage)
    _finish(axes, held)
    return "Shares of the samples of the EngineCore's stacks (py-spy), times a step's wall time."


def _finish(axes, held) -> None:
    axes.figure.set_figheight(1.4 + 0.42 * max(1, len(held)))
    axes.grid(axis="y", visible=False)
    axes.set_yticks(range(len(held)), [f"{variant}, {one.batch:,}" for variant, one in held])
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds a step")
    legend(axes, "lower right")
