"""The only orchestrator: for each variant, for each level not yet measured, serve, load, store."""

import contextlib
import dataclasses
import datetime
import itertools
import warnings
from collections.abc import Iterator, Sequence

from .errors import BadInput, Fp8labError, LevelFailed, ServerFailed
from .level_result import LevelResult
from .load import vllm_bench
from .load.generator import send_load
from .load.level import measure_level
from .load.stream import Endpoint
from .load.telemetry import Telemetry
from .profiles import Level, Profile
from .progress import StatusLine
from .recorded_server import RecordedServer
from .runs import Run
from .server import launch
from .server.command import served_model
from .server.launch import Server
from .text import visible
from .traces import Trace, arrival_times, is_file, named_trace, sharegpt_like

# What a cross-check may take, beside so many times what this kit's client took, before its client counts as hung.
_PATIENCE_S = 300.0
_PATIENCE = 5


def start_server(profile: Profile, variant: str, *, run: Run | None = None, **options) -> Server | RecordedServer:
    """Starts a server and returns when it is ready; stop it with `stop()`.

    With a `run` its log goes into the run folder; with a recorded run nothing is started. Further
    `options` are those of `fp8lab.server.launch.start_server` (port, log_path).
    """
    if run is None:
        return launch.start_server(profile, variant, **options)
    if run.read_only:
        return RecordedServer(profile, variant, run)
    return launch.start_server(profile, variant, **{"log_path": run.log_path(variant)} | options)


@contextlib.contextmanager
def serve(profile: Profile, variant: str, *, run: Run | None = None, **options) -> Iterator[Server | RecordedServer]:
    """`start_server` for a `with` statement: ready inside the block, gone after it."""
    server = start_server(profile, variant, run=run, **options)
    try:
        yield server
    finally:
        server.stop()


def trace_for(profile: Profile, level: Level) -> Trace:
    """The trace of a level: every variant gets the same one, each repeat its own seed."""
    workload = profile.workload
    tokenizer = workload.tokenizer or None
    if workload.trace.endswith(".json") and not tokenizer:
        tokenizer = served_model(profile, level.variant)
    return named_trace(
        workload.trace, level.requests, seed=_seed(profile, level), tokenizer=tokenizer,
        input_tokens=workload.input_tokens, output_tokens=workload.output_tokens,
    )  # fmt: skip


def check_trace(profile: Profile, levels: Sequence[Level]) -> None:
    """Raises BadInput when the profile's trace file cannot be read, or holds too few requests for one of `levels`."""
    if is_file(profile.workload.trace):
        for level in levels:
            trace_for(profile, level)


def load_test(
    server: Server | RecordedServer,
    trace: Trace | None = None,
    *,
    rate: float,
    requests: int | None = None,
    repeat: int = 1,
    run: Run | None = None,
    workers: int | None = None,
) -> LevelResult:
    """Measures one level on `server`: offers `rate` requests/s and returns when the last one has ended.

    `trace` defaults to the profile's, with `requests` requests (default 1000). With a `run` the result is
    stored there, and a level that the run already holds is returned instead of measured. A server that dies or
    hangs ends the level early: its records are kept, and it is invalid. Raises InUse when another process writes to
    the run.
    """
    count = requests if requests is not None else len(trace) if trace else 1000
    level = Level(variant=server.variant, rate=float(rate), requests=count, repeat=repeat)
    if isinstance(server, RecordedServer):
        return server.run.read(level)
    with run.locked() if run is not None else contextlib.nullcontext():
        if run is not None and run.has(level):
            StatusLine().done(f"{level.id}: already measured, read from {run.path.name}")
            return run.read(level)
        trace = trace.head(count) if trace else trace_for(server.profile, level)
        result = _measure_level(server, level, trace, workers)
        if run is not None:
            run.write(result)
    return result


