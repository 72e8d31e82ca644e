"""One load worker: a process that sends its share of a schedule and writes down what comes back.

It takes a pickled Job on standard input, answers with JSON lines (ready or unready, progress, end) on standard output,
and appends pickled batches of outcomes to a spool file, so that nothing is lost when it dies. Its input's end stops it.
"""

import asyncio
import contextlib
import gc
import json
import os
import pickle
import signal
import struct
import sys
import time
from collections import deque
from dataclasses import dataclass
from time import monotonic

import uvloop

from ..ui import storable
from .connection import Address, Connection, Connector, raise_open_files, said
from .endpoint import Endpoint
from .events import Outcome

TICK_S = 0.25
# libuv's timers count milliseconds: a request is sent when it is due within half of one.
_EARLY_S = 0.0005
_ENDLESS_CHUNKS = 10_000
# Opening ahead only spares the first requests a wait; what does not open soon is tried again when it is needed.
_OPEN_AHEAD_S = 5.0
RAISE_IDLE_TIMEOUT = "; to wait longer: load-test --idle-timeout"


@dataclass(frozen=True)
class Job:
    """A worker's share. `due_s` are wall seconds from the shared start; `addresses` are those of the `endpoints`."""

    endpoints: tuple[Endpoint, ...]
    addresses: tuple[Address, ...]
    balance: str
    indices: list[int]
    bodies: list[bytes]
    asked_tokens: list[int]
    due_s: list[float]
    max_concurrency: int | None
    connections_ahead: int
    exact_tokens: bool
    idle_timeout_s: float
    spool: str


