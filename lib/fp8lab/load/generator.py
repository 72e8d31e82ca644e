"""The open-loop load of one level: a schedule drawn beforehand, sent by worker processes, and its self-check.

A slow server never slows the offered load: every request goes out at its scheduled instant, whatever is
still in flight. The generator watches itself, and a level that it could not send as planned is invalid.
"""

import contextlib
import json
import math
import os
import pickle
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..config.trace import Trace
from ..errors import BadInput, LevelFailed
from ..system.locks import Scratch
from ..ui import shown
from .connection import find_address, opened_ahead
from .endpoint import BALANCES, Endpoint, check_fleet
from .events import Outcome
from .worker import Job, read_spool

# A worker parses about 40,000 chunks/s on a server core; a quarter of that leaves its timestamps undisturbed.
_CHUNKS_PER_S_PER_WORKER = 10_000
_BURST_CHUNKS_PER_S = 25_000
# One stream gives no more, whatever the server: it caps what a closed loop can bring.
_CHUNKS_PER_S_PER_STREAM = 500
_BUSY_CORE = 0.90
_STALL_MS = 1000.0
_LAG_FLOOR_MS = 5.0
_LAG_SHARE_OF_TTFT = 0.05
# A worker that was asked to end does so in a moment.
_END_S = 30.0


@dataclass(frozen=True)
class ClientReport:
    """How the client itself fared: `cpu_s` of all workers, why some were lost, and fields of `metrics.summary.Summary`."""

    cpu_s: float
    workers: int
    closed_loop: bool
    client_busiest_core: float | None
    client_stall_max_ms: float
    seconds_to_first_request: float
    address: str | None = None
    lost_workers: tuple[str, ...] = ()

    def fields(self, chunks: int) -> dict:
        """Those of the summary of a level of so many chunks."""
        fields = {name: held for name, held in vars(self).items() if name not in ("cpu_s", "lost_workers")}
        return fields | {"client_cpu_us_per_chunk": 1e6 * self.cpu_s / chunks if chunks else None}


@dataclass(frozen=True)
class Sent:
    """A level's outcomes in order of `index`, its start (CLOCK_MONOTONIC), and how many endpoints were asked."""

    start: float
    due_s: np.ndarray
    outcomes: list[Outcome]
    client: ClientReport
    endpoints: int = 1


@dataclass(frozen=True)
class Progress:
    """A level while it runs; times in model seconds. `ttft_ms` is the mean so far, nan before the first token; `waiting`
    are the requests of a closed loop that are due and wait for a slot."""

    elapsed_s: float
    planned_s: float
    requests: int
    sent: int
    in_flight: int
    done: int
    failed: int
    tokens_per_s: float
    ttft_ms: float
    waiting: int = 0

    def __str__(self) -> str:
        left = f", {self.waiting:,} wait for a slot" if self.waiting else ""
        if self.sent < self.requests and (seconds := self.planned_s - self.elapsed_s) > 0:
            left += f", {seconds:.0f} s of arrivals left"
        failed = f", {self.failed} FAILED" if self.failed else ""
        return (
            f"{self.sent}/{self.requests} sent, {self.in_flight} in flight, {self.done} done{failed}, "
            f"{self.tokens_per_s:,.0f} tok/s, TTFT {shown(self.ttft_ms)} ms{left}"
        )


