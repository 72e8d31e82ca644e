"""Several runs side by side: the same claims on several machines, and what FP8 was worth where what was the limit."""

from collections import Counter
from collections.abc import Sequence

from ..results.evidence import FRONT_ENDS, Evidence, evidence, rate_name
from ..results.run_folder import Run
from ..ui.table import Table
from .caption import card_mark, card_note
from .claims import Verdict, judge, show_interval, show_value
from .drawing import Figure
from .fair import clocks_told, equal_load_ratios
from .forest import forest
from .verdict import claim_of

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
    names = [f"{run.path.name}{f' ({word})' if (word := card_mark(run)) else ''}" for run in runs]
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
        joules = {(suffix, rate): one for suffix, rate, one in equal_load_ratios(seen, _JOULES)}
        for suffix, rate, one in equal_load_ratios(seen, _THROUGHPUT):
            energy = joules.get((suffix, rate))
            rows.append(
                (
                    run.path.name, rate_name(rate), FRONT_ENDS[suffix], str(one), str(energy) if energy else "–",
                    clocks_told(seen, suffix, rate),
                    *(" or ".join(_causes(seen, variant + suffix, rate)) for variant in ("bf16", "fp8")),
                )
            )  # fmt: skip
    columns = ("run", "offered", "front end", "tokens/s, FP8 / BF16", "J/token, FP8 / BF16", "steady clock, FP8 / BF16")
    columns += ("BF16 limited by", "FP8 limited by")
    return Table(f"{card_note(*runs)}What FP8 changed at equal load, and what was the limit", columns, rows)


def worth_figure(*runs: Run) -> Figure:
    """The throughput ratios at equal load that rest on repeats, run by run, with what limited them, beside the published one."""
    claim = claim_of("C1")
    bf16, fp8 = claim["bf16"], claim["fp8"]
    rows, drawn = [], []
    for run in _once(runs):
        seen = evidence(run)
        for suffix, rate, one in equal_load_ratios(seen, _THROUGHPUT):
            if one.pairs >= 2:
                behind = f", behind {FRONT_ENDS[suffix]}" if suffix else ""
                limit = _mostly(*(_causes(seen, variant + suffix, rate) for variant in ("bf16", "fp8")))
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


def _causes(seen: Evidence, variant: str, rate: float) -> Counter[str]:
    """What limited a variant at a rate, and how many of its valid seeds."""
    return Counter(seen.limit(level_id).cause for level_id in seen.levels((variant,), rate))


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
    between = f" ({show_interval(one)})" if one.interval else ""
    cause = f"; stated cause: {one.cause}" if one.cause else ""
    return f"{show_value(one.measured, one.unit)}{between}: {one.verdict}{cause}"
