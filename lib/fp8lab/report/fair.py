"""Tables of the fair comparison: equal load, ablation, what limited each level, and how far from the card's limit."""

import math
from collections.abc import Sequence
from statistics import fmean

from ..config.dimensions import most_running
from ..metrics.kv_cache import paging_waste, reserving_waste
from ..metrics.statistics import ABLATION, Ratio
from ..paths import repository_relative
from ..results.evidence import FRONT_ENDS, Evidence, evidence, rate_name
from ..results.run_folder import Run
from ..ui.table import Table
from . import verdict
from .caption import card_note

# What is compared at equal load: metric of a level's summary, its name, and which way is better.
METRICS = {
    "output_token_throughput": ("output tokens/s, whole run", "higher"),
    "mean_tpot_ms": ("mean TPOT", "lower"),
    "joules_per_output_token": ("joules an output token", "lower"),
}


def limits_table(run: Run, variants: Sequence[str] = ()) -> Table:
    """What limited each level (of `variants`, or of all), the evidence, and whether the level counts."""
    seen, rows = evidence(run), []
    for level_id, summary in seen.summaries.items():
        if variants and summary["level"]["variant"] not in variants:
            continue
        limit = seen.limit(level_id)
        state = "VALID" if summary["valid"] else "INVALID"
        rows.append((level_id, limit.cause, limit.evidence, state))
    return Table(
        f"{card_note(run)}What limited each level of run {run.path.name}",
        ("level", "limited by", "evidence", "measurement"),
        rows,
    )


def validity_table(run: Run) -> Table:
    """Whether the run counts, as MLPerf LoadGen ends its runs: VALID or INVALID, with what to do."""
    invalid = {level: s for level, s in evidence(run).summaries.items() if not s["valid"]}
    failed = {level: s["failed"] for level, s in evidence(run).summaries.items() if s["failed"]}
    rows = [("result", "INVALID" if invalid else "VALID")]
    rows += [(level, f"INVALID: {s['invalid_reason']}") for level, s in invalid.items()]
    rows += [(level, f"{count} failed requests") for level, count in failed.items()]
    if invalid:
        again = " ".join(f"--again {level}" for level in invalid)
        rows.append(
            ("what to do", f"mend the cause, then: fp8lab measure --run {repository_relative(run.path)} {again}")
        )
    if not invalid and not any(float(s["level"]["repeat"]) > 1 for s in evidence(run).summaries.values()):
        rows.append(("note", "no level was repeated with another seed: ratios have no interval"))
    return Table(f"{card_note(run)}Does run {run.path.name} count?", ("", "verdict"), rows)


def equal_load_ratios(seen: Evidence, metric: str) -> list[tuple[str, float, Ratio]]:
    """(front end's suffix, rate, FP8 over BF16) for every rate and front end at which both were measured."""
    return [
        (suffix, rate, one)
        for bf16, fp8, suffix in seen.pairs()
        for rate in seen.rates(bf16, fp8)
        if (one := seen.compare(fp8, bf16, rate, metric))
    ]


def equal_load_table(run: Run) -> Table:
    """FP8 over BF16 at the same rate, trace and seeds, with 95 % intervals."""
    seen = evidence(run)
    rows = [
        (name, rate_name(rate), FRONT_ENDS[suffix], f"{one.value:.3f}", _interval(one),
         _said(one, better) + _steady_state(seen, metric, suffix, rate, one), clocks_told(seen, suffix, rate), one.model,
         seen.parts((f"bf16{suffix}", f"fp8{suffix}"), rate))
        for metric, (name, better) in METRICS.items()
        for suffix, rate, one in equal_load_ratios(seen, metric)
    ]  # fmt: skip
    columns = (
        "metric",
        "offered",
        "front end",
        "FP8 / BF16",
        "95 % interval",
        "so",
        "steady clock, FP8 / BF16",
        "interval from",
        "part of the run",
    )
    caption = f"{card_note(run)}FP8 over BF16 at equal load, run {run.path.name}"
    return Table(*_with_parts(caption, columns, rows))


