"""What the levels did to the machine: what limited each, what it used, how far it was from the card's limits, its memory."""

import math
from collections.abc import Mapping, Sequence, Set

import numpy as np

from ..config.dimensions import BF16, FORMATS, FP8, ModelShape, fp8_kv, memory_share, most_running
from ..config.profile import Card, level_id, rate_name
from ..errors import BadInput
from ..metrics.performance import concurrency_over_time, paging_waste, reserving_waste
from ..metrics.resources import MOST, POWER, Clock, fit
from ..results.evidence import evidence
from ..results.run_folder import Run, a_run
from ..ui import LEVEL, Column, Table, shown, view
from .drawing import GREY, INK, PLAINLY, figure, label_where_free, legend, mark, name_rows, note, style_of
from .verdict import card_note, claim_of


def bottlenecks_table(run: Run, variants=()) -> Table:
    """What limited each level (of `variants`, or of all), the evidence, and whether the level counts."""
    seen = evidence(run)
    rows = []
    for name, s in seen.summaries.items():
        if not variants or s.level.variant in variants:
            found = seen.limit(name)
            rows.append((name, found.cause, found.evidence, "VALID" if s.valid else "INVALID"))
    columns = ("level", "limited by", "evidence", "measurement")
    return Table(f"{card_note(run)}What limited each level of run {run.path.name}", columns, rows)


def resources_table(run: Run) -> Table:
    """What each level used: shares over its steady window, energy over the whole run."""
    seen = evidence(run)

    def joules(row) -> str:
        apart = seen.summaries[row.level_id].meters_apart
        off = "" if apart is None else f" ({math.expm1(apart):+.1%})"
        return shown(row.joules_per_output_token, ".3f") + off

    columns = (
        LEVEL, Column("GPU busy", "gpu_util_steady", ".0%"), Column("GPU W", "gpu_power_w_steady", ",.0f"),
        Column("MHz", "gpu_sm_mhz_steady", ",.0f"), Column("held back by", lambda row: _held_back(seen.clock(row.level_id))),
        Column("J/token", joules), Column("API server, cores", "frontend_cpu_max_steady", ".2f"),
        Column("EngineCore, cores", "engine_cpu_max_steady", ".2f"), Column("client, cores", "client_cpu_max_steady", ".2f"),
        Column("KV used, most", "kv_cache_usage_max", ".0%"), Column("preempted", "preemptions", ".0f"),
        Column("tokens/chunk", "tokens_per_chunk", ".2f"), Column("API server, µs/token", "frontend_us_per_token", ".0f"),
    )  # fmt: skip
    caption = (
        f"{card_note(run)}What the levels of run {run.path.name} used; joules are those of the GPU's energy counter, in "
        "brackets how far the integral of its power samples is off; cores are those of the busiest process of each kind"
    )
    return view(caption, seen.frame, columns)


def _held_back(ran: Clock | None) -> str:
    """What held the card's clock back, and in which share of the samples; "power?" where that was not sampled and the power
    stood at its limit."""
    if ran is None or ran.mhz is None:
        return "–"
    if ran.by_power is None:
        return "power?" if (ran.at_limit or 0.0) >= MOST else "–"
    shares = (("power", ran.by_power), ("heat", ran.by_heat))
    return ", ".join(f"{what} {share:.0%}" for what, share in shares if share) or "nothing"


def roofline_table(run: Run) -> Table:
    """The share of the card's physical limits that each level needed at least."""
    seen, rows = evidence(run), []
    for name in seen.summaries:
        if one := seen.roofline(name):
            rows.append((
                name, f"{one.memory:.0%}", f"{one.compute:.0%}", one.nearest, f"{one.intensity:.0f}",
                f"{one.bytes_per_s / 1e12:.2f}", f"{one.flops_per_s / 1e12:.0f}", f"{one.steps_per_s:.0f}",
            ))  # fmt: skip
    columns = ("level", "of bandwidth", "of matrix peak", "nearer limit", "FLOP/byte", "TB/s", "TFLOP/s", "steps/s")
    card = run.profile.gpu.name if run.profile.gpu else "no card"
    what = f"How far from the physical limit ({card}, datasheet)"
    return Table(f"{card_note(run)}{what}: what the tokens of the steady window needed, estimated", columns, rows)


