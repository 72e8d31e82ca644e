"""`fp8lab load-test`: its arguments and what it does; one level, or the search for the highest rate, at any endpoint."""

import argparse
import functools
import hashlib
import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import INVALID, BadInput, LevelFailed
from .paths import made

if TYPE_CHECKING:
    from .config.trace import Trace
    from .load.endpoint import Endpoint
    from .metrics.slo import SLO

TEXT = """\
Measure any OpenAI-compatible endpoint under an open-loop load: requests leave when they are due, however slow the answers
are. Progress goes to standard error; the last line of standard output is one JSON document. Exit code 0: the level is
valid, or the search came to an end; 3: it is INVALID; 1: the warm-up failed, or no rate that was tried bounds the limit;
2: bad arguments. Stored are the records, with the server's words for failures: no key, header or query of the URL.
"""
EXAMPLES = """
    fp8lab load-test --base-url http://127.0.0.1:8000 --model NAME --rate 50 --out results/50
    fp8lab load-test --base-url https://HOST/v1 --model NAME --api-key-env MY_KEY --chat --rate 5 --out results/chat
    fp8lab load-test --base-url URL --model NAME --trace lengths.csv --out results/mine
    fp8lab load-test --base-url URL --model NAME --trace azure-conv --rate 5 --max-context 8192 --out results/azure
    fp8lab load-test --base-url URL --model NAME --max-concurrency 64 --requests 5000 --out results/closed-loop
    fp8lab load-test --base-url URL --model NAME --trace random --input-tokens 512 --output-tokens 64 --rate inf --out o
    fp8lab load-test --base-url 'https://HOST/openai/deployments/NAME?api-version=2024-10-21' --header-env api-key=MY_KEY \\
        --chat --natural-stop --max-tokens-field max_completion_tokens --model NAME --rate 2 --out results/azure
    fp8lab load-test --base-url URL --model NAME --chat --extra-body '{"chat_template_kwargs": {"enable_thinking": false}}' --out o
    fp8lab load-test --base-url URL --model NAME --slo ttft=200,tpot=50 --warmup 8 --rate 20 --out results/goodput
    fp8lab load-test --base-url URL --model NAME --slo ttft=200,tpot=50,p95 --find-max-rate --out results/limit
"""
# Warm-up requests, and each probe's, are others than the level's: a prefix cache must not know them.
_WARM_UP_SEED, _PROBE_SEEDS = 10_000, 100_000