def clocks_told(seen: Evidence, suffix: str, rate: float) -> str:
    """What else differed between the variants at a rate: the mean clock that their power left, FP8 over BF16, in the steady
    windows of the seeds that both have; a dash where it was not sampled."""
    mhz = {variant: seen.seeds(variant + suffix, rate, "gpu_sm_mhz_steady") for variant in ("fp8", "bf16")}
    shared = mhz["fp8"].keys() & mhz["bf16"].keys()
    if not shared:
        return "–"
    fp8, bf16 = (fmean(values[seed] for seed in shared) for values in (mhz["fp8"], mhz["bf16"]))
    return f"{fp8 / bf16:.2f}× ({fp8:,.0f} / {bf16:,.0f} MHz)"


def ablation_effects(seen: Evidence, metric: str) -> list[tuple[str, float, str, Ratio]]:
    """(front end's suffix, rate, effect, ratio) for every rate and front end at which all four variants were measured."""
    found = []
    for suffix in FRONT_ENDS:
        names = {f"{variant}{suffix}": variant for variant in ABLATION["interaction"]}
        if not set(names) <= set(seen.variants()):
            continue
        for rate in seen.rates(*names):
            for effect, weights in ABLATION.items():
                if one := seen.contrast({name: weights[half] for name, half in names.items()}, rate, metric):
                    found.append((suffix, rate, effect, one))
    return found


def ablation_table(run: Run) -> Table:
    """The 2x2 of FP8 weights and FP8 KV cache: main effects and interaction, as ratios."""
    seen = evidence(run)
    rows = [
        (name, rate_name(rate), FRONT_ENDS[suffix], effect, f"{one.value:.3f}", _interval(one),
         _said(one, better) + _across_parts(seen, effect, suffix, rate),
         seen.parts([variant + suffix for variant in ABLATION["interaction"]], rate))
        for metric, (name, better) in METRICS.items()
        for suffix, rate, effect, one in ablation_effects(seen, metric)
    ]  # fmt: skip
    caption = (
        f"{card_note(run)}Which half of FP8 does it? Main effects: the mean ratio that a half gives without and with "
        f"the other; interaction: how much more (or less) both give than their product. Run {run.path.name}"
    )
    if not rows:
        caption = f"{card_note(run)}Run {run.path.name} does not hold all four variants at one rate"
    columns = ("metric", "offered", "front end", "effect", "ratio", "95 % interval", "so", "part of the run")
    return Table(*_with_parts(caption, columns, rows))


def throughputs_table(run: Run) -> Table:
    """Whole run against steady state: how much of a headline is its ramp and drain."""
    rows = []
    for level_id, s in evidence(run).summaries.items():
        whole, steady = s["output_token_throughput"], s["steady_output_token_throughput"]
        if whole and steady:
            rows.append(
                (level_id, f"{whole:,.0f}", f"{steady:,.0f}", f"{steady / whole:.2f}", f"{s['duration_s']:.0f}")
            )
    columns = ("level", "whole run, tok/s", "steady state, tok/s", "steady / whole", "whole run, s")
    return Table(f"{card_note(run)}Two throughputs, run {run.path.name}", columns, rows)


def kv_room(seen: Evidence) -> list[tuple[str, int, float, float, float | None]]:
    """(variant, KV tokens, requests they can hold, most running, fullest share) of every variant that was sampled."""
    each, rows = seen.kv_tokens_a_request(), []
    for variant in seen.variants() if each else ():
        held = list(seen.levels((variant,), valid=False).values())
        tokens = held[0]["server"]["kv_cache_tokens"]
        most, fullest = (
            max((s[key] for s in held if s.get(key) is not None), default=None)
            for key in ("running_max", "kv_cache_usage_max")
        )
        if tokens and most is not None:
            rows.append((variant, tokens, tokens / each, most, fullest))
    return rows


def kv_table(run: Run) -> Table:
    """What the KV cache can hold of this trace, against what ever ran at once and what vLLM's seats allow."""
    seen = evidence(run)
    seats = {s["level"]["variant"]: most_running(s["server"]["command"]) for s in seen.summaries.values()}
    rows = [
        (variant, f"{tokens:,}", f"{room:,.0f}", show_number(seats[variant], 0), f"{most:,.0f}",
         "–" if fullest is None else f"{fullest:.0%}")
        for variant, tokens, room, most, fullest in kv_room(seen)
    ]  # fmt: skip
    each = seen.kv_tokens_a_request()
    held = f"; a running request held {each:.0f} tokens on average" if each else ""
    columns = ("variant", "KV cache, tokens", "requests it can hold", "--max-num-seqs", "most running", "fullest")
    return Table(f"{card_note(run)}Was the KV cache ever the limit? Run {run.path.name}{held}", columns, rows)


