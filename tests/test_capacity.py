"""The limit: the binomial rule, what a level shows of an objective, and the search."""

import math

import numpy as np
import pytest

from conftest import make_records
from fp8lab.config.trace import arrival_times
from fp8lab.errors import BadInput
from fp8lab.metrics.slo import SLO, Attainment, Bracket, allowed_violations, attains, bracket, required_requests, search
from fp8lab.results.evidence import evidence
from fp8lab.results.run_folder import open_run

TIGHT = SLO("a test's", 120, 50)


def level(rate: float, capacity: float, requests: int, *, burstiness=math.inf, seed=0):
    """Records of a server that serves requests one after the other in 1/capacity s, 20 ms a token behind."""
    sent = np.asarray(arrival_times(requests, rate, burstiness=burstiness, seed=seed))
    free, first = 0.0, []
    for at in sent:
        free = max(free, at) + 1 / capacity
        first.append(free)
    first = np.asarray(first)
    return make_records(sent, first, first + 9 * 0.02, np.full(requests, 10))


def test_the_rule_is_that_of_mlperf():
    """The counts that LoadGen's early stopping needs for the 99th percentile at 99 % confidence."""
    assert [required_requests(k) for k in range(4)] == [459, 662, 838, 1001]
    for k in range(4):
        n = required_requests(k)
        assert allowed_violations(n) == k and allowed_violations(n - 1) == k - 1
    assert required_requests(0, 0.9) == 44  # 0.9 ** 44 < 1 % < 0.9 ** 43


def test_a_level_that_keeps_within_its_limits_meets_them():
    assert attains(level(50, 100, 662), TIGHT) == Attainment("met", "0 of 662 requests were outside its limits", 0, 662)


def test_too_few_requests_decide_nothing():
    found = attains(level(50, 100, 300), TIGHT)
    assert found.state == "undecided" and "459" in found.reason


def test_a_growing_backlog_misses_any_objective():
    generous = SLO("generous", 1e9, 1e9)
    found = attains(level(60, 50, 1000), generous)
    assert found.state == "missed" and "backlog grew" in found.reason
    short = attains(level(100, 20, 1000), generous)  # its last requests took longer than its arrivals
    assert short.state == "undecided" and "longer level" in short.reason


def test_a_server_is_not_shown_to_keep_up_before_its_slow_requests_have_left():
    """At 92.6 and 96.7 req/s for 40 s no backlog was seen to grow; at 90 for 80 s one was."""
    within, goal = evidence(open_run(source="h100-80gb-unsealed")), SLO("both", 200, 50)
    states = {s.level.rate: attains(within.level(level).records, goal).state
              for level, s in within.levels(("fp8-unsealed",)).items()}  # fmt: skip
    assert {rate: states[rate] for rate in (84.9, 92.6, 96.7, 101)} == {
        84.9: "met", 92.6: "undecided", 96.7: "undecided", 101: "missed",
    }  # fmt: skip


def test_failed_requests_are_violations():
    records = level(50, 100, 1000)
    records.loc[:29, "error"] = "HTTP 500"
    found = attains(records, TIGHT)
    assert found.state == "missed" and found.violations == 30


@pytest.mark.parametrize("limit", [14, 21, 33.3, 48, 63.15, 97, 120, 190])
def test_the_search_finds_a_known_limit_within_5_percent_in_8_probes(limit):
    probes = []

    def probe(rate):
        records = level(rate, limit, max(required_requests(1), math.ceil(20 * rate)))
        probes.append(rate)
        return attains(records, TIGHT).state

    found, tried = search(probe)
    assert found.low <= limit * 1.01 and found.high >= limit * 0.99
    assert found.high / found.low <= 1.05 and abs(math.sqrt(found.low * found.high) / limit - 1) <= 0.05
    assert len(tried) == len(probes) <= 8


def test_the_search_ends_when_nothing_meets_or_everything_does():
    found, tried = search(lambda rate: "missed", max_probes=4)
    assert found == (0.0, 3.125) and len(tried) == 4 and str(found) == "below 3.125"
    found, _ = search(lambda rate: "met", max_probes=4)
    assert found == (200, math.inf) and str(found) == "at least 200"


