"""What a verdict is, the rules by which every judge comes to one, and what a run says first that can have none.

`reproduced`                the measured value is what was claimed, with its whole interval within the tolerance
`reproduced, other cause`   it is, but the stated cause does not hold
`not reproduced`            it is not: its interval lies outside the tolerance
`undecided`                 measured, and its interval or its length allows both answers, or a single seed gives no interval
`invalid run`               a level that the claim rests on was not measured properly
`not run`                   nothing was measured: a level is missing, the GPU was emulated or not the card that the profile
                            names, or this kit has no measurement of it; the reason says what it needs

Whether the stated cause holds is asked apart from the value, and told whatever the value is: "no (the offered load)" when
the same step in load brings most of the effect without FP8, "no (the API server)" when that, and not the card, was the
limit, "undecided" when the interval allows both; empty where a test of it found nothing against it, and where this kit has
none.

Judged is the (geometric) mean of all valid seeds that were measured as published: a single seed can be an odd one, and
which one comes first is chance. Each seed's value is told beside it. A single one gives no interval, and decides nothing.
"""

import dataclasses
import math
import tomllib
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from ..paths import DATA, in_command
from ..results.evidence import Evidence, other_card, unmeasured
from ..results.run_folder import Run, a_run
from ..ui import four_digits


@dataclass(frozen=True)
class Verdict:
    """One claim, judged. `published` (None: the claim has no number), `measured` and `interval` (95 %, over the seeds) are
    in `unit`; `way` is what `not reproduced` alone does not tell ("better than published", "no risk to remove"); `cause` says
    whether the stated cause holds ("" where nothing speaks against it, tested or not); `levels` are the level ids it rests on,
    `limits` what limited each."""

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
    way: str
    cause: str
    reason: str
    levels: list[str]
    limits: dict[str, str]
    emulated: bool

    @property
    def said(self) -> str:
        """The verdict as a table and a sentence show it."""
        return f"{self.verdict} ({self.way})" if self.way else self.verdict


def published() -> dict:
    """`data/published.toml` as it is."""
    return tomllib.loads((DATA / "published.toml").read_text())


def claim_of(id: str) -> dict:
    """The published claim `id`, as it stands in `data/published.toml`."""
    return next(claim for claim in published()["claims"] if claim["id"] == id)


def not_judged(seen: Evidence, levels: list[str], *, records: bool = False, needs: str = "") -> tuple[str, str] | None:
    """(verdict, reason) when `levels` cannot carry a verdict: one is missing (the profile `needs` has it), was not measured
    properly, or (with `records`) lacks its records."""
    missing = [level for level in levels if level not in seen.summaries]
    if missing:
        return "not run", f"the run holds no level {', '.join(map(seen.own, missing))}{_remedy(seen, missing, needs)}"
    invalid = [f"{seen.own(level)}: {s.invalid_reason}" for level in levels if not (s := seen.summaries[level]).valid]
    if not invalid and records:
        invalid = [f"{seen.own(level)}: its records are missing" for level in levels if seen.level(level) is None]
    return ("invalid run", "; ".join(invalid)) if invalid else None


def _remedy(seen: Evidence, missing: list[str], needs: str) -> str:
    """What measures these levels: protocols of the run's own profile, where they hold all of them, else the profile `needs`."""
    run, named = seen.run, {}
    for protocol, levels in run.profile.protocols.items():
        for level in levels:
            named.setdefault(level.id, protocol)
    if not named.keys() >= (own := {seen.own(level) for level in missing}):
        return f"; profile {needs} has them" if needs else ""
    recorded = run.path.resolve().is_relative_to(DATA / "recorded")
    where = f"--profile {run.profile.name}" if recorded else f"--run {in_command(run.path)}"
    options = "".join(f' --protocol "{protocol}"' for protocol in sorted({named[level] for level in own}))
    return f"; to measure it: fp8lab measure {where}{options}"


def found(seen: Evidence, word: str, reason: str, **more) -> dict:
    """What a judge found, for `verdict`; a run that was not measured on its profile's card carries none, and says why first."""
    if why := unmeasured(seen.run):
        word, reason = "not run", f"{why}, so no verdict; {reason}"
    return {"verdict": word, "reason": reason} | more


