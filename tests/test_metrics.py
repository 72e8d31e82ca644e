import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import make_records, make_tokens
from fp8lab.metrics import performance

# Three requests, worked by hand: sent at 0, 1, 2 s; first tokens after 0.1, 0.2, 0.3 s; 11, 21 and 1 tokens.
HAND = make_records([0, 1, 2], [0.1, 1.2, 2.3], [1.1, 3.2, 2.3], [11, 21, 1])
HAND_TOKENS = make_tokens(HAND)


def test_hand_worked_example():
    summary = performance.summarize(HAND, HAND_TOKENS)
    expected = {
        "completed": 3,
        "failed": 0,
        "duration_s": 3.2,
        "output_tokens": 33,
        "request_throughput": 3 / 3.2,
        "output_token_throughput": 33 / 3.2,
        "mean_ttft_ms": 200.0,
        "p50_ttft_ms": 200.0,
        "p99_ttft_ms": 298.0,
        "mean_tpot_ms": 100.0,
        "mean_itl_ms": 100.0,
        "mean_e2el_ms": (1100 + 2200 + 300) / 3,
        "peak_concurrent_requests": 2,
        "peak_concurrent_requests_vllm": 2,
        "mean_concurrent_requests": 3.6 / 3.2,
        "tokens_per_chunk": 1.0,
        "schedule_lag_p99_ms": 0.0,
    }
    assert {key: summary[key] for key in expected} == pytest.approx(expected)


def test_a_single_token_has_no_tpot():
    assert performance.latencies(HAND)["tpot_ms"].isna().tolist() == [False, False, True]


def test_failures_stay_in_the_count_and_add_nothing():
    failed = make_records([0, 1, 2], [0.1, np.nan, 2.3], [1.1, np.nan, 2.3], [11, 0, 1], errors=[None, "cut", None])
    summary = performance.summarize(failed, HAND_TOKENS)
    assert (summary["requests"], summary["completed"], summary["failed"]) == (3, 2, 1)
    assert summary["output_tokens"] == 12
    assert summary["mean_ttft_ms"] == pytest.approx(200)


def test_nothing_completed():
    none = make_records([0, 1], [np.nan] * 2, [np.nan] * 2, [0, 0], errors=["refused"] * 2)
    summary = performance.summarize(none, HAND_TOKENS.iloc[:0])
    assert summary["completed"] == 0
    assert summary["output_token_throughput"] is None
    assert summary["mean_ttft_ms"] is None
    assert summary["peak_concurrent_requests"] == 0


def test_latency_counts_from_sending_and_from_the_schedule():
    late = make_records([0.5], [0.6], [1.0], [2], scheduled=[0.2])
    each = performance.latencies(late).iloc[0]
    assert each["ttft_ms"] == pytest.approx(100)
    assert each["ttft_from_schedule_ms"] == pytest.approx(400)


def test_steady_window_leaves_out_ramp_and_drain():
    # A hundred requests a second for 100 s, each 5 s long: steady between the first and last seconds.
    sent = np.arange(0, 100, 0.01)
    steady = make_records(sent, sent + 0.1, sent + 5, np.full(sent.size, 50))
    summary = performance.summarize(steady, make_tokens(steady))
    assert 20 < summary["steady_begin_s"] < 25 and 79 < summary["steady_end_s"] < 85
    assert summary["steady_output_token_throughput"] == pytest.approx(5000, rel=1e-2)
    assert summary["output_token_throughput"] < 4800


@st.composite
def any_records(draw):
    count = draw(st.integers(1, 30))
    seconds = st.floats(0, 20, allow_nan=False)
    sent = draw(st.lists(seconds, min_size=count, max_size=count))
    waits = draw(st.lists(st.floats(0.001, 5), min_size=count, max_size=count))
    runs = draw(st.lists(st.floats(0, 10), min_size=count, max_size=count))
    tokens = draw(st.lists(st.integers(1, 300), min_size=count, max_size=count))
    errors = draw(st.lists(st.sampled_from([None, None, None, "cut"]), min_size=count, max_size=count))
    first = np.array(sent) + waits
    return make_records(sent, first, first + runs, tokens, errors=errors)


