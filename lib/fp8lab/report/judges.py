"""One judge for each kind of claim: ratios and values of levels, what is recommended or said in passing, quality."""

import dataclasses
import math
from collections.abc import Callable, Collection
from statistics import fmean, geometric_mean

from ..config.dimensions import recipe
from ..config.profile import level_id
from ..experiment.anatomy import anatomies, floors_of
from ..experiment.quality import comparisons, reference_variant
from ..metrics.anatomy import ATTENTION, LAYERS, NORMS, QUANTISATION
from ..metrics.performance import paging_waste, reserving_waste
from ..metrics.slo import SLO, attains
from ..metrics.statistics import Ratio, contrast, ratio
from ..metrics.summary import Summary
from ..results.evidence import Evidence, other_card, unmeasured
from ..ui import four_digits
from .verdict import Verdict, allowed, by_interval, found, left_out, near, not_judged, verdict, weakest

# The load alone is the cause of an effect when it brings, at the lower end of its interval, this share of it.
_MOST = 2 / 3
_ALTERNATIVES = ("bf16", "fp8-weights", "fp8-kv")


def judge_values(claim: dict, protocol: str, seen: Evidence) -> Verdict:
    """A claim on a metric of levels (C1 to C4): FP8's mean over its seeds, or its ratio to BF16's, against the published
    value; one seed, without an interval, decides nothing."""
    sides = [side for side in ("fp8", "bf16") if side in claim]
    is_ratio, metric = claim["quantity"] == "ratio", claim["metric"]
    said = {side: claim[side]["value"] for side in sides}
    seeds = {side: seen.seeds(side, claim[side]["rate"], metric) for side in sides}
    shared = sorted(set.intersection(*(set(values) for values in seeds.values())))
    ids = [level_id(side, claim[side]["rate"], seed) for side in reversed(sides) for seed in shared or [1]]
    value, measured, mean = said["fp8"] / said.get("bf16", 1.0) if is_ratio else said["fp8"], None, None
    if shared:
        mean = contrast(seeds, {"fp8": 1.0, "bf16": -1.0} if is_ratio else {"fp8": 1.0})
        measured = mean.value
    cause = _cause(claim, ids, mean, seen) if mean and not unmeasured(seen.run) else ""
    word, reason = _verdict(claim, ids, value, mean, cause, seeds, seen)
    return verdict(
        claim, seen, ids,
        protocol=protocol, unit="x" if is_ratio else claim["unit"], published=value, measured=measured,
        interval=mean.interval if mean else None,
        published_parts=said, verdict=word, cause=cause, reason=reason,
        measured_parts={
            side: geometric_mean(values[seed] for seed in shared or values) for side, values in seeds.items() if values
        },
    )  # fmt: skip


def _verdict(claim: dict, ids, value: float, mean: Ratio | None, cause: str, seeds, seen: Evidence) -> tuple[str, str]:
    if unjudged := not_judged(seen, ids):
        return unjudged
    if mean is None:
        return "invalid run", f"no {claim['metric']} was measured: nothing completed"
    told = (_each_seed(claim, seeds, value), left_out(seen, _levels_of(claim)), _causes(claim, seen))
    behind = "".join(f"; {text}" for text in told if text)
    word, how_near = by_interval(claim, value, mean.value, mean.low, mean.high)
    if why := unmeasured(seen.run):
        return "not run", f"{why}, so no verdict; {near(mean.value, value)}{behind}"
    return "reproduced, other cause" if word == "reproduced" and cause.startswith("no") else word, f"{how_near}{behind}"


def _cause(claim: dict, ids: list[str], mean: Ratio, seen: Evidence) -> str:
    """Whether the stated cause holds: "no (the other one)", "undecided", or "" where nothing speaks against it."""
    if claim["quantity"] == "ratio" and mean.value > 1 and (load := _load_alone(claim, seen)):
        needed = _MOST * (mean.value - 1)
        # Without an interval (nan) it is neither.
        return "no (the offered load)" if load.low - 1 >= needed else "" if load.high - 1 < needed else "undecided"
    if claim["cause"] == "the card":
        others = {seen.limit(level).cause for level in ids if level in seen.summaries}
        if not any(cause.startswith(("GPU", "KV", "unknown")) for cause in others):
            return f"no (the {' or the '.join(sorted(others))})"
    return ""


