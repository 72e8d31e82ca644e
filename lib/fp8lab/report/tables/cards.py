"""Several cards: what each adds, alone and together."""

from ...config.profile import rate_name
from ...results.evidence import Evidence, evidence
from ...results.run_folder import Run
from ...ui.table import Table
from ...ui.text import shown
from ..verdict import card_note
from .comparison import causes, mean_of, over


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
            names = (
                "output_token_throughput",
                "steady_output_token_throughput",
                "joules_per_output_token",
                "mean_tpot_ms",
            )
            tokens, steady, joules, tpot = (mean_of(seen, variant, name, rate) for name in names)
            cost = price * cards / (tokens * 3600 / 1e6) if price and tokens else None
            rows.append((
                rate_name(rate), variant, f"{cards}", shown(tokens), shown(tokens and tokens / cards),
                over(seen, variant, beside, rate, names[0], its_cards / cards), shown(steady), shown(tpot, ",.1f"),
                shown(joules, ".4f"), over(seen, variant, beside, rate, names[2]), *([shown(cost, ".3f")] if price else []),
                _each_card(seen, held[0][0], cards), " or the ".join(causes(seen, variant, rate)),
            ))  # fmt: skip
    columns = ("offered", "variant", "cards", "tok/s, whole run", "tok/s a card", "over the first's", "tok/s, steady",
               "TPOT ms", "J/token", "over the first's",
               *(["a million tokens cost"] if price else []), "each card, steady, first seed", "limited by")  # fmt: skip
    caption = f"{card_note(run)}By cards, run {run.path.name}" + (f"; {price:g} an hour and card" if price else "")
    return Table(caption, columns, rows)


def _each_card(seen: Evidence, level_id: str, cards: int) -> str:
    """Load, power and clock of each of several cards over the steady window; a dash for a single one, or none sampled."""
    level = seen.level(level_id)
    if cards < 2 or level is None or level.telemetry is None or "gpu_util 0" not in level.telemetry:
        return "–"
    if level.telemetry["gpu_util 0"].isna().all():
        return "–"
    inside = level.telemetry[level.telemetry["at_s"].between(*level.summary.window)]
    each = [
        [inside[f"{name} {card}"].mean() for name in ("gpu_util", "gpu_power_w", "gpu_sm_mhz")] for card in range(cards)
    ]
    return "; ".join(f"{util:.0%}, {watts:,.0f} W, {mhz:,.0f} MHz" for util, watts, mhz in each)
