"""Figures of the comparison: as published; at equal load; where each variant stops keeping up, and why."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import geometric_mean

from ...config.profile import rate_name
from ...metrics.resources import POWER
from ...metrics.slo import SLO
from ...results.evidence import Compared, Evidence, evidence
from ...results.run_folder import Run
from ...ui.text import shown
from ..tables.comparison import METRICS, UNSEALED, causes, mean_of, once, unsealing_steps
from ..verdict import claim_of
from .drawing import GREY, INK, STYLE, Figure, figure, fillings, forest, label_ends, legend, note, plainly, style_of

_SEEDS = "Mean of the seeds, bars from the lowest to the highest."
_EQUAL_LOAD, _HALVES = "What does FP8 change at equal load?", "Which half of FP8 does it?"
_WORTH = "What is FP8 worth, and what was the limit?"


@figure("saturation", "Where does each variant stop keeping up?")
def saturation_figure(axes, run: Run) -> str:
    """Offered rate against steady output throughput, every variant; all at once at the right."""
    seen = evidence(run)
    finite = sorted({r for v in seen.variants() for r in seen.rates(v) if math.isfinite(r)}) or [1.0]
    burst = finite[-1] * 1.2
    some = next((s for s in seen.summaries.values() if s.completed), None)
    mean = some.output_tokens / some.completed if some else 0.0
    axes.plot([0, finite[-1]], [0, finite[-1] * mean], color=GREY, lw=1, ls=":")
    axes.annotate("as offered", (finite[0] * 1.05, finite[0] * mean * 1.12), color=GREY, fontsize=8, ha="right")
    drawn = _over_rates(axes, seen, "steady_output_token_throughput", lambda rate: min(rate, burst))
    axes.set_xticks([*finite, burst], [*(f"{r:g}" for r in finite), "all at\nonce"])
    axes.set(xlabel="offered rate, requests/s", ylabel="output tokens/s, steady state", xlim=(0, burst * 1.08))
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(plainly)
    legend(axes, "upper left")
    return _SEEDS + fillings(run.profile, drawn)


@figure("unsealing", "What does each change to the server give?")
def unsealing_figure(axes, run: Run) -> str:
    """Output tokens/s with all requests at once, variant by variant: whole run and steady state."""
    seen = evidence(run)
    steps = unsealing_steps(seen)
    axes.figure.set_figheight(1.4 + 0.55 * max(1, len(steps)))
    for y, (variant, _, _) in enumerate(steps):
        color = STYLE.get(run.profile.base(variant), (INK, ""))[0]
        whole, steady = (mean_of(seen, variant, metric) for metric in UNSEALED)
        for x, height, alpha in ((steady, 0.76, 0.35), (whole, 0.4, 1.0)):
            if x is not None:
                axes.barh(y, x, height, color=color, alpha=alpha)
        note(axes, f"{shown(whole)} / {shown(steady)}", (max(whole or 0, steady or 0), y), va="center")
    axes.grid(axis="y", visible=False)
    axes.set_yticks(range(len(steps)), [variant for variant, _, _ in steps])
    axes.invert_yaxis()
    axes.set_xlabel("output tokens/s, all requests at once")
    axes.margins(x=0.22)
    axes.xaxis.set_major_formatter(plainly)
    return "Mean of the seeds: whole run (full colour) / steady state (pale). The table says what each variant changes."


@figure("objective", "Up to which rate is the objective met?")
def objective_figure(axes, run: Run, slo: SLO) -> str:
    """TTFT's 99th percentile over the offered rate, against the limit of an objective."""
    _over_rates(axes, evidence(run), "p99_ttft_ms", lambda rate: rate if math.isfinite(rate) else None)
    if math.isfinite(limit := slo.ttft_ms):
        axes.axhline(limit, color=INK, lw=1.2, ls=":")
        beside = {"xycoords": ("axes fraction", "data"), "ha": "right"}
        note(axes, f"objective {limit:g} ms", (1, limit), (-4, 3), **beside)
    axes.set(yscale="log", xlabel="offered rate, requests/s", ylabel="TTFT p99, ms")
    axes.set_xlim(left=0)
    axes.yaxis.set_major_formatter(plainly)
    legend(axes, "upper left")
    return f"{slo}. {_SEEDS}"


def _over_rates(axes, seen: Evidence, metric: str, place) -> list[str]:
    """Draws every variant's `metric` over its rates, at the x that `place` gives each (None: left out); the variants drawn."""
    drawn = []
    for variant in seen.variants():
        held = ((place(rate), values) for rate, values in seen.by_rate(variant, metric).items())
        if points := [(x, values) for x, values in held if x is not None]:
            style = style_of(seen.run.profile, variant)
            axes.plot([x for x, _ in points], [sum(v) / len(v) for _, v in points], label=variant, **style)
            for x, values in points:
                axes.vlines(x, min(values), max(values), color=style["color"], lw=1.2)
            drawn.append(variant)
    return drawn


