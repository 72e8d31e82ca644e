"""The load generator against a server whose times are known and which commits faults."""

import contextlib
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np
import psutil
import pytest

from conftest import make_records, streaming_server
from fp8lab.config.trace import arrival_times, fixed_length, sharegpt_like
from fp8lab.errors import BadInput, LevelFailed, NotWritten, Stopped
from fp8lab.load import generator
from fp8lab.load.endpoint import Endpoint
from fp8lab.load.generator import ClientReport, busiest_second, default_workers, self_check, send_load
from fp8lab.load.level import measure_level, to_tables
from fp8lab.metrics.performance import latencies, send_lag_ms, summarize

TRACE = fixed_length(20, input_tokens=5, output_tokens=10)


def send(url, trace=TRACE, due=None, model="ok", chat=False, **options):
    return send_load(Endpoint(url, model, chat=chat), trace, np.zeros(len(trace)) if due is None else due, **options)


def test_every_token_is_counted_and_timed(sse_url):
    sent = send(sse_url, due=arrival_times(20, 200))
    records, tokens = to_tables(sent, TRACE)
    assert records["error"].isna().all()
    assert (records["chunks"] == 10).all() and (records["output_tokens"] == 10).all() and len(tokens) == 200
    assert (records["prompt_tokens"] == 10).all()  # the server's own count
    each = latencies(records)
    assert each["ttft_ms"].median() == pytest.approx(20, abs=8)
    assert each["tpot_ms"].median() == pytest.approx(2, abs=0.8)
    assert each["lag_ms"].abs().median() < 5


def test_time_dilation_is_undone_when_recording(sse_url):
    sent = send(sse_url, due=arrival_times(20, 200), time_dilation=4.0)
    records, _ = to_tables(sent, TRACE, 4.0)
    assert records["scheduled_s"].max() == pytest.approx(0.1)
    assert latencies(records)["ttft_ms"].median() == pytest.approx(5, abs=2.5)
    assert latencies(records)["tpot_ms"].median() == pytest.approx(0.5, abs=0.25)


def test_the_schedule_is_open_loop(sse_url):
    """Requests that take 20 ms each leave every 2 ms all the same."""
    sent = send(sse_url, due=arrival_times(20, 500, burstiness=np.inf))
    summary = summarize(*to_tables(sent, TRACE))
    assert summary["peak_concurrent_requests"] > 5
    assert not sent.client.closed_loop


def test_a_cap_makes_the_level_closed_loop(sse_url):
    sent = send(sse_url, max_concurrency=3, workers=1)
    summary = summarize(*to_tables(sent, TRACE))
    assert summary["completed"] == 20 and summary["peak_concurrent_requests"] <= 3
    assert sent.client.closed_loop


def closed(url, trace=TRACE, due=None, **options):
    """A closed-loop level as `load-test` measures it."""
    due = np.zeros(len(trace)) if due is None else due
    return measure_level(Endpoint(url, "ok"), trace, due, name="closed loop", **options)


def test_waiting_for_a_slot_is_no_lag(sse_url, capsys):
    """The cap of 4 binds: 40 ms a request let 100 requests/s through, 300 arrive."""
    due = arrival_times(60, 300)
    result = closed(sse_url, fixed_length(60, input_tokens=5, output_tokens=10), due, max_concurrency=4)
    summary, records = result.summary, result.records
    assert summary.valid, summary.invalid_reason
    assert summary.schedule_lag_p99_ms < 5 and summary.closed_loop
    assert summary.peak_concurrent_requests == 4 < summary.peak_concurrent_requests_vllm
    assert "peak 4 in flight" in capsys.readouterr().err
    # Seen from the schedule they did wait, and the records say for what.
    assert latencies(records)["lag_ms"].max() > 100 and summary.p99_ttft_from_schedule_ms > 100
    assert records["slot_s"].isna().sum() == 4 and (records["slot_s"].dropna() <= records["sent_s"].iloc[4:]).all()
    # Each slot that was taken is one that another request had left.
    assert set(np.searchsorted(np.sort(records["last_token_s"]), records["slot_s"].dropna())) == set(range(1, 57))