def _levels_of(claim: dict) -> list[tuple[str, float]]:
    return [(side, claim[side]["rate"]) for side in ("bf16", "fp8") if side in claim]


def _each_seed(claim: dict, seeds, value: float) -> str:
    """What each seed gave, as text, with a word when they disagree about the claim; empty for a single one."""
    over, under = seeds["fp8"], seeds.get("bf16")
    each = {seed: over[seed] / (under[seed] if under else 1.0) for seed in over if not under or seed in under}
    if len(each) < 2:
        return ""
    low, high = allowed(claim)
    answers = {low <= one / value - 1 <= high for one in each.values()}
    shown = ", ".join(f"{one:.2f}×" if under else four_digits(one) for one in each.values())
    return f"seeds {shown}{'' if len(answers) == 1 else ' (they disagree about the tolerance)'}"


def _causes(claim: dict, seen: Evidence) -> str:
    """What the load alone does to BF16, and what FP8 does at equal load, as text."""
    parts = []
    if claim["quantity"] == "ratio" and (load := _load_alone(claim, seen)):
        parts.append(f"BF16 alone, from {claim['bf16']['rate']} to {claim['fp8']['rate']} req/s: {load}")
    ratios = {rate: seen.compare("fp8", "bf16", rate, claim["metric"]) for _, rate in _levels_of(claim)}
    if each := [f"{one} at {rate} req/s" for rate, one in sorted(ratios.items()) if one]:
        parts.append(f"FP8 over BF16 at equal load: {', '.join(each)}")
    return "; ".join(parts)


def _load_alone(claim: dict, seen: Evidence) -> Ratio | None:
    """What the same step in offered load does without FP8: BF16 at FP8's rate over BF16 at its own."""
    return ratio(*(seen.seeds("bf16", claim[side]["rate"], claim["metric"]) for side in ("fp8", "bf16")))


def _seeds_of_fp8(claim: dict, seen: Evidence) -> list[str]:
    rate = claim["fp8"]["rate"]
    return list(seen.levels(("fp8",), rate)) or [level_id("fp8", rate)]


def _service_line(claim: dict, seen: Evidence, ids: list[str]) -> dict:
    """R1: does FP8 sustain the rate with TTFT within the limit, at the 99th percentile?"""
    rate, limit_ms = claim["fp8"]["rate"], claim["fp8"]["value"]
    ids = sorted(ids, key=lambda one: -seen.summaries[one].p99_ttft_ms)
    shown = [attains(seen.level(one).records, SLO("the service line", limit_ms, float("inf"))) for one in ids]
    slowest = seen.summaries[ids[0]]
    mean, p99 = slowest.mean_ttft_ms, slowest.p99_ttft_ms
    reason = f"{shown[0].reason} (TTFT ≤ {limit_ms} ms); TTFT mean {four_digits(mean)} ms, p99 {four_digits(p99)} ms; "
    reason += f"limited by the {seen.limit(ids[0]).cause}"
    reason += f"; of {len(ids)} seeds that is the slowest" if len(ids) > 1 else ""
    words = {"met": "reproduced", "missed": "not reproduced", "undecided": "undecided"}
    word = weakest([words[one.state] for one in shown])
    others = {seen.instead.get(v, v): seen.seeds(v, rate, "p99_ttft_ms") for v in seen.variants() if v != "fp8"}
    if told := [f"{variant} {four_digits(max(seeds.values()))} ms" for variant, seeds in others.items() if seeds]:
        reason += f"; p99 of the slowest seed at the same rate: {', '.join(told)}"
    return found(seen, word, reason, protocol=f"FP8 at {rate} req/s", measured=p99, measured_parts={"fp8": p99})


def _setup(claim: dict, seen: Evidence) -> dict[str, str]:
    """By base the variants of the setup in which all four were measured, the last one, least in the way, of several."""
    rate, metric = claim["fp8"]["rate"], claim["metric"]
    names = ("fp8", *_ALTERNATIVES)
    held = [one for one in seen.setups(*names).values() if len(seen.cells(one.values(), rate, metric)) == len(names)]
    return held[-1] if held else {name: name for name in names}


