"""Figures of the fair comparison and of the limit. Each answers the question in its title, also in black and white."""

import math
from collections.abc import Mapping, Sequence

from ..metrics.resources import POWER
from ..metrics.slo import SLO
from ..metrics.statistics import Ratio
from ..results.evidence import FRONT_ENDS, Evidence, evidence, rate_name
from ..results.run_folder import Run
from .drawing import (
    GREY,
    INK,
    Figure,
    caption_of,
    fillings_told,
    front_end_of,
    legend,
    new_canvas,
    plainly,
    share_range,
    told_or,
    variant_style,
)
from .fair import METRICS, ablation_effects, equal_load_ratios, kv_room
from .forest import forest


def saturation(run: Run) -> Figure:
    """Offered rate against steady output throughput, every variant; all at once at the right."""
    seen, told, summary, drawn = evidence(run), [], [], []
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
        style = variant_style(variant)
        axes.plot([x for x, _ in points], [sum(v) / len(v) for _, v in points], label=variant, **style)
        drawn.append(variant)
        for x, values in points:
            axes.vlines(x, min(values), max(values), color=style["color"], lw=1.2)
            at = "all at once" if x == burst else f"{x:g} req/s"
            told.append(f"{variant} at {at}: {sum(values) / len(values):,.0f}")
        summary.append(f"{variant} up to {max(sum(v) / len(v) for _, v in points):,.0f}")
    axes.set_xticks([*finite, burst], [*(f"{r:g}" for r in finite), "all at\nonce"])
    axes.set(xlabel="offered rate, requests/s", ylabel="output tokens/s, steady state", xlim=(0, burst * 1.08))
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(plainly)
    legend(axes, "upper left")
    caption = f"Mean of the seeds, bars from the lowest to the highest.{fillings_told(drawn)}"
    return Figure(
        "saturation",
        canvas,
        f"Line chart of steady output tokens/s. {told_or(told, '; '.join(summary))}.",
        caption_of(caption, run),
    )


