"""One level against any endpoint: send the load, make the tables, sum up, judge the client; and its picture while it runs."""

import base64
import contextlib
import html
import itertools
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ..config.trace import Trace
from ..errors import LevelFailed, Stopped
from ..metrics.performance import completed, latencies, send_lag_ms, summarize
from ..metrics.resources import summarize_usage
from ..metrics.slo import SLO, goodput
from ..metrics.summary import Summary
from ..results.run_folder import LevelResult
from ..ui import StatusLine, shown
from .endpoint import Endpoint, remedy
from .events import Outcome
from .generator import Progress, Sent, self_check, send_load
from .telemetry import Telemetry

# A level of which more than this share failed did not carry the load that it stands for.
_FAILED_SHARE = 0.01
# A warm-up must not be the load that an endpoint refuses.
_WARM_UP_IN_FLIGHT = 4
# A short answer may come in one piece where the server is faster than it is read; that many do not.
_ONE_PIECE_SHARE = 0.1
_TOGETHER_SHARE = 0.5
# What a server sends in quicker succession may be read at once without anyone having collected it.
_APART_S = 0.005
PERIOD_S = 1.0  # between two looks at a server
# NTP slews by 500 ppm at most; what goes beyond, and beyond a moment's reading, was a step.
_SLEW = 1e-3
_STEP_S = 0.5
_SUSPENDED_S = 0.1
# A panel of the picture of a running level, in pixels, and the points of its line.
_WIDTH, _HEIGHT, _GAP = 190, 64, 12
_POINTS = 240
# Four ticks of every worker: a shorter stretch counts what some of them sent and not the others.
_SAMPLE_S = 1.0


