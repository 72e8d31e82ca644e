"""How far from the card's physical limit: its roofline with a run's levels."""

from collections.abc import Mapping

from ..config.dimensions import ModelShape
from ..config.profile import Card
from ..results.evidence import evidence, rate_name
from ..results.run_folder import Run
from .drawing import (
    GREY,
    INK,
    Figure,
    caption_of,
    label_where_free,
    legend,
    new_canvas,
    plainly,
    share_range,
    told_or,
    variant_style,
)


def roofline(run: Run) -> Figure:
    """The card's roofline with this run's levels."""
    seen, told = evidence(run), []
    canvas, axes = new_canvas(run, "How far from the card's physical limit?")
    card = run.profile.gpu
    # Steps are drawn in BF16, whose sizes are those of any variant of one model.
    shape = next((known for variant in seen.variants() if (known := run.profile.shape(variant))), None)
    xs = [10, 5000]
    for peak, text in ((card.bf16_flops, "BF16 peak"), (card.fp8_flops, "FP8 peak")) if card else ():
        ridge = peak / card.hbm_bytes_per_s
        axes.plot(
            [xs[0], ridge, xs[1]], [xs[0] * card.hbm_bytes_per_s / 1e12, peak / 1e12, peak / 1e12], color=GREY, lw=1.2
        )
        axes.annotate(
            text, (xs[1], peak / 1e12), (0, 3), textcoords="offset points", ha="right", fontsize=8, color=GREY
        )
    context = seen.kv_tokens_a_request()
    steps = _steps(shape, context) if card and shape and context else {}
    steps = {name: intensity for name, intensity in steps.items() if intensity > xs[0]}
    for name, intensity in steps.items():
        _mark_on_roof(axes, name, intensity, card)
    drawn, points, matrix, bandwidth = set(), [], {}, {}
    for level_id, s in seen.summaries.items():
        one = seen.roofline(level_id)
        if one is None or s["level"]["repeat"] != 1:
            continue
        variant = s["level"]["variant"]
        axes.plot(
            one.intensity,
            one.flops_per_s / 1e12,
            label=None if variant in drawn else variant,
            **variant_style(variant) | {"ls": ""},
        )
        drawn.add(variant)
        points.append(
            (rate_name(float(s["level"]["rate"])).removesuffix(" req/s"), one.intensity, one.flops_per_s / 1e12)
        )
        matrix[level_id], bandwidth[level_id] = one.compute, one.memory
        told.append(f"{level_id}: {one.compute:.0%} of the matrix peak, {one.memory:.0%} of the bandwidth")
    axes.set(
        xscale="log", yscale="log", xlabel="FLOP for each byte that must be read", ylabel="TFLOP/s needed, estimated"
    )
    axes.set_xlim(*xs)
    axes.xaxis.set_major_formatter(plainly)
    axes.yaxis.set_major_formatter(plainly)
    legend(axes, "upper left")
    label_where_free(axes, points)
    name = card.name if card else "no card"
    caption = (
        f"Lines: what the datasheet of {name} allows. Points: what the tokens of each level needed, estimated from vLLM's "
        f"counters, first seed, some with the offered rate in requests/s.{_bounds_told(steps, card)}"
    )
    summary = f"{len(matrix)} levels needed {share_range(matrix)} of the matrix peak and {share_range(bandwidth)} of the bandwidth"
    alt = f"Roofline chart, log axes. {told_or(told, summary)}."
    return Figure("roofline", canvas, alt, caption_of(caption, run))


def _steps(shape: ModelShape, context: float) -> dict[str, float]:
    """FLOP for each byte read, in BF16, of a step that decodes for 32 or 256 requests with `context` tokens in the KV
    cache each, and of one that prefills 2,048 tokens; counted as `fp8lab.metrics.roofline` does."""
    weights, kv = shape.weight_bytes_read(False), context * shape.kv_bytes_per_token(2)
    decode = {n: sum(shape.flops(n, n)) / (weights + n * kv) for n in (32, 256)}
    prefill = sum(shape.flops(2048, 1)) / weights
    return {f"decode for {n}": one for n, one in decode.items()} | {"prefill of 2,048": prefill}


def _mark_on_roof(axes, name: str, intensity: float, card: Card) -> None:
    at = min(card.bf16_flops, intensity * card.hbm_bytes_per_s) / 1e12
    axes.plot(intensity, at, "|", color=INK, ms=9)
    offset, side = ((4, -9), "left") if at < card.bf16_flops / 1e12 else ((0, -13), "center")
    axes.annotate(name, (intensity, at), offset, textcoords="offset points", ha=side, fontsize=7.5, color=INK)


def _bounds_told(steps: Mapping[str, float], card: Card | None) -> str:
    """Which of the steps memory bounds and which compute: those left and right of the BF16 roof's bend."""
    if not steps or card is None:
        return ""
    bend = card.bf16_flops / card.hbm_bytes_per_s
    sides = [
        (limit, [f"{name} ({one:,.0f})" for name, one in steps.items() if (one < bend) == (limit == "memory")])
        for limit in ("memory", "compute")
    ]
    bound = "; ".join(f"{limit} is the limit of {', '.join(names)}" for limit, names in sides if names)
    return (
        " Ticks: by arithmetic, single BF16 steps that decode for so many requests or prefill so many tokens, FLOP for each "
        f"byte in brackets. The roof bends at {bend:,.0f}: {bound}."
    )