def kv_table(run: Run) -> Table:
    """What the KV cache can hold of this trace, against what ever ran at once and what vLLM's seats allow."""
    seen = evidence(run)
    seats = {s.level.variant: (own := most_running(s.command)) and own * s.replicas for s in seen.summaries.values()}
    rows = [
        (variant, f"{tokens:,}", f"{room:,.0f}", shown(seats[variant]), f"{most:,.0f}", shown(fullest, ".0%"))
        for variant, tokens, room, most, fullest in seen.kv_room()
    ]
    each = seen.kv_tokens_a_request()
    held = f"; a running request held {each:,.0f} tokens on average" if each else ""
    columns = ("variant", "KV cache, tokens", "requests it can hold", "--max-num-seqs", "most running", "fullest")
    return Table(f"{card_note(run)}Was the KV cache ever the limit? Run {run.path.name}{held}", columns, rows)


def paging_table(run: Run) -> Table:
    """What paging leaves unused of the KV memory, against reserving a maximum, for this run's requests."""
    seen, claim = evidence(run), claim_of("R3")
    # The level that the claim on it is judged by, where there is one.
    judged_by = level_id("fp8", claim["fp8"]["rate"])
    ids = sorted(seen.summaries, key=lambda name: name != judged_by)
    level = next((one for one in map(seen.level, ids) if one is not None), None)
    if level is None:
        return Table(f"{card_note(run)}Run {run.path.name} holds no records", ("scheme", "empty"), [])
    rows = [("blocks of 16 tokens (PagedAttention)", f"{paging_waste(level.records):.1%}")]
    rows.append(("the same, as published", f"{claim['direction']} {claim['fp8']['value']:g}{claim['unit']}"))
    for length in (2048, 8192):
        waste = reserving_waste(level.records, length)
        told = shown(waste, ".0%") if waste else "too little: some hold more"
        rows.append((f"reserving {length:,} tokens a request", told))
    caption = f"{card_note(run)}KV memory allocated and empty, over all decoding steps of {level.level.id}"
    return Table(caption, ("scheme", "empty"), rows)


def memory_table(run: Run) -> Table:
    """What vLLM made of the card's memory, variant by variant, against the arithmetic of the KV cache."""
    servers, rows = {s.level.variant: s.server for s in a_run(run).summaries().values() if s.server}, []
    for variant in run.profile.variants:
        server = servers.get(variant)
        if server and server.kv_cache_tokens:
            shape = run.profile.shape(variant)
            token = shape and shape.kv_bytes_per_token(1 if fp8_kv(server.command, shape) else 2)
            # All replicas' tokens, and of each token what each of the cards that share it holds.
            kib, gib = (token / 1024, server.kv_cache_tokens * token / server.cards / 2**30) if token else (None, None)
            held = (shown(server.model_memory_gib, ".2f"), f"{server.kv_cache_tokens:,}")
            rows.append((variant, *held, shown(kib, ".0f"), shown(gib, ".1f")))
    columns = ("variant", "model GiB", "KV cache, tokens", "KiB a token", "KV cache, GiB")
    if any(server.cards > 1 for server in servers.values()):
        columns = ("variant", "model GiB, each card", "KV cache, tokens", "KiB a token", "KV cache GiB, each card")
    caption = f"{card_note(run)}Memory as vLLM reports it; KiB a token by arithmetic: 2 x layers x KV heads x head size x bytes"
    return Table(caption, columns, rows)


def fit_table(name: str, shape: ModelShape, card: Card, *, tokens: int = 400, flags: Sequence[str] = ()) -> Table:
    """Which number formats of a model fit on how many of a card, before anything is started: weights a card, room for KV
    cache, and how many requests of so many `tokens` that holds. As many cards as share each layer: 1, 2, 4 or 8; of
    each vLLM takes what its `flags` say. Raises BadInput for requests that the model does not take."""
    if not (most := shape.context or math.inf) >= tokens >= 1:
        raise BadInput(f"requests of {tokens:,} tokens, in and out: {name} takes 1 to {most:,} (--tokens)")
    share = memory_share(flags) or 0.9
    rows = []
    for name_of, weights, kv in (("BF16", BF16, 2), ("FP8 or INT8", FP8, 1), ("INT4", FORMATS["int4"], 1)):
        # vLLM shares the heads out evenly.
        for count in (n for n in (1, 2, 4, 8) if not shape.heads % n):
            gib, held = fit(shape, weights, kv, card, count, share=share)
            room = (f"{held:,}", f"{held // tokens:,}") if held else ("does not fit", "–")
            rows.append((name_of, "FP8" if kv == 1 else "BF16", f"{count}", f"{gib:.1f}", *room))
    columns = ("weights", "KV cache", "cards", "weights a card, GiB", "KV cache, tokens")
    caption = f"PREDICTED by arithmetic: {name} on {card.name}, {card.memory_gib:g} GiB a card, of which vLLM takes {share:.0%}"
    return Table(caption, (*columns, f"requests of {tokens:,} tokens"), rows)


