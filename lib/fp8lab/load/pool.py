"""The worker processes of one level: started together, started at one instant, followed to their ends."""

import contextlib
import json
import math
import os
import pickle
import selectors
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from ..errors import BadInput, LevelFailed
from .connection import find_address, opened_ahead
from .stream import Outcome
from .worker import Job, read_spool

# A worker that was asked to end does so in a moment.
_END_S = 30.0


@dataclass(frozen=True)
class ClientReport:
    """How the client itself fared: `cpu_s` of all workers, `busiest_core` the share of a core in the busiest second of the
    busiest one (None when the load took less than a second). `address` is where the load went, of a host with several."""

    workers: int
    closed_loop: bool
    cpu_s: float
    busiest_core: float | None
    stall_max_ms: float
    start_delay_s: float
    lost_workers: tuple[str, ...] = ()
    address: str | None = None


class Team:
    """The worker processes of one level."""

    def __init__(
        self, endpoints, balance, trace, due_wall, workers, max_concurrency, scratch, exact, idle_timeout, drain_timeout,
        ahead,
    ):  # fmt: skip
        self.requests = len(trace)
        self.max_concurrency = max_concurrency
        self.processes: list[subprocess.Popen] = []
        self.spools: list[Path] = []
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
        # All processes start before the first job is written: a job is larger than a pipe holds, and
        # writing it waits for its reader.
        for _ in range(workers):
            command = [sys.executable, "-c", "from fp8lab.load.worker import main; main()"]
            self.processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        for worker, process in enumerate(self.processes):
            mine = self.indices[worker]
            spool = Path(scratch) / f"worker-{worker}.spool"
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
                spool=str(spool),
            )
            self.spools.append(spool)
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
        """Reads the workers' lines until each has ended or died; asks them to end once `problem()` is not None or the
        level's time is over."""
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
                            code = self.processes[number].wait()
                            self.troubles[number] = f"died (exit code {code})"
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
        return ClientReport(
            workers=len(self.processes),
            closed_loop=self.max_concurrency is not None,
            cpu_s=sum(end["cpu_s"] for end in ends),
            busiest_core=max(
                (share for share in map(busiest_second, self.cpu_marks) if share is not None), default=None
            ),
            stall_max_ms=1e3 * max((end["stall_s"] for end in ends), default=0.0),
            start_delay_s=start_delay_s,
            lost_workers=tuple(f"load worker {number} {trouble}" for number, trouble in self.troubles.items()),
            address=", ".join(one.host for one in self.addresses if one.of > 1) or None,
        )


def _share(whole: int | None, worker: int, workers: int) -> int | None:
    return None if whole is None else len(range(worker, whole, workers))


class _Drain:
    """When a level has taken too long; all times in wall seconds from its start.

    What is in flight may take `timeout` from the moment when the last request was sent. While some still wait for a
    slot of a closed loop, that time begins anew with whatever comes back.
    """

    def __init__(self, requests: int, last_due: float, timeout: float):
        self._requests, self._timeout = requests, timeout
        self._since, self._sent, self._seen = last_due, 0, None

    def out_of_time(self, now: float, rows: list[dict]) -> str:
        """Why the level should end, as the end of a sentence; empty while it should not."""
        sent, *others = (
            sum(row.get(key, 0) for row in rows) for key in ("sent", "done", "failed", "tokens", "streaming")
        )
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
