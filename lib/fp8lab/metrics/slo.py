"""The highest rate that meets a service-level objective: what a level shows of it, and the search for it.

Whether a share of requests is within its limits is a question about a proportion, so a level must be long enough to
answer it. The rule is that of MLPerf LoadGen's early stopping (mlcommons/inference, loadgen/early_stopping.cc): with
k violations among n requests the percentile is met when so few would be seen, were it just missed, in at most 1 % of
tests: for the 99th percentile n must be 459 with no violation, 662 with one, and so on.
"""

import bisect
import functools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd

from ..errors import BadInput
from .bottleneck import RAMP_OVER, keeps_up, lasted
from .performance import latencies

CONFIDENCE = 0.99
_ENDLESS = 1 << 50  # requests; more than any level has
# Whether a backlog grows is seen in the second half of the arrivals. That it does not is shown when the slow requests of
# the ramp have left by then (RAMP_OVER); that it stays, when they had as long again.
_STAYS = 3.0


@dataclass(frozen=True)
class SLO:
    """A service-level objective: this share of all requests within all limits, in ms (inf: no limit)."""

    name: str
    ttft_ms: float
    tpot_ms: float
    share: float = 0.99
    e2el_ms: float = math.inf

    def __post_init__(self):
        if not (min(self.ttft_ms, self.tpot_ms, self.e2el_ms) > 0 and 0 < self.share < 1):
            raise BadInput(f"{self}: limits must be above 0 ms and the share between 0 and 1")

    def __str__(self) -> str:
        each = {"TTFT": self.ttft_ms, "TPOT": self.tpot_ms, "E2EL": self.e2el_ms}
        limits = [f"{name} ≤ {value:,g} ms" for name, value in each.items() if value < math.inf]
        return f"{' and '.join(limits)} for {100 * self.share:.4g}% of requests ({self.name})"

    @classmethod
    def parse(cls, text: str) -> "SLO":
        """The objective that `ttft=200,tpot=50,p95` writes: limits in ms of any of TTFT, TPOT and E2EL, and for how many
        requests they hold (p99: for 99 %, the default). Raises BadInput for anything else."""
        limits, share = dict.fromkeys(("ttft", "tpot", "e2el"), math.inf), None
        for part in text.lower().replace(" ", "").split(","):
            limit = re.fullmatch(r"(ttft|tpot|e2el)=(\d+(?:\.\d+)?)(?:ms)?", part)
            percentile = re.fullmatch(r"p(\d+(?:\.\d+)?)", part)
            if limit and limits[limit[1]] == math.inf:
                limits[limit[1]] = float(limit[2])
            elif percentile and share is None:
                share = float(percentile[1]) / 100
            else:
                raise BadInput(f"SLO {text!r}: {part!r} is none of ttft=MS, tpot=MS, e2el=MS, once each, and p99")
        if min(limits.values()) == math.inf:
            raise BadInput(f"SLO {text!r} limits nothing; ttft=200,tpot=50 does")
        return cls(text, *(limits[name] for name in ("ttft", "tpot")), 0.99 if share is None else share, limits["e2el"])


DEFAULT = SLO("the published service line", 120, 50)
# MLPerf Inference v5.1, Llama-3.1-8B: its server and interactive scenarios.
MLPERF_SERVER = SLO("MLPerf server", 2000, 100)
MLPERF_INTERACTIVE = SLO("MLPerf interactive", 500, 30)
OBJECTIVES = (DEFAULT, MLPERF_SERVER, MLPERF_INTERACTIVE)


class Attainment(NamedTuple):
    """What a level says of an SLO: `met`, `missed`, or `undecided`, and why in a sentence. `at_limit`: undecided
    although it was as long as a probe of the search."""

    state: str
    reason: str
    violations: int
    requests: int
    at_limit: bool = False

    @property
    def bound(self) -> str:
        """What the level says of the limit, for `bracket`: `met`, `missed`, or `undecided`, which says nothing. One at
        the limit counts as missed: with all the requests that were asked of it, it was not shown to meet the SLO."""
        return "missed" if self.at_limit else self.state


def within(records: pd.DataFrame, slo: SLO) -> int:
    """How many requests completed within the limits. One of a single token has no TPOT and keeps any."""
    each = latencies(records)
    good = (each["ttft_ms"] <= slo.ttft_ms) & ~(each["tpot_ms"] > slo.tpot_ms) & (each["e2el_ms"] <= slo.e2el_ms)
    return int(good.sum())


def goodput(records: pd.DataFrame, slo: SLO, duration_s: float | None) -> dict[str, str | float]:
    """The fields of `summary.Summary` that follow from an objective: goodput as `vllm bench serve` has it (requests within
    the limits / duration; vllm/benchmarks/serve.py, calculate_metrics)."""
    good = within(records, slo)
    rate = good / duration_s if duration_s else 0.0
    return {"slo": str(slo), "slo_share": good / len(records), "request_goodput": rate}


