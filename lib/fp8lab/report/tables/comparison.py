"""Variants against each other at equal load: one run's ratios with their intervals, and several runs' side by side."""

import math
from collections import Counter
from collections.abc import Sequence
from statistics import fmean

from ...config.flags import parse
from ...config.profile import rate_name
from ...metrics.statistics import ABLATION, Ratio
from ...results.evidence import Compared, Evidence, evidence
from ...results.run_folder import Run
from ...ui.table import Table
from ...ui.text import shown
from ..verdict import card_note

# What is compared at equal load: metric of a level's summary, its name, and which way is better.
METRICS = {
    "output_token_throughput": ("output tokens/s, whole run", "higher"),
    "mean_tpot_ms": ("mean TPOT", "lower"),
    "joules_per_output_token": ("joules an output token", "lower"),
}
_THROUGHPUT, _JOULES = "output_token_throughput", "joules_per_output_token"
# What a change to a server is judged by: whole run, and without its ramp and drain.
UNSEALED = (_THROUGHPUT, "steady_output_token_throughput")


def equal_load_table(run: Run) -> Table:
    """FP8 over BF16 at the same rate, trace and seeds, with 95 % intervals."""
    seen = evidence(run)
    rows = [
        (name, rate_name(c.rate), c.brief, f"{c.ratio.value:.3f}", _interval(c.ratio),
         _said(c.ratio, better) + _steady_state(seen, metric, c), _clocks(seen, c), c.ratio.model,
         seen.parts(c.variants.values(), c.rate))
        for metric, (name, better) in METRICS.items()
        for c in seen.equal_load(metric)
    ]  # fmt: skip
    columns = ("metric", "offered", "server", "FP8 / BF16", "95 % interval", "so", "steady clock, FP8 / BF16")
    caption = f"{card_note(run)}FP8 over BF16 at equal load, run {run.path.name}"
    return _with_parts(caption, (*columns, "interval from", "part of the run"), rows)


def ablation_table(run: Run) -> Table:
    """The 2x2 of FP8 weights and FP8 KV cache: main effects and interaction, as ratios."""
    seen = evidence(run)
    rows = [
        (name, rate_name(c.rate), c.brief, c.effect, f"{c.ratio.value:.3f}", _interval(c.ratio),
         _said(c.ratio, better) + _across_parts(seen, c), seen.parts(c.variants.values(), c.rate))
        for metric, (name, better) in METRICS.items()
        for c in seen.ablation(metric)
    ]  # fmt: skip
    caption = (
        "Which half of FP8 does it? Main effects: the mean ratio that a half gives without and with "
        f"the other; interaction: how much more (or less) both give than their product. Run {run.path.name}"
    )
    if not rows:
        caption = f"Run {run.path.name} does not hold all four variants at one rate"
    columns = ("metric", "offered", "server", "effect", "ratio", "95 % interval", "so", "part of the run")
    return _with_parts(f"{card_note(run)}{caption}", columns, rows)


def worth_table(*runs: Run) -> Table:
    """What FP8 changed at equal load in each run, and what limited the two variants there."""
    rows, runs = [], once(runs)
    for run in runs:
        seen = evidence(run)
        joules = {(c.setup, c.rate): c.ratio for c in seen.equal_load(_JOULES)}
        for c in seen.equal_load(_THROUGHPUT):
            limits = (" or ".join(causes(seen, c.variants[base], c.rate)) for base in ("bf16", "fp8"))
            energy, parts = joules.get((c.setup, c.rate)), seen.parts(c.variants.values(), c.rate)
            rows.append((
                run.path.name, rate_name(c.rate), c.brief, str(c.ratio), str(energy or "–"), _clocks(seen, c), *limits, parts
            ))  # fmt: skip
    columns = ("run", "offered", "server", "tokens/s, FP8 / BF16", "J/token, FP8 / BF16")
    columns += ("steady clock, FP8 / BF16", "BF16 limited by", "FP8 limited by", "part of the run")
    return _with_parts(f"{card_note(*runs)}What FP8 changed at equal load, and what was the limit", columns, rows)


def unsealing_table(run: Run) -> Table:
    """What each change to a server did with all requests at once: every variant beside the one that it adds to, its
    throughputs, what limited it, and what the change costs."""
    seen, rows, burst = evidence(run), [], math.inf
    for variant, before, change in unsealing_steps(seen):
        servers = [s.server for s in seen.levels((variant,), burst).values()]
        means = [mean_of(seen, variant, metric) for metric in UNSEALED]
        ratios = [str(seen.compare(variant, before, burst, metric) or "–") if before else "–" for metric in UNSEALED]
        rows.append((
            variant, change or "–", before or "–", shown(means[0]), ratios[0], shown(means[1]), ratios[1],
            shown(mean_of(seen, variant, "mean_ttft_ms")), shown(mean_of(seen, variant, "mean_tpot_ms"), ",.1f"),
            shown(servers[0].kv_cache_tokens), shown(fmean(server.startup_s for server in servers)), " or the ".join(causes(seen, variant, burst)),
        ))  # fmt: skip
    columns = ("variant", "changes", "beside", "tok/s, whole run", "over that", "tok/s, steady", "over that, steady", "TTFT ms",
               "TPOT ms", "KV cache, tokens", "start, s", "limited by")  # fmt: skip
    caption = f"{card_note(run)}One change after the other, all requests at once, run {run.path.name}; 95 % intervals"
    return Table(caption if rows else f"{caption}: no such level", columns, rows)


