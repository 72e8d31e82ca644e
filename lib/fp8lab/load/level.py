"""One level against any endpoint: send the load, make the tables, sum up, judge the client."""

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ..errors import Stopped
from ..progress import StatusLine
from ..traces import Trace
from .clocks import Clocks, clock_problems
from .generator import Sent, self_check, send_load
from .live import LiveChart
from .stream import Endpoint
from .telemetry import Telemetry
from .watch import Watch

if TYPE_CHECKING:
    import pandas as pd


# A level of which more than this share failed did not carry the load that it stands for.
_FAILED_SHARE = 0.01


class Measured(NamedTuple):
    """A level's summary and tables; see `records.to_tables` and `Telemetry.table` for the columns."""

    summary: dict
    records: "pd.DataFrame"
    tokens: "pd.DataFrame"
    telemetry: "pd.DataFrame | None"


def measure_level(
    endpoint: Endpoint,
    trace: Trace,
    due_s: Sequence[float],
    *,
    name: str,
    time_dilation: float = 1.0,
    telemetry: Telemetry | None = None,
    server_problem: Callable[[], str | None] = lambda: None,
    **options,
) -> Measured:
    """Sends `trace` at `due_s` under a live status line called `name`, with `telemetry` running beside it.

    `server_problem` is asked every second why the server cannot be measured any more: what it says ends the level.
    `options` are those of `send_load`. The summary holds the metrics, how the client fared, and whether the
    level is valid. Raises what `send_load` raises, and Stopped for its KeyboardInterrupt.
    """
    status, chart, clocks = StatusLine(), LiveChart(name), Clocks.now()
    with telemetry or contextlib.nullcontext(), Watch(server_problem) as watch:
        try:
            sent = send_load(
                endpoint,
                trace,
                due_s,
                time_dilation=time_dilation,
                on_progress=lambda progress: status.update(name, str(progress), chart.add(progress)),
                problem=watch.problem,
                **options,
            )
        except KeyboardInterrupt:
            status.done(f"{name}: stopped", chart.picture())
            raise Stopped(f"{name} ended early and is not kept; run the same again to go on") from None
    # Imported here: the first request must not wait for pandas.
    from ..measure.metrics import latencies, send_lag_ms, summarize
    from .records import to_tables

    records, tokens = to_tables(sent, trace, time_dilation)
    failures = Counter(outcome.error for outcome in sent.outcomes if outcome.error)
    problems = [watch.problem()] if watch.problem() else _too_many(failures, sent)
    problems += clock_problems(clocks, Clocks.now())
    problems += self_check(send_lag_ms(records).to_numpy(), latencies(records)["ttft_ms"].to_numpy(), sent.client)
    summary = summarize(records, tokens) | _client(sent, len(tokens))
    sampled = None
    if telemetry:
        from ..measure.metrics import completed, window_of
        from ..measure.usage import summarize_usage

        sampled, steady = telemetry.table(sent.start), window_of(summary)
        summary |= summarize_usage(sampled, records, steady) | {"telemetry_cpu_share": telemetry.cpu_share}
        whole = (records["sent_s"].min(), completed(records)["last_token_s"].max())
        # A server that failed or a client that stood still explains a silence: told already.
        problems += telemetry.problems(sampled, () if problems else (whole, steady))
    summary |= {
        "failures": dict(failures.most_common(10)),
        "valid": not problems,
        "invalid_reason": "; ".join(problems) or None,
    }
    status.done(one_line(name, summary), chart.picture())
    return Measured(summary, records, tokens, sampled)


def one_line(name: str, summary: dict) -> str:
    """A level in one line."""
    verdict = " - VALID" if summary["valid"] else f" - INVALID: {summary['invalid_reason']}"
    if not summary["completed"]:
        return f"{name}: no request completed{verdict}"
    failed = f", {summary['failed']} FAILED" if summary["failed"] else ""
    tpot = f", TPOT {summary['mean_tpot_ms']:.1f} ms" if summary["mean_tpot_ms"] is not None else ""
    return (
        f"{name}: {summary['request_throughput']:.1f} req/s completed{failed}, "
        f"{summary['output_token_throughput']:,.0f} tok/s, peak {_peak(summary)} in flight, "
        f"TTFT {summary['mean_ttft_ms']:.0f} ms{tpot}{verdict}"
    )


def _peak(summary: dict) -> str:
    """The exact peak, with vLLM's count by whole seconds where that is another; a cap is on the exact one alone."""
    exact, by_second = summary["peak_concurrent_requests"], summary["peak_concurrent_requests_vllm"]
    return str(exact) if summary["closed_loop"] or exact == by_second else f"{exact} ({by_second} as vLLM counts)"


def _too_many(failures: Counter, sent: Sent) -> list[str]:
    failed, requests = failures.total(), len(sent.outcomes)
    if failed == requests:
        return [f"no request completed; the first failed with: {sent.outcomes[0].error}"]
    if failed > _FAILED_SHARE * requests:
        most, _ = failures.most_common(1)[0]
        return [f"{failed} of {requests} requests failed, above {_FAILED_SHARE:.0%}; most often with: {most}"]
    return []


def _client(sent: Sent, chunks: int) -> dict:
    client = sent.client
    return {
        "workers": client.workers,
        "closed_loop": client.closed_loop,
        "client_busiest_core": client.busiest_core,
        "client_cpu_us_per_chunk": 1e6 * client.cpu_s / chunks if chunks else None,
        "client_stall_max_ms": client.stall_max_ms,
        "seconds_to_first_request": client.start_delay_s,
    }
