"""The NVIDIA GPUs of this machine, through NVML. No GPU, no driver, or a card that went lost is an ordinary answer."""

import contextlib
import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Occupant:
    """A process that computes on the GPU; `memory_gib` is None where NVML does not tell."""

    pid: int
    memory_gib: float | None


@contextlib.contextmanager
def _nvml():
    """NVML initialised, or None where there is no driver."""
    try:
        import pynvml
    except ImportError:
        yield None
        return
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield None
        return
    try:
        yield pynvml
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def gpu_names() -> list[str]:
    """Names of the visible GPUs, in order; empty without a GPU or driver."""
    with _gpus() as (nvml, handles):
        names = [_answer(nvml, nvml.nvmlDeviceGetName, handle) for handle in handles]
        return [name for name in names if name]


def visible() -> list[str]:
    """The GPUs that a server started here would see, as CUDA_VISIBLE_DEVICES names them."""
    with _nvml() as nvml:
        return list(_handles(nvml)) if nvml else []


def driver_version() -> str | None:
    with _nvml() as nvml:
        return _answer(nvml, nvml.nvmlSystemGetDriverVersion) if nvml else None


def memory_used_gib() -> float | None:
    """Memory in use on the first GPU, which a server would take, in GiB; None without one that can be read."""
    with _gpus() as (nvml, handles):
        memory = _answer(nvml, nvml.nvmlDeviceGetMemoryInfo, handles[0]) if handles else None
        return memory.used / 2**30 if memory else None


def gpu_uuid() -> str | None:
    """The name under which the first GPU is known everywhere; None without one that can be read."""
    with _gpus() as (nvml, handles):
        return _answer(nvml, nvml.nvmlDeviceGetUUID, handles[0]) if handles else None


def occupants() -> list[Occupant]:
    """Who computes on the first GPU. In a container NVML may show none, or pids of the host."""
    with _gpus() as (nvml, handles):
        # Some drivers do not tell; the memory in use still does.
        listed = _answer(nvml, nvml.nvmlDeviceGetComputeRunningProcesses, handles[0]) if handles else None
        found = {process.pid: process.usedGpuMemory for process in listed or []}
        # All bits set is NVML's "not available".
        known = {pid: used for pid, used in found.items() if used is not None and used < 2**60}
        return [Occupant(pid, known[pid] / 2**30 if pid in known else None) for pid in sorted(found)]


class GpuReader:
    """Reads the server's GPU again and again, with NVML initialised once. Without a GPU it reads nothing."""

    COLUMNS = ("gpu_util", "gpu_memory_util", "gpu_power_w", "gpu_sm_mhz", "gpu_clock_reasons")
    COLUMNS += ("gpu_energy_j", "gpu_memory_gib", "gpu_power_limit_w")

    def __enter__(self) -> "GpuReader":
        self._stack = contextlib.ExitStack()
        self._nvml = self._stack.enter_context(_nvml())
        self._handle = next(iter(_handles(self._nvml).values()), None) if self._nvml else None
        return self

    def __exit__(self, *exc) -> None:
        self._stack.close()

    def read(self, slow: bool = True) -> dict[str, float]:
        """`COLUMNS` that this card answers: shares 0 to 1, W, MHz, the reasons for the clock (bits, see `measure.clock`),
        J since the driver was loaded, GiB, the enforced power limit in W.

        Without `slow` only what changes quickly, the first five: each question costs the driver's time.
        """
        nvml, handle, row = self._nvml, self._handle, {}
        if handle is None:
            return row
        with contextlib.suppress(nvml.NVMLError):
            util = nvml.nvmlDeviceGetUtilizationRates(handle)
            row |= {"gpu_util": util.gpu / 100, "gpu_memory_util": util.memory / 100}
        with contextlib.suppress(nvml.NVMLError):
            row["gpu_power_w"] = nvml.nvmlDeviceGetPowerUsage(handle) / 1e3
        with contextlib.suppress(nvml.NVMLError):
            row["gpu_sm_mhz"] = nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)
        with contextlib.suppress(nvml.NVMLError):
            row["gpu_clock_reasons"] = nvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
        if not slow:
            return row
        with contextlib.suppress(nvml.NVMLError):
            row["gpu_energy_j"] = nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
        with contextlib.suppress(nvml.NVMLError):
            row["gpu_memory_gib"] = nvml.nvmlDeviceGetMemoryInfo(handle).used / 2**30
        with contextlib.suppress(nvml.NVMLError):
            row["gpu_power_limit_w"] = nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1e3
        return row


def _answer(nvml, question, *args):
    """What NVML answers; None when it does not."""
    try:
        return question(*args)
    except nvml.NVMLError:
        return None


@contextlib.contextmanager
def _gpus():
    """(NVML, the visible GPUs' handles); (None, []) without a driver."""
    with _nvml() as nvml:
        yield nvml, list(_handles(nvml).values()) if nvml else []


def _handles(nvml) -> dict:
    """The GPUs that a server started here would see, in its order, by their names in CUDA_VISIBLE_DEVICES, which NVML
    itself ignores."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        names = [str(index) for index in range(_answer(nvml, nvml.nvmlDeviceGetCount) or 0)]
    else:
        names = [name for part in chosen.split(",") if (name := part.strip())]
    handles = {}
    for name in names:
        handle = (
            _answer(nvml, nvml.nvmlDeviceGetHandleByIndex, int(name))
            if name.isdigit()
            else _answer(nvml, nvml.nvmlDeviceGetHandleByUUID, name)
        )
        if handle is None:
            break  # as CUDA does: what follows a GPU that is not there is not visible
        handles[name] = handle
    return handles