def test_a_client_that_falls_behind_in_a_closed_loop_is_still_caught():
    records = to_records_of_a_closed_loop(slot=[np.nan, np.nan, 1.0, 2.0], sent=[0.0, 0.02, 1.02, 2.02])
    assert send_lag_ms(records).tolist() == pytest.approx([0, 20, 20, 20])
    assert summarize(records, records.head(0).assign(at_s=[])[["request", "at_s"]])["schedule_lag_p99_ms"] > 19
    assert "fell behind" in self_check(send_lag_ms(records).to_numpy(), np.full(4, 30.0), report(closed_loop=True))[0]


def to_records_of_a_closed_loop(slot, sent):
    sent = np.array(sent)
    return make_records(sent, sent + 0.03, sent + 0.9, 10, scheduled=np.zeros(len(sent))).assign(slot_s=slot)


@pytest.mark.parametrize(
    ("cap", "workers", "requests"), [(1, 1, 5), (3, 2, 21), (4, None, 30), (7, 3, 40), (50, 2, 20)]
)
def test_the_cap_holds_over_all_workers_and_is_used_up(sse_url, cap, workers, requests):
    trace = fixed_length(requests, input_tokens=5, output_tokens=10)
    summary = closed(sse_url, trace, max_concurrency=cap, workers=workers).summary
    assert summary.completed == requests
    assert summary.peak_concurrent_requests == min(cap, requests)
    # Every slot has as much to do as any other, whichever worker holds it.
    assert summary.mean_concurrent_requests > 0.8 * min(cap, requests)


def test_failed_requests_give_their_slots_back(sse_url):
    sent = send(sse_url, model="http-500", max_concurrency=2)
    assert [outcome.error[:8] for outcome in sent.outcomes] == ["HTTP 500"] * 20
    sent = send("http://127.0.0.1:9", fixed_length(6), max_concurrency=2)
    assert all("no connection" in outcome.error for outcome in sent.outcomes)


def test_a_capped_level_needs_no_more_workers_than_its_streams(sse_url, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(16)))
    assert send(sse_url, max_concurrency=4).client.workers == 1
    assert send(sse_url).client.workers == 3


def test_a_closed_loop_may_take_longer_than_its_drain(sse_url):
    """20 requests of 0.5 s, two at a time, are 5 s: each second brings something, so none of them is cut short."""
    with streaming_server("--itl-ms", "50") as url:
        result = closed(url, max_concurrency=2, drain_timeout_s=1.5)
    assert result.summary.valid and result.summary.duration_s > 4


def test_the_status_line_of_a_closed_loop_counts_who_waits(sse_url):
    said = []
    send(
        sse_url,
        fixed_length(60, input_tokens=5, output_tokens=60),
        max_concurrency=2,
        on_progress=lambda p: said.append(str(p)),
    )
    waiting = [int(match[1]) for line in said if (match := re.search(r"(\d+) wait for a slot", line))]
    assert waiting and min(waiting) > 0 and max(waiting) <= 58
    assert not any("s of arrivals left" in line for line in said)
    send(sse_url, due=np.linspace(0, 2, 20), on_progress=lambda p: said.append(str(p)))
    assert any("s of arrivals left" in line and "wait" not in line for line in said)


def test_workers_share_the_schedule_and_the_start(sse_url):
    due = arrival_times(20, 100)
    sent = send(sse_url, due=due, workers=3)
    records, _ = to_tables(sent, TRACE)
    assert sent.client.workers == 3
    assert records["request"].tolist() == list(range(20)) and records["error"].isna().all()
    assert (records["sent_s"] - due).abs().median() < 0.01


def test_chat_streams_are_read_too(sse_url):
    sent = send(sse_url, chat=True)
    assert all(outcome.error is None for outcome in sent.outcomes)