def _four_variants(claim: dict, seen: Evidence) -> list[str]:
    rate, metric, variants = claim["fp8"]["rate"], claim["metric"], _setup(claim, seen)
    names = [variants[base] for base in ("fp8", *_ALTERNATIVES)]
    return [level_id(v, rate, seed) for v in names for seed in sorted(seen.seeds(v, rate, metric)) or [1]]


def _default_flags(claim: dict, seen: Evidence, ids: list[str]) -> dict:
    """R2: are both halves together at least as fast as either alone and as BF16, with all requests at once?"""
    rate, metric, variants = claim["fp8"]["rate"], claim["metric"], _setup(claim, seen)
    said = claim["fp8"]["value"]
    against = {base: seen.compare(variants["fp8"], variants[base], rate, metric) for base in _ALTERNATIVES}
    setup = f"all at once, API server: {seen.run.profile.setup(variants['fp8'])}"
    if apart := [base for base, one in against.items() if one is None]:
        return found(seen, "undecided", f"FP8 shares no seed with {', '.join(apart)}", protocol=setup)
    lowest = min(against.values(), key=lambda one: one.value)
    reason = "throughput of FP8 over " + ", ".join(f"{variant} {one}" for variant, one in against.items())
    if energy := seen.compare(variants["fp8"], variants["bf16"], rate, "joules_per_output_token"):
        reason += f"; joules a token over bf16 {energy}"
    causes = {seen.limit(level).cause for level in ids}
    if not any(cause.startswith("GPU") for cause in causes):
        reason += f"; the GPU was not the limit ({', '.join(sorted(causes))})"
    if "," in (parts := seen.parts(variants.values(), rate)):
        reason += f"; measured in parts {parts} of the run (other machines or commits, run.json)"
    reason += "; whether a pre-quantised checkpoint is better is not tested here"
    word = weakest({by_interval(claim, said, one.value, one.low, one.high)[0] for one in against.values()})
    if word == "undecided":
        reason = f"no difference to each of the others is shown: {reason}"
    return found(
        seen, word, reason,
        protocol=setup, measured=lowest.value,
        interval=lowest.interval, measured_parts={v: one.value for v, one in against.items()},
    )  # fmt: skip


def _paging_waste(claim: dict, seen: Evidence, ids: list[str]) -> dict:
    """R3: how much of the allocated KV memory holds no token, for this trace; against reserving the most."""
    records = seen.level(ids[0]).records
    measured, reserved = 100 * paging_waste(records), reserving_waste(records, 2048)
    beside = "be too little for some" if reserved is None else f"leave {reserved:.0%}"
    reason = f"blocks of 16 tokens leave {measured:.1f} % of their slots empty, over all decoding steps of this trace; "
    reason += f"reserving 2,048 tokens a request would {beside}"
    word, _ = by_interval(claim, claim["fp8"]["value"], *(measured,) * 3)
    return found(seen, word, reason, measured=measured, measured_parts={"fp8": measured})


def _judge_with(levels: Callable, judge: Callable) -> Callable[[dict, str, Evidence], Verdict]:
    """A judge of claims: `levels` names the level ids that it rests on, `judge` is asked when all of them count."""

    def judged(claim: dict, protocol: str, seen: Evidence) -> Verdict:
        ids = levels(claim, seen)
        if unjudged := not_judged(seen, ids, records=True):
            return verdict(claim, seen, ids, protocol=protocol, verdict=unjudged[0], reason=unjudged[1])
        return verdict(claim, seen, ids, **{"protocol": protocol} | judge(claim, seen, ids))

    return judged


