"""From a run to verdicts: the published value, the measured one, and whether the claim holds.

`reproduced`                the measured value is what was claimed, with its whole interval within the tolerance
`reproduced, other cause`   it is, but the stated cause does not hold
`not reproduced`            it is not: its interval lies outside the tolerance
`undecided`                 measured, and its interval or its length allows both answers
`invalid run`               a level that the claim rests on was not measured properly
`not run`                   nothing was measured: a level is missing, the GPU was emulated or not the card that the profile
                            names, or this kit has no measurement of it; the reason says what it needs

Whether the stated cause holds is asked apart from the value, and told whatever the value is: "no (the offered load)" when
the same step in load brings most of the effect without FP8, "no (the front end)" when that, and not the card, was the
limit, "undecided" when the interval allows both; empty where a test of it found nothing against it, and where this kit has
none.

Judged is the (geometric) mean of all valid seeds that were measured as published: a single seed can be an odd one, and
which one comes first is chance. Each seed's value is told beside it. With a single one the value alone is judged.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import geometric_mean

from ..metrics.statistics import Ratio, contrast
from ..results.evidence import Evidence, evidence
from ..results.files import write_json
from ..results.run_folder import Run, unmeasured
from ..ui.table import Table
from .caption import card_mark, card_note
from .verdict import level_id, published

# The load alone is the cause of an effect when it brings, at the lower end of its interval, this share of it.
_MOST = 2 / 3


@dataclass(frozen=True)
class Verdict:
    """One claim, judged. `published` (None: the claim has no number), `measured` and `interval` (95 %, over the seeds) are
    in `unit`; `cause` says
    whether the stated cause holds ("" where nothing speaks against it, tested or not); `levels` are the level ids it rests
    on, `limits` what limited each."""

    id: str
    title: str
    protocol: str
    unit: str
    published: float | None
    measured: float | None
    interval: tuple[float, float] | None
    published_parts: dict[str, float]
    measured_parts: dict[str, float | None]
    verdict: str
    cause: str
    reason: str
    levels: list[str]
    limits: dict[str, str]
    emulated: bool


def judge(run: Run) -> list[Verdict]:
    """The verdict on every claim; also stored as `claims.json` in a run that can be written."""
    from .judges import RECOMMENDATIONS

    facts, seen = published(), evidence(run)
    verdicts = [
        RECOMMENDATIONS.get(claim["quantity"], _judge)(claim, facts["protocol"], seen) for claim in facts["claims"]
    ]
    if not run.read_only:
        write_json(run.path / "claims.json", {"source": facts["source"], "claims": verdicts})
    return verdicts


def claims_table(run: Run, *, brief: bool = False) -> Table:
    """The verdicts as a table, in words. Behind each level that a verdict rests on stands what limited it.

    `brief` leaves out the reasons and the levels.
    """
    verdicts, seen = judge(run), evidence(run)
    rows = [
        (
            v.id, v.title, _with_parts(v.published, v.published_parts, v), _with_parts(v.measured, v.measured_parts, v),
            show_interval(v), v.verdict, v.cause or "–", v.reason, _rests_on(v),
        )
        for v in verdicts
    ]  # fmt: skip
    caption = f"{card_note(run)}The published claims against run {run.path.name}: {run.profile.title}"
    if any(v.interval and seen.share_a_start(v.levels) for v in verdicts):
        caption += ". Seeds share a server start: what differs from start to start is in no interval"
    this_run = f"this run ({mark})" if (mark := card_mark(run)) else "this run"
    columns = ("", "claim", "published", this_run, "95 % interval", "verdict", "stated cause")
    columns += ("reason", "rests on (limited by)")
    shown = len(columns) - 2 * brief
    return Table(caption, columns[:shown], [row[:shown] for row in rows])


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
    why = unmeasured(seen.run)
    return f"{why}, so no verdict" if why else None


def verdict(claim: dict, seen: Evidence, ids: list[str], **found) -> Verdict:
    """A Verdict with what every claim has in common filled in."""
    value = claim.get("fp8", {}).get("value")
    common = {
        "id": claim["id"], "title": claim["title"], "unit": claim.get("unit", ""), "published": value, "measured": None,
        "interval": None, "cause": "", "published_parts": {} if value is None else {"fp8": value}, "measured_parts": {},
        "emulated": seen.run.emulated,
        "levels": ids, "limits": {level: seen.limit(level).cause for level in ids if level in seen.summaries},
    }  # fmt: skip
    return Verdict(**common | found)


def _judge(claim: dict, protocol: str, seen: Evidence) -> Verdict:
    sides = [side for side in ("fp8", "bf16") if side in claim]
    is_ratio, metric = claim["quantity"] == "ratio", claim["metric"]
    said = {side: claim[side]["value"] for side in sides}
    seeds = {side: seen.seeds(side, claim[side]["rate"], metric) for side in sides}
    shared = sorted(set.intersection(*(set(values) for values in seeds.values())))
    ids = [level_id(side, claim[side]["rate"], seed) for side in reversed(sides) for seed in shared or [1]]
    value, measured, mean = said["fp8"] / said.get("bf16", 1.0) if is_ratio else said["fp8"], None, None
    if shared:
        mean = contrast(seeds, {"fp8": 1.0, "bf16": -1.0} if is_ratio else {"fp8": 1.0})
        measured = mean.value
    cause = _cause(claim, ids, mean, seen) if mean and not without_gpu(seen) else ""
    word, reason = _verdict(claim, ids, value, mean, cause, seeds, seen)
    return verdict(
        claim, seen, ids,
        protocol=protocol, unit="x" if is_ratio else claim["unit"], published=value, measured=measured,
        interval=(mean.low, mean.high) if mean and not math.isnan(mean.low) else None,
        published_parts=said, verdict=word, cause=cause, reason=reason,
        measured_parts={side: geometric_mean(values.values()) for side, values in seeds.items() if values},
    )  # fmt: skip


def _verdict(
    claim: dict, ids: list[str], value: float, mean: Ratio | None, cause: str, seeds, seen: Evidence
) -> tuple[str, str]:
    if unjudged := not_judged(seen, ids):
        return unjudged
    if mean is None:
        return "invalid run", f"no {claim['metric']} was measured: nothing completed"
    told = (_each_seed(claim, seeds, value), left_out(seen, _levels_of(claim)), _causes(claim, seen))
    behind = "".join(f"; {text}" for text in told if text)
    word, near = by_interval(claim, value, mean.value, mean.low, mean.high)
    if why := without_gpu(seen):
        return "not run", f"{why}; {_near(mean.value, value)}{behind}"
    return "reproduced, other cause" if word == "reproduced" and cause.startswith("no") else word, f"{near}{behind}"


def by_interval(claim: dict, published: float, value: float, low: float, high: float) -> tuple[str, str]:
    """(verdict, the same in words) of a value with its interval from `low` to `high` (nan: none, the value alone is judged):
    the one rule for every claim that has an interval. Outside what the claim's direction and tolerance allow it is `not
    reproduced`, within `reproduced`, across an edge `undecided`."""
    near, tolerance = _near(value, published), f"the tolerance of {claim['tolerance']:.0%}"
    below, above = (value / published - 1,) * 2 if math.isnan(low) else (low / published - 1, high / published - 1)
    lowest, highest = _allowed(claim)
    if above < lowest or below > highest:
        return "not reproduced", f"{near}, outside {tolerance}"
    if below < lowest or above > highest:
        return "undecided", f"{near}; its interval lies across an edge of {tolerance} and allows both answers"
    return "reproduced", near


def _near(value: float, published: float) -> str:
    change = value / published - 1
    return f"{abs(change):.0%} {'above' if change > 0 else 'below'} the published value"


def _cause(claim: dict, ids: list[str], mean: Ratio, seen: Evidence) -> str:
    """Whether the stated cause holds: "no (the other one)", "undecided", or "" where nothing speaks against it."""
    if claim["quantity"] == "ratio" and mean.value > 1 and (load := _load_alone(claim, seen)):
        needed = _MOST * (mean.value - 1)
        low, high = (load.value, load.value) if math.isnan(load.low) else (load.low, load.high)
        return "no (the offered load)" if low - 1 >= needed else "undecided" if high - 1 >= needed else ""
    if claim["cause"] == "the card":
        others = {seen.limit(level).cause for level in ids if level in seen.summaries}
        if not any(cause.startswith(("GPU", "KV", "unknown")) for cause in others):
            return f"no (the {' or the '.join(sorted(others))})"
    return ""


def _levels_of(claim: dict) -> list[tuple[str, float]]:
    return [(side, claim[side]["rate"]) for side in ("bf16", "fp8") if side in claim]


def left_out(seen: Evidence, levels: Iterable[tuple[str, float]]) -> str:
    """The invalid seeds at these (variant, rate), as text: nothing rests on them."""
    held = [seen.levels((variant,), rate, valid=False) for variant, rate in levels]
    found = [level_id for levels in held for level_id, s in levels.items() if not s["valid"]]
    return f"left out as INVALID: {', '.join(found)}" if found else ""


def _allowed(claim: dict) -> tuple[float, float]:
    """The relative changes from the published value, lowest and highest, that the claim allows."""
    low = -math.inf if claim["direction"] == "at most" else -claim["tolerance"]
    high = math.inf if claim["direction"] == "at least" else claim["tolerance"]
    return low, high


def _each_seed(claim: dict, seeds, value: float) -> str:
    """What each seed gave, as text, with a word when they disagree about the claim; empty for a single one."""
    over, under = seeds["fp8"], seeds.get("bf16")
    each = {seed: over[seed] / (under[seed] if under else 1.0) for seed in over if not under or seed in under}
    if len(each) < 2:
        return ""
    low, high = _allowed(claim)
    answers = {low <= one / value - 1 <= high for one in each.values()}
    shown = ", ".join(f"{one:.2f}×" if under else number(one) for one in each.values())
    return f"seeds {shown}{'' if len(answers) == 1 else ' (they disagree about the tolerance)'}"


def _causes(claim: dict, seen: Evidence) -> str:
    """What the load alone does to BF16, and what FP8 does at equal load, as text."""
    parts = []
    if claim["quantity"] == "ratio" and (load := _load_alone(claim, seen)):
        parts.append(f"BF16 alone, from {claim['bf16']['rate']} to {claim['fp8']['rate']} req/s: {load}")
    rates = sorted({claim[side]["rate"] for side in ("bf16", "fp8") if side in claim})
    found = {rate: seen.compare("fp8", "bf16", rate, claim["metric"]) for rate in rates}
    each = [f"{one} at {rate} req/s" for rate, one in found.items() if one]
    parts += [f"FP8 over BF16 at equal load: {', '.join(each)}"] if each else []
    return "; ".join(parts)


def _load_alone(claim: dict, seen: Evidence) -> Ratio | None:
    """What the same step in offered load does without FP8: BF16 at FP8's rate over BF16 at its own."""
    cells = {side: seen.seeds("bf16", claim[side]["rate"], claim["metric"]) for side in ("fp8", "bf16")}
    return contrast(cells, {"fp8": 1.0, "bf16": -1.0})


def _rests_on(v: Verdict) -> str:
    """The levels behind a verdict by what limited them: "fp8-100rps r1 r2 (front end)"."""
    groups: dict[tuple[str, str], list[str]] = {}
    for level in v.levels:
        stem, _, repeat = level.rpartition("-")
        groups.setdefault((stem, v.limits.get(level, "missing")), []).append(repeat)
    return ", ".join(f"{stem} {' '.join(repeats)} ({cause})" for (stem, cause), repeats in groups.items())


def _with_parts(value: float | None, parts: dict, v: Verdict) -> str:
    """A value; of a ratio of two levels also the two values."""
    if value is None or set(parts) != {"bf16", "fp8"}:
        return show_value(value, v.unit)
    return f"{show_value(value, v.unit)} ({number(parts['fp8'])} / {number(parts['bf16'])})"


def show_interval(v: Verdict) -> str:
    """A verdict's 95 % interval as a table shows it; "–" without one."""
    return " to ".join(show_value(end, "x" if v.unit == "x" else "") for end in v.interval) if v.interval else "–"


def show_value(value: float | None, unit: str) -> str:
    """A value with its unit, as a table shows it."""
    if value is None:
        return "–"
    return f"{value:.2f}×" if unit == "x" else f"{number(value)} {unit}".rstrip()


def number(value: float) -> str:
    """Four digits that count, and no exponent."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