def obvious_peak(records) -> int:
    rows = [(r.sent_s, r.last_token_s) for r in records.itertuples() if r.error is None]
    return max((sum(b <= t <= e for b, e in rows) for t, _ in rows), default=0)


def obvious_peak_per_second(records) -> int:
    """As vllm/benchmarks/serve.py writes it, with loops."""
    rows = [(r.sent_s, r.last_token_s) for r in records.itertuples() if r.error is None]
    if not rows:
        return 0
    start = min(b for b, _ in rows)
    counts = {}
    for begin, end in rows:
        for second in range(int(begin - start), int(end - start) + 1):
            counts[second] = counts.get(second, 0) + 1
    return max(counts.values())


@given(any_records())
@settings(max_examples=200, deadline=None)
def test_peaks_agree_with_the_obvious_way(records):
    assert performance.peak_concurrency(records) == obvious_peak(records)
    assert performance.peak_concurrency_per_second(records) == obvious_peak_per_second(records)
    assert performance.peak_concurrency_per_second(records) >= performance.peak_concurrency(records)


@given(any_records())
@settings(max_examples=100, deadline=None)
def test_steady_window_holds_its_share_of_the_tokens(records):
    tokens = make_tokens(records)
    at = tokens["at_s"][tokens["request"].isin(performance.completed(records)["request"])]
    window = performance.steady_window(records, tokens)
    assert window == pytest.approx(np.quantile(at, [0.2, 0.8]) if len(at) else (np.nan, np.nan), nan_ok=True)


@given(any_records())
@settings(max_examples=100, deadline=None)
def test_latencies_agree_with_the_obvious_way(records):
    each = performance.latencies(records)
    done = [r for r in records.itertuples() if r.error is None]
    assert each["ttft_ms"].tolist() == pytest.approx([(r.first_token_s - r.sent_s) * 1e3 for r in done])
    for row, r in zip(each.itertuples(), done, strict=True):
        if r.output_tokens > 1:
            expected = (r.last_token_s - r.first_token_s) / (r.output_tokens - 1) * 1e3
            assert row.tpot_ms == pytest.approx(expected, abs=1e-6)


def test_where_chunks_are_merged_the_servers_own_count_says_when_tokens_were_made():
    """100 tokens in 50 chunks: ten a second for five seconds, then all others at once."""
    records = make_records([0.0], [0.1], [5.5], [100]).assign(chunks=50)
    counter = pd.DataFrame(
        {"at_s": [1.0, 2.0, 3.0, 4.0, 5.0, 5.5], "generation_tokens": [1010.0, 1020, 1030, 1040, 1050, 1100]}
    )
    assert performance.counted_window(records, counter) == pytest.approx((2.0, 5.3))
    # Read before the first request, and for the last time half a second before the last token.
    early = pd.DataFrame({"at_s": [-0.3, 1, 2, 3, 4, 5], "generation_tokens": [1000.0, 1020, 1040, 1060, 1080, 1090]})
    assert performance.counted_window(records, early) == pytest.approx((1.0, 4.0))
    assert np.isnan(performance.counted_window(records, early[:4])).all()  # it ends before four fifths
    tokens = pd.DataFrame({"request": 0, "at_s": np.linspace(0.1, 5.5, 50)})
    found = performance.summarize(records, tokens, counter)
    assert found["steady_output_token_throughput"] == pytest.approx(60 / 3.3)
    others = counter.assign(generation_tokens=counter["generation_tokens"] * [1, 1, 1, 1, 1, 1.2])
    single = records.assign(chunks=100)
    for one, seen in ((records, others), (single, counter), (records, counter[3:]), (records, counter[:0])):
        assert np.isnan(performance.counted_window(one, seen)).all()
        assert performance.summarize(one, tokens, seen)["steady_begin_s"] == performance.steady_window(one, tokens)[0]
