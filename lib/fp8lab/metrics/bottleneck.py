"""What limited a level: the offered load, the client, the API server, the EngineCore, the GPU (its power limit, where
that held its clock back), or the KV cache.

A number is the GPU's only where the GPU was the limit. The order of the questions matters: a client or a front
end that is full starves what comes behind it, so it is asked first.
"""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ..config.profile import RUST
from .performance import completed, concurrency_over_time
from .resources import Clock, Roofline, Window, clock
from .summary import Summary

CAUSES = (
    "offered load", "client", "API server", "EngineCore", "GPU and EngineCore", "GPU power limit", "GPU, nearer compute",
    "GPU, nearer memory", "KV capacity",
)  # fmt: skip

# In flight may grow by this share of the offered rate and still count as keeping up: Poisson arrivals do that much.
_GROWTH = 0.05
# So many times as long as the slow requests take, a level goes on for long enough that the ramp lies in its first half.
RAMP_OVER = 2.0
# One process can use one core; a sample of half a second is a little off.
_FULL = 0.95
_CLIENT_FULL = 0.90
_ENGINE_WORKS = 0.5
# A few preemptions at a peak do not make the KV cache the limit: more than this many a request do.
PREEMPTED = 0.01
# An API server that is in the way holds requests back: this share of those in flight is not in the EngineCore. An API server
# that merely streams what a full GPU makes is as busy and holds none.
_HELD = 0.05
# NVML counts time with a kernel on the GPU. Above the first the GPU never waited; below the second the steps' host
# side is the longer one, since vLLM prepares the next step while the GPU computes this one.
_GPU_FULL, _GPU_WAITS = 0.95, 0.85


@dataclass(frozen=True)
class Limit:
    """What limited a level (one of `CAUSES`, or "unknown") and the evidence in a sentence."""

    cause: str
    evidence: str


def backlog_growth(records: pd.DataFrame) -> float:
    """How fast requests in flight grew while they still arrived, as a share of the offered rate.

    The slope of a line through the number in flight over the second half of the arrivals, divided by their rate, less
    what belongs to the ramp: requests that take long are still joining then, whatever the server. About 0 for a server
    that keeps up, 1 - capacity / rate for one that does not. Failed requests are left out. nan for all at once.
    """
    done = completed(records)
    arrivals = np.sort(done["scheduled_s"].to_numpy(float))
    duration = arrivals[-1] if arrivals.size else 0.0
    if duration <= 0:
        return math.nan
    at = np.linspace(duration / 2, duration, 400)
    left = np.sort(done["last_token_s"].to_numpy(float))
    in_flight = np.searchsorted(arrivals, at, side="right") - np.searchsorted(left, at, side="right")
    slope = float(np.polyfit(at, in_flight, 1)[0] / (arrivals.size / duration))
    # In flight after t seconds of a stationary server: rate x integral of P(stay > u), u up to t. Its slope is what a
    # ramp alone would give.
    stay = np.sort(_early_stays(done))
    ramp = float((1 - np.searchsorted(stay, at, side="right") / stay.size).mean()) if stay.size else 0.0
    return slope - ramp


def growth_by_chance(records: pd.DataFrame) -> float:
    """What `backlog_growth` may be of a server that keeps up, by the chance of its arrivals: two standard errors of the
    slope. Of Poisson arrivals at a rate r that stay for S the number in flight has autocovariances that sum to r E[S²]
    (M/G/∞), so that a slope over w seconds has the variance 12 r E[S²] / w³. 0 for all at once."""
    done = completed(records)
    duration = done["scheduled_s"].max() if len(done) else 0.0
    stays = _early_stays(done)
    if not duration:
        return 0.0
    if not stays.size:  # too few requests to tell anything
        return math.inf
    return 2 * math.sqrt(12 * float((stays**2).mean()) / (len(done) / duration * (duration / 2) ** 3))


def _early_stays(done: pd.DataFrame) -> np.ndarray:
    """How long (s) requests stayed that came in the first third, before a backlog lengthened it."""
    return (done["last_token_s"] - done["sent_s"])[done["scheduled_s"] <= done["scheduled_s"].max() / 3].to_numpy(float)


def lasted(records: pd.DataFrame) -> float:
    """How many times as long as its slowest requests (p99) took a level's arrivals went on; 0 when nothing completed."""
    done = completed(records)
    stay = (done["last_token_s"] - done["sent_s"]).to_numpy(float)
    return float(done["scheduled_s"].max() / np.quantile(stay, 0.99)) if stay.size else 0.0


def keeps_up(records: pd.DataFrame) -> bool | None:
    """Whether the server kept up with the offered load: its backlog did not grow. None where it grew no more than chance makes
    it in a level so short. False for all at once, and where slow requests stay longer than the level lasts: the ramp that is
    taken from the growth then holds the backlog."""
    growth, times = backlog_growth(records), lasted(records)
    if growth <= _GROWTH and times >= 1:
        return True
    # Where requests stay nearly as long as the level lasts, a backlog has lengthened the early ones too.
    return None if times >= RAMP_OVER and growth <= growth_by_chance(records) else False


