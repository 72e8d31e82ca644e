"""Starts, loads and stops a server again and again: does anything grow?

    make soak                                        # 20 starts of the emulated server, at most 30 minutes
    make soak ARGS="--starts 9 --minutes 8"

After each stop it counts this process's memory, descriptors, threads and children, the files in the temporary
folder and the processes of servers. The last line of standard output is one JSON document; exit code 1, and why,
when something grew, a request failed, or there were too few rounds to tell (fewer than 9). The first rounds are left
out: imports and caches fill once.
"""

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

import psutil

import fp8lab as lab
from fp8lab.server import processes

SETTLED = 3
COMPARED = 3
# The first rounds, the early ones and the late ones that are compared with them.
ENOUGH = SETTLED + 2 * COMPARED
# Allocators keep a little; a leak of one level's records would be twenty times as much.
MEMORY_MIB = 8.0


def counts(temporary: Path) -> dict:
    """What this process and its servers hold now; they have the folder `temporary` to themselves."""
    me = psutil.Process()
    mine = [server for server in processes.servers() if server.owner_pid == os.getpid()]
    return {
        "memory_mib": me.memory_info().rss / 2**20,
        "descriptors": me.num_fds(),
        "threads": threading.active_count(),
        "children": len(me.children(recursive=True)),
        "server_processes": sum(len(server.pids) for server in mine),
        "temporary_files": sum(1 for _ in temporary.rglob("*")),
    }


def one_round(profile, number: int, run: lab.Run, requests: int) -> dict:
    """One start, two levels and one stop; seconds of each and how many requests failed."""
    variant = list(profile.variants)[number % 2]
    began = time.monotonic()
    server = lab.start_server(profile, variant, run=run)
    ready = time.monotonic()
    levels = [lab.load_test(server, rate=rate, requests=requests, repeat=number + 1, run=run) for rate in (50, 100)]
    loaded = time.monotonic()
    server.stop()
    return {
        "start_s": ready - began,
        "load_s": loaded - ready,
        "stop_s": time.monotonic() - loaded,
        "failed": sum(level.summary.failed for level in levels),
    }


def grew(rounds: list[dict]) -> list[str]:
    """What holds more at the end than after the first rounds."""
    early, late = rounds[SETTLED : SETTLED + COMPARED], rounds[-COMPARED:]
    # Connections that a pool has not closed yet make descriptors come and go: a leak raises the least of them.
    found = [key for key in ("descriptors", "threads", "children", "server_processes", "temporary_files")
             if min(row[key] for row in late) > max(row[key] for row in early)]  # fmt: skip
    memory = median(row["memory_mib"] for row in late) - median(row["memory_mib"] for row in early)
    return found + (["memory_mib"] if memory > MEMORY_MIB else [])


def problems(rounds: list[dict]) -> list[str]:
    """Why these rounds do not show that nothing grows; empty when they do."""
    found = []
    if len(rounds) < ENOUGH:
        found.append(f"only {len(rounds)} rounds, at least {ENOUGH} are needed: more --starts or --minutes")
    elif growth := grew(rounds):
        found.append(f"grew: {', '.join(growth)}")
    if failed := sum(row["failed"] for row in rounds):
        found.append(f"{failed} requests failed")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="emulated-h100")
    parser.add_argument("--starts", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=30.0, help="begin no further round after so long")
    parser.add_argument("--requests", type=int, default=60)
    args = parser.parse_args()
    profile = lab.load_profile(args.profile)
    began = time.monotonic()
    rounds: list[dict] = []
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        temporary = Path(folder) / "tmp"
        temporary.mkdir()
        os.environ["TMPDIR"] = tempfile.tempdir = str(temporary)
        run = lab.open_run(Path(folder) / "run", profile)
        while len(rounds) < args.starts and time.monotonic() - began < args.minutes * 60:
            rounds.append(one_round(profile, len(rounds), run, args.requests) | counts(temporary))
            print(f"{len(rounds)}: {json.dumps(rounds[-1])}", file=sys.stderr, flush=True)
    tempfile.tempdir = None
    found = problems(rounds)
    seen = {} if not rounds else {
        "start_s": median(row["start_s"] for row in rounds),
        "stop_s_most": max(row["stop_s"] for row in rounds),
        "after_round": {str(n): rounds[n - 1] for n in (min(SETTLED + 1, len(rounds)), len(rounds))},
    }  # fmt: skip
    print(json.dumps({
        "profile": profile.name,
        "starts": len(rounds),
        "minutes": (time.monotonic() - began) / 60,
        "failed_requests": sum(row["failed"] for row in rounds),
        **seen,
        "problems": found,
    }))  # fmt: skip
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
