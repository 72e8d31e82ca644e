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

from . import load_test_command
from .config.recipes import RECIPES
from .errors import BadInput, Fp8labError
from .paths import with_home, with_library
from .ui import status

_ADVICE = "put that right (room on the disk, permissions) and run the same command again"

EXAMPLES = {
    "": """
        fp8lab reproduce                          the whole story on this machine, front notebook and verdicts
        fp8lab reproduce --notebook steps         the same, step by step, six notebooks
        fp8lab serve fp8 --print-command          the exact vLLM command of a variant
        fp8lab quality                            what FP8 does to a trained model's answers
        fp8lab claims runs/latest                 the verdicts of a run
        fp8lab load-test --base-url URL --model NAME --rate 50 --out DIR    measure any endpoint
        fp8lab status; fp8lab stop                what is left over, and its end
    """,
    "reproduce": """
        fp8lab reproduce                                       front notebook, profile picked by the machine
        fp8lab reproduce --profile emulated-h100               without a GPU
        fp8lab reproduce --run runs/mine                       into this folder; again: goes on where it stopped
        fp8lab reproduce --source runs/latest                  redraw everything from a run, measure nothing
        fp8lab reproduce --notebook 02_bf16_baseline -p rate 25
    """,
    "measure": """
        fp8lab measure --profile h200-80gb --run runs/h200       every protocol of the profile
        fp8lab measure --run runs/h200                           goes on where it stopped
        fp8lab measure --protocol "as published" --protocol ablation
        fp8lab measure --run runs/h200 --again bf16-50rps-r1     set this level aside and measure it anew
    """,
    "quality": """
        fp8lab quality                                           SmolLM2-135M: bf16 against every FP8 variant (a CPU: fp32 against bf16)
        fp8lab quality --run runs/quality                        into this folder; again: goes on where it stopped
        fp8lab quality --profile h100-80gb --model /path/to/a/model   your own trained model
        fp8lab quality --text my.txt --variant fp8               your own text, one variant beside the reference
        fp8lab quality --documents 8 --document-tokens 128 --prompts 8 --answer-tokens 32    a quick look
        fp8lab quality --source runs/quality                     show what a run holds, measure nothing
    """,
    "plan": """
        fp8lab plan --profile h200-80gb                          levels and minutes
        fp8lab plan --run runs/h200                              what is left of a run
    """,
    "share": """
        fp8lab share runs/latest                         a page and an archive, in shared/
        fp8lab share runs/h200 --notebook front --notebook 05_fair_comparison --out ~/outbox
        fp8lab share smollm2-h200 --notebook 07_quality  a run of answers
        fp8lab reproduce --source h200.zip               what the other side runs
    """,
    "batch": """
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
    """,
    "record": """
        fp8lab record runs/h200 h200-80gb --tokens bf16-50rps-r1 --tokens fp8-100rps-r1
    """,
    "serve": """
        fp8lab serve bf16                          hold a server until Ctrl-C
        fp8lab serve fp8 --profile h100-80gb --port 8000
        fp8lab serve fp8 --print-command           show the vLLM command instead
    """,
    "load-test": """
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
    """,
    "anatomy": """
        fp8lab anatomy                                    bf16 and fp8, 64 to 1,024 decoding at once, on this GPU
        fp8lab anatomy --variant fp8 --batch 256          one step
        fp8lab anatomy --profile tiny-cpu --batch 16      no GPU: what the EngineCore does
    """,
    "quantize": """
        fp8lab quantize /path/to/a/model --recipe int8                a checkpoint of your own, into /path/to/a/model-int8
        fp8lab quantize llama-3-8b --recipe int4 --out /data/int4     random weights of true shapes: for speed
        fp8lab quantize smollm2-135m-instruct --recipe fp8-channel    the trained model that the environment brings
    """,
    "fit": """
        fp8lab fit llama-3-70b                                        on H100s, in BF16, FP8, INT8 and INT4
        fp8lab fit /path/to/a/model --card h200-80gb --tokens 2000    a checkpoint of your own, longer requests
    """,
    "fit-model": """
        fp8lab fit-model h100-80gb-unsealed                           every variant of a recorded run, into data/fits/
        fp8lab fit-model runs/latest --variant fp8-unsealed --out mine.toml
    """,
    "predict": """
        fp8lab predict h100-80gb-unsealed --rate 50 --rate 100        both variants of the fit, on requests like ShareGPT's
        fp8lab predict h100-80gb-unsealed --variant fp8-unsealed --trace azure-conv --rate 20 --slo ttft=500,tpot=50
        fp8lab predict h100-80gb-unsealed --trace random --input-tokens 2048 --output-tokens 512 --requests 300
        fp8lab predict h100-80gb-unsealed --card h200-80gb            on another card, by the datasheets alone
        fp8lab predict h100-80gb-unsealed --against h100-80gb-azure-conv    beside what was measured
    """,
    "claims": """
        fp8lab claims runs/latest
        fp8lab claims runs/latest --brief --markdown     for a README
        fp8lab claims runs/latest h100-80gb h200-80gb    beside the recorded runs
    """,
    "profiles": """
        fp8lab profiles                            all profiles
        fp8lab profiles emulated-h100              one: its variants and levels
    """,
    "status": "fp8lab status",
    "stop": "fp8lab stop                                end servers whose owner is gone\nfp8lab stop --all                          also those that are in use",
}


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    if arguments is None:
        status.settle()
    try:
        try:
            return _run(arguments)
        finally:
            sys.stdout.flush()
    except OSError as error:
        if isinstance(error, BrokenPipeError) and status.reader_gone():
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
        os.environ |= with_library(with_home(os.environ))
        if args.command == "load_test":
            return load_test_command.run(args)
        from . import commands  # only now: help and arguments that cannot be read are answered at once

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