def default_workers(expected_chunks_per_s: float) -> int:
    """Worker processes for an expected stream of chunks, at most half of this machine's cores."""
    cores = len(os.sched_getaffinity(0))
    return max(1, min(cores // 2, math.ceil(expected_chunks_per_s / _CHUNKS_PER_S_PER_WORKER)))


def send_load(
    endpoint: Endpoint,
    trace: Trace,
    due_s: Sequence[float],
    *,
    others: Sequence[Endpoint] = (),
    balance: str = BALANCES[0],
    workers: int | None = None,
    max_concurrency: int | None = None,
    connections_ahead: int | None = None,
    time_dilation: float = 1.0,
    exact_tokens: bool = True,
    idle_timeout_s: float = 60.0,
    drain_timeout_s: float = 600.0,
    on_progress: Callable[[Progress], None] | None = None,
    problem: Callable[[], str | None] = lambda: None,
) -> Sent:
    """Sends `trace` to `endpoint` at the model seconds `due_s`, shape (requests,); returns when all have ended.

    With `others` the load is shared out among a fleet, all of which are asked the same: by `balance` each in its turn,
    or the one of which a worker has the fewest requests in flight. `max_concurrency` caps what is in flight, which
    makes the level closed-loop: what is due then waits for a slot. `connections_ahead` are opened before the start
    (None: as many as may be needed in the first second); what is needed beyond them is opened then, and the wait for it
    counts. A request fails after `idle_timeout_s` without a connection or a byte, and all that still run do
    `drain_timeout_s` after the last one was sent; while some wait for a slot, after as long without anything coming
    back. Once `problem()`, which must not wait, says why, the level ends early. A failed request is an outcome with its
    reason, never an exception. Raises BadInput for arguments that cannot work or an unknown host, LevelFailed when a
    worker could not start, NotWritten without a temporary folder, KeyboardInterrupt after ending the workers.
    """
    began = time.monotonic()
    endpoints = (endpoint, *others)
    check_fleet(endpoints, balance)
    due = np.asarray(due_s, dtype=float)
    if due.shape != (len(trace),):
        raise BadInput(f"{due.size} arrival times for {len(trace)} requests")
    least = (
        ("workers", workers, 1),
        ("max_concurrency", max_concurrency, 1),
        ("connections_ahead", connections_ahead, 0),
    )
    for name, value, lowest in least:
        if value is not None and value < lowest:
            raise BadInput(f"{name} {value} is below {lowest}")
    for name, seconds in (("idle_timeout_s", idle_timeout_s), ("drain_timeout_s", drain_timeout_s)):
        if not seconds > 0:
            raise BadInput(f"{name} {seconds} is not above 0 (seconds)")
    if workers is None:
        expected = sum(trace.output_tokens) / due[-1] if due[-1] else _BURST_CHUNKS_PER_S
        if max_concurrency:
            expected = min(expected, max_concurrency * _CHUNKS_PER_S_PER_STREAM)
        workers = default_workers(expected / time_dilation)
    workers = min(workers, len(trace), max_concurrency or len(trace))

    def on_tick(now: float, rows: list[dict]) -> None:
        if on_progress:
            on_progress(_progress(now, rows, team, due, time_dilation))

    with Scratch() as scratch:
        team = Team(endpoints, balance, trace, due * time_dilation, workers, max_concurrency, scratch, exact_tokens,
                     idle_timeout_s * time_dilation, drain_timeout_s * time_dilation, connections_ahead)  # fmt: skip
        with team:
            team.wait_until_ready()
            start = team.start()
            team.follow(start, on_tick, problem)
        outcomes = team.outcomes()
    client = team.report(start - began)
    return Sent(start, due, outcomes, client, len(endpoints))


def self_check(lag_ms: np.ndarray, ttft_ms: np.ndarray, client: ClientReport) -> list[str]:
    """Why a level's client cannot be trusted, each with a remedy; empty when it can."""
    problems = list(client.lost_workers)
    more = f"add --workers {client.workers * 2}"
    if (client.client_busiest_core or 0) > _BUSY_CORE:
        problems.append(
            f"a load worker used {client.client_busiest_core:.0%} of its core, above {_BUSY_CORE:.0%}; {more}"
        )
    if client.client_stall_max_ms > _STALL_MS:
        problems.append(
            f"a load worker stood still for {client.client_stall_max_ms / 1e3:.1f} s: was this machine suspended or overloaded?"
        )
    if lag_ms.size:
        lag = float(np.percentile(lag_ms, 99))
        ttft = float(np.median(ttft_ms)) if ttft_ms.size else 0.0
        limit = max(_LAG_FLOOR_MS, _LAG_SHARE_OF_TTFT * ttft)
        if lag > limit:
            problems.append(
                f"requests left {lag:.1f} ms late (p99), above {limit:.1f} ms: the client fell behind its schedule; "
                f"{more}, or give the client a core of its own"
            )
    return problems


class Team:
    """The worker processes of one level."""

    def __init__(
        self, endpoints, balance, trace, due_wall, workers, max_concurrency, scratch, exact, idle_timeout, drain_timeout,
        ahead,
    ):  # fmt: skip
        self.requests = len(trace)
        self.max_concurrency = max_concurrency
        self.processes: list[subprocess.Popen] = []
        self.spools = [Path(scratch) / f"worker-{worker}.spool" for worker in range(workers)]
        self.last: list[dict] = [{} for _ in range(workers)]
        self.ends: list[dict | None] = [None] * workers
        self.cpu_marks: list[list[tuple[float, float]]] = [[] for _ in range(workers)]
        self.troubles: dict[int, str] = {}
        self.drain = _Drain(len(trace), float(due_wall[-1]), drain_timeout)
        self.addresses = tuple(map(find_address, endpoints))
        where = [(one.host, one.port, endpoint.path) for one, endpoint in zip(self.addresses, endpoints, strict=True)]
        if twice := next((i for i, one in enumerate(where) if where.index(one) < i), 0):
            one, other = endpoints[where.index(where[twice])], endpoints[twice]
            raise BadInput(f"{one.url} and {other.url} are one server ({where[twice][0]}); name each of a fleet once")
        # In a closed loop each slot gets as many requests as any other: a worker with two gets twice as many.
        slots = max_concurrency or workers
        self.indices = [[i for i in range(len(trace)) if i % slots % workers == worker] for worker in range(workers)]
        due = [due_wall[mine].tolist() for mine in self.indices]
        shares = [_share(max_concurrency, worker, workers) for worker in range(workers)]
        opened = [opened_ahead(due[w], due_wall[0], shares[w], _share(ahead, w, workers)) for w in range(workers)]
        # All start before a job is written: it is larger than a pipe holds, and writing it waits for its reader.
        for _ in range(workers):
            command = [sys.executable, "-c", "from fp8lab.load.worker import main; main()"]
            self.processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        for worker, process in enumerate(self.processes):
            mine = self.indices[worker]
            job = Job(
                endpoints=endpoints,
                addresses=self.addresses,
                balance=balance,
                indices=mine,
                bodies=[endpoints[0].body(trace.prompts[i], trace.output_tokens[i]) for i in mine],
                asked_tokens=[trace.output_tokens[i] for i in mine],
                due_s=due[worker],
                max_concurrency=shares[worker],
                connections_ahead=opened[worker],
                exact_tokens=exact,
                idle_timeout_s=idle_timeout,
                spool=str(self.spools[worker]),
            )
            with contextlib.suppress(BrokenPipeError):
                pickle.dump(job, process.stdin, protocol=5)
                process.stdin.flush()

    def __enter__(self):
        return self

    def __exit__(self, *_exc):
        self.end_early()
        for process in self.processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()

    def wait_until_ready(self):
        for number, process in enumerate(self.processes):
            # What else a host lets every Python process say (a sitecustomize) comes before.
            line = next((line for line in process.stdout if line.startswith(b"{")), b"")
            if not line:
                raise LevelFailed(f"load worker {number} ended with exit code {process.wait()} before it was ready")
            if trouble := json.loads(line).get("trouble"):
                raise LevelFailed(f"load worker {number} {trouble}")

    def start(self) -> float:
        start = time.monotonic() + 0.02
        for process in self.processes:
            with contextlib.suppress(OSError):
                process.stdin.write(f"{start!r}\n".encode())
                process.stdin.flush()
        return start

    def follow(self, start: float, on_tick, problem) -> None:
        """Reads the workers' lines until each has ended; asks them to once there is a `problem()` or no time left."""
        asked = math.inf
        with selectors.DefaultSelector() as selector:
            for number, process in enumerate(self.processes):
                os.set_blocking(process.stdout.fileno(), False)
                selector.register(process.stdout, selectors.EVENT_READ, number)
            pending = [b""] * len(self.processes)
            while selector.get_map():
                for key, _ in selector.select(timeout=1.0):
                    number = key.data
                    data = key.fileobj.read()
                    if data is None:
                        continue
                    *lines, pending[number] = (pending[number] + data).split(b"\n")
                    for line in lines:
                        self._line(number, json.loads(line))
                    if not data:
                        selector.unregister(key.fileobj)
                        if self.ends[number] is None:
                            self.troubles[number] = f"died (exit code {self.processes[number].wait()})"
                now = time.monotonic() - start
                on_tick(now, self.last)
                why = self.drain.out_of_time(now, self.last)
                if problem() or why:
                    self.end_early(why)
                    asked = min(asked, now)
                if now > asked + _END_S:
                    raise LevelFailed(f"the load workers did not end within {_END_S:.0f} s when they were asked to")

    def end_early(self, why: str = "") -> None:
        """The workers send no more and fail what is still in flight, `why` added to each reason. May be called twice."""
        for process in self.processes:
            with contextlib.suppress(OSError, ValueError):  # it has ended, or was asked before
                process.stdin.write(why.encode())
                process.stdin.close()

    def _line(self, number: int, message: dict) -> None:
        if message["kind"] == "end":
            self.ends[number] = message
            if message["trouble"]:
                self.troubles[number] = message["trouble"]
            message = message | {"in_flight": 0, "streaming": 0, "ttft_sum": self.last[number].get("ttft_sum", 0.0)}
        elif "cpu_s" in message:
            self.cpu_marks[number].append((message["at"], message["cpu_s"]))
        self.last[number] = message

    def outcomes(self) -> list[Outcome]:
        """One outcome for every request, also for those whose worker died or could not keep them."""
        found = {o.index: o for spool in self.spools if spool.exists() for o in read_spool(str(spool))}
        for number, indices in enumerate(self.indices):
            lost = f"lost: load worker {number} {self.troubles.get(number, 'left no record of it')}"
            for index in indices:
                found.setdefault(index, Outcome(index, 0, endpoint=-1, error=lost))
        return [found[index] for index in sorted(found)]

    def report(self, start_delay_s: float) -> ClientReport:
        ends = [end for end in self.ends if end]
        busiest = [share for share in map(busiest_second, self.cpu_marks) if share is not None]
        return ClientReport(
            workers=len(self.processes),
            closed_loop=self.max_concurrency is not None,
            cpu_s=sum(end["cpu_s"] for end in ends),
            client_busiest_core=max(busiest, default=None),
            client_stall_max_ms=1e3 * max((end["stall_s"] for end in ends), default=0.0),
            seconds_to_first_request=start_delay_s,
            lost_workers=tuple(f"load worker {number} {trouble}" for number, trouble in self.troubles.items()),
            address=", ".join(one.host for one in self.addresses if one.of > 1) or None,
        )


def _share(whole: int | None, worker: int, workers: int) -> int | None:
    return None if whole is None else len(range(worker, whole, workers))


class _Drain:
    """When a level has taken too long; times in wall seconds from its start. What is in flight may take `timeout` from
    when the last request was sent; while some wait for a slot, that begins anew with whatever comes back."""

    def __init__(self, requests: int, last_due: float, timeout: float):
        self._requests, self._timeout = requests, timeout
        self._since, self._sent, self._seen = last_due, 0, None

    def out_of_time(self, now: float, rows: list[dict]) -> str:
        """Why the level should end, as the end of a sentence; empty while it should not."""
        keys = ("sent", "done", "failed", "tokens", "streaming")
        sent, *others = (sum(row.get(key, 0) for row in rows) for key in keys)
        if self._sent < self._requests and (sent, others) != self._seen:
            self._since, self._sent, self._seen = max(self._since, now), sent, (sent, others)
        if now - self._since <= self._timeout:
            return ""
        what = "the last request was sent" if self._sent == self._requests else "anything came back"
        return f", {self._timeout:g} s after {what}; to wait longer: load-test --drain-timeout"


def busiest_second(marks: list[tuple[float, float]]) -> float | None:
    """The largest share of a core over a window of at least a second, from (time, CPU seconds) marks; None without one."""
    shares, begin = [], 0
    for at, cpu in marks:
        while begin + 1 < len(marks) and at - marks[begin + 1][0] >= 1.0:
            begin += 1
        if at - marks[begin][0] >= 1.0:
            shares.append((cpu - marks[begin][1]) / (at - marks[begin][0]))
    return max(shares, default=None)


def _progress(now: float, rows: list[dict], team: Team, due: np.ndarray, dilation: float) -> Progress:
    def total(key):
        return sum(row.get(key, 0) for row in rows)

    tokens, elapsed = total("tokens") + total("streaming"), now / dilation
    ttft = total("ttft_sum") / dilation / total("first_tokens") if total("first_tokens") else math.nan
    return Progress(
        elapsed_s=elapsed,
        planned_s=float(due[-1]),
        requests=team.requests,
        **{name: total(name) for name in ("sent", "in_flight", "done", "failed")},
        tokens_per_s=tokens / elapsed if elapsed > 0 else 0.0,
        ttft_ms=ttft * 1e3,
        waiting=max(0, int((due <= elapsed).sum()) - total("sent")) if team.max_concurrency else 0,
    )