def weakest(words: Collection[str]) -> str:
    """The verdict on a claim of several parts: one that is contradicted contradicts it, one that is open leaves it open."""
    return next(word for word in ("not reproduced", "undecided", "reproduced") if word in words)


def verdict(claim: dict, seen: Evidence, ids: list[str], **judged) -> Verdict:
    """A Verdict with what every claim has in common filled in."""
    value = claim.get("fp8", {}).get("value")
    common = {
        "id": claim["id"], "title": claim["title"], "unit": claim.get("unit", ""), "published": value, "measured": None,
        "interval": None, "way": "", "cause": "", "published_parts": {} if value is None else {"fp8": value}, "measured_parts": {},
        "emulated": seen.run.emulated,
        "levels": [seen.own(level) for level in ids],
        "limits": {seen.own(level): seen.limit(level).cause for level in ids if level in seen.summaries},
    }  # fmt: skip
    one = Verdict(**common | judged)
    if one.verdict == "not reproduced" and "better" in claim:
        better = (one.measured > one.published) == (claim["better"] == "higher")
        return dataclasses.replace(one, way=f"{'better' if better else 'worse'} than published")
    return one


def left_out(seen: Evidence, levels: Iterable[tuple[str, float]]) -> str:
    """The invalid seeds at these (variant, rate), as text: nothing rests on them."""
    held = [seen.levels((variant,), rate, valid=False) for variant, rate in levels]
    invalid = [seen.own(level_id) for levels in held for level_id, s in levels.items() if not s.valid]
    return f"left out as INVALID: {', '.join(invalid)}" if invalid else ""


def by_interval(claim: dict, published: float, value: float, low: float, high: float) -> tuple[str, str]:
    """(verdict, the same in words) of a value with its interval from `low` to `high` (the value itself where it is exact, nan
    where a single seed gives none): the one rule for every claim that has an interval. Outside what the claim's direction and
    tolerance allow it is `not reproduced`, within `reproduced`, across an edge or without an interval `undecided`."""
    how_near, tolerance = near(value, published), f"the tolerance of {claim['tolerance']:.0%}"
    if math.isnan(low):
        return "undecided", f"{how_near}; one seed gives no interval: more seeds (repeats) are missing"
    below, above, (lowest, highest) = low / published - 1, high / published - 1, allowed(claim)
    if above < lowest or below > highest:
        return "not reproduced", f"{how_near}, outside {tolerance}"
    if below < lowest or above > highest:
        return "undecided", f"{how_near}; its interval lies across an edge of {tolerance} and allows both answers"
    return "reproduced", how_near


def near(value: float, published: float) -> str:
    """How far a value is from the published one, in words: "7% below the published value"."""
    change = value / published - 1
    return f"{abs(change):.0%} {'above' if change > 0 else 'below'} the published value"


def allowed(claim: dict) -> tuple[float, float]:
    """The relative changes from the published value, lowest and highest, that the claim allows."""
    low = -math.inf if claim["direction"] == "at most" else -claim["tolerance"]
    high = math.inf if claim["direction"] == "at least" else claim["tolerance"]
    return low, high


def show_interval(v: Verdict) -> str:
    """A verdict's 95 % interval as a table shows it; "–" without one."""
    return " to ".join(show_value(end, "x" if v.unit == "x" else "") for end in v.interval) if v.interval else "–"


def show_value(value: float | None, unit: str) -> str:
    """A value with its unit, as a table shows it."""
    if value is None:
        return "–"
    return f"{value:.2f}×" if unit == "x" else f"{four_digits(value)} {unit}".rstrip()


def card_note(*runs: Run) -> str:
    """How the captions of runs begin that were not measured on the GPU that their profile names; empty for others."""
    marked = [run for run in runs if card_mark(run)]
    notes = ("EMULATED GPU, nothing measured. " if run.emulated else f"{unmeasured(run)}. " for run in marked)
    return "".join(dict.fromkeys(notes))


def card_mark(run: Run) -> str:
    """The same in two words at most, for a run's name and across a figure."""
    return "EMULATED" if a_run(run).emulated else "OTHER CARD" if other_card(run) else ""