def held_by_api_server(records: pd.DataFrame, telemetry: pd.DataFrame | None, window: Window) -> float | None:
    """The share (0 to 1) of the requests in flight that the EngineCore neither runs nor queues, over the steady window (s):
    they wait for the API server, on their way in or with their last tokens on the way out. None when it was not sampled."""
    if telemetry is None:
        return None
    known = telemetry[["at_s", "running", "waiting"]].dropna()
    known = known[known["at_s"].between(*window)]
    times, counts = concurrency_over_time(records)
    if known.empty or not times.size:
        return None
    at = np.searchsorted(times, known["at_s"].to_numpy(float), side="right") - 1
    in_flight = float(np.where(at >= 0, counts[at], 0).sum())
    in_engine = float((known["running"] + known["waiting"]).sum())
    return max(0.0, 1 - in_engine / in_flight) if in_flight else None


def what_limited(
    summary: Summary, records: pd.DataFrame, telemetry: pd.DataFrame | None = None, roofline: Roofline | None = None,
    power_limit_w: float | None = None,
) -> Limit:  # fmt: skip
    """The limit of a level, from its summary (with the means of `summarize_usage`), records and telemetry.
    `power_limit_w` is the datasheet's, for a level whose enforced limit was not sampled."""
    if not summary.valid:
        return Limit("unknown", f"the level is invalid: {summary.invalid_reason}")
    growth = backlog_growth(records)
    kept_up = keeps_up(records) is not False
    window = summary.window
    held = held_by_api_server(records, telemetry, window)
    ran = clock(telemetry, window, power_limit_w) if telemetry is not None else None
    used = _told(summary, ran, held, roofline)
    # vLLM's API server in Rust computes on many threads: that it is full shows in what it holds back alone.
    threads = summary.server is not None and summary.server.environment.get(RUST, "0") != "0"
    holds_none = held is not None and held < _HELD
    frontend_full = (summary.frontend_cpu_max_steady or 0) >= _FULL and not (threads and holds_none)
    if (summary.client_busiest_core or 0) > _CLIENT_FULL:
        return Limit("client", f"a client process used {summary.client_busiest_core:.2f} of a core")
    if kept_up and not frontend_full:
        grew = "no backlog grew" if growth <= _GROWTH else "in flight grew no more than chance makes it"
        return Limit("offered load", f"{grew} while {used}")
    if kv := _kv_full(summary, telemetry):
        return Limit("KV capacity", kv)
    trend = "it just kept up" if kept_up else f"in flight grew by {growth:.0%} of the offered rate"
    trend = "slow requests stayed for longer than all arrivals took" if growth <= _GROWTH and not kept_up else trend
    trend = "all were sent at once" if math.isnan(growth) else trend
    evidence, gpu = f"{trend}; {used}", summary.gpu_util_steady
    if frontend_full and not (gpu is not None and gpu >= _GPU_FULL and holds_none):
        return Limit("API server", evidence)
    if gpu is None:
        return Limit("unknown", f"{evidence}; no GPU was sampled")
    if gpu < _GPU_WAITS:
        # Steps are launched by the EngineCore alone: a GPU that idles while requests run waits for it. One that
        # idles most of the time itself waits for something that was not sampled.
        engine = summary.engine_cpu_max_steady or 0
        busy = engine >= _FULL or (engine >= _ENGINE_WORKS and (summary.running_steady or 0) >= 1)
        return Limit("EngineCore" if busy else "unknown", evidence)
    if gpu < _GPU_FULL:
        return Limit("GPU and EngineCore", evidence)
    if ran and ran.power_limited:
        return Limit("GPU power limit", evidence)
    return Limit(f"GPU, nearer {roofline.nearest if roofline else 'compute'}", evidence)


def _told(summary: Summary, ran: Clock | None, held: float | None, roofline: Roofline | None) -> str:
    """The shares of the steady window, in words."""
    names, gpu = {"frontend": "API server", "engine": "EngineCore", "client": "client"}, summary.gpu_util_steady
    cores = {name: getattr(summary, f"{role}_cpu_max_steady") for role, name in names.items()}
    parts = ", ".join(f"{name} {share:.2f}" for name, share in cores.items() if share is not None)
    told = "; ".join(filter(None, (
        f"the GPU had no kernel running {1 - gpu:.0%} of the time" if gpu is not None else "",
        str(ran or ""),
        f"the busiest process of each kind used, in cores: {parts}" if parts else "",
        f"{held:.0%} of the requests in flight were not in the EngineCore" if held is not None else "",
    ))) or "nothing was sampled"  # fmt: skip
    if roofline is None:
        return told
    return f"{told}; the tokens needed about {roofline.compute:.0%} of its matrix peak and {roofline.memory:.0%} of its bandwidth"


def _kv_full(summary: Summary, telemetry: pd.DataFrame | None) -> str:
    """Evidence that the KV cache was full; empty when it was not."""
    preempted = summary.preemptions or 0
    if preempted > PREEMPTED * summary.requests:
        return f"{preempted:.0f} preemptions for want of KV blocks"
    if telemetry is not None:
        known = telemetry[["waiting", "kv_cache_usage"]].dropna()
        waited = ((known["waiting"] > 0) & (known["kv_cache_usage"] >= _FULL)).mean() if len(known) else 0
        if waited > 0.1:
            return f"requests waited while the KV cache was at least {_FULL:.0%} full in {waited:.0%} of the samples"
    return ""