def paging_table(run: Run) -> Table:
    """What paging leaves unused of the KV memory, against reserving a maximum, for this run's requests."""
    seen, claim = evidence(run), verdict.claim_of("R3")
    # The level that the claim on it is judged by, where there is one.
    judged_by = verdict.level_id("fp8", claim["fp8"]["rate"])
    ids = sorted(seen.summaries, key=lambda level_id: level_id != judged_by)
    level = next((one for one in map(seen.level, ids) if one is not None), None)
    if level is None:
        return Table(f"{card_note(run)}Run {run.path.name} holds no records", ("scheme", "empty"), [])
    rows = [("blocks of 16 tokens (PagedAttention)", f"{paging_waste(level.records):.1%}")]
    rows.append(("the same, as published", f"{claim['direction']} {claim['fp8']['value']:g}{claim['unit']}"))
    for length in (2048, 8192):
        waste = reserving_waste(level.records, length)
        shown = "too little: some hold more" if waste is None else f"{waste:.0%}"
        rows.append((f"reserving {length:,} tokens a request", shown))
    return Table(
        f"{card_note(run)}KV memory allocated and empty, over all decoding steps of {level.level.id}",
        ("scheme", "empty"),
        rows,
    )


def roofline_table(run: Run) -> Table:
    """The share of the card's physical limits that each level needed at least."""
    seen, rows = evidence(run), []
    for level_id in seen.summaries:
        if one := seen.roofline(level_id):
            rows.append(
                (
                    level_id, f"{one.memory:.0%}", f"{one.compute:.0%}", one.nearest, f"{one.intensity:.0f}",
                    f"{one.bytes_per_s / 1e12:.2f}", f"{one.flops_per_s / 1e12:.0f}", f"{one.steps_per_s:.0f}",
                )
            )  # fmt: skip
    columns = ("level", "of bandwidth", "of matrix peak", "nearer limit", "FLOP/byte", "TB/s", "TFLOP/s", "steps/s")
    card = run.profile.gpu.name if run.profile.gpu else "no card"
    return Table(
        f"{card_note(run)}How far from the physical limit ({card}, datasheet): what the tokens of the steady window needed, estimated",
        columns,
        rows,
    )


def show_number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _with_parts(caption: str, columns: tuple, rows: list[tuple]) -> tuple[str, tuple, list[tuple]]:
    """A table whose last column says in which parts of a run a comparison was measured; without it for a run in one."""
    if not any(row[-1] for row in rows):
        return caption, columns[:-1], [row[:-1] for row in rows]
    caption += (
        ". It was measured in several parts, each on a machine of its own or from another commit (run.json): "
        "a comparison across parts also compares those"
    )
    return caption, columns, rows


def _interval(one: Ratio) -> str:
    return "–" if math.isnan(one.low) else f"{one.low:.3f} to {one.high:.3f}"


def _across_parts(seen: Evidence, effect: str, suffix: str, rate: float) -> str:
    """A warning where an effect also compares parts of the run: where they do not cancel in its contrast."""
    net: dict[str, float] = {}
    for variant, weight in ABLATION[effect].items():
        part = seen.parts([variant + suffix], rate)
        net[part] = net.get(part, 0.0) + weight
    return " (but it also compares parts of the run)" if len(net) > 1 and any(net.values()) else ""


def _steady_state(seen: Evidence, metric: str, suffix: str, rate: float, one: Ratio) -> str:
    """What the steady state says of a throughput ratio where both variants kept up: a whole run's difference lies
    in its ramp and drain where the steady state's interval ends before it."""
    bf16, fp8 = f"bf16{suffix}", f"fp8{suffix}"
    if metric != "output_token_throughput" or not one.shown or seen.saturated(bf16, fp8, rate=rate):
        return ""
    steady = seen.compare(fp8, bf16, rate, "steady_output_token_throughput")
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
