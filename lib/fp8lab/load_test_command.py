"""What `fp8lab load-test` does: one level, or the search for the highest rate, at any endpoint."""

import argparse
import dataclasses
import functools
import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import orjson

from .config.profile import dilation_of, rate_name
from .config.trace import NAMES, Trace, arrival_times, begun_anew, is_file, named_trace, rescaled
from .errors import INVALID, BadInput, LevelFailed
from .load.endpoint import Endpoint, check_fleet
from .load.level import measure_level, warm_up
from .metrics.slo import SLO, attains
from .paths import made
from .results.files import plain, read_json, write_json, write_tables
from .results.run_folder import LevelResult
from .system.locks import Lock
from .ui import StatusLine

# Warm-up requests, and each probe's, are others than the level's: a prefix cache must not know them.
_WARM_UP_SEED, _PROBE_SEEDS = 10_000, 100_000
_PROBES = 8


def run(args: argparse.Namespace) -> int:
    """Measures a level or searches the limit; the exit code."""
    endpoint, *args.others = _endpoints(args)
    out = Path(args.out)
    slo = SLO.parse(args.slo) if args.slo is not None else None
    if args.warmup < 0:
        raise BadInput(f"--warmup {args.warmup} is below 0")
    if args.find_max_rate:
        return _search(args, endpoint, slo, out)
    if args.max_probes is not None:
        raise BadInput("--max-probes counts the levels of a search; leave it out, or add --find-max-rate")
    _refuse_a_result(out)
    return _level(args, endpoint, slo, out)


def _level(args: argparse.Namespace, endpoint: Endpoint, slo: SLO | None, out: Path) -> int:
    times = "kept" if args.rate is None or args.arrivals == "trace" else "dropped"
    trace = named_trace(args.trace, args.requests, seed=args.seed, times=times, **lengths(args))
    for note in trace.notes:
        StatusLine().done(f"trace {trace.name}: {note}")
    if args.arrivals == "trace" and trace.arrival_s is None:
        raise BadInput(f"--arrivals trace: the trace {args.trace!r} holds no arrival times; leave the option out")
    if trace.arrival_s and args.rate is None:
        due, name = trace.arrival_s, "replay"
    elif trace.arrival_s:
        due, name = rescaled(trace.arrival_s, args.rate), f"{rate_name(args.rate)}, arrivals of the trace"
    else:
        rate = math.inf if args.rate is None else args.rate
        due = arrival_times(len(trace), rate, burstiness=args.burstiness, seed=args.seed, normalised=args.normalised)
        name = rate_name(rate)
    if args.max_concurrency is not None:
        name = f"{name}, closed loop at {args.max_concurrency}"
    with _held(out):
        _refuse_a_result(out)  # of a command that ended meanwhile
        _warm_up(args, endpoint)
        measured = _measured(args, endpoint, trace, due, name=name, slo=slo)
        summary, told = measured.summary, {}
        if slo and summary.completed:
            found = attains(measured.records, slo)
            told = {"objective": found.state, "reason": found.reason}
            StatusLine().done(f"{slo}: {found.state}, {found.reason}")
        try:
            write_tables(out, records=measured.records, tokens=measured.tokens)
            write_json(out / "summary.json", summary)
        finally:  # also where the disk is full
            print(json.dumps(plain(summary) | told))
    return 0 if summary.valid else INVALID


def _held(out: Path) -> Lock:
    """The folder, made if need be, for this command alone. Raises BadInput, InUse, NotWritten."""
    return Lock(made(out, "choose another --out folder") / ".lock", f"--out folder {out}")


def _refuse_a_result(out: Path) -> None:
    """Raises BadInput where something was measured: a level of which no request completed, for want of a server, may be
    replaced."""
    kept = out / "summary.json"  # what is written last
    if (out / "search.json").exists() or (
        kept.exists() and read_json(kept, "choose another --out folder").get("completed") != 0
    ):
        raise BadInput(f"{out} already holds a result; choose another --out folder")


def _measured(
    args: argparse.Namespace, endpoint: Endpoint, trace: Trace, due, *, name: str, slo: SLO | None
) -> LevelResult:
    """One level; at a server of this kit whose GPU is emulated in model time, and marked so."""
    emulated = dilation_of(args.model) is not None
    name = f"{name} (EMULATED GPU)" if emulated else name
    measured = measure_level(endpoint, trace, due, name=name, slo=slo, **_options(args))
    return dataclasses.replace(measured, summary=dataclasses.replace(measured.summary, emulated=emulated))


