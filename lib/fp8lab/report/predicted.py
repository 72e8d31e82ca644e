"""What was foretold: of loads that nobody measured, and of levels that were measured, beside them."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from ..config.profile import rate_name
from ..config.trace import Trace
from ..errors import BadInput
from ..experiment.predict import Predicted, highest_rate, longer, predict, predict_rates, what_if
from ..experiment.step_fit import apart, held_out, judgeable, off_by, replay
from ..metrics.slo import SLO
from ..metrics.step_model import ENERGY, FITTED, JOULES, JUDGED, MEANS, MEASURED, UNTOLD, StepModel
from ..results.run_folder import Run, a_run
from ..ui import StatusLine, Table, four_digits, shown
from .drawing import INK, PLAINLY, figure, log_numbers
from .verdict import card_note

_WORDS = {"output_token_throughput": "tok/s", "mean_tpot_ms": "TPOT", "p99_tpot_ms": "TPOT p99", "mean_ttft_ms": "TTFT",
          "p99_ttft_ms": "TTFT p99", JOULES: "J/token"}  # fmt: skip
_UNITS = {name: f"{word}, ms" for name, word in _WORDS.items() if name.endswith("_ms")}
_DIGITS = {"mean_tpot_ms": ",.1f", "p99_tpot_ms": ",.1f", JOULES: ".4f"}
# Colours that no measured variant has, with markers that are lines and dashes that are no setup's.
_STYLES = (("#7A4B00", "x"), ("#4B2E83", "+"), ("#00576B", "1"), ("#8C1D40", "2"), ("#3D5A00", "3"), ("#555555", "4"),
           ("#A0522D", "|"), ("#6A1B9A", "_"))  # fmt: skip


def _styles(models: Mapping[str, StepModel]) -> dict[str, tuple[str, str]]:
    if left_out := list(models)[len(_STYLES) :]:
        raise BadInput(f"{len(models)} variants are more than {len(_STYLES)} lines; draw without {', '.join(left_out)}")
    return dict(zip(models, _STYLES, strict=False))


def predicted_table(levels: Sequence[Predicted], models: Mapping[str, StepModel]) -> Table:
    """PREDICTED levels: what they deliver, how long tokens take, how full seats and KV cache get; ± how far off the fit is known to be."""
    rows, told = [], [f"{variant}: {errors_of(model)}" for variant, model in models.items() if not model.worst]
    for level in levels:
        model, course, limit = models[level.variant], level.played.course, level.played.limit
        # Where a server keeps up, latencies are those of any longer level. What is too short to tell is like no level of the fit.
        open_ = limit.startswith("not known")
        grows = limit != "offered load" and level.rate != math.inf and not open_
        worst = model.worst if level.trace.lengths == model.trace and not open_ else {}

        def within(name: str, level=level, worst=worst, grows=grows) -> str:
            value, late = level.played.found.get(name, math.nan), name.endswith("_ms")
            if not math.isfinite(value) or (late and level.played.limit == "API server"):
                return "–"
            off = f" ± {math.ceil(100 * worst[name])}%" if name in worst and not (late and grows) else ""
            return f"{value:{_DIGITS.get(name, ',.0f')}}{off}"

        tokens = level.played.records["output_tokens"].mean()
        rows.append((
            level.variant, level.offered, f"{len(level.trace):,}",
            four_digits(level.played.found["output_token_throughput"] / tokens), *map(within, JUDGED),
            f"{course.running_max:,} of {model.requests:,}", f"{course.blocks_max / model.limits.blocks:.0%}", f"{course.preemptions:,}",
            f"{limit}: does not keep up" if grows else limit,
        ))  # fmt: skip
    columns = ("variant", "offered", "requests", "completed, req/s", *(_UNITS.get(name, word) for name, word in _WORDS.items()),
               "running at most", "KV cache at most", "preempted", "limited by")  # fmt: skip
    if known := [model for model in models.values() if model.worst]:
        runs, lengths = (", ".join(dict.fromkeys(getattr(one, key) for one in known)) for key in ("run", "trace"))
        told.append(f"± is the greatest error on levels of run {runs} that the fit never saw: same host, same lengths ({lengths}); where none "
                    "stands it is not known, and `fp8lab predict --against` a run there tells it")  # fmt: skip
    if any(row[-1].endswith("does not keep up") for row in rows):
        told.append("where a level does not keep up, latencies grow with its length")
    told += dict.fromkeys(f"{level.trace.name}: {note}" for level in levels for note in level.trace.notes)
    return Table(f"PREDICTED, nothing was measured. {'; '.join(told)}", columns, rows)


def models_table(models: Mapping[str, StepModel]) -> Table:
    """What each number of a step model is, with how well its levels tell it where it was fitted."""
    rows = []
    for name in (*FITTED, *MEASURED, *ENERGY):
        if not any(getattr(model, name) for model in models.values()):
            continue
        cells = []
        for model in models.values():
            low, high = model.low.get(name), model.high.get(name)
            ends = "" if low is None else " (at its bound)" if low == high else f" ({low:.3g} to {high:.3g})"
            ends = " (its levels do not tell)" if low and high / low > 0.9 * UNTOLD**2 else ends
            value = getattr(model, name)
            cells.append(f"{value:{',.0f' if value >= 1000 else '.3g'}}{ends}" if value else "–")
        rows.append((name, MEANS[name], *cells))
    fitted = "; ".join(dict.fromkeys(model.origin for model in models.values()))
    note = "in brackets how well its levels tell each; at its bound: as fast as the datasheet's bandwidth allows"
    return Table(f"Step models: {fitted}; {note}", ("number", "what it is", *models), rows)


def cards_plan_table(
    models: Mapping[str, StepModel],
    draw: Callable[[int], Trace],
    objective: str,
    *,
    load: float,
    price: float | None = None,
) -> Table:
    """PREDICTED: the highest rate at which each variant meets the objective (`ttft=200,tpot=50`), and the cards that a `load` in
    requests/s takes then, with the price of a card's hour what they cost. Raises BadInput for a load that is none."""
    if not 0 < load < math.inf:
        raise BadInput(f"load {load} is no number of requests/s above 0")
    slo, rows, status = SLO.parse(objective), [], StatusLine()
    for variant, model in models.items():
        status.update(f"{variant}: the highest rate that meets {slo}")
        limit = highest_rate(variant, model, draw, slo)
        servers = math.ceil(load / limit.low) if limit.low else None  # a dash where no rate was shown to meet it
        cards = servers and servers * model.cards
        cost = [shown(cards and price and cards * price, ",.2f")] if price else []
        each = load / servers if servers else None
        joules = predict_rates({variant: model}, draw, [each])[0].played.found.get(JOULES) if each else None
        rows.append((variant, f"{limit}", shown(cards), shown(each, ",.1f"), shown(joules, ".4f"), *cost))
    status.done(f"variants searched: {len(models)}")
    columns = ("variant", "a server meets it up to, req/s", "cards", "req/s a server", "J/token then")
    columns += ("an hour costs",) if price else ()
    return Table(f"PREDICTED: cards for {load:g} requests/s with {slo}", columns, rows)


