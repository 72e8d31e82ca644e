"""How far from the card's physical limit: its roofline with a run's levels."""

from collections.abc import Mapping

from ...config.dimensions import ModelShape
from ...config.profile import Card
from ...results.evidence import evidence, rate_name
from ...results.run_folder import Run
from .drawing import GREY, INK, figure, label_where_free, legend, note, plainly, variant_style

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
    for level_id, s in seen.summaries.items():
        one = seen.roofline(level_id)
        if one is not None and s.level.repeat == 1:
            variant, at = s.level.variant, (one.intensity, one.flops_per_s / 1e12)
            style = variant_style(run.profile, variant) | {"ls": ""}
            axes.plot(*at, label=None if variant in drawn else variant, **style)
            drawn.add(variant)
            points.append((rate_name(s.level.rate).removesuffix(" req/s"), *at))
    axes.set(
        xscale="log", yscale="log", xlabel="FLOP for each byte that must be read", ylabel="TFLOP/s needed, estimated"
    )
    axes.set_xlim(*_XS)
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
    cache each, and of one that prefills 2,048 tokens; counted as `fp8lab.metrics.roofline` does."""
    weights, kv = shape.weight_bytes_read(False), context * shape.kv_bytes_per_token(2)
    decode = {n: sum(shape.flops(n, n)) / (weights + n * kv) for n in (32, 256)}
    prefill = sum(shape.flops(2048, 1)) / weights
    return {f"decode for {n}": one for n, one in decode.items()} | {"prefill of 2,048": prefill}


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