@pytest.mark.parametrize(
    ("fault", "reason", "chunks"),
    [
        ("http-500", "HTTP 500: out of <luck>", 0),
        ("refused-auth", "HTTP 401: bad key", 0),
        ("error-event", "error in the stream: engine died", 1),
        ("cut", "connection closed by the server after 1 chunks", 1),
        ("silent", "no bytes for 1 s", 1),
        ("malformed", 'malformed chunk: \'{"choices":[{"text":\'', 1),
        ("wrong-count", "9 output tokens instead of the 10 asked for", 10),
        ("unended", "the stream ended without a finish reason or [DONE] after 9 chunks", 9),
        ("huge", "an event of more than 1 MiB", 1),
    ],
)
def test_each_fault_is_a_failed_record_with_its_reason(sse_url, fault, reason, chunks):
    sent = send(sse_url, fixed_length(4, input_tokens=5, output_tokens=10), model=fault, idle_timeout_s=1.0)
    records, tokens = to_tables(sent, TRACE)
    assert records["error"].str.startswith(reason).all(), records["error"].tolist()
    assert (records["chunks"] == chunks).all() and len(tokens) == 4 * chunks
    summary = summarize(records, tokens)
    assert (summary["requests"], summary["failed"]) == (4, 4)


def test_failures_do_not_spoil_the_connections_of_others(sse_url):
    """Every second stream is cut; the others, on kept-alive connections, complete."""
    for _ in range(3):
        assert all(o.error for o in send(sse_url, model="cut", due=arrival_times(20, 200)).outcomes)
        assert not any(o.error for o in send(sse_url, due=arrival_times(20, 200)).outcomes)


def test_nobody_listens():
    sent = send("http://127.0.0.1:9", fixed_length(3))
    assert all("no connection" in outcome.error for outcome in sent.outcomes)


def test_a_server_that_dies_ends_the_level_with_what_was_recorded():
    with streaming_server() as url:
        sent = send(url, fixed_length(6, output_tokens=100), due=np.array([0, 0, 0, 0, 0, 0.5]))
        assert not any(outcome.error for outcome in sent.outcomes)
        sent = send(url, model="die")
    assert all(outcome.error for outcome in sent.outcomes)
    assert any(outcome.chunks for outcome in sent.outcomes)


def test_the_level_ends_at_its_deadline():
    with streaming_server("--itl-ms", "500") as url:
        began = time.monotonic()
        sent = send(url, fixed_length(4, output_tokens=1000), drain_timeout_s=1.0)
    assert time.monotonic() - began < 6
    why = "not finished when the level ended, 1 s after the last request was sent; to wait longer: load-test --drain-timeout"
    assert all(outcome.error == why and outcome.chunks for outcome in sent.outcomes)


def test_a_closed_loop_ends_when_nothing_comes_back_with_a_record_of_every_request(sse_url):
    began = time.monotonic()
    trace = fixed_length(6, output_tokens=1000)
    sent = send(sse_url, trace, model="silent", max_concurrency=2, workers=1, drain_timeout_s=1.0)
    assert time.monotonic() - began < 6 and not sent.client.lost_workers
    running, waiting = sent.outcomes[:2], sent.outcomes[2:]
    why = ", 1 s after anything came back; to wait longer: load-test --drain-timeout"
    assert all(outcome.error == f"not finished when the level ended{why}" and outcome.chunks for outcome in running)
    assert all(outcome.error == f"not sent: the level ended before its turn{why}" for outcome in waiting)


def test_a_closed_loops_drain_begins_with_its_last_request():
    with streaming_server("--itl-ms", "500") as url:
        began = time.monotonic()
        sent = send(url, fixed_length(2, output_tokens=1000), max_concurrency=2, drain_timeout_s=1.0)
    assert time.monotonic() - began < 6
    assert all("1 s after the last request was sent" in outcome.error for outcome in sent.outcomes)


