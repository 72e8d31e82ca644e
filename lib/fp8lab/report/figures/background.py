"""The article's background, computed from a run: what fills the card, how batching fills its time, how far its physical
limits were; and FP8's numbers."""

from collections.abc import Mapping, Set

import numpy as np

from ...config.dimensions import BF16, ModelShape, fp8_kv, memory_share
from ...config.profile import Card, level_id, rate_name
from ...metrics.performance import concurrency_over_time
from ...results.evidence import evidence
from ...results.run_folder import Run
from ..verdict import claim_of
from .drawing import GREY, INK, STYLE, figure, label_where_free, legend, note, plainly, style_of

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
        used = used and used / server.cards
        token = shape.kv_bytes_per_token(1 if fp8_kv(server.command, shape) else 2)
        kv = server.kv_cache_tokens * token / server.cards / 2**30
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


_XS = (10, 5000)


@figure("roofline", "How far from the card's physical limit?")
def roofline_figure(axes, run: Run) -> str:
    """The card's physical limit and what the levels needed of it."""
    seen, card = evidence(run), run.profile.gpu
    # Steps are drawn in BF16, whose sizes are those of any variant of one model.
    shape = next((known for variant in seen.variants() if (known := run.profile.shape(variant))), None)
    for peak, text in ((card.bf16_flops, "BF16 peak"), (card.fp8_flops, "FP8 peak")) if card else ():
        ridge, top = peak / card.hbm_bytes_per_s, peak / 1e12
        axes.plot([_XS[0], ridge, _XS[1]], [_XS[0] * card.hbm_bytes_per_s / 1e12, top, top], color=GREY, lw=1.2)
        note(axes, text, (_XS[1], top), (0, 3), ha="right", color=GREY)
    context = seen.kv_tokens_a_request()
    steps = _steps(shape, context) if card and shape and context else {}
    steps = {name: intensity for name, intensity in steps.items() if intensity > _XS[0]}
    for name, intensity in steps.items():
        at = min(card.bf16_flops, intensity * card.hbm_bytes_per_s) / 1e12
        axes.plot(intensity, at, "|", color=INK, ms=9)
        offset, side = ((4, -9), "left") if at < card.bf16_flops / 1e12 else ((0, -13), "center")
        note(axes, name, (intensity, at), offset, ha=side, fontsize=7.5)
    drawn, points = set(), []
    cards = max((s.cards for s in seen.summaries.values()), default=1)
    for name, s in seen.summaries.items():
        one = seen.roofline(name)
        if one is not None and s.level.repeat == 1:
            variant, at = s.level.variant, (one.intensity, one.flops_per_s / s.cards / 1e12)
            style = style_of(run.profile, variant) | {"ls": ""}
            axes.plot(*at, label=None if variant in drawn else variant, **style)
            drawn.add(variant)
            points.append((rate_name(s.level.rate).removesuffix(" req/s"), *at))
    axes.set(
        xlabel="FLOP for each byte that must be read",
        ylabel="TFLOP/s a card needed, estimated" if cards > 1 else "TFLOP/s needed, estimated",
    )
    axes.set(xscale="log", yscale="log", xlim=_XS)
    axes.xaxis.set_major_formatter(plainly)
    axes.yaxis.set_major_formatter(plainly)
    legend(axes, "upper left")
    label_where_free(axes, points)
    return (
        f"Lines: what the datasheet of {card.name if card else 'no card'} allows. Points: what the tokens of each level needed, "
        f"estimated from vLLM's counters, first seed, some with the offered rate in requests/s.{_bounds_told(steps, card)}"
    )


def _steps(shape: ModelShape, context: float) -> dict[str, float]:
    """FLOP for each byte read, in BF16, of a step that decodes for 32 or 256 requests with `context` tokens in the KV
    cache each, and of one that prefills 2,048 tokens; counted as `fp8lab.metrics.resources` does."""
    weights, kv = shape.weight_bytes_read(BF16), context * shape.kv_bytes_per_token(2)
    decode = {n: sum(shape.flops(n, n)) / (weights + n * kv) for n in (32, 256)}
    prefill = sum(shape.flops(2048, 1)) / weights
    return {f"decode for {n}": one for n, one in decode.items()} | {"prefill of 2,048": prefill}


def _bounds_told(steps: Mapping[str, float], card: Card | None) -> str:
    """Which of the steps memory bounds and which compute: those left and right of the BF16 roof's bend."""
    if not steps or card is None:
        return ""
    bend = card.bf16_flops / card.hbm_bytes_per_s
    sides = {"memory": [], "compute": []}
    for name, one in steps.items():
        sides["memory" if one < bend else "compute"].append(f"{name} ({one:,.0f})")
    bound = "; ".join(f"{limit} is the limit of {', '.join(names)}" for limit, names in sides.items() if names)
    return (
        " Ticks: by arithmetic, single BF16 steps that decode for so many requests or prefill so many tokens, FLOP for each "
        f"byte in brackets. The roof bends at {bend:,.0f}: {bound}."
    )
