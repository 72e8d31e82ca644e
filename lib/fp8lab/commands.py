"""What each command of the command line does: a function each, of the parsed arguments, that returns an exit code or None.

`cli.py` says what they are called and take, and imports this module when one of them is run: `--help` answers at once.
What a command needs beyond profiles and paths is imported when it is used; the library's public names (`lab`) are so anyhow.
"""

import contextlib
import dataclasses
import math
import re
import sys
import time
import tomllib
from functools import partial
from pathlib import Path

import fp8lab as lab

from .config.dimensions import ModelShape, model_names, model_shape, recipe
from .config.profile import Profile, dimensions_at, rate_name
from .config.profile_file import profile_names, read_profile
from .config.this_machine import load_profile, profile_name
from .config.trace import is_file, named_trace
from .errors import INVALID, BadInput, Fp8labError
from .paths import RUNS, cache_dir, in_command, made, repository_relative, write_text
from .system import gpu
from .ui import StatusLine


def reproduce(args) -> int:
    from .hosts import end_with_owner
    from .report.notebooks import check_parameters, declared, execute, find

    end_with_owner()
    recorded = lab.open_run(source=args.source) if args.source else None
    default = _default_notebook(recorded) if recorded else "front"
    notebooks = [path for name in args.notebook or [default] for path in find(name)]
    chosen = {name: _value(text) for name, text in args.parameter}
    for notebook in notebooks:
        check_parameters(notebook, chosen)
    # What measures nothing and reads no run of its own needs none.
    for notebook in (alone := [one for one in notebooks if "run_dir" not in declared(one)]):
        if args.run or args.source or args.model or args.weights:
            raise BadInput(
                f"{notebook.name} is of no run, server or model: leave --run, --source, --model and --weights out"
            )
        # Pages of other parameters stay.
        told = re.sub(r"[^\w.,=-]+", "_", "".join(f",{name}={value}" for name, value in chosen.items()))
        page = RUNS / "pages" / f"{notebook.stem}{told[:200]}.ipynb"
        print(repository_relative(execute(notebook, page, chosen)))
    if not (notebooks := [one for one in notebooks if one not in alone]):
        return 0
    profile = args.profile
    if args.weights or args.model:
        profile = load_profile(args.profile, weights=args.weights, model=args.model)
    run = recorded or lab.open_run(args.run, profile)
    rendered = RUNS / f"redrawn-{run.path.resolve().name}" if run.read_only else run.path / "rendered"
    where = {"source" if run.read_only else "run_dir": repository_relative(run.path)}
    for notebook in notebooks:
        with _resumable(run):
            page = execute(notebook, rendered / notebook.name, where | chosen)
        print(repository_relative(page))
    print(lab.claims_table(run, brief=True))
    if not run.valid:
        print(f"\n{lab.validity_table(run)}\n")
    print(f"reasons: fp8lab claims {in_command(run.path)}")
    return 0 if run.valid or run.read_only else INVALID


def measure(args) -> int:
    if args.workers is not None and args.workers < 1:
        raise BadInput(f"--workers {args.workers} is below 1")
    variants = args.variant or ()

    def check(profile: Profile) -> None:
        if args.again:
            raise BadInput(
                f"--again {args.again[0]}: {args.run or 'a new run'} holds no level; name one that does (--run)"
            )
        lab.plan_table(profile, args.protocol or list(profile.protocols), variants=variants)

    run = lab.open_run(args.run, args.profile, check=check)
    # What is to be measured again is all that is, unless protocols are named beside it.
    protocols = args.protocol or ([] if args.again else list(run.profile.protocols))
    with _resumable(run):
        lab.measure(run, run.profile, protocols, variants=variants, workers=args.workers, again=args.again)
    print(f"{lab.levels_table(run)}\n\n{lab.validity_table(run)}\n")
    print(repository_relative(run.path))
    return 0 if run.valid else INVALID