def _quality(claim: dict, _protocol: str, seen: Evidence) -> Verdict:
    """Q1: how much of the model's quality is kept, in %: of the benchmark average as published, of the perplexity here (BF16's
    over FP8's). A verdict is given for the published model only, by the interval over documents."""
    run, parts, judged = seen.run, seen.run.read_parts("quality"), {"protocol": "the same text and prompts"}
    if "fp8" not in parts or reference_variant(run.profile) != "bf16":
        reason = "the run holds no quality of fp8 against bf16 (`fp8lab quality`)"
        return verdict(claim, seen, [], verdict="not run", reason=reason, **judged)
    one, model = comparisons(run)["fp8"], parts["fp8"]["model"]
    value, low, high = (100 * end for end in (one.kept.value, one.kept.low, one.kept.high))
    said = f"perplexity kept to {value:.2f} %, the same top token at {one.top1_agreement.value:.1%} of positions"
    judged |= {"measured": value, "interval": (low, high), "measured_parts": {"fp8": value}}
    if claim["model"] not in model.lower():
        word, reason = "not run", f"another model ({model}) and another measure"
    elif other_card(run):
        word, reason = "not run", f"{unmeasured(run)}, so no verdict"
    else:
        word, how_near = by_interval(claim, claim["fp8"]["value"], value, low, high)
        reason = f"{how_near}; another measure (perplexity)"
    return verdict(claim, seen, [], verdict=word, reason=f"{reason}; {said}", **judged)


def _memory_risk(claim: dict, _protocol: str, seen: Evidence) -> Verdict:
    """M1: did BF16 run out of memory at the published loads, and FP8 not? The rule stands in data/published.toml."""
    rates = claim["rates"]
    cells = [(variant, rate) for rate in rates for variant in ("bf16", "fp8")]
    held = {cell: seen.levels(cell[:1], cell[1]) for cell in cells}
    ids = [level for (variant, rate), levels in held.items() for level in levels or [level_id(variant, rate)]]
    judged = {"protocol": f"{' and '.join(f'{rate:g}' for rate in rates)} req/s"}
    if unjudged := not_judged(seen, ids):
        judged |= dict(zip(("verdict", "reason"), unjudged, strict=True))
    else:
        both = {v: [s for rate in rates for s in held[v, rate].values()] for v in ("bf16", "fp8")}
        memory = {variant: _memory(levels, claim["full"]) for variant, levels in both.items()}
        ran_out = {variant: one for variant, (one, _, _) in memory.items()}
        if ran_out["bf16"] is False:
            word, way = "not reproduced", "no risk to remove"
            so = f"BF16 did not run out of memory: there was {way}"
        elif ran_out["fp8"]:
            word, way, so = "not reproduced", "FP8 ran out", "FP8 ran out of memory"
        elif ran_out["bf16"] and ran_out["fp8"] is False:
            word, way, so = "reproduced", "", "BF16 ran out of memory, FP8 did not"
        else:
            word, way, so = "undecided", "", "vLLM's counters were not sampled at every level"
        reason = "; ".join([so, *(f"{variant}: {how_near}" for variant, (_, how_near, _) in memory.items())])
        parts = {variant: fullest for variant, (_, _, fullest) in memory.items() if fullest is not None}
        judged |= found(seen, word, reason, way=way, measured=parts.get("bf16"), measured_parts=parts)
    told = filter(None, (judged["reason"], left_out(seen, cells), _out_elsewhere(claim, seen)))
    return verdict(claim, seen, ids, **judged | {"reason": "; ".join(told)})


def _out_elsewhere(claim: dict, seen: Evidence) -> str:
    """The levels at other loads, or behind another API server, at which BF16 or FP8 did run out of memory, as text."""
    bases, base_of, told = ("bf16", "fp8"), seen.run.profile.base, []
    variants = [name for name in sorted(seen.variants(), key=base_of) if base_of(name) in bases]
    for variant, rate in [(name, rate) for name in variants for rate in seen.rates(name)]:
        levels = seen.levels((variant,), rate)
        ran_out, how_near, _ = _memory(levels.values(), claim["full"])
        if ran_out and (variant not in bases or rate not in claim["rates"]):
            told.append(f"{', '.join(levels)} ({how_near})")
    return f"under other loads memory did run out: {'; '.join(told)}" if told else ""