def measure_level(
    endpoint: Endpoint,
    trace: Trace,
    due_s: Sequence[float],
    *,
    name: str,
    time_dilation: float = 1.0,
    telemetry: Telemetry | None = None,
    server_problem: Callable[[], str | None] = lambda: None,
    slo: SLO | None = None,
    **options,
) -> LevelResult:
    """Sends `trace` at `due_s` under a live status line called `name`, with `telemetry` running beside it.

    `server_problem` is asked every second why the server cannot be measured any more: what it says ends the level.
    `options` are those of `send_load`. With an objective `slo` the summary also holds the goodput. Raises what
    `send_load` raises, and Stopped for its KeyboardInterrupt.
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
    records, tokens = to_tables(sent, trace, time_dilation)
    failures = Counter(outcome.error for outcome in sent.outcomes if outcome.error)
    fleet = [endpoint, *options.get("others", ())]
    problems = [watch.problem()] if watch.problem() else _too_many(failures, sent, fleet)
    own = clock_problems(clocks, Clocks.now())
    own += self_check(send_lag_ms(records).to_numpy(), latencies(records)["ttft_ms"].to_numpy(), sent.client)
    # A late client reads together what came apart: that goes first, and alone at the kit's own server, behind no proxy.
    problems += own + ([] if own and telemetry else _in_one_piece(sent))
    sampled = telemetry.table(sent.start) if telemetry else None
    counter = sampled[["at_s", "generation_tokens"]] if telemetry else None
    fields = summarize(records, tokens, counter) | sent.client.fields(len(tokens))
    if len(fleet) > 1:
        fields["endpoints"] = _by_endpoint(fleet, records, tokens, fields["duration_s"])
    if slo:
        fields |= goodput(records, slo, fields["duration_s"])
    if telemetry:
        steady = (fields["steady_begin_s"], fields["steady_end_s"]) if fields["steady_end_s"] else (math.nan, math.nan)
        fields |= summarize_usage(sampled, records, steady) | {"telemetry_cpu_share": telemetry.cpu_share}
        whole = (records["sent_s"].min(), completed(records)["last_token_s"].max())
        # A server that failed or a client that stood still explains a silence: told already.
        problems += telemetry.problems(sampled, () if problems else (whole, steady))
    summary = Summary(
        **fields, failures=dict(failures.most_common(10)), valid=not problems, invalid_reason="; ".join(problems) or None,
        notes=_notes(sent), time_dilation=time_dilation,
    )  # fmt: skip
    status.done(one_line(name, summary), chart.picture())
    for one in summary.endpoints:
        status.done(endpoint_line(one))
    return LevelResult(summary, records, tokens, sampled)


def warm_up(endpoint: Endpoint, trace: Trace, *, max_concurrency: int | None = None, **options) -> None:
    """Sends `trace` a few at a time, unmeasured; `options` are those of `send_load`. Raises LevelFailed, in the endpoint's
    words, when any of it fails, and what `send_load` raises."""
    status = StatusLine()
    in_flight = min(max_concurrency or _WARM_UP_IN_FLIGHT, _WARM_UP_IN_FLIGHT)
    sent = send_load(
        endpoint, trace, [0.0] * len(trace), max_concurrency=in_flight,
        on_progress=lambda progress: status.update("warm-up", str(progress)), **options,
    )  # fmt: skip
    failed = [outcome for outcome in sent.outcomes if outcome.error]
    if failed:
        first = failed[0]
        asked = [endpoint, *options.get("others", ())][first.endpoint]
        raise LevelFailed(
            f"the warm-up of {asked.url} failed ({len(failed)} of {len(trace)} requests), so nothing was measured: "
            f"{first.error}{remedy(first.error, asked)}"
        )
    status.done(f"warm-up: {len(trace)} requests, not counted")


def one_line(name: str, summary: Summary) -> str:
    """A level in one line."""
    verdict = " - VALID" if summary.valid else f" - INVALID: {summary.invalid_reason}"
    verdict += "".join(f"; {note}" for note in summary.notes)
    if not summary.completed:
        return f"{name}{'' if 'no request completed' in verdict else ': no request completed'}{verdict}"
    failed = f", {summary.failed} FAILED" if summary.failed else ""
    answer = f", first answer token {summary.mean_ttfo_ms:.0f} ms" if summary.mean_ttfo_ms is not None else ""
    address = f", all to {summary.address}" if summary.address else ""
    tpot = f", TPOT {summary.mean_tpot_ms:.1f} ms" if summary.mean_tpot_ms is not None else ""
    met = ""
    if summary.slo:
        met = f", goodput {summary.request_goodput:.1f} req/s ({summary.slo_share:.1%} met the objective)"
    return (
        f"{name}: {summary.request_throughput:.1f} req/s completed{failed}, "
        f"{summary.output_token_throughput:,.0f} tok/s, peak {_peak(summary)} in flight, "
        f"TTFT {summary.mean_ttft_ms:.0f} ms{answer}{tpot}{met}{address}{verdict}"
    )


def _peak(summary: Summary) -> str:
    """The exact peak, with vLLM's count by whole seconds where that is another; a cap is on the exact one alone."""
    exact, by_second = summary.peak_concurrent_requests, summary.peak_concurrent_requests_vllm
    return str(exact) if summary.closed_loop or exact == by_second else f"{exact} ({by_second} as vLLM counts)"


def _too_many(failures: Counter, sent: Sent, fleet: Sequence[Endpoint]) -> list[str]:
    failed, requests = failures.total(), len(sent.outcomes)
    if failed == requests:
        first = sent.outcomes[0]
        return [
            f"no request completed; the first failed with: {first.error}{remedy(first.error, fleet[first.endpoint])}"
        ]
    if failed > _FAILED_SHARE * requests:
        most, _ = failures.most_common(1)[0]
        told = f"{failed} of {requests} requests failed, above {_FAILED_SHARE:.0%}; most often with: {most}"
        where = Counter(outcome.endpoint for outcome in sent.outcomes if outcome.error and outcome.endpoint >= 0)
        asked = next(outcome.endpoint for outcome in sent.outcomes if outcome.error == most)
        if len(fleet) > 1:
            each = ", ".join(f"{fleet[number].url}: {count}" for number, count in sorted(where.items()))
            told += f" (failed at {each})"
        return [told + remedy(most, fleet[asked])]
    return []


