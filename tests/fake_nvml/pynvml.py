"""Stands in for NVML where PYTHONPATH puts this folder first: cards as the JSON file FAKE_NVML says.

{"used_gib": 0.5, "processes": [[pid, GiB or null], ...], "lost": false, "handles": true,
 "cards": [{"name": "NVIDIA L40S", "uuid": "GPU-...", "memory_gib": 44.5, "mig": false}, ...]}

A lost card answers no question; without handles it is not even found. Without "cards" there is one H100. A card may say
"used_gib", "processes", "lost" and readings (power_mw, sm_mhz, …) of its own.
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


def _says(handle=None) -> dict:
    says = json.loads(Path(os.environ["FAKE_NVML"]).read_text())
    says |= _cards()[handle] if handle is not None else {}
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


def _cards() -> list[dict]:
    one = {"name": "NVIDIA H100 80GB HBM3", "uuid": UUID, "memory_gib": 79.65}
    return json.loads(Path(os.environ["FAKE_NVML"]).read_text()).get("cards") or [one]


def nvmlDeviceGetCount():
    return len(_cards())


def nvmlDeviceGetHandleByIndex(index):
    if not 0 <= index < len(_cards()):
        raise NVMLError("Invalid Argument")
    _find()
    return index


def nvmlDeviceGetHandleByUUID(uuid):
    index = next((i for i, card in enumerate(_cards()) if card["uuid"] == uuid), None)
    if index is None:
        raise NVMLError("Not Found")
    _find()
    return index


def nvmlDeviceGetName(handle):
    _says(handle)
    return _cards()[handle]["name"]


def nvmlDeviceGetUUID(handle):
    _says(handle)
    return _cards()[handle]["uuid"]


def nvmlDeviceGetMemoryInfo(handle):
    total = int(_cards()[handle]["memory_gib"] * 2**30)
    return SimpleNamespace(used=int(_says(handle)["used_gib"] * 2**30), total=total)


def nvmlDeviceGetMigMode(handle):
    if "mig" not in _cards()[handle]:
        raise NVMLError("Not Supported")
    return [int(_cards()[handle]["mig"])] * 2


def nvmlDeviceGetComputeRunningProcesses(handle):
    return [
        SimpleNamespace(pid=pid, usedGpuMemory=2**64 - 1 if gib is None else int(gib * 2**30))
        for pid, gib in _says(handle)["processes"]
    ]


def nvmlDeviceGetCurrentClocksEventReasons(handle):
    return _reading("clock_reasons", handle)


def nvmlDeviceGetEnforcedPowerLimit(handle):
    return _reading("power_limit_mw", handle)


def nvmlDeviceGetPowerUsage(handle):
    return _reading("power_mw", handle)


def nvmlDeviceGetClockInfo(handle, _which):
    return _reading("sm_mhz", handle)


def _reading(name: str, handle: int):
    """A reading that this card gives if its file names it."""
    if (value := _says(handle).get(name)) is None:
        raise NVMLError("Not Supported")
    return value


def nvmlSystemGetDriverVersion():
    return "0.0"


def __getattr__(name):
    """Every reading that the telemetry wants: this card does not give it."""
    if name.startswith("nvmlDeviceGet"):

        def unsupported(*_args):
            raise NVMLError("Not Supported")

        return unsupported
    raise AttributeError(name)
