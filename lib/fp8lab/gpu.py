"""The NVIDIA GPUs of this machine, through NVML. No GPU, or no driver, is an ordinary answer."""

import contextlib
import os
from dataclasses import dataclass

from .errors import BadInput


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
    """Names of this machine's GPUs, in order; empty without a GPU or driver."""
    with _nvml() as nvml:
        count = nvml.nvmlDeviceGetCount() if nvml else 0
        return [nvml.nvmlDeviceGetName(nvml.nvmlDeviceGetHandleByIndex(i)) for i in range(count)]


def driver_version() -> str | None:
    with _nvml() as nvml:
        return nvml.nvmlSystemGetDriverVersion() if nvml else None


def memory_used_gib() -> float | None:
    """Memory in use on the GPU that a server would take, in GiB; None without one."""
    with _nvml() as nvml:
        return nvml.nvmlDeviceGetMemoryInfo(_handle(nvml)).used / 2**30 if nvml else None


def occupants() -> list[Occupant]:
    """Who computes on the GPU that a server would take. In a container NVML may show none, or pids of the host."""
    with _nvml() as nvml:
        if not nvml:
            return []
        try:
            listed = nvml.nvmlDeviceGetComputeRunningProcesses(_handle(nvml))
        except nvml.NVMLError:
            return []  # this driver does not tell; the memory in use still does
        found = {process.pid: process.usedGpuMemory for process in listed}
        # All bits set is NVML's "not available".
        known = {pid: used for pid, used in found.items() if used is not None and used < 2**60}
        return [Occupant(pid, known[pid] / 2**30 if pid in known else None) for pid in sorted(found)]


def gpu_uuid() -> str | None:
    """The name under which the GPU that a server would take is known everywhere; None without one."""
    with _nvml() as nvml:
        return nvml.nvmlDeviceGetUUID(_handle(nvml)) if nvml else None


class GpuReader:
    """Reads the server's GPU again and again, with NVML initialised once. Without a GPU it reads nothing."""

    COLUMNS = ("gpu_util", "gpu_memory_util", "gpu_power_w", "gpu_energy_j", "gpu_memory_gib", "gpu_sm_mhz")

    def __enter__(self) -> "GpuReader":
        self._stack = contextlib.ExitStack()
        self._nvml = self._stack.enter_context(_nvml())
        self._handle = _handle(self._nvml) if self._nvml else None
        return self

    def __exit__(self, *exc) -> None:
        self._stack.close()

    def read(self) -> dict[str, float]:
        """`COLUMNS` that this card answers: shares 0 to 1, W, J since the driver was loaded, GiB, MHz."""
        nvml, handle, row = self._nvml, self._handle, {}
        if not nvml:
            return row
        with contextlib.suppress(nvml.NVMLError):
            util = nvml.nvmlDeviceGetUtilizationRates(handle)
            row |= {"gpu_util": util.gpu / 100, "gpu_memory_util": util.memory / 100}
        with contextlib.suppress(nvml.NVMLError):
            row["gpu_power_w"] = nvml.nvmlDeviceGetPowerUsage(handle) / 1e3
        with contextlib.suppress(nvml.NVMLError):
            row["gpu_energy_j"] = nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
        with contextlib.suppress(nvml.NVMLError):
            row["gpu_memory_gib"] = nvml.nvmlDeviceGetMemoryInfo(handle).used / 2**30
        with contextlib.suppress(nvml.NVMLError):
            row["gpu_sm_mhz"] = nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)
        return row


def _handle(nvml):
    """The GPU that a server would take: the first that CUDA_VISIBLE_DEVICES names, else the first."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0].strip() or "0"
    try:
        if chosen.isdigit():
            return nvml.nvmlDeviceGetHandleByIndex(int(chosen))
        return nvml.nvmlDeviceGetHandleByUUID(chosen)
    except nvml.NVMLError as error:
        raise BadInput(
            f"CUDA_VISIBLE_DEVICES names GPU {chosen!r}, which NVML does not know ({error}); give an index or a whole UUID"
        ) from None