def quality(args) -> None:
    if args.source:
        print(lab.quality_table(lab.open_run(source=args.source)))
        return
    task = lab.QualityTask(**{one.name: getattr(args, one.name) for one in dataclasses.fields(lab.QualityTask)})
    profile = load_profile(lab.quality_profile(args.profile), weights=args.weights, model=args.model)
    lab.check_weights(profile)
    task.read()
    for variant in args.variant or profile.variants:
        profile.check_quantization(variant)
    run = lab.open_run(args.run, profile)
    with _resumable(run):
        lab.measure_quality(run, profile, args.variant or (), task=task)
    print(lab.quality_table(run))
    print(repository_relative(run.path))


def anatomy(args) -> None:
    from .experiment.anatomy import BATCHES, check_asked

    variants, batches = args.variant or ("bf16", "fp8"), args.batch or BATCHES
    check = partial(check_asked, variants=variants, batches=batches)
    run = lab.open_run(args.run, args.profile, source=args.source, check=check)
    with _resumable(run):
        held = lab.measure_anatomy(run, run.profile, variants, batches=batches)
    shown = args.variant or held or ("any variant",)
    if lacking := [v for v in shown if v not in held]:
        raise BadInput(f"run {run.path.name} holds no steps of {', '.join(lacking)}; `fp8lab anatomy` takes some apart")
    profiled = [v for v in held if v in shown and any(one.steps for one in held[v])]
    tables = [lab.steps_table(run)]
    if not args.brief:
        tables += [*(lab.kernels_table(run, one) for one in profiled), lab.host_table(run)]
    for table in tables:
        print(f"{table}\n")
    print(repository_relative(run.path))


def quantize(args) -> None:
    from .models import quantize as making

    if args.text and "-by-" not in args.recipe:
        raise BadInput(f"--text {args.text}: recipe {args.recipe} is not calibrated and reads no text; leave it out")
    source, drawn = making.source_of(args.model)
    beside = source.resolve() if Path(args.model) == source else cache_dir() / "models" / args.model
    target = Path(args.out or beside.with_name(f"{beside.name}-{args.recipe}"))
    size, says = making.checkpoint_bytes(source, args.recipe, drawn=drawn), recipe(args.recipe).says
    weights = "random weights" if drawn else "the weights"
    StatusLine().done(f"{weights} of {args.model}: {says}; {size / 2**30:.2f} GiB in {target}")
    text = Path(args.text) if args.text else making.TEXT
    print(repository_relative(making.quantize(source, args.recipe, target, drawn=drawn, text=text)))


def fit(args) -> None:
    from .report.machine import fit_table

    profile = read_profile(args.card)
    if (card := profile.gpu) is None:
        raise BadInput(f"profile {args.card} has no [gpu]: name one of a card, such as h100-80gb")
    folder = Path(args.model)
    known = dimensions_at(folder)
    shape = ModelShape(known) if known else model_shape(args.model)
    if shape is None:
        raise BadInput(
            f"no sizes are known of {args.model!r}: expected the folder of a Llama-like checkpoint, or one of {model_names()}"
        )
    print(fit_table(folder.resolve().name, shape, card, tokens=args.tokens, flags=profile.server.flags))


def fit_model(args) -> int:
    from .experiment.step_fit import fit
    from .metrics.step_model import FITS, read_fits
    from .report.predicted import errors_of

    path = Path(args.run).resolve()
    run = lab.open_run(source=path if path.is_dir() else args.run)
    measured = list(dict.fromkeys(s.level.variant for s in run.summaries().values()))
    if not measured:
        raise BadInput(f"run {run.path.name} holds no level to fit; name a run of `fp8lab measure` or `reproduce`")
    if unknown := [one for one in args.variant or () if one not in measured]:
        raise BadInput(f"run {run.path.name} holds no variant {', '.join(unknown)} (it holds: {', '.join(measured)})")
    target = Path(args.out or FITS / f"{run.path.name}.toml")
    if args.out.endswith("/") or target.is_dir():
        raise BadInput(f"--out {args.out} is a folder; name a file in it, such as {target / 'mine.toml'}")
    target = target if target.suffix == ".toml" else target.with_name(f"{target.name}.toml")
    fresh = [folder for folder in target.absolute().parents if not folder.exists()]
    made(target.parent, "choose another --out file")
    for folder in fresh:  # there may be nothing to write
        folder.rmdir()
    # What other variants it holds is kept.
    try:
        earlier = read_fits(str(target)) if target.exists() else {}
    except BadInput:
        raise BadInput(f"{target} is there and is no fit of step models; choose another --out, or remove it") from None
    models, wrong = {}, []
    for variant in args.variant or measured:
        try:
            models[variant] = fit(run, variant)
        except BadInput as error:
            wrong.append(error)
            print(f"fp8lab: {error}", file=sys.stderr)
    if not models:
        raise BadInput(f"run {run.path.name}: no variant can be fitted ({len(wrong)} tried)")
    head = f"# Step models of run {run.path.name}, made by `fp8lab fit-model`; `fp8lab.metrics.step_model` says what each number is.\n\n"
    made(target.parent, "choose another --out file")
    write_text(target, head + "\n".join(model.as_toml(variant) for variant, model in (earlier | models).items()))
    for variant, model in models.items():
        print(f"{variant}: {errors_of(model)}")
    print(repository_relative(target))
    return 0 if not (wrong and args.variant) else 2