def unsealing_steps(seen: Evidence) -> list[tuple[str, str, str]]:
    """(variant, the one that it adds to or "", what it changes) of every variant that was sent all requests at once, the least
    changed of a base first. It adds to that one which has the most of its flags and none that it lacks; where none was
    measured, its changes are those to its base."""
    profile, found = seen.run.profile, []
    held = [v for v in seen.variants() if v in profile.variants and math.inf in seen.rates(v)]
    names = {v: {flag.name for flag in parse(profile.variant(v).flags)} | set(profile.variant(v).env) for v in held}
    for variant in sorted(held, key=lambda v: (profile.base(v), len(names[v]))):
        base = profile.base(variant)
        beside = [v for v in held if profile.base(v) == base and names[v] < names[variant]]
        before = max(beside, key=lambda v: len(names[v]), default="")
        found.append((variant, before, profile.changes(variant, before or base)))
    return found


def mean_of(seen: Evidence, variant: str, metric: str, rate: float = math.inf) -> float | None:
    """The mean of a variant's seeds at a rate, by default with all requests at once; None without one."""
    values = seen.seeds(variant, rate, metric).values()
    return fmean(values) if values else None


def over(seen: Evidence, variant: str, beside: str, rate: float, metric: str, factor: float = 1.0) -> str:
    """A variant's metric over another's at a rate, times `factor`, with its interval where several seeds give one; a dash for
    the variant itself and where one of the two is missing."""
    found = seen.compare(variant, beside, rate, metric) if variant != beside else None
    if found is None:
        return "–"
    found = found.times(factor)
    return f"{found.value:.2f}×" if math.isnan(found.low) else str(found)


def once(runs: Sequence[Run]) -> list[Run]:
    """The runs, one that is named twice only once."""
    return list({run.path.resolve(): run for run in runs}.values())


def causes(seen: Evidence, variant: str, rate: float) -> Counter[str]:
    """What limited a variant at a rate, and how many of its valid seeds."""
    return Counter(seen.limit(level_id).cause for level_id in seen.levels((variant,), rate))


def _clocks(seen: Evidence, c: Compared) -> str:
    """What else differed between the variants: the mean clock that their power left, FP8 over BF16, in the steady windows of
    the seeds that both have; a dash where it was not sampled."""
    mhz = {base: seen.seeds(variant, c.rate, "gpu_sm_mhz_steady") for base, variant in c.variants.items()}
    shared = mhz["fp8"].keys() & mhz["bf16"].keys()
    if not shared:
        return "–"
    fp8, bf16 = (fmean(mhz[base][seed] for seed in shared) for base in ("fp8", "bf16"))
    return f"{fp8 / bf16:.2f}× ({fp8:,.0f} / {bf16:,.0f} MHz)"


def _with_parts(caption: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table whose last column says in which parts of a run a comparison was measured; without it for a run in one."""
    if not any(row[-1] for row in rows):
        return Table(caption, columns[:-1], [row[:-1] for row in rows])
    caption += ". It was measured in several parts, each on a machine of its own or from another commit (run.json): "
    caption += "a comparison across parts also compares those"
    return Table(caption, columns, rows)


def _interval(one: Ratio) -> str:
    return "–" if math.isnan(one.low) else f"{one.low:.3f} to {one.high:.3f}"


def _across_parts(seen: Evidence, c: Compared) -> str:
    """A warning where an effect also compares parts of the run: where they do not cancel in its contrast."""
    net: dict[str, float] = {}
    for base, weight in ABLATION[c.effect].items():
        part = seen.parts([c.variants[base]], c.rate)
        net[part] = net.get(part, 0.0) + weight
    return " (but it also compares parts of the run)" if len(net) > 1 and any(net.values()) else ""


def _steady_state(seen: Evidence, metric: str, c: Compared) -> str:
    """What the steady state says of a throughput ratio where both variants kept up: a whole run's difference lies
    in its ramp and drain where the steady state's interval ends before it."""
    one, variants = c.ratio, c.variants
    if metric != _THROUGHPUT or not one.shown or seen.saturated(variants["bf16"], variants["fp8"], rate=c.rate):
        return ""
    steady = seen.compare(variants["fp8"], variants["bf16"], c.rate, "steady_output_token_throughput")
    if steady is None:
        return ""
    beyond = steady.high < one.value if one.value > 1 else steady.low > one.value
    return f" (both kept up{': in its ramp and drain' if beyond else ''}; steady state {steady})"


def _said(one: Ratio, better: str) -> str:
    if math.isnan(one.low):
        return "no repeats: nothing is claimed"
    if not one.shown:
        return "no difference shown"
    higher = one.value > 1
    return f"{'higher' if higher else 'lower'}: {'better' if higher == (better == 'higher') else 'worse'}"
