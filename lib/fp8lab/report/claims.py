"""The published claims against runs: every verdict, as a table, several runs side by side; and what a claim or a figure
comes to in a sentence or two: computed from the run that it is about, never typed beside it."""

import html
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean

from ..config.profile import rate_name
from ..errors import BadInput
from ..experiment.anatomy import anatomies, floors_of
from ..metrics.slo import DEFAULT
from ..metrics.statistics import ABLATION
from ..results.evidence import Compared, Evidence, evidence
from ..results.files import write_json
from ..results.run_folder import Run, a_run
from ..ui import Table, four_digits, shown
from .anatomy import host_adds
from .comparison import METRICS, UNSEALED, causes, mean_of, once, unsealing_steps
from .judges import JUDGES
from .verdict import Verdict, card_mark, card_note, published, show_interval, show_value


def judge(run: Run, instead: Mapping[str, str] | None = None) -> list[Verdict]:
    """The verdict on every claim; with `instead`, on those about speed alone, as if its variants were those that they stand
    for: {"bf16": "bf16-unsealed", "fp8": "fp8-unsealed"}. Raises BadInput for a variant that the profile does not name,
    and for one that no claim is about."""
    facts, seen = published(), evidence(run, instead)
    for name, variant in (instead or {}).items():
        if name not in (judged := ABLATION["interaction"]):
            said = f"{name!r} is no variant that claims are about ({', '.join(judged)})"
            raise BadInput(f'instead: {said}; name one, and behind it what stands in for it: {{"bf16": "bf16-rust"}}')
        run.profile.variant(variant)
    claims = [claim for claim in facts["claims"] if not instead or "rate" in claim.get("fp8", {})]
    return [JUDGES[claim["quantity"]](claim, facts["protocol"], seen) for claim in claims]


def write_claims(run: Run) -> None:
    """Stores the verdicts as `claims.json` in the run's folder. Raises BadInput for a recorded run, NotWritten."""
    a_run(run).check_writable()
    write_json(run.path / "claims.json", {"source": published()["source"], "claims": judge(run)})


def claims_table(run: Run, *, brief: bool = False, instead: Mapping[str, str] | None = None) -> Table:
    """The verdicts as a table, in words. Behind each level that a verdict rests on stands what limited it. `brief`
    leaves out the reasons and the levels; `instead`: see `judge`."""
    verdicts, seen = judge(run, instead), evidence(run)
    rows = [
        (
            v.id, v.title, _with_parts(v.published, v.published_parts, v), _with_parts(v.measured, v.measured_parts, v),
            show_interval(v), v.said, v.cause or "–", v.reason, _rests_on(v),
        )
        for v in verdicts
    ]  # fmt: skip
    caption = f"{card_note(run)}The published claims against run {run.path.name}: {run.profile.title}"
    if instead:
        caption += f". Here {' and '.join(f'{stored} stands for {name}' for name, stored in instead.items())}"
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
    rows = []
    for verdicts in zip(*judged, strict=True):
        one = verdicts[0]
        rows.append((one.id, one.title, show_value(one.published, one.unit), *map(_said, verdicts)))
    names = [f"{run.path.name}{f' ({word})' if (word := card_mark(run)) else ''}" for run in runs]
    caption = "The published claims, run by run: measured, 95 % interval, verdict, and whether the stated cause holds"
    return Table(caption, ("", "claim", "published", *names), rows)


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
    return f"{show_value(one.measured, one.unit)}{between}: {one.said}{cause}"


@dataclass(frozen=True)
class Conclusion:
    """A sentence about a run, for a notebook's cell and a terminal: what it says first, and why."""

    so: str
    because: str

    def _repr_html_(self) -> str:
        return f"<p><strong>{html.escape(self.so)}</strong> {html.escape(self.because)}</p>"

    def __repr__(self) -> str:
        return f"{self.so} {self.because}".strip()


def conclusion(run: Run, about: str) -> Conclusion:
    """What `run` says about a claim ("C1", …) or about a figure, by its name ("saturation", "equal_load", "ablation",
    "littles_law", "kv_capacity", "roofline", "clock", "objective", "unsealing", "anatomy"). Raises BadInput for anything else."""
    if about in _FIGURES:
        found = _FIGURES[about](evidence(run))
    elif one := (claims := {one.id: one for one in judge(run)}).get(about):
        how = "emulated" if one.emulated else "measured"
        measured = "" if one.measured is None else f"{how} {show_value(one.measured, one.unit)}"
        between = f" (95 % interval {show_interval(one)})" if one.interval else ""
        said = "" if one.published is None else f"published {show_value(one.published, one.unit)}"
        values = "; ".join(filter(None, (said, measured + between)))
        told = "; ".join(filter(None, (values, f"stated cause: {one.cause}" if one.cause else "", one.reason)))
        found = f"{one.id}, {one.title}: {one.said}.", f"{told[:1].upper()}{told[1:]}."
    else:
        raise BadInput(f"nothing is concluded about {about!r} (there are: {', '.join([*claims, *_FIGURES])})")
    so, because = found
    return Conclusion(f"{card_note(run)}{so}", because)


