"""Judges of claims that rest on several servers with all requests at once: number formats (B3, B4, R4; profile
`h100-80gb-recipes`) and cards (R5; `h100-x2-8b`)."""

import math
from statistics import fmean

from ..config.dimensions import recipe
from ..metrics.statistics import Ratio
from ..metrics.statistics import ratio as paired
from ..results.evidence import Evidence
from ..ui.text import four_digits
from .verdict import Verdict, by_interval, found, not_judged, verdict, weakest

_TOKENS, _BURST = "output_token_throughput", math.inf


def _levels(seen: Evidence, variant: str) -> list[str]:
    """The level ids of a variant with all requests at once; that of the first seed where none was measured."""
    return list(seen.levels((variant,), _BURST, valid=False)) or [f"{variant}-infrps-r1"]


def _unjudged(seen: Evidence, ids: list[str], profile: str = "h100-80gb-recipes") -> tuple[str, str] | None:
    """Verdict and reason when these levels carry none; `profile` is the one that has them."""
    if not (unjudged := not_judged(seen, ids)):
        return None
    word, reason = unjudged
    return word, f"{reason}; profile {profile} has them" if word == "not run" else reason


def _judged(claim: dict, seen: Evidence, ids: list[str], word: str, reason: str, **more) -> Verdict:
    return verdict(claim, seen, ids, **{"protocol": "all at once"} | found(seen, word, reason, **more))


def integer_formats(claim: dict, _protocol: str, seen: Evidence) -> Verdict:
    """B4: is a model with INT8 weights, or with INT4 ones, no faster than with BF16 ones, where the card is the limit? What
    they do to answers another run says (`fp8lab quality`): a model with random weights has none."""
    under, others, fp8 = claim["beside"], claim["formats"], claim["fp8_format"]
    ids = [level for variant in (under, *others, fp8) for level in _levels(seen, variant)]
    if unjudged := _unjudged(seen, ids):
        return _judged(claim, seen, ids, *unjudged)
    ratios: dict[str, Ratio] = {v: seen.compare(v, under, _BURST, _TOKENS) for v in (*others, fp8)}
    if apart := [v for v, one in ratios.items() if one is None]:
        return _judged(claim, seen, ids, "undecided", f"{under} shares no seed with {', '.join(apart)}")
    words = [by_interval(claim, 1.0, ratios[v].value, ratios[v].low, ratios[v].high)[0] for v in others]
    word = weakest(words)  # the claim is about both: one of them that is faster is enough to contradict it
    told = ", ".join(f"{variant} {one}" for variant, one in ratios.items())
    causes = sorted({seen.limit(level).cause for level in _levels(seen, under)})
    reason = f"tokens/s over BF16 weights with the same KV cache: {told}; BF16's limit there: {' or the '.join(causes)}"
    joules = [(v, seen.compare(v, under, _BURST, "joules_per_output_token")) for v in ratios]
    reason += "".join(f"; joules a token, {variant} {one}" for variant, one in joules if one)
    if not all(cause.startswith("GPU") for cause in causes):
        word, reason = "undecided", f"the card was not BF16's limit, so that a format could not show; {reason}"
    first = ratios[others[0]]
    return _judged(
        claim, seen, ids, word, f"{reason}; answers are another run's (`fp8lab quality`)", measured=first.value,
        interval=first.interval, measured_parts={variant: one.value for variant, one in ratios.items()},
    )  # fmt: skip


def schemes(claim: dict, _protocol: str, seen: Evidence) -> Verdict:
    """B3: which of the FP8 schemes does vLLM serve, with which kernel?"""
    held = {v: one.recipe for v, one in seen.run.profile.variants.items() if one.recipe.startswith("fp8")}
    served = {variant: s.server.kernels for variant in held for s in seen.levels((variant,)).values()}
    ids = [next(iter(seen.levels((variant,)))) for variant in served]
    named = {variant: ", ".join(kernels) for variant, kernels in served.items() if kernels}
    if not named:
        reason = f"not measured here: it needs {claim['needs']}"
        return verdict(claim, seen, [], protocol="none", verdict="not run", reason=reason)
    others = [variant for variant in named if held[variant] != claim["per_tensor"]]
    reason = "; ".join(f"{variant} ({recipe(held[variant]).says}): {kernel}" for variant, kernel in named.items())
    word = "not reproduced" if others else "undecided"
    own = {kernel for v in named if v not in others for kernel in served[v]}
    apart = [v for v in others if set(served[v]) - own]
    how = f"with kernels of their own ({', '.join(apart)})" if apart else "with the same kernels"
    said = f"schemes other than one scale a tensor are served too, {how}" if others else "no other scheme was tried"
    return _judged(claim, seen, ids, word, f"{said}: {reason}", protocol="one start each")


