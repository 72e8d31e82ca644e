"""The command line. Results go to standard output, progress to standard error.

Exit codes: 0 done; 1 the work failed; 2 the arguments cannot work; 3 a level that `measure`, `reproduce`, `load-test` or a
batch's job left in its run is INVALID, while all else was measured and printed; 130 interrupted; 141 what it wrote was read
no more. 1 wins over 3. A recorded run that is redrawn (`--source`) measures nothing: it ends with 0 whatever its levels are.
"""

import argparse
import os
import signal
import sys
import textwrap

from . import __version__
from .config.dimensions import RECIPES
from .errors import BadInput, Fp8labError
from .paths import with_home, with_library
from .ui import reader_gone, settle

_ADVICE = "put that right (room on the disk, permissions) and run the same command again"
_EXAMPLES = """
    fp8lab reproduce                          the whole story on this machine, front notebook and verdicts
    fp8lab reproduce --notebook steps         the same, step by step, six notebooks
    fp8lab serve fp8 --print-command          the exact vLLM command of a variant
    fp8lab quality                            what FP8 does to a trained model's answers
    fp8lab claims runs/latest                 the verdicts of a run
    fp8lab load-test --base-url URL --model NAME --rate 50 --out DIR    measure any endpoint
    fp8lab status; fp8lab stop                what is left over, and its end
"""


class _NotGiven(str):
    """What a text is that was not given, told from an empty one that was."""