def _saturation(seen: Evidence) -> tuple[str, str]:
    most = {}
    for variant in seen.variants():
        if each := seen.by_rate(variant, "steady_output_token_throughput"):
            most[variant] = max(((rate, fmean(values)) for rate, values in each.items()), key=lambda item: item[1])
    if not most:
        return "Nothing is measured yet.", ""
    best = max(most, key=lambda variant: most[variant][1])
    rate, tokens = most[best]
    others = [f"{variant} {shown(value)} ({rate_name(at)})" for variant, (at, value) in most.items() if variant != best]
    limits = " or ".join(f"the {cause}" for cause, _ in causes(seen, best, rate).most_common())
    so = f"The most in steady state is {tokens:,.0f} tokens/s: {best}, {rate_name(rate)}, limited by {limits}."
    return so, f"The others at their best: {', '.join(others)}." if others else ""


def _unsealing(seen: Evidence) -> tuple[str, str]:
    """How far each base came with all changes, what changes to one server that were tried beside each other did, and what FP8
    is worth with all of them."""
    told, last, profile, title = [], {}, seen.run.profile, "What all changes together give."
    before = {variant: adds_to for variant, adds_to, _ in unsealing_steps(seen)}
    adding = {one: [v for v, adds_to in before.items() if adds_to == one] for one in before}
    pairs = []
    for first in (variant for variant, adds_to in before.items() if not adds_to):
        # The way goes on where others add to what was added, and ends where several were tried beside each other.
        way = [first]
        while on := [v for v in adding[way[-1]] if adding[v]] or (adding[way[-1]] if len(adding[way[-1]]) == 1 else []):
            way.append(on[0])
        pairs += [(way[-1], first)] if len(way) > 1 else []
        pairs += [(v, before[v]) for v in before if before[v] in way and v not in way]
    if pairs and all(before[variant] == beside for variant, beside in pairs):
        title = "What each change does alone."
    for variant, beside in pairs:
        cards = {s.cards for s in seen.levels((beside, variant), math.inf).values()}
        whole, steady = (seen.compare(variant, beside, math.inf, metric) for metric in UNSEALED)
        if len(cards) == 1 and whole and steady:
            if profile.changes(variant, beside).startswith("python "):
                title = "What another version of vLLM gives."
            now = [shown(mean_of(seen, variant, metric)) for metric in UNSEALED]
            told.append(
                f"{variant} over {beside}: {whole} over the whole run ({now[0]} tokens/s), {steady} in steady state ({now[1]})."
            )
    # The worth is that of the fastest of each: what helps FP8 may cost BF16.
    for variant in before:
        base = profile.base(variant)
        last[base] = max(last.get(base, variant), variant, key=lambda v: mean_of(seen, v, UNSEALED[0]) or 0)
    changed = all(last.get(base, base) != base for base in ("bf16", "fp8"))
    if changed and (worth := seen.compare(last["fp8"], last["bf16"], math.inf, UNSEALED[0])):
        limits = " and by the ".join(
            f"{' or the '.join(causes(seen, last[base], math.inf))} ({last[base]})" for base in ("fp8", "bf16")
        )
        told.append(f"{last['fp8']} over {last['bf16']}: {worth} over the whole run; limited by the {limits}.")
    return (title, " ".join(told)) if told else ("No change to a server is measured in this run.", "")


def _ratios(what: str, compared: Callable) -> tuple[str, str]:
    """Each metric's ratios: which of them are shown to be off 1."""

    def where(c: Compared) -> str:
        return f"{c.effect}{', ' if c.effect else ''}{rate_name(c.rate)}, {c.brief}"

    told = []
    for metric, (title, _) in METRICS.items():
        ratios = compared(metric)
        off = [c for c in ratios if c.ratio.shown]
        each = "; ".join(f"{where(c)} {c.ratio}" for c in off)
        if len(off) > 3:
            low, high = (pick(off, key=lambda c: c.ratio.value) for pick in (min, max))
            each = " to ".join(f"{c.ratio} ({where(c)})" for c in (low, high))
        if ratios:
            same = "no difference shown" if any(c.ratio.interval for c in ratios) else "no repeats, nothing is claimed"
            told.append(f"{title}: {f'{len(off)} of {len(ratios)} comparisons differ, {each}' if off else same}.")
    return (f"{what}, metric by metric.", " ".join(told)) if told else (f"{what}: not measured in this run.", "")


