"""The command line. Results go to standard output, progress to standard error.

Exit codes: 0 done, 1 the work failed, 2 the arguments cannot work, 130 interrupted.
"""

import argparse
import math
import signal
import sys
import textwrap
import time

from .errors import BadInput, Fp8labError

EXAMPLES = {
    "": """
        fp8lab reproduce                          the whole story on this machine, front notebook and verdicts
        fp8lab reproduce --notebook steps         the same, step by step, four notebooks
        fp8lab serve fp8 --print-command          the exact vLLM command of a variant
        fp8lab claims runs/latest                 the verdicts of a run
        fp8lab status; fp8lab stop                what is left over, and its end
    """,
    "reproduce": """
        fp8lab reproduce                                       front notebook, profile picked by the machine
        fp8lab reproduce --profile emulated-h100               without a GPU
        fp8lab reproduce --run runs/mine                       into this folder; again: goes on where it stopped
        fp8lab reproduce --source runs/latest                  redraw everything from a run, measure nothing
        fp8lab reproduce --notebook 02_bf16_baseline -p rate 25
    """,
    "serve": """
        fp8lab serve bf16                          hold a server until Ctrl-C
        fp8lab serve fp8 --profile h100-80gb --port 8000
        fp8lab serve fp8 --print-command           show the vLLM command instead
    """,
    "claims": """
        fp8lab claims runs/latest
        fp8lab claims runs/latest --markdown       for a README
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
    args = _parser().parse_args(arguments)
    # A closed terminal or a polite kill ends a command as Ctrl-C does: servers are stopped on the way out.
    for signum in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signum) is not signal.SIG_IGN:  # nohup
            signal.signal(signum, signal.default_int_handler)
    try:
        return args.command(args) or 0
    except BadInput as error:
        print(f"fp8lab: {error}", file=sys.stderr)
        return 2
    except Fp8labError as error:
        print(f"fp8lab: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nfp8lab: interrupted", file=sys.stderr)
        return 130


def _reproduce(args) -> None:
    from .notebooks import check_parameters, execute, find
    from .paths import RUNS, repository_relative
    from .profiles import load_profile
    from .report.claims import claims_table
    from .runs import open_run

    notebooks = [path for name in args.notebook or ["front"] for path in find(name)]
    chosen = {name: _value(text) for name, text in args.parameter}
    for notebook in notebooks:
        check_parameters(notebook, chosen)
    profile = args.profile
    if args.weights or args.model:
        profile = load_profile(args.profile, weights=args.weights, model=args.model)
    run = open_run(args.run, profile, source=args.source)
    rendered = RUNS / f"redrawn-{run.path.resolve().name}" if run.read_only else run.path / "rendered"
    where = {"source" if run.read_only else "run_dir": str(run.path.resolve())}
    for notebook in notebooks:
        try:
            page = execute(notebook, rendered / notebook.name, where | chosen)
        except (KeyboardInterrupt, Fp8labError):
            if not run.read_only:
                again = f"fp8lab reproduce --run {repository_relative(run.path)}"
                print(f"\nnothing measured is lost; to go on where this stopped: {again}", file=sys.stderr)
            raise
        print(repository_relative(page))
    print(claims_table(run))


def _serve(args) -> None:
    from .profiles import load_profile, read_profile
    from .server.launch import printable_command, start_server

    if args.print_command:
        from .gpu import gpu_names

        # A command can be shown for a card that is not here.
        needs_choice = args.profile == "auto" and not gpu_names()
        print(
            printable_command(
                read_profile("h100-80gb" if needs_choice else args.profile), args.variant, args.port or 8000
            )
        )
        return
    with start_server(load_profile(args.profile), args.variant, port=args.port) as server:
        print(server)
        print(f"\nmodel name  {server.model}\nlog         {server.log_path}")
        print("API key     in the environment variable VLLM_API_KEY of the server's processes; --show-key prints it")
        if args.show_key:
            print(f"            {server.api_key}")
        print("Ctrl-C stops the server.", flush=True)
        while server.alive:
            time.sleep(0.5)
        raise Fp8labError(f"the server ended by itself; see {server.log_path}")


def _claims(args) -> None:
    from .report.claims import claims_table
    from .runs import open_run

    table = claims_table(open_run(source=args.run))
    print(table.to_markdown() if args.markdown else table)


def _profiles(args) -> None:
    from .profiles import profile_names, read_profile

    if not args.name:
        for name in profile_names():
            print(f"{name:<16}{read_profile(name).title}")
        return
    profile = read_profile(args.name)
    print(f"{profile.name}: {profile.title}\n\nvariants")
    for variant, flags in profile.variants.items():
        print(f"  {variant:<12}{' '.join(flags)}")
    print(f"\nshared flags\n  {' '.join(profile.server.flags)}")
    for protocol, levels in profile.protocols.items():
        print(f"\nprotocol {protocol!r}")
        for level in levels:
            rate = "all at once" if math.isinf(level.rate) else f"{level.rate:g} req/s"
            print(f"  {level.variant:<12}{rate:<14}{level.requests} requests, repeat {level.repeat}")


def _status(_args) -> None:
    from . import gpu
    from .server import leftovers

    found = leftovers.servers()
    if not found:
        print("no server of fp8lab is running")
    for server in found:
        owner = (
            f"in use by pid {server.owner_pid}" if server.owned else f"LEFT OVER: its owner {server.owner_pid} is gone"
        )
        minutes = (time.time() - server.started) / 60
        print(
            f"{server.variant} ({server.profile}), port {server.port}, {minutes:.0f} min, {server.memory_gib:.1f} GiB, "
            f"{owner}; pids {', '.join(map(str, server.pids))}"
        )
    used = gpu.memory_used_gib()
    if used is not None:
        print(f"GPU memory in use: {used:.1f} GiB")


def _stop(args) -> None:
    from .server import leftovers

    found = [server for server in leftovers.servers() if args.all or not server.owned]
    for server in found:
        leftovers.stop(server)
        print(f"ended {server.variant} ({server.profile}), {len(server.pids)} processes")
    if not found:
        print("nothing to end" if args.all else "nothing is left over (servers in use are kept; --all ends them too)")


def _parser() -> argparse.ArgumentParser:
    parser = _with_examples(argparse.ArgumentParser, "", prog="fp8lab", description=(
        "What does FP8 really buy when vLLM serves a model on a Hopper GPU? "
        "Runs the published comparison, and the fair one, and judges the claims."
    ))  # fmt: skip
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, function, text: str):
        made = _with_examples(commands.add_parser, name, name, help=text, description=text)
        made.set_defaults(command=function)
        return made

    profile = {
        "default": "auto",
        "metavar": "P",
        "help": "a name (see `fp8lab profiles`), a .toml file, or auto (default)",
    }

    reproduce = command("reproduce", _reproduce, "Run notebooks headless: measure, judge, render.")
    reproduce.add_argument("--profile", **profile)
    reproduce.add_argument(
        "--run", default="", metavar="DIR", help="run folder; an existing one is resumed (default: a new one in runs/)"
    )
    reproduce.add_argument("--source", default="", metavar="DIR", help="read this run instead of measuring")
    reproduce.add_argument(
        "--notebook", action="append", metavar="N", help="front (default), steps, a step's name, or a path; repeatable"
    )
    reproduce.add_argument(
        "-p",
        dest="parameter",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="a notebook parameter; repeatable",
    )
    reproduce.add_argument(
        "--weights",
        choices=("random", "checkpoint"),
        help="random weights of the true shapes, or the profile's checkpoints",
    )
    reproduce.add_argument("--model", metavar="M", help="serve this checkpoint (path or hub name) for every variant")

    serve = command("serve", _serve, "Hold one server in this terminal until Ctrl-C.")
    serve.add_argument("variant", metavar="VARIANT", help="bf16, fp8, fp8-weights, fp8-kv, or another of the profile's")
    serve.add_argument("--profile", **profile)
    serve.add_argument("--port", type=int, metavar="N", help="port on 127.0.0.1 (default: a free one)")
    serve.add_argument("--print-command", action="store_true", help="print the vLLM command and exit")
    serve.add_argument("--show-key", action="store_true", help="print the API key of this start")

    claims = command("claims", _claims, "Judge the published claims by a run.")
    claims.add_argument("run", metavar="RUN", help="a run folder, or the name of one in data/recorded")
    claims.add_argument("--markdown", action="store_true", help="as a Markdown table")

    profiles = command("profiles", _profiles, "Show the profiles, or one of them.")
    profiles.add_argument("name", nargs="?", metavar="P")

    command("status", _status, "Show servers that are running or left over.")
    stop = command("stop", _stop, "End servers that are left over.")
    stop.add_argument("--all", action="store_true", help="also end servers whose owner still runs")
    return parser


def _with_examples(make, name: str, *positional, **options):
    examples = "examples:\n" + textwrap.indent(textwrap.dedent(EXAMPLES[name]).strip(), "  ")
    return make(*positional, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter, **options)


def _value(text: str):
    """A parameter's value as TOML reads it (numbers, true, lists), else as text."""
    import tomllib

    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


if __name__ == "__main__":
    sys.exit(main())
