"""What a level cost: two meters of one energy, and the interval that their disagreement leaves."""

import dataclasses
import math

import numpy as np
import pandas as pd
import pytest

from conftest import make_records
from fp8lab.metrics.resources import clock, summarize_usage
from fp8lab.metrics.statistics import Ratio
from fp8lab.metrics.summary import Summary
from fp8lab.results.evidence import Evidence, evidence
from fp8lab.results.run_folder import open_run

RECORDS = make_records([0.0, 5.0], [0.1, 5.1], [10.0, 20.35], [100, 100])
WINDOW = (4.0, 16.0)


def sampled(watts, *, counter_until: float = 21.0, counter_factor: float = 1.0, **columns) -> pd.DataFrame:
    """Power five times a second from just before the level to its end, a counter of it once a second."""
    at = np.arange(-0.3, 20.5, 0.2)
    power = np.broadcast_to(np.asarray(watts(at) if callable(watts) else watts, float), at.shape)
    fine = np.arange(-0.3, 22, 0.01)
    used = np.cumsum(np.broadcast_to(watts(fine) if callable(watts) else watts, fine.shape)) * 0.01 * counter_factor
    counted = np.where((np.arange(at.size) % 5 == 0) & (at <= counter_until), np.interp(at, fine, used) + 1e6, np.nan)
    rest = ("gpu_util", "gpu_memory_util", "running", "waiting", "kv_cache_usage", "gpu_memory_gib", "preemptions")
    rest += tuple(f"{role}_{what}" for role in ("frontend", "engine", "client") for what in ("cpu", "cpu_max"))
    table = {"at_s": at, "gpu_power_w": power, "gpu_energy_j": counted, "gpu_sm_mhz": 1980.0} | dict.fromkeys(rest, 0.5)
    return pd.DataFrame(table | columns)


def apart(used):
    return Summary(valid=True, requests=2, completed=2, failed=0, **used).meters_apart


@pytest.mark.parametrize("until", [21.0, 19.4])
def test_both_meters_cover_the_level_to_its_ends(until):
    """A counter is read once a second: what lies beyond its last reading is not lost."""
    used = summarize_usage(sampled(500.0, counter_until=until), RECORDS, WINDOW)
    assert used["energy_j"] == pytest.approx(500 * 20.35, rel=1e-3)
    assert used["energy_integral_j"] == pytest.approx(500 * 20.35, rel=1e-3)
    assert used["joules_per_output_token"] == pytest.approx(used["energy_j"] / 200)
    assert apart(used) == pytest.approx(0, abs=2e-3)


def test_preemptions_are_counted_from_before_the_first_request():
    at = sampled(500.0)["at_s"]
    preempted = np.select([at < 0, at < 0.8], [3.0, np.nan], 15.0)  # read once a second
    assert summarize_usage(sampled(500.0, preemptions=preempted), RECORDS, WINDOW)["preemptions"] == 12


def test_the_counter_is_the_meter_and_the_integral_its_check():
    used = summarize_usage(sampled(lambda at: 400 + 10 * at, counter_factor=0.95), RECORDS, WINDOW)
    assert used["joules_per_request"] == pytest.approx(used["energy_j"] / 2)
    assert apart(used) == pytest.approx(-math.log(0.95), abs=2e-3)
    without = summarize_usage(sampled(500.0).assign(gpu_energy_j=np.nan), RECORDS, WINDOW)
    assert without["energy_j"] is None and apart(without) is None
    assert without["joules_per_output_token"] == pytest.approx(500 * 20.35 / 200, rel=1e-3)


def test_the_clock_and_its_reasons_are_those_of_the_window():
    held = sampled(650.0).assign(gpu_clock_reasons=4.0, gpu_power_limit_w=700.0)
    held.loc[held["at_s"] < 10, "gpu_clock_reasons"] = 0.0
    used = summarize_usage(held, RECORDS, WINDOW)
    assert used["power_limited_steady"] == pytest.approx(0.5, abs=0.02) and used["heat_limited_steady"] == 0
    assert used["gpu_power_limit_w"] == 700 and used["gpu_sm_mhz_steady"] == 1980
    ran = clock(held.drop(columns=["gpu_clock_reasons", "gpu_power_limit_w"]), WINDOW)
    assert ran.by_power is None and ran.limit_w is None and not ran.power_limited


def test_no_interval_is_tighter_than_its_two_meters_are_apart():
    tight = Ratio(0.7, 0.699, 0.701, 3, "Student's t from 3 seeds")
    wide = tight.at_least(math.log(1.05))
    assert (wide.low, wide.high) == pytest.approx((0.7 / 1.05, 0.7 * 1.05)) and "two meters" in wide.model
    assert wide.at_least(0.01) == wide
    seen = evidence(open_run(source="h100-80gb-long-prompts"))
    for level_id, summary in seen.summaries.items():
        assert abs(summary.meters_apart) < 0.015, level_id
    one = seen.compare("fp8", "bf16", math.inf, "joules_per_output_token")
    # As if one meter of one variant read a tenth more: the interval reaches that far.
    more = {name: s for name, s in seen.summaries.items() if name.startswith("fp8-infrps")}
    more = {name: dataclasses.replace(s, energy_integral_j=1.1 * s.energy_integral_j) for name, s in more.items()}
    seen = Evidence(seen.run)
    seen.summaries = seen.summaries | more
    apart = seen.compare("fp8", "bf16", math.inf, "joules_per_output_token")
    assert apart.value == one.value and apart.high / apart.value > 1.08 > one.high / one.value


def test_an_interval_says_whether_it_is_over_starts():
    one_start = evidence(open_run(source="h100-80gb")).compare(
        "fp8-rust-graphs", "bf16-rust-graphs", math.inf, "output_token_throughput"
    )
    assert one_start.starts == 1 and one_start.model.endswith("what differs from start to start is not in it")
    own = evidence(open_run(source="h100-80gb-starts")).compare(
        "fp8-rust-graphs", "bf16-rust-graphs", math.inf, "output_token_throughput"
    )
    assert own.starts == own.pairs >= 2 and own.model.endswith("a start each")
