"""What a level cost: telemetry summed up, energy for each token and each request, the card's clock, and how far it was from
what the card can physically do; and what fits on a card before anything is started. Pure functions."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from ..config.dimensions import ModelShape, WeightFormat
from ..config.profile import Card
from .performance import completed

Samples = np.ndarray  # (2, n): times and values of a column where it was sampled
Window = tuple[float, float]  # (begin, end) of a span


def summarize_usage(telemetry: pd.DataFrame, records: pd.DataFrame, window: Window) -> dict[str, float | None]:
    """The fields of `summary.Summary` that follow from telemetry: means over the steady `window` (s), maxima and energy over
    the whole run; what was not sampled is None.

    `energy_j` is what the GPU's own counter rose by from the first request to the last token; `energy_integral_j`, its
    check, integrates the power samples over the same time (trapezoids). Joules a token and a request are the counter's,
    and the integral's on a card that has no counter.
    """
    steady = telemetry[telemetry["at_s"].between(*window)]
    done = completed(records)
    span = (records["sent_s"].min(), done["last_token_s"].max())
    run = telemetry[telemetry["at_s"].between(*span)]
    means = ["gpu_util", "gpu_power_w", "gpu_sm_mhz", "running", "frontend_cpu"]
    means += [f"{role}_cpu_max" for role in ("frontend", "engine", "client")]
    usage = {f"{column}_steady": _known(steady[column].mean()) for column in means}
    usage |= {f"{column}_max": _known(run[column].max()) for column in ("running", "kv_cache_usage", "gpu_memory_gib")}
    # Counted from the reading before the first request on: most of a burst's happen in its first second.
    preempted, held = telemetry["preemptions"].dropna(), clock(telemetry, window)
    power, counter = (telemetry[["at_s", name]].dropna().to_numpy(float).T for name in ("gpu_power_w", "gpu_energy_j"))
    integral, counted = _integral(power, *span), _counted(counter, power, *span)
    energy = integral if counted is None else counted
    tokens = int(done["output_tokens"].sum())
    return usage | {
        "preemptions": float(preempted.iloc[-1] - preempted.iloc[0]) if len(preempted) > 1 else None,
        "gpu_power_limit_w": held.limit_w,
        "power_limited_steady": held.by_power,
        "heat_limited_steady": held.by_heat,
        "energy_j": counted,
        "energy_integral_j": integral,
        "joules_per_output_token": energy / tokens if energy and tokens else None,
        "joules_per_request": energy / len(done) if energy and len(done) else None,
    }


def _integral(power: Samples, begin: float, end: float) -> float | None:
    """The integral of power samples from `begin` to `end`; None when fewer than two lie between or nothing completed."""
    times, values = power
    inside = times[(times > begin) & (times < end)]
    if inside.size < 2:
        return None
    at = np.concatenate([[begin], inside, [end]])
    return float(np.trapezoid(np.interp(at, times, values), at))


def _counted(counter: Samples, power: Samples, begin: float, end: float) -> float | None:
    """How much a counter, read once a second, rose from `begin` to `end`. What lies beyond its first or last reading, up
    to a second, is the power samples': taken as no rise it would lose a few percent of a short level."""
    times, values = counter
    if times.size < 2 or not begin < end:
        return None
    first, last = np.clip([begin, end], times[0], times[-1])
    rise = float(np.diff(np.interp([first, last], times, values))[0])
    edges = (_edge(power, begin, first), _edge(power, last, end))
    return None if rise <= 0 or None in edges else rise + sum(edges)


def _edge(power: Samples, begin: float, end: float) -> float | None:
    if end <= begin:
        return 0.0
    return (end - begin) * float(np.interp([begin, end], *power).mean()) if power[0].size else None