class Worker:
    def __init__(self, job: Job):
        self.job = job
        self.connectors = [
            Connector(endpoint, address, self.on_end)
            for endpoint, address in zip(job.endpoints, job.addresses, strict=True)
        ]
        # By endpoint: what is sent before a body, idle connections, requests in flight.
        self.heads = [endpoint.head for endpoint in job.endpoints]
        self.idle: list[list[Connection]] = [[] for _ in self.connectors]
        self.flying = [0] * len(self.connectors)
        self.turn = 0
        self.busy: set[Connection] = set()
        self.opening: set[asyncio.Task] = set()
        self.ended: list[Outcome] = []
        self.counts = dict.fromkeys(("sent", "done", "failed", "tokens", "first_tokens"), 0)
        self.ttft_sum = 0.0
        self.stall_s = 0.0
        self.next_pulse: asyncio.TimerHandle | None = None
        # When each free slot of a closed loop became free.
        self.slots = deque([0.0] * (job.max_concurrency or 0))
        self.slot = asyncio.Event()
        self.all_done = asyncio.Event()
        self.stopping = asyncio.Event()
        self.out_of_time = ""
        self.trouble: str | None = None
        self.spool = open(job.spool, "ab", buffering=1 << 20)  # noqa: SIM115 - closed in run()

    async def run(self) -> None:
        await self.open_connections()
        tell("ready")
        start = await self.wait_for_start()
        if start is None:
            return
        cpu = time.process_time()
        # A collection in the middle of a level would stall every stream; the records have no cycles.
        gc.disable()
        ticker = asyncio.create_task(self.tick(start))
        self.pulse(asyncio.get_running_loop(), monotonic())
        try:
            await self.send_all(start)
            await self.first_of(self.all_done, self.stopping)
            await self.fail_unfinished()
        finally:
            ticker.cancel()
            self.next_pulse.cancel()
            self.flush()
            with contextlib.suppress(OSError):  # what it could not write is told already
                self.spool.close()
            end = {"trouble": self.trouble, "cpu_s": time.process_time() - cpu, "stall_s": self.stall_s}
            tell("end", **self.counts, **end)
            for connection in (connection for idle in self.idle for connection in idle):
                connection.close()

    async def fail_unfinished(self) -> None:
        for connection in list(self.busy):
            connection.fail(f"not finished when the level ended{self.out_of_time}")
        for task in self.opening:
            task.cancel()
        if self.opening:
            await asyncio.wait(self.opening)

    async def open_connections(self) -> None:
        """Opens what the level will need at once; a refusal here shows again at the first request."""
        ahead, within = self.job.connections_ahead, min(_OPEN_AHEAD_S, self.job.idle_timeout_s)
        for begin in range(0, ahead, 128):
            # To those that the first requests go to.
            numbers = [self.choose(index) for index in self.job.indices[begin : min(begin + 128, ahead)]]
            opened = await asyncio.gather(
                *(self.connectors[number].connect(within) for number in numbers), return_exceptions=True
            )
            for number, connection in zip(numbers, opened, strict=True):
                if isinstance(connection, Connection):
                    self.idle[number].append(connection)
            if not all(isinstance(connection, Connection) for connection in opened):
                return

    async def wait_for_start(self) -> float | None:
        """The shared start instant, or None when the generator went away."""
        loop = asyncio.get_running_loop()
        line = await loop.run_in_executor(None, sys.stdin.buffer.readline)
        if not line:
            return None
        os.set_blocking(0, False)
        loop.add_reader(0, self.on_stdin)
        return float(line)

    def on_stdin(self) -> None:
        """The generator says that the level's time is over, and what to do about it; or it closes, or is gone."""
        self.out_of_time = os.read(0, 4096).decode()
        asyncio.get_running_loop().remove_reader(0)
        self.stopping.set()

    async def send_all(self, start: float) -> None:
        job, limit = self.job, self.job.max_concurrency
        burst = 0
        for index, body, asked, due in zip(job.indices, job.bodies, job.asked_tokens, job.due_s, strict=True):
            while (wait := start + due - monotonic()) > _EARLY_S and not self.stopping.is_set():
                await self.first_of(self.stopping, timeout=wait) if wait > 1.0 else await asyncio.sleep(wait)
                burst = 0
            while limit and not self.slots and not self.stopping.is_set():
                self.slot.clear()
                await self.first_of(self.slot, self.stopping)
            if self.stopping.is_set():
                self.finish_unsent(index)
                return
            slot = self.slots.popleft() if limit else 0.0
            self.start_request(body, Outcome(index, asked, endpoint=self.choose(index), slot=slot))
            burst += 1
            if burst % 64 == 0:
                await asyncio.sleep(0)  # a burst must not keep the answers waiting

    def finish_unsent(self, index: int) -> None:
        why = f"ended before its turn{self.out_of_time}" if self.out_of_time else "was stopped"
        for unsent in self.job.indices[self.job.indices.index(index) :]:
            self.record(Outcome(unsent, 0, endpoint=-1, error=f"not sent: the level {why}"))

    def choose(self, index: int) -> int:
        """The endpoint of a request, by its number."""
        if self.job.balance == "round-robin":
            return index % len(self.flying)
        # Of equals the next one: all would go to the first else, where none is slow.
        self.turn += 1
        return min(range(len(self.flying)), key=lambda e: (self.flying[e], (e - self.turn) % len(self.flying)))

    def start_request(self, body: bytes, outcome: Outcome) -> None:
        self.counts["sent"] += 1
        self.flying[outcome.endpoint] += 1
        request = b"%b%d\r\n\r\n%b" % (self.heads[outcome.endpoint], len(body), body)
        idle = self.idle[outcome.endpoint]
        while idle:
            connection = idle.pop()
            if connection.usable:
                self.busy.add(connection)
                connection.send(request, outcome, stale=True)
                return
            connection.close()
        outcome.sent = monotonic()
        self.send_on_new(request, outcome)

    def send_on_new(self, request: bytes, outcome: Outcome) -> None:
        self.opening.add(asyncio.create_task(self.open_and_send(request, outcome)))

    async def open_and_send(self, request: bytes, outcome: Outcome) -> None:
        within = self.job.idle_timeout_s
        try:
            connection = await self.connectors[outcome.endpoint].connect(within)
        except OSError as error:
            late = f"not accepted within {within:g} s{RAISE_IDLE_TIMEOUT}"
            outcome.error = f"no connection: {said(error) or late}"
            self.record(outcome)
        except asyncio.CancelledError:
            outcome.error = f"no connection: not accepted when the level ended{self.out_of_time}"
            self.record(outcome)
        else:
            self.busy.add(connection)
            connection.send(request, outcome, stale=False)
        finally:
            self.opening.discard(asyncio.current_task())

    def on_end(self, connection: Connection, outcome: Outcome, retry: bytes | None) -> None:
        self.busy.discard(connection)
        if retry is not None:
            self.send_on_new(retry, outcome)
            return
        if connection.usable:
            self.idle[outcome.endpoint].append(connection)
        self.record(outcome)

    def record(self, outcome: Outcome) -> None:
        outcome.error = outcome.verdict(self.job.exact_tokens)
        if outcome.finish_reason:
            outcome.finish_reason = storable(outcome.finish_reason)
        if outcome.error:
            outcome.error = storable(outcome.error)
            said_by = self.job.endpoints[outcome.endpoint]
            outcome.error = said_by.without_secrets(outcome.error)  # some servers quote them in their refusal
        self.ended.append(outcome)
        self.counts["failed" if outcome.error else "done"] += 1
        self.counts["tokens"] += max(outcome.output_tokens, len(outcome.chunks))
        if outcome.chunks:
            self.counts["first_tokens"] += 1
            self.ttft_sum += outcome.chunks[0] - outcome.sent
        if outcome.sent:
            self.flying[outcome.endpoint] -= 1
        if self.job.max_concurrency and outcome.sent:
            self.slots.append(monotonic())
            self.slot.set()
        if self.counts["done"] + self.counts["failed"] == len(self.job.indices):
            self.all_done.set()

    async def tick(self, start: float) -> None:
        """Four times a second: progress, what ended to the spool, streams that fell silent."""
        while True:
            await asyncio.sleep(TICK_S)
            now = monotonic()
            for connection in [c for c in self.busy if now - c.last_bytes > self.job.idle_timeout_s]:
                queued = "" if connection.outcome.chunks else ", the request was still queued"
                connection.fail(f"no bytes for {self.job.idle_timeout_s:g} s{queued}{RAISE_IDLE_TIMEOUT}")
            for connection in [c for c in self.busy if c.outcome and len(c.outcome.chunks) > endless(c.outcome)]:
                connection.fail(f"more than {endless(connection.outcome)} chunks; the stream does not end")
            self.flush()
            streaming = sum(len(c.outcome.chunks) for c in self.busy if c.outcome)
            live = {"in_flight": len(self.busy) + len(self.opening), "streaming": streaming, "ttft_sum": self.ttft_sum}
            tell("progress", at=now - start, cpu_s=time.process_time(), **self.counts, **live)

    def pulse(self, loop: asyncio.AbstractEventLoop, due: float) -> None:
        """Notes, a hundred times a second, how late the event loop wakes up: its stalls are what timestamps cannot be trusted
        in. A timer, since a task's wake-up does more."""
        now = monotonic()
        self.stall_s = max(self.stall_s, now - due)
        self.next_pulse = loop.call_later(0.01, self.pulse, loop, now + 0.01)

    def flush(self) -> None:
        """Appends what ended to the spool; when that cannot be written, the level is stopped."""
        if self.trouble or not self.ended:
            return
        batch, self.ended = self.ended, []
        payload = pickle.dumps(batch, protocol=5)
        try:
            self.spool.write(struct.pack("<I", len(payload)) + payload)
            self.spool.flush()
        except OSError as error:
            self.trouble = unwritable(self.job.spool, error)
            self.stopping.set()

    @staticmethod
    async def first_of(*events: asyncio.Event, timeout: float | None = None) -> None:
        waits = [asyncio.ensure_future(event.wait()) for event in events]
        await asyncio.wait(waits, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()


def endless(outcome: Outcome) -> int:
    """The number of chunks beyond which a stream is no answer to what was asked."""
    return _ENDLESS_CHUNKS + 2 * outcome.asked_tokens


def read_spool(path: str) -> list[Outcome]:
    """Every whole batch of a spool file; a half-written last one is left out."""
    outcomes: list[Outcome] = []
    with open(path, "rb") as file:
        while len(head := file.read(4)) == 4:
            payload = file.read(struct.unpack("<I", head)[0])
            try:
                outcomes += pickle.loads(payload)
            except (pickle.UnpicklingError, EOFError):
                break
    return outcomes


def unwritable(path: str, error: OSError) -> str:
    """What is to be said of a client that cannot write where TMPDIR is."""
    return f"could not write to {path} ({error.strerror}); make room there, or name another folder in TMPDIR"


def tell(kind: str, **values) -> None:
    sys.stdout.write(json.dumps({"kind": kind, **values}) + "\n")
    sys.stdout.flush()


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the generator's to handle
    job = pickle.load(sys.stdin.buffer)

    async def run():
        raise_open_files()
        try:
            worker = Worker(job)
        except OSError as error:
            return tell("unready", trouble=unwritable(job.spool, error))
        await worker.run()

    uvloop.run(run())
