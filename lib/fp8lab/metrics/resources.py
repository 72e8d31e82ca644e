"""What a level cost: telemetry summed up, energy for each token and each request. Pure functions on tables."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from .performance import completed


def summarize_usage(
    telemetry: pd.DataFrame, records: pd.DataFrame, window: tuple[float, float]
) -> dict[str, float | None]:
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
    usage["preemptions"] = _increase(run["preemptions"])
    held = clock(telemetry, window)
    usage |= {
        "gpu_power_limit_w": held.limit_w,
        "power_limited_steady": held.by_power,
        "heat_limited_steady": held.by_heat,
    }
    integral = _integral(_known_samples(telemetry, "gpu_power_w"), *span)
    counted = _counted(_known_samples(telemetry, "gpu_energy_j"), _known_samples(telemetry, "gpu_power_w"), *span)
    energy = integral if counted is None else counted
    tokens = int(done["output_tokens"].sum())
    return usage | {
        "energy_j": counted,
        "energy_integral_j": integral,
        "joules_per_output_token": energy / tokens if energy and tokens else None,
        "joules_per_request": energy / len(done) if energy and len(done) else None,
    }


def _known_samples(telemetry: pd.DataFrame, column: str) -> tuple[np.ndarray, np.ndarray]:
    """(times, values) of a column where it was sampled."""
    known = telemetry[["at_s", column]].dropna().to_numpy(float)
    return known[:, 0], known[:, 1]


def _integral(power: tuple[np.ndarray, np.ndarray], begin: float, end: float) -> float | None:
    """The integral of power samples from `begin` to `end`; None when fewer than two lie between or nothing completed."""
    times, values = power
    inside = times[(times > begin) & (times < end)]
    if inside.size < 2:
        return None
    at = np.concatenate([[begin], inside, [end]])
    return float(np.trapezoid(np.interp(at, times, values), at))


def _counted(
    counter: tuple[np.ndarray, np.ndarray], power: tuple[np.ndarray, np.ndarray], begin: float, end: float
) -> float | None:
    """How much a counter, read once a second, rose from `begin` to `end`. What lies beyond its first or last reading, up
    to a second, is the power samples': taken as no rise it would lose a few percent of a short level."""
    times, values = counter
    if times.size < 2 or not begin < end:
        return None
    first, last = np.clip([begin, end], times[0], times[-1])
    rise = float(np.diff(np.interp([first, last], times, values))[0])
    edges = (_edge(power, begin, first), _edge(power, last, end))
    return None if rise <= 0 or None in edges else rise + sum(edges)


def _edge(power: tuple[np.ndarray, np.ndarray], begin: float, end: float) -> float | None:
    if end <= begin:
        return 0.0
    return (end - begin) * float(np.interp([begin, end], *power).mean()) if power[0].size else None


def _increase(counter: pd.Series) -> float | None:
    known = counter.dropna()
    return float(known.iloc[-1] - known.iloc[0]) if len(known) > 1 else None


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
        held = [
            f"{what} held the clock back in {share:.0%} of the samples"
            for what, share in (("the power limit", self.by_power), ("heat", self.by_heat))
            if share
        ]
        if self.by_power is None and (self.at_limit or 0.0) >= MOST:
            held.append(f"consistent with the power limit: within 3 % of it in {self.at_limit:.0%} of the samples")
        return f"{reading} ({'; '.join(held)})" if held else reading


def clock(telemetry: pd.DataFrame, window: tuple[float, float], limit_w: float | None = None) -> Clock:
    """The clock over `window` (s). `limit_w` stands in where the limit was not sampled: the datasheet's."""
    inside = telemetry[telemetry["at_s"].between(*window)]

    def mean(column: str) -> float | None:
        known = inside[column].dropna() if column in inside else ()
        return float(known.mean()) if len(known) else None

    def share(bits: int) -> float | None:
        known = inside["gpu_clock_reasons"].dropna() if "gpu_clock_reasons" in inside else ()
        return float(np.mean((known.to_numpy(np.int64) & bits) != 0)) if len(known) else None

    limit_w = mean("gpu_power_limit_w") or limit_w
    power = inside["gpu_power_w"].dropna()
    return Clock(
        mhz=mean("gpu_sm_mhz"), fastest_mhz=telemetry["gpu_sm_mhz"].max(), power_w=mean("gpu_power_w"), limit_w=limit_w,
        by_power=share(POWER), by_heat=share(HEAT),
        at_limit=float((power >= _AT_LIMIT * limit_w).mean()) if limit_w and len(power) else None,
    )  # fmt: skip
