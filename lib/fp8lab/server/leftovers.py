"""Finds and ends servers that an earlier run of this user left behind.

Every process of a server carries the variable FP8LAB_SERVER in its environment, so leftovers are found
without any file: also when the run folder, the owner and the watchdog are gone.
"""

import json
import time
from dataclasses import dataclass

import psutil

MARK = "FP8LAB_SERVER"


@dataclass(frozen=True)
class Leftover:
    """One server's processes. `owner_pid` started it; `owned` says whether that process still lives."""

    id: str
    variant: str
    profile: str
    port: int
    owner_pid: int
    owned: bool
    pids: tuple[int, ...]
    memory_gib: float
    started: float


def mark(*, id: str, variant: str, profile: str, port: int) -> str:
    """The variable's value for a server that this process starts."""
    owner = psutil.Process()
    return json.dumps(
        {"id": id, "variant": variant, "profile": profile, "port": port}
        | {"owner_pid": owner.pid, "owner_started": owner.create_time()}
    )


def servers() -> list[Leftover]:
    """All servers of this user that are running now, oldest first."""
    found: dict[str, tuple[dict, list[psutil.Process]]] = {}
    for process in psutil.process_iter():
        try:
            value = process.environ().get(MARK)
        except (psutil.AccessDenied, psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
        if value:
            details = json.loads(value)
            found.setdefault(details["id"], (details, []))[1].append(process)
    return sorted((_leftover(*entry) for entry in found.values()), key=lambda server: server.started)


def stop(server: Leftover, grace_s: float = 10.0) -> None:
    """SIGTERM to all of the server's processes, SIGKILL to those still there after `grace_s`."""
    processes = _processes(server.pids)
    for process in processes:
        _quietly(process.terminate)
    _, alive = psutil.wait_procs(processes, timeout=grace_s)
    for process in alive:
        _quietly(process.kill)
    psutil.wait_procs(alive, timeout=grace_s)


def stop_id(id: str) -> None:
    """Ends what is left of the server `id`; does nothing when nothing is."""
    for server in servers():
        if server.id == id:
            stop(server)


def _leftover(details: dict, processes: list[psutil.Process]) -> Leftover:
    memory, started = 0, time.time()
    for process in processes:
        try:
            memory += process.memory_info().rss
            started = min(started, process.create_time())
        except psutil.NoSuchProcess:
            continue
    try:
        owned = psutil.Process(details["owner_pid"]).create_time() == details["owner_started"]
    except psutil.NoSuchProcess:
        owned = False
    keys = ("id", "variant", "profile", "port", "owner_pid")
    return Leftover(
        **{key: details[key] for key in keys},
        owned=owned,
        pids=tuple(sorted(process.pid for process in processes)),
        memory_gib=memory / 2**30,
        started=started,
    )


def _processes(pids) -> list[psutil.Process]:
    processes = []
    for pid in pids:
        try:
            processes.append(psutil.Process(pid))
        except psutil.NoSuchProcess:
            continue
    return processes


def _quietly(action) -> None:
    try:
        action()
    except psutil.NoSuchProcess:
        return