_WHOLE, _REAL = {"type": int}, {"type": float}
_REPEATED = {"action": "append", "default": []}
# An option is (name, what stands for its value, help, what else argparse is told); "" is a switch, None names the choices.
LENGTHS = (
    ("--max-context", "N", "leave out requests of a file with more tokens in and out together", _WHOLE),
    ("--tokenizer", "T", "folder or hub name, to count the tokens of conversations", {}),
    ("--input-tokens", "N", "with --trace random (default 1024)", _WHOLE | {"default": 1024}),
    ("--output-tokens", "N", "with --trace random (default 128)", _WHOLE | {"default": 128}),
)
# (title, text, options), in the order in which one thinks of them.
GROUPS = (
    ("where", """\
What is asked is the base URL with /chat/completions (--chat) or /completions behind it. A URL without a path stands for
its /v1; a path of its own is kept (https://HOST/api/v3), and its query (?api-version=…). A whole endpoint that is pasted
(…/v1/chat/completions) is taken as it is, and says itself whether it is a chat.""", (
        ("--base-url", "URL", "http(s)://HOST[:PORT][/PATH][?QUERY]; several of them (the option repeated) are a fleet, among which "
         "the load is shared out", {"action": "append", "required": True}),
        ("--balance", None, "whom of a fleet a request goes to: each in its turn (default), or the one with the fewest in flight",
         {"choices": ("round-robin", "least-in-flight"), "default": "round-robin"}),
        ("--endpoint", "PATH", "this path behind the base URL instead", {"default": ""}),
        ("--api-key-env", "VAR", "environment variable that holds the key (Authorization: Bearer)", {}),
        ("--header", "'NAME: VALUE'", "sent with each request; repeatable", _REPEATED),
        ("--header-env", "NAME=VAR", "a header whose value is in an environment variable: a secret; repeatable "
         "(api-key=AZURE_KEY)", _REPEATED),
        ("--insecure", "", "take any certificate (one of the host's own making)", {}),
    )),
    ("what is sent", "", (
        ("--model", "NAME", "the served model's name", {"required": True}),
        ("--chat", "", "as a chat: each prompt is a user's message", {}),
        ("--natural-stop", "", "let answers end by themselves (for endpoints without ignore_eos)", {}),
        ("--trace", "T", "sharegpt-like (default), random, azure-conv or azure-code (recorded hours of 2023), or a file: "
         "lengths (CSV of fp8lab, Azure, BurstGPT; Mooncake) or conversations (ShareGPT, OpenAI; JSON)",
         {"default": "sharegpt-like"}),
        *LENGTHS,
        ("--requests", "N", "default 1000, or all of a file, drawn by --seed; in a search: of each probe", _WHOLE),
        ("--max-tokens-field", "NAME", "how an answer's length is asked for (default max_tokens; newer models: "
         "max_completion_tokens)", {"default": "max_tokens"}),
        ("--extra-body", "JSON", "an object merged into each request; null leaves out what the kit sends (temperature 0, "
         "stream_options)", {"default": "{}"}),
        ("--seed", "S", "of prompts, lengths and arrivals (default 0)", _WHOLE | {"default": 0}),
    )),
    ("how fast", "", (
        ("--rate", "R", "requests/s; inf (default) sends all at once; a trace with times is replayed if no rate is given; in "
         "a search: the first one tried (default 10)", _REAL),
        ("--arrivals", None, "with --rate: drawn (default), or the trace's own times rescaled to that rate",
         {"choices": ("drawn", "trace"), "default": "drawn"}),
        ("--burstiness", "B", "1: Poisson arrivals (default), below: bursts, inf: constant gaps", _REAL | {"default": 1.0}),
        ("--normalised", None, "rescale gaps so that the last arrival falls at N/rate, as vLLM's client does (default: yes)",
         {"action": argparse.BooleanOptionalAction, "default": True}),
        ("--max-concurrency", "N", "cap on requests in flight; what is due beyond it waits for a slot: the level is "
         "closed-loop", _WHOLE),
        ("--connections-ahead", "N", "connections opened before the start (default: as many as requests arrive in the first "
         "second); 0 for a server that allows few: each is then opened when it is needed, and TTFT counts that", _WHOLE),
        ("--find-max-rate", "", "search the highest rate that meets --slo, in at most --max-probes levels of 20 s or more; "
         "each is kept in --out, and the same command goes on where it stopped", {}),
        ("--max-probes", "N", "levels of a search (default 8)", _WHOLE | {"default": 8}),
    )),
    ("what counts", "", (
        ("--out", "DIR", "takes records.parquet, tokens.parquet, summary.json", {"required": True}),
        ("--slo", "LIMITS", "an objective for each request, in ms: ttft=200,tpot=50 (also e2el=); adds the goodput, the "
         "requests/s within all limits. For the search, the share of requests that must be: p95 (default p99: probes of 662 "
         "requests or more)", {}),
        ("--warmup", "N", "requests sent before, and not counted (default 0)", _WHOLE | {"default": 0}),
        ("--idle-timeout", "S", "a request without a byte of its answer for so long has failed, also one that is queued "
         "(default 60)", _REAL | {"default": 60.0}),
        ("--drain-timeout", "S", "what is still in flight so long after the last request was sent has failed; in a closed "
         "loop, while requests wait for a slot, so long after anything came back (default 600)", _REAL | {"default": 600.0}),
        ("--workers", "N", "client processes (default: by rate and cores)", _WHOLE),
    )),
)  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Measures a level or searches the limit; the exit code."""
    from .metrics.slo import SLO

    endpoint, *args.others = _endpoints(args)
    if not args.out:
        raise BadInput("--out is empty; name a folder, such as results/50")
    out = Path(args.out)
    slo = SLO.parse(args.slo) if args.slo is not None else None
    if args.warmup < 0:
        raise BadInput(f"--warmup {args.warmup} is below 0")
    if args.find_max_rate:
        return _search(args, endpoint, slo, out)
    if (out / "records.parquet").exists() or (out / "search.json").exists():
        raise BadInput(f"{out} already holds a result; choose another --out folder")
    return _level(args, endpoint, slo, out)


def _level(args: argparse.Namespace, endpoint: "Endpoint", slo: "SLO | None", out: Path) -> int:
    from .config.profile import rate_name
    from .config.trace import arrival_times, named_trace, rescaled
    from .load.level import measure_level
    from .results.files import plain, write_json, write_tables
    from .ui.status import StatusLine

    times = "kept" if args.rate is None or args.arrivals == "trace" else "dropped"
    trace = named_trace(args.trace, args.requests, seed=args.seed, times=times, **_lengths(args))
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
    made(out, "choose another --out folder")
    _warm_up(args, endpoint)
    summary, records, tokens, _ = measure_level(endpoint, trace, due, name=name, slo=slo, **_options(args))
    write_tables(out, records=records, tokens=tokens)
    write_json(out / "summary.json", summary)
    print(json.dumps(plain(summary)))
    return 0 if summary.valid else INVALID


def _search(args: argparse.Namespace, endpoint: "Endpoint", slo: "SLO | None", out: Path) -> int:
    from .config.trace import arrival_times
    from .experiment.max_rate import find_endpoint_max_rate
    from .load.level import Measured, measure_level
    from .results.files import plain, write_json
    from .system.locks import Lock
    from .ui.status import StatusLine

    if not slo:
        raise BadInput("--find-max-rate: name the objective with --slo (ttft=200,tpot=50)")
    if args.max_concurrency is not None:
        raise BadInput("--find-max-rate: a closed loop (--max-concurrency) has no highest rate; leave one of them out")
    if args.arrivals == "trace":
        raise BadInput("--find-max-rate: its levels draw their arrivals; leave --arrivals trace out")
    if args.max_probes < 1 or not (args.rate is None or 0 < args.rate < math.inf):
        raise BadInput(
            f"--find-max-rate: --max-probes {args.max_probes} and --rate {args.rate} must be above 0, and finite"
        )
    if (out / "records.parquet").exists():
        raise BadInput(f"{out} already holds a level; choose another --out folder for the search")
    _drawn(args, 1, args.seed)  # refused before anything is sent

    args.warmup = args.warmup or 1  # an endpoint that refuses all is told from one that refuses a load
    warm_up_once = functools.cache(lambda: _warm_up(args, endpoint))

    def measure(name: str, rate: float, requests: int, number: int) -> Measured:
        warm_up_once()
        trace = _drawn(args, requests, args.seed + _PROBE_SEEDS * (number + 1))
        due = arrival_times(requests, rate, burstiness=args.burstiness, seed=args.seed, normalised=args.normalised)
        return measure_level(endpoint, trace, due, name=name, slo=slo, **_options(args))

    made(out, "choose another --out folder")
    lock = Lock(out / "search.lock", f"the search in {out}")
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
    write_json(out / "search.json", result)
    lock.release()
    StatusLine().done(f"highest rate that meets {slo}: {limit}{' req/s' * (limit != (0, math.inf))}")
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


def _endpoints(args: argparse.Namespace) -> "list[Endpoint]":
    import orjson

    from .load.endpoint import Endpoint, check_fleet

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


def _lengths(args: argparse.Namespace) -> dict:
    """What the options say of a trace beside its name."""
    return {name: getattr(args, name) for name in ("tokenizer", "input_tokens", "output_tokens", "max_context")}


def _drawn(args: argparse.Namespace, requests: int, seed: int) -> "Trace":
    from .config.trace import begun_anew

    return begun_anew(args.trace, requests, seed=seed, **_lengths(args))


def _options(args: argparse.Namespace) -> dict:
    """What a level's load is sent with."""
    return {
        "others": args.others,
        "balance": args.balance,
        "workers": args.workers,
        "max_concurrency": args.max_concurrency,
        "connections_ahead": args.connections_ahead,
        "exact_tokens": not args.natural_stop,
        "idle_timeout_s": args.idle_timeout,
        "drain_timeout_s": args.drain_timeout,
    }


