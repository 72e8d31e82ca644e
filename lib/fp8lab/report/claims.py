"""From a run to verdicts: the published value, the measured one, and whether the claim holds.

`reproduced`                the measured value lies within the tolerance that was fixed beforehand
`reproduced, other cause`   it does, but the effect is gone at equal load: its cause is not the one stated
`not reproduced`            it does not
`invalid run`               a level that the claim rests on was not measured properly
`not run`                   a level is missing, or the GPU was emulated: nothing was measured
"""

import tomllib
from dataclasses import dataclass

from ..paths import DATA
from ..runs import Run, write_json
from ..tables import Table

# An effect counts as gone at equal load when less than this share of it is left there.
_EFFECT_GONE = 1 / 3


@dataclass(frozen=True)
class Verdict:
    """One claim, judged. `published` and `measured` are in `unit`; `levels` are the level ids it rests on."""

    id: str
    title: str
    protocol: str
    unit: str
    published: float
    measured: float | None
    published_parts: dict[str, float]
    measured_parts: dict[str, float | None]
    verdict: str
    reason: str
    levels: list[str]
    emulated: bool


def published() -> dict:
    """`data/published.toml` as it is."""
    return tomllib.loads((DATA / "published.toml").read_text())


def judge(run: Run) -> list[Verdict]:
    """The verdict on every claim; also stored as `claims.json` in a run that can be written."""
    facts, summaries = published(), run.summaries()
    verdicts = [_judge(claim, facts["protocol"], summaries, run) for claim in facts["claims"]]
    if not run.read_only:
        write_json(run.path / "claims.json", {"source": facts["source"], "claims": verdicts})
    return verdicts


def claims_table(run: Run) -> Table:
    """The verdicts as a table, in words."""
    verdicts = judge(run)
    rows = [
        (v.id, v.title, _show(v.published, v.unit), _show(v.measured, v.unit), v.verdict, v.reason) for v in verdicts
    ]
    emulated = "EMULATED GPU: nothing here was measured on a GPU. " if run.emulated else ""
    caption = f"{emulated}The published claims against run {run.path.name} (profile {run.profile.name})"
    this_run = "this run (EMULATED)" if run.emulated else "this run"
    return Table(caption, ("", "claim", "published", this_run, "verdict", "reason"), rows)


def level_id(variant: str, rate: float) -> str:
    """The id of the first repeat of a level, as claims and figures refer to it."""
    return f"{variant}-{rate:g}rps-r1"


def _judge(claim: dict, protocol: str, summaries: dict, run: Run) -> Verdict:
    sides = [side for side in ("bf16", "fp8") if side in claim]
    ids = {side: level_id(side, claim[side]["rate"]) for side in sides}
    parts = {side: summaries.get(ids[side], {}).get(claim["metric"]) for side in sides}
    is_ratio = claim["quantity"] == "ratio"
    published_parts = {side: claim[side]["value"] for side in sides}
    value = published_parts["fp8"] / published_parts["bf16"] if is_ratio else published_parts["fp8"]
    known = all(part is not None for part in parts.values())
    measured = None
    if known:
        measured = parts["fp8"] / parts["bf16"] if is_ratio else parts["fp8"]
    verdict, reason = _verdict(claim, ids, parts, value, measured, summaries, run)
    return Verdict(
        id=claim["id"],
        title=claim["title"],
        protocol=protocol,
        unit="x" if is_ratio else claim["unit"],
        published=value,
        measured=measured,
        published_parts=published_parts,
        measured_parts=parts,
        verdict=verdict,
        reason=reason,
        levels=list(ids.values()),
        emulated=run.emulated,
    )


def _verdict(claim, ids, parts, value, measured, summaries, run) -> tuple[str, str]:
    missing = [level for level in ids.values() if level not in summaries]
    if missing:
        return "not run", f"the run holds no level {', '.join(missing)}"
    invalid = [
        f"{level}: {summaries[level]['invalid_reason']}" for level in ids.values() if not summaries[level]["valid"]
    ]
    if invalid:
        return "invalid run", "; ".join(invalid)
    if measured is None:
        return "invalid run", f"no {claim['metric']} was measured: nothing completed"
    change = measured / value - 1
    beside = " against ".join(
        f"{_number(parts[side])} {claim['unit']} ({side} at {claim[side]['rate']} req/s)" for side in reversed(parts)
    )
    near = f"{beside}: {abs(change):.0%} {'above' if change > 0 else 'below'} the published value"
    load = _equal_load(claim, summaries)
    if run.profile.device != "cuda":
        return "not run", f"{'EMULATED GPU' if run.emulated else 'no GPU'}, so no verdict; {near}{load and '; ' + load}"
    if abs(change) > claim["tolerance"]:
        return "not reproduced", f"{near}, outside the tolerance of {claim['tolerance']:.0%}{load and '; ' + load}"
    if (
        claim["quantity"] == "ratio"
        and (left := _effect_left(claim, summaries, measured)) is not None
        and left < _EFFECT_GONE
    ):
        return "reproduced, other cause", f"{near}; but {load}: the offered load did it, not {claim['cause']}"
    return "reproduced", near


def _equal_load_ratios(claim: dict, summaries: dict) -> dict[float, float]:
    """FP8 over BF16 at each rate at which the run holds valid levels of both."""
    if claim["quantity"] != "ratio":
        return {}
    ratios = {}
    for rate in (claim["bf16"]["rate"], claim["fp8"]["rate"]):
        both = [summaries.get(level_id(side, rate)) for side in ("fp8", "bf16")]
        if all(s and s["valid"] and s[claim["metric"]] for s in both):
            ratios[rate] = both[0][claim["metric"]] / both[1][claim["metric"]]
    return ratios


def _effect_left(claim: dict, summaries: dict, measured: float) -> float | None:
    """The largest share of the effect (ratio - 1) that is left at equal load; None when it was not measured."""
    ratios = _equal_load_ratios(claim, summaries)
    return max((r - 1) / (measured - 1) for r in ratios.values()) if ratios and measured != 1 else None


def _equal_load(claim: dict, summaries: dict) -> str:
    ratios = _equal_load_ratios(claim, summaries)
    each = " and ".join(f"{ratio:.2f}x at {rate} req/s" for rate, ratio in ratios.items())
    return f"at equal load it is {each}" if each else ""


def _show(value: float | None, unit: str) -> str:
    if value is None:
        return "–"
    return f"{value:.2f}×" if unit == "x" else f"{_number(value)} {unit}"


def _number(value: float) -> str:
    """Four digits that count, and no exponent."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