def test_a_request_that_was_still_queued_says_so_and_names_the_option():
    with streaming_server("--ttft-ms", "60000") as url:
        sent = send(url, fixed_length(2), idle_timeout_s=1.0)
    why = "no bytes for 1 s, the request was still queued; to wait longer: load-test --idle-timeout"
    assert [outcome.error for outcome in sent.outcomes] == [why] * 2


@pytest.fixture
def full_queue():
    """The URL of a server that accepts nobody and whose queue is full: who connects now waits in vain."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server, contextlib.ExitStack() as held:
        for _ in range(8):
            client = held.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(server.getsockname())
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"idle_timeout_s": 1.0}, "no connection: not accepted within 1 s; to wait longer: load-test --idle-timeout"),
        (
            {"drain_timeout_s": 2.0},
            "no connection: not accepted when the level ended, 2 s after the last request was sent",
        ),
        (
            {"drain_timeout_s": 2.0, "max_concurrency": 4},
            "no connection: not accepted when the level ended, 2 s after the",
        ),
        (
            {"idle_timeout_s": np.inf, "drain_timeout_s": 2.0, "max_concurrency": 2},
            "no connection: not accepted when the level ended, 2 s after anything came back",
        ),
    ],
)
def test_a_server_that_accepts_nobody_ends_the_level_in_time_and_in_words(full_queue, options, reason):
    began = time.monotonic()
    sent = send(full_queue, fixed_length(4), workers=2, **options)
    assert time.monotonic() - began < 12
    tried = [outcome.error for outcome in sent.outcomes if outcome.sent]
    assert tried and all(error.startswith(reason) for error in tried) and not sent.client.lost_workers
    assert len(sent.outcomes) == 4 and all(outcome.error for outcome in sent.outcomes)


def test_a_worker_that_dies_costs_its_requests_and_says_so(sse_url, monkeypatch):
    killed = []

    def kill_one(progress):
        if progress.done and not killed:
            killed.append(True)
            victims = subprocess.run(
                ["pgrep", "-P", str(os.getpid()), "-f", "fp8lab.load.worker"],
                capture_output=True,
                text=True,
                check=True,
            )
            os.kill(int(victims.stdout.split()[0]), signal.SIGKILL)

    trace = fixed_length(200, input_tokens=5, output_tokens=10)
    sent = send(sse_url, trace, due=arrival_times(200, 100), workers=2, on_progress=kill_one)
    errors = [outcome.error for outcome in sent.outcomes if outcome.error]
    assert len(sent.outcomes) == 200 and 0 < len(errors) < 150
    assert all("load worker" in error for error in errors)
    assert sent.client.lost_workers and self_check(np.zeros(1), np.ones(1), sent.client)


def test_scratch_that_cannot_be_made_is_told_in_words(sse_url, monkeypatch, capfd):
    monkeypatch.setattr(generator, "Scratch", lambda: contextlib.nullcontext("/nowhere"))
    with pytest.raises(LevelFailed, match=r"worker 0 could not write to /nowhere/.* \(No such file.*\); make room"):
        send(sse_url)
    assert "Traceback" not in capfd.readouterr().err
    monkeypatch.undo()
    told = r"no temporary folder can be made \(No such file.*; make room, or name another"
    with monkeypatch.context() as gone, pytest.raises(NotWritten, match=told):
        gone.setattr(tempfile, "tempdir", "/nowhere")
        send(sse_url)


def test_scratch_that_fills_up_ends_the_level_and_says_so(sse_url, capfd):
    """The limit on a file's size fails the workers' writes, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit_workers(progress):
        for child in psutil.Process().children():
            child.rlimit(resource.RLIMIT_FSIZE, (1, before[1]))

    began = time.monotonic()
    sent = send(sse_url, due=np.linspace(0, 60, 20), workers=1, on_progress=limit_workers)
    assert time.monotonic() - began < 20 and "Traceback" not in capfd.readouterr().err
    lost = r"load worker 0 could not write to .*spool \(File too large\); make room"
    assert re.match(lost, sent.client.lost_workers[0]) and len(sent.outcomes) == 20
    assert all(re.match(f"lost: {lost}", outcome.error) for outcome in sent.outcomes if outcome.error)
    assert sent.outcomes[-1].error


