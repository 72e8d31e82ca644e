"""The servers on this machine: whether one may start (its port, its GPU), and what an earlier run of this user left behind.

Every process of a server carries the variable FP8LAB_SERVER in its environment, so leftovers are found
without any file: also when the run folder, the owner and the watchdog are gone.
"""

import contextlib
import json
import os
import pwd
import socket
import time
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import psutil

from ..errors import BadInput, InUse
from ..system import gpu
from ..system.locks import Lock, machine_lock
from . import watchdog
from .command import HOST

# An idle card holds up to about 1 GiB for its driver; a process needs more than this to matter.
_IDLE_GIB = 2.0
_LISTEN = "0A"
# A server that another process is just starting, or ending, is without its watchdog for an instant.
_SETTLE_S = 0.5
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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def check_port(port: int) -> None:
    """Raises BadInput for a number that is no port, InUse, with who listens, for one that is taken."""
    if not 0 < port < 65536:
        raise BadInput(f"port {port} is not between 1 and 65535")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except PermissionError:
            raise BadInput(f"port {port} is for root alone here; choose one from 1024 on, or leave it out") from None
        except OSError:
            taken = f"port {port} is taken on {HOST} by {listener(port)}"
            raise InUse(f"{taken}; choose another, or leave it out to have a free one chosen") from None


