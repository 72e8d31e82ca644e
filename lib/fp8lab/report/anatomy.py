"""A step taken apart: its GPU kernels by kind beside what the datasheet allows, its wall time, what the EngineCore did."""

from collections import Counter

from ..experiment.anatomy import BatchAnatomy, anatomies, floors_of
from ..metrics.anatomy import KINDS, OTHER, STAGES
from ..results.run_folder import Run
from ..ui import Table, shown
from .drawing import GREY, INK, figure, name_rows
from .verdict import card_note

_NOT_RUN = "not run: kernels are profiled on a GPU"


def steps_table(run: Run) -> Table:
    """The steps of every variant and batch: wall time, GPU time, what the host adds, and the kinds that take the longest."""
    rows = []
    for variant, batches in anatomies(run).items():
        for one in batches:
            step = one.decode
            busy = step.busy_ms if step else None
            times = Counter(step.times).most_common(3) if step else []
            most = ", ".join(f"{kind} {ms:.1f}" for kind, ms in times) or _NOT_RUN
            rows.append((variant, f"{one.batch:,}", shown(one.context), f"{one.wall_ms:,.2f}",
                         shown(step and step.context), shown(busy, ",.2f"),
                         host_adds(one), shown(one.gpu.get("gpu_util"), ".0%"), most))  # fmt: skip
    columns = ("variant", "decoding at once", "context, tokens", "step, ms", "context when profiled", "GPU, ms",
               "host adds, ms", "GPU busy (NVML)", "longest on the GPU, ms")  # fmt: skip
    caption = f"{card_note(run)}What a decode step takes, run {run.path.name}"
    return Table(caption, columns, rows)


def kernels_table(run: Run, variant: str, *, names: int = 2) -> Table:
    """The kinds of every profiled step of `variant`, each beside its floor, with its `names` longest kernels (of unknown ones: all)."""
    rows = []
    for one in anatomies(run).get(variant, ()):
        for step in one.steps:
            floors, times = floors_of(run, variant, step.work), step.times
            for kind, ms in times.items():
                floor = floors.get(kind)
                longest = [name.removeprefix("void ") for name in step.kernels[kind]][
                    : None if kind == OTHER else names
                ]
                # A kernel's name goes on with all its parameters.
                longest = [name if len(name) <= 72 else f"{name[:72]}…" for name in longest]
                rows.append((f"{step.name}, {one.batch:,}", kind, f"{ms:.3f}", f"{ms / step.busy_ms:.0%}",
                             shown(floor, ".3f"), shown(floor and floor / ms, ".0%"), "; ".join(longest)))  # fmt: skip
            together = sum(times.values())
            rows.append((f"{step.name}, {one.batch:,}", "all kinds", f"{together:.3f}", f"{together / step.busy_ms:.0%}",
                         "–", "–", f"{step.steps} steps"))  # fmt: skip
    columns = ("step", "kind", "ms", "of the GPU's time", "floor, ms", "reached", "longest kernels")
    caption = f"{card_note(run)}The kernels of {variant}'s steps by kind, run {run.path.name}"
    return Table(caption if rows else f"{caption}; {_NOT_RUN}", columns, rows)


def host_table(run: Run, *, functions: int = 3) -> Table:
    """What the EngineCore's thread did while each batch decoded: shares of its time by stage, with the innermost functions."""
    held = [(variant, one) for variant, batches in anatomies(run).items() for one in batches]
    stages = [stage for stage in STAGES if any(stage in one.host for _, one in held)]
    rows = []
    for variant, one in held:
        shares = [shown(sum(one.host[stage].values()) if stage in one.host else None, ".0%") for stage in stages]
        every = Counter({name: share for each in one.host.values() for name, share in each.items()})
        told = ", ".join(f"{name} {share:.0%}" for name, share in every.most_common(functions))
        rows.append((variant, f"{one.batch:,}", *shares, told or f"not run: {one.host_note}"))
    caption = f"{card_note(run)}What the EngineCore did while a batch decoded, shares of its thread's time, run {run.path.name}"
    return Table(caption, ("variant", "decoding at once", *stages, "most in"), rows)


def host_adds(one: BatchAnatomy) -> str:
    """The milliseconds that the host adds to the GPU's time of a decode step. Where the profiled steps had longer contexts than
    the timed ones it is at least so much, where they had shorter ones at most; a dash where that says nothing, or nothing was
    profiled."""
    if one.decode is None:
        return "–"
    added = one.wall_ms - one.decode.busy_ms
    if one.context and one.decode.context > 1.05 * one.context:
        return f"≥ {added:,.2f}" if added > 0 else "–"
    shorter = one.context and one.decode.context < one.context / 1.05
    return f"{'≤ ' if shorter else ''}{max(0.0, added):,.2f}"


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
    name_rows(axes, [f"{variant}, {one.batch:,}" for variant, one in held], 1.9, 0.42)
    axes.set_xlabel("milliseconds a step")
    names = [name for name in ("floor", "step, wall time", *KINDS) if name in drawn]
    # Below the bars, which may be long.
    place = {"loc": "outside lower center", "ncols": 4, "frameon": False, "fontsize": 8}
    if names:
        axes.figure.legend([drawn[name] for name in names], names, **place)
    if not held:
        return "No step was taken apart (`fp8lab anatomy`)."
    kinds = "Kernels were not profiled: no GPU."
    if any(one.decode for _, one in held):
        kinds = "Colours: GPU kernels by kind, from a profiler. Black line: the least that the datasheet allows all of them."
    return (
        f"{kinds} Frame: a step's wall time without a profiler; what it has beyond the colours the host adds, or more where the profiled "
        "steps had longer contexts, less where they had shorter ones (they are in the table)."
    )
