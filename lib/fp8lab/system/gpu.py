"""The NVIDIA GPUs of this machine, through NVML. No GPU, no driver, or a card that went lost is an ordinary answer."""

import contextlib
import functools
import operator
import os
import re
from collections.abc import Mapping, Sequence


@contextlib.contextmanager
def _nvml():
    """NVML initialised, or None where there is no driver."""
    import pynvml

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
    return [name for name in _each("nvmlDeviceGetName") if name]


def visible() -> list[str]:
    """The GPUs that a server started here would see, as CUDA_VISIBLE_DEVICES names them."""
    with _nvml() as nvml:
        return list(_visible(nvml))


def server_environment(cards: int = 1) -> dict[str, str]:
    """The variables with which a server sees its `cards`, the first of those that are read here, in the same order: by their
    place in the machine, as NVML numbers them. CUDA's own order is by speed, and vLLM takes no shortened UUID."""
    with _nvml() as nvml:
        places = [str(index) for index, _ in _visible(nvml).values()]
    named = len(places) > cards or (places and "CUDA_VISIBLE_DEVICES" in os.environ)
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"} | ({"CUDA_VISIBLE_DEVICES": ",".join(places[:cards])} if named else {})


def refusal() -> str | None:
    """Why the GPU that a server would take cannot be measured, in words; None when it can, or when there is none."""
    whole = "this kit measures whole cards: power, clock and energy are those of all its slices together"
    text = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    with _nvml() as nvml:
        if nvml is None:
            return None
        if text.startswith("MIG-"):
            return f"CUDA_VISIBLE_DEVICES={text} names a MIG slice, and {whole}; name a card (`nvidia-smi -L`)"
        _, first = next(iter(_visible(nvml).values()), (None, None))
        if first is not None and (_answer(nvml, nvml.nvmlDeviceGetMigMode, first) or [0])[0]:
            return f"the GPU is cut into MIG slices, and {whole}; switch MIG off, or choose another card"
        names = sorted({name for _, handle in _all(nvml) if (name := _answer(nvml, nvml.nvmlDeviceGetName, handle))})
    by_speed = os.environ.get("CUDA_DEVICE_ORDER") == "FASTEST_FIRST"
    if by_speed and len(names) > 1 and not text.startswith("GPU-"):
        return (
            f"CUDA_DEVICE_ORDER=FASTEST_FIRST numbers the different GPUs of this machine ({', '.join(names)}) otherwise than "
            "`nvidia-smi`; leave it out or set PCI_BUS_ID, and choose a card by the number that `nvidia-smi -L` shows"
        )
    return None


def hidden() -> str:
    """Which of this machine's GPUs CUDA_VISIBLE_DEVICES names none of, to end a sentence with; empty without one."""
    text = os.environ.get("CUDA_VISIBLE_DEVICES")
    with _nvml() as nvml:
        count = len(_all(nvml)) if nvml else 0
    if text is None or not count:
        return ""
    numbered = f"{count}, 0 to {count - 1}"
    return f" (CUDA_VISIBLE_DEVICES={text!r} names none of this machine's {numbered}, or one of them twice)"


def driver_version() -> str | None:
    with _nvml() as nvml:
        return _answer(nvml, nvml.nvmlSystemGetDriverVersion) if nvml else None


def memory_used_each_gib(cards: int = 1) -> list[float]:
    """Memory in use on each of the first `cards` GPUs, which a server would take, in GiB; empty when one cannot be read."""
    each = _each("nvmlDeviceGetMemoryInfo", cards)
    return [memory.used / 2**30 for memory in each] if None not in each and len(each) == cards else []


def memory_used_gib(cards: int = 1) -> float | None:
    """The same of all of them together; None when one cannot be read."""
    return sum(each) if (each := memory_used_each_gib(cards)) else None


def memory_gib() -> float | None:
    """The memory of the first GPU in GiB; None without one that can be read."""
    memory = next(iter(_each("nvmlDeviceGetMemoryInfo", 1)), None)
    return memory.total / 2**30 if memory else None


def gpu_uuids(cards: int = 1) -> list[str | None]:
    """The names under which the first `cards` GPUs are known everywhere; None for one that cannot be read."""
    return _each("nvmlDeviceGetUUID", cards)


def occupants(cards: int = 1) -> dict[int, float | None]:
    """Who computes on the first `cards` GPUs: by pid the GPU memory in GiB, None where NVML does not tell. In a container it may
    show none, or pids of the host."""
    # Some drivers do not tell (None); the memory in use still does.
    listed = _each("nvmlDeviceGetComputeRunningProcesses", cards)
    found: dict[int, float | None] = {}
    for process in (process for each in listed for process in each or ()):
        # All bits set is NVML's "not available".
        used = process.usedGpuMemory
        used = used if used is not None and used < 2**60 else None
        held = found.get(process.pid, 0.0)
        found[process.pid] = None if None in (used, held) else held + used / 2**30
    return dict(sorted(found.items()))


