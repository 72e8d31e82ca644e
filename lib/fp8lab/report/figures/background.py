"""The article's background, computed from a run: what fills the card, how batching fills its time, FP8's numbers."""

from collections.abc import Set

import numpy as np

from ...config.dimensions import fp8_kv, memory_share
from ...metrics.performance import concurrency_over_time
from ...results.evidence import evidence
from ...results.run_folder import Run
from ..verdict import claim_of, level_id
from .drawing import GREY, INK, STYLE, figure, note

# Light to dark, hatched, so that the parts are told apart in print.
_PARTS = (("weights", "#4477AA", ""), ("KV cache", "#CCBB44", "//"), ("the rest", "#BBBBBB", ".."))


@figure("memory", "What fills the card's memory?")
def memory_figure(axes, run: Run) -> str:
    """What fills the card's memory, variant by variant."""
    held = {s.level.variant: s for s in evidence(run).summaries.values() if s.kv_cache_tokens}
    names = [v for v in reversed(STYLE) if v in held and run.profile.shape(v)]
    names.sort(key=("bf16", "fp8-weights", "fp8-kv", "fp8").index)
    axes.figure.set_figheight(1.6 + 0.45 * max(1, len(names)))
    axes.grid(axis="y", visible=False)
    for y, variant in enumerate(names):
        server, shape, used = held[variant].server, run.profile.shape(variant), held[variant].gpu_memory_gib_max
        kv = server.kv_cache_tokens * shape.kv_bytes_per_token(1 if fp8_kv(server.command, shape) else 2) / 2**30
        sizes = [server.model_memory_gib or 0.0, kv]
        sizes.append(max(0.0, used - sum(sizes)) if used else 0.0)
        left = 0.0
        for (part, color, hatch), size in zip(_PARTS, sizes, strict=True):
            label = part if y == 0 else None
            axes.barh(y, size, 0.6, left=left, color=color, hatch=hatch, edgecolor="white", label=label)
            if size > 3:
                box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
                note(axes, f"{size:.1f}", (left + size / 2, y), (0, 0), ha="center", va="center", bbox=box)
            left += size
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("GiB")
    _limits(axes, run, {memory_share(held[variant].command) for variant in names})
    if names:
        axes.figure.legend(frameon=False, fontsize=8, ncols=3, loc="outside lower center")
    return (
        "Weights and KV cache as vLLM reports them; the rest (activations, CUDA graphs, the driver) is what NVML counts beside "
        "them, where a GPU was sampled; some of it is outside vLLM's share. What FP8 takes from the weights, vLLM gives to the "
        "KV cache."
    )


def _limits(axes, run: Run, shares: Set[float | None]) -> None:
    """Draws what vLLM may take of the card where that is one share for all, and the card's end unless the run was held far
    below it."""
    card, share = run.profile.gpu, next(iter(shares)) if len(shares) == 1 else None
    if card is None:
        return
    limits = [("the card", card.memory_gib, "left")]
    if share is not None:
        limits = [("vLLM's share", share * card.memory_gib, "right"), *(limits if 1.3 * share > 1 else ())]
    for name, gib, side in limits:
        axes.axvline(gib, color=INK, lw=1)
        offset, where = (3 if side == "left" else -3, 4), ("data", "axes fraction")
        note(axes, f"{name} {gib:.1f}", (gib, 1), offset, xycoords=where, ha=side)
    axes.set_xlim(0, max(axes.get_xlim()[1], limits[-1][1] * 1.16))


@figure("batching", "How does continuous batching look while it runs?", height=3.2)
def batching_figure(axes, run: Run) -> str:
    """Requests running and waiting in the EngineCore over time, and in flight for the client, at the published FP8 level."""
    seen, id = evidence(run), level_id("fp8", claim_of("C2")["fp8"]["rate"])
    level = seen.level(id) if id in seen.summaries else None
    if level is not None:
        times, in_flight = concurrency_over_time(level.records)
        last = level.records["scheduled_s"].max()
        axes.step(times, in_flight, where="post", color=INK, lw=1.6)
        _name(axes, "in flight for the client", times, in_flight, 0.5 * last, (-50, 34))
        if level.telemetry is not None and (sampled := level.telemetry.dropna(subset=["running"])).shape[0]:
            axes.plot(sampled["at_s"], sampled["running"], color=GREY, ls="--", marker=".", ms=4)
            axes.plot(sampled["at_s"], sampled["waiting"], color=GREY, ls=":", marker="x", ms=4)
            _name(axes, "running in the EngineCore", sampled["at_s"], sampled["running"], 0.7 * last, (0, -42))
            _name(axes, "waiting in the EngineCore", sampled["at_s"], sampled["waiting"], 0.5 * last, (0, 16))
        axes.axvline(last, color=GREY, lw=1)
        note(axes, "last arrival", (last, axes.get_ylim()[1]), (3, -10), color=GREY)
    axes.set(xlabel="seconds", ylabel="requests", xlim=(0, None), ylim=(0, None))
    return (
        f"Level {id}. A request joins the running batch at the next step and leaves it with its last token; none waits for a "
        "batch to end. Between the solid and the dashed line: requests that wait in the EngineCore (dotted), that had not "
        "reached it, or whose last tokens had not left the API server. In flight is the exact count at every instant; the peak "
        "in the table of levels counts all that were in flight within a whole second."
    )


def _name(axes, name: str, xs, ys, x: float, offset: tuple[float, float]) -> None:
    """Names a line at `x`, `offset` points away."""
    leader = {"arrowstyle": "-", "color": GREY, "lw": 0.6}
    note(axes, name, (x, np.interp(x, xs, ys)), offset, ha="center", va="center", arrowprops=leader)


@figure("number_line", "Which numbers do E4M3 and E5M2 have?", height=2.1)
def number_line_figure(axes) -> str:
    """The positive values of the two FP8 formats up to 16, and how far each goes."""
    from ...metrics.number_formats import FORMATS, largest, values

    axes.grid(axis="y", visible=False)
    told, top = [], 16
    for y, name in enumerate(FORMATS):
        shown = [value for value in values(name) if 0 <= value <= top]
        axes.vlines(shown, y - 0.3, y + 0.3, color=INK, lw=1)
        note(axes, f"… to {largest(name):,.0f}", (top, y), (8, 0), va="center", fontsize=9)
        between = sum(1 <= value < 2 for value in shown)
        told.append(f"{name} has {between} values from 1 to below 2 and goes to {largest(name):,.0f}")
    axes.set_yticks(range(len(FORMATS)), list(FORMATS))
    axes.set_ylim(len(FORMATS) - 0.5, -0.5)
    powers = (0, 1, 2, 4, 8, top)
    axes.set_xticks(powers, [f"{power}" for power in powers])
    axes.set(xlabel="value (negative ones mirror these)", xlim=(-0.3, top + 3))
    return f"{'; '.join(told)}. A scale moves a tensor's largest value to the end of the line; what is small keeps its relative steps."
