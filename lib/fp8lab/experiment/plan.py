"""How long a measurement will take, before it starts."""

import math
from collections.abc import Sequence

from ..config.profile import Level, Profile
from ..results.run_folder import Run
from ..ui.table import Table
from .speed import missing_work, trace_for

# Rough and on the long side: starts as seen on two cores and on an H100's host (compiling included), the rates at which
# prompts are read and one API server drains what has piled up, and vLLM's client, which imports for long.
_START_S = {"cuda": 140, "emulated": 35, "cpu": 45}
_PROMPT_TOKENS_PER_S = 40_000
_DRAIN_TOKENS_PER_S = 10_000
_TAIL_S = 4
_CROSS_CHECK_START_S = 20


def level_seconds(profile: Profile, level: Level) -> float:
    """About how many wall seconds one level takes, its cross-check included."""
    trace = trace_for(profile, level)
    arrivals = 0.0 if math.isinf(level.rate) else level.requests / level.rate
    work = sum(trace.output_tokens) / _DRAIN_TOKENS_PER_S + sum(trace.prompt_tokens) / _PROMPT_TOKENS_PER_S
    load = (max(arrivals, work) + _TAIL_S) * profile.time_dilation
    return 2 * load + _CROSS_CHECK_START_S if level.cross_check else load


def plan_table(profile: Profile, protocols: Sequence[str], run: Run | None = None) -> Table:
    """What is to be measured, server by server, with minutes; with a `run`, only what it lacks."""
    work = missing_work(run, profile, protocols)
    caption = f"Plan of profile {profile.name}: {', '.join(protocols)}"
    if not work:
        return Table(caption, ("plan",), [("nothing is left to measure",)])
    rows, total = [], 0.0
    for variant, levels in work:
        seconds = _START_S[profile.device] + sum(level_seconds(profile, level) for level in levels)
        total += seconds
        rates = ", ".join(
            f"{'all at once' if math.isinf(level.rate) else f'{level.rate:g}'}"
            f"{f' (seed {level.repeat})' if level.repeat > 1 else ''}{' + cross-check' if level.cross_check else ''}"
            for level in levels
        )
        start = f", start {levels[0].start}" if levels[0].start else ""
        rows.append((f"{variant}{start}", f"{len(levels)}", rates, f"{seconds / 60:.1f}"))
    rows.append(("together", f"{sum(len(levels) for _, levels in work)}", "", f"{total / 60:.1f}"))
    columns = ("variant (one server each)", "levels", "offered rates, requests/s", "minutes")
    return Table(caption, columns, rows)