class GpuReader:
    """Reads the server's `cards`, the first GPUs, again and again, with NVML initialised once: what they are together, and
    of several cards each one's too. Without a GPU it reads nothing."""

    COLUMNS = ("gpu_util", "gpu_memory_util", "gpu_power_w", "gpu_sm_mhz", "gpu_clock_reasons")
    COLUMNS += ("gpu_energy_j", "gpu_memory_gib", "gpu_power_limit_w")
    _SUMS = frozenset({"gpu_power_w", "gpu_energy_j", "gpu_memory_gib", "gpu_power_limit_w"})

    def __init__(self, cards: int = 1):
        self.cards = cards

    @property
    def columns(self) -> list[str]:
        """`COLUMNS`, and behind them those of each of several cards: "gpu_util 0", "gpu_util 1", …"""
        each = [f"{column} {card}" for card in range(self.cards) for column in self.COLUMNS] if self.cards > 1 else []
        return [*self.COLUMNS, *each]

    def __enter__(self) -> "GpuReader":
        self._stack = contextlib.ExitStack()
        self._nvml = self._stack.enter_context(_nvml())
        self._chosen = [handle for _, handle in list(_visible(self._nvml).values())[: self.cards]]
        return self

    def __exit__(self, *exc) -> None:
        self._stack.close()

    def read(self, slow: bool = True) -> dict[str, float]:
        """`COLUMNS` that all cards answer: shares 0 to 1, W, MHz, the reasons for the clock (bits, see
        `metrics.resources.clock`), J since the driver was loaded, GiB, the enforced power limit in W. Of several cards W, J
        and GiB are sums, shares and MHz means, and a reason is one that any of them has. Without `slow` only what changes
        quickly, the first five: each question costs the driver's time."""
        each = [self._card(handle, slow) for handle in self._chosen]
        if len(each) < 2:
            return each[0] if each else {}
        together = {}
        for column in each[0].keys() & set.intersection(*(set(one) for one in each)):
            values = [one[column] for one in each]
            if column == "gpu_clock_reasons":
                together[column] = functools.reduce(operator.or_, values)
            else:
                together[column] = sum(values) / (1 if column in self._SUMS else len(values))
        return together | {f"{column} {card}": value for card, one in enumerate(each) for column, value in one.items()}

    def _card(self, handle, slow: bool) -> dict[str, float]:
        nvml, row = self._nvml, {}
        if util := _answer(nvml, nvml.nvmlDeviceGetUtilizationRates, handle):
            row |= {"gpu_util": util.gpu / 100, "gpu_memory_util": util.memory / 100}
        row["gpu_power_w"] = _answer(nvml, nvml.nvmlDeviceGetPowerUsage, handle, per=1e3)
        row["gpu_sm_mhz"] = _answer(nvml, nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_SM)
        row["gpu_clock_reasons"] = _answer(nvml, nvml.nvmlDeviceGetCurrentClocksEventReasons, handle)
        if slow:
            memory = _answer(nvml, nvml.nvmlDeviceGetMemoryInfo, handle)
            row["gpu_memory_gib"] = memory and memory.used / 2**30
            row["gpu_energy_j"] = _answer(nvml, nvml.nvmlDeviceGetTotalEnergyConsumption, handle, per=1e3)
            row["gpu_power_limit_w"] = _answer(nvml, nvml.nvmlDeviceGetEnforcedPowerLimit, handle, per=1e3)
        return {column: value for column, value in row.items() if value is not None}


def _answer(nvml, question, *args, per: float = 1):
    """What NVML answers, in units of `per`; None when it does not."""
    try:
        answer = question(*args)
    except nvml.NVMLError:
        return None
    return answer if per == 1 else answer / per


def _each(question: str, cards: int | None = None) -> list:
    """What NVML answers to `question` (a function's name) of each of the first `cards` visible GPUs, or of all; None
    for one that it does not answer of. Empty without a GPU or driver."""
    with _nvml() as nvml:
        chosen = list(_visible(nvml).values())[:cards]
        return [_answer(nvml, getattr(nvml, question), handle) for _, handle in chosen]


def _all(nvml) -> list[tuple]:
    """(index, handle) of every GPU that is there."""
    indices = range(_answer(nvml, nvml.nvmlDeviceGetCount) or 0)
    found = ((index, _answer(nvml, nvml.nvmlDeviceGetHandleByIndex, index)) for index in indices)
    return [(index, handle) for index, handle in found if handle is not None]


def _visible(nvml) -> dict[str, tuple]:
    """(index, handle) of each GPU that a server started here would see, in its order, by its name in
    CUDA_VISIBLE_DEVICES, which NVML itself ignores; none without NVML."""
    there = dict(_all(nvml)) if nvml else {}
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return {str(index): (index, handle) for index, handle in there.items()}
    by_uuid = chosen.startswith("GPU-")
    uuids = {i: _answer(nvml, nvml.nvmlDeviceGetUUID, handle) or "" for i, handle in there.items()} if by_uuid else {}
    return {name: (index, there[index]) for name, index in visible_devices(chosen, list(there), uuids).items()}


def visible_devices(chosen: str, indices: Sequence[int], uuids: Mapping[int, str]) -> dict[str, int]:
    """What CUDA makes of CUDA_VISIBLE_DEVICES on a machine with GPUs of these `indices` and `uuids`: index by name.
    Numbers, or UUIDs as far as they tell one GPU from the others. What follows a GPU that is not there is not visible;
    one that is named twice leaves none (as torch/cuda/__init__.py, _parse_visible_devices, has it)."""
    named: list[str | int] = []
    for part in chosen.split(","):
        number = re.match(r"\+?\d+", part.strip())
        if chosen.startswith("GPU-") and part.startswith("GPU-"):
            named.append(part)
        elif not chosen.startswith("GPU-") and number:
            named.append(int(number[0]))
        else:
            break
    found: dict[str, int] = {}
    for name in named if len(set(named)) == len(named) else ():
        meant = [index for index in indices if index == name or uuids.get(index, "").startswith(str(name))]
        if len(meant) != 1:
            break
        found[str(name)] = meant[0]
    return found if len(set(found.values())) == len(found) else {}
