"""Several runs side by side: the same claims on several machines, and what FP8 was worth where what was the limit."""

import math
from collections import Counter
from collections.abc import Sequence

from ..runs import Run
from ..tables import Table
from .claims import Verdict, judge, published, show_value
from .drawing import Figure
from .evidence import FRONT_ENDS, Evidence, evidence, rate_name
from .fair import emulated_note, equal_load_ratios
from .forest import forest

_THROUGHPUT, _JOULES = "output_token_throughput", "joules_per_output_token"


def claims_across(*runs: Run) -> Table:
    """The published claims, and for each run the measured value, its 95 % interval and the verdict. A run that is named
    twice is shown once, here and below."""
    runs = _once(runs)
    judged = [judge(run) for run in runs]
    rows = [
        (first.id, first.title, show_value(first.published, first.unit), *(_said(one) for one in (first, *others)))
        for first, *others in zip(*judged, strict=True)
    ]
    names = [f"{run.path.name}{' (EMULATED)' if run.emulated else ''}" for run in runs]
    return Table(
        "The published claims, run by run: measured, 95 % interval, verdict, and whether the stated cause holds",
        ("", "claim", "published", *names),
        rows,
    )


def worth_table(*runs: Run) -> Table:
    """What FP8 changed at equal load in each run, and what limited the two variants there."""
    rows, runs = [], _once(runs)
    for run in runs:
        seen = evidence(run)
        joules = {(front, rate): one for front, rate, one in equal_load_ratios(seen, _JOULES)}
        for front_end, rate, one in equal_load_ratios(seen, _THROUGHPUT):
            energy = joules.get((front_end, rate))
            rows.append(
                (
                    run.path.name, rate_name(rate), front_end, str(one), str(energy) if energy else "–",
                    *(" or ".join(_causes(seen, variant, rate)) for variant in _pair(seen, front_end)),
                )
            )  # fmt: skip
    columns = ("run", "offered", "front end", "tokens/s, FP8 / BF16", "J/token, FP8 / BF16")
    columns += ("BF16 limited by", "FP8 limited by")
    note = next((emulated_note(run) for run in runs if run.emulated), "")
    return Table(f"{note}What FP8 changed at equal load, and what was the limit", columns, rows)


def worth_figure(*runs: Run) -> Figure:
    """The throughput ratios at equal load that rest on repeats, run by run, with what limited them, beside the published one."""
    claim = next(claim for claim in published()["claims"] if claim["id"] == "C1")
    bf16, fp8 = claim["bf16"], claim["fp8"]
    rows, drawn = [], []
    for run in _once(runs):
        seen = evidence(run)
        for front_end, rate, one in equal_load_ratios(seen, _THROUGHPUT):
            if one.pairs >= 2:
                behind = "" if front_end == FRONT_ENDS[""] else f", behind {front_end}"
                limit = _mostly(*(_causes(seen, variant, rate) for variant in _pair(seen, front_end)))
                rows.append((f"{run.path.name}, {rate_name(rate)}{behind}\nlimit: {limit}", one))
                drawn.append(run)
    said = (
        f"published, other loads:\nFP8 at {fp8['rate']}, BF16 at {bf16['rate']} req/s",
        fp8["value"] / bf16["value"],
    )
    return forest(
        _once(drawn) or runs, "worth", "What is FP8 worth, and what was the limit?", rows, "output tokens/s, FP8 / BF16",
        "Same rate, trace and seeds, 95 % intervals; a bar across 1 shows no difference. Star: the published ratio, which "
        "crosses two loads. Where the front end is the limit the ratio is not the card's.",
        said=said,
    )  # fmt: skip


def _once(runs: Sequence[Run]) -> list[Run]:
    return list({run.path.resolve(): run for run in runs}.values())


def _pair(seen: Evidence, front_end: str) -> tuple[str, str]:
    return next((bf16, fp8) for bf16, fp8, name in seen.pairs() if name == front_end)


def _causes(seen: Evidence, variant: str, rate: float) -> Counter[str]:
    """What limited a variant at a rate, and how many of its seeds."""
    ids = [
        level_id
        for level_id, s in seen.summaries.items()
        if s["level"]["variant"] == variant and float(s["level"]["rate"]) == rate
    ]
    return Counter(seen.limit(level_id).cause for level_id in ids)


def _mostly(bf16: Counter[str], fp8: Counter[str]) -> str:
    """The cause of most levels of both variants in a few words; of each where none has more than half."""
    both = Counter()
    for cause, count in [*bf16.items(), *fp8.items()]:
        both[cause.partition(",")[0]] += count
    (cause, count), total = both.most_common(1)[0], both.total()
    if 2 * count > total:
        return cause if count == total else f"mostly {cause}"
    return ", ".join(f"{name} {c.most_common(1)[0][0].partition(',')[0]}" for name, c in (("BF16", bf16), ("FP8", fp8)))


def _said(one: Verdict) -> str:
    if one.measured is None or one.verdict in ("not run", "invalid run"):
        return one.verdict
    between = "" if one.interval is None or math.isnan(one.interval[0]) else (
        f" ({' to '.join(show_value(end, 'x' if one.unit == 'x' else '') for end in one.interval)})"
    )  # fmt: skip
    cause = f"; stated cause: {one.cause}" if one.cause and one.verdict != "not run" else ""
    return f"{show_value(one.measured, one.unit)}{between}: {one.verdict}{cause}"
