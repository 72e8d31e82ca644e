"""The NVIDIA GPUs of this machine, through NVML. No GPU, or no driver, is an ordinary answer."""

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
        pynvml.nvmlShutdown()


def gpu_names() -> list[str]:
    """Names of the visible GPUs, in order; empty without a GPU or driver."""
    with _gpus() as (nvml, handles):
        return [nvml.nvmlDeviceGetName(handle) for handle in handles]


def driver_version() -> str | None:
    with _nvml() as nvml:
        return nvml.nvmlSystemGetDriverVersion() if nvml else None


def memory_used_gib() -> float | None:
    """Memory in use on the first GPU, which a server would take, in GiB; None without one."""
    with _gpus() as (nvml, handles):
        return nvml.nvmlDeviceGetMemoryInfo(handles[0]).used / 2**30 if handles else None


def gpu_uuid() -> str | None:
    """The name under which the first GPU is known everywhere; None without one."""
    with _gpus() as (nvml, handles):
        return nvml.nvmlDeviceGetUUID(handles[0]) if handles else None


def occupants() -> list[Occupant]:
    """Who computes on the first GPU. In a container NVML may show none, or pids of the host."""
    with _gpus() as (nvml, handles):
        try:
            listed = nvml.nvmlDeviceGetComputeRunningProcesses(handles[0]) if handles else []
        except nvml.NVMLError:
            return []  # this driver does not tell; the memory in use still does
        found = {process.pid: process.usedGpuMemory for process in listed}
        # All bits set is NVML's "not available".
        known = {pid: used for pid, used in found.items() if used is not None and used < 2**60}
        return [Occupant(pid, known[pid] / 2**30 if pid in known else None) for pid in sorted(found)]


class GpuReader:
    """Reads the server's GPU again and again, with NVML initialised once. Without a GPU it reads nothing."""

    COLUMNS = ("gpu_util", "gpu_memory_util", "gpu_power_w", "gpu_energy_j", "gpu_memory_gib", "gpu_sm_mhz")

    def __enter__(self) -> "GpuReader":
        self._stack = contextlib.ExitStack()
        self._nvml = self._stack.enter_context(_nvml())
        handles = _handles(self._nvml) if self._nvml else []
        self._handle = handles[0] if handles else None
        return self

    def __exit__(self, *exc) -> None:
        self._stack.close()

    def read(self, slow: bool = True) -> dict[str, float]:
        """`COLUMNS` that this card answers: shares 0 to 1, W, J since the driver was loaded, GiB, MHz.

        Without `slow` only what changes quickly, shares and power: each question costs the driver's time.
        """
        nvml, handle, row = self._nvml, self._handle, {}
        if not handle:
            return row
        with contextlib.suppress(nvml.NVMLError):
            util = nvml.nvmlDeviceGetUtilizationRates(handle)
            row |= {"gpu_util": util.gpu / 100, "gpu_memory_util": util.memory / 100}
        with contextlib.suppress(nvml.NVMLError):
            row["gpu_power_w"] = nvml.nvmlDeviceGetPowerUsage(handle) / 1e3
        if not slow:
            return row
        with contextlib.suppress(nvml.NVMLError):
            row["gpu_energy_j"] = nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
        with contextlib.suppress(nvml.NVMLError):
            row["gpu_memory_gib"] = nvml.nvmlDeviceGetMemoryInfo(handle).used / 2**30
        with contextlib.suppress(nvml.NVMLError):
            row["gpu_sm_mhz"] = nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)
        return row


@contextlib.contextmanager
def _gpus():
    """(NVML, the visible GPUs' handles); (None, []) without a driver."""
    with _nvml() as nvml:
        yield nvml, _handles(nvml) if nvml else []


def _handles(nvml) -> list:
    """The GPUs that a server started here would see, in its order: NVML itself ignores CUDA_VISIBLE_DEVICES."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    handles = []
    for name in filter(None, (part.strip() for part in chosen.split(","))):
        try:
            by_index = name.isdigit()
            handles.append(
                nvml.nvmlDeviceGetHandleByIndex(int(name)) if by_index else nvml.nvmlDeviceGetHandleByUUID(name)
            )
        except nvml.NVMLError:
            break  # as CUDA does: what follows a name that is not there is not visible
    return handles