@pytest.mark.parametrize(("limit", "most"), [(97, 5), (103, 5), (130, 9), (420, 12), (22, 12)])
def test_a_search_near_its_start_takes_few_probes_and_widens_up_to_doubling(limit, most):
    found, tried = search(
        lambda rate: "met" if rate <= limit else "missed", 100, step=1.08, tolerance=0.02, max_probes=16
    )
    assert found.low <= limit < found.high <= found.low * 1.02 and len(tried) <= most
    assert all(rate == float(f"{rate:.3g}") for rate, _ in tried)


def test_an_invalid_probe_bounds_nothing_and_ends_the_search():
    states = {25.0: "met", 50.0: "met", 100.0: "invalid"}
    assert search(states.get, 25.0) == (Bracket(50.0, math.inf), [(25.0, "met"), (50.0, "met")])


def test_contradicting_repeats_count_as_missed():
    assert bracket([(25, "met"), (50, "met"), (50, "missed"), (75, "met")]) == (25, 50)
    assert str(bracket([])) == str(bracket([(25, "undecided")])) == "not known"


def test_what_no_level_decided_bounds_nothing():
    assert bracket([(25, "undecided"), (50, "met"), (75, "missed")]) == (50, 75)


def test_a_level_of_full_length_that_is_too_close_to_call_was_not_shown_to_be_met():
    """Alike in the search and in a bracket of stored levels; a level that was merely too short says nothing in either."""
    records = level(50, 100, 1000)
    records.loc[:4, "first_token_s"] += 1
    close, short = attains(records, TIGHT), attains(level(50, 100, 300), TIGHT)
    assert close.state == "undecided" and close.bound == "missed" and "so not shown to be met" in close.reason
    assert short.bound == "undecided" and "too few to tell, it takes 459 requests" in short.reason
    growing = attains(level(100, 20, 1000), SLO("generous", 1e9, 1e9))  # full length, and still too short to tell
    assert growing.bound == "undecided"
    bounds = {25.0: "met", 50.0: close.bound, 100.0: short.bound}
    assert bracket(bounds.items()) == (25, 50)
    found, tried = search(lambda rate: bounds.get(rate, "met"))
    assert found == bracket(tried) and found.high == 50


def test_after_a_probe_that_says_nothing_the_search_goes_on_below_and_bounds_nothing_with_it():
    found, tried = search(lambda rate: "met" if rate < 90 else "undecided")
    assert found == bracket(tried) and 85 < found.low < 90 and found.high == math.inf


def test_a_search_goes_on_from_what_is_known():
    """Whatever else was measured of the variant bounds the search too; where that contradicts itself what missed counts."""
    known = [(25.0, "met"), (40.0, "missed"), (50.0, "met"), (100.0, "missed")]
    found, tried = search(lambda rate: "met", known=known)
    assert [rate for rate, _ in tried] == [31.6, 35.6, 37.7, 38.8] and found == bracket(known + tried) == (38.8, 40)
    assert search(pytest.fail, known=[(50.0, "met"), (52.0, "missed")]) == ((50, 52), [])
    many = [(float(rate), "met") for rate in range(1, 41)]  # a run with as many levels as one likes
    assert search(lambda rate: "missed", known=many, max_probes=1) == ((40, 80), [(80, "missed")])
    assert search(lambda rate: "met", known=[(1.0, "missed")] * 20 + many[:1], max_probes=1)[1] == [(0.5, "met")]


@pytest.mark.parametrize("values", [{"ttft_ms": 0}, {"tpot_ms": -1}, {"share": 1.0}, {"share": 99}])
def test_impossible_objectives_are_refused(values):
    with pytest.raises(BadInput, match="above 0 ms"):
        SLO(**{"name": "x", "ttft_ms": 120, "tpot_ms": 50} | values)
    with pytest.raises(BadInput, match="start"):
        search(lambda rate: "met", start=0)
