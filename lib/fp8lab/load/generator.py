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
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import BadInput, LevelFailed
from ..traces import Trace
from .stream import Endpoint, Outcome
from .worker import Job, read_spool

# A worker parses about 40,000 chunks/s on a server core; a quarter of that leaves its timestamps undisturbed.
_CHUNKS_PER_S_PER_WORKER = 10_000
_BURST_CHUNKS_PER_S = 25_000
_BUSY_CORE = 0.90
_LAG_FLOOR_MS = 5.0
_LAG_SHARE_OF_TTFT = 0.05
_SPARE_CONNECTIONS = 64


@dataclass(frozen=True)
class Progress:
    """A level while it runs; times in model seconds. `ttft_ms` is the mean so far, nan before the first token."""

    elapsed_s: float
    planned_s: float
    requests: int
    sent: int
    in_flight: int
    done: int
    failed: int
    tokens: int
    tokens_per_s: float
    ttft_ms: float

    def __str__(self) -> str:
        left = (
            f", {max(0.0, self.planned_s - self.elapsed_s):.0f} s of arrivals left" if self.sent < self.requests else ""
        )
        failed = f", {self.failed} FAILED" if self.failed else ""
        return (
            f"{self.sent}/{self.requests} sent, {self.in_flight} in flight, {self.done} done{failed}, "
            f"{self.tokens_per_s:,.0f} tok/s, TTFT {self.ttft_ms:.0f} ms{left}"
        )


@dataclass(frozen=True)
class ClientReport:
    """How the client itself fared. CPU is the share of one core in the busiest second of the busiest worker."""

    workers: int
    closed_loop: bool
    cpu_s: float
    busiest_core: float
    stall_max_ms: float
    start_delay_s: float
    lost_workers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sent:
    """All outcomes of a level, in order of `index`, with the shared start instant (CLOCK_MONOTONIC)."""

    start: float
    due_s: np.ndarray
    outcomes: list[Outcome]
    client: ClientReport