def equal_load(run: Run) -> Figure:
    """FP8 over BF16 at equal load: ratios with 95 % intervals."""
    seen = evidence(run)
    groups = {
        METRICS[metric][0]: [(_where(rate, suffix), one) for suffix, rate, one in equal_load_ratios(seen, metric)]
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
            (f"{_where(rate, suffix)}: {effect}", one)
            for suffix, rate, effect, one in ablation_effects(seen, metric)
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
        axes.plot(expected, counted, label=None if variant in drawn else variant, **variant_style(variant) | {"ls": ""})
        drawn.add(variant)
        told.append(f"{level_id}: {expected:,.0f} by the law, {counted:,.0f} counted in the engine")
        shares[level_id] = counted / expected
        top = max(top, expected, counted)
    axes.plot([1, top * 1.2], [1, top * 1.2], color=GREY, lw=1, ls=":")
    axes.set(xscale="log", yscale="log", xlim=(10, top * 1.3), ylim=(10, top * 1.3))
    axes.set(xlabel="completed requests/s × mean time in the system", ylabel="running + waiting in vLLM's engine, mean")
    axes.xaxis.set_major_formatter(plainly)
    axes.yaxis.set_major_formatter(plainly)
    legend(axes, "upper left")
    caption = (
        "Whole run of each level. On the line: the engine held all requests that were in flight. Below it: some "
        "waited before the engine, in the front-end process, or their last tokens in it."
    )
    summary = f"{len(shares)} levels: the engine counted {share_range(shares)} of what the law gives"
    alt = f"Scatter chart, log axes. {told_or(told, summary)}."
    return Figure("littles_law", canvas, alt, caption_of(caption, run))


def kv_capacity(run: Run) -> Figure:
    """Requests of this trace that the KV cache can hold, against the most that ran at once."""
    seen, told = evidence(run), []
    rows = [row for row in kv_room(seen) if not front_end_of(row[0])[1]]
    canvas, axes = new_canvas(run, "Was the KV cache ever full?", height=0.9 + 0.55 * max(1, len(rows)))
    axes.grid(axis="y", visible=False)
    for y, (variant, _, holds, most, fullest) in enumerate(rows):
        axes.barh(y, holds, 0.62, color="white", edgecolor=INK)
        axes.barh(y, most, 0.34, color=variant_style(variant)["color"])
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
    return Figure("kv_capacity", canvas, f"Bar chart. {told_or(told)}.", caption_of(caption, run))


def clocks(run: Run) -> Figure:
    """Power and clock over time of both variants' levels all at once, where the card is least waited for."""
    seen, told = evidence(run), []
    canvas, (upper, lower) = new_canvas(run, "Does the power limit hold the card's clock back?", height=4.6, rows=2)
    suffix = next((s for s in reversed(FRONT_ENDS) if seen.rates(f"bf16{s}", f"fp8{s}")), "")
    ids = [
        level_id
        for variant in (f"bf16{suffix}", f"fp8{suffix}")
        if (rates := seen.rates(variant)) and (level_id := next(iter(seen.levels((variant,), rates[-1])), None))
    ]
    held_at, limit_w = [], None
    for level_id in ids:
        level, ran = seen.level(level_id), seen.clock(level_id)
        if level is None or ran is None or ran.mhz is None:
            continue
        style = variant_style(level.level.variant) | {"marker": "", "ls": "-"}
        limit_w = ran.limit_w or limit_w
        shown = level.telemetry[level.telemetry["at_s"].between(0, level.summary["duration_s"])]
        for axes, column in ((upper, "gpu_power_w"), (lower, "gpu_sm_mhz")):
            known = shown[["at_s", column]].dropna()
            axes.plot(known["at_s"], known[column], label=level.level.variant, **style)
        if "gpu_clock_reasons" in shown:
            known = shown[["at_s", "gpu_sm_mhz", "gpu_clock_reasons"]].dropna()
            held = known[(known["gpu_clock_reasons"].astype(int) & POWER) != 0]
            lower.plot(held["at_s"], held["gpu_sm_mhz"], ls="", marker="|", ms=5, color=style["color"])
            held_at.append(level_id)
        told.append(f"{level_id}: {ran}")
    if limit_w:
        upper.axhline(limit_w, color=GREY, lw=1, ls=":")
        upper.annotate(
            f"limit {limit_w:,.0f} W", (0, limit_w), (4, 3), textcoords="offset points", fontsize=8, color=GREY
        )
        upper.set_ylim(0, limit_w * 1.12)
    upper.set(ylabel="GPU power, W")
    lower.set(xlabel="seconds from the first request", ylabel="SM clock, MHz")
    for axes in (upper, lower):
        axes.yaxis.set_major_formatter(plainly)
        if not told:
            axes.set(xticks=[], yticks=[])
            axes.text(0.02, 0.86, "no GPU was sampled", transform=axes.transAxes, fontsize=8, color=GREY)
    legend(upper, "lower right")
    marks = (
        " Ticks: samples in which NVML named the power limit as what held the clock back."
        if held_at
        else " What held the clock back was not sampled in this run."
    )
    caption = f"Levels {' and '.join(ids) or 'none'}. Power is NVML's mean over a second.{marks}"
    return Figure("clock", canvas, f"Two line charts over time. {told_or(told)}.", caption_of(caption, run))


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
        style = variant_style(variant)
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
    axes.yaxis.set_major_formatter(plainly)
    legend(axes, "upper left")
    caption = f"{slo}. Mean of the seeds, bars from the lowest to the highest."
    return Figure(
        "objective",
        canvas,
        f"Line chart of the 99th percentile of TTFT. {told_or(told, '; '.join(summary))}.",
        caption_of(caption, run),
    )


def _where(rate: float, suffix: str) -> str:
    return rate_name(rate) + (f", {FRONT_ENDS[suffix]}" if suffix else "")


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


def _tokens_a_request(seen: Evidence) -> float:
    some = next((s for s in seen.summaries.values() if s["completed"]), None)
    return some["output_tokens"] / some["completed"] if some else 0.0