@figure("equal_load", _EQUAL_LOAD)
def equal_load_figure(axes, run: Run) -> str:
    """FP8 over BF16 at equal load, with intervals."""
    rows = [(metric, c) for metric in METRICS for c in evidence(run).equal_load(metric)]
    forest(axes, _EQUAL_LOAD, [(_row(*row), row[1].ratio) for row in rows], "FP8 / BF16")
    return "Same rate, trace and seeds. Bars are 95 % intervals; a bar across 1 shows no difference."


@figure("ablation", _HALVES)
def ablation_figure(axes, run: Run) -> str:
    """What FP8 weights and the FP8 KV cache each do, and their interaction."""
    rows = [(metric, c) for metric in METRICS for c in evidence(run).ablation(metric)]
    rows = [(metric, c) for metric, c in rows if math.isinf(c.rate) or metric == "joules_per_output_token"]
    forest(axes, _HALVES, [(_row(*row), row[1].ratio) for row in rows], "ratio")
    return "Main effects are mean ratios without and with the other half. Bars are 95 % intervals; across 1: no effect shown."


def _row(metric: str, c: Compared) -> str:
    setup = "" if c.variants["bf16"] == "bf16" else f", {c.brief}"
    return f"{METRICS[metric][0]}, {rate_name(c.rate)}{setup}" + (f": {c.effect}" if c.effect else "")


def worth_figure(*runs: Run, rows: Mapping[tuple[str, float, str], str] | None = None) -> Figure:
    """The throughput ratios at equal load that rest on repeats, run by run, with what limited them, beside the published one.
    `rows` chooses among them and names them: text by (run, rate, setup)."""
    return _worth(*([run for run in once(runs) if _repeated(run)] or once(runs)), rows=rows)


def _repeated(run: Run) -> list[Compared]:
    return [c for c in evidence(run).equal_load("output_token_throughput") if c.ratio.pairs >= 2]


@figure("worth", _WORTH)
def _worth(axes, *runs: Run, rows: Mapping[tuple[str, float, str], str] | None) -> str:
    claim, drawn = claim_of("C1"), {}
    bf16, fp8 = claim["bf16"], claim["fp8"]
    for run in runs:
        for c in _repeated(run):
            behind = "" if c.variants["bf16"] == "bf16" else f", behind {c.brief}"
            name = (rows or {}).get((run.path.name, c.rate, c.setup), f"{run.path.name}, {rate_name(c.rate)}{behind}")
            limit = _mostly(*(causes(evidence(run), c.variants[base], c.rate) for base in ("bf16", "fp8")))
            drawn[run.path.name, c.rate, c.setup] = (f"{name}\nlimit: {limit}", c.ratio)
    text = f"published, other loads:\nFP8 at {fp8['rate']}, BF16 at {bf16['rate']} req/s"
    shown = [drawn[key] for key in (rows or drawn)]
    forest(axes, _WORTH, shown, "output tokens/s, FP8 / BF16", said=(text, fp8["value"] / bf16["value"]))
    return (
        "Same rate, trace and seeds, 95 % intervals; a bar across 1 shows no difference. Star: the published ratio, which "
        "crosses two loads. Where the API server is the limit the ratio is not the card's."
    )


def _mostly(bf16: Counter[str], fp8: Counter[str]) -> str:
    """What limited most levels of each variant in a few words; once where it is the same."""
    causes = [Counter({}), Counter({})]
    for plain, one in zip(causes, (bf16, fp8), strict=True):
        for cause, count in one.items():
            plain[cause.partition(",")[0]] += count
    told = [f"{'' if len(one) == 1 else 'mostly '}{one.most_common(1)[0][0]}" for one in causes]
    return told[0] if told[0] == told[1] else f"BF16 {told[0]}, FP8 {told[1]}"


@figure("littles_law", "Does Little's law explain the concurrency?")
def littles_law_figure(axes, run: Run) -> str:
    """Throughput x mean time in the system against what the EngineCore counted in flight, level by level."""
    seen, top, drawn = evidence(run), 1.0, set()
    for level_id, (expected, counted) in seen.in_flight().items():
        variant = seen.summaries[level_id].level.variant
        style = style_of(run.profile, variant) | {"ls": ""}
        axes.plot(expected, counted, label=None if variant in drawn else variant, **style)
        drawn.add(variant)
        top = max(top, expected, counted)
    axes.plot([1, top * 1.2], [1, top * 1.2], color=GREY, lw=1, ls=":")
    axes.set(xscale="log", yscale="log", xlim=(10, top * 1.3), ylim=(10, top * 1.3))
    axes.set_xlabel("completed requests/s × mean time in the system")
    axes.set_ylabel("running + waiting in the EngineCore, mean")
    axes.xaxis.set_major_formatter(plainly)
    axes.yaxis.set_major_formatter(plainly)
    legend(axes, "upper left")
    return (
        "Whole run of each level. On the line: the EngineCore held all requests that were in flight. Below it: some waited "
        "before it, in the API server, or their last tokens did."
    )


