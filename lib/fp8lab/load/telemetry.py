"""What the GPU, the server and the client did while a level ran: sampled by two threads, in one table.

The GPU's shares, power and clock (NVML) are read five times a second, CPU times twice, its memory, energy counter and
power limit and the server's own counters (`/metrics`) once, the latter by a thread of their own: a full API server
answers late, and the other samples must not wait for it. The energy counter is read once more at the end: it then
encloses the level. Verdicts are drawn in `metrics.bottleneck`.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pandas as pd
import psutil

from ..system.gpu import GpuReader

PERIOD_S = 0.2
CPU_PERIOD_S = 0.5
SLOW_PERIOD_S = 1.0
# A sample stands for the time up to the next one, if that comes within so many periods: a busy machine is often late.
_LATE = 3
# Verdicts tell a share of 0.85 from one of 0.95 (`metrics.bottleneck`). What nobody saw may have been anything, so
# more of it than lies between the two leaves a mean on either side.
_UNSEEN = 0.10
# The server's answer is waited for 4 s (`server.launch.ask`); a thread that takes longer to end hangs.
_END_S = 10.0

# vLLM's counters and gauges by the column that takes them; several EngineCores are summed, their KV caches' shares averaged.
SERVER_COLUMNS = {
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
    "vllm:kv_cache_usage_perc": "kv_cache_usage",
    "vllm:num_preemptions_total": "preemptions",
    "vllm:prompt_tokens_total": "prompt_tokens",
    "vllm:generation_tokens_total": "generation_tokens",
    "vllm:iteration_tokens_total_count": "iterations",
}
ROLES = ("frontend", "engine", "client")
# What verdicts rest on: the column, who is asked for it, how often.
_WATCHED = (
    ("gpu_util", "the GPU's load", PERIOD_S),
    ("gpu_power_w", "the GPU's power", PERIOD_S),
    ("gpu_energy_j", "the GPU's energy counter", SLOW_PERIOD_S),
    ("gpu_sm_mhz", "the GPU's clock", SLOW_PERIOD_S),
    ("frontend_cpu", "the front end's CPU time", CPU_PERIOD_S),
    ("engine_cpu", "the engine's CPU time", CPU_PERIOD_S),
    ("running", "the server's /metrics", SLOW_PERIOD_S),
)


class Telemetry:
    """Samples while its `with` block runs; `table(start)` is what it saw. `server_pids` are the server's processes,
    `metrics` returns its `/metrics` text (or raises OSError), `cards` is how many GPUs it has."""

    def __init__(
        self,
        server_pids: Iterable[int],
        metrics: Callable[[], str] | None = None,
        time_dilation: float = 1.0,
        cards: int = 1,
    ):
        self._server = _by_role(server_pids)
        self._metrics = metrics
        self._dilation = time_dilation
        self._gpu = GpuReader(cards)
        self._rows: list[dict] = []
        self._stop = threading.Event()
        self._cpu_s: list[float] = []
        self._ended: list[str] = []
        self._answered, self._unanswered = False, ""
        self._threads = [
            threading.Thread(target=self._timed, args=(sample, what), name=f"telemetry of {what}", daemon=True)
            for sample, what in ((self._sample_machine, "the machine"), (self._sample_server, "the server"))
        ]
        self._last_cpu: dict[int, tuple[float, float]] = {}
        self._workers: list[psutil.Process] = []
        self.cpu_share = 0.0

    def __enter__(self) -> "Telemetry":
        self._began = time.monotonic()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_exc) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(_END_S)
            if thread.is_alive():
                self._ended.append(f"{thread.name} hung")
        self.cpu_share = sum(self._cpu_s) / (time.monotonic() - self._began)

    def table(self, start: float) -> pd.DataFrame:
        """One row a sample, in model time. Columns: at_s; gpu_util and gpu_memory_util (0 to 1), gpu_power_w,
        gpu_sm_mhz, gpu_clock_reasons (NVML's bits), gpu_energy_j (a counter), gpu_memory_gib, gpu_power_limit_w, of
        several cards together and of each ("gpu_util 0", …); running, waiting, kv_cache_usage (0 to 1), preemptions,
        prompt_tokens, generation_tokens, iterations (counters; one is a step of the EngineCore); for frontend, engine
        and client <role>_cpu (cores) and <role>_cpu_max (cores of the busiest process). nan: not sampled then."""
        columns = ["at_s", *self._gpu.columns, *SERVER_COLUMNS.values()]
        columns += [f"{role}_{what}" for role in ROLES for what in ("cpu", "cpu_max")]
        table = pd.DataFrame(list(self._rows), columns=columns).astype("float64")
        table["at_s"] = (table["at_s"] - start) / self._dilation
        return table.sort_values("at_s", ignore_index=True)

    def problems(self, table: pd.DataFrame, windows: Sequence[tuple[float, float]]) -> list[str]:
        """Why this telemetry cannot say what limited the level, in words; empty when it can.

        `table` is that of `table()`; each of `windows` is a (begin, end) in its time of which means are taken. A thread
        that failed is always told; a source that fell silent, when that leaves more than a tenth of a window unseen.
        What never was there to be sampled (no GPU, statistics switched off) is no fault: verdicts then say so.
        """
        said = list(self._ended)
        for column, who, period in _WATCHED:
            seen = table.loc[table[column].notna(), "at_s"].to_numpy()
            why = self._unanswered if column == "running" else ""
            if seen.size or (why and not self._answered):
                late = _LATE * period / self._dilation
                unseen = max((_unseen(seen, *window, late) for window in windows), default=0.0)
                if unseen > _UNSEEN:
                    said.append(f"{who} gave no sample for {unseen:.0%} of the time{f' ({why})' if why else ''}")
        return [f"what limited the level was not watched: {one}; measure it again" for one in said]

    def _timed(self, sample: Callable[[], None], what: str) -> None:
        try:
            sample()
        except BaseException as error:  # nothing else would tell: a thread's end is nobody's exception
            self._ended.append(f"telemetry of {what} ended with {error!r}")
        finally:
            self._cpu_s.append(time.thread_time())

    def _sample_machine(self) -> None:
        next_slow, next_cpu = 0.0, 0.0
        with self._gpu as gpu:
            while True:
                now = time.monotonic()
                slow = now >= next_slow
                row = {"at_s": now} | gpu.read(slow)
                # Twice a second and no oftener: CPU time is counted in ticks of 10 ms.
                if now >= next_cpu:
                    next_cpu = now + CPU_PERIOD_S
                    row |= self._cpu(now)
                if slow:
                    next_slow = now + SLOW_PERIOD_S
                self._rows.append(row)
                if self._stop.wait(max(0.0, PERIOD_S - (time.monotonic() - now))):
                    self._rows.append({"at_s": time.monotonic()} | gpu.read())
                    break

    def _sample_server(self) -> None:
        while self._metrics:
            asked = time.monotonic()
            try:
                counters = parse_metrics(self._metrics())
                self._rows.append({"at_s": time.monotonic()} | counters)
                self._answered = True
            except OSError as error:
                self._unanswered = str(error)
            if self._stop.wait(max(0.0, SLOW_PERIOD_S - (time.monotonic() - asked))):
                break

    def _cpu(self, now: float) -> dict[str, float]:
        row = {}
        # Looking for them reads all of /proc; they start before the level and stay.
        self._workers = self._workers or _load_workers()
        for role, processes in (*self._server.items(), ("client", self._workers)):
            shares = [share for share in (self._share(process, now) for process in processes) if share is not None]
            if shares:
                row |= {f"{role}_cpu": sum(shares), f"{role}_cpu_max": max(shares)}
        return row

    def _share(self, process: psutil.Process, now: float) -> float | None:
        """Cores used since the last look; None at the first one and after the process has ended."""
        try:
            times = process.cpu_times()
        except psutil.Error:
            return None
        used = times.user + times.system
        before = self._last_cpu.get(process.pid)
        self._last_cpu[process.pid] = (now, used)
        return (used - before[1]) / (now - before[0]) if before else None


def parse_metrics(text: str) -> dict[str, float]:
    """The columns of `SERVER_COLUMNS` that a Prometheus text holds, summed over its label sets; a share is their mean."""
    found: dict[str, list[float]] = {}
    for line in text.splitlines():
        if line.startswith("vllm:") and (column := SERVER_COLUMNS.get(line.partition("{")[0])):
            with contextlib.suppress(ValueError):
                found.setdefault(column, []).append(float(line.rpartition(" ")[2]))
    return {name: sum(each) / (len(each) if name == "kv_cache_usage" else 1) for name, each in found.items()}


def _unseen(at: np.ndarray, begin: float, end: float, late: float) -> float:
    """The share (0 to 1) of `begin` to `end` that lies more than `late` behind the latest sample of `at`."""
    gaps = np.diff(np.concatenate([[begin], at[(at > begin) & (at < end)], [end]]))
    return float(np.clip(gaps - late, 0, None).sum() / (end - begin)) if end > begin else 0.0


def _by_role(pids: Iterable[int]) -> dict[str, list[psutil.Process]]:
    """The server's processes by what they do, from the titles that vLLM gives them."""
    roles: dict[str, list[psutil.Process]] = {"frontend": [], "engine": []}
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            title = " ".join(process.cmdline())
            roles["engine" if "EngineCore" in title or "Worker" in title else "frontend"].append(process)
    return roles


def _load_workers() -> list[psutil.Process]:
    workers = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if any("fp8lab.load.worker" in part for part in child.cmdline()):
                workers.append(child)
    return workers
