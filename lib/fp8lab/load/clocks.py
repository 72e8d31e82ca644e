"""Whether the machine's clocks ran on during a level: a stepped clock or a suspended machine spoils what was timed."""

import time
from dataclasses import dataclass

# NTP slews by 500 ppm at most; what goes beyond, and beyond a moment's reading, was a step.
_SLEW = 1e-3
_STEP_S = 0.5
_SUSPENDED_S = 0.1


@dataclass(frozen=True)
class Clocks:
    """The machine's clocks at one instant, in seconds. Levels are timed by `monotonic`, which stands still while the
    machine is suspended; `boot` does not; `wall` is what the date says."""

    monotonic: float
    boot: float
    wall: float

    @classmethod
    def now(cls) -> "Clocks":
        return cls(time.monotonic(), time.clock_gettime(time.CLOCK_BOOTTIME), time.time())


def clock_problems(begin: Clocks, end: Clocks) -> list[str]:
    """Why times taken between `begin` and `end` cannot be trusted; empty when they can."""
    elapsed = end.monotonic - begin.monotonic
    suspended = (end.boot - begin.boot) - elapsed
    if suspended > _SUSPENDED_S:
        return [f"the machine was suspended for {suspended:.1f} s during the level"]
    stepped = (end.wall - begin.wall) - elapsed
    if abs(stepped) > _STEP_S + _SLEW * elapsed:
        return [f"the clock was set {abs(stepped):.1f} s {'ahead' if stepped > 0 else 'back'} during the level"]
    return []