def _littles_law(seen: Evidence) -> tuple[str, str]:
    shares = {level_id: counted / expected for level_id, (expected, counted) in seen.in_flight().items()}
    if not shares:
        return "The EngineCore was not sampled.", ""
    so = f"The EngineCore held {_range(shares, '.0%')} of the requests that Little's law puts in flight."
    return so, "What is missing was in the API server, before the EngineCore or behind it."


def _range(values: Mapping[str, float], pattern: str) -> str:
    """The lowest and the highest, with their levels."""
    low, high = min(values, key=values.get), max(values, key=values.get)
    return f"{values[low]:{pattern}} ({low}) to {values[high]:{pattern}} ({high})"


def _kv_capacity(seen: Evidence) -> tuple[str, str]:
    rows = seen.kv_room()
    if not rows:
        return "The KV cache was not sampled.", ""
    full = [level_id for level_id in seen.summaries if seen.limit(level_id).cause == "KV capacity"]
    so = f"The KV cache was the limit of {', '.join(full)}." if full else "The KV cache was the limit of no level."
    each = (f"{v}: room for {holds:,.0f} requests, {most:,.0f} ran at most, {shown(share, '.0%')} full at most"
            for v, _, holds, most, share in rows)  # fmt: skip
    return so, f"{'; '.join(each)}."


def _roofline(seen: Evidence) -> tuple[str, str]:
    held = {level_id: one for level_id in seen.summaries if (one := seen.roofline(level_id))}
    if not held:
        return "How far the card's limits were is not known here.", ""
    compute = {level_id: one.compute for level_id, one in held.items()}
    memory = {level_id: one.memory for level_id, one in held.items()}
    so = f"The tokens needed at most {max(compute.values()):.0%} of the matrix peak and {max(memory.values()):.0%} of the bandwidth."
    return so, f"Of the matrix peak {_range(compute, '.0%')}; of the bandwidth {_range(memory, '.0%')}."


def _clock(seen: Evidence) -> tuple[str, str]:
    clocks = {level_id: seen.clock(level_id) for level_id in seen.fullest()}
    told = [f"{level_id}: {ran}." for level_id, ran in clocks.items() if ran and ran.mhz is not None]
    return ("What the clock did in the steady window.", " ".join(told)) if told else ("No GPU was sampled.", "")


def _anatomy(seen: Evidence) -> tuple[str, str]:
    """The kinds of kernel that take the longest at each variant's fullest batch, and what the host adds to the step."""
    told = []
    for variant, batches in anatomies(seen.run).items():
        one, step = batches[-1], batches[-1].decode
        if step is None:
            continue
        floors = floors_of(seen.run, variant, step.work)
        each = [f"{kind} {ms:.1f} ms{f' (its floor {floors[kind]:.1f})' if kind in floors else ''}"
                for kind, ms in Counter(step.times).most_common(2)]  # fmt: skip
        told.append(
            f"{variant}, {one.batch:,} at once: {', '.join(each)}; the host adds {host_adds(one)} ms to a step of {one.wall_ms:.2f}."
        )
    return ("Where a full step's time goes.", " ".join(told)) if told else ("No kernel was profiled in this run.", "")


def _objective(seen: Evidence) -> tuple[str, str]:
    limits = {variant: seen.slo_limit(variant, DEFAULT) for variant in seen.variants()}
    each = "; ".join(
        f"{v} {limit}{' req/s' if limit.low or 0 < limit.high < math.inf else ''}" for v, limit in limits.items()
    )
    return f"{DEFAULT}: the highest rate that meets it.", f"{each}."


_FIGURES = {
    "saturation": _saturation,
    "equal_load": lambda seen: _ratios("FP8 against BF16 at equal load", seen.equal_load),
    "ablation": lambda seen: _ratios("The halves of FP8", seen.ablation),
    "littles_law": _littles_law, "kv_capacity": _kv_capacity, "roofline": _roofline, "clock": _clock,
    "objective": _objective, "unsealing": _unsealing, "anatomy": _anatomy,
}  # fmt: skip