def _search(args: argparse.Namespace, endpoint: Endpoint, slo: SLO | None, out: Path) -> int:
    from .experiment.max_rate import check_requests

    if not slo:
        raise BadInput("--find-max-rate: name the objective with --slo (ttft=200,tpot=50)")
    if args.max_concurrency is not None:
        raise BadInput("--find-max-rate: a closed loop (--max-concurrency) has no highest rate; leave one of them out")
    if args.arrivals == "trace":
        raise BadInput("--find-max-rate: its levels draw their arrivals; leave --arrivals trace out")
    args.max_probes = _PROBES if args.max_probes is None else args.max_probes
    if args.max_probes < 1 or not (args.rate is None or 0 < args.rate < math.inf):
        raise BadInput(
            f"--find-max-rate: --max-probes {args.max_probes} and --rate {args.rate} must be above 0, and finite"
        )
    if args.requests is not None:
        check_requests(args.requests, slo)
    _drawn(args, 1, args.seed)  # refused before anything is sent

    args.warmup = args.warmup or 1  # an endpoint that refuses all is told from one that refuses a load
    warm_up_once = functools.cache(lambda: _warm_up(args, endpoint))

    def measure(name: str, rate: float, requests: int, number: int) -> LevelResult:
        warm_up_once()
        trace = _drawn(args, requests, args.seed + _PROBE_SEEDS * (number + 1))
        due = arrival_times(requests, rate, burstiness=args.burstiness, seed=args.seed, normalised=args.normalised)
        return _measured(args, endpoint, trace, due, name=name, slo=slo)

    with _held(out):
        return _searched(args, endpoint, slo, out, measure)


def _searched(args: argparse.Namespace, endpoint: Endpoint, slo: SLO, out: Path, measure: Callable) -> int:
    """The search with `measure` in the folder `out`, which this command holds; the exit code."""
    from .experiment.max_rate import find_endpoint_max_rate

    if (out / "summary.json").exists():
        raise BadInput(f"{out} already holds a level; choose another --out folder for the search")
    _check_same(out / "search.json", _asked(args, endpoint))
    limit, probes = find_endpoint_max_rate(
        measure, slo, out, start=args.rate or 10.0, requests=args.requests, max_probes=args.max_probes
    )
    wrong = next((probe for probe in probes if not probe.found), None)
    result = {
        "slo": str(slo),
        "max_rate": str(limit),
        "highest_met": limit.low or None,
        "lowest_missed": limit.high if limit.high < math.inf else None,
        "valid": wrong is None,
        "invalid_reason": wrong and f"{wrong.rate:g} req/s: {wrong.summary.invalid_reason}",
        "probes": [
            {
                "rate": probe.rate,
                "objective": probe.found.state if probe.found else "INVALID",
                "reason": probe.found and probe.found.reason,
                **{name: getattr(probe.summary, name) for name in _SHOWN},
            }
            for probe in probes
        ],
        "asked": _asked(args, endpoint),
    }  # fmt: skip
    StatusLine().done(f"highest rate that meets {slo}: {limit}{' req/s' * (limit != (0, math.inf))}")
    try:
        write_json(out / "search.json", result)
    finally:
        print(json.dumps(plain(result)))
    if wrong:
        if not wrong.summary.completed and not limit.low:
            raise LevelFailed(f"the search found no rate that {endpoint.url} serves: {wrong.summary.invalid_reason}")
        return INVALID
    if not limit.low and limit.high == math.inf:
        raise LevelFailed(
            f"no probe was long enough to tell ({probes[0].found.reason}): more --requests, another --out folder"
        )
    if not limit.low:
        raise LevelFailed(
            f"{endpoint.url} missed the objective at every rate down to {limit.high:g} req/s ({probes[0].found.reason}): "
            f"a looser --slo, or --max-probes {args.max_probes + 4} to go on below"
        )
    if limit.high == math.inf:
        raise LevelFailed(
            f"{endpoint.url} met the objective at every rate up to {limit.low:g} req/s: the limit is higher; a stricter "
            f"--slo, or --max-probes {args.max_probes + 4} to go on above"
        )
    return 0


_SHOWN = ("requests", "failed", "request_throughput", "request_goodput", "slo_share")
_SHOWN += ("p50_ttft_ms", "p99_ttft_ms", "p99_tpot_ms")