def _known(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


# SwPowerCap and HwPowerBrakeSlowdown; SwThermalSlowdown and HwThermalSlowdown.
POWER, HEAT = 0x04 | 0x80, 0x20 | 0x40
# Power is a mean over a second: a card that is held at its limit reads a little less.
_AT_LIMIT = 0.97
MOST = 0.5
_SLOWED = 0.97


@dataclass(frozen=True)
class Clock:
    """Means over a window: `mhz` of the SMs and `power_w`. `limit_w` is the enforced power limit, `fastest_mhz` the highest
    clock that was sampled at any time, in the window or not. `by_power`, `by_heat`:
    the share (0 to 1) of the samples in which NVML named that as what held the clock back; `at_limit`: that in which the
    power read was within 3 % of the limit. None: not sampled."""

    mhz: float | None
    fastest_mhz: float | None
    power_w: float | None
    limit_w: float | None
    by_power: float | None
    by_heat: float | None
    at_limit: float | None

    @property
    def power_limited(self) -> bool:
        """Whether NVML named the power limit in most samples, and it cost more than a little of the clock: a card that
        touches its limit runs as fast as one that does not."""
        return (self.by_power or 0.0) >= MOST and self.mhz is not None and self.mhz < _SLOWED * self.fastest_mhz

    def __str__(self) -> str:
        """A clause on the clock; empty where it was not sampled."""
        if self.mhz is None or self.power_w is None:
            return ""
        limit = f" of {self.limit_w:,.0f} W" if self.limit_w else ""
        reading = f"{self.power_w:,.0f} W{limit} at {self.mhz:,.0f} of {self.fastest_mhz:,.0f} MHz"
        shares = (("the power limit", self.by_power), ("heat", self.by_heat))
        held = [f"{what} held the clock back in {share:.0%} of the samples" for what, share in shares if share]
        if self.by_power is None and (self.at_limit or 0.0) >= MOST:
            held.append(f"consistent with the power limit: within 3 % of it in {self.at_limit:.0%} of the samples")
        return f"{reading} ({'; '.join(held)})" if held else reading


def clock(telemetry: pd.DataFrame, window: Window, limit_w: float | None = None) -> Clock:
    """The clock over `window` (s). `limit_w` stands in where the limit was not sampled: the datasheet's."""
    # A run from before a column existed has it unsampled.
    columns = ["gpu_sm_mhz", "gpu_power_w", "gpu_power_limit_w", "gpu_clock_reasons"]
    inside = telemetry[telemetry["at_s"].between(*window)].reindex(columns=columns)
    mhz, power_w, limit, _ = map(_known, inside.mean())
    power, reasons = inside["gpu_power_w"].dropna(), inside["gpu_clock_reasons"].dropna().astype(np.int64)
    limit_w = limit or limit_w
    return Clock(
        mhz=mhz, fastest_mhz=telemetry["gpu_sm_mhz"].max(), power_w=power_w, limit_w=limit_w,
        by_power=_known((reasons & POWER != 0).mean()), by_heat=_known((reasons & HEAT != 0).mean()),
        at_limit=_known((power >= _AT_LIMIT * limit_w).mean()) if limit_w else None,
    )  # fmt: skip


@dataclass(frozen=True)
class Roofline:
    """Shares (0 to 1) of the memory bandwidth and of the matrix peak, of all cards, that a window's work needed. `bytes_per_s`
    and `flops_per_s` are what was needed; `steps_per_s` how often a batch was computed."""

    memory: float
    compute: float
    bytes_per_s: float
    flops_per_s: float
    steps_per_s: float

    @property
    def intensity(self) -> float:
        """FLOP for each byte."""
        return self.flops_per_s / self.bytes_per_s

    @property
    def nearest(self) -> str:
        """Which of the two limits is the nearer one."""
        return "compute" if self.compute > self.memory else "memory"


def roofline(
    telemetry: pd.DataFrame, window: Window, shape: ModelShape, card: Card, *,
    weights: WeightFormat, fp8_kv: bool, kv_cache_tokens: int, cards: int = 1, replicas: int = 1,
) -> Roofline | None:  # fmt: skip
    """What the work of `window` (s) needed of the card, or of `cards` together, an estimate from the server's own counters (Williams, Waterman and
    Patterson, "Roofline", 2009); None when they were not sampled in it.

    A running request gets one token a step, so between two samples there are as many steps as tokens for each of them, and
    each reads the KV blocks in use and each replica's weights. So counted they are those of vLLM's own counter of steps, where
    that was sampled, within 1 % in bursts and 13 % at lower rates. Left out: what cards tell each other, activations,
    writing the KV cache, the products inside attention (of Llama-3-8B's 1 % at a context of 300 tokens, 9 % at 2,300), and
    whatever the kernels read twice.
    """
    names = ["running", "kv_cache_usage", "prompt_tokens", "generation_tokens"]
    known = telemetry[["at_s", *names]].dropna()
    inside = known[known["at_s"].between(*window)]
    seconds = window[1] - window[0]
    if len(inside) < 2 or not inside["running"].sum():
        return None
    at = np.unique([*window, *inside["at_s"]])
    running, usage, prompts, answers = (np.interp(at, known["at_s"], known[name]) for name in names)
    decoded = np.diff(answers)
    emitted, tokens = decoded.sum(), decoded.sum() + np.ptp(prompts)
    # Of what came in between two samples with none running a token was a step.
    each = decoded / np.maximum(_between(running), 1.0)
    steps = float(each.sum())
    resident = _between(usage) * kv_cache_tokens
    kv_bytes = float((each * resident).sum()) * shape.kv_bytes_per_token(1 if fp8_kv else 2)
    moved = steps * replicas * shape.weight_bytes_read(weights) + kv_bytes
    layers, head = shape.flops(float(tokens), float(emitted))
    return Roofline(
        memory=moved / seconds / card.hbm_bytes_per_s / cards,
        compute=(layers / card.flops(weights.eight_bit) + head / card.flops(weights.head)) / seconds / cards,
        bytes_per_s=moved / seconds,
        flops_per_s=(layers + head) / seconds,
        steps_per_s=steps / seconds,
    )


def _between(values: np.ndarray) -> np.ndarray:
    """The mean of each two values that follow each other."""
    return (values[1:] + values[:-1]) / 2


GIB = 2**30
# What a start takes beside weights and KV cache: CUDA's context and buffers, and the activations of a full step of 8,192
# tokens (gate, up and their product in BF16). With it the recorded starts of Llama-3-8B are met within 1 %.
_FIXED_GIB = 0.7
_ACTIVATIONS = 3 * 2 * 8192


def fit(
    shape: ModelShape, weights: WeightFormat, kv_itemsize: int, card: Card, shared_by: int = 1, *,
    share: float = 0.9,
) -> tuple[float, int]:  # fmt: skip
    """(GiB of weights a card, the KV cache's tokens on all cards together; 0 tokens: it does not fit) of a model that is served in
    a format, with a KV cache of `kv_itemsize` bytes an element, when vLLM may take `share` (0 to 1) of each card."""
    held = shape.weight_bytes(weights) / shared_by
    activations = _ACTIVATIONS * shape.intermediate / shared_by
    left = card.memory_gib * share * GIB - held - activations - _FIXED_GIB * GIB
    # Each card holds the KV heads that it computes; with more cards than heads they are held more than once.
    token = shape.kv_bytes_per_token(kv_itemsize) / min(shared_by, shape.kv_heads)
    return held / GIB, max(0, int(left / token))