def _memory(levels: Collection[Summary], full: float) -> tuple[bool | None, str, float | None]:
    """Whether a request of some of these levels (their summaries) was preempted or failed, or the KV cache was full (None: that
    is not known of all of them); how near they came to it, as text; the fullest that the cache was, in % (None: not sampled)."""
    preempted, used = ([getattr(s, name) for s in levels] for name in ("preemptions", "kv_cache_usage_max"))
    failed, known = sum(s.failed for s in levels), [100 * share for share in used if share is not None]
    fullest = max(known, default=None)
    ran_out = failed > 0 or any(preempted) or (fullest or 0) >= 100 * full
    told = f"{'unknown' if None in preempted else f'{sum(preempted):,.0f}'} preemptions, {failed:,} failed requests, KV cache "
    told += "was not sampled" if fullest is None else f"at most {fullest:.0f} % full"
    return None if not ran_out and None in (*preempted, *used) else ran_out, told, fullest


def _compute_use(claim: dict, _protocol: str, seen: Evidence) -> Verdict:
    """B1: of the matrix peak, how much do the tokens of a step with that many requests need in the time that it takes?"""
    batch, variant = claim["batch"], "fp8"
    one = next((one for one in anatomies(seen.run).get(variant, ()) if one.batch == batch and one.decode), None)
    protocol = f"a decode step of {batch} requests"
    if one is None:
        reason = f"the run holds no profiled step of {variant} with {batch} requests (`fp8lab anatomy`)"
        return verdict(claim, seen, [], protocol=protocol, verdict="not run", reason=reason)
    # The steps that were timed may have had another context than the profiled ones.
    work = one.decode.work
    work = dataclasses.replace(work, decode_context=one.context * work.running) if one.context else work
    at_peak = sum(floors_of(seen.run, variant, work, moved=False).values())
    value = 100 * at_peak / one.wall_ms
    word, how_near = by_interval(claim, claim["fp8"]["value"], *(value,) * 3)
    reason = f"{how_near}; at the matrix peak its tokens would take {at_peak:.2f} ms of the {one.wall_ms:.2f} ms"
    if (busy := one.gpu.get("gpu_util")) is not None:
        reason += f"; NVML saw a kernel in {busy:.0%} of the time, which is no measure of the compute units"
    judged = found(seen, word, reason, protocol=protocol, measured=value, measured_parts={"fp8": value})
    return verdict(claim, seen, [], **judged)


def _twice_the_data(claim: dict, _protocol: str, seen: Evidence) -> Verdict:
    """B2: the layers' matrix products of a decode step, BF16's time over FP8's, and attention's likewise, a token of context."""
    held = {v: {one.batch: one.decode for one in anatomies(seen.run).get(v, ()) if one.decode} for v in ("bf16", "fp8")}
    shared = sorted(held["bf16"].keys() & held["fp8"].keys())
    protocol = "decode steps, BF16 over FP8"
    if not shared:
        reason = "the run holds no profiled steps of both bf16 and fp8 with as many requests (`fp8lab anatomy`)"
        return verdict(claim, seen, [], protocol=protocol, verdict="not run", reason=reason)
    bf16, fp8 = ([held[v][batch] for batch in shared] for v in ("bf16", "fp8"))
    products = [a.times[LAYERS] / b.times[LAYERS] for a, b in zip(bf16, fp8, strict=True)]
    attention = [a.times[ATTENTION] / a.work.decode_context * b.work.decode_context / b.times[ATTENTION]
                 for a, b in zip(bf16, fp8, strict=True)]  # fmt: skip
    # What is fused with a product's input is another kernel in each: norms and activations, in FP8 with the quantisation.
    around = [
        [sum(one.times.get(kind, 0.0) for kind in (LAYERS, NORMS, QUANTISATION)) for one in steps]
        for steps in (bf16, fp8)
    ]
    whole = [a / b for a, b in zip(*around, strict=True)]
    value = geometric_mean(products)
    words = [
        by_interval(claim, claim["fp8"]["value"], geometric_mean(r), min(r), max(r))[0] for r in (products, attention)
    ]
    how_near = near(value, claim["fp8"]["value"])
    told = ((f"{shown} {'×, '.join(f'{one:.2f}' for one in ratios)}×") for shown, ratios in (
        ("the layers' matrix products are faster by", products), ("with norms, activations and quantisation by", whole),
        ("attention over as much context by", attention),
    ))  # fmt: skip
    reason = f"{how_near}; with {', '.join(f'{batch:,}' for batch in shared)} requests decoding {'; '.join(told)}"
    judged = found(seen, weakest(words), reason, protocol=protocol, measured=value, measured_parts={"fp8": value})
    return verdict(claim, seen, [], **judged)