@figure("littles_law", "Does Little's law explain the concurrency?")
def littles_law_figure(axes, run: Run) -> str:
    """Throughput x mean time in the system against what the EngineCore counted in flight, level by level."""
    seen, top = evidence(run), 1.0
    for name, pair in seen.in_flight().items():
        mark(axes, pair, run.profile, seen.summaries[name].level.variant)
        top = max(top, *pair)
    axes.plot([1, top * 1.2], [1, top * 1.2], color=GREY, lw=1, ls=":")
    axes.set(xscale="log", yscale="log", xlim=(10, top * 1.3), ylim=(10, top * 1.3))
    axes.set(
        xlabel="completed requests/s × mean time in the system", ylabel="running + waiting in the EngineCore, mean"
    )
    axes.xaxis.set_major_formatter(PLAINLY)
    axes.yaxis.set_major_formatter(PLAINLY)
    legend(axes, "upper left")
    return (
        "Whole run of each level. On the line: the EngineCore held all requests that were in flight. Below it: some waited "
        "before it, in the API server, or their last tokens did."
    )


@figure("clock", "Does the power limit hold the card's clock back?", height=4.6, rows=2)
def clock_figure(axes: Sequence, run: Run) -> str:
    """Power and clock over time where the card is least waited for: a level of each variant at its highest rate."""
    seen, (upper, lower) = evidence(run), axes
    ids = seen.fullest()
    sampled, limit_w = False, None
    for name in ids:
        level, ran = seen.level(name), seen.clock(name)
        if ran is None or ran.mhz is None:
            continue
        style = style_of(run.profile, level.level.variant) | {"marker": "", "ls": "-"}
        cards = level.summary.cards
        limit_w = ran.limit_w / cards if ran.limit_w else limit_w
        shown = level.telemetry[level.telemetry["at_s"].between(0, level.summary.duration_s)]
        for each, column in ((upper, "gpu_power_w"), (lower, "gpu_sm_mhz")):
            known = shown[["at_s", column]].dropna()
            share = known[column] / (cards if each is upper else 1)
            each.plot(known["at_s"], share, label=level.level.variant, **style)
        if "gpu_clock_reasons" in shown:
            known = shown[["at_s", "gpu_sm_mhz", "gpu_clock_reasons"]].dropna()
            held = known[(known["gpu_clock_reasons"].astype(int) & POWER) != 0]
            lower.plot(held["at_s"], held["gpu_sm_mhz"], ls="", marker="|", ms=5, color=style["color"])
            sampled = True
    if limit_w:
        upper.axhline(limit_w, color=GREY, lw=1, ls=":")
        note(upper, f"limit {limit_w:,.0f} W", (0, limit_w), color=GREY)
        upper.set_ylim(0, limit_w * 1.12)
    upper.set(ylabel="power of a card, W")
    lower.set(xlabel="seconds from the first request", ylabel="SM clock, MHz")
    for each in (upper, lower):
        each.yaxis.set_major_formatter(PLAINLY)
    legend(upper, "lower right")
    if not upper.lines:
        return "No GPU was sampled."
    marks = "Ticks: samples in which NVML named the power limit as what held the clock back."
    marks = marks if sampled else "What held the clock back was not sampled in this run."
    return f"Levels {' and '.join(ids) or 'none'}. Power is NVML's mean over a second. {marks}"


# Light to dark, hatched, so that the parts are told apart in print.
_PARTS = (("weights", "#4477AA", ""), ("KV cache", "#CCBB44", "//"), ("the rest", "#BBBBBB", ".."))


