"""The verdicts on what is no value or ratio of levels: M1, memory, R1 to R3, recommended or said in passing, and Q1, quality;
and on what this kit has no measurement of."""

import math
from collections.abc import Callable, Collection

from ..metrics.kv_cache import paging_waste, reserving_waste
from ..metrics.slo import SLO, attains
from ..metrics.statistics import Ratio
from ..results.evidence import FRONT_ENDS, Evidence
from .claims import Verdict, by_interval, left_out, not_judged, number, verdict, without_gpu
from .quality import judge_quality
from .verdict import level_id

_ALTERNATIVES = ("bf16", "fp8-weights", "fp8-kv")


def _one_level(claim: dict, _seen: Evidence) -> list[str]:
    return [level_id("fp8", claim["fp8"]["rate"])]


def _service_line(claim: dict, seen: Evidence, ids: list[str]) -> dict:
    """R1: does FP8 sustain the rate with TTFT within the limit, at the 99th percentile?"""
    rate, limit_ms = claim["fp8"]["rate"], claim["fp8"]["value"]
    held = seen.level(ids[0])
    shown = attains(held.records, SLO("the service line", limit_ms, float("inf")))
    mean, p99 = held.summary["mean_ttft_ms"], held.summary["p99_ttft_ms"]
    reason = (
        f"{shown.reason} (TTFT ≤ {limit_ms} ms); TTFT mean {number(mean)} ms, p99 {number(p99)} ms; "
        f"limited by the {seen.limit(ids[0]).cause}"
    )
    word = {"met": "reproduced", "missed": "not reproduced", "undecided": "undecided"}[shown.state]
    other = [
        f"{variant} {_p99(seen, variant, rate)}"
        for variant in seen.variants()
        if variant != "fp8" and _p99(seen, variant, rate)
    ]
    if other:
        reason += f"; p99 at the same rate: {', '.join(other)}"
    return {
        "protocol": f"FP8 at {rate} req/s", "measured": p99, "measured_parts": {"fp8": p99},
        "verdict": word, "reason": reason,
    }  # fmt: skip


def _p99(seen: Evidence, variant: str, rate: float) -> str:
    values = seen.seeds(variant, rate, "p99_ttft_ms").values()
    return f"{number(max(values))} ms" if values else ""


def _front_end(claim: dict, seen: Evidence) -> str:
    """The front end behind which all four variants were measured, the one least in the way if there are several."""
    rate, metric = claim["fp8"]["rate"], claim["metric"]
    names = ("fp8", *_ALTERNATIVES)
    complete = [
        suffix for suffix in FRONT_ENDS if len(seen.cells([v + suffix for v in names], rate, metric)) == len(names)
    ]
    return complete[-1] if complete else ""


def _four_variants(claim: dict, seen: Evidence) -> list[str]:
    rate, metric, suffix = claim["fp8"]["rate"], claim["metric"], _front_end(claim, seen)
    return [
        level_id(variant + suffix, rate, seed)
        for variant in ("fp8", *_ALTERNATIVES)
        for seed in sorted(seen.seeds(variant + suffix, rate, metric)) or [1]
    ]


def _default_flags(claim: dict, seen: Evidence, ids: list[str]) -> dict:
    """R2: are both halves together at least as fast as either alone and as BF16, with all requests at once?"""
    rate, metric, suffix = claim["fp8"]["rate"], claim["metric"], _front_end(claim, seen)
    against = {v: seen.compare(f"fp8{suffix}", v + suffix, rate, metric) for v in _ALTERNATIVES}
    lowest = min(against.values(), key=lambda one: one.value)
    reason = "throughput of FP8 over " + ", ".join(f"{variant} {one}" for variant, one in against.items())
    if energy := seen.compare(f"fp8{suffix}", f"bf16{suffix}", rate, "joules_per_output_token"):
        reason += f"; joules a token over bf16 {energy}"
    causes = {seen.limit(level).cause for level in ids}
    if not any(cause.startswith("GPU") for cause in causes):
        reason += f"; the GPU was not the limit ({', '.join(sorted(causes))})"
    if "," in (parts := seen.parts([v + suffix for v in ("fp8", *_ALTERNATIVES)], rate)):
        reason += f"; measured in parts {parts} of the run (other machines or commits, run.json)"
    reason += "; whether a pre-quantised checkpoint is better is not tested here"
    words = {_word(claim, one) for one in against.values()}
    word = next(word for word in ("not reproduced", "undecided", "reproduced") if word in words)
    if word == "undecided":
        reason = f"no difference to each of the others is shown: {reason}"
    interval = None if math.isnan(lowest.low) else (lowest.low, lowest.high)
    return {
        "protocol": f"all at once, front end: {FRONT_ENDS[suffix]}", "measured": lowest.value, "interval": interval,
        "measured_parts": {v: one.value for v, one in against.items()}, "verdict": word, "reason": reason,
    }  # fmt: skip


def _word(claim: dict, one: Ratio) -> str:
    """The verdict on one comparison. A single pair shows no difference."""
    return (
        "undecided"
        if math.isnan(one.low)
        else by_interval(claim, claim["fp8"]["value"], one.value, one.low, one.high)[0]
    )


def _paging_waste(claim: dict, seen: Evidence, ids: list[str]) -> dict:
    """R3: how much of the allocated KV memory holds no token, for this trace; against reserving the most."""
    records = seen.level(ids[0]).records
    measured = 100 * paging_waste(records)
    reserved = reserving_waste(records, 2048)
    reason = (
        f"blocks of 16 tokens leave {measured:.1f} % of their slots empty, over all decoding steps of this trace; reserving "
        f"2,048 tokens a request would {'be too little for some' if reserved is None else f'leave {reserved:.0%}'}"
    )
    word, _ = by_interval(claim, claim["fp8"]["value"], measured, math.nan, math.nan)
    return {"measured": measured, "measured_parts": {"fp8": measured}, "verdict": word, "reason": reason}


