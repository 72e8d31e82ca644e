"""Figures of the fair comparison and of the limit. Each answers the question in its title, also in black and white."""

import math
from collections.abc import Mapping, Sequence

from ..measure.capacity import SLO
from ..measure.compare import Ratio
from ..profiles import Card
from ..runs import Run
from ..shapes import ModelShape, model_shape
from .evidence import FRONT_ENDS, Evidence, evidence, rate_name
from .fair import METRICS, ablation_effects, equal_load_ratios, kv_room
from .figures import GREY, INK, LONGEST_ALT, STYLE, Figure, caption_of, label_where_free, new_canvas
from .forest import forest

# Behind another front end a variant keeps its colour and marker, drawn half full or hollow.
_FRONT_END = {"": ("full", "-"), "-api4": ("left", ":"), "-rust": ("none", "--"), "-rust-graphs": ("bottom", "-.")}


def _style(variant: str) -> dict:
    """How a variant is drawn: colour and marker are the variant's, filling and line its front end's."""
    base, suffix = _split(variant)
    color, marker = STYLE.get(base, (INK, "v"))
    filling, line = _FRONT_END[suffix]
    return {"color": color, "marker": marker, "fillstyle": filling, "ls": line, "lw": 1.6, "ms": 6}


def _split(variant: str) -> tuple[str, str]:
    suffix = next((s for s in FRONT_ENDS if s and variant.endswith(s)), "")
    return variant.removesuffix(suffix), suffix


def saturation(run: Run) -> Figure:
    """Offered rate against steady output throughput, every variant; all at once at the right."""
    seen, told, summary = evidence(run), [], []
    canvas, axes = new_canvas(run, "Where does each variant stop keeping up?")
    finite = sorted({r for v in seen.variants() for r in seen.rates(v) if math.isfinite(r)}) or [1.0]
    burst = finite[-1] * 1.2
    mean = _tokens_a_request(seen)
    axes.plot([0, finite[-1]], [0, finite[-1] * mean], color=GREY, lw=1, ls=":")
    axes.annotate("as offered", (finite[0] * 1.05, finite[0] * mean * 1.12), color=GREY, fontsize=8, ha="right")
    for variant in seen.variants():
        points = [
            (
                burst if math.isinf(rate) else rate,
                list(seen.seeds(variant, rate, "steady_output_token_throughput").values()),
            )
            for rate in seen.rates(variant)
        ]
        points = [(x, values) for x, values in points if values]
        if not points:
            continue
        style = _style(variant)
        axes.plot([x for x, _ in points], [sum(v) / len(v) for _, v in points], label=variant, **style)
        for x, values in points:
            axes.vlines(x, min(values), max(values), color=style["color"], lw=1.2)
            at = "all at once" if x == burst else f"{x:g} req/s"
            told.append(f"{variant} at {at}: {sum(values) / len(values):,.0f}")
        summary.append(f"{variant} up to {max(sum(v) / len(v) for _, v in points):,.0f}")
    axes.set_xticks([*finite, burst], [*(f"{r:g}" for r in finite), "all at\nonce"])
    axes.set(xlabel="offered rate, requests/s", ylabel="output tokens/s, steady state", xlim=(0, burst * 1.08))
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(_plainly)
    _legend(axes, "upper left")
    caption = (
        "Mean of the seeds, bars from the lowest to the highest. Left half full: four API servers; hollow: the Rust front "
        "end; lower half full: that and larger CUDA graphs."
    )
    return Figure(
        "saturation",
        canvas,
        f"Line chart of steady output tokens/s. {_told(told, '; '.join(summary))}.",
        caption_of(caption, run),
    )


def equal_load(run: Run) -> Figure:
    """FP8 over BF16 at equal load: ratios with 95 % intervals."""
    seen = evidence(run)
    groups = {
        METRICS[metric][0]: [(_where(rate, front_end), one) for front_end, rate, one in equal_load_ratios(seen, metric)]
        for metric in METRICS
    }
    rows = [(f"{metric}, {where}", one) for metric, group in groups.items() for where, one in group]
    return forest(
        [run], "equal_load", "What does FP8 change at equal load?", rows, "FP8 / BF16",
        "Same rate, trace and seeds. Bars are 95 % intervals; a bar across 1 shows no difference.",
        summary=_ratios_told(groups),
    )  # fmt: skip


def ablation(run: Run) -> Figure:
    """Main effects of FP8 weights and of the FP8 KV cache, and their interaction."""
    seen = evidence(run)
    groups = {
        METRICS[metric][0]: [
            (f"{_where(rate, front_end)}: {effect}", one)
            for front_end, rate, effect, one in ablation_effects(seen, metric)
            if math.isinf(rate) or metric == "joules_per_output_token"
        ]
        for metric in METRICS
    }
    rows = [(f"{metric}, {where}", one) for metric, group in groups.items() for where, one in group]
    return forest(
        [run], "ablation", "Which half of FP8 does it?", rows, "ratio",
        "Main effects are mean ratios without and with the other half. Bars are 95 % intervals; across 1: no effect shown.",
        summary=_ratios_told(groups),
    )  # fmt: skip