_OVER_NOW = ("output_token_throughput", "mean_tpot_ms", "mean_ttft_ms")


def what_if_table(models: Mapping[str, StepModel], trace: Trace, rate: float = math.inf) -> Table:
    """PREDICTED: what a change would be worth, beside the same load without it."""
    rows = [
        (variant, what, shown(tokens), *(f"{ratio:.2f}×" if math.isfinite(ratio) else "–" for ratio in ratios))
        for variant, what, tokens, ratios in _what_ifs(models, trace, rate)
    ]
    columns = ("variant", "if", "tok/s", "over now", "TPOT over now", "TTFT over now")
    return Table(f"PREDICTED: what if, {len(trace):,} requests, {rate_name(rate)}", columns, rows)


def _what_ifs(
    models: Mapping[str, StepModel], trace: Trace, rate: float
) -> Iterator[tuple[str, str, float, list[float]]]:
    """(variant, what changes, tokens/s then, the ratios of `_OVER_NOW`)."""
    for variant, model in models.items():
        now = predict(variant, model, trace, rate).played.found
        changed = {what: (one, trace) for what, one in what_if(model).items()}
        changed["prompts twice as long"] = (model, longer(trace, prompts=2))
        changed["answers twice as long"] = (model, longer(trace, answers=2))
        for what, (one, load) in changed.items():
            played = predict(variant, one, load, rate).played
            ratios = [played.found[name] / now[name] for name in _OVER_NOW]
            told = ratios if played.limit != "API server" else [ratios[0], math.nan, math.nan]
            yield variant, what, played.found["output_token_throughput"], told


@figure("what-if", "PREDICTED: what if?")
def what_if_figure(axes, models: Mapping[str, StepModel], trace: Trace, rate: float = math.inf) -> str:
    """Tokens/s of each variant after a change, over those without it."""
    styles = _styles(models)
    found = list(_what_ifs(models, trace, rate))
    places = {what: -place for place, what in enumerate(dict.fromkeys(what for _, what, _, _ in found))}
    for number, (variant, (colour, marker)) in enumerate(styles.items()):
        mine = [(ratios[0], places[what]) for one, what, _, ratios in found if one == variant]
        shift = 0.3 * ((len(models) - 1) / 2 - number) / max(1, len(models) - 1)
        ratios, at = zip(*((ratio, place + shift) for ratio, place in mine), strict=True)
        axes.hlines(at, 1, ratios, color=colour, lw=2)
        axes.plot(ratios, at, ls="", marker=marker, color=colour, ms=9, mew=2, label=variant)
    axes.axvline(1, color=INK, lw=1)
    axes.set_yticks(list(places.values()), list(places))
    axes.set(xlabel="output tokens/s over now")
    axes.text(0.98, 0.34, "PREDICTED", transform=axes.transAxes, ha="right", color=INK, alpha=0.35, fontsize=14)
    # Any row may reach as far as another: beside them there is no place that stays free.
    axes.figure.legend(frameon=False, fontsize=9, loc="outside lower right", ncols=4)
    return f"{len(trace):,} requests of {trace.name}, {rate_name(rate)}."