def _warm_up(args: argparse.Namespace, endpoint: "Endpoint") -> None:
    from .load.level import warm_up

    if args.warmup:
        count = max(args.warmup, 1 + len(args.others))  # each of a fleet is asked
        options = _options(args) | {"balance": "round-robin"}
        warm_up(endpoint, _drawn(args, count, args.seed + _WARM_UP_SEED), **options)


def _asked(args: argparse.Namespace, endpoint: "Endpoint") -> dict:
    """What the probes of one search have in common, without a secret."""
    kept = ("model", "natural_stop", "trace", "input_tokens", "output_tokens", "max_context", "seed")
    kept += ("burstiness", "normalised")
    # A few digits tell two bodies apart and give nothing away.
    body = hashlib.sha256(json.dumps(endpoint.extra_body, sort_keys=True).encode()).hexdigest()[:8]
    fleet = {"others": [one.url for one in args.others], "balance": args.balance if args.others else ""}
    return {"endpoint": endpoint.url, "extra_body": body} | fleet | {name: getattr(args, name) for name in kept}


def _check_same(path: Path, asked: dict) -> None:
    """Notes in a new folder what is searched; raises BadInput in one where something else was."""
    from .results.files import plain, read_json, write_json

    if not path.exists():
        return write_json(path, {"asked": asked})
    before = read_json(path, "choose another --out folder", ("asked",))["asked"]
    for name, value in plain(asked).items():
        # A search from before fleets asked one endpoint.
        if before.get(name, {"others": [], "balance": ""}.get(name)) != value:
            raise BadInput(
                f"{path.parent} holds a search with {name} {before.get(name)!r}, not {value!r}; choose another --out folder"
            )
    return None
