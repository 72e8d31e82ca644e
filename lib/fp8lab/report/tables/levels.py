"""What was measured: every level, its latencies, whether it counts, how the client fared, two clients side by side; which
rates meet a service-level objective (SLO), and how many cards a load needs."""

import math
from statistics import fmean
from types import SimpleNamespace

from ...errors import BadInput
from ...metrics.slo import OBJECTIVES, SLO, attains
from ...paths import repository_relative
from ...results.evidence import evidence
from ...results.run_folder import Run
from ...ui.table import COUNTS, LEVEL, Column, Table, view
from ...ui.text import shown
from ..verdict import card_note


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
        Column("fullest second, chunks", "peak_output_tokens_per_s", ",.0f"), Column("whole run, s", "duration_s", ",.0f"),
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
        remedy = f"fp8lab measure --run {repository_relative(run.path)} {again}"
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
    rows, summaries = [], run.summaries()
    for level_id, theirs in run.cross_checks().items():
        for client, one in (("fp8lab", summaries[level_id]), ("vllm bench serve", SimpleNamespace(**theirs))):
            rows.append((level_id, client, *(column.of(one) for column in columns)))
    what = f"Two clients, run {run.path.name}; each drew its own Poisson arrivals"
    caption = what if rows else f"Run {run.path.name} holds no cross-check"
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
        "several seeds a rate counts as met when all that are long enough to tell meet it"
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