def predict(args) -> None:
    from .experiment.predict import most_taken
    from .load_test_command import lengths

    models = lab.step_models(args.fit, args.variant, card=args.card)
    if args.api_us is not None:
        models = {variant: model.behind(args.api_us) for variant, model in models.items()}
    options = ("rate", "requests", "slo", "seed", "input_tokens", "output_tokens", "max_context", "tokenizer")
    loads = {f"--{name.replace('_', '-')}": getattr(args, name) for name in options}
    loads |= {"--trace": args.trace != "sharegpt-like", "--scheduler vllm": args.scheduler == "vllm"}
    if args.slo and args.api_us is not None:
        raise BadInput("--slo asks for latencies, of which a full API server (--api-us) says little: leave out one")
    if args.against and (idle := [name for name, given in loads.items() if given]):
        raise BadInput(f"--against RUN takes the load of each level of the run: leave out {', '.join(idle)}")
    if args.slo and args.scheduler == "vllm":
        raise BadInput(
            "--slo searches with some hundred thousand requests, too many for vLLM's own scheduler: leave out one"
        )
    if args.against:
        print(lab.foretold_table(lab.open_run(source=args.against), models))
        return
    slo, given = lab.SLO.parse(args.slo) if args.slo else None, lengths(args)
    requests = 2000 if args.requests is None and not is_file(args.trace) else args.requests
    trace = named_trace(
        args.trace, requests, seed=args.seed, times="dropped" if args.rate else "kept",
        **given | {"max_context": most_taken(models, args.max_context)},
    )  # fmt: skip
    status, levels = StatusLine(), []
    for variant, model in models.items():
        for rate in args.rate or [None if trace.arrival_s else math.inf]:
            status.update(f"{variant}: level {len(levels) + 1}")
            levels.append(lab.predict(variant, model, trace, rate, seed=args.seed, scheduler=args.scheduler))
    status.done(f"levels played: {len(levels)}")
    print(lab.predicted_table(levels, models))
    draw = lab.drawing(args.trace, seed=args.seed, models=models, **given)
    for variant, model in models.items() if slo else ():
        status.update(f"{variant}: the highest rate that meets {slo}")
        limit = lab.highest_rate(variant, model, draw, slo, seed=args.seed)
        status.done(f"{variant}: searched")
        unit = " req/s" * (limit not in ((0, math.inf), (0, 0)))
        print(f"PREDICTED, {variant}: the highest rate that meets {slo}: {limit}{unit}")


def plan(args) -> None:
    run = lab.open_run(source=args.run) if args.run else None
    profile = run.profile if run and args.profile == "auto" else read_profile(profile_name(args.profile))
    print(lab.plan_table(profile, args.protocol or list(profile.protocols), run, args.variant or ()))


def _default_notebook(run: "lab.Run") -> str:
    """What shows a run: the notebook of whose protocols it holds a level. Of other loads of the published variants that is the
    fair comparison, of other variants what unseals a card."""
    from .report.notebooks import declared, find

    held = run.summaries()
    if not held:
        return "07_quality" if run.read_parts("quality") else "front"
    for name in ("front", "08_unseal", "09_recipes", "10_more_cards"):
        asked = declared(*find(name))
        protocols = [*asked["protocols"], *asked.get("half_protocols", ())]
        if any(level.id in held for one in protocols for level in run.profile.protocols.get(one, ())):
            return name
    return "05_fair_comparison" if {"bf16", "fp8"} & {s.level.variant for s in held.values()} else "08_unseal"