def default_workers(expected_chunks_per_s: float) -> int:
    """Worker processes for an expected stream of chunks, at most half of this machine's cores."""
    cores = len(os.sched_getaffinity(0))
    return max(1, min(cores // 2, math.ceil(expected_chunks_per_s / _CHUNKS_PER_S_PER_WORKER)))


def send_load(
    endpoint: Endpoint,
    trace: Trace,
    due_s: Sequence[float],
    *,
    workers: int | None = None,
    max_concurrency: int | None = None,
    time_dilation: float = 1.0,
    exact_tokens: bool = True,
    idle_timeout_s: float = 60.0,
    drain_timeout_s: float = 600.0,
    on_progress: Callable[[Progress], None] | None = None,
) -> Sent:
    """Sends `trace` to `endpoint` at the model seconds `due_s`, shape (requests,); returns when all have ended.

    `max_concurrency` caps what is in flight, which makes the level closed-loop. A stream fails after
    `idle_timeout_s` without a byte, and `drain_timeout_s` after the last arrival all that still run do.
    A failed request is an outcome with its reason, never an exception. Raises BadInput for arguments that
    cannot work, LevelFailed when no worker could start, KeyboardInterrupt after ending the workers.
    """
    began = time.monotonic()
    due = np.asarray(due_s, dtype=float)
    if due.shape != (len(trace),):
        raise BadInput(f"{due.size} arrival times for {len(trace)} requests")
    for name, value in (("workers", workers), ("max_concurrency", max_concurrency)):
        if value is not None and value < 1:
            raise BadInput(f"{name} {value} is below 1")
    span = float(due[-1])
    if workers is None:
        tokens = sum(trace.output_tokens)
        expected = tokens / span / time_dilation if span else _BURST_CHUNKS_PER_S / time_dilation
        workers = default_workers(expected)
    workers = min(workers, len(trace), max_concurrency or len(trace))
    with tempfile.TemporaryDirectory(prefix="fp8lab-load-") as scratch:
        team = _Team(endpoint, trace, due * time_dilation, workers, max_concurrency, scratch, exact_tokens,
                     idle_timeout_s * time_dilation, (span + drain_timeout_s) * time_dilation)  # fmt: skip
        with team:
            team.wait_until_ready()
            start = team.start()
            team.follow(
                start, lambda now, rows: on_progress and on_progress(_progress(now, rows, team, span, time_dilation))
            )
        outcomes = team.outcomes()
    client = team.report(start - began)
    return Sent(start, due, outcomes, client)


def self_check(lag_ms: np.ndarray, ttft_ms: np.ndarray, client: ClientReport) -> list[str]:
    """Why a level's client cannot be trusted, each with a remedy; empty when it can."""
    problems = list(client.lost_workers)
    more = f"add --workers {client.workers * 2}"
    if client.busiest_core > _BUSY_CORE:
        problems.append(f"a load worker used {client.busiest_core:.0%} of its core, above {_BUSY_CORE:.0%}; {more}")
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


class _Team:
    """The worker processes of one level."""

    def __init__(self, endpoint, trace, due_wall, workers, max_concurrency, scratch, exact, idle_timeout, deadline):
        self.requests = len(trace)
        self.max_concurrency = max_concurrency
        self.processes: list[subprocess.Popen] = []
        self.spools: list[Path] = []
        self.last: list[dict] = [{} for _ in range(workers)]
        self.ends: list[dict | None] = [None] * workers
        self.cpu_marks: list[list[tuple[float, float]]] = [[] for _ in range(workers)]
        self.indices: list[list[int]] = []
        self.lost: list[str] = []
        self.deadline = deadline
        address = endpoint.resolve()
        burst = int((due_wall < due_wall[0] + 0.5).sum())
        # All processes start before the first job is written: a job is larger than a pipe holds, and
        # writing it waits for its reader.
        for _ in range(workers):
            command = [sys.executable, "-c", "from fp8lab.load.worker import main; main()"]
            self.processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        for worker, process in enumerate(self.processes):
            mine = range(worker, len(trace), workers)
            spool = Path(scratch) / f"worker-{worker}.spool"
            share = None if max_concurrency is None else len(range(worker, max_concurrency, workers))
            job = Job(
                endpoint=endpoint,
                address=address,
                indices=list(mine),
                requests=[endpoint.request_bytes(trace.prompts[i], trace.output_tokens[i]) for i in mine],
                asked_tokens=[trace.output_tokens[i] for i in mine],
                due_s=[float(due_wall[i]) for i in mine],
                max_concurrency=share,
                connections=min(len(mine), share or len(mine), burst // workers + _SPARE_CONNECTIONS),
                exact_tokens=exact,
                idle_timeout_s=idle_timeout,
                deadline_s=deadline,
                spool=str(spool),
            )
            self.spools.append(spool)
            self.indices.append(job.indices)
            with contextlib.suppress(BrokenPipeError):
                pickle.dump(job, process.stdin, protocol=5)
                process.stdin.flush()

    def __enter__(self):
        return self

    def __exit__(self, *_exc):
        for process in self.processes:
            with contextlib.suppress(OSError):
                process.stdin.close()
        for process in self.processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()

    def wait_until_ready(self):
        for number, process in enumerate(self.processes):
            if not process.stdout.readline():
                raise LevelFailed(f"load worker {number} ended with exit code {process.wait()} before it was ready")

    def start(self) -> float:
        start = time.monotonic() + 0.02
        for process in self.processes:
            with contextlib.suppress(OSError):
                process.stdin.write(f"{start!r}\n".encode())
                process.stdin.flush()
        return start

    def follow(self, start: float, on_tick) -> None:
        """Reads the workers' lines until each has ended or died."""
        selector = selectors.DefaultSelector()
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
                        code = self.processes[number].wait()
                        self.lost.append(f"load worker {number} died (exit code {code})")
            now = time.monotonic() - start
            on_tick(now, self.last)
            if now > self.deadline + 30:
                raise LevelFailed("the load workers did not end after the level's deadline")

    def _line(self, number: int, message: dict) -> None:
        if message["kind"] == "end":
            self.ends[number] = message
            message = message | {"in_flight": 0, "streaming": 0, "ttft_sum": self.last[number].get("ttft_sum", 0.0)}
        elif "cpu_s" in message:
            self.cpu_marks[number].append((message["at"], message["cpu_s"]))
        self.last[number] = message

    def outcomes(self) -> list[Outcome]:
        """One outcome for every request, also for those whose worker died."""
        found = {o.index: o for spool in self.spools if spool.exists() for o in read_spool(str(spool))}
        for number, indices in enumerate(self.indices):
            for index in indices:
                found.setdefault(index, Outcome(index, 0, error=f"load worker {number} died before it ended"))
        return [found[index] for index in sorted(found)]

    def report(self, start_delay_s: float) -> ClientReport:
        ends = [end for end in self.ends if end]
        return ClientReport(
            workers=len(self.processes),
            closed_loop=self.max_concurrency is not None,
            cpu_s=sum(end["cpu_s"] for end in ends),
            busiest_core=max((busiest_second(marks) for marks in self.cpu_marks), default=0.0),
            stall_max_ms=1e3 * max((s for end in ends for s in end["stalls_s"]), default=0.0),
            start_delay_s=start_delay_s,
            lost_workers=tuple(self.lost),
        )


def busiest_second(marks: list[tuple[float, float]]) -> float:
    """The largest share of a core over a window of at least a second, from (time, CPU seconds) marks."""
    best, begin = 0.0, 0
    for at, cpu in marks:
        while begin + 1 < len(marks) and at - marks[begin + 1][0] >= 1.0:
            begin += 1
        if at - marks[begin][0] >= 1.0:
            best = max(best, (cpu - marks[begin][1]) / (at - marks[begin][0]))
    return best


def _progress(now: float, rows: list[dict], team: _Team, span: float, dilation: float) -> Progress:
    def total(key):
        return sum(row.get(key, 0) for row in rows)

    tokens, elapsed = total("tokens") + total("streaming"), now / dilation
    ttft = total("ttft_sum") / dilation / total("first_tokens") if total("first_tokens") else math.nan
    return Progress(
        elapsed_s=elapsed,
        planned_s=span,
        requests=team.requests,
        sent=total("sent"),
        in_flight=total("in_flight"),
        done=total("done"),
        failed=total("failed"),
        tokens=tokens,
        tokens_per_s=tokens / elapsed if elapsed > 0 else 0.0,
        ttft_ms=ttft * 1e3,
    )
