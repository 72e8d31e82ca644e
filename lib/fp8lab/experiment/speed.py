"""The only orchestrator: for each variant, for each level not yet measured, serve, load, store."""

import contextlib
import dataclasses
import datetime
import itertools
import math
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from ..config.profile import Level, Profile, names_of
from ..config.trace import Trace, arrival_times, is_file, named_trace, refuse_times
from ..errors import BadInput, Fp8labError, LevelFailed, ServerFailed
from ..load import vllm_bench
from ..load.endpoint import Endpoint
from ..load.generator import send_load
from ..load.level import measure_level
from ..load.telemetry import Telemetry
from ..metrics.summary import MeasuredLevel
from ..results.run_folder import LevelResult, Run, a_run
from ..server import launch
from ..server.command import source_model
from ..server.launch import Served, Server
from ..ui import StatusLine, Table, visible

# Rough and on the long side: starts as seen on two cores and on an H100's host (compiling included), the rates at which
# prompts are read and one API server drains what has piled up, and vLLM's client, which imports for long.
_START_S = {"cuda": 140, "emulated": 35, "cpu": 45}
_PROMPT_TOKENS_PER_S = 40_000
_DRAIN_TOKENS_PER_S = 10_000
_TAIL_S = 4
_CROSS_CHECK_START_S = 20
# What a cross-check may take, beside so many times what this kit's client took, before its client counts as hung.
_PATIENCE_S = 300.0
_PATIENCE = 5


class RecordedServer(Served):
    """Stands where a server would when a run is only read: nothing is started, nothing can be loaded."""

    def __init__(self, profile: Profile, variant: str, run: Run):
        profile.variant(variant)
        self.profile, self.variant, self.run = profile, variant, run
        held = [s.server for s in run.summaries().values() if s.level.variant == variant]
        if not held:
            raise BadInput(f"recorded run {run.path.name} holds no level of variant {variant!r}")
        self.info = held[0]

    def stop(self) -> None:
        """Nothing runs, nothing ends."""

    def _table(self) -> Table:
        rows = [("state", "recorded: no server is running"), *self.info.rows()]
        emulated = " (EMULATED GPU)" if self.run.emulated else ""
        return Table(
            f"vLLM server, variant {self.variant}, run {self.run.path.name}{emulated}", ("", "as recorded"), rows
        )


def a_server(server: Server | RecordedServer) -> Server | RecordedServer:
    """`server`. Raises BadInput for what is none, such as a URL."""
    if not hasattr(server, "profile"):
        raise BadInput(f"{server!r} is no server, expected one of lab.serve; `fp8lab load-test` measures a URL")
    return server


def start_server(profile: Profile, variant: str, *, run: Run | None = None, **options) -> Server | RecordedServer:
    """Starts a server and returns when it is ready; stop it with `stop()`. With a `run` its log goes into the run folder;
    with a recorded run nothing is started. Further `options` are those of `fp8lab.server.launch.start_server` (port, log_path)."""
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
    """The trace of a level: every variant gets the same one, each repeat its own seed. Raises BadInput for a file that
    cannot be read, is too short, or holds arrival times of its own. Those that a recorded trace has are not used."""
    return _trace(profile, level.variant, level.requests, _seed(profile, level))