def listener(port: int) -> str:
    """Who listens on `port`: pid, name, owner and memory as far as this user may know."""
    with contextlib.suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                return describe(connection.pid)
    # The kernel names another user's process to nobody, but its owner to all.
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):  # no such table without IPv6
            for line in Path("/proc/net", table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
                    return f"a process of user {_user(int(fields[7]))}"
    return "another process"


def describe(pid: int, gpu_memory_gib: float | None = None) -> str:
    """A process in words: pid, name, owner, memory. Its command line may hold secrets and is left out."""
    held = "" if gpu_memory_gib is None else f", {gpu_memory_gib:.1f} GiB of GPU memory"
    try:
        process = psutil.Process(pid)
        memory = held or f", {process.memory_info().rss / 2**30:.1f} GiB"
        return f"pid {pid} ({process.name()}, user {_user(process.uids().real)}{memory})"
    except psutil.Error:
        return f"pid {pid} (not visible from here{held})"


def check_cards(what: str, cards: int) -> None:
    """Raises BadInput unless this machine shows as many `cards`, of one kind, as a server called `what` takes. (Whether a
    single one can be read is `take_gpus`'s question.)"""
    if cards == 1:
        return
    if (count := len(gpu.visible())) < cards:
        chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
        left = f" (CUDA_VISIBLE_DEVICES={chosen!r} may hide others)" if chosen is not None else ""
        shown = f"{count} {'is' if count == 1 else 'are'} visible here{left}"
        raise BadInput(
            f"{what} takes {cards} GPUs (its parallel sizes multiplied), and {shown}; choose a variant for fewer"
        )
    names = gpu.gpu_names()
    if len(kinds := sorted(set(names[:cards]))) > 1:
        raise BadInput(
            f"{what} takes {cards} GPUs, and the first ones here are of different kinds ({', '.join(kinds)}): the slowest would "
            "set the pace of all; name equal ones in CUDA_VISIBLE_DEVICES"
        )


def take_gpus(what: str, cards: int = 1) -> list[Lock]:
    """The locks on the first `cards` GPUs, for a server called `what`. Raises InUse when another start holds one, or
    anything computes on them or fills them, for it would not be measured alone; BadInput for a card that is lost."""
    uuids, locks = gpu.gpu_uuids(cards), []
    if len(uuids) < cards or None in uuids:
        one = "the GPU" if cards == 1 else f"one of the {cards} GPUs"
        raise BadInput(f"{one} cannot be read: the card or its driver is lost; see `nvidia-smi` and `dmesg`")
    try:
        # In one order for all, so that two starts cannot each hold what the other waits for.
        for uuid in sorted(uuids):
            locks.append(machine_lock(uuid, f"the GPU (for {what})"))
        check_gpus(cards)
    except BaseException:
        for lock in locks:
            lock.release()
        raise
    return locks


def check_gpus(cards: int = 1) -> None:
    """Raises InUse, with pid, owner and memory, when a GPU that a server would take is not idle."""
    busy = {pid: gib for pid, gib in gpu.occupants(cards).items() if gib is None or gib > _IDLE_GIB}
    if busy:
        holders = "; ".join(describe(pid, gib) for pid, gib in busy.items())
        ours = any(pid in busy for server in servers() for pid in server.pids)
        remedy = "end it with `fp8lab stop --all`" if ours else "wait, or choose another card (CUDA_VISIBLE_DEVICES)"
        raise InUse(f"the GPU is in use by {holders}; {remedy}")
    if (used := max(gpu.memory_used_each_gib(cards), default=0.0)) > _IDLE_GIB:
        raise InUse(
            f"{used:.1f} GiB of the GPU's memory are held by processes that cannot be seen from here; "
            "see `nvidia-smi` on the host, or choose another card (CUDA_VISIBLE_DEVICES)"
        )


def others_on_gpu(
    mine: Collection[int], idle: Collection[int], before_gib: float | None, nameless: int = 0, cards: int = 1
) -> tuple:
    """(who beside a server computes on its `cards`, in words; the pids there that are the server's; why that is not
    certain, or "").

    `mine` are the server's processes, `idle` the pids that were on the card before it and held next to nothing, beside
    `before_gib` of memory in use. NVML names a process by its pid here, or, in a container under an older driver, by
    the host's: of those, up to `nameless` may be the server's. Or it names none.
    """
    there = {pid: gib for pid, gib in gpu.occupants(cards).items() if pid not in idle or (gib or 0.0) > _IDLE_GIB}
    ours = [pid for pid in there if pid in mine]
    # Pids of the host are large numbers: that one of them is by chance another process's here is next to impossible.
    others = [pid for pid in there if pid not in mine and psutil.pid_exists(pid)]
    unknown = [pid for pid in there if pid not in mine and not psutil.pid_exists(pid)]
    doubt = ""
    if ours or len(unknown) > nameless:
        others += unknown
    else:
        ours = unknown
        doubt = "NVML names processes by pids of the host" if unknown else "NVML names no process of this server"
    said = [describe(pid, there[pid]) for pid in others]
    used, held = gpu.memory_used_gib(cards), [there[pid] for pid in (*ours, *others)]
    if ours and None not in (used, before_gib, *held):
        hidden = used - before_gib - sum(held)
        if hidden > _IDLE_GIB + 0.5 * (cards - 1):
            said.append(f"processes that cannot be seen from here ({hidden:.1f} GiB of GPU memory)")
    return said, set(ours), doubt


def cuda_processes(pids: Collection[int]) -> int:
    """How many of the processes `pids` have CUDA's memory open; all of them count where that cannot be seen."""

    def opened(pid: int) -> bool:
        with contextlib.suppress(OSError):  # it ended, or may not be looked into
            return any(os.path.realpath(entry) == "/dev/nvidia-uvm" for entry in Path(f"/proc/{pid}/fd").iterdir())
        return False

    return sum(map(opened, pids)) or len(pids)


def warn_of_leftovers() -> None:
    """Warns of every server whose owner or watchdog is gone."""

    def left() -> dict[str, Leftover]:
        return {other.id: other for other in servers() if not (other.owned and other.watched)}

    if found := left():
        time.sleep(_SETTLE_S)
    for other in filter(None, map(left().get, found)):
        gone, option = ("its watchdog was killed", " --all") if other.owned else ("its owner is gone", "")
        what = f"{other.variant}, pids {', '.join(map(str, other.pids))}, {other.memory_gib:.1f} GiB"
        said = f"a server of an earlier start is still there, {gone} ({what}); end it with `fp8lab stop{option}`"
        warnings.warn(said, stacklevel=3)


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


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