def warm_up(server: Server | RecordedServer) -> None:
    """Sends the profile's warm-up requests at once, unmeasured: first requests pay for lazy initialisation."""
    profile = server.profile
    if isinstance(server, RecordedServer) or not profile.workload.warmup_requests:
        return
    trace = sharegpt_like(profile.workload.warmup_requests, seed=profile.workload.seed + 10_000)
    short = dataclasses.replace(trace, output_tokens=tuple(min(n, 16) for n in trace.output_tokens))
    send_load(_endpoint(server), short, [0.0] * len(short), workers=1, time_dilation=profile.time_dilation)


def missing_work(run: Run | None, profile: Profile, protocols: Sequence[str]) -> list[tuple[str, list[Level]]]:
    """What is still to be done: (variant, its levels), one entry a server, in the order of the profile.

    Without a run that is everything.
    """
    todo = _levels(profile, protocols)
    if run:
        checked = run.cross_checks()
        todo = [level for level in todo if not run.has(level) or (level.cross_check and level.id not in checked)]
    todo.sort(key=lambda level: list(profile.variants).index(level.variant))
    return [(variant, list(group)) for variant, group in itertools.groupby(todo, key=lambda level: level.variant)]


def measure(
    run: Run,
    profile: Profile,
    protocol: str | Sequence[str] = "as published",
    *,
    workers: int | None = None,
    again: Sequence[str] = (),
) -> list[LevelResult]:
    """Measures every level of `protocol` (one or several) that `run` does not hold; returns all of them.

    One server a variant, in the order of the profile; a finished level is stored at once, so that an
    interrupted call goes on where it stopped. The levels `again` (ids) are set aside and measured once more. On a
    recorded run this only reads, and returns what it holds of them. Raises InUse when another process writes to the
    run, RunDamaged before anything is started when a level of it cannot be read. At the end, with all that could be
    measured there, raises ServerFailed when a server did not start or died under load (its further levels are missing),
    LevelFailed when only levels or cross-checks failed.
    """
    run.check_profile(profile)
    protocols = [protocol] if isinstance(protocol, str) else list(protocol)
    asked = _levels(profile, protocols)
    if unknown := sorted(set(again) - {level.id for level in asked}):
        raise BadInput(f"no level {', '.join(unknown)} in {', '.join(protocols)} of profile {profile.name}")
    if not run.read_only:
        check_trace(profile, asked)
    with run.locked():
        for level_id in again:
            run.set_aside(level_id)
        for level in asked:
            if run.has(level):
                run.read(level)
        work = missing_work(run, profile, protocols)
        if work and run.read_only:
            # Part of a run is shown as far as it goes: what rests on the rest says so itself.
            lacking = [level.id for level in asked if not run.has(level)]
            if len(lacking) == len(asked):
                raise BadInput(
                    f"recorded run {run.path.name} lacks the levels {', '.join(lacking)}: all that were asked for"
                )
            if lacking:
                StatusLine().done(f"recorded run {run.path.name} lacks {', '.join(lacking)}: drawn without")
            asked, work = [level for level in asked if run.has(level)], []
        failed: list[Fp8labError] = []
        for variant, levels in work:
            try:
                failed += _measure_variant(run, profile, variant, levels, workers)
            except Fp8labError as error:
                # Wrong for all variants; what went wrong before is told too.
                raise type(error)("\n".join(map(str, [*failed, error]))) from None
    if failed:
        kind = ServerFailed if any(isinstance(error, ServerFailed) for error in failed) else LevelFailed
        raise kind("\n".join(map(str, failed)))
    return [run.read(level) for level in asked]


def _measure_variant(
    run: Run, profile: Profile, variant: str, levels: list[Level], workers: int | None
) -> list[Fp8labError]:
    """Measures `levels` on one server; what went wrong on the way, which is no reason to leave out other variants."""
    try:
        server = start_server(profile, variant, run=run)
    except ServerFailed as error:
        StatusLine().done(f"{variant}: not measured, {str(error).partition(chr(10))[0]}")
        return [ServerFailed(f"{error}\nnot measured: {_names(levels)}")]
    with server:
        return _measure_on(server, levels, run, workers)