@figure("memory", "What fills the card's memory?")
def memory_figure(axes, run: Run) -> str:
    """What fills the card's memory, variant by variant."""
    seen = evidence(run)
    held = {s.level.variant: s for s in seen.summaries.values() if s.kv_cache_tokens}
    names = [v for v in seen.a_base_each() if v in held and run.profile.shape(v)]
    for y, variant in enumerate(names):
        server, shape, used = held[variant].server, run.profile.shape(variant), held[variant].gpu_memory_gib_max
        used = used and used / server.cards
        token = shape.kv_bytes_per_token(1 if fp8_kv(server.command, shape) else 2)
        kv = server.kv_cache_tokens * token / server.cards / 2**30
        sizes = [server.model_memory_gib or 0.0, kv]
        sizes.append(max(0.0, used - sum(sizes)) if used else 0.0)
        left = 0.0
        for (part, color, hatch), size in zip(_PARTS, sizes, strict=True):
            label = part if y == 0 else None
            axes.barh(y, size, 0.6, left=left, color=color, hatch=hatch, edgecolor="white", label=label)
            left += size
            if size > 3 and part != "the rest":
                box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
                note(axes, f"{size:.1f}", (left - size / 2, y), (0, 0), ha="center", va="center", bbox=box)
            elif size > 0:  # behind its bar: what vLLM may take ends within it
                note(axes, f"{size:.1f}", (left, y), (4, 0), va="center")
    name_rows(axes, names, 1.6, 0.45)
    axes.set_xlabel("GiB")
    _limits(axes, run, {memory_share(held[variant].command) for variant in names})
    if names:
        axes.figure.legend(frameon=False, fontsize=8, ncols=3, loc="outside lower center")
    return (
        "Weights and KV cache as vLLM reports them; the rest (activations, CUDA graphs, the driver) is what NVML counts beside "
        "them, where a GPU was sampled; some of it is outside vLLM's share. What FP8 takes from the weights, vLLM gives to the "
        "KV cache."
    )


def _limits(axes, run: Run, shares: Set[float | None]) -> None:
    """Draws what vLLM may take of the card, if that is one share for all, and the card's end, unless that is far beyond."""
    card, share = run.profile.gpu, next(iter(shares)) if len(shares) == 1 else None
    if card is None:
        return
    limits = [("the card", card.memory_gib, "left")]
    if share is not None:
        limits = [("vLLM's share", share * card.memory_gib, "right"), *(limits if 1.3 * share > 1 else ())]
    for name, gib, side in limits:
        axes.axvline(gib, color=INK, lw=1)
        offset, where = (3 if side == "left" else -3, 4), ("data", "axes fraction")
        note(axes, f"{name} {gib:.1f}", (gib, 1), offset, xycoords=where, ha=side)
    axes.set_xlim(0, max(axes.get_xlim()[1], limits[-1][1] * 1.16))


@figure("batching", "How does continuous batching look while it runs?", height=3.2)
def batching_figure(axes, run: Run) -> str:
    """Requests running and waiting in the EngineCore over time, and in flight for the client, at the published FP8 level or,
    in a run without it, where the most ran."""
    seen, id = evidence(run), level_id("fp8", claim_of("C2")["fp8"]["rate"])
    if id not in seen.summaries:
        id = max(seen.summaries, key=lambda one: seen.summaries[one].running_max or 0, default="")
    level = seen.level(id) if id else None
    if level is not None:
        times, in_flight = concurrency_over_time(level.records)
        last = level.records["scheduled_s"].max()
        # Names stand at parts of the arrivals, or of the whole where all arrive at once.
        paced = last > 0.1 * times[-1]
        span = last if paced else 0.6 * times[-1]
        axes.step(times, in_flight, where="post", color=INK, lw=1.6)
        where = (0.5 * span, (-50, 34)) if paced else (0.7 * span, (70, 8))
        _name(axes, "in flight for the client", times, in_flight, *where)
        if level.telemetry is not None and (sampled := level.telemetry.dropna(subset=["running"])).shape[0]:
            axes.plot(sampled["at_s"], sampled["running"], color=GREY, ls="--", marker=".", ms=4)
            axes.plot(sampled["at_s"], sampled["waiting"], color=GREY, ls=":", marker="x", ms=4)
            _name(axes, "running in the EngineCore", sampled["at_s"], sampled["running"], 0.7 * span, (0, -42))
            _name(axes, "waiting in the EngineCore", sampled["at_s"], sampled["waiting"], 0.5 * span, (0, 16))
        if paced:
            axes.axvline(last, color=GREY, lw=1)
            note(axes, "last arrival", (last, axes.get_ylim()[1]), (3, -10), color=GREY)
    axes.set(xlabel="seconds", ylabel="requests", xlim=(0, None), ylim=(0, None))
    return (
        f"Level {id}. A request joins the running batch at the next step and leaves it with its last token; none waits for a "
        "batch to end. Between the solid and the dashed line: requests that wait in the EngineCore (dotted), that had not "
        "reached it, or whose last tokens had not left the API server. In flight is the exact count at every instant; the peak "
        "in the table of levels counts all that were in flight within a whole second."
    )