_OF_AN_ENDPOINT = ("requests", "completed", "failed", "output_tokens", "mean_ttft_ms", "p99_ttft_ms", "mean_tpot_ms", "p99_tpot_ms",
                   "peak_concurrent_requests")  # fmt: skip


def _by_endpoint(
    fleet: Sequence[Endpoint], records: pd.DataFrame, tokens: pd.DataFrame, duration_s: float | None
) -> list[dict]:
    """What each endpoint of a fleet did of a level."""
    found = []
    for number, one in enumerate(fleet):
        mine = records[records["endpoint"] == number]
        if mine.empty:
            found.append({"url": one.url, "requests": 0, "completed": 0, "failed": 0})
            continue
        fields = summarize(mine, tokens[tokens["request"].isin(mine["request"])])
        served = fields["output_tokens"] / duration_s if duration_s else None
        found.append(
            {"url": one.url} | {name: fields[name] for name in _OF_AN_ENDPOINT} | {"output_token_throughput": served}
        )
    return found


def endpoint_line(one: Mapping) -> str:
    """An endpoint's part of a level in one line."""
    failed = f", {one['failed']} FAILED" if one["failed"] else ""
    if not one["completed"]:
        return f"  {one['url']}: {one['requests']:,} requests{failed}, none completed"
    tpot = f", TPOT {one['mean_tpot_ms']:.1f} ms" if one["mean_tpot_ms"] is not None else ""
    return (
        f"  {one['url']}: {one['requests']:,} requests{failed}, {one['output_token_throughput']:,.0f} tok/s, peak "
        f"{one['peak_concurrent_requests']:,} in flight, TTFT {one['mean_ttft_ms']:.0f} ms{tpot}"
    )


def _in_one_piece(sent: Sent) -> list[str]:
    """Streams of several tokens all of which came at one instant, or most of whose chunks came together with the one before,
    the others long after: the instants are not the server's then."""
    several = [
        o for o in sent.outcomes if not o.error and (o.output_tokens if o.output_tokens > 0 else o.asked_tokens) > 1
    ]
    pieces = sum(o.chunks[0] == o.chunks[-1] for o in several)
    alone = [o for o in several if o.choices == 1]
    gaps = sum(max(0, len(o.chunks) - 1) for o in alone)
    together = sum(one == other for o in alone for one, other in itertools.pairwise(o.chunks))
    lasted_s = sum(o.chunks[-1] - o.chunks[0] for o in alone)
    if pieces > _ONE_PIECE_SHARE * len(several):
        came = f"{pieces} of {len(several)} answers of several tokens came in one piece"
    elif together > _TOGETHER_SHARE * gaps and lasted_s > _APART_S * (gaps - together):
        came = f"{together / gaps:.0%} of the chunks came at the instant of the one before"
    else:
        return []
    return [
        f"{came}: they are collected on the way, and TTFT and TPOT are not the server's; switch response buffering off in the proxy (nginx: proxy_buffering off, or the header "
        "X-Accel-Buffering: no), or ask the server itself"
    ]


def _notes(sent: Sent) -> list[str]:
    """What is to be known of streams that completed, beside what was measured of them."""
    done = [outcome for outcome in sent.outcomes if not outcome.error]

    def told(holds: Callable[[Outcome], bool], what: str) -> list[str]:
        count = sum(map(holds, done))
        return [f"{'all' if count == len(done) else f'{count} of {len(done)}'} streams {what}"] if count else []

    return [
        *told(lambda o: o.output_tokens < 0, "gave no count of tokens (usage): chunks were counted as tokens"),
        *told(lambda o: not o.done_seen, "ended without [DONE]"),
        *told(lambda o: not o.first_answer, "held reasoning alone, no answer"),
        *told(lambda o: o.finish_reason == "content_filter", "were cut by a content filter"),
        *told(lambda o: o.choices > 1, "held several choices: TPOT and ITL are those of all together"),
    ]