# An option is (name, what stands for its value, help, what else argparse is told); "" is a switch, None names the choices.
_TEXT, _LIST, _WHOLE, _REAL = {"default": _NotGiven()}, {"action": "append"}, {"type": int}, {"type": float}
# What several commands take.
_RUN_READ = ("run", "RUN", "a run folder, or the name of one in data/recorded", {})
_PROFILE = ("--profile", "P", "a name (see `fp8lab profiles`), a .toml file, or auto (default)", {"default": "auto"})
_RUN = ("--run", "DIR", "run folder, resumed if it exists (default: a new one in runs/)", _TEXT)
_SOURCE = ("--source", "DIR", "read this run, measure nothing", _TEXT)
_MODEL = ("--model", "M", "serve this checkpoint (path or hub name) for every variant", {})
_PROTOCOL = ("--protocol", "NAME", "a protocol of the profile (default: all); repeatable", _LIST)
_VARIANT = ("--variant", "V", "only the levels of this variant; repeatable", _LIST)
_LENGTHS = (
    (
        "--max-context",
        "N",
        "leave out requests of a recorded trace or a file with more tokens in and out together",
        _WHOLE,
    ),
    ("--tokenizer", "T", "folder or hub name, to count the tokens of conversations", {}),
    ("--input-tokens", "N", "with --trace random (default 1024)", _WHOLE),
    ("--output-tokens", "N", "with --trace random (default 128)", _WHOLE),
)
# The options of load-test: (title, text, options), in the order in which one thinks of them.
_LOAD_TEST = (
    ("where", """\
What is asked is the base URL with /chat/completions (--chat) or /completions behind it. A URL without a path stands for
its /v1; a path of its own is kept (https://HOST/api/v3), and its query (?api-version=…). A whole endpoint that is pasted
(…/v1/chat/completions) is taken as it is, and says itself whether it is a chat.""", (
        ("--base-url", "URL", "http(s)://HOST[:PORT][/PATH][?QUERY]; several of them (the option repeated) are a fleet, among which "
         "the load is shared out", {"action": "append", "required": True}),
        ("--balance", None, "whom of a fleet a request goes to: each in its turn (default), or the one with the fewest in flight",
         {"choices": ("round-robin", "least-in-flight"), "default": "round-robin"}),
        ("--endpoint", "PATH", "this path behind the base URL instead", _TEXT),
        ("--api-key-env", "VAR", "environment variable that holds the key (Authorization: Bearer)", {}),
        ("--header", "'NAME: VALUE'", "sent with each request; repeatable", _LIST | {"default": []}),
        ("--header-env", "NAME=VAR", "a header whose value is in an environment variable: a secret; repeatable "
         "(api-key=AZURE_KEY)", _LIST | {"default": []}),
        ("--insecure", "", "take any certificate (one of the host's own making)", {}),
    )),
    ("what is sent", "", (
        ("--model", "NAME", "the served model's name", {"required": True}),
        ("--chat", "", "as a chat: each prompt is a user's message", {}),
        ("--natural-stop", "", "let answers end by themselves (for endpoints without ignore_eos)", {}),
        ("--trace", "T", "sharegpt-like (default), random, azure-conv or azure-code (recorded hours of 2023), or a file: "
         "lengths (CSV of fp8lab, Azure, BurstGPT; Mooncake) or conversations (ShareGPT, OpenAI; JSON)",
         {"default": "sharegpt-like"}),
        *_LENGTHS,
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
        ("--max-probes", "N", "levels of a search (default 8)", _WHOLE),
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
# Of each command its name, what it does, its options, and examples.
_COMMANDS = (
    ("reproduce", """\
Run notebooks headless: measure, judge, render. Exit code 3: a level of the run is INVALID, all else is done (0 with --source, \
which measures nothing).""", (
        _PROFILE, _RUN, _SOURCE, _MODEL,
        ("--notebook", "N", "front (default; with --source one of whose levels or answers it holds any), steps, a "
         "step's name, or a path; repeatable", _LIST),
        ("-p", ("NAME", "VALUE"), "a notebook parameter, which may be empty; repeatable",
         _LIST | {"default": [], "dest": "parameter", "nargs": 2, "type": str}),
        ("--weights", None, "random weights of the true shapes, or the profile's checkpoints",
         {"choices": ("random", "checkpoint")}),
    ), """
        fp8lab reproduce                                       front notebook, profile picked by the machine
        fp8lab reproduce --profile emulated-h100               without a GPU
        fp8lab reproduce --run runs/mine                       into this folder; again: goes on where it stopped
        fp8lab reproduce --source runs/latest                  redraw everything from a run, measure nothing
        fp8lab reproduce --notebook 02_bf16_baseline -p rate 25
    """),
    ("measure", """\
Measure a profile's levels without a notebook. Exit code 3: a level of the run is INVALID, all else is measured.""", (
        _PROFILE, _RUN, _PROTOCOL, _VARIANT,
        ("--workers", "N", "client processes (default: by rate and cores)", _WHOLE),
        ("--again", "LEVEL", "set this level of the run aside and measure it again, without --protocol nothing else; repeatable",
         _LIST | {"default": []}),
    ), """
        fp8lab measure --profile h200-80gb --run runs/h200       every protocol of the profile
        fp8lab measure --run runs/h200                           goes on where it stopped
        fp8lab measure --protocol "as published" --protocol ablation
        fp8lab measure --profile h100-80gb-recipes --variant int4 --run runs/formats    one format; the rest later
        fp8lab measure --run runs/h200 --again bf16-50rps-r1     set this level aside and measure it anew
    """),
    ("quality", """\
Measure what each variant answers: perplexity, KL divergence and agreement with the profile's first variant on a text, greedy \
answers beside its own. That one is asked twice, which gives the noise floor. The profile is smollm2-gpu, without a GPU \
smollm2-cpu, unless another is named.""", (
        _PROFILE, _RUN, _SOURCE, _MODEL,
        ("--variant", "V", "default: one for each choice of number formats; repeatable", _LIST),
        ("--weights", None, "a package's, or the profile's checkpoints", {"choices": ("packaged", "checkpoint")}),
        ("--text", "FILE", "plain UTF-8 (default: Newton's Opticks, Book I)", _TEXT),
        ("--document-tokens", "N", "length of a document (1024)", _WHOLE | {"default": 1024}),
        ("--documents", "N", "how many at most (default: the whole text)", _WHOLE | {"default": 0}),
        ("--top", "N", "likeliest tokens kept at each position (20)", _WHOLE | {"default": 20}),
        ("--prompts", "N", "passages to be explained (64)", _WHOLE | {"default": 64}),
        ("--answer-tokens", "N", "longest answer (256)", _WHOLE | {"default": 256}),
        ("--in-flight", "N", "requests at once (64)", _WHOLE | {"default": 64}),
    ), """
        fp8lab quality                                           SmolLM2-135M: bf16 against every FP8 variant (a CPU: fp32 against bf16)
        fp8lab quality --run runs/quality                        into this folder; again: goes on where it stopped
        fp8lab quality --profile h100-80gb --model /path/to/a/model   your own trained model
        fp8lab quality --text my.txt --variant fp8               your own text, one variant beside the reference
        fp8lab quality --documents 8 --document-tokens 128 --prompts 8 --answer-tokens 32    a quick look
        fp8lab quality --source runs/quality                     show what a run holds, measure nothing
    """),
    ("anatomy", """\
Take decode steps apart: GPU time by kind of kernel beside the datasheet's floor, wall time, what the host adds, and what the \
EngineCore does. One server a variant; without a GPU the host's half alone.""", (
        _PROFILE, _RUN, _SOURCE,
        ("--variant", "V", "default: bf16 and fp8; repeatable", _LIST),
        ("--batch", "N", "requests decoding at once (64, 128, 256, 1024); repeatable", _LIST | _WHOLE),
        ("--brief", "", "the steps alone, without their kernels and what the EngineCore did", {}),
    ), """
        fp8lab anatomy                                    bf16 and fp8, 64 to 1,024 decoding at once, on this GPU
        fp8lab anatomy --variant fp8 --batch 256          one step
        fp8lab anatomy --profile tiny-cpu --batch 16      no GPU: what the EngineCore does
        fp8lab anatomy --source h100-80gb --brief         a recorded run's steps in one table
    """),
    ("quantize", """\
Write a checkpoint in another number format, each weight rounded to the nearest value that it has or, by a recipe …-by-gptq or \
…-by-awq, as a text calibrates it. What is written is told beforehand, and refused without room for it; an interrupted call goes \
on where it stopped, one that calibrates begins anew.""", (
        ("model", "MODEL", "a folder of safetensors in BF16, or a model of data/models", {}),
        ("--recipe", "R", f"one of {', '.join(RECIPES)}", {"required": True, "choices": RECIPES}),
        ("--text", "FILE", "what calibrates (default: Newton's Opticks, Book II)", _TEXT),
        ("--out", "DIR", "folder to be made (default: MODEL-R, of a name in the cache)", _TEXT),
    ), """
        fp8lab quantize /path/to/a/model --recipe int8                a checkpoint of your own, into /path/to/a/model-int8
        fp8lab quantize llama-3-8b --recipe int4 --out /data/int4     random weights of true shapes: for speed
        fp8lab quantize smollm2-135m-instruct --recipe fp8-channel    the trained model that the environment brings
        fp8lab quantize /path/to/a/model --recipe int4-by-gptq --text mine.txt    calibrated (once before: make calibrator)
    """),
    ("plan", "Show which levels a profile measures and about how long they take.", (
        _PROFILE, _PROTOCOL, _VARIANT, ("--run", "DIR", "count only what this run does not hold yet", _TEXT),
    ), """
        fp8lab plan --profile h200-80gb                          levels and minutes
        fp8lab plan --run runs/h200                              what is left of a run
    """),
    ("fit", """\
Say which number formats of a model fit on how many cards, and for how many requests they leave room: by arithmetic, before \
anything is started.""", (
        ("model", "MODEL", "a model of data/models, or a checkpoint's folder", {}),
        ("--card", "P", "a profile that holds the card (h100-80gb)", {"default": "h100-80gb"}),
        ("--tokens", "N", "of a request, in and out (400)", _WHOLE | {"default": 400}),
    ), """
        fp8lab fit llama-3-70b                                        on H100s, in BF16, FP8, INT8 and INT4
        fp8lab fit /path/to/a/model --card h200-80gb --tokens 2000    a checkpoint of your own, longer requests
    """),
    ("fit-model", """\
Fit a step model to each variant of a run: a few numbers that say how long a step takes. Levels that data/fits/held_out.toml names \
are kept from the fit, and judge it.""", (
        _RUN_READ,
        ("--variant", "V", "which variant (default: all that were measured); repeatable", _LIST),
        ("--out", "FILE", "the .toml to write (default: data/fits/RUN.toml)", _TEXT),
    ), """
        fp8lab fit-model h100-80gb-unsealed                           every variant of a recorded run, into data/fits/
        fp8lab fit-model runs/latest --variant fp8-unsealed --out mine.toml
    """),
    ("predict", """\
Say what a server would do under a load that nobody measured: vLLM's scheduling played in virtual time, with steps that take what \
a fit says. PREDICTED, in seconds, on any machine.""", (
        ("fit", "FIT", "a fit of data/fits, or a .toml that fit-model made", {}),
        ("--variant", "V", "which variant (default: all of the fit); V=NAME gives it the name that it has in a run, for --against; "
         "repeatable", _LIST),
        ("--rate", "R", "requests/s; inf sends all at once; repeatable (default: a trace's own times, else all at once)", _REAL | _LIST | {"default": []}),
        ("--requests", "N", "how many (2000, or all of a file)", _WHOLE),
        ("--trace", "T", "whose lengths, as in load-test (sharegpt-like)", {"default": "sharegpt-like"}),
        *_LENGTHS,
        ("--seed", "S", "of lengths and arrivals (0)", _WHOLE | {"default": 0}),
        ("--scheduler", None, "whose scheduling: its equal here (virtual), or the installed vLLM's own, in some seconds a thousand "
         "requests", {"choices": ("virtual", "vllm"), "default": "virtual"}),
        ("--slo", "LIMITS", "ttft=200,tpot=50: also the highest rate that meets it", _TEXT),
        ("--card", "P", "on the card of this profile instead, by the datasheets", _TEXT),
        ("--api-us", "US", "behind one Python API server process, vLLM's default, that takes so many µs of CPU a token (60 to 130 "
         "on the recorded hosts); of latencies that then says little", {"type": float}),
        ("--against", "RUN", "every level of a run beside what is foretold of it; nothing else", _TEXT),
    ), """
        fp8lab predict h100-80gb-unsealed --rate 50 --rate 100        both variants of the fit, on requests like ShareGPT's
        fp8lab predict h100-80gb-unsealed --variant fp8-unsealed --trace azure-conv --rate 20 --slo ttft=500,tpot=50
        fp8lab predict h100-80gb-unsealed --trace random --input-tokens 2048 --output-tokens 512 --requests 300
        fp8lab predict h100-80gb-unsealed --card h200-80gb            on another card, by the datasheets alone
        fp8lab predict h100-80gb-unsealed --rate 100 --api-us 105     behind vLLM's default API server
        fp8lab predict h100-80gb-unsealed --against h100-80gb-azure-conv    beside what was measured
    """),
    ("share", "Make one page and one archive of a run, to be sent to someone.", (
        _RUN_READ,
        ("--out", "DIR", "folder that takes them (default: shared/)", {"default": "shared"}),
        ("--notebook", "N", "as in reproduce (default: one of whose levels or answers it has any); repeatable", _LIST),
        ("--tokens", "", "keep every token's timestamp in the archive", {}),
    ), """
        fp8lab share runs/latest                         a page and an archive, in shared/
        fp8lab share runs/h200 --notebook front --notebook 05_fair_comparison --out ~/outbox
        fp8lab share smollm2-h200 --notebook 07_quality  a run of answers
        fp8lab reproduce --source h200.zip               what the other side runs
    """),
    ("batch", """\
Run a matrix of profiles and workloads through papermill, one after the other on each GPU. The queue survives a crash: run it \
again. index.html and comparison.html show all runs. Exit code 1: a run failed, 3: none failed but a level is INVALID.""", (
        ("matrix", "MATRIX.toml", "what to run (see below)", {}),
        ("--out", "DIR", "batch folder (default: runs/batch-<matrix's name>)", _TEXT),
        ("--ray", "ADDRESS", "run on the hosts of this Ray cluster (auto: the one of this machine), each job where its cards are",
         _TEXT),
    ), """
        fp8lab batch matrix.toml                         all of it; again: goes on where it stopped
        fp8lab batch matrix.toml --out runs/overnight
        fp8lab batch data/batches/two-workloads.toml     an example that runs without a GPU
        fp8lab batch matrix.toml --ray 10.0.0.1:6379     on the hosts of a Ray cluster

        matrix.toml:
          profiles  = ["h200-80gb", "mine.toml"]
          variants  = ["bf16", "fp8"]                      # default: all that the protocols name
          protocols = ["equal load"]                       # default: as published, equal load
          notebook  = "front"                              # default
          [workloads.chat]                                 # default: each profile's own
          trace = "sharegpt-like"
          [workloads.summaries]
          trace = "random"
          input_tokens = 2048
          output_tokens = 128
    """),
    ("record", "Keep a run in data/recorded, trimmed: no logs, few token timestamps.", (
        _RUN_READ,
        ("name", "NAME", "what it is to be called; an earlier one of that name is replaced", {}),
        ("--tokens", "LEVEL", "keep this level's token timestamps; repeatable", _LIST),
    ), "fp8lab record runs/h200 h200-80gb --tokens bf16-50rps-r1 --tokens fp8-100rps-r1"),
    ("serve", "Hold one server in this terminal until Ctrl-C.", (
        _PROFILE,
        ("variant", "VARIANT", "bf16, fp8, fp8-weights, fp8-kv, or another of the profile's", {}),
        ("--port", "N", "port on 127.0.0.1 (default: a free one)", _WHOLE),
        ("--print-command", "", "print the vLLM command and exit", {}),
        ("--show-key", "", "print the API key of this start", {}),
    ), """
        fp8lab serve bf16                          hold a server until Ctrl-C
        fp8lab serve fp8 --profile h100-80gb --port 8000
        fp8lab serve fp8 --print-command           show the vLLM command instead
    """),
    ("load-test", """\
Measure any OpenAI-compatible endpoint under an open-loop load: requests leave when they are due, however slow the answers
are. Progress goes to standard error; the last line of standard output is one JSON document. Exit code 0: the level is
valid, or the search came to an end; 3: it is INVALID; 1: the warm-up failed, or no rate that was tried bounds the limit;
2: bad arguments. Stored are the records, with the server's words for failures: no key, header or query of the URL.
""", (), """
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
    """),
    ("claims", "Judge the published claims by a run, or by several side by side.", (
        (*_RUN_READ[:3], {"nargs": "+"}),
        ("--brief", "", "without reasons and levels", {}),
        ("--markdown", "", "as a Markdown table", {}),
    ), """
        fp8lab claims runs/latest
        fp8lab claims runs/latest --brief --markdown     for a README
        fp8lab claims runs/latest h100-80gb h200-80gb    beside the recorded runs
    """),
    ("profiles", "Show the profiles, or one of them.", (("name", "P", None, {"nargs": "?"}),), """
        fp8lab profiles                            all profiles
        fp8lab profiles emulated-h100              one: its variants and levels
    """),
    ("status", "Show servers that are running or left over.", (), "fp8lab status"),
    ("stop", "End servers that are left over.", (
        ("--all", "", "also end servers whose owner still runs", {}),
    ), """
        fp8lab stop                                end servers whose owner is gone
        fp8lab stop --all                          also those that are in use
    """),
)  # fmt: skip
NAMES = tuple(name for name, *_ in _COMMANDS)
# What a command still heeds beside --source, which measures nothing.
_BESIDE_SOURCE = {"reproduce": ("notebook", "parameter"), "quality": (), "anatomy": ("variant", "brief")}


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    if arguments is None:
        settle()
    try:
        try:
            return _run(arguments)
        finally:
            sys.stdout.flush()
    except OSError as error:
        if isinstance(error, BrokenPipeError) and reader_gone():
            return 128 + signal.SIGPIPE
        what = f"{error.filename}: " if error.filename else ""
        print(f"fp8lab: {what}{error.strerror or error}; nothing that was complete is lost: {_ADVICE}", file=sys.stderr)
        return 1


def _run(arguments: list[str] | None) -> int:
    args = _parser().parse_args(arguments)
    # A closed terminal or a polite kill ends a command as Ctrl-C does: servers are stopped on the way out.
    for signum in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signum) is not signal.SIG_IGN:  # nohup
            signal.signal(signum, signal.default_int_handler)
    try:
        if getattr(args, "source", ""):
            _check_beside_source(args)
        os.environ |= with_library(with_home(os.environ))
        # Only now: help and arguments that cannot be read are answered at once.
        if args.command == "load_test":
            from . import load_test_command

            return load_test_command.run(args)
        from . import commands

        return getattr(commands, args.command)(args) or 0
    except BadInput as error:
        print(f"fp8lab: {error}", file=sys.stderr)
        return 2
    except Fp8labError as error:
        print(f"fp8lab: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nfp8lab: interrupted", file=sys.stderr)
        return 130


def _check_beside_source(args: argparse.Namespace) -> None:
    """Raises BadInput for options that --source would leave without effect."""
    alone = vars(_parser().parse_args([args.command, "--source", args.source]))
    heeded = _BESIDE_SOURCE[args.command]
    if idle := [name for name, value in vars(args).items() if value != alone[name] and name not in heeded]:
        named = ", ".join(f"--{name.replace('_', '-')}" for name in idle)
        raise BadInput(f"--source {args.source} only shows what that run holds: leave out {named}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fp8lab",
        description="What does FP8 really buy when vLLM serves a model on a Hopper GPU? "
        "Runs the published comparison, and the fair one, and judges the claims.",
        **_with_examples(_EXAMPLES),
    )
    parser.add_argument("--version", action="version", version=f"fp8lab {__version__}")
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, text, options, examples in _COMMANDS:
        command = subparsers.add_parser(name, help=text, description=text, **_with_examples(examples))
        command.set_defaults(command=name.replace("-", "_"))
        groups = [(command, options)]
        if name == "load-test":
            groups = [(command.add_argument_group(title, told or None), group) for title, told, group in _LOAD_TEST]
        for taker, option in ((taker, option) for taker, options in groups for option in options):
            _add(taker, *option)
    return parser


def _add(taker, name: str, value: str | None, told: str, more: dict) -> None:
    kind = {"action": "store_true"} if value == "" else {"metavar": value, "type": _word} if value else {}
    taker.add_argument(name, help=told, **kind | more)


def _word(text: str) -> str:
    """A text as it was given. Raises ArgumentTypeError for an empty one, which would otherwise count as not given."""
    if not text and not isinstance(text, _NotGiven):
        raise argparse.ArgumentTypeError("'' is empty, expected a value: set the shell's variable, or leave this out")
    return str(text)


def _with_examples(examples: str) -> dict:
    shown = "examples:\n" + textwrap.indent(textwrap.dedent(examples).strip(), "  ")
    return {"epilog": shown, "formatter_class": argparse.RawDescriptionHelpFormatter}


if __name__ == "__main__":
    sys.exit(main())