def _parser() -> argparse.ArgumentParser:
    parser = _with_examples(argparse.ArgumentParser, "", prog="fp8lab", description=(
        "What does FP8 really buy when vLLM serves a model on a Hopper GPU? "
        "Runs the published comparison, and the fair one, and judges the claims."
    ))  # fmt: skip
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def number(default: int | None, text: str) -> dict:
        return {"type": int, "default": default, "metavar": "N", "help": text}

    def repeated(metavar: str, text: str) -> dict:
        return {"action": "append", "metavar": metavar, "help": f"{text}; repeatable"}

    # What several commands take.
    run = {"metavar": "RUN", "help": "a run folder, or the name of one in data/recorded"}
    shared = {
        "RUN": run, "--workers": number(None, "client processes (default: by rate and cores)"),
        "--profile": {"default": "auto", "metavar": "P", "help": "a name (see `fp8lab profiles`), a .toml file, or auto (default)"},
        "--run": {"default": "", "metavar": "DIR", "help": "run folder, resumed if it exists (default: a new one in runs/)"},
        "--source": {"default": "", "metavar": "DIR", "help": "read this run, measure nothing"},
        "--model": {"metavar": "M", "help": "serve this checkpoint (path or hub name) for every variant"},
        "--protocol": repeated("NAME", "a protocol of the profile (default: all)"),
    }  # fmt: skip

    def command(name: str, text: str, *options: str):
        made = _with_examples(subparsers.add_parser, name, name, help=text, description=text)
        made.set_defaults(command=name.replace("-", "_"))
        for option in options:
            made.add_argument(option.lower(), **shared[option])
        return made

    reproduce = command("reproduce", (
        "Run notebooks headless: measure, judge, render. Exit code 3: a level of the run is INVALID, all else is done (0 with "
        "--source, which measures nothing)."
    ), "--profile", "--run", "--source", "--model")  # fmt: skip
    reproduce.add_argument("--notebook", **repeated("N", "front (default), steps, a step's name, or a path"))
    value = {"dest": "parameter", "nargs": 2, "metavar": ("NAME", "VALUE"), "help": "a notebook parameter; repeatable"}
    reproduce.add_argument("-p", action="append", default=[], **value)
    said = "random weights of the true shapes, or the profile's checkpoints"
    reproduce.add_argument("--weights", choices=("random", "checkpoint"), help=said)

    measure = command("measure", (
        "Measure a profile's levels without a notebook. Exit code 3: a level of the run is INVALID, all else is measured."
    ), "--profile", "--run", "--protocol", "--workers")  # fmt: skip
    said = "set this level of the run aside and measure it again, without --protocol nothing else"
    measure.add_argument("--again", default=[], **repeated("LEVEL", said))

    quality = command("quality", (
        "Measure what each variant answers: perplexity, KL divergence and agreement with the profile's first variant on "
        "a text, greedy answers beside its own. That one is asked twice, which gives the noise floor. The profile is smollm2-gpu, "
        "without a GPU smollm2-cpu, unless another is named."
    ), "--profile", "--run", "--source", "--model")  # fmt: skip
    quality.add_argument("--variant", **repeated("V", "default: one for each choice of number formats"))
    said = "a package's, or the profile's checkpoints"
    quality.add_argument("--weights", choices=("packaged", "checkpoint"), help=said)
    quality.add_argument("--text", default="", metavar="FILE", help="plain UTF-8 (default: Newton's Opticks, Book I)")
    quality.add_argument("--document-tokens", **number(1024, "length of a document (1024)"))
    quality.add_argument("--documents", **number(0, "how many at most (default: the whole text)"))
    quality.add_argument("--top", **number(20, "likeliest tokens kept at each position (20)"))
    quality.add_argument("--prompts", **number(64, "passages to be explained (64)"))
    quality.add_argument("--answer-tokens", **number(256, "longest answer (256)"))
    quality.add_argument("--in-flight", **number(64, "requests at once (64)"))

    anatomy = command("anatomy", (
        "Take decode steps apart: GPU time by kind of kernel beside the datasheet's floor, wall time, what the host adds, and "
        "what the EngineCore does. One server a variant; without a GPU the host's half alone."
    ), "--profile", "--run", "--source")  # fmt: skip
    anatomy.add_argument("--variant", **repeated("V", "default: bf16 and fp8"))
    anatomy.add_argument("--batch", type=int, **repeated("N", "requests decoding at once (64, 128, 256, 1024)"))

    quantize = command("quantize", (
        "Write a checkpoint in another number format, each weight rounded to the nearest value that it has. What is written is "
        "told beforehand, and refused without room for it; an interrupted call goes on where it stopped."
    ))  # fmt: skip
    quantize.add_argument("model", metavar="MODEL", help="a folder of safetensors in BF16, or a model of data/models")
    quantize.add_argument("--recipe", required=True, choices=RECIPES, metavar="R", help=f"one of {', '.join(RECIPES)}")
    quantize.add_argument(
        "--out", default="", metavar="DIR", help="folder to be made (default: MODEL-R, of a name in the cache)"
    )

    text = "Show which levels a profile measures and about how long they take."
    plan = command("plan", text, "--profile", "--protocol")
    plan.add_argument("--run", default="", metavar="DIR", help="count only what this run does not hold yet")

    fits = command("fit", (
        "Say which number formats of a model fit on how many cards, and for how many requests they leave room: by arithmetic, "
        "before anything is started."
    ))  # fmt: skip
    fits.add_argument("model", metavar="MODEL", help="a model of data/models, or a checkpoint's folder")
    fits.add_argument("--card", default="h100-80gb", metavar="P", help="a profile that holds the card (h100-80gb)")
    fits.add_argument("--tokens", type=int, default=400, metavar="N", help="of a request, in and out (400)")

    models = command("fit-model", (
        "Fit a step model to each variant of a run: a few numbers that say how long a step takes. Levels that data/fits/held_out.toml "
        "names are kept from the fit, and judge it."
    ), "RUN")  # fmt: skip
    models.add_argument("--variant", **repeated("V", "which variant (default: all that were measured)"))
    models.add_argument("--out", default="", metavar="FILE", help="the .toml to write (default: data/fits/RUN.toml)")

    foretold = command("predict", (
        "Say what a server would do under a load that nobody measured: vLLM's scheduling played in virtual time, with steps that "
        "take what a fit says. PREDICTED, in seconds, on any machine."
    ))  # fmt: skip
    foretold.add_argument("fit", metavar="FIT", help="a fit of data/fits, or a .toml that fit-model made")
    said = "which variant (default: all of the fit); V=NAME gives it the name that it has in a run, for --against"
    foretold.add_argument("--variant", **repeated("V", said))
    foretold.add_argument(
        "--rate",
        type=float,
        action="append",
        default=[],
        metavar="R",
        help="requests/s; repeatable (default: all at once)",
    )
    foretold.add_argument("--requests", type=int, default=2000, metavar="N", help="how many (2000)")
    foretold.add_argument(
        "--trace", default="sharegpt-like", metavar="T", help="whose lengths, as in load-test (sharegpt-like)"
    )
    foretold.add_argument("--input-tokens", type=int, default=1024, metavar="N", help="with --trace random (1024)")
    foretold.add_argument("--output-tokens", type=int, default=128, metavar="N", help="with --trace random (128)")
    foretold.add_argument(
        "--max-context", type=int, metavar="N", help="leave out requests of a file with more tokens in and out together"
    )
    foretold.add_argument("--tokenizer", metavar="T", help="folder or hub name, to count the tokens of conversations")
    foretold.add_argument("--seed", type=int, default=0, metavar="S", help="of lengths and arrivals (0)")
    said = (
        "whose scheduling: its equal here (virtual), or the installed vLLM's own, in some seconds a thousand requests"
    )
    foretold.add_argument("--scheduler", choices=("virtual", "vllm"), default="virtual", help=said)
    foretold.add_argument(
        "--slo", default="", metavar="LIMITS", help="ttft=200,tpot=50: also the highest rate that meets it"
    )
    foretold.add_argument(
        "--card", default="", metavar="P", help="on the card of this profile instead, by the datasheets"
    )
    foretold.add_argument(
        "--against", default="", metavar="RUN", help="every level of a run beside what is foretold of it; nothing else"
    )

    share = command("share", "Make one page and one archive of a run, to be sent to someone.", "RUN")
    share.add_argument("--out", default="shared", metavar="DIR", help="folder that takes them (default: shared/)")
    said = "as in reproduce (default: front, or 07_quality for a run without levels)"
    share.add_argument("--notebook", **repeated("N", said))
    share.add_argument("--tokens", action="store_true", help="keep every token's timestamp in the archive")

    batch = command("batch", (
        "Run a matrix of profiles and workloads through papermill, one after the other on each GPU. The queue survives "
        "a crash: run it again. index.html and comparison.html show all runs. Exit code 1: a run failed, 3: none failed but a "
        "level is INVALID."
    ))  # fmt: skip
    batch.add_argument("matrix", metavar="MATRIX.toml", help="what to run (see below)")
    batch.add_argument("--out", default="", metavar="DIR", help="batch folder (default: runs/batch-<matrix's name>)")
    said = "run on the hosts of this Ray cluster (auto: the one of this machine), each job where its cards are"
    batch.add_argument("--ray", default="", metavar="ADDRESS", help=said)

    text = "Keep a run in data/recorded, trimmed: no logs, few token timestamps."
    record = command("record", text, "RUN")
    record.add_argument("name", metavar="NAME", help="what it is to be called; an earlier one of that name is replaced")
    record.add_argument("--tokens", **repeated("LEVEL", "keep this level's token timestamps"))

    serve = command("serve", "Hold one server in this terminal until Ctrl-C.", "--profile")
    serve.add_argument("variant", metavar="VARIANT", help="bf16, fp8, fp8-weights, fp8-kv, or another of the profile's")
    serve.add_argument("--port", **number(None, "port on 127.0.0.1 (default: a free one)"))
    serve.add_argument("--print-command", action="store_true", help="print the vLLM command and exit")
    serve.add_argument("--show-key", action="store_true", help="print the API key of this start")

    load_test_command.add_arguments(command("load-test", load_test_command.TEXT))

    claims = command("claims", "Judge the published claims by a run, or by several side by side.")
    claims.add_argument("run", nargs="+", **run)
    claims.add_argument("--brief", action="store_true", help="without reasons and levels")
    claims.add_argument("--markdown", action="store_true", help="as a Markdown table")

    profiles = command("profiles", "Show the profiles, or one of them.")
    profiles.add_argument("name", nargs="?", metavar="P")

    command("status", "Show servers that are running or left over.")
    stop = command("stop", "End servers that are left over.")
    stop.add_argument("--all", action="store_true", help="also end servers whose owner still runs")
    return parser


def _with_examples(make, name: str, *positional, **options):
    examples = "examples:\n" + textwrap.indent(textwrap.dedent(EXAMPLES[name]).strip(), "  ")
    return make(*positional, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter, **options)


if __name__ == "__main__":
    sys.exit(main())
