"""Figures of the fair comparison and of the limit. Each answers the question in its title, also in black and white."""

import math

from ..measure.capacity import SLO
from ..runs import Run
from .evidence import FRONT_ENDS, Evidence, evidence, rate_name
from .fair import METRICS, ablation_effects, equal_load_ratios, kv_room
from .figures import GREY, INK, STYLE, Figure, caption_of, new_canvas
from .forest import forest

# Behind another front end a variant keeps its colour and marker, drawn half full or hollow.
_FRONT_END = {"": ("full", "-"), "-api4": ("left", ":"), "-rust": ("none", "--")}


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
    seen, told = evidence(run), []
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
    axes.set_xticks([*finite, burst], [*(f"{r:g}" for r in finite), "all at\nonce"])
    axes.set(xlabel="offered rate, requests/s", ylabel="output tokens/s, steady state", xlim=(0, burst * 1.08))
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(_plainly)
    _legend(axes, "upper left")
    caption = "Mean of the seeds, bars from the lowest to the highest. Half full: four API servers; hollow: the Rust front end."
    return Figure(
        "saturation", canvas, f"Line chart of steady output tokens/s. {_told(told)}.", caption_of(caption, run)
    )


def equal_load(run: Run) -> Figure:
    """FP8 over BF16 at equal load: ratios with 95 % intervals."""
    seen = evidence(run)
    rows = [
        (f"{METRICS[metric][0]}, {rate_name(rate)}{'' if front_end == FRONT_ENDS[''] else f', {front_end}'}", one)
        for metric in METRICS
        for front_end, rate, one in equal_load_ratios(seen, metric)
    ]
    return forest(
        [run], "equal_load", "What does FP8 change at equal load?", rows, "FP8 / BF16",
        "Same rate, trace and seeds. Bars are 95 % intervals; a bar across 1 shows no difference.",
    )  # fmt: skip


def ablation(run: Run) -> Figure:
    """Main effects of FP8 weights and of the FP8 KV cache, and their interaction."""
    seen = evidence(run)
    rows = [
        (
            f"{METRICS[metric][0]}, {rate_name(rate)}{'' if front_end == FRONT_ENDS[''] else f', {front_end}'}: {effect}",
            one,
        )
        for metric in METRICS
        for front_end, rate, effect, one in ablation_effects(seen, metric)
        if math.isinf(rate) or metric == "joules_per_output_token"
    ]
    return forest(
        [run], "ablation", "Which half of FP8 does it?", rows, "ratio",
        "Main effects are mean ratios without and with the other half. Bars are 95 % intervals; across 1: no effect shown.",
    )  # fmt: skip


def littles_law(run: Run) -> Figure:
    """Throughput x mean time in the system against what the server counted in flight, level by level."""
    seen, told = evidence(run), []
    canvas, axes = new_canvas(run, "Does Little's law explain the concurrency?")
    top, drawn = 1.0, set()
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
    return Figure("littles_law", canvas, f"Scatter chart, log axes. {_told(told)}.", caption_of(caption, run))


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
    card = run.profile.gpu
    xs = [10, 2000]
    for peak, text in ((card.bf16_flops, "BF16 peak"), (card.fp8_flops, "FP8 peak")) if card else ():
        ridge = peak / card.hbm_bytes_per_s
        axes.plot(
            [xs[0], ridge, xs[1]], [xs[0] * card.hbm_bytes_per_s / 1e12, peak / 1e12, peak / 1e12], color=GREY, lw=1.2
        )
        axes.annotate(
            text, (xs[1], peak / 1e12), (0, 3), textcoords="offset points", ha="right", fontsize=8, color=GREY
        )
    drawn = set()
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
        told.append(f"{level_id}: {one.compute:.0%} of the matrix peak, {one.memory:.0%} of the bandwidth")
    axes.set(
        xscale="log", yscale="log", xlabel="FLOP for each byte that must be read", ylabel="TFLOP/s needed, estimated"
    )
    axes.set_xlim(*xs)
    axes.xaxis.set_major_formatter(_plainly)
    axes.yaxis.set_major_formatter(_plainly)
    _legend(axes, "upper left")
    name = card.name if card else "no card"
    caption = f"Lines: what the datasheet of {name} allows. Points: what the tokens of each level needed, estimated from vLLM's counters, first seed."
    return Figure("roofline", canvas, f"Roofline chart, log axes. {_told(told)}.", caption_of(caption, run))


def objective(run: Run, slo: SLO) -> Figure:
    """The 99th percentiles over the offered rate, against the limits of an objective."""
    seen, told = evidence(run), []
    canvas, axes = new_canvas(run, "Up to which rate is the objective met?")
    for variant in seen.variants():
        points = {
            r: v for r in seen.rates(variant) if math.isfinite(r) and (v := seen.seeds(variant, r, "p99_ttft_ms"))
        }
        if not points:
            continue
        style = _style(variant)
        axes.plot(list(points), [sum(v.values()) / len(v) for v in points.values()], label=variant, **style)
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
        "objective", canvas, f"Line chart of the 99th percentile of TTFT. {_told(told)}.", caption_of(caption, run)
    )


def _told(what: list[str]) -> str:
    return "; ".join(what) or "nothing is measured yet"


def _plainly(value: float, _position: int) -> str:
    return f"{value:,.0f}"


def _legend(axes, where: str) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, loc=where, fontsize=8)


def _tokens_a_request(seen: Evidence) -> float:
    some = next((s for s in seen.summaries.values() if s["completed"]), None)
    return some["output_tokens"] / some["completed"] if some else 0.0
