"""Variants against each other at equal load: one run's ratios with their intervals, several runs' side by side, by cards, by
number formats."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean

from ..config.dimensions import weight_format
from ..config.profile import rate_name
from ..experiment.quality import comparisons
from ..metrics.statistics import ABLATION, Ratio
from ..results.evidence import Compared, Evidence, evidence
from ..results.run_folder import Run, a_run
from ..ui import Table, shown
from .drawing import INK, PLAINLY, Figure, figure, forest, label_where_free, name_rows, note, style_of
from .verdict import card_note, claim_of

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
    return with_parts(caption, (*columns, "interval from", "part of the run"), rows)


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
    return with_parts(f"{card_note(run)}{caption}", columns, rows)


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
    columns = ("run", "offered", "server", "tokens/s, FP8 / BF16", "J/token, FP8 / BF16", "steady clock, FP8 / BF16",
               "BF16 limited by", "FP8 limited by", "part of the run")  # fmt: skip
    return with_parts(f"{card_note(*runs)}What FP8 changed at equal load, and what was the limit", columns, rows)


def unsealing_table(run: Run) -> Table:
    """What each change to a server did with all requests at once: every variant beside the one that it adds to, its
    throughputs, what limited it, and what the change costs."""
    seen, rows, burst = evidence(run), [], math.inf
    for variant, before, change in unsealing_steps(seen):
        servers = [s.server for s in seen.levels((variant,), burst).values()]
        means = [mean_of(seen, variant, metric) for metric in UNSEALED]
        ratios = [str(seen.compare(variant, before, burst, metric) or "–") if before else "–" for metric in UNSEALED]
        version = f"vLLM {servers[0].vllm}: " if servers[0].vllm else ""
        rows.append((
            variant, f"{version}{change or '–'}", before or "–", shown(means[0]), ratios[0], shown(means[1]), ratios[1],
            shown(mean_of(seen, variant, "mean_ttft_ms")), shown(mean_of(seen, variant, "mean_tpot_ms"), ",.1f"),
            shown(servers[0].kv_cache_tokens), shown(fmean(server.startup_s for server in servers)), " or the ".join(causes(seen, variant, burst)),
            seen.parts([name for name in (variant, before) if name], burst),
        ))  # fmt: skip
    columns = ("variant", "changes", "beside", "tok/s, whole run", "over that", "tok/s, steady", "over that, steady", "TTFT ms",
               "TPOT ms", "KV cache, tokens", "start, s", "limited by", "part of the run")  # fmt: skip
    caption = f"{card_note(run)}One change after the other, all requests at once, run {run.path.name}; 95 % intervals"
    return with_parts(caption, columns, rows)


def unsealing_steps(seen: Evidence) -> list[tuple[str, str, str]]:
    """(variant, the one that it adds to or "", what it changes) of every variant that was sent all requests at once, the least
    changed of a base first. It adds to that one which changes the most of the flags that it changes, and no other; where none
    was measured, its changes are those to its base."""
    profile, found = seen.run.profile, []
    held = [v for v in seen.variants() if v in profile.variants and math.inf in seen.rates(v)]
    names = {v: profile.changed(v) for v in held}
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
    """The runs, one that is named twice only once. Raises BadInput for what is no run."""
    return list({a_run(run).path.resolve(): run for run in runs}.values())


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


def with_parts(caption: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
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
    net: Counter[str] = Counter()
    for base, weight in ABLATION[c.effect].items():
        net[seen.parts([c.variants[base]], c.rate)] += weight
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


def cards_table(run: Run, *, price: float | None = None) -> Table:
    """Every variant at every rate by its cards: throughput of all and of each, joules, both beside the rate's first variant's with
    95 % intervals, and, with the `price` of a card's hour, what a million tokens cost. Each of several cards' own load, power and clock stand beside it."""
    seen, rows, first = evidence(run), [], {}
    for rate in sorted({rate for variant in seen.variants() for rate in seen.rates(variant)}):
        for variant in seen.variants():
            held = list(seen.levels((variant,), rate).items())
            if not held:
                continue
            cards = held[0][1].cards
            beside, its_cards = first.setdefault(rate, (variant, cards))
            metrics = (*UNSEALED, _JOULES, "mean_tpot_ms")
            tokens, steady, joules, tpot = (mean_of(seen, variant, metric, rate) for metric in metrics)
            cost = price * cards / (tokens * 3600 / 1e6) if price and tokens else None
            rows.append((
                f"{rate_name(rate)}, {held[0][1].requests:,}", variant, f"{cards}", shown(tokens), shown(tokens and tokens / cards),
                over(seen, variant, beside, rate, _THROUGHPUT, its_cards / cards), shown(steady and steady / cards),
                over(seen, variant, beside, rate, UNSEALED[1], its_cards / cards), shown(tpot, ",.1f"),
                shown(joules, ".4f"), over(seen, variant, beside, rate, _JOULES), *([shown(cost, ".3f")] if price else []),
                _each_card(seen, held[0][0], cards), " or the ".join(causes(seen, variant, rate)), seen.parts((variant, beside), rate),
            ))  # fmt: skip
    columns = ("offered, requests", "variant", "cards", "tok/s, whole run", "tok/s a card", "over the first's", "steady, a card",
               "over the first's", "TPOT ms", "J/token", "over the first's",
               *(["a million tokens cost"] if price else []), "each card, steady, first seed", "limited by", "part of the run")  # fmt: skip
    caption = f"{card_note(run)}By cards, run {run.path.name}" + (f"; {price:g} an hour and card" if price else "")
    return with_parts(caption, columns, rows)


def _each_card(seen: Evidence, level_id: str, cards: int) -> str:
    """Load, power and clock of each of several cards over the steady window; a dash for a single one, or none sampled."""
    level = seen.level(level_id)
    if cards < 2 or level is None or level.telemetry is None or "gpu_util 0" not in level.telemetry:
        return "–"
    if level.telemetry["gpu_util 0"].isna().all():
        return "–"
    inside = level.telemetry[level.telemetry["at_s"].between(*level.summary.window)]
    sampled = ("gpu_util", "gpu_power_w", "gpu_sm_mhz")
    each = [[inside[f"{name} {card}"].mean() for name in sampled] for card in range(cards)]
    return "; ".join(f"{util:.0%}, {watts:,.0f} W, {mhz:,.0f} MHz" for util, watts, mhz in each)


@figure("unsealing", "What does each change to the server give?")
def unsealing_figure(axes, run: Run) -> str:
    """Output tokens/s with all requests at once, variant by variant: whole run and steady state."""
    seen = evidence(run)
    steps = unsealing_steps(seen)
    for y, (variant, _, _) in enumerate(steps):
        color = style_of(run.profile, variant)["color"]
        whole, steady = (mean_of(seen, variant, metric) for metric in UNSEALED)
        for x, height, alpha in ((steady, 0.76, 0.35), (whole, 0.4, 1.0)):
            if x is not None:
                axes.barh(y, x, height, color=color, alpha=alpha)
        note(axes, f"{shown(whole)} / {shown(steady)}", (max(whole or 0, steady or 0), y), va="center")
    name_rows(axes, [variant for variant, _, _ in steps], 1.4, 0.55)
    axes.set_xlabel("output tokens/s, all requests at once")
    axes.margins(x=0.22)
    axes.xaxis.set_major_formatter(PLAINLY)
    return "Mean of the seeds: whole run (full colour) / steady state (pale). The table says what each variant changes."


@figure("equal_load", "What does FP8 change at equal load?")
def equal_load_figure(axes, run: Run) -> str:
    """FP8 over BF16 at equal load, with intervals."""
    rows = [(_row(metric, c), c.ratio) for metric in METRICS for c in evidence(run).equal_load(metric)]
    forest(axes, rows, "FP8 / BF16")
    return "Same rate, trace and seeds. Bars are 95 % intervals; a bar across 1 shows no difference."


@figure("ablation", "Which half of FP8 does it?")
def ablation_figure(axes, run: Run) -> str:
    """What FP8 weights and the FP8 KV cache each do, and their interaction."""
    drawn = [
        (metric, c)
        for metric in METRICS
        for c in evidence(run).ablation(metric)
        if math.isinf(c.rate) or metric == _JOULES
    ]
    forest(axes, [(_row(metric, c), c.ratio) for metric, c in drawn], "ratio")
    return "Main effects are mean ratios without and with the other half. Bars are 95 % intervals; across 1: no effect shown."


def _row(metric: str, c: Compared) -> str:
    setup = "" if c.variants["bf16"] == "bf16" else f", {c.brief}"
    return f"{METRICS[metric][0]}, {rate_name(c.rate)}{setup}" + (f": {c.effect}" if c.effect else "")


def worth_figure(*runs: Run, rows: Mapping[tuple[str, float, str], str] | None = None) -> Figure:
    """The throughput ratios at equal load that rest on repeats, run by run, with what limited them, beside the published one.
    `rows` chooses among them and names them: text by (run, rate, setup)."""
    return _worth(*([run for run in once(runs) if _repeated(run)] or once(runs)), rows=rows)


def _repeated(run: Run) -> list[Compared]:
    return [c for c in evidence(run).equal_load(_THROUGHPUT) if c.ratio.pairs >= 2]


@figure("worth", "What is FP8 worth, and what was the limit?")
def _worth(axes, *runs: Run, rows: Mapping[tuple[str, float, str], str] | None) -> str:
    claim, drawn = claim_of("C1"), {}
    bf16, fp8 = claim["bf16"], claim["fp8"]
    for run in runs:
        for c in _repeated(run):
            behind = "" if c.variants["bf16"] == "bf16" else f", behind {c.brief}"
            name = (rows or {}).get((run.path.name, c.rate, c.setup), f"{run.path.name}, {rate_name(c.rate)}{behind}")
            limit = _mostly(*(causes(evidence(run), c.variants[base], c.rate) for base in ("bf16", "fp8")))
            drawn[run.path.name, c.rate, c.setup] = (f"{name}\nlimit: {limit}", c.ratio)
    text = f"published, other loads:\nFP8 at {fp8['rate']}, BF16 at {bf16['rate']} req/s"
    shown = [drawn[key] for key in (rows or drawn)]
    forest(axes, shown, "output tokens/s, FP8 / BF16", said=(text, fp8["value"] / bf16["value"]))
    return (
        "Same rate, trace and seeds, 95 % intervals; a bar across 1 shows no difference. Star: the published ratio, which "
        "crosses two loads. Where the API server is the limit the ratio is not the card's."
    )


def _mostly(bf16: Counter[str], fp8: Counter[str]) -> str:
    """What limited most levels of each variant in a few words, if most have one limit; once where it is the same."""
    told = []
    for causes in (bf16, fp8):
        plain = Counter(cause.partition(",")[0] for cause in causes.elements())
        ((cause, levels),) = plain.most_common(1)
        most = f"mostly {cause}" if 2 * levels > plain.total() else "differs by seed"
        told.append(cause if len(plain) == 1 else most)
    return told[0] if told[0] == told[1] else f"BF16 {told[0]}, FP8 {told[1]}"


def formats_of(seen: Evidence) -> list[str]:
    """The variants that were measured, those with the most bytes a weight first."""
    profile = seen.run.profile

    def bytes_of(variant: str) -> float:
        return weight_format(profile.variant(variant).flags, profile.shape(variant)).weight_bytes

    return sorted((v for v in seen.variants() if v in profile.variants), key=bytes_of, reverse=True)


def checkpoints_table(run: Run) -> Table:
    """What each format takes: bytes on the card beside those that it should take, room for KV cache, seconds to start, and
    the kernels of its matrix products."""
    seen, rows = evidence(run), []
    for variant in formats_of(seen):
        # One of each start: how many levels it served says nothing of it.
        servers = list({s.start: s.server for s in seen.levels((variant,), valid=False).values()}.values())
        shape, one = run.profile.shape(variant), servers[0]
        asked = weight_format(one.command, shape)
        expected = shape.weight_bytes(asked) / 2**30 if shape else None
        loads = [server.load_s for server in servers if server.load_s]
        rows.append((
            variant, run.profile.variant(variant).recipe or "–", shown(expected, ".2f"), shown(one.model_memory_gib, ".2f"),
            shown(one.kv_cache_tokens), shown(fmean(loads) if loads else None, ".1f"),
            shown(fmean(server.startup_s for server in servers)), ", ".join(one.kernels) or "–",
        ))  # fmt: skip
    columns = ("variant", "recipe", "weights should take, GiB", "they take, GiB", "KV cache, tokens", "loading, s", "start, s",
               "kernels")  # fmt: skip
    return Table(f"{card_note(run)}What each number format takes, run {run.path.name}", columns, rows)


def recipes_table(run: Run, beside: str = "bf16") -> Table:
    """Every format at each rate: the time a token takes, throughput and energy over those of `beside`, with 95 % intervals
    where there are several seeds."""
    seen, rows = evidence(run), []
    formats = formats_of(seen)
    for rate in sorted({rate for variant in seen.variants() for rate in seen.rates(variant)}):
        for variant in (v for v in formats if seen.levels((v,), rate)):
            tokens, joules = (over(seen, variant, beside, rate, metric) for metric in (_THROUGHPUT, _JOULES))
            names = ("mean_ttft_ms", "mean_tpot_ms", _THROUGHPUT, _JOULES, "gpu_sm_mhz_steady")
            ttft, tpot, served, cost, mhz = (mean_of(seen, variant, name, rate) for name in names)
            rows.append((
                rate_name(rate), variant, shown(ttft), shown(tpot, ",.2f"), shown(served), tokens, shown(cost, ".4f"), joules,
                shown(mhz), " or the ".join(causes(seen, variant, rate)), seen.parts((variant, beside), rate),
            ))  # fmt: skip
    columns = ("offered", "variant", "TTFT ms", "TPOT ms", "tok/s, whole run", f"over {beside}", "J/token", f"J over {beside}",
               "steady MHz", "limited by", "part of the run")  # fmt: skip
    starts = min(
        (seen.starts((variant,), math.inf) for variant in formats if seen.levels((variant,), math.inf)), default=0
    )
    spread = f", all at once over {starts} start{'s' * (starts > 1)} of each" if starts else ""
    caption = f"{card_note(run)}Every number format at equal load, run {run.path.name}; 95 % intervals over seeds{spread}; a ratio "
    return with_parts(f"{caption}without one is a single seed's", columns, rows)


@figure("recipes", "Which number format is fast, and what does it cost?", columns=2)
def recipes_figure(axes, run: Run, answers: Run | None = None) -> str:
    """Tokens a second (at the highest rate at which the most formats were measured; those of one request at the lowest) against the
    share of positions at which the trained model of `answers` has the same likeliest token as its reference, or, without
    `answers`, against tokens a joule; the area of a mark is the weights' memory."""
    seen = evidence(run)
    formats = [variant for variant in formats_of(seen) if seen.rates(variant)]
    # One format's 25 req/s beside another's single request would compare loads, not formats.
    counts = Counter(rate for variant in formats for rate in seen.rates(variant))
    most = [rate for rate, count in counts.items() if count == max(counts.values())]
    full, low = max(most, default=math.inf), min(most, default=math.inf)
    held = comparisons(answers) if answers and answers.read_parts("quality") else {}
    drawn, left_out = {}, []
    for variant in formats:
        joules, tpot = mean_of(seen, variant, _JOULES, full), mean_of(seen, variant, "mean_tpot_ms", low)
        same = 100 * held[variant].top1_agreement.value if variant in held else None
        if (height := same if answers else joules and 1 / joules) is None:
            left_out.append(variant)
            continue
        gib = next(iter(seen.levels((variant,)).values())).server.model_memory_gib
        drawn[variant] = (mean_of(seen, variant, _THROUGHPUT, full), tpot and 1e3 / tpot), height, 12 * (gib or 4)
    said = f"Not drawn, theirs was not measured: {', '.join(left_out)}. " if left_out else ""
    for place, (one, what, rate) in enumerate(
        zip(axes, ("output tokens/s", "tokens/s of a request"), (full, low), strict=True)
    ):
        here = {variant: (x[place], y, area) for variant, (x, y, area) in drawn.items() if x[place]}
        if lacking := [variant for variant in drawn if variant not in here]:
            said += f"Not measured at {rate_name(rate)}: {', '.join(lacking)}. "
        for variant, (x, y, area) in here.items():
            colour = style_of(run.profile, variant)["color"]
            one.scatter(x, y, s=area, color=colour, alpha=0.7, edgecolor=INK, lw=0.6)
        one.set(xlabel=f"{what}, {rate_name(rate)}")
        one.set_ylabel("same likeliest token, % of positions" if answers else "output tokens a joule")
        one.margins(0.25, 0.2)
        if answers:  # a share ends at 100, though a mark needs room above
            one.set_yticks([tick for tick in one.get_yticks() if one.get_ylim()[0] < tick <= 100])
        one.locator_params(axis="x", nbins=5)
        one.xaxis.set_major_formatter(PLAINLY)
        # An area is given in points squared, as the square of the diameter.
        widest = math.sqrt(max((area for _, _, area in here.values()), default=0))
        label_where_free(one, [(variant, x, y) for variant, (x, y, _) in here.items()], widest / 2, around=True)
    if answers:
        question = "Which number format is fast, and what does it do to the answers?"
        axes[0].set_title(question, loc="left", fontsize=11, color=INK)
    model = f"Answers: run {answers.path.name}, {answers.profile.title}; {card_note(answers)}" if answers else ""
    least = "" if answers else f"Tokens a joule: {rate_name(full)}. "
    return f"Right and up is better; a mark's area is the memory of its weights. {least}{said}{model}".strip()
