"""The NVIDIA GPUs of this machine, through NVML. No GPU, or no driver, is an ordinary answer."""

import contextlib


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
    return [name for name, _ in _gpus()]


def driver_version() -> str | None:
    with _nvml() as nvml:
        return nvml.nvmlSystemGetDriverVersion() if nvml else None


def memory_used_gib() -> float | None:
    """Memory in use on the first GPU, in GiB; None without one."""
    gpus = _gpus()
    return gpus[0][1] if gpus else None


def _gpus() -> list[tuple[str, float]]:
    with _nvml() as nvml:
        if not nvml:
            return []
        handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
        return [(nvml.nvmlDeviceGetName(h), nvml.nvmlDeviceGetMemoryInfo(h).used / 2**30) for h in handles]
