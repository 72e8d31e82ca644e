"""From a run to verdicts: the published value, the measured one, and whether the claim holds.

`reproduced`                the measured value is what was claimed, within the tolerance that was fixed beforehand
`reproduced, other cause`   it is, but the stated cause is not: the effect is gone at equal load, or something
                            else than the stated cause was the limit
`not reproduced`            it is not
`invalid run`               a level that the claim rests on was not measured properly
`not run`                   a level is missing, or the GPU was emulated: nothing was measured

Judged is the level of the first seed, as published. The other seeds give the interval, and the reason says when the
published value lies inside it.
"""

import math
import tomllib
from dataclasses import dataclass

from ..measure.compare import Ratio, contrast, ratio
from ..paths import DATA
from ..runs import Run, write_json
from ..tables import Table
from .evidence import Evidence, evidence

# An effect counts as gone at equal load when less than this share of it is left there.
_EFFECT_GONE = 1 / 3


@dataclass(frozen=True)
class Verdict:
    """One claim, judged. `published`, `measured` and `interval` (95 %, over the seeds) are in `unit`; `levels` are
    the level ids it rests on, `limits` what limited each."""

    id: str
    title: str
    protocol: str
    unit: str
    published: float
    measured: float | None
    interval: tuple[float, float] | None
    published_parts: dict[str, float]
    measured_parts: dict[str, float | None]
    verdict: str
    reason: str
    levels: list[str]
    limits: dict[str, str]
    emulated: bool


def published() -> dict:
    """`data/published.toml` as it is."""
    return tomllib.loads((DATA / "published.toml").read_text())


def judge(run: Run) -> list[Verdict]:
    """The verdict on every claim; also stored as `claims.json` in a run that can be written."""
    from .recommendations import RECOMMENDATIONS

    facts, seen = published(), evidence(run)
    verdicts = [
        RECOMMENDATIONS.get(claim["quantity"], _judge)(claim, facts["protocol"], seen) for claim in facts["claims"]
    ]
    if not run.read_only:
        write_json(run.path / "claims.json", {"source": facts["source"], "claims": verdicts})
    return verdicts


def claims_table(run: Run) -> Table:
    """The verdicts as a table, in words. Behind each level that a verdict rests on stands what limited it."""
    rows = [
        (
            v.id, v.title, _with_parts(v.published, v.published_parts, v), _with_parts(v.measured, v.measured_parts, v),
            _interval(v), v.verdict, v.reason, ", ".join(f"{level} ({v.limits.get(level, 'missing')})" for level in v.levels),
        )
        for v in judge(run)
    ]  # fmt: skip
    emulated = "EMULATED GPU: nothing here was measured on a GPU. " if run.emulated else ""
    caption = f"{emulated}The published claims against run {run.path.name} (profile {run.profile.name})"
    this_run = "this run (EMULATED)" if run.emulated else "this run"
    columns = ("", "claim", "published", this_run, "95 % interval", "verdict", "reason", "rests on (limited by)")
    return Table(caption, columns, rows)


def level_id(variant: str, rate: float) -> str:
    """The id of the first repeat of a level, as claims and figures refer to it."""
    return f"{variant}-{rate:g}rps-r1"


def not_judged(seen: Evidence, levels: list[str], *, records: bool = False) -> tuple[str, str] | None:
    """(verdict, reason) when `levels` cannot carry a verdict: one is missing, was not measured properly, or (with
    `records`) lacks its records."""
    missing = [level for level in levels if level not in seen.summaries]
    if missing:
        return "not run", f"the run holds no level {', '.join(missing)}"
    invalid = [f"{level}: {s['invalid_reason']}" for level in levels if not (s := seen.summaries[level])["valid"]]
    if not invalid and records:
        invalid = [f"{level}: its records are missing" for level in levels if seen.level(level) is None]
    return ("invalid run", "; ".join(invalid)) if invalid else None


def without_gpu(seen: Evidence) -> str | None:
    """Why a run can carry no verdict at all; None when it can."""
    if seen.run.profile.device == "cuda":
        return None
    return f"{'EMULATED GPU' if seen.run.emulated else 'no GPU'}, so no verdict"


def verdict(claim: dict, seen: Evidence, ids: list[str], **found) -> Verdict:
    """A Verdict with what every claim has in common filled in."""
    value = claim["fp8"]["value"]
    common = {
        "id": claim["id"], "title": claim["title"], "unit": claim["unit"], "published": value, "measured": None,
        "interval": None, "published_parts": {"fp8": value}, "measured_parts": {}, "emulated": seen.run.emulated,
        "levels": ids, "limits": {level: seen.limit(level).cause for level in ids if level in seen.summaries},
    }  # fmt: skip
    return Verdict(**common | found)