def to_tables(sent: Sent, trace: Trace, time_dilation: float = 1.0) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(records, tokens) of a level, in model seconds from its start.

    records: request, prompt_tokens (the server's count, else as asked), output_tokens_asked, output_tokens (the
    server's count, else chunks), chunks, scheduled_s, sent_s, first_token_s, last_token_s (nan: never), finish_reason,
    error (None: completed); of a closed loop also slot_s, when the slot that it took had become free (nan: it always
    was); where some output was reasoning also first_answer_s, when the first came that was not (nan: never); of a fleet
    also endpoint, the number of the one that was asked (-1: none was). tokens: request, at_s.
    """

    def model_time(moment: float) -> float:
        return (moment - sent.start) / time_dilation if moment else np.nan

    reasoned = any(o.chunks and o.first_answer != o.chunks[0] for o in sent.outcomes if not o.error)
    rows = [
        {
            "request": o.index,
            "prompt_tokens": o.prompt_tokens if o.prompt_tokens >= 0 else trace.prompt_tokens[o.index],
            "output_tokens_asked": trace.output_tokens[o.index],
            "output_tokens": o.output_tokens if o.output_tokens >= 0 else len(o.chunks),
            "chunks": len(o.chunks),
            "scheduled_s": float(sent.due_s[o.index]),
            "sent_s": model_time(o.sent),
            "first_token_s": model_time(o.chunks[0]) if o.chunks else np.nan,
            "last_token_s": model_time(o.chunks[-1]) if o.chunks else np.nan,
            "finish_reason": o.finish_reason,
            "error": o.error,
        }
        | ({"slot_s": model_time(o.slot)} if sent.client.closed_loop else {})
        | ({"first_answer_s": model_time(o.first_answer)} if reasoned else {})
        | ({"endpoint": o.endpoint} if sent.endpoints > 1 else {})
        for o in sent.outcomes
    ]
    records = pd.DataFrame(rows).astype({"finish_reason": "object", "error": "object"})
    request = np.repeat(records["request"].to_numpy(np.int32), records["chunks"])
    at = np.concatenate([np.asarray(o.chunks) for o in sent.outcomes])
    return records, pd.DataFrame({"request": request, "at_s": (at - sent.start) / time_dilation})


@dataclass(frozen=True)
class Clocks:
    """The machine's clocks at one instant, in seconds. Levels are timed by `monotonic`, which stands still while the
    machine is suspended; `boot` does not; `wall` is what the date says."""

    monotonic: float
    boot: float
    wall: float

    @classmethod
    def now(cls) -> "Clocks":
        return cls(time.monotonic(), time.clock_gettime(time.CLOCK_BOOTTIME), time.time())


def clock_problems(begin: Clocks, end: Clocks) -> list[str]:
    """Why times taken between `begin` and `end` cannot be trusted; empty when they can."""
    elapsed = end.monotonic - begin.monotonic
    suspended = (end.boot - begin.boot) - elapsed
    if suspended > _SUSPENDED_S:
        return [f"the machine was suspended for {suspended:.1f} s during the level"]
    stepped = (end.wall - begin.wall) - elapsed
    if abs(stepped) > _STEP_S + _SLEW * elapsed:
        return [f"the clock was set {abs(stepped):.1f} s {'ahead' if stepped > 0 else 'back'} during the level"]
    return []


class Watch:
    """While its `with` block runs, `problem()` says why the level should end, or None: what `ask`, which may take
    seconds, said first in a thread of its own, or raised: a level that nobody watched must not pass for a good one."""

    def __init__(self, ask: Callable[[], str | None]):
        self._ask = ask
        self._problem: str | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_exc) -> None:
        self._stop.set()
        self._thread.join()
        # What happened since the last look: a server that died with its last answer.
        self._problem = self._problem or self._look()

    def problem(self) -> str | None:
        return self._problem

    def _run(self) -> None:
        while not self._problem and not self._stop.wait(PERIOD_S):
            self._problem = self._look()

    def _look(self) -> str | None:
        try:
            return self._ask()
        except Exception as error:
            return f"the server could not be watched any more: {error!r}"


class LiveChart:
    """Collects a level's progress; `add` and `picture` return HTML with four traces so far, which end as a static figure.
    Plain SVG text: a plotting library would take the client's time from the requests."""

    def __init__(self, name: str):
        self._name = name
        self._at: list[float] = []
        self._series: dict[str, list[float]] = {"sent, requests/s": [], "in flight": [], "tokens/s": [], "TTFT, ms": []}
        self._last: Progress | None = None
        self._drawn = ""

    def add(self, progress: Progress) -> str:
        """Takes one more sample, if the last one is a second old; the picture with it."""
        if self._last and progress.elapsed_s - self._last.elapsed_s < _SAMPLE_S:
            return self._drawn
        last, self._last = self._last, progress
        if last:
            sent = (progress.sent - last.sent) / (progress.elapsed_s - last.elapsed_s)
            values = (sent, progress.in_flight, progress.tokens_per_s, progress.ttft_ms)
            self._at.append(progress.elapsed_s)
            for series, value in zip(self._series.values(), values, strict=True):
                series.append(float(value))
            if len(self._at) > _POINTS:  # every second sample says as much; the newest stays
                for series in (self._at, *self._series.values()):
                    del series[-2::-2]
        self._drawn = self.picture()
        return self._drawn

    def picture(self) -> str:
        """An `<img>` with its alternative text; empty before the second sample."""
        if not self._at:
            return ""
        panels = [self._panel(i * (_WIDTH + _GAP), *series) for i, series in enumerate(self._series.items())]
        width = 4 * _WIDTH + 3 * _GAP
        if "EMULATED" in self._name:
            mark = f'<text x="{width / 2}" y="{_HEIGHT * 0.8}" fill="#ccc" font-size="34" text-anchor="middle">EMULATED</text>'
            panels.insert(0, mark)
        svg = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {_HEIGHT + 18}" width="{width}" '
            f'font-family="sans-serif" font-size="11">{"".join(panels)}</svg>'
        )
        told = ", ".join(f"{name} {shown(values[-1])}" for name, values in self._series.items())
        alt = html.escape(f"{self._name} after {self._at[-1]:.0f} s: {told}", quote=True)
        data = base64.b64encode(svg.encode()).decode()
        return f'<img src="data:image/svg+xml;base64,{data}" alt="{alt}" style="max-width:100%">'

    def _panel(self, left: float, name: str, values: list[float]) -> str:
        # What is not known yet (TTFT before a first token) is no point of the line.
        known = [(at, value) for at, value in zip(self._at, values, strict=True) if not math.isnan(value)]
        most, end = max((value for _, value in known), default=math.nan), max(self._at[-1], 1e-9)
        top = (most or 1.0) * 1.1
        points = " ".join(
            f"{left + _WIDTH * at / end:.1f},{18 + _HEIGHT * (1 - value / top):.1f}" for at, value in known
        )
        return (
            f'<text x="{left}" y="11" fill="#222">{html.escape(name)}: {shown(values[-1])} (most {shown(most)})</text>'
            f'<line x1="{left}" y1="{18 + _HEIGHT}" x2="{left + _WIDTH}" y2="{18 + _HEIGHT}" stroke="#999"/>'
            f'<polyline points="{points}" fill="none" stroke="#0072B2" stroke-width="1.5"/>'
        )
