"""The figure of a step taken apart."""

from ...experiment.anatomy import anatomies, floors_of
from ...metrics.anatomy import KINDS
from ...results.run_folder import Run
from .drawing import GREY, INK, figure

_COLOURS = ("#0072B2", "#D55E00", "#CC79A7", "#F0E442", "#56B4E9", "#009E73", "#999999", "#cccccc", "#000000")


@figure("step", "Where does each millisecond of a decode step go?")
def step_figure(axes, run: Run) -> str:
    """By variant and batch the GPU time of a decode step by kind, the floors of all kinds together, and the wall time."""
    held = [(variant, one) for variant, batches in anatomies(run).items() for one in batches]
    drawn = {}  # by name, for the legend
    for y, (variant, one) in enumerate(held):
        drawn["step, wall time"] = axes.barh(y, one.wall_ms, 0.72, color="white", edgecolor=GREY)
        if step := one.decode:
            left = 0.0
            for kind, ms in step.times.items():
                drawn[kind] = axes.barh(y, ms, 0.5, left, color=_COLOURS[KINDS.index(kind)])
                left += ms
            if floors := floors_of(run, variant, step.work):
                drawn["floor"] = axes.plot([sum(floors.values())] * 2, [y - 0.36, y + 0.36], color=INK, lw=2)[0]
    axes.figure.set_figheight(1.9 + 0.42 * max(1, len(held)))
    axes.grid(axis="y", visible=False)
    axes.set_yticks(range(len(held)), [f"{variant}, {one.batch:,}" for variant, one in held])
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds a step")
    names = [name for name in ("floor", "step, wall time", *KINDS) if name in drawn]
    # Below the bars, which may be long.
    place = {"loc": "outside lower center", "ncols": 4, "frameon": False, "fontsize": 8}
    axes.figure.legend([drawn[name] for name in names], names, **place)
    kinds = (
        "Colours: GPU kernels by kind, from a profiler. Black line: the least that the datasheet allows all of them. "
    )
    profiled = any(one.decode for _, one in held)
    return (kinds if profiled else "Kernels were not profiled: no GPU. ") + (
        "Frame: a step's wall time without a profiler; what it has beyond the colours the host adds, or more where the profiled "
        "steps had longer contexts, less where they had shorter ones (they are in the table)."
    )