def share(args) -> None:
    from .report.notebooks import find
    from .report.notebooks import share as shared

    run = lab.open_run(source=args.run)
    notebooks = [path for name in args.notebook or [_default_notebook(run)] for path in find(name)]
    pages, archive = shared(run, Path(args.out), notebooks=notebooks, tokens=args.tokens)
    for path in (*pages, archive):
        print(f"{repository_relative(path)}  {path.stat().st_size / 1e6:.1f} MB")


def batch(args) -> int:
    from .batch import load_matrix, run_batch

    return run_batch(load_matrix(Path(args.matrix)), Path(args.out) if args.out else None, ray=args.ray)


def record(args) -> None:
    from .results.run_folder import record as recorded

    print(repository_relative(recorded(lab.open_run(source=args.run), args.name, args.tokens or ())))


def claims(args) -> None:
    runs = [lab.open_run(source=run) for run in args.run]
    table = lab.claims_table(*runs, brief=args.brief) if len(runs) == 1 else lab.claims_across(*runs)
    print(table.to_markdown() if args.markdown else table)


def serve(args) -> None:
    from .server.command import printable_command
    from .server.launch import start_server

    if args.print_command:
        # A command can be shown for a card that is not here.
        name = "h100-80gb" if args.profile == "auto" and not gpu.gpu_names() else profile_name(args.profile)
        print(printable_command(read_profile(name), args.variant, args.port or 8000))
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


def profiles(args) -> None:
    if not args.name:
        names = profile_names()
        wide = max(map(len, names)) + 2
        for name in names:
            print(f"{name:<{wide}}{read_profile(name).title}")
        return
    profile = read_profile(profile_name(args.name))
    wide = max(map(len, profile.variants)) + 2
    print(f"{profile.name}: {profile.title}\n\nvariants")
    for name, one in profile.variants.items():
        variables = " ".join(f"{key}={value}" for key, value in one.env.items())
        print(f"  {name:<{wide}}{' '.join(filter(None, (variables, *one.flags)))}")
    print(f"\nshared flags\n  {' '.join(profile.server.flags)}")
    for protocol, levels in profile.protocols.items():
        print(f"\nprotocol {protocol!r}")
        for level in levels:
            at = rate_name(level.rate)
            print(f"  {level.variant:<{wide}}{at:<14}{level.requests} requests, repeat {level.repeat}")


def status(_args) -> None:
    from .server import processes

    found = processes.servers()
    if not found:
        print("no server of fp8lab is running")
    for server in found:
        owner, watchdog = f"in use by pid {server.owner_pid}", ", its watchdog is gone"
        if not server.owned:
            owner, watchdog = f"LEFT OVER: its owner {server.owner_pid} is gone", ", its watchdog too"
        owner += "" if server.watched else watchdog
        held = f"{(time.time() - server.started) / 60:.0f} min, {server.memory_gib:.1f} GiB"
        pids = ", ".join(map(str, server.pids))
        print(f"{server.variant} ({server.profile}), port {server.port}, {held}, {owner}; pids {pids}")
    if (used := gpu.memory_used_gib()) is not None:
        print(f"GPU memory in use: {used:.1f} GiB")


def stop(args) -> None:
    from .server import processes

    found = [server for server in processes.servers() if args.all or not server.owned]
    for server in found:
        processes.stop(server)
        print(f"ended {server.variant} ({server.profile}), {len(server.pids)} processes")
    if not found:
        print("nothing to end" if args.all else "nothing is left over (servers in use are kept; --all ends them too)")


@contextlib.contextmanager
def _resumable(run: "lab.Run"):
    """Says how to go on with `run` when what is done with it ends early."""
    try:
        yield
    except (KeyboardInterrupt, Fp8labError):
        if not run.read_only:
            how = f"the same command with --run {in_command(run.path)}"
            print(f"\nnothing measured is lost; to go on where this stopped: {how}", file=sys.stderr)
        raise


def _value(text: str):
    """A parameter's value as TOML reads it (numbers, true, lists), else as text."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