# Claims that rest on several servers with all requests at once: number formats (B3, B4, R4) and cards (R5).
_TOKENS, _BURST = "output_token_throughput", math.inf


def _at_once(
    variants: Callable, judge: Callable, needs: str = "h100-80gb-recipes", how: str = "all at once"
) -> Callable:
    """A judge of such claims: `variants` names those that it rests on, `judge` is asked when all their levels count; the profile
    `needs` has them. Of a variant without one the first seed's is missed."""

    def judged(claim: dict, _protocol: str, seen: Evidence) -> Verdict:
        names = variants(claim, seen)
        held = {name: list(seen.levels((name,), _BURST, valid=False)) or [level_id(name, _BURST)] for name in names}
        ids = [level for levels in held.values() for level in levels]
        unjudged = not_judged(seen, ids, needs=needs)
        answer = found(seen, *unjudged) if unjudged else judge(claim, seen, *names)
        return verdict(claim, seen, ids, protocol=how, **answer)

    return judged


def _integer_formats(claim: dict, seen: Evidence, under: str, *others: str) -> dict:
    """B4: is a model with INT8 weights, or with INT4 ones, no faster than with BF16 ones, where the card is the limit? What
    they do to answers another run says (`fp8lab quality`): a model with random weights has none."""
    ratios: dict[str, Ratio] = {v: seen.compare(v, under, _BURST, _TOKENS) for v in others}
    if apart := [v for v, one in ratios.items() if one is None]:
        return found(seen, "undecided", f"{under} shares no seed with {', '.join(apart)}")
    judged = [ratios[v] for v in claim["formats"]]
    # The claim is about all of them: one that is faster is enough to contradict it.
    word = weakest([by_interval(claim, 1.0, one.value, one.low, one.high)[0] for one in judged])
    told = ", ".join(f"{variant} {one}" for variant, one in ratios.items())
    causes = sorted({seen.limit(level).cause for level in seen.levels((under,), _BURST)})
    reason = f"tokens/s over BF16 weights with the same KV cache: {told}; BF16's limit there: {' or the '.join(causes)}"
    reason += _joules(seen, others, under)
    if not all(cause.startswith("GPU") for cause in causes):
        word, reason = "undecided", f"the card was not BF16's limit, so that a format could not show; {reason}"
    return found(
        seen, word, f"{reason}; answers are another run's (`fp8lab quality`)", measured=judged[0].value,
        interval=judged[0].interval, measured_parts={variant: one.value for variant, one in ratios.items()},
    )  # fmt: skip


def _joules(seen: Evidence, variants: Collection[str], under: str) -> str:
    ratios = {v: seen.compare(v, under, _BURST, "joules_per_output_token") for v in variants}
    return "".join(f"; joules a token, {variant} {one}" for variant, one in ratios.items() if one)


def _schemes(claim: dict, _protocol: str, seen: Evidence) -> Verdict:
    """B3: which of the FP8 schemes does vLLM serve, with which kernel?"""
    held = {v: one.recipe for v, one in seen.run.profile.variants.items() if one.recipe.startswith("fp8")}
    served = {variant: s.server.kernels for variant in held for s in seen.levels((variant,)).values()}
    ids = [next(iter(seen.levels((variant,)))) for variant in served]
    named = {variant: ", ".join(kernels) for variant, kernels in served.items() if kernels}
    if not named:
        reason = f"not measured here: it needs {claim['needs']}"
        return verdict(claim, seen, [], protocol="none", verdict="not run", reason=reason)
    others = [variant for variant in named if held[variant] != claim["per_tensor"]]
    reason = "; ".join(f"{v} ({recipe(held[v]).says}): {named[v]}" for v in others or named)
    word = "not reproduced" if others else "undecided"
    own = {kernel for v in named if v not in others for kernel in served[v]}
    apart = [v for v in others if set(served[v]) - own]
    how = f"with kernels of their own ({', '.join(apart)})" if apart else "with the same kernels"
    said = f"schemes other than one scale a tensor are served too, {how}" if others else "no other scheme was tried"
    return verdict(claim, seen, ids, protocol="one start each", **found(seen, word, f"{said}: {reason}"))


