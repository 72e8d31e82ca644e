"""The card's clock over a stretch of time, and what held it back. Pure functions on telemetry.

A card at its power limit lowers its clock: what it then computes a second says as much of its cooling and its limit as of
the work. The bits are NVML's (nvml.h, nvmlClocksEventReason*).
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

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
