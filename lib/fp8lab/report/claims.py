"""The published claims against runs: every verdict, as a table, several runs side by side, and what a claim comes to."""

from ..results.evidence import evidence
from ..results.files import write_json
from ..results.run_folder import Run
from ..ui.table import Table
from ..ui.text import four_digits
from .caption import card_mark, card_note
from .judges import JUDGES
from .tables.comparison import once
from .verdict import Verdict, published, show_interval, show_value


def judge(run: Run) -> list[Verdict]:
    """The verdict on every claim."""
    facts, seen = published(), evidence(run)
    return [JUDGES[claim["quantity"]](claim, facts["protocol"], seen) for claim in facts["claims"]]


def write_claims(run: Run) -> None:
    """Stores the verdicts as `claims.json` in the run's folder. Raises BadInput for a recorded run, NotWritten."""
    run.check_writable()
    write_json(run.path / "claims.json", {"source": published()["source"], "claims": judge(run)})


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


def claims_across(*runs: Run) -> Table:
    """The published claims, and for each run the measured value, its 95 % interval and the verdict. A run that is named
    twice is shown once, here and below."""
    runs = once(runs)
    judged = [judge(run) for run in runs]
    rows = [
        (first.id, first.title, show_value(first.published, first.unit), *(_said(one) for one in (first, *others)))
        for first, *others in zip(*judged, strict=True)
    ]
    names = [f"{run.path.name}{f' ({word})' if (word := card_mark(run)) else ''}" for run in runs]
    return Table(
        "The published claims, run by run: measured, 95 % interval, verdict, and whether the stated cause holds",
        ("", "claim", "published", *names),
        rows,
    )


def _rests_on(v: Verdict) -> str:
    """The levels behind a verdict by what limited them: "fp8-100rps r1 r2 (API server)"."""
    groups: dict[tuple[str, str], list[str]] = {}
    for level in v.levels:
        stem, _, repeat = level.rpartition("-")
        groups.setdefault((stem, v.limits.get(level, "missing")), []).append(repeat)
    return ", ".join(f"{stem} {' '.join(repeats)} ({cause})" for (stem, cause), repeats in groups.items())


def _with_parts(value: float | None, parts: dict, v: Verdict) -> str:
    """A value; of a ratio of two levels also the two values."""
    if value is None or set(parts) != {"bf16", "fp8"}:
        return show_value(value, v.unit)
    return f"{show_value(value, v.unit)} ({four_digits(parts['fp8'])} / {four_digits(parts['bf16'])})"


def _said(one: Verdict) -> str:
    if one.measured is None or one.verdict in ("not run", "invalid run"):
        return one.verdict
    between = f" ({show_interval(one)})" if one.interval else ""
    cause = f"; stated cause: {one.cause}" if one.cause else ""
    return f"{show_value(one.measured, one.unit)}{between}: {one.verdict}{cause}"