def _quantised_before(claim: dict, seen: Evidence, online: str, *forms: str) -> dict:
    """R4: does a checkpoint that is FP8 already load sooner than a BF16 one that is quantised at the start, and serve as much?
    The loads of each start are compared, with their interval."""
    least, words, told = 1 - claim["tolerance"], [], []
    starts = {v: list({s.start: s for s in seen.levels((v,), _BURST).values()}.values()) for v in (online, *forms)}
    loads = {v: {s.level.repeat: s.server.load_s for s in each if s.server.load_s} for v, each in starts.items()}
    if not all(loads.values()):
        return found(seen, "undecided", "vLLM did not say how long weights took to load")
    load = {v: fmean(each.values()) for v, each in loads.items()}
    whole = {v: fmean(s.server.startup_s for s in each) for v, each in starts.items()}
    for before in forms:
        served, took = seen.compare(before, online, _BURST, _TOKENS), ratio(loads[before], loads[online])
        if served is None or took is None:
            return found(seen, "undecided", "no two starts served the same seed")
        # With one start of each nothing says how much starts differ.
        slower = served.high < least or took.low > least
        words.append("not reproduced" if slower else "reproduced" if took.high < least else "undecided")
        told.append(
            f"{before} in {four_digits(load[before])} s, {took}, of a start of {whole[before]:.0f}, for {served} the tokens/s"
        )
    reason = f"{online}, which reads BF16 and quantises, loads its weights in {four_digits(load[online])} s of a start of {whole[online]:.0f}"
    parts = {"measured": load[forms[0]], "measured_parts": load}
    return found(seen, weakest(words), "; ".join([reason, *told]), **parts)


def _scaling(claim: dict, seen: Evidence, one: str, *two: str) -> dict:
    """R5: do two cards deliver twice as much as one, at the same load a card? Judged is the better way of using two."""
    loads = {v: {s.requests / s.cards for s in seen.levels((v,), _BURST).values()} for v in (one, *two)}
    if len(set.union(*loads.values())) > 1:
        each = ", ".join(f"{v} {' or '.join(f'{n:,.0f}' for n in sorted(held))}" for v, held in loads.items())
        return found(seen, "undecided", f"the load a card differs: {each} requests")
    ratios = {v: ratio for v in two if (ratio := seen.compare(v, one, _BURST, _TOKENS))}
    if not ratios:
        return found(seen, "undecided", f"{one} shares no seed with {', '.join(two)}")
    best = max(ratios.values(), key=lambda ratio: ratio.value)
    word, how_near = by_interval(claim, claim["fp8"]["value"], best.value, best.low, best.high)
    reason = f"{how_near}; tokens/s over {one}: {', '.join(f'{v} {ratio}' for v, ratio in ratios.items())}"
    parts = {v: ratio.value for v, ratio in ratios.items()}
    measured = {"measured": best.value, "interval": best.interval, "measured_parts": parts}
    return found(seen, word, reason + _joules(seen, ratios, one), **measured)


def _held(seen: Evidence, names: list[str], most: int | None = None) -> list[str]:
    """Those of these variants that have a valid level with all requests at once; the first where none has."""
    return [v for v in names if seen.levels((v,), _BURST)][:most] or names[:1]


JUDGES = {
    "ratio": judge_values, "fp8": judge_values, "memory risk": _memory_risk,
    "service line": _judge_with(_seeds_of_fp8, _service_line),
    "paging waste": _judge_with(lambda claim, seen: _seeds_of_fp8(claim, seen)[:1], _paging_waste),
    "default flags": _judge_with(_four_variants, _default_flags), "quality": _quality,
    "compute use": _compute_use, "twice the data": _twice_the_data, "schemes": _schemes,
    "scaling": _at_once(
        lambda claim, seen: (*_held(seen, claim["one"], 1), *_held(seen, claim["two"])), _scaling, "h100-x2-8b",
        "all at once, the same load a card"),
    "integer formats": _at_once(lambda claim, _: (claim["beside"], *claim["formats"], claim["fp8_format"]), _integer_formats),
    "quantised before": _at_once(lambda claim, seen: (claim["online"], *_held(seen, claim["before"])), _quantised_before),
}  # fmt: skip