def attains(records: pd.DataFrame, slo: SLO) -> Attainment:
    """Whether a level meets `slo`. A failed request violates it, and so does a backlog that grows: such a level
    would miss any limit if it only lasted longer. A level too short for either to be shown is undecided."""
    requests = len(records)
    violations = requests - within(records, slo)
    counted = f"{violations:,} of {requests:,} requests were outside its limits"
    if violations > allowed_violations(requests, slo.share):
        if _at_most(requests - violations, requests, slo.share) <= 1 - CONFIDENCE:
            return Attainment("missed", counted, violations, requests)
        needed, at_limit = f"{required_requests(violations, slo.share):,} requests", requests >= probe_requests(slo)
        why = "too close to call without {}, so not shown to be met" if at_limit else "too few to tell, it takes {}"
        return Attainment("undecided", f"{counted}: {why.format(needed)}", violations, requests, at_limit)
    kept, times = keeps_up(records), lasted(records)
    if kept and times >= RAMP_OVER:
        return Attainment("met", counted, violations, requests)
    if kept is False and times >= _STAYS:
        return Attainment("missed", f"{counted}, but the backlog grew to the end", violations, requests)
    why = {
        True: "slow requests took over half as long as all arrivals",
        None: "the backlog grew no more than chance makes it in a level so short",
        False: "the backlog still grew when arrivals ended",
    }[times < 1 or kept]
    return Attainment("undecided", f"{counted}, but {why}: it takes a longer level", violations, requests)


def allowed_violations(requests: int, share: float = 0.99) -> int:
    """The most violations among `requests` that still show the SLO met; -1 when the level is too short for any."""
    by_chance = functools.partial(_at_most, n=requests, p=1 - share)
    return bisect.bisect_right(range(requests + 1), 1 - CONFIDENCE, key=by_chance) - 1


@functools.cache
def required_requests(violations: int = 0, share: float = 0.99) -> int:
    """The fewest requests with which `violations` still show the SLO met: 459, 662, 838, … for the 99th percentile."""
    return bisect.bisect_left(range(_ENDLESS), violations, key=lambda requests: allowed_violations(requests, share))


def probe_requests(slo: SLO) -> int:
    """The fewest requests of a probe of the search: so many that one violation is allowed."""
    return required_requests(1, slo.share)


def _at_most(k: int | np.ndarray, n: int, p: float) -> float | np.ndarray:
    """P(X <= k) for X binomial(n, p)."""
    from scipy.special import bdtr

    return bdtr(k, n, p)


class Bracket(NamedTuple):
    """The limit lies between `low`, the highest rate shown to meet the SLO, and `high`, the lowest one that missed it,
    or that a level of full length did not show to meet it (`Attainment.bound`). 0 and inf: no rate that was tried
    showed it. 0 and 0: one request alone misses it."""

    low: float
    high: float

    def __str__(self) -> str:
        if self.high == 0:
            return "none: one request alone misses it"
        if self.low == 0:
            return f"below {self.high:g}" if self.high < math.inf else "not known"
        return f"{self.low:g} to {self.high:g}" if self.high < math.inf else f"at least {self.low:g}"


def bracket(tried: Iterable[tuple[float, str]]) -> Bracket:
    """The bracket that (rate, `Attainment.bound`) pairs give. Where they contradict each other (noise, seeds), a rate that
    missed counts: one is met when all its levels that say something say so. A rate that no level decided does not."""
    tried = list(tried)
    high = min((rate for rate, state in tried if state == "missed"), default=math.inf)
    low = max((rate for rate, state in tried if state == "met" and rate < high), default=0.0)
    return Bracket(low, high)


def search(
    probe: Callable[[float], str],
    start: float = 25.0,
    *,
    known: Iterable[tuple[float, str]] = (),
    step: float = 2.0,
    tolerance: float = 0.05,
    max_probes: int = 8,
) -> tuple[Bracket, list[tuple[float, str]]]:
    """Finds the limit by doubling or halving, then by bisection; (bracket, what was tried in order). Where it is expected near
    `start`, a smaller first `step`, which widens up to that, takes fewer probes.

    `probe(rate)` measures one level and returns its `Attainment.bound`, or "invalid" for one that does not count. `known`
    are the (rate, bound) of earlier levels: the search goes on from them, and from `start` where they bound nothing. It ends
    when the bracket is within `tolerance` (high / low - 1), after `max_probes`, or at an invalid one. By doubling, eight probes
    suffice for any limit from a half to eight times `start`. After a probe that says nothing it goes on below, and bounds nothing
    with it.
    """
    if not (start > 0 and step > 1 and tolerance > 0 and max_probes > 0):
        raise BadInput(
            f"search: start {start}, tolerance {tolerance} and max_probes {max_probes} must be above 0, step {step} above 1"
        )
    known, tried = list(known), []
    while len(tried) < max_probes and (rate := _next_rate([*known, *tried], start, step, tolerance)):
        state = probe(rate)
        if state == "invalid":
            break
        tried.append((rate, state))
    return bracket([*known, *tried]), tried


def _next_rate(tried: Sequence[tuple[float, str]], start: float, step: float, tolerance: float) -> float | None:
    """The rate to try next; None when the limit is known within `tolerance`."""
    low, high = bracket((rate, "met" if state == "met" else "missed") for rate, state in tried)
    if low == 0 and high == math.inf:
        return start
    if low == 0 or high == math.inf:
        wide = min(2.0, step ** min(2 ** (len(tried) - 1), 512))
        rate = high / wide if low == 0 else low * wide
        return rate if wide == 2 else float(f"{rate:.3g}")
    if high / low - 1 <= tolerance:
        return None
    # The geometric middle halves the relative width; with three digits a level's name is readable.
    rate = float(f"{math.sqrt(low * high):.3g}")
    return rate if low < rate < high else None