def _name(axes, name: str, xs, ys, x: float, offset: tuple[float, float]) -> None:
    """Names a line at `x`, `offset` points away."""
    leader = {"arrowstyle": "-", "color": GREY, "lw": 0.6}
    note(axes, name, (x, np.interp(x, xs, ys)), offset, ha="center", va="center", arrowprops=leader)


_XS = (10, 5000)


@figure("roofline", "How far from the card's physical limit?")
def roofline_figure(axes, run: Run) -> str:
    """The card's physical limit and what the levels needed of it."""
    seen, card = evidence(run), run.profile.gpu
    # Steps are drawn in BF16, whose sizes are those of any variant of one model.
    shape = next((known for variant in seen.variants() if (known := run.profile.shape(variant))), None)
    for peak, text in ((card.bf16_flops, "BF16 peak"), (card.fp8_flops, "FP8 peak")) if card else ():
        ridge, top = peak / card.hbm_bytes_per_s, peak / 1e12
        axes.plot([_XS[0], ridge, _XS[1]], [_XS[0] * card.hbm_bytes_per_s / 1e12, top, top], color=GREY, lw=1.2)
        note(axes, text, (_XS[1], top), (0, 3), ha="right", color=GREY)
    context = seen.kv_tokens_a_request()
    steps = _steps(shape, context) if card and shape and context else {}
    steps = {name: intensity for name, intensity in steps.items() if intensity > _XS[0]}
    for name, intensity in steps.items():
        at = min(card.bf16_flops, intensity * card.hbm_bytes_per_s) / 1e12
        axes.plot(intensity, at, "|", color=INK, ms=9)
        offset, side = ((4, -9), "left") if at < card.bf16_flops / 1e12 else ((0, -13), "center")
        note(axes, name, (intensity, at), offset, ha=side, fontsize=7.5)
    points = []
    cards = max((s.cards for s in seen.summaries.values()), default=1)
    for name, s in seen.summaries.items():
        one = seen.roofline(name)
        if one is not None and s.level.repeat == 1:
            at = (one.intensity, one.flops_per_s / s.cards / 1e12)
            mark(axes, at, run.profile, s.level.variant)
            points.append((rate_name(s.level.rate).removesuffix(" req/s"), *at))
    axes.set(xscale="log", yscale="log", xlim=_XS, xlabel="FLOP for each byte that must be read")
    axes.set_ylabel(f"TFLOP/s {'a card ' if cards > 1 else ''}needed, estimated")
    axes.xaxis.set_major_formatter(PLAINLY)
    axes.yaxis.set_major_formatter(PLAINLY)
    legend(axes, "upper left")
    label_where_free(axes, points)
    return (
        f"Lines: what the datasheet of {card.name if card else 'no card'} allows. Points: what the tokens of each level needed, "
        f"estimated from vLLM's counters, first seed, some with the offered rate in requests/s.{_bounds_told(steps, card)}"
    )


def _steps(shape: ModelShape, context: float) -> dict[str, float]:
    """FLOP for each byte read, in BF16, of a step that decodes for 32 or 256 requests with `context` tokens in the KV
    cache each, and of one that prefills 2,048 tokens; counted as `fp8lab.metrics.resources` does."""
    weights, kv = shape.weight_bytes_read(BF16), context * shape.kv_bytes_per_token(2)
    decode = {n: sum(shape.flops(n, n)) / (weights + n * kv) for n in (32, 256)}
    prefill = sum(shape.flops(2048, 1)) / weights
    return {f"decode for {n}": one for n, one in decode.items()} | {"prefill of 2,048": prefill}


def _bounds_told(steps: Mapping[str, float], card: Card | None) -> str:
    """Which of the steps memory bounds and which compute: those left and right of the BF16 roof's bend."""
    if not steps or card is None:
        return ""
    bend = card.bf16_flops / card.hbm_bytes_per_s
    sides = {"memory": [], "compute": []}
    for name, one in steps.items():
        sides["memory" if one < bend else "compute"].append(f"{name} ({one:,.0f})")
    bound = "; ".join(f"{limit} is the limit of {', '.join(names)}" for limit, names in sides.items() if names)
    return (
        " Ticks: by arithmetic, single BF16 steps that decode for so many requests or prefill so many tokens, FLOP for each "
        f"byte in brackets. The roof bends at {bend:,.0f}: {bound}."
    )
