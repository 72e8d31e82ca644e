"""A fleet: several endpoints that serve the same, among which a load is shared out."""

import json
import time

import pandas as pd
import pytest

from conftest import streaming_server
from fp8lab.config.trace import arrival_times, fixed_length
from fp8lab.errors import BadInput, LevelFailed
from fp8lab.load.endpoint import Endpoint
from fp8lab.load.generator import send_load
from fp8lab.load.level import measure_level, warm_up
from fp8lab.metrics.summary import Summary
from test_endpoint import SHORT, recording, refuse, stream
from warm_cli import fp8lab

TRACE = fixed_length(60, input_tokens=5, output_tokens=10)


def level(*urls, trace=TRACE, rate=200, **options):
    first, *others = (Endpoint(url, "ok") for url in urls)
    return measure_level(first, trace, arrival_times(len(trace), rate), name="fleet", others=others, **options)


def lived(fields):
    """A busy machine may make a level late; what was sent where does not depend on that."""
    return {name: value for name, value in fields.items() if name in ("requests", "completed", "failed")}


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_each_takes_its_turn_and_has_a_part_of_the_level(workers):
    with streaming_server("--ttft-ms", "20") as one, streaming_server("--ttft-ms", "60") as two:
        result = level(one, two, workers=workers)
    fast, slow = result.summary.endpoints
    assert lived(fast) == lived(slow) == {"requests": 30, "completed": 30, "failed": 0}
    assert (fast["url"], slow["url"]) == (f"{one}/v1/completions", f"{two}/v1/completions")
    assert fast["mean_ttft_ms"] == pytest.approx(20, abs=10) and slow["mean_ttft_ms"] == pytest.approx(60, abs=10)
    together = result.summary.output_token_throughput
    assert fast["output_token_throughput"] + slow["output_token_throughput"] == pytest.approx(together)
    assert (result.records["endpoint"] == result.records["request"] % 2).all()
    assert Summary.read(json.loads(json.dumps(result.summary.__dict__, default=dict))).endpoints[0]["requests"] == 30


def test_whoever_has_the_fewest_in_flight_takes_the_next():
    """One answers in 20 ms and one in 300: the quick one gets most, and of idle ones each its turn."""
    with (
        streaming_server("--ttft-ms", "10", "--itl-ms", "1") as one,
        streaming_server("--ttft-ms", "290", "--itl-ms", "1") as two,
    ):
        quick, slow = level(one, two, rate=60, balance="least-in-flight", workers=1).summary.endpoints
        alone = level(one, two, trace=TRACE.head(8), rate=2, balance="least-in-flight", workers=1).summary.endpoints
    assert quick["requests"] > 2 * slow["requests"] > 0
    assert abs(alone[0]["requests"] - alone[1]["requests"]) <= 2


def test_a_cap_is_on_all_together():
    with streaming_server() as one, streaming_server() as two:
        summary = level(one, two, rate=1e4, max_concurrency=4, workers=2).summary
    assert summary.peak_concurrent_requests <= 4 and [e["completed"] for e in summary.endpoints] == [30, 30]


def test_one_that_is_down_is_named_and_the_others_are_kept():
    with streaming_server() as one, recording(refuse(503, {"error": {"message": "no room"}})) as two:
        result = level(one, two.url)
    up, down = result.summary.endpoints
    assert (up["completed"], down["failed"], down["completed"]) == (30, 30, 0)
    assert not result.summary.valid and f"(failed at {two.url}/v1/completions: 30)" in result.summary.invalid_reason
    assert result.summary.completed == 30 and "no room" in result.summary.invalid_reason
    with (
        streaming_server() as one,
        recording(refuse(503, {"error": {"message": "no room"}})) as two,
        pytest.raises(LevelFailed, match=f"the warm-up of {two.url}/v1/completions failed"),
    ):
        warm_up(Endpoint(one, "ok"), TRACE.head(4), others=[Endpoint(two.url, "ok")])


