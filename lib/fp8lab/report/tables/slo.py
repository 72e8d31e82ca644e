"""Which rates meet a service-level objective (SLO), and how many cards a load needs."""

import math
from statistics import fmean

from ...errors import BadInput
from ...metrics.slo import OBJECTIVES, SLO, attains
from ...results.evidence import evidence
from ...results.run_folder import Run
from ...ui.table import Table
from ...ui.text import shown
from ..caption import card_note


def attainment_table(run: Run, slo: SLO) -> Table:
    """Which levels meet a service-level objective, and why not."""
    seen, rows = evidence(run), []
    for level_id, s in seen.summaries.items():
        if math.isfinite(s.level.rate) and (level := seen.level(level_id)):
            found = attains(level.records, slo)
            rows.append((level_id, shown(s.p99_ttft_ms), shown(s.p99_tpot_ms, ",.1f"), found.state, found.reason))
    columns = ("level", "TTFT p99 ms", "TPOT p99 ms", "objective", "because")
    return Table(f"{card_note(run)}{slo}, run {run.path.name}", columns, rows)


def slo_table(run: Run, objectives=OBJECTIVES) -> Table:
    """For each variant and objective the rates between which its SLO limit lies."""
    seen = evidence(run)
    rows = [(variant, *(str(seen.slo_limit(variant, slo)) for slo in objectives)) for variant in seen.variants()]
    caption = (
        f"{card_note(run)}The highest rate that meets the objective lies between (req/s), run {run.path.name}; with "
        "several seeds a rate counts as met when all that are long enough to tell meet it"
    )
    return Table(caption, ("variant", *(slo.name for slo in objectives)), rows)


def capacity_plan(run: Run, slo: SLO, target_rate: float, headroom: float = 0.2) -> Table:
    """Cards for `target_rate` requests/s under `slo`, keeping `headroom` (0 to 1) of each card free.

    Planned with the highest rate that was shown to meet the objective; tokens a joule are those measured at that rate.
    Raises BadInput for a rate or a headroom that cannot be.
    """
    if not (target_rate > 0 and math.isfinite(target_rate) and 0 <= headroom < 1):
        raise BadInput(
            f"target_rate {target_rate} must be a number of requests/s above 0, headroom {headroom} from 0 to below 1"
        )
    seen, rows = evidence(run), []
    for variant in seen.variants():
        low = seen.slo_limit(variant, slo).low
        if low == 0:
            rows.append((variant, "none shown", *["–"] * 4))
            continue
        usable = low * (1 - headroom)
        tokens = fmean(s.output_tokens / s.completed for s in seen.levels((variant,), low).values() if s.completed)
        joules = seen.seeds(variant, low, "joules_per_output_token")
        rows.append((
            variant, f"{low:g}", f"{usable:.1f}", f"{math.ceil(target_rate / usable)}",
            f"{tokens * usable * 3600 / 1e6:.1f}", f"{1 / fmean(joules.values()):.1f}" if joules else "–",
        ))  # fmt: skip
    columns = ("variant", "shown to meet it, req/s", "planned, req/s a card", "cards", "million tokens a card-hour")
    caption = (
        f"{card_note(run)}Cards for {target_rate:g} req/s, {slo}, {headroom:.0%} of each kept free; run {run.path.name}"
    )
    return Table(caption, (*columns, "tokens a joule at that rate"), rows)
