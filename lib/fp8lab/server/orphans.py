"""Finds and ends servers that an earlier run of this user left behind.

Every process of a server carries the variable FP8LAB_SERVER in its environment, so leftovers are found
without any file: also when the run folder, the owner and the watchdog are gone.
"""

import contextlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from . import watchdog

MARK = "FP8LAB_SERVER"
_POLL_S = 0.05
_GRACE_S = 10.0


@dataclass(frozen=True)
class Leftover:
    """One server's processes. `owner_pid` started it; `owned` and `watched`: that process, its watchdog still lives."""

    id: str
    variant: str
    profile: str
    port: int
    owner_pid: int
    owned: bool
    watched: bool
    pids: tuple[int, ...]
    memory_gib: float
    started: float


def mark(*, id: str, variant: str, profile: str, port: int) -> str:
    """The variable's value for a server that this process starts."""
    owner = {"owner_pid": os.getpid(), "owner_started": _started(os.getpid())}
    return json.dumps({"id": id, "variant": variant, "profile": profile, "port": port} | owner)


def servers() -> list[Leftover]:
    """All servers of this user that are running now, oldest first."""
    found: dict[str, tuple[dict, list[psutil.Process]]] = {}
    for process in psutil.process_iter():
        try:
            # Root may read all; another user's servers are not its own.
            value = process.environ().get(MARK) if process.uids().real == os.getuid() else None
        except (psutil.AccessDenied, psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
        if value and (details := _details(value)):
            found.setdefault(details["id"], (details, []))[1].append(process)
    return sorted((_leftover(*entry) for entry in found.values()), key=lambda server: server.started)


def find(id: str) -> Leftover | None:
    """The server `id` if anything of it runs."""
    return next((server for server in servers() if server.id == id), None)


def stop(server: Leftover) -> None:
    """SIGTERM to all of the server's processes and what descends from them; SIGKILL to those still there after ten
    seconds, and to what they started meanwhile, until nothing is left."""
    processes = with_descendants(server.pids)
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
            process.resume()  # a suspended one takes no other signal
    deadline = time.monotonic() + _GRACE_S
    while any(map(_runs, processes)) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    deadline = time.monotonic() + _GRACE_S
    while time.monotonic() < deadline:
        left = find(server.id)
        alive = [p for p in {*processes, *with_descendants(left.pids if left else ())} if _runs(p)]
        if not alive:
            return
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        time.sleep(_POLL_S)


def _details(value: str) -> dict | None:
    """What a mark says; None for a value that is none."""
    try:
        details = json.loads(value)
        numbers = isinstance(details["owner_pid"], int) and isinstance(details["owner_started"], int)
        return details if details["id"] and numbers else None
    except (ValueError, TypeError, KeyError):
        return None


def _started(pid: int) -> int | None:
    """When the process started, in clock ticks since the machine's boot: a time of day would move when the clock is set.
    None when it has ended."""
    try:
        # The command, in parentheses, may hold anything; what follows it is numbers.
        return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19])
    except OSError:
        return None


def _leftover(details: dict, processes: list[psutil.Process]) -> Leftover:
    memory, started, watched = 0, time.time(), False
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            watched = watched or watchdog.is_one(process.cmdline())
            memory += process.memory_info().rss
            started = min(started, process.create_time())
    said = {key: details[key] for key in ("id", "variant", "profile", "port", "owner_pid")}
    owned = _started(details["owner_pid"]) == details["owner_started"]
    pids = tuple(sorted(process.pid for process in processes))
    return Leftover(**said, owned=owned, watched=watched, pids=pids, memory_gib=memory / 2**30, started=started)


def with_descendants(pids) -> list[psutil.Process]:
    """The processes `pids` and all below them: a child that cleared its environment carries no mark."""
    processes = {}
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            processes |= {p.pid: p for p in (process, *process.children(recursive=True))}
    return list(processes.values())


def _runs(process: psutil.Process) -> bool:
    """Whether it still runs; one that has ended and waits for its parent to collect it does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