def _judge(claim: dict, protocol: str, seen: Evidence) -> Verdict:
    sides = [side for side in ("bf16", "fp8") if side in claim]
    ids = {side: level_id(side, claim[side]["rate"]) for side in sides}
    metric = claim["metric"]
    parts = {side: seen.summaries.get(ids[side], {}).get(metric) for side in sides}
    is_ratio = claim["quantity"] == "ratio"
    said = {side: claim[side]["value"] for side in sides}
    measured = interval = None
    if all(part is not None for part in parts.values()):
        measured = parts["fp8"] / parts["bf16"] if is_ratio else parts["fp8"]
        seeds = {side: seen.seeds(side, claim[side]["rate"], metric) for side in sides}
        interval = contrast(seeds, {"fp8": 1.0, "bf16": -1.0} if is_ratio else {"fp8": 1.0})
    value = said["fp8"] / said["bf16"] if is_ratio else said["fp8"]
    word, reason = _verdict(claim, ids, value, measured, interval, seen)
    return verdict(
        claim, seen, list(ids.values()),
        protocol=protocol, unit="x" if is_ratio else claim["unit"], published=value, measured=measured,
        interval=(interval.low, interval.high) if interval and not math.isnan(interval.low) else None,
        published_parts=said, measured_parts=parts, verdict=word, reason=reason,
    )  # fmt: skip


def _verdict(claim, ids, value, measured, interval, seen: Evidence) -> tuple[str, str]:
    if unjudged := not_judged(seen, list(ids.values())):
        return unjudged
    if measured is None:
        return "invalid run", f"no {claim['metric']} was measured: nothing completed"
    change = measured / value - 1
    near = f"{abs(change):.0%} {'above' if change > 0 else 'below'} the published value"
    behind = "; ".join(filter(None, (_holds(interval, value), _equal_load(claim, seen))))
    behind = behind and f"; {behind}"
    if why := without_gpu(seen):
        return "not run", f"{why}; {near}{behind}"
    if abs(change) > claim["tolerance"]:
        return "not reproduced", f"{near}, outside the tolerance of {claim['tolerance']:.0%}{behind}"
    left = _effect_left(claim, seen, measured)
    if left is not None and left < _EFFECT_GONE:
        return "reproduced, other cause", f"{near}; the offered load did it, not {claim['cause']}{behind}"
    limit = seen.limit(ids["fp8"]).cause
    if claim["cause"] == "the card" and not limit.startswith(("GPU", "unknown")):
        return "reproduced, other cause", f"{near}; the limit was the {limit}, not {claim['cause']}{behind}"
    return "reproduced", f"{near}{behind}"


def _holds(interval: Ratio | None, value: float) -> str:
    """Where the published value lies for the other seeds, as text; empty without them."""
    if interval is None or math.isnan(interval.low):
        return ""
    where = "inside" if interval.low <= value <= interval.high else "outside"
    return f"the published value lies {where} the interval of {interval.pairs} seeds"


def _equal_load_ratios(claim: dict, seen: Evidence) -> dict[float, Ratio]:
    """FP8 over BF16 at each published rate at which the run holds valid levels of both."""
    noise = seen.noise(claim["metric"])
    rates = sorted({claim[side]["rate"] for side in ("bf16", "fp8") if side in claim})
    found = {
        rate: ratio(seen.seeds("fp8", rate, claim["metric"]), seen.seeds("bf16", rate, claim["metric"]), noise)
        for rate in rates
    }
    return {rate: one for rate, one in found.items() if one}


def _effect_left(claim: dict, seen: Evidence, measured: float) -> float | None:
    """The largest share of the effect (ratio - 1) that is left at equal load; None when it was not measured."""
    ratios = _equal_load_ratios(claim, seen) if claim["quantity"] == "ratio" else {}
    return max((r.value - 1) / (measured - 1) for r in ratios.values()) if ratios and measured != 1 else None


def _equal_load(claim: dict, seen: Evidence) -> str:
    each = [f"{one} at {rate} req/s" for rate, one in _equal_load_ratios(claim, seen).items()]
    return f"at equal load FP8 over BF16 is {' and '.join(each)}" if each else ""


def _with_parts(value: float | None, parts: dict, v: Verdict) -> str:
    """A value; of a ratio of two levels also the two values."""
    if value is None or set(parts) != {"bf16", "fp8"}:
        return _show(value, v.unit)
    return f"{_show(value, v.unit)} ({number(parts['fp8'])} / {number(parts['bf16'])})"


def _interval(v: Verdict) -> str:
    return " to ".join(_show(end, "x" if v.unit == "x" else "") for end in v.interval) if v.interval else "–"


def _show(value: float | None, unit: str) -> str:
    if value is None:
        return "–"
    return f"{value:.2f}×" if unit == "x" else f"{number(value)} {unit}".rstrip()


def number(value: float) -> str:
    """Four digits that count, and no exponent."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
