"""What a level cost: telemetry summed up, energy for each token and each request. Pure functions on tables."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from .metrics import completed, steady_window


def summarize_usage(
    telemetry: pd.DataFrame, records: pd.DataFrame, tokens: pd.DataFrame | None = None
) -> dict[str, float | None]:
    """Means over the steady window, maxima and energy over the whole run; what was not sampled is None.

    `energy_j` integrates the power samples from the first request to the last token (trapezoids);
    `energy_counter_j` is the GPU's own counter over the same time, as a check.
    """
    begin, end = steady_window(records, tokens, telemetry)
    steady = telemetry[telemetry["at_s"].between(begin, end)]
    done = completed(records)
    run = telemetry[telemetry["at_s"].between(records["sent_s"].min(), done["last_token_s"].max())]
    means = ["gpu_util", "gpu_memory_util", "gpu_power_w", "gpu_sm_mhz", "running", "waiting", "kv_cache_usage"]
    means += [f"{role}_{what}" for role in ("frontend", "engine", "client") for what in ("cpu", "cpu_max")]
    usage = {f"{column}_steady": _known(steady[column].mean()) for column in means}
    usage |= {
        f"{column}_max": _known(run[column].max())
        for column in ("running", "waiting", "kv_cache_usage", "gpu_memory_gib")
    }
    usage["preemptions"] = _increase(run["preemptions"])
    energy = _integral(run[["at_s", "gpu_power_w"]].dropna())
    tokens = int(done["output_tokens"].sum())
    return usage | {
        "energy_j": energy,
        "energy_counter_j": _between(telemetry[["at_s", "gpu_energy_j"]].dropna(), run["at_s"]),
        "joules_per_output_token": energy / tokens if energy and tokens else None,
        "joules_per_request": energy / len(done) if energy and len(done) else None,
    }


def frontend_us_per_token(summary: Mapping) -> float | None:
    """CPU time that the front-end processes used for each output token of the steady window, in µs.

    Its inverse is what one core of this host can stream: a host's figure, whatever the GPU.
    """
    cores, tokens = summary.get("frontend_cpu_steady"), summary.get("steady_output_token_throughput")
    return cores * 1e6 * summary["time_dilation"] / tokens if cores and tokens else None


def _integral(power: pd.DataFrame) -> float | None:
    return float(np.trapezoid(power["gpu_power_w"], power["at_s"])) if len(power) > 1 else None


def _increase(counter: pd.Series) -> float | None:
    known = counter.dropna()
    return float(known.iloc[-1] - known.iloc[0]) if len(known) > 1 else None


def _between(counter: pd.DataFrame, at: pd.Series) -> float | None:
    """How much a counter, read less often than the rest, rose from the first instant of `at` to the last."""
    if len(counter) < 2 or at.empty:
        return None
    times, values = counter.to_numpy(float).T
    return float(np.diff(np.interp([at.iloc[0], at.iloc[-1]], times, values))[0])


def _known(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