def test_an_interrupt_ends_the_workers(sse_url):
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        send(sse_url, fixed_length(100, output_tokens=10), due=np.linspace(0, 60, 100))
    left = subprocess.run(
        ["pgrep", "-P", str(os.getpid()), "-f", "fp8lab.load.worker"], capture_output=True, check=False
    )
    assert left.returncode == 1


def test_a_stopped_level_is_told_in_one_line(sse_url, capsys):
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(Stopped, match="bf16-50rps-r1 ended early and is not kept") as stopped:
        measure_level(Endpoint(sse_url, "m"), fixed_length(100), np.linspace(0, 60, 100), name="bf16-50rps-r1")
    assert stopped.value._render_traceback_() == [f"Stopped: {stopped.value}"]
    assert capsys.readouterr().err.endswith("bf16-50rps-r1: stopped\n")


def test_a_client_pinned_to_a_busy_core_is_caught():
    """The scheduler gives the client what is left of one core; the lag shows it."""
    hogs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(6)]
    core = {min(os.sched_getaffinity(0))}
    before = os.sched_getaffinity(0)
    try:
        for hog in hogs:
            os.sched_setaffinity(hog.pid, core)
        with streaming_server("--itl-ms", "1") as url:
            os.sched_setaffinity(0, core)
            trace = sharegpt_like(600)
            sent = send(url, trace, due=arrival_times(600, 200), workers=1)
    finally:
        os.sched_setaffinity(0, before)
        for hog in hogs:
            hog.kill()
            hog.wait()
    each = latencies(to_tables(sent, trace)[0])
    problems = self_check(each["lag_ms"].to_numpy(), each["ttft_ms"].to_numpy(), sent.client)
    assert problems and "--workers 2" in problems[-1]


def report(**changes) -> ClientReport:
    healthy = {
        "workers": 1,
        "closed_loop": False,
        "cpu_s": 1,
        "client_busiest_core": 0.2,
        "client_stall_max_ms": 0,
        "seconds_to_first_request": 0.3,
    }
    return ClientReport(**healthy | changes)


def test_self_check_limits():
    on_time, slow = np.zeros(100), np.full(100, 100.0)
    assert self_check(on_time, slow, report()) == []
    assert self_check(np.full(100, 4.9), slow, report()) == []
    assert "5.1 ms late" in self_check(np.full(100, 5.1), slow, report())[0]
    assert self_check(np.full(100, 5.1), np.full(100, 1000.0), report()) == []
    assert "91% of its core" in self_check(on_time, slow, report(client_busiest_core=0.91))[0]


def test_busiest_second_finds_a_burst():
    marks = [(t / 4, min(t / 4, 2) if t < 8 else 2.0) for t in range(41)]
    assert busiest_second(marks) == pytest.approx(1.0)
    assert busiest_second([(0.0, 0.0), (0.5, 0.5)]) is None


def test_default_workers_follow_rate_and_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(16)))
    assert [default_workers(rate) for rate in (10, 9_000, 25_000, 1e6)] == [1, 1, 3, 8]


@pytest.mark.parametrize(
    "bad",
    [{"workers": 0}, {"max_concurrency": 0}, {"due": [0.0]}, {"idle_timeout_s": np.nan}, {"drain_timeout_s": 0.0}],
)
def test_bad_arguments(sse_url, bad):
    with pytest.raises(BadInput):
        send(sse_url, **bad)


def test_the_key_is_sent_and_not_shown():
    endpoint = Endpoint("http://h:1/v1", "m", "sk-secret")
    assert b"Authorization: Bearer sk-secret\r\n" in endpoint.head
    assert endpoint.path == "/v1/completions" and "sk-secret" not in repr(endpoint)
