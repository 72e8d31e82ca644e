"""The open-loop load of one level: a schedule drawn beforehand, sent by worker processes, and its self-check.

A slow server never slows the offered load: every request goes out at its scheduled instant, whatever is
still in flight. The generator watches itself, and a level that it could not send as planned is invalid.
"""

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..config.trace import Trace
from ..errors import BadInput
from ..system.locks import Scratch
from ..ui.text import shown
from .endpoint import BALANCES, Endpoint, check_fleet
from .pool import ClientReport, Team
from .stream import Outcome

# A worker parses about 40,000 chunks/s on a server core; a quarter of that leaves its timestamps undisturbed.
_CHUNKS_PER_S_PER_WORKER = 10_000
_BURST_CHUNKS_PER_S = 25_000
# One stream gives no more, whatever the server: it caps what a closed loop can bring.
_CHUNKS_PER_S_PER_STREAM = 500
_BUSY_CORE = 0.90
_STALL_MS = 1000.0
_LAG_FLOOR_MS = 5.0
_LAG_SHARE_OF_TTFT = 0.05


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


@dataclass(frozen=True)
class Sent:
    """All outcomes of a level, in order of `index`, with the shared start instant (CLOCK_MONOTONIC), and how many endpoints
    were asked."""

    start: float
    due_s: np.ndarray
    outcomes: list[Outcome]
    client: ClientReport
    endpoints: int = 1


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

    With `others` the load is shared out among a fleet, all of which are asked the same: by `balance` each in its turn, or
    the one of which a worker has the fewest requests in flight. `max_concurrency` caps what is in flight, which makes the level
    closed-loop: what is due then waits for a slot.
    `connections_ahead` are opened before the start (None: as many as may be needed in the first second); what is needed
    beyond them is opened then, and the wait for it counts. A request fails after `idle_timeout_s` without a connection or
    a byte, and all that still run do `drain_timeout_s` after the last one was sent; while some wait for a slot, after as
    long without anything coming back. Once `problem()`, which must not wait, says why it should, the level ends early. A
    failed request is an outcome with its reason, never an exception. Raises BadInput for arguments that cannot work or an
    unknown host, LevelFailed when a worker could not start, NotWritten without a temporary folder, KeyboardInterrupt
    after ending the workers.
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
    span = float(due[-1])
    if workers is None:
        tokens = sum(trace.output_tokens)
        expected = tokens / span if span else _BURST_CHUNKS_PER_S
        if max_concurrency:
            expected = min(expected, max_concurrency * _CHUNKS_PER_S_PER_STREAM)
        workers = default_workers(expected / time_dilation)
    workers = min(workers, len(trace), max_concurrency or len(trace))
    with Scratch() as scratch:
        team = Team(endpoints, balance, trace, due * time_dilation, workers, max_concurrency, scratch, exact_tokens,
                     idle_timeout_s * time_dilation, drain_timeout_s * time_dilation, connections_ahead)  # fmt: skip
        with team:
            team.wait_until_ready()
            start = team.start()
            team.follow(
                start,
                lambda now, rows: on_progress and on_progress(_progress(now, rows, team, due, time_dilation)),
                problem,
            )
        outcomes = team.outcomes()
    client = team.report(start - began)
    return Sent(start, due, outcomes, client, len(endpoints))


def self_check(lag_ms: np.ndarray, ttft_ms: np.ndarray, client: ClientReport) -> list[str]:
    """Why a level's client cannot be trusted, each with a remedy; empty when it can."""
    problems = list(client.lost_workers)
    more = f"add --workers {client.workers * 2}"
    if (client.busiest_core or 0) > _BUSY_CORE:
        problems.append(f"a load worker used {client.busiest_core:.0%} of its core, above {_BUSY_CORE:.0%}; {more}")
    if client.stall_max_ms > _STALL_MS:
        problems.append(
            f"a load worker stood still for {client.stall_max_ms / 1e3:.1f} s: was this machine suspended or overloaded?"
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


def _progress(now: float, rows: list[dict], team: Team, due: np.ndarray, dilation: float) -> Progress:
    def total(key):
        return sum(row.get(key, 0) for row in rows)

    tokens, elapsed = total("tokens") + total("streaming"), now / dilation
    ttft = total("ttft_sum") / dilation / total("first_tokens") if total("first_tokens") else math.nan
    return Progress(
        elapsed_s=elapsed,
        planned_s=float(due[-1]),
        requests=team.requests,
        sent=total("sent"),
        in_flight=total("in_flight"),
        done=total("done"),
        failed=total("failed"),
        tokens_per_s=tokens / elapsed if elapsed > 0 else 0.0,
        ttft_ms=ttft * 1e3,
        waiting=max(0, int((due <= elapsed).sum()) - total("sent")) if team.max_concurrency else 0,
    )
