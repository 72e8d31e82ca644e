"""Runs one server and ends it, with everything that it started, when its owner is gone.

    watchdog.py --log FILE [--grace SECONDS] [--secret NAME ...] [--scratch DIR] -- COMMAND ...

The owner holds the writing end of this process's standard input: when it closes, by a normal stop or
because the owner died in whatever way, the server's process group gets SIGTERM, after the grace SIGKILL,
and so does every process that descends from it, in other sessions too: the watchdog is a subreaper, so
orphans become its own children. At the end the values of the variables NAME are blotted out of the log.
Standard output says `started PID` and at the end `exited CODE`.

Standard library only, Linux only, and started by path: it must not fail because something else does.
"""

import argparse
import contextlib
import ctypes
import mmap
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
POLL_S = 0.1
# In a URL; what is shorter is a word, which a log holds anyway (as `config.flags` has it, which is not imported here).
_PASSWORD = re.compile(r"://[^\s/?#@:]*:([^\s/?#@]{8,})@")


def main() -> int:
    parser = argparse.ArgumentParser(prog="watchdog.py", description=__doc__.splitlines()[0])
    parser.add_argument("--log", required=True, help="file that takes the server's output")
    parser.add_argument("--grace", type=float, default=10.0, help="seconds between SIGTERM and SIGKILL")
    parser.add_argument("--secret", action="append", default=[], help="variable whose value must not stay in the log")
    parser.add_argument("--scratch", help="folder for the server alone, to be removed when it has ended")
    parser.add_argument("command", nargs="+", help="the server's command line, after --")
    args = parser.parse_args()

    # A child that the owner forked may keep the pipe open; the owner's death shows in the parent's pid all the same.
    owner_pid, stopping = os.getppid(), []
    signal.signal(signal.SIGTERM, lambda *_: stopping.append(True))
    for ignored in (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(ignored, signal.SIG_IGN)
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    with open(args.log, "ab", buffering=0) as log:
        pipes = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
        # There are no threads here that a function before the exec could deadlock with.
        pipes["preexec_fn"] = see_signals_again
        server = subprocess.Popen(args.command, start_new_session=True, **pipes)
    tell(f"started {server.pid}")

    owner = select.poll()
    owner.register(sys.stdin, select.POLLIN | select.POLLHUP)
    while server.poll() is None and not stopping:
        if (owner.poll(POLL_S * 1000) and not os.read(0, 4096)) or os.getppid() != owner_pid:
            stopping.append(True)
    end_descendants(server, args.grace if stopping else 0.0)
    secrets = [os.environ[name] for name in args.secret if os.environ.get(name)]
    blot_out(args.log, [*secrets, *(word for one in secrets for word in _PASSWORD.findall(one))])
    if args.scratch:
        shutil.rmtree(args.scratch, ignore_errors=True)
    tell(f"exited {server.returncode}")
    return 0


def see_signals_again() -> None:
    """Ignored signals are inherited by a child."""
    for ignored in (signal.SIGINT, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_DFL)


def end_descendants(server: subprocess.Popen, grace: float) -> None:
    """SIGTERM to the server's group and, once it has ended, to what it left; SIGKILL to all after `grace` seconds."""
    if server.poll() is None:
        send(-server.pid, signal.SIGTERM)
        send(-server.pid, signal.SIGCONT)  # a suspended one takes no other signal
    deadline, told = time.monotonic() + grace, set()
    while True:
        reap(server)
        left = descendants(os.getpid())
        if not left:
            return
        if server.returncode is not None:
            for pid in set(left) - told:
                send(pid, signal.SIGTERM)
            told.update(left)
        if time.monotonic() >= deadline:
            for pid in left:
                send(pid, signal.SIGKILL)
        time.sleep(POLL_S / 2)


def reap(server: subprocess.Popen) -> None:
    """Collects ended children; orphans of the server are children too."""
    server.poll()
    for pid in descendants(os.getpid(), direct=True):
        if pid != server.pid:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


def descendants(ancestor: int, direct: bool = False) -> list[int]:
    """Pids below `ancestor`, from /proc; with `direct` its children only."""
    parents = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{entry}/stat", "rb") as stat:
                # The command, in parentheses, may hold anything; what follows it is numbers.
                parents[int(entry)] = int(stat.read().rpartition(b")")[2].split()[1])
    if direct:
        return [pid for pid, parent in parents.items() if parent == ancestor]
    found, frontier = [], {ancestor}
    while frontier:
        frontier = {pid for pid, parent in parents.items() if parent in frontier}
        found.extend(frontier)
    return found


def blot_out(path: str, secrets) -> None:
    """Overwrites every occurrence of `secrets` in the file, in place, with asterisks."""
    with (
        contextlib.suppress(OSError, ValueError),  # gone, or empty: nothing to blot out
        open(path, "r+b") as file,
        mmap.mmap(file.fileno(), 0) as text,
    ):
        # The longest first: one may begin another.
        for secret in sorted(map(os.fsencode, secrets), key=len, reverse=True):
            at = text.find(secret)
            while at >= 0:
                text[at : at + len(secret)] = b"*" * len(secret)
                at = text.find(secret, at)


def send(pid: int, signum: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signum)


def tell(line: str) -> None:
    with contextlib.suppress(OSError):  # the owner is gone; the work goes on without a listener
        os.write(1, f"{line}\n".encode())


if __name__ == "__main__":
    sys.exit(main())


# Nothing of the host's Python set-up (PYTHONPATH, sitecustomize) is in it.
_ALONE = ("-I", "-S")


def is_one(command: Sequence[str]) -> bool:
    """Whether a process's command is that of a watchdog, of this checkout or another."""
    return any(os.path.basename(part) == os.path.basename(__file__) for part in command[1 : len(_ALONE) + 2])


def popen(
    command: Sequence[str], environment: Mapping[str, str], log: Path, *, grace_s: float, options: Sequence[str] = (),
    held: Sequence[int] = (),
) -> subprocess.Popen:  # fmt: skip
    """The watchdog of `command`, which writes to `log`. Closing its standard input ends both; what it says, `watchdog`
    tells. `options` are the watchdog's own; the file descriptors `held` stay open until all has ended."""
    from ..config.flags import secrets_of

    guard = [sys.executable, *_ALONE, __file__, "--log", str(log), "--grace", str(grace_s), *options]
    guard += [part for name in secrets_of(environment) for part in ("--secret", name)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "pass_fds": held}
    return subprocess.Popen([*guard, "--", *command], env=dict(environment), start_new_session=True, **pipes)