def littles_law(run: Run) -> Figure:
    """Throughput x mean time in the system against what the server counted in flight, level by level."""
    seen, told = evidence(run), []
    canvas, axes = new_canvas(run, "Does Little's law explain the concurrency?")
    top, drawn, shares = 1.0, set(), {}
    for level_id, s in seen.summaries.items():
        level, expected = seen.level(level_id), s["mean_concurrent_requests"]
        if level is None or level.telemetry is None or not expected:
            continue
        sampled = level.telemetry[level.telemetry["at_s"].between(0, s["duration_s"])]
        counted = float((sampled["running"] + sampled["waiting"]).mean())
        if math.isnan(counted):
            continue
        variant = s["level"]["variant"]
        axes.plot(expected, counted, label=None if variant in drawn else variant, **_style(variant) | {"ls": ""})
        drawn.add(variant)
        told.append(f"{level_id}: {expected:,.0f} by the law, {counted:,.0f} counted in the engine")
        shares[level_id] = counted / expected
        top = max(top, expected, counted)
    axes.plot([1, top * 1.2], [1, top * 1.2], color=GREY, lw=1, ls=":")
    axes.set(xscale="log", yscale="log", xlim=(10, top * 1.3), ylim=(10, top * 1.3))
    axes.set(xlabel="completed requests/s × mean time in the system", ylabel="running + waiting in vLLM's engine, mean")
    axes.xaxis.set_major_formatter(_plainly)
    axes.yaxis.set_major_formatter(_plainly)
    _legend(axes, "upper left")
    caption = (
        "Whole run of each level. On the line: the engine held all requests that were in flight. Below it: some "
        "waited before the engine, in the front-end process, or their last tokens in it."
    )
    summary = f"{len(shares)} levels: the engine counted {_range(shares)} of what the law gives"
    alt = f"Scatter chart, log axes. {_told(told, summary)}."
    return Figure("littles_law", canvas, alt, caption_of(caption, run))


def kv_capacity(run: Run) -> Figure:
    """Requests of this trace that the KV cache can hold, against the most that ran at once."""
    seen, told = evidence(run), []
    rows = [row for row in kv_room(seen) if not _split(row[0])[1]]
    canvas, axes = new_canvas(run, "Was the KV cache ever full?", height=0.9 + 0.55 * max(1, len(rows)))
    axes.grid(axis="y", visible=False)
    for y, (variant, _, holds, most, fullest) in enumerate(rows):
        axes.barh(y, holds, 0.62, color="white", edgecolor=INK)
        axes.barh(y, most, 0.34, color=_style(variant)["color"])
        said = f"room for {holds:,.0f}, most running {most:,.0f}" + (
            "" if fullest is None else f", fullest {fullest:.0%}"
        )
        axes.annotate(said, (holds, y), (4, 0), textcoords="offset points", va="center", fontsize=8)
        told.append(f"{variant}: {said}")
    names = [row[0] for row in rows]
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, axes.get_xlim()[1] * 1.9)
    axes.set_xlabel("requests of this trace")
    caption = "Frame: what the cache holds at the mean context of a running request, as vLLM counted it. Filled: the most that ran at once, over all levels."
    return Figure("kv_capacity", canvas, f"Bar chart. {_told(told)}.", caption_of(caption, run))


def roofline(run: Run) -> Figure:
    """The card's roofline with this run's levels."""
    seen, told = evidence(run), []
    canvas, axes = new_canvas(run, "How far from the card's physical limit?")
    card, shape = run.profile.gpu, model_shape(run.profile.model.shapes)
    xs = [10, 5000]
    for peak, text in ((card.bf16_flops, "BF16 peak"), (card.fp8_flops, "FP8 peak")) if card else ():
        ridge = peak / card.hbm_bytes_per_s
        axes.plot(
            [xs[0], ridge, xs[1]], [xs[0] * card.hbm_bytes_per_s / 1e12, peak / 1e12, peak / 1e12], color=GREY, lw=1.2
        )
        axes.annotate(
            text, (xs[1], peak / 1e12), (0, 3), textcoords="offset points", ha="right", fontsize=8, color=GREY
        )
    steps = _steps(shape, seen.kv_tokens_a_request() or 0.0) if card and shape else {}
    for name, intensity in steps.items():
        if intensity > xs[0]:
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
            **_style(variant) | {"ls": ""},
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
    axes.xaxis.set_major_formatter(_plainly)
    axes.yaxis.set_major_formatter(_plainly)
    _legend(axes, "upper left")
    label_where_free(axes, points)
    name = card.name if card else "no card"
    caption = (
        f"Lines: what the datasheet of {name} allows. Points: what the tokens of each level needed, estimated from vLLM's "
        f"counters, first seed, some with the offered rate in requests/s.{_bounds_told(steps, card)}"
    )
    summary = (
        f"{len(matrix)} levels needed {_range(matrix)} of the matrix peak and {_range(bandwidth)} of the bandwidth"
    )
    alt = f"Roofline chart, log axes. {_told(told, summary)}."
    return Figure("roofline", canvas, alt, caption_of(caption, run))


