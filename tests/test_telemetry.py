"""Telemetry that fails: a level whose limit nobody watched is invalid, in words, and keeps its records."""

import json
import sys
import threading
import time

import numpy as np
import pytest

from conftest import HERE
from fp8lab.config.trace import fixed_length
from fp8lab.load import telemetry
from fp8lab.load.endpoint import Endpoint
from fp8lab.load.level import measure_level
from fp8lab.load.telemetry import Telemetry
from fp8lab.metrics.performance import completed
from fp8lab.metrics.resources import clock
from fp8lab.results.run_folder import open_run
from fp8lab.system.gpu import GpuReader

COUNTERS = 'vllm:num_requests_running{engine="0"} 3.0\nvllm:num_requests_waiting{engine="0"} 0.0\n'


def level(url, metrics, seconds=2.0):
    """A level of 20 requests over so many seconds, watched through `metrics`."""
    trace = fixed_length(20, input_tokens=5, output_tokens=10)
    due = np.linspace(0, seconds, 20)
    return measure_level(Endpoint(url, "ok"), trace, due, name="watched", telemetry=Telemetry([], metrics))


def failing(error: BaseException, good: int = 0):
    """Metrics that answer `good` times and then raise `error`."""
    answers = iter([COUNTERS] * good)

    def metrics() -> str:
        for answer in answers:
            return answer
        raise error

    return metrics


@pytest.mark.parametrize("error", [ValueError("no such thing"), SystemExit("leave"), MemoryError()], ids=repr)
def test_a_thread_that_dies_makes_the_level_invalid_and_keeps_it(sse_url, monkeypatch, error):
    result = level(sse_url, failing(error, good=1))
    assert not result.summary.valid and result.summary.completed == 20 == len(result.records)
    assert f"telemetry of the server ended with {error!r}" in result.summary.invalid_reason
    assert result.telemetry["client_cpu"].notna().any()  # the other thread went on
    monkeypatch.setattr(GpuReader, "read", lambda *_: (_ for _ in ()).throw(error))
    result = level(sse_url, lambda: COUNTERS)
    assert f"telemetry of the machine ended with {error!r}" in result.summary.invalid_reason
    assert result.summary.completed == 20 and result.telemetry["running"].notna().any()


def test_a_thread_that_hangs_does_not_hold_the_level(sse_url, monkeypatch):
    monkeypatch.setattr(telemetry, "_END_S", 0.5)
    forever = threading.Event()
    result = level(sse_url, lambda: str(forever.wait()), seconds=0.5)
    forever.set()
    assert "telemetry of the server hung" in result.summary.invalid_reason and result.summary.completed == 20


@pytest.mark.parametrize("good", [0, 2])
def test_a_server_that_stops_telling_makes_the_level_invalid(sse_url, good):
    result = level(sse_url, failing(OSError("timed out"), good), seconds=6.0)
    assert "the server's /metrics gave no sample for " in result.summary.invalid_reason
    assert "% of the time (timed out)" in result.summary.invalid_reason and len(result.records) == 20


def test_a_server_that_never_counted_anything_is_no_fault(sse_url):
    assert level(sse_url, lambda: "# statistics are switched off\n", seconds=4.0).summary.valid


def problems(column: str, at, window=(0.0, 20.0), dilation=1.0) -> list[str]:
    """What is said of a level of which `column` was sampled at the model seconds `at`."""
    watching = Telemetry([], None, dilation)
    watching._rows = [{"at_s": moment * dilation, column: 1.0} for moment in at]
    return watching.problems(watching.table(0.0), [window])


@pytest.mark.parametrize(
    ("column", "period"), [("gpu_util", 0.2), ("gpu_energy_j", 1.0), ("engine_cpu", 0.5), ("running", 1.0)]
)
def test_what_was_seen_too_seldom_cannot_tell_the_limit(column, period):
    often = np.arange(0, 20, 2 * period)
    assert problems(column, often) == []
    assert "measure it again" in problems(column, np.arange(0, 20, 5 * period))[0]
    assert problems(column, np.delete(often, len(often) // 2)) == []
    silent = often[(often < 8) | (often > 14)]
    assert "gave no sample for " in problems(column, silent)[0]
    # The same silence costs a longer level less.
    assert problems(column, np.append(silent, np.arange(20, 90, period)), (0.0, 90.0)) == []
    # Wall seconds are sampled, model seconds are judged.
    assert problems(column, often / 8, (0.0, 20.0 / 8), dilation=8.0) == []
    assert problems(column, often, (0.0, 20.0), dilation=8.0)


@pytest.mark.parametrize("name", ["h100-80gb", "h100-80gb-long-prompts", "h200-80gb", "emulated-h100"])
def test_every_recorded_level_was_watched(name):
    run = open_run(source=name)
    for summary in run.summaries().values():
        result = run.read(summary.level)
        whole = (result.records["sent_s"].min(), completed(result.records)["last_token_s"].max())
        watching = Telemetry([], lambda: "", summary.time_dilation)
        assert watching.problems(result.telemetry, [whole, summary.window]) == []


def test_the_clock_comes_with_its_reasons_and_the_power_limit(monkeypatch, tmp_path):
    """From what NVML says to the share of samples in which the power limit held the clock back."""
    card = {"used_gib": 1, "processes": [], "lost": False, "handles": True, "cards": [], "sm_mhz": 1500}
    (tmp_path / "nvml.json").write_text(json.dumps(card | {"clock_reasons": 4, "power_limit_mw": 700_000}))
    monkeypatch.setenv("FAKE_NVML", str(tmp_path / "nvml.json"))
    monkeypatch.syspath_prepend(str(HERE / "fake_nvml"))
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    try:
        with Telemetry([]) as sampled:
            began = time.monotonic()
            time.sleep(0.5)
    finally:
        sys.modules.pop("pynvml", None)
    table = sampled.table(began)
    ran = clock(table, (-1.0, 1.0))
    assert (ran.mhz, ran.by_power, ran.by_heat, ran.limit_w) == (1500, 1.0, 0.0, 700)
    # Clock and reasons with every sample, the limit with the slow ones: at the start and once more at the end.
    assert table["gpu_clock_reasons"].notna().sum() >= 3 and table["gpu_power_limit_w"].notna().sum() == 2