def _trace(profile: Profile, variant: str, requests: int, seed: int, *, fewer: bool = False) -> Trace:
    workload, context = profile.workload, profile.context()
    return named_trace(
        workload.trace, requests, seed=seed, tokenizer=workload.tokenizer or partial(source_model, profile, variant),
        input_tokens=workload.input_tokens, output_tokens=workload.output_tokens, times="refused", fewer=fewer,
        # A tokenizer may begin every prompt with a token of its own.
        max_context=context and context - 1,
    )  # fmt: skip


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

    `trace` defaults to the profile's, with `requests` requests (default 1000); one with arrival times of its own is
    refused (BadInput), and so is what is no server. With a `run` the result is stored there, and a level that the run
    already holds is returned instead of measured. A server that dies or hangs ends the level early: its records are
    kept, and it is invalid. Raises RunMismatch when the run was made with another profile, or holds this level with
    other requests; InUse when another process writes to the run.
    """
    count = requests if requests is not None else len(trace) if trace else 1000
    level = Level(variant=a_server(server).variant, rate=float(rate), requests=count, repeat=repeat)
    trace = trace.head(count) if trace else None
    if isinstance(server, RecordedServer):
        server.run.has(level, trace)
        return server.run.read(level)
    if run is not None:
        run.check_profile(server.profile)
    trace = trace or trace_for(server.profile, level)
    if trace.arrival_s is not None:
        refuse_times(trace.name)
    if run is None:
        return _measure_level(server, level, trace, workers)
    with run.locked():
        if run.has(level, trace):
            StatusLine().done(f"{level.id}: already measured, read from {run.path.name}")
            return run.read(level)
        result = _measure_level(server, level, trace, workers)
        run.write(result)
    return result


def warm_up(server: Server | RecordedServer) -> None:
    """Sends the profile's warm-up requests at once, unmeasured: first requests pay for lazy initialisation, of shapes
    like theirs. They are the workload's own, from another seed, with answers of 16 tokens at most; of a file, all that
    it has where it has fewer."""
    profile, requests = a_server(server).profile, server.profile.workload.warmup_requests
    if isinstance(server, RecordedServer) or not requests:
        return
    trace = _trace(profile, server.variant, requests, profile.workload.seed + 10_000, fewer=True)
    short = dataclasses.replace(trace, output_tokens=tuple(min(n, 16) for n in trace.output_tokens))
    send_load(_endpoint(server), short, [0.0] * len(short), workers=1, time_dilation=profile.time_dilation)


def missing_work(
    run: Run | None,
    profile: Profile,
    protocols: Sequence[str],
    others: Sequence[Level] = (),
    *,
    variants: Sequence[str] = (),
) -> list[tuple[str, list[Level]]]:
    """What is still to be done of the protocols (of these `variants`, or of all) and of `others`: (variant, its levels), one
    entry a server. Variants come in the order of the profile, levels that ask for a start of their own after the others and
    start by start: variants then alternate. Without a run that is everything. Raises BadInput where the protocols name no level
    of the variants, and for a variant that vLLM would refuse."""
    todo = list(dict.fromkeys([*_levels(profile, protocols, variants), *others]))
    if protocols and variants and not todo:
        having = ", ".join(repr(name) for name in profile.protocols if _levels(profile, [name], variants))
        said = f"{', '.join(map(repr, protocols))} of profile {profile.name} name no level of {', '.join(variants)}"
        raise BadInput(f"the protocols {said} (these do: {having or 'none'})")
    if run:
        checked = run.cross_checks()
        todo = [level for level in todo if not run.has(level) or (level.cross_check and level.id not in checked)]
    order = list(profile.variants)
    todo.sort(key=lambda level: (level.start, order.index(level.variant)))
    for variant in dict.fromkeys(level.variant for level in todo):
        profile.check_quantization(variant)
    by_server = itertools.groupby(todo, key=lambda level: (level.start, level.variant))
    return [(variant, list(group)) for (_, variant), group in by_server]


def measure(
    run: Run,
    profile: Profile,
    protocol: str | Sequence[str] = "as published",
    *,
    variants: str | Sequence[str] = (),
    workers: int | None = None,
    again: str | Sequence[str] = (),
) -> list[LevelResult]:
    """Measures every level of `protocol` (one or several; of these `variants`, or of all) that `run` does not hold; returns
    all of them.

    One server a variant, in the order of the profile; a finished level is stored at once, so that an interrupted call goes on
    where it stopped. The levels `again` (ids of any that the run holds, or that an interrupted call has set aside) are set
    aside and measured once more, and returned too. On a recorded run this only reads, and returns what it holds of them or,
    where that is nothing, all that it holds.
    Raises InUse when another process writes to the run, RunDamaged before anything is started when a level of it cannot be
    read; at the end, with all measured that could be, ServerFailed when a server did not start or died under load (its further
    levels are missing), LevelFailed when only levels or cross-checks failed.
    """
    a_run(run).check_profile(profile)
    protocols, variants = names_of(protocol), names_of(variants)
    if run.read_only and not again:
        return _recorded(run, profile, protocols, variants)
    asked = _levels(profile, protocols, variants)
    with run.locked():
        anew = _stored_levels(run, profile, names_of(again), asked)
        todo = [one for one in asked if one not in anew and not run.has(one)]
        if longest := max([*todo, *anew], key=lambda level: level.requests, default=None):
            # A file that cannot be read or is too short says so now.
            trace = trace_for(profile, longest)
            for note in trace.notes:
                StatusLine().done(f"trace {trace.name}: {note}")
        # What is measured already needs its file no more; while that is there, it must be the one that was sent.
        gone = is_file(profile.workload.trace) and not Path(profile.workload.trace).is_file()
        for level in asked:
            if level not in anew and run.has(level, None if gone else trace_for(profile, level)):
                run.read(level)
        for level in anew:
            if (run.path / "levels" / level.id).is_dir():
                run.set_aside(level.id)
        work = missing_work(run, profile, protocols, anew, variants=variants)
        asked = list(dict.fromkeys([*asked, *anew]))
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


def _recorded(run: Run, profile: Profile, protocols: Sequence[str], variants: Sequence[str]) -> list[LevelResult]:
    """What a recorded run holds of the protocols (of these `variants`, or of all); where that is nothing, all that it holds:
    what rests on the rest says so itself. Raises BadInput when it holds no level."""
    asked = _levels(profile, [name for name in protocols if name in profile.protocols], variants)
    held: list[Level] = [level for level in asked if run.has(level)]
    if not held:
        held = [s.level for s in run.summaries().values()]
        if not held:
            raise BadInput(f"recorded run {run.path.name} holds no complete level: there is nothing to show")
        StatusLine().done(
            f"recorded run {run.path.name} holds nothing of {', '.join(map(repr, protocols))}: drawn is all that it holds"
        )
    elif lacking := [level.id for level in asked if level not in held]:
        StatusLine().done(f"recorded run {run.path.name} lacks {', '.join(lacking)}: drawn without")
    return [run.read(level) for level in held]


def _stored_levels(run: Run, profile: Profile, ids: Sequence[str], asked: Sequence[Level]) -> list[Level]:
    """The levels of these ids, to be measured again: as they are `asked` for now, else as they were measured. Raises
    BadInput for ids that `run` does not hold, and for levels that `profile` cannot give again."""
    if ids and run.read_only:
        raise BadInput(f"run {run.path.name} is a recorded run and read-only: no level of it can be measured again")
    if unknown := [level_id for level_id in ids if run.stored(level_id) is None]:
        held = ", ".join(sorted(path.name for path in run.path.glob("levels/*"))) or "none"
        raise BadInput(f"run {run.path.name} holds no level {', '.join(unknown)} to measure again (it holds: {held})")
    now, planned = {level.id: level for level in asked}, _levels(profile, list(profile.protocols))
    levels = []
    for level_id in dict.fromkeys(ids):
        level = now.get(level_id) or run.level(level_id, planned)
        profile.variant(level.variant)
        trace = trace_for(profile, level)
        was, digest = (getattr(level, name, "") for name in ("trace", "trace_digest"))
        if (was or trace.name, digest or trace.digest) != (trace.name, trace.digest):
            raise BadInput(
                f"level {level_id} was measured with requests of your own ({was}), which profile {profile.name} "
                f"does not name; in Python, run.set_aside({level_id!r}) and load_test with them measure it again"
            )
        levels.append(level.asked if isinstance(level, MeasuredLevel) else level)
    return levels


def _measure_variant(
    run: Run, profile: Profile, variant: str, levels: list[Level], workers: int | None
) -> list[Fp8labError]:
    """Measures `levels` on one server; what went wrong on the way, which is no reason to leave out other variants."""
    try:
        server = start_server(profile, variant, run=run)
    except ServerFailed as error:
        StatusLine().done(f"{variant}: not measured, {str(error).partition(chr(10))[0]}")
        return [ServerFailed(f"{error}\nnot measured: {_names(levels)}")]
    failed: list[Fp8labError] = []
    with server:
        try:
            warm_up(server)
        except LevelFailed as error:
            return [LevelFailed(f"{variant} could not be warmed up: {error}; not measured: {_names(levels)}")]
        for number, level in enumerate(levels):
            if problem := server.problem():
                said = f"the {variant} server did not last: {problem}; not measured: {_names(levels[number:])}"
                return [*failed, ServerFailed(said)]
            now, lacks = "not measured", "was not measured"
            try:
                load_test(
                    server, rate=level.rate, requests=level.requests, repeat=level.repeat, run=run, workers=workers
                )
                now, lacks = "no cross-check", "has no cross-check"
                if level.cross_check and not server.problem():
                    cross_check(server, level, run)
            except LevelFailed as error:
                StatusLine().done(f"{level.id}: {now}, {error}")
                failed.append(LevelFailed(f"{level.id} {lacks}: {error}"))
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
        tokenizer=source_model(profile, level.variant), seed=_seed(profile, level), time_dilation=profile.time_dilation,
        timeout_s=_PATIENCE_S + _PATIENCE * (run.read(level).summary.duration_s or 0) * profile.time_dilation,
    )  # fmt: skip
    run.write_cross_check(level, result)
    status.done(
        f"{level.id}: vllm bench serve: {result['request_throughput']:.1f} req/s completed, "
        f"{result['output_token_throughput']:,.0f} tok/s, TPOT {result['mean_tpot_ms']:.1f} ms"
        + ("" if (core := result["client_busiest_core"]) is None else f", its client at {core:.0%} of a core")
    )
    return result


def _levels(profile: Profile, protocols: Sequence[str], variants: Sequence[str] = ()) -> list[Level]:
    for variant in variants:
        profile.variant(variant)
    held = dict.fromkeys(level for name in protocols for level in profile.levels(name))
    return [level for level in held if not variants or level.variant in variants]


def _measure_level(server: Server, level: Level, trace: Trace, workers: int | None) -> LevelResult:
    profile = server.profile
    due = arrival_times(level.requests, level.rate, seed=_seed(profile, level))
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    # A card of this host is not what an emulated level, or one on a CPU, ran on.
    cards = server.cards if profile.device == "cuda" else 0
    telemetry = Telemetry(server.pids(), server.metrics, profile.time_dilation, cards)
    measured = measure_level(
        _endpoint(server), trace, due, name=f"{level.id} (EMULATED GPU)" if profile.emulated else level.id,
        time_dilation=profile.time_dilation, telemetry=telemetry, server_problem=server.problem, workers=workers,
    )  # fmt: skip
    sent = {"trace": trace.name, "trace_digest": trace.digest, "trace_notes": "; ".join(trace.notes)}
    summary = dataclasses.replace(
        measured.summary, level=MeasuredLevel(**dataclasses.asdict(level), **sent), server=server.info, started=started,
        emulated=profile.emulated,
    )  # fmt: skip
    if summary.valid and server.info.weights_doubt:
        summary = dataclasses.replace(summary, valid=False, invalid_reason=server.info.weights_doubt)
    if not summary.valid:
        warnings.warn(
            f"level {level.id} is INVALID: {visible(summary.invalid_reason)} "
            f"(to measure it again: `fp8lab measure --run DIR --again {level.id}`)",
            stacklevel=3,
        )
    return dataclasses.replace(measured, summary=summary)


def _endpoint(server: Server) -> Endpoint:
    return Endpoint(server.base_url, server.model, server.api_key)


def _seed(profile: Profile, level: Level) -> int:
    return profile.workload.seed + level.repeat - 1


def level_seconds(profile: Profile, level: Level) -> float:
    """About how many wall seconds one level takes, its cross-check included."""
    trace = trace_for(profile, level)
    arrivals = 0.0 if math.isinf(level.rate) else level.requests / level.rate
    work = sum(trace.output_tokens) / _DRAIN_TOKENS_PER_S + sum(trace.prompt_tokens) / _PROMPT_TOKENS_PER_S
    load = (max(arrivals, work) + _TAIL_S) * profile.time_dilation
    return 2 * load + _CROSS_CHECK_START_S if level.cross_check else load


def plan_table(
    profile: Profile, protocols: str | Sequence[str], run: Run | None = None, variants: str | Sequence[str] = ()
) -> Table:
    """What is to be measured (of these `variants`, or of all), server by server, with minutes; with a `run`, only what it
    lacks. A recorded one may be of a profile that has other protocols: then it lacks nothing of them."""
    protocols, variants = names_of(protocols), names_of(variants)
    if run and a_run(run).read_only:
        protocols = [name for name in protocols if name in profile.protocols]
    work = missing_work(run, profile, protocols, variants=variants)
    caption = f"Plan of profile {profile.name}: {', '.join(map(repr, protocols))}"
    if not work:
        return Table(caption, ("plan",), [("nothing is left to measure",)])
    longest = max((level for _, levels in work for level in levels), key=lambda level: level.requests)
    trace = trace_for(profile, longest)
    if trace.notes:
        caption = f"{caption}. Of the trace {trace.name}, {'; '.join(trace.notes)}"
    rows, total = [], 0.0
    for variant, levels in work:
        seconds = _START_S[profile.device] + sum(level_seconds(profile, level) for level in levels)
        total += seconds
        rates = ", ".join(
            f"{'all at once' if math.isinf(level.rate) else f'{level.rate:g}'}"
            f"{f' (seed {level.repeat})' if level.repeat > 1 else ''}{' + cross-check' if level.cross_check else ''}"
            for level in levels
        )
        start = f", start {levels[0].start}" if levels[0].start else ""
        rows.append((f"{variant}{start}", f"{len(levels)}", rates, f"{seconds / 60:.1f}"))
    rows.append(("together", f"{sum(len(levels) for _, levels in work)}", "", f"{total / 60:.1f}"))
    columns = ("variant (one server each)", "levels", "offered rates, requests/s", "minutes")
    return Table(caption, columns, rows)
