"""Stands in for NVML where PYTHONPATH puts this folder first: one card, as the JSON file FAKE_NVML says.

{"used_gib": 0.5, "processes": [[pid, GiB or null], ...], "lost": false, "handles": true}

A lost card answers no question; without handles it is not even found.
"""

import json
import os
import zlib
from pathlib import Path
from types import SimpleNamespace

NVML_CLOCK_SM = 1
# A card of each test's own: the lock on it is the whole machine's.
UUID = f"GPU-fake-{zlib.crc32(os.environ['FAKE_NVML'].encode()):08x}"


class NVMLError(Exception):
    pass


def _says() -> dict:
    says = json.loads(Path(os.environ["FAKE_NVML"]).read_text())
    if says["lost"]:
        raise NVMLError("GPU is lost")
    return says


def _find() -> None:
    if not json.loads(Path(os.environ["FAKE_NVML"]).read_text())["handles"]:
        raise NVMLError("GPU is lost")


def nvmlInit():
    pass


def nvmlShutdown():
    pass


def nvmlDeviceGetCount():
    return 1


def nvmlDeviceGetHandleByIndex(index):
    if index:
        raise NVMLError("Invalid Argument")
    _find()
    return 0


def nvmlDeviceGetHandleByUUID(uuid):
    if uuid != UUID:
        raise NVMLError("Not Found")
    _find()
    return 0


def nvmlDeviceGetName(_handle):
    _says()
    return "NVIDIA H100 80GB HBM3 (a stand-in)"


def nvmlDeviceGetUUID(_handle):
    _says()
    return UUID


def nvmlDeviceGetMemoryInfo(_handle):
    return SimpleNamespace(used=int(_says()["used_gib"] * 2**30))


def nvmlDeviceGetComputeRunningProcesses(_handle):
    return [
        SimpleNamespace(pid=pid, usedGpuMemory=2**64 - 1 if gib is None else int(gib * 2**30))
        for pid, gib in _says()["processes"]
    ]


def nvmlSystemGetDriverVersion():
    return "0.0"


def __getattr__(name):
    """Every reading that the telemetry wants: this card does not give it."""
    if name.startswith("nvmlDeviceGet"):

        def unsupported(*_args):
            raise NVMLError("Not Supported")

        return unsupported
    raise AttributeError(name)