def errors_of(model: StepModel) -> str:
    """How far a model may be off, in a sentence."""
    if model.note:
        return f"{model.note}: how far off that is, `--against` a run there says"
    if not model.worst:
        return f"fitted to run {model.run}, with no level held out to judge it by"
    told = _told(model.median, model.worst)
    return f"levels of run {model.run} that the fit never saw, of its own requests, are foretold within, in the median (at worst), {told}"


def _told(median: Mapping[str, float], worst: Mapping[str, float]) -> str:
    return ", ".join(f"{_WORDS[name]} {median[name]:.1%} ({worst[name]:.0%})" for name in worst)


def foretold_table(run: Run, models: Mapping[str, StepModel]) -> Table:
    """Every valid level of a run beside what its variant's model says of it: measured values, and how far off."""
    unseen, rows, off = set(held_out(a_run(run))), [], []
    for level_id, summary in run.summaries().items():
        model = models.get(summary.level.variant)
        if model is None or not judgeable(summary):
            continue
        seen = run.path.name == model.run and level_id in model.levels
        played = replay(model, run.read(summary.level))
        each = apart(played, summary)
        off += [] if seen else [each]
        cells = [
            f"{shown(getattr(summary, name), _DIGITS.get(name, ',.0f'))} {each[name]:+.1%}" if name in each else "–"
            for name in JUDGED
        ]
        most = played.course.blocks_max / played.blocks
        cells.append(f"{shown(summary.kv_cache_usage_max, '.0%')}, {most:.0%}")
        preempted = f"{summary.preemptions or 0:,.0f}, {played.course.preemptions:,}"
        rows.append((level_id, "fitted" if seen else "held out" if level_id in unseen else "unseen", *cells, preempted))
    columns = ("level", "by the fit", *(f"{_WORDS[name]}, off by" for name in JUDGED))
    columns += ("KV cache at most, PREDICTED", "preempted, PREDICTED")
    if not rows:
        measured = ", ".join(dict.fromkeys(s.level.variant for s in run.summaries().values())) or "none"
        said = f"run {run.path.name} holds no valid level of {', '.join(models)} (it measured: {measured})"
        raise BadInput(f"{said}; where it calls them otherwise, say which is which: --variant FITTED=MEASURED")
    judged = f"; levels that the fit never saw, in the median (at worst): {_told(**off_by(off))}" if off else ""
    caption = f"Measured in run {run.path.name}, and how far off what is PREDICTED is{judged}"
    card = run.profile.gpu.name if run.profile.gpu else ""
    if card and (others := sorted({model.card_name for model in models.values()} - {card, ""})):
        caption = f"ANOTHER CARD: a fit of {', '.join(others)}, a run of {card} (--card P scales the fit). {caption}"
    return Table(f"{card_note(run)}{caption}", columns, rows)


@figure("predicted", "PREDICTED: what a card would do, by the rate that is offered", columns=2)
def predicted_figure(
    axes, models: Mapping[str, StepModel], draw: Callable[[int], Trace], rates: Sequence[float], *, requests: int = 2000
) -> str:
    """Output tokens/s, and the time that 99 % of first tokens come within, of each variant at these rates (requests/s)."""
    trace = draw(requests)
    for variant, (colour, marker) in _styles(models).items():
        model = models[variant]
        levels = [predict(variant, model, trace, rate) for rate in sorted(rates)]
        for one, name in zip(axes, ("output_token_throughput", "p99_ttft_ms"), strict=True):
            values = [level.played.found[name] for level in levels]
            style = {"color": colour, "marker": marker, "ls": (0, (6, 2, 1, 2)), "lw": 1.4, "ms": 7}
            one.plot(sorted(rates), values, label=variant, **style)
    axes[0].set(xlabel="offered, requests/s", ylabel="output tokens/s", ylim=(0, None))
    axes[0].yaxis.set_major_formatter(PLAINLY)
    axes[1].set(xlabel="offered, requests/s", ylabel="TTFT p99, ms")
    log_numbers(axes[1])
    for one in axes:
        one.xaxis.set_major_formatter(PLAINLY)
        one.text(0.98, 0.04, "PREDICTED", transform=one.transAxes, ha="right", color=INK, alpha=0.35, fontsize=14)
    axes[0].legend(frameon=False, fontsize=9)
    scaled = "; ".join(dict.fromkeys(model.note for model in models.values() if model.note))
    told = f"{requests:,} requests of {trace.name} at each rate; of more than a variant keeps up with TTFT grows with their number. "
    return told + (f"{scaled}. " if scaled else "")
