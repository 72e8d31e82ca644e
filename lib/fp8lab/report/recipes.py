"""The number formats side by side: what each takes of the card, what it serves alone and under load, what it does to answers."""

import math
from collections import Counter
from statistics import fmean

from ..config.dimensions import weight_format
from ..config.profile import rate_name
from ..experiment.quality import comparisons
from ..results.evidence import Evidence, evidence
from ..results.run_folder import Run
from ..ui.text import Table, shown
from .comparison import causes, mean_of, over, with_parts
from .drawing import INK, figure, label_where_free, plainly, style_of
from .verdict import card_note

_BURST, _TOKENS, _JOULES = math.inf, "output_token_throughput", "joules_per_output_token"


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
            tokens, joules = (over(seen, variant, beside, rate, metric) for metric in (_TOKENS, _JOULES))
            names = ("mean_ttft_ms", "mean_tpot_ms", _TOKENS, _JOULES, "gpu_sm_mhz_steady")
            ttft, tpot, served, cost, mhz = (mean_of(seen, variant, name, rate) for name in names)
            rows.append((
                rate_name(rate), variant, shown(ttft), shown(tpot, ",.2f"), shown(served), tokens, shown(cost, ".4f"), joules,
                shown(mhz), " or the ".join(causes(seen, variant, rate)), seen.parts((variant, beside), rate),
            ))  # fmt: skip
    columns = ("offered", "variant", "TTFT ms", "TPOT ms", "tok/s, whole run", f"over {beside}", "J/token", f"J over {beside}",
               "steady MHz", "limited by", "part of the run")  # fmt: skip
    starts = min((seen.starts((variant,), _BURST) for variant in formats if seen.levels((variant,), _BURST)), default=0)
    spread = f", all at once over {starts} start{'s' * (starts > 1)} of each" if starts else ""
    caption = f"{card_note(run)}Every number format at equal load, run {run.path.name}; 95 % intervals over seeds{spread}; a ratio "
    return with_parts(f"{caption}without one is a single seed's", columns, rows)


def _shared_rates(seen: Evidence) -> tuple[float, float]:
    """The highest and the lowest of the rates at which the most formats were measured: one's 25 req/s beside another's single
    request would compare loads, not formats."""
    counts = Counter(rate for variant in formats_of(seen) for rate in seen.rates(variant))
    most = [rate for rate, count in counts.items() if count == max(counts.values())]
    return max(most, default=_BURST), min(most, default=_BURST)


def _chosen(
    seen: Evidence, answers: Run | None, full: float, low: float
) -> list[tuple[str, float | None, float | None, float | None, float | None]]:
    """(variant, tokens/s at the rate `full`, tokens/s of one request at `low`, GiB of weights, % of positions with the same
    likeliest token or, without `answers`, tokens a joule at `full`) of every format; None: not measured there."""
    held, rows = comparisons(answers) if answers and answers.read_parts("quality") else {}, []
    for variant in (one for one in formats_of(seen) if seen.rates(one)):
        tpot, joules = mean_of(seen, variant, "mean_tpot_ms", low), mean_of(seen, variant, _JOULES, full)
        gib = next(iter(seen.levels((variant,)).values())).server.model_memory_gib
        same = 100 * held[variant].top1_agreement.value if variant in held else None
        served = mean_of(seen, variant, _TOKENS, full)
        rows.append((variant, served, tpot and 1e3 / tpot, gib, same if answers else joules and 1 / joules))
    return rows


@figure("recipes", "Which number format is fast, and what does it cost?", columns=2)
def recipes_figure(axes, run: Run, answers: Run | None = None) -> str:
    """Tokens a second (at the highest rate at which the most formats were measured; those of one request at the lowest) against the
    share of positions at which the trained model of `answers` has the same likeliest token as its reference, or, without
    `answers`, against tokens a joule; the area of a mark is the weights' memory."""
    label = "same likeliest token, % of positions" if answers else "output tokens a joule"
    seen = evidence(run)
    full, low = _shared_rates(seen)
    rows = _chosen(seen, answers, full, low)
    drawn = [row for row in rows if row[4] is not None]
    left_out = [row[0] for row in rows if row[4] is None]
    said = f"Not drawn, theirs was not measured: {', '.join(left_out)}. " if left_out else ""
    for one, place, what, rate in zip(
        axes, (1, 2), ("output tokens/s", "tokens/s of a request"), (full, low), strict=True
    ):
        here = [row for row in drawn if row[place]]
        if lacking := [row[0] for row in drawn if not row[place]]:
            said += f"Not measured at {rate_name(rate)}: {', '.join(lacking)}. "
        areas = {row[0]: 12 * (row[3] or 4) for row in here}
        for row in here:
            colour = style_of(run.profile, row[0])["color"]
            one.scatter(row[place], row[4], s=areas[row[0]], color=colour, alpha=0.7, edgecolor=INK, lw=0.6)
        one.set(xlabel=f"{what}, {rate_name(rate)}", ylabel=label)
        one.margins(0.25, 0.2)
        one.locator_params(axis="x", nbins=5)
        one.xaxis.set_major_formatter(plainly)
        # An area is given in points squared, as the square of the diameter.
        widest = math.sqrt(max(areas.values(), default=0))
        label_where_free(one, [(row[0], row[place], row[4]) for row in here], widest / 2, around=True)
    model = f"Answers: run {answers.path.name}, {answers.profile.title}; {card_note(answers)}" if answers else ""
    least = "" if answers else f"Tokens a joule: {rate_name(full)}. "
    return f"Right and up is better; a mark's area is the memory of its weights. {least}{said}{model}".strip()