def _endpoints(args: argparse.Namespace) -> list[Endpoint]:
    key = _variable("--api-key-env", args.api_key_env) if args.api_key_env else None
    headers = []
    for number, header in enumerate(args.header, 1):
        name, colon, value = header.partition(":")
        if not colon:
            raise BadInput(f"--header number {number} is not 'Name: value'")
        headers.append((name.strip(), value.strip()))
    for pair in args.header_env:
        name, sign, variable = pair.partition("=")
        if not sign:
            raise BadInput(f"--header-env {pair!r} is not NAME=VAR")
        headers.append((name.strip(), _variable("--header-env", variable).strip()))
    try:
        extra = orjson.loads(args.extra_body)
    except ValueError as error:  # what it holds may be a secret
        raise BadInput(f"--extra-body is not JSON: {error}") from None
    fleet = [
        Endpoint(
            url, args.model, key, chat=args.chat, ignore_eos=not args.natural_stop, endpoint=args.endpoint,
            headers=tuple(headers), extra_body=extra, max_tokens_field=args.max_tokens_field, insecure=args.insecure,
        )
        for url in args.base_url
    ]  # fmt: skip
    check_fleet(fleet, args.balance)
    return fleet


def _variable(option: str, name: str) -> str:
    if name not in os.environ:
        raise BadInput(f"{option} {name}: no such environment variable")
    if not os.environ[name].strip():
        raise BadInput(f"{option} {name}: the variable is empty")
    return os.environ[name]


# Of which traces an option speaks.
_SPEAKS_OF = {
    "tokenizer": "a file of conversations", "max_context": "a recorded trace or a file", "input_tokens": "--trace random",
    "output_tokens": "--trace random",
}  # fmt: skip


def lengths(args: argparse.Namespace) -> dict:
    """What the options say of a trace beside its name. Raises BadInput for one that says nothing of this trace."""
    random, file = args.trace == "random", is_file(args.trace)
    heard = {"input_tokens": random, "output_tokens": random, "tokenizer": file, "max_context": args.trace != NAMES[0]}
    given = {name: value for name in heard if (value := getattr(args, name)) is not None}
    if deaf := next((name for name in given if not heard[name]), None):
        option = f"--{deaf.replace('_', '-')}"
        raise BadInput(
            f"{option} {given[deaf]!r} says nothing of --trace {args.trace!r}, only of {_SPEAKS_OF[deaf]}: name that, or leave {option} out"
        )
    return {"tokenizer": None, "max_context": None, "input_tokens": 1024, "output_tokens": 128} | given


def _drawn(args: argparse.Namespace, requests: int, seed: int) -> Trace:
    return begun_anew(args.trace, requests, seed=seed, **lengths(args))


def _options(args: argparse.Namespace) -> dict:
    """What a level's load is sent with."""
    return {
        "others": args.others,
        "balance": args.balance,
        "workers": args.workers,
        "time_dilation": dilation_of(args.model) or 1.0,
        "max_concurrency": args.max_concurrency,
        "connections_ahead": args.connections_ahead,
        "exact_tokens": not args.natural_stop,
        "idle_timeout_s": args.idle_timeout,
        "drain_timeout_s": args.drain_timeout,
    }


def _warm_up(args: argparse.Namespace, endpoint: Endpoint) -> None:
    if args.warmup:
        count = max(args.warmup, 1 + len(args.others))  # each of a fleet is asked
        options = _options(args) | {"balance": "round-robin"}
        warm_up(endpoint, _drawn(args, count, args.seed + _WARM_UP_SEED), **options)


def _asked(args: argparse.Namespace, endpoint: Endpoint) -> dict:
    """What the probes of one search have in common, without a secret."""
    kept = ("model", "natural_stop", "trace", "seed", "burstiness", "normalised")
    # A few digits tell two bodies apart and give nothing away.
    body = hashlib.sha256(json.dumps(endpoint.extra_body, sort_keys=True).encode()).hexdigest()[:8]
    fleet = {"others": [one.url for one in args.others], "balance": args.balance if args.others else ""}
    asked = {"endpoint": endpoint.url, "extra_body": body, **fleet, **lengths(args)}
    return asked | {name: getattr(args, name) for name in kept}


def _check_same(path: Path, asked: dict) -> None:
    """Notes in a new folder what is searched; raises BadInput in one where something else was."""
    if not path.exists():
        write_json(path, {"asked": asked})
        return
    before = read_json(path, "choose another --out folder", ("asked",))["asked"]
    for name, value in plain(asked).items():
        if before.get(name) != value:
            raise BadInput(
                f"{path.parent} holds a search with {name} {before.get(name)!r}, not {value!r}; choose another --out folder"
            )