@figure("kv_capacity", "Was the KV cache ever full?")
def kv_capacity_figure(axes, run: Run) -> str:
    """Requests of this trace that the KV cache can hold, against the most that ran at once."""
    rows = [row for row in evidence(run).kv_room() if run.profile.base(row[0]) == row[0]]
    axes.figure.set_figheight(0.9 + 0.55 * max(1, len(rows)))
    axes.grid(axis="y", visible=False)
    for y, (variant, _, holds, most, fullest) in enumerate(rows):
        axes.barh(y, holds, 0.62, color="white", edgecolor=INK)
        axes.barh(y, most, 0.34, color=style_of(run.profile, variant)["color"])
        share = "" if fullest is None else f", fullest {fullest:.0%}"
        note(axes, f"room for {holds:,.0f}, most running {most:,.0f}{share}", (holds, y), (4, 0), va="center")
    axes.set_yticks(range(len(rows)), [row[0] for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, axes.get_xlim()[1] * 1.9)
    axes.set_xlabel("requests of this trace")
    frame = "Frame: what the cache holds at the mean context of a running request, as vLLM counted it."
    return f"{frame} Filled: the most that ran at once, over all levels."


@figure("clock", "Does the power limit hold the card's clock back?", height=4.6, rows=2)
def clock_figure(axes: Sequence, run: Run) -> str:
    """Power and clock over time of both variants' levels all at once, where the card is least waited for."""
    seen, (upper, lower) = evidence(run), axes
    ids = seen.fullest_pair()
    sampled, limit_w, drawn = False, None, False
    for level_id in ids:
        level, ran = seen.level(level_id), seen.clock(level_id)
        if level is None or ran is None or ran.mhz is None:
            continue
        style = style_of(run.profile, level.level.variant) | {"marker": "", "ls": "-"}
        limit_w, drawn = ran.limit_w or limit_w, True
        shown = level.telemetry[level.telemetry["at_s"].between(0, level.summary.duration_s)]
        for each, column in ((upper, "gpu_power_w"), (lower, "gpu_sm_mhz")):
            known = shown[["at_s", column]].dropna()
            each.plot(known["at_s"], known[column], label=level.level.variant, **style)
        if "gpu_clock_reasons" in shown:
            known = shown[["at_s", "gpu_sm_mhz", "gpu_clock_reasons"]].dropna()
            held = known[(known["gpu_clock_reasons"].astype(int) & POWER) != 0]
            lower.plot(held["at_s"], held["gpu_sm_mhz"], ls="", marker="|", ms=5, color=style["color"])
            sampled = True
    if limit_w:
        upper.axhline(limit_w, color=GREY, lw=1, ls=":")
        note(upper, f"limit {limit_w:,.0f} W", (0, limit_w), color=GREY)
        upper.set_ylim(0, limit_w * 1.12)
    upper.set(ylabel="GPU power, W")
    lower.set(xlabel="seconds from the first request", ylabel="SM clock, MHz")
    for each in (upper, lower):
        each.yaxis.set_major_formatter(plainly)
        if not drawn:
            each.set(xticks=[], yticks=[])
            each.text(0.02, 0.86, "no GPU was sampled", transform=each.transAxes, fontsize=8, color=GREY)
    legend(upper, "lower right")
    marks = "Ticks: samples in which NVML named the power limit as what held the clock back."
    marks = marks if sampled else "What held the clock back was not sampled in this run."
    return f"Levels {' and '.join(ids) or 'none'}. Power is NVML's mean over a second. {marks}"


@figure("throughput", "Does FP8 raise throughput, or does the offered load?")
def throughput_figure(axes, run: Run) -> str:
    """C1: output throughput, published against this run, and both variants at equal load."""
    return _bars(axes, run, "C1", "output tokens/s, whole run")


@figure("concurrency", "Does FP8 raise concurrency, or does the offered load?")
def concurrency_figure(axes, run: Run) -> str:
    """C2: peak concurrent requests, published against this run, and both variants at equal load."""
    return _bars(axes, run, "C2", "peak concurrent requests")


@figure("rate", "How much of the offered rate is completed?")
def rate_figure(axes, run: Run) -> str:
    """C3: offered against completed request rate."""
    claim, seen, ends = claim_of("C3")["fp8"], evidence(run), []
    points = {}
    for variant in seen.variants():
        if variant in STYLE:
            held = seen.by_rate(variant, "request_throughput").items()
            points[variant] = [(rate, geometric_mean(values)) for rate, values in held if math.isfinite(rate)]
    top = max([claim["rate"], *(x for variant in points.values() for x, _ in variant)]) * 1.15
    axes.plot([0, top], [0, top], color=GREY, lw=1, ls=":")
    turned = {"rotation": 34, "rotation_mode": "anchor"}
    axes.annotate("all completed", (top * 0.40, top * 0.42), color=GREY, fontsize=8, **turned)
    for variant, series in points.items():
        if series:
            color, marker = STYLE[variant]
            axes.plot(*zip(*series, strict=True), color=color, marker=marker, lw=1.6, label=variant)
            ends.append((variant, *series[-1], color))
    # Behind what was measured, and large enough to be seen around a marker.
    star = {"marker": "*", "ms": 17, "mfc": "white", "mec": INK, "ls": "", "zorder": 1.5}
    axes.plot(claim["rate"], claim["value"], label="published", **star)
    ends.append(("published (FP8)", claim["rate"], claim["value"], INK))
    axes.set(xlabel="offered rate, requests/s", ylabel="completed rate, requests/s")
    axes.set(xlim=(0, top * 1.15), ylim=(0, top * 0.85))
    label_ends(axes, ends)
    said = f"Published: {claim['value']} of {claim['rate']} req/s (FP8)."
    return f"Completed rate over the whole run, drain tail included. {said}"


@figure("tpot", "What does a user wait for each token?")
def tpot_figure(axes, run: Run) -> str:
    """C4: mean time per output token."""
    return _bars(axes, run, "C4", "mean time per output token, ms")


def _bars(axes, run: Run, claim_id: str, label: str) -> str:
    claim, seen = claim_of(claim_id), evidence(run)
    fp8_rate, bf16_rate = claim["fp8"]["rate"], claim.get("bf16", {}).get("rate", 50)
    pairs = [(variant, rate) for variant in ("bf16", "fp8") for rate in (bf16_rate, fp8_rate)]
    seeds = {pair: list(seen.seeds(*pair, claim["metric"]).values()) for pair in pairs}
    most = [max(values) for values in seeds.values() if values]
    top = max([*most, *(claim[side]["value"] for side in ("bf16", "fp8") if side in claim)])
    above = {"ha": "center", "fontsize": 9}
    for group, rate in enumerate((bf16_rate, fp8_rate)):
        for offset, variant in ((-0.2, "bf16"), (0.2, "fp8")):
            x, each = group + offset, seeds[variant, rate]
            if not each:
                note(axes, "not run", (x, 0), (0, 4), color=GREY, **above)
            else:
                value = geometric_mean(each)
                axes.bar(x, value, 0.36, color=STYLE[variant][0], label=variant if group == 0 else None)
                if len(each) > 1:
                    axes.vlines(x, min(each), max(each), color=INK, lw=1)
                # Within the bar, clear of the published line at its top; above it where the bar is short.
                high = value > 0.12 * top
                note(axes, _number(value), (x, 0 if high else value), (0, 4), color="white" if high else INK, **above)
            if claim.get(variant, {}).get("rate") == rate:
                said, (outward, side) = claim[variant]["value"], (-1, "right") if offset < 0 else (1, "left")
                published = "published" if variant == "fp8" else None
                axes.plot([x - 0.18, x + 0.18], [said, said], color=INK, lw=2.4, label=published)
                note(axes, _number(said), (x + outward * 0.2, said), (outward * 3, 0), ha=side, va="center", fontsize=9)
    axes.set_xticks((0, 1), [f"offered {rate} req/s" for rate in (bf16_rate, fp8_rate)])
    axes.set(ylabel=label, xlim=(-0.75, 1.75), ylim=(0, top * 1.25))
    axes.yaxis.set_major_formatter(plainly)
    axes.legend(frameon=False, loc="upper left")
    crossed = f"The published value is FP8's at {fp8_rate} req/s"
    if "bf16" in claim:
        crossed = f"The published comparison is BF16 at {bf16_rate} against FP8 at {fp8_rate} req/s"
    ends = ", thin lines from the lowest to the highest seed" if any(len(v) > 1 for v in seeds.values()) else ""
    return f"{crossed} (black lines); side by side stand the two variants at equal load{ends}."


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or float(value).is_integer() else f"{value:.1f}"