def _judge_with(levels: Callable, judge: Callable) -> Callable[[dict, str, Evidence], Verdict]:
    """A judge of claims: `levels` names the level ids that it rests on, `judge` is asked when all of them count."""

    def judged(claim: dict, protocol: str, seen: Evidence) -> Verdict:
        ids = levels(claim, seen)
        found = {"protocol": protocol}
        if unjudged := not_judged(seen, ids, records=True):
            found |= dict(zip(("verdict", "reason"), unjudged, strict=True))
        else:
            found |= judge(claim, seen, ids)
            if why := without_gpu(seen):
                found |= {"verdict": "not run", "reason": f"{why}; {found['reason']}"}
        return verdict(claim, seen, ids, **found)

    return judged


def _quality(claim: dict, _protocol: str, seen: Evidence) -> Verdict:
    """Q1: how much of the model's quality is left."""
    return verdict(claim, seen, [], protocol="the same text and prompts", **judge_quality(claim, seen.run))


def _memory_risk(claim: dict, _protocol: str, seen: Evidence) -> Verdict:
    """M1: did BF16 run out of memory at the published loads, and FP8 not? The rule stands in data/published.toml."""
    rates = claim["rates"]
    cells = [(variant, rate) for rate in rates for variant in ("bf16", "fp8")]
    held = {cell: seen.levels(cell[:1], cell[1]) for cell in cells}
    ids = [level for (variant, rate), levels in held.items() for level in levels or [level_id(variant, rate)]]
    found = {"protocol": f"{' and '.join(f'{rate:g}' for rate in rates)} req/s"}
    if unjudged := not_judged(seen, ids):
        word, reason = unjudged
    else:
        both = {
            v: [s for (variant, _), one in held.items() if variant == v for s in one.values()] for v in ("bf16", "fp8")
        }
        ran_out = {variant: _ran_out(levels, claim["full"]) for variant, levels in both.items()}
        if ran_out["bf16"] is False:
            word, so = "not reproduced", "BF16 did not run out of memory: there was no risk to remove"
        elif ran_out["fp8"]:
            word, so = "not reproduced", "FP8 ran out of memory"
        elif ran_out["bf16"] and ran_out["fp8"] is False:
            word, so = "reproduced", "BF16 ran out of memory, FP8 did not"
        else:
            word, so = "undecided", "vLLM's counters were not sampled at every level"
        reason = "; ".join([so, *(f"{variant}: {_memory(levels)}" for variant, levels in both.items())])
        parts = {variant: full for variant, levels in both.items() if (full := _fullest(levels)) is not None}
        found |= {"measured": parts.get("bf16"), "measured_parts": parts}
        if why := without_gpu(seen):
            word, reason = "not run", f"{why}; {reason}"
    told = filter(None, (reason, left_out(seen, cells), _out_elsewhere(claim, seen)))
    return verdict(claim, seen, ids, **found, verdict=word, reason="; ".join(told))


def _out_elsewhere(claim: dict, seen: Evidence) -> str:
    """The levels at other loads, or behind another front end, at which BF16 or FP8 did run out of memory, as text."""
    told = []
    for variant in (base + suffix for base in ("bf16", "fp8") for suffix in FRONT_ENDS):
        for rate in seen.rates(variant):
            levels = seen.levels((variant,), rate)
            if (variant not in ("bf16", "fp8") or rate not in claim["rates"]) and _ran_out(
                levels.values(), claim["full"]
            ):
                told.append(f"{', '.join(levels)} ({_memory(levels.values())})")
    return f"under other loads memory did run out: {'; '.join(told)}" if told else ""


def _ran_out(levels: Collection[dict], full: float) -> bool | None:
    """Whether a request of some of these levels (their summaries) was preempted or failed, or the KV cache was full; None
    when that is not known of all of them."""
    each = [[level.get(key) for key in ("preemptions", "failed", "kv_cache_usage_max")] for level in levels]
    if any((preempted or 0) > 0 or (failed or 0) > 0 or (fullest or 0) >= full for preempted, failed, fullest in each):
        return True
    return None if any(None in one for one in each) else False


def _memory(levels: Collection[dict]) -> str:
    """How near levels came to running out of memory, as text."""
    sums = [[level.get(key) for level in levels] for key in ("preemptions", "failed")]
    preempted, failed = ("unknown" if None in counts else f"{sum(counts):,.0f}" for counts in sums)
    fullest = _fullest(levels)
    share = "was not sampled" if fullest is None else f"at most {fullest:.0f} % full"
    return f"{preempted} preemptions, {failed} failed requests, KV cache {share}"


def _fullest(levels: Collection[dict]) -> float | None:
    """The fullest that the KV cache was in any of the levels, in %; None where it was not sampled."""
    known = [share for level in levels if (share := level.get("kv_cache_usage_max")) is not None]
    return 100 * max(known) if known else None


def _not_measured(claim: dict, _protocol: str, seen: Evidence) -> Verdict:
    """What this kit has no measurement of."""
    return verdict(
        claim, seen, [], protocol="none", verdict="not run", reason=f"not measured here: it needs {claim['needs']}"
    )


RECOMMENDATIONS = {
    "memory risk": _memory_risk,
    "not measured": _not_measured,
    "service line": _judge_with(_one_level, _service_line),
    "default flags": _judge_with(_four_variants, _default_flags),
    "paging waste": _judge_with(_one_level, _paging_waste),
    "quality": _quality,
}
