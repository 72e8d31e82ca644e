"""The four headline figures: what was published, what was measured, and both variants at both rates."""

import math
from statistics import geometric_mean

from ...results.evidence import evidence
from ...results.run_folder import Run
from ..verdict import claim_of
from .drawing import GREY, INK, STYLE, figure, label_ends, note, plainly


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
    points = {
        variant: [
            (rate, geometric_mean(values))
            for rate, values in seen.by_rate(variant, "request_throughput").items()
            if math.isfinite(rate)
        ]
        for variant in seen.variants()
        if variant in STYLE
    }
    top = max([claim["rate"], *(x for variant in points.values() for x, _ in variant)]) * 1.15
    axes.plot([0, top], [0, top], color=GREY, lw=1, ls=":")
    axes.annotate(
        "all completed", (top * 0.40, top * 0.42), color=GREY, rotation=34, rotation_mode="anchor", fontsize=8
    )
    for variant, series in points.items():
        if series:
            color, marker = STYLE[variant]
            axes.plot(*zip(*series, strict=True), color=color, marker=marker, lw=1.6, label=variant)
            ends.append((variant, *series[-1], color))
    # Behind what was measured, and large enough to be seen around a marker.
    axes.plot(
        claim["rate"], claim["value"], marker="*", ms=17, mfc="white", mec=INK, ls="", zorder=1.5, label="published"
    )
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
    caption = f"{crossed} (black lines); side by side stand the two variants at equal load"
    return caption + (
        ", thin lines from the lowest to the highest seed." if any(len(v) > 1 for v in seeds.values()) else "."
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or float(value).is_integer() else f"{value:.1f}"