def quantised_before(claim: dict, _protocol: str, seen: Evidence) -> Verdict:
    """R4: does a checkpoint that is FP8 already load sooner than a BF16 one that is quantised at the start, and serve as much?
    The loads of each start are compared, with their interval."""
    online, least, words, told = claim["online"], 1 - claim["tolerance"], [], []
    forms = [v for v in claim["before"] if seen.levels((v,), _BURST)] or claim["before"][:1]
    ids = [level for variant in (online, *forms) for level in _levels(seen, variant)]
    if unjudged := _unjudged(seen, ids):
        return _judged(claim, seen, ids, *unjudged)
    starts = {v: list({s.start: s for s in seen.levels((v,), _BURST).values()}.values()) for v in (online, *forms)}
    loads = {v: {s.level.repeat: s.server.load_s for s in each if s.server.load_s} for v, each in starts.items()}
    if not all(loads.values()):
        return _judged(claim, seen, ids, "undecided", "vLLM did not say how long weights took to load")
    load = {v: fmean(each.values()) for v, each in loads.items()}
    whole = {v: fmean(s.server.startup_s for s in each) for v, each in starts.items()}
    for before in forms:
        served, took = seen.compare(before, online, _BURST, _TOKENS), paired(loads[before], loads[online])
        if served is None or took is None:
            return _judged(claim, seen, ids, "undecided", "no two starts served the same seed")
        word = "undecided"  # with one start of each nothing says how much starts differ
        if served.high < least or took.low > least:
            word = "not reproduced"
        elif took.high < least:
            word = "reproduced"
        words.append(word)
        told.append(
            f"{before} in {four_digits(load[before])} s, {took}, of a start of {whole[before]:.0f}, for {served} the tokens/s"
        )
    reason = f"{online}, which reads BF16 and quantises, loads its weights in {four_digits(load[online])} s of a start of {whole[online]:.0f}"
    return _judged(
        claim, seen, ids, weakest(words), "; ".join([reason, *told]), measured=load[forms[0]], measured_parts=load
    )


def scaling(claim: dict, _protocol: str, seen: Evidence) -> Verdict:
    """R5: do two cards deliver twice as much as one, at the same load a card? Judged is the better way of using two."""
    one = next((v for v in claim["one"] if seen.levels((v,), _BURST)), claim["one"][0])
    two = [v for v in claim["two"] if seen.levels((v,), _BURST)] or claim["two"][:1]
    ids = [level for variant in (one, *two) for level in _levels(seen, variant)]
    protocol = "all at once, the same load a card"
    if unjudged := _unjudged(seen, ids, "h100-x2-8b"):
        return _judged(claim, seen, ids, *unjudged, protocol=protocol)
    loads = {v: {s.requests / s.cards for s in seen.levels((v,), _BURST).values()} for v in (one, *two)}
    if len(set.union(*loads.values())) > 1:
        each = ", ".join(f"{v} {' or '.join(f'{n:,.0f}' for n in sorted(held))}" for v, held in loads.items())
        return _judged(claim, seen, ids, "undecided", f"the load a card differs: {each} requests", protocol=protocol)
    ratios = {v: ratio for v in two if (ratio := seen.compare(v, one, _BURST, _TOKENS))}
    if not ratios:
        return _judged(claim, seen, ids, "undecided", f"{one} shares no seed with {', '.join(two)}", protocol=protocol)
    joules = {v: seen.compare(v, one, _BURST, "joules_per_output_token") for v in ratios}
    best = max(ratios.values(), key=lambda ratio: ratio.value)
    word, how_near = by_interval(claim, claim["fp8"]["value"], best.value, best.low, best.high)
    reason = f"{how_near}; tokens/s over {one}: {', '.join(f'{v} {ratio}' for v, ratio in ratios.items())}"
    reason += "".join(f"; joules a token, {v} {ratio}" for v, ratio in joules.items() if ratio)
    parts = {v: ratio.value for v, ratio in ratios.items()}
    measured = {"measured": best.value, "interval": best.interval, "measured_parts": parts}
    return _judged(claim, seen, ids, word, reason, protocol=protocol, **measured)