def _steps(shape: ModelShape, context: float) -> dict[str, float]:
    """FLOP for each byte read, in BF16, of a step that decodes for 1, 32 or 256 requests with `context` tokens in the KV
    cache each, and of one that prefills 2,048 tokens; counted as `fp8lab.measure.roofline` does."""
    weights, kv = shape.weight_bytes_read(False), context * shape.kv_bytes_per_token(2)
    decode = {n: n * shape.flops_per_token / (weights + n * kv) for n in (1, 32, 256)}
    prefill = 2.0 * (2048 * shape.layer_parameters + shape.vocabulary_parameters) / weights
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


def objective(run: Run, slo: SLO) -> Figure:
    """The 99th percentiles over the offered rate, against the limits of an objective."""
    seen, told, summary = evidence(run), [], []
    canvas, axes = new_canvas(run, "Up to which rate is the objective met?")
    for variant in seen.variants():
        points = {
            r: v for r in seen.rates(variant) if math.isfinite(r) and (v := seen.seeds(variant, r, "p99_ttft_ms"))
        }
        if not points:
            continue
        style = _style(variant)
        means = [sum(v.values()) / len(v) for v in points.values()]
        axes.plot(list(points), means, label=variant, **style)
        summary.append(f"{variant} up to {max(means):,.0f} ms")
        for rate, values in points.items():
            axes.vlines(rate, min(values.values()), max(values.values()), color=style["color"], lw=1.2)
            told.append(f"{variant} at {rate:g} req/s: {sum(values.values()) / len(values):,.0f} ms")
    if math.isfinite(slo.ttft_ms):
        axes.axhline(slo.ttft_ms, color=INK, lw=1.2, ls=":")
        axes.annotate(f"objective {slo.ttft_ms:g} ms", (0, slo.ttft_ms), (4, 3), textcoords="offset points", fontsize=8)
    axes.set(yscale="log", xlabel="offered rate, requests/s", ylabel="TTFT p99, ms")
    axes.set_xlim(left=0)
    axes.yaxis.set_major_formatter(_plainly)
    _legend(axes, "upper left")
    caption = f"{slo}. Mean of the seeds, bars from the lowest to the highest."
    return Figure(
        "objective",
        canvas,
        f"Line chart of the 99th percentile of TTFT. {_told(told, '; '.join(summary))}.",
        caption_of(caption, run),
    )


def _told(what: list[str], summary: str = "") -> str:
    """`what` was seen, item by item; in `summary` where that is too long to be read out."""
    text = "; ".join(what) or "nothing is measured yet"
    return summary if summary and len(text) > LONGEST_ALT else text


def _range(shares: Mapping[str, float]) -> str:
    """The lowest and the highest of the levels' shares, with the levels."""
    if not shares:
        return "nothing"
    low, high = min(shares, key=shares.get), max(shares, key=shares.get)
    return f"{shares[low]:.0%} ({low}) to {shares[high]:.0%} ({high})"


def _where(rate: float, front_end: str) -> str:
    return rate_name(rate) + ("" if front_end == FRONT_ENDS[""] else f", {front_end}")


def _ratios_told(groups: Mapping[str, Sequence[tuple[str, Ratio]]]) -> str:
    """Each metric's ratios as a range, and which of them are shown to be off 1: a few by name, more by number."""
    told = []
    for metric, group in groups.items():
        if not group:
            continue
        values = [one.value for _, one in group]
        parts = [f"{metric}: {len(group)} ratios from {min(values):.2f} to {max(values):.2f}"]
        for way, beyond in (
            ("below", [g for g in group if g[1].high < 1]),
            ("above", [g for g in group if g[1].low > 1]),
        ):
            names = ", ".join(f"{where} ({one.value:.2f})" for where, one in beyond)
            if beyond:
                parts.append(
                    f"{'all' if len(beyond) == len(group) else len(beyond)} shown {way} 1"
                    + f": {names}" * (len(beyond) <= 3)
                )
        told.append(", ".join(parts))
    return "; ".join(told)


def _plainly(value: float, _position: int) -> str:
    return f"{value:,.0f}"


def _legend(axes, where: str) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, loc=where, fontsize=8)


def _tokens_a_request(seen: Evidence) -> float:
    some = next((s for s in seen.summaries.values() if s["completed"]), None)
    return some["output_tokens"] / some["completed"] if some else 0.0