def _measure_on(server: Server, levels: list[Level], run: Run, workers: int | None) -> list[Fp8labError]:
    failed: list[Fp8labError] = []
    try:
        warm_up(server)
    except LevelFailed as error:
        return [LevelFailed(f"{server.variant} could not be warmed up: {error}; not measured: {_names(levels)}")]
    for number, level in enumerate(levels):
        if problem := server.problem():
            said = f"the {server.variant} server did not last: {problem}; not measured: {_names(levels[number:])}"
            return [*failed, ServerFailed(said)]
        try:
            load_test(server, rate=level.rate, requests=level.requests, repeat=level.repeat, run=run, workers=workers)
        except LevelFailed as error:
            StatusLine().done(f"{level.id}: not measured, {error}")
            failed.append(LevelFailed(f"{level.id} was not measured: {error}"))
            continue
        if level.cross_check and not server.problem():
            try:
                cross_check(server, level, run)
            except LevelFailed as error:
                StatusLine().done(f"{level.id}: no cross-check, {error}")
                failed.append(LevelFailed(f"{level.id} has no cross-check: {error}"))
    return failed


def _names(levels: Sequence[Level]) -> str:
    return ", ".join(level.id for level in levels)


def cross_check(server: Server, level: Level, run: Run) -> dict:
    """The same load once more with `vllm bench serve`, stored beside the level; returns its result. Raises LevelFailed
    when that client fails or hangs."""
    profile = server.profile
    if level.id in run.cross_checks():
        return run.cross_checks()[level.id]
    status = StatusLine()
    status.update(f"{level.id}: cross-check with vllm bench serve")
    result = vllm_bench.run(
        _endpoint(server), trace_for(profile, level), level.rate,
        tokenizer=served_model(profile, level.variant), seed=_seed(profile, level), time_dilation=profile.time_dilation,
        timeout_s=_PATIENCE_S + _PATIENCE * (run.read(level).summary["duration_s"] or 0) * profile.time_dilation,
    )  # fmt: skip
    run.write_cross_check(level, result)
    status.done(
        f"{level.id}: vllm bench serve: {result['request_throughput']:.1f} req/s completed, "
        f"{result['output_token_throughput']:,.0f} tok/s, TPOT {result['mean_tpot_ms']:.1f} ms"
        + ("" if (core := result["client_busiest_core"]) is None else f", its client at {core:.0%} of a core")
    )
    return result


def _levels(profile: Profile, protocols: Sequence[str]) -> list[Level]:
    return list(dict.fromkeys(level for name in protocols for level in profile.levels(name)))


def _measure_level(server: Server, level: Level, trace: Trace, workers: int | None) -> LevelResult:
    profile = server.profile
    due = arrival_times(level.requests, level.rate, seed=_seed(profile, level))
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    telemetry = Telemetry(server.pids(), server.metrics, profile.time_dilation)
    measured = measure_level(
        _endpoint(server),
        trace,
        due,
        name=f"{level.id} (EMULATED GPU)" if profile.emulated else level.id,
        time_dilation=profile.time_dilation,
        telemetry=telemetry,
        server_problem=server.problem,
        workers=workers,
    )
    summary = measured.summary | {
        "level": dataclasses.asdict(level) | {"trace": trace.name},
        "started": started,
        "emulated": profile.emulated,
        "time_dilation": profile.time_dilation,
        "server": dataclasses.asdict(server.info),
    }
    if not summary["valid"]:
        warnings.warn(
            f"level {level.id} is INVALID: {visible(summary['invalid_reason'])} "
            f"(to measure it again: `fp8lab measure --run DIR --again {level.id}`)",
            stacklevel=3,
        )
    return LevelResult(level, summary, *measured[1:])


def _endpoint(server: Server) -> Endpoint:
    return Endpoint(server.base_url, server.model, server.api_key)


def _seed(profile: Profile, level: Level) -> int:
    return profile.workload.seed + level.repeat - 1