def test_what_was_never_sent_is_nobodys_failure():
    """One of the two hangs and takes every slot: what then waits for one fails, and neither endpoint is blamed for it."""

    def hang(handler, _body):
        time.sleep(30)

    with streaming_server("--itl-ms", "1") as one, recording(hang) as two:
        summary = level(one, two.url, rate=1e4, max_concurrency=4, workers=1, drain_timeout_s=2.0).summary
    good, bad = summary.endpoints
    assert good["failed"] == 0 and bad["failed"] >= 1 and summary.failed > bad["failed"]
    assert f"(failed at {two.url}/v1/completions: {bad['failed']})" in summary.invalid_reason


def test_one_server_under_two_names_is_no_fleet():
    with (
        streaming_server() as one,
        pytest.raises(BadInput, match="are one server .127.0.0.1.; name each of a fleet once"),
    ):
        level(one, one.replace("127.0.0.1", "localhost"))


def test_the_remedy_is_about_the_one_that_failed():
    with streaming_server() as one:
        reason = level(one, "http://127.0.0.1:9").summary.invalid_reason
    assert "is a server listening at http://127.0.0.1:9" in reason


@pytest.mark.parametrize(
    ("first", "others", "balance", "said"),
    [
        ("http://h:1", ["http://h:1/v1"], "round-robin", "http://h:1/v1/completions is named twice"),
        ("http://h:1", ["http://h:2/v1/chat/completions"], "round-robin", "some endpoints are chats and some are not"),
        ("http://h:1", ["http://h:2"], "random", "balance 'random' is none of round-robin, least-in-flight"),
    ],
)
def test_what_cannot_be_a_fleet_is_refused_before_anything_is_sent(first, others, balance, said):
    with pytest.raises(BadInput, match=said):
        fleet = [Endpoint(url, "m") for url in others]
        send_load(Endpoint(first, "m"), TRACE, [0.0] * 60, others=fleet, balance=balance)


def test_a_fleet_from_the_command_line(tmp_path):
    """Each is warmed up, each has its own path and query, and the JSON and the records tell who did what."""
    with recording() as one, recording() as two:
        urls = ["--base-url", f"{one.url}/a/v1?region=x", "--base-url", f"{two.url}/b"]
        done = fp8lab("load-test", *urls, *SHORT, "--warmup", "1", "--out", str(tmp_path / "fleet"))
        searched = fp8lab(
            "load-test", *urls, *SHORT, "--requests", "8", "--find-max-rate", "--slo", "ttft=5000,p50", "--max-probes", "1", "--rate", "20",
            "--balance", "least-in-flight", "--out", str(tmp_path / "search"),
        )  # fmt: skip
    said = json.loads(done.stdout)
    assert done.returncode in (0, 3), done.stderr
    assert [e["url"] for e in said["endpoints"]] == [f"{one.url}/a/v1/completions", f"{two.url}/b/completions"]
    assert said["requests"] == sum(e["requests"] for e in said["endpoints"])
    assert {path for path, *_ in one.seen} == {"/a/v1/completions?region=x"}
    assert {path for path, *_ in two.seen} == {"/b/completions"}
    assert f"  {two.url}/b/completions: " in done.stderr and "warm-up: 2 requests" in done.stderr
    assert set(pd.read_parquet(tmp_path / "fleet" / "records.parquet")["endpoint"]) == {0, 1}
    alone = fp8lab(
        "load-test",
        *urls[:2],
        *SHORT,
        "--requests",
        "8",
        "--find-max-rate",
        "--slo",
        "ttft=5000,p50",
        "--out",
        str(tmp_path / "search"),
    )
    assert alone.returncode == 2 and "holds a search with others" in alone.stderr
    asked = json.loads((tmp_path / "search" / "search.json").read_text())["asked"]
    assert asked["balance"] == "least-in-flight" and asked["others"] == [f"{two.url}/b/completions"], searched.stderr


def test_a_connection_that_the_server_closed_is_opened_to_the_same_endpoint():
    """Each closes a connection after one answer: what is handed back goes where it was to go."""

    def once(handler, body):
        stream(handler, body, 3)
        handler.close_connection = True
        time.sleep(0.01)

    trace = fixed_length(24, input_tokens=5, output_tokens=3)
    with recording(once) as one, recording(once) as two:
        summary = level(one.url, two.url, trace=trace, rate=100, workers=1).summary
    assert summary.completed == 24 and [e["completed"] for e in summary.endpoints] == [12, 12]
    assert len(one.seen) == len(two.seen) == 12
