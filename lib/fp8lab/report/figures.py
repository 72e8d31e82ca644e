"""The four headline figures, drawn from level summaries. Each answers the question in its title."""

import math
from statistics import geometric_mean

from ..results.evidence import evidence
from ..results.run_folder import Run
from .drawing import GREY, INK, STYLE, Figure, caption_of, label_ends, new_canvas, plainly, told_or
from .verdict import claim_of


def throughput(run: Run) -> Figure:
    """Output throughput, whole run: as published and at the other variant's rate."""
    return _bars(
        run, "C1", "throughput", "Does FP8 raise throughput, or does the offered load?", "output tokens/s, whole run"
    )


def concurrency(run: Run) -> Figure:
    """Peak concurrent requests."""
    return _bars(
        run, "C2", "concurrency", "Does FP8 raise concurrency, or does the offered load?", "peak concurrent requests"
    )


def rate(run: Run) -> Figure:
    """Offered against completed request rate, both variants."""
    canvas, axes = new_canvas(run, "How much of the offered rate is completed?")
    claim = claim_of("C3")["fp8"]
    points, told, ends = _points(run, "request_throughput"), [], []
    top = max([claim["rate"], *(x for variant in points.values() for x, _ in variant)]) * 1.15
    axes.plot([0, top], [0, top], color=GREY, lw=1, ls=":")
    axes.annotate(
        "all completed", (top * 0.40, top * 0.42), color=GREY, rotation=34, rotation_mode="anchor", fontsize=8
    )
    for variant, series in points.items():
        if not series:
            continue
        color, marker = STYLE[variant]
        axes.plot(*zip(*series, strict=True), color=color, marker=marker, lw=1.6)
        ends.append((variant, *series[-1], color))
        told += [f"{variant} completed {y:.1f} of {x:g} req/s" for x, y in series]
    # Behind what was measured, and large enough to be seen around a marker.
    axes.plot(claim["rate"], claim["value"], marker="*", ms=17, mfc="white", mec=INK, ls="", zorder=1.5)
    ends.append(("published (FP8)", claim["rate"], claim["value"], INK))
    axes.set(xlabel="offered rate, requests/s", ylabel="completed rate, requests/s")
    axes.set(xlim=(0, top * 1.15), ylim=(0, top * 0.85))
    label_ends(axes, ends)
    caption = f"Completed rate over the whole run, drain tail included. Published: {claim['value']} of {claim['rate']} req/s (FP8)."
    return Figure("rate", canvas, f"Line chart. {told_or(told)}.", caption_of(caption, run))


def tpot(run: Run) -> Figure:
    """Mean time per output token."""
    return _bars(run, "C4", "tpot", "What does a user wait for each token?", "mean time per output token, ms")


def _bars(run: Run, claim_id: str, name: str, title: str, label: str) -> Figure:
    claim = claim_of(claim_id)
    metric, seen = claim["metric"], evidence(run)
    fp8_rate = claim["fp8"]["rate"]
    bf16_rate = claim.get("bf16", {}).get("rate", 50)
    canvas, axes = new_canvas(run, title)
    told, ticks = [], []
    pairs = [(variant, rate_) for variant in ("bf16", "fp8") for rate_ in (bf16_rate, fp8_rate)]
    seeds = {pair: list(seen.seeds(*pair, metric).values()) for pair in pairs}
    most = [max(values) for values in seeds.values() if values]
    top = max([*most, *(claim[side]["value"] for side in ("bf16", "fp8") if side in claim)])
    for group, rate_ in enumerate((bf16_rate, fp8_rate)):
        for offset, variant in ((-0.2, "bf16"), (0.2, "fp8")):
            color, _ = STYLE[variant]
            x = group + offset
            each = seeds[variant, rate_]
            if not each:
                axes.annotate("not run", (x, 0), **_above(GREY))
            else:
                value = geometric_mean(each)
                axes.bar(x, value, 0.36, color=color, label=variant if group == 0 else None)
                if len(each) > 1:
                    axes.vlines(x, min(each), max(each), color=INK, lw=1)
                told.append(f"{variant} at {rate_} req/s: {_number(value)}{_range(each)}")
                # Within the bar, clear of the published line at its top; above it where the bar is short.
                high = value > 0.12 * top
                axes.annotate(_number(value), (x, 0 if high else value), **_above("white" if high else INK))
            if claim.get(variant, {}).get("rate") == rate_:
                said = claim[variant]["value"]
                label_published = "published" if variant == "fp8" else None
                axes.plot([x - 0.18, x + 0.18], [said, said], color=INK, lw=2.4, label=label_published)
                outward, side = (-1, "right") if offset < 0 else (1, "left")
                axes.annotate(
                    _number(said), (x + outward * 0.2, said), (outward * 3, 0),
                    textcoords="offset points", ha=side, va="center", fontsize=9,
                )  # fmt: skip
                told.append(f"published {variant} at {rate_} req/s: {_number(said)}")
        ticks.append(f"offered {rate_} req/s")
    axes.set_xticks(range(len(ticks)), ticks)
    axes.set(ylabel=label, xlim=(-0.75, 1.75), ylim=(0, top * 1.25))
    axes.yaxis.set_major_formatter(plainly)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles, labels, frameon=False, loc="upper left")
    crossed = (
        f"The published comparison is BF16 at {bf16_rate} against FP8 at {fp8_rate} req/s"
        if "bf16" in claim
        else (f"The published value is FP8's at {fp8_rate} req/s")
    )
    caption = f"{crossed} (black lines); side by side stand the two variants at equal load"
    caption += ", thin lines from the lowest to the highest seed." if any(len(v) > 1 for v in seeds.values()) else "."
    return Figure(name, canvas, f"Bar chart of {label}. {told_or(told)}.", caption_of(caption, run))


def _points(run: Run, metric: str) -> dict[str, list[tuple[float, float]]]:
    """(offered rate, mean over the seeds) of every level that was offered a rate, by variant."""
    seen = evidence(run)
    return {
        variant: [
            (rate_, geometric_mean(values))
            for rate_ in seen.rates(variant)
            if math.isfinite(rate_) and (values := seen.seeds(variant, rate_, metric).values())
        ]
        for variant in seen.variants()
        if variant in STYLE
    }


def _above(color: str) -> dict:
    return {"xytext": (0, 4), "textcoords": "offset points", "ha": "center", "fontsize": 9, "color": color}


def _range(values: list[float]) -> str:
    return f" ({_number(min(values))} to {_number(max(values))})" if len(values) > 1 else ""


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or float(value).is_integer() else f"{value:.1f}"
