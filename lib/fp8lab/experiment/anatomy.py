"""Takes a step apart: a server holds a batch, its steps are counted, its kernels profiled, its EngineCore sampled.

In the run folder anatomy/<variant>.json holds the server and, for every batch, the fields of `BatchAnatomy`.
"""

import contextlib
import dataclasses
import datetime
import gzip
import http.client
import json
import math
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import psutil

from ..config.dimensions import cards, fp8_kv, most_running, replicas, weight_format
from ..config.profile import RUST, Level, Profile, names_of
from ..errors import BadInput, LevelFailed
from ..load.telemetry import parse_metrics
from ..metrics.anatomy import Step, Work, by_kind, floors_ms, host_stages, kernel_times, read_steps
from ..results.run_folder import Run, a_run
from ..server import launch
from ..server.command import HOST
from ..server.launch import Server
from ..system.gpu import GpuReader
from ..system.locks import Scratch
from ..ui import StatusLine
from .speed import trace_for

BATCHES = (64, 128, 256, 1024)
_FOLDER = "anatomy"
# Steps that are profiled at a time: a trace of one has about a thousand events.
_PROFILED_STEPS = 12
# Steps are counted for so long before and after they are profiled, and the EngineCore is sampled for at most so long, or
# so many steps: all of it must come before the answers end.
_COUNTED_S, _SAMPLED_S, _SAMPLED_STEPS = 1.5, 5.0, 300
_SAMPLES_PER_S = 200
_ANSWER_TOKENS = 1000
_PATIENCE_S = 300.0


@dataclass(frozen=True)
class StepAnatomy:
    """Steps of one kind ("decode", "prefill", "mixed"), averaged: how many, what a step computed, for how long kernels ran
    (ms), and by kind each kernel's milliseconds."""

    name: str
    steps: int
    work: Work
    busy_ms: float
    kernels: Mapping[str, Mapping[str, float]]

    @property
    def times(self) -> dict[str, float]:
        """Milliseconds a step by kind, in the order of `KINDS`."""
        return {kind: sum(names.values()) for kind, names in self.kernels.items()}

    @property
    def context(self) -> float | None:
        """The mean context in tokens of the requests that decode."""
        return self.work.decode_context / self.work.running if self.work.running else None


@dataclass(frozen=True)
class BatchAnatomy:
    """`batch` requests decoding together. `wall_ms` is a step's time without a profiler, at a mean `context` of so many
    tokens a request; `gpu` NVML's means meanwhile; `host` the EngineCore's stages (`host_stages`), with `host_note` where
    it could not be sampled; `steps` what was profiled, empty without a GPU."""

    batch: int
    wall_ms: float
    context: float | None
    gpu: Mapping[str, float]
    host: Mapping[str, Mapping[str, float]]
    host_note: str
    steps: tuple[StepAnatomy, ...]

    @classmethod
    def read(cls, values: Mapping) -> "BatchAnatomy":
        steps = tuple(
            StepAnatomy(**step | {"work": Work(**step["work"]), "kernels": by_kind(step["kernels"])})
            for step in values["steps"]
        )
        return cls(**{**values, "steps": steps})

    @property
    def decode(self) -> StepAnatomy | None:
        """The profiled decode steps; None without a GPU."""
        return next((step for step in self.steps if step.name == "decode"), None)


def measure_anatomy(
    run: Run, profile: Profile, variants: str | Sequence[str] = ("bf16", "fp8"), *, batches: Sequence[int] = BATCHES
) -> dict[str, list[BatchAnatomy]]:
    """Takes every one of `variants` apart that `run` does not hold with all of `batches`; returns all, by variant.

    One server a variant, with one Python API server: a step is the EngineCore's and the GPU's. On a recorded run this only
    reads. Raises BadInput for a batch that the variant does not let run at once, LevelFailed when a batch does not fit."""
    if a_run(run).read_only:
        return anatomies(run)
    run.check_profile(profile)
    check_asked(profile, variants := names_of(variants), batches)
    held = anatomies(run)
    for variant in variants:
        known = {one.batch for one in held.get(variant, ())}
        if set(batches) <= known:
            StatusLine().done(f"{variant}: already taken apart, read from {run.path.name}")
        else:
            found = [one for one in held.get(variant, ()) if one.batch not in batches]
            _measure(run, profile, variant, batches, found)
    return anatomies(run)


def check_asked(profile: Profile, variants: Sequence[str], batches: Sequence[int]) -> None:
    """Raises BadInput for a variant that cannot be taken apart, and for a batch that is none or that it does not let run at
    once."""
    if (least := min(batches, default=1)) < 1:
        raise BadInput(f"batch {least} is below 1 (requests that decode together)")
    for variant in variants if batches else ():
        profile.check_quantization(variant)
        flags = profile.flags(variant)
        if (copies := replicas(flags)) > 1:
            raise BadInput(f"{variant} serves {copies} copies, each with steps of its own: take apart a variant of one")
        if (most := most_running(flags)) is not None and max(batches) > most:
            raise BadInput(f"batch {max(batches)}: {variant} lets at most {most} requests run (--max-num-seqs)")


def anatomies(run: Run) -> dict[str, list[BatchAnatomy]]:
    """What the run holds, by variant, the smallest batch first."""
    found = {}
    for variant, held in a_run(run).read_parts(_FOLDER).items():
        with run.reading(f"{_FOLDER}/{variant}.json"):
            found[variant] = sorted(map(BatchAnatomy.read, held["batches"]), key=lambda one: one.batch)
    return found


def floors_of(run: Run, variant: str, work: Work, *, moved: bool = True) -> dict[str, float]:
    """By kind the least milliseconds that the profile's card allows a step with `work`, or, not `moved`, its matrix units
    alone; empty without the card's datasheet or the model's sizes."""
    profile, card = run.profile, run.profile.gpu
    shape, flags = profile.shape(variant), profile.flags(variant)
    if card is None or shape is None:
        return {}
    if not moved:
        card = dataclasses.replace(card, hbm_bytes_per_s=math.inf)
    held = {"weights": weight_format(flags, shape), "fp8_kv": fp8_kv(flags, shape)}
    return floors_ms(work, shape, card, **held, shared_by=cards(flags) // replicas(flags))


def _measure(run: Run, profile: Profile, variant: str, batches: Sequence[int], found: list[BatchAnatomy]) -> None:
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    with Scratch() as traces:
        watched = _behind_python(profile, variant)
        watched = _profiled(watched, traces) if profile.device == "cuda" else watched
        log = run.log_path(f"{variant}-anatomy")
        with launch.start_server(watched, variant, log_path=log) as server:
            if server.info.weights_doubt:
                raise LevelFailed(f"{variant}: {server.info.weights_doubt}")
            for batch in sorted(batches):
                found.append(_batch(server, batch, Path(traces)))
                values = {"started": started, "server": dataclasses.asdict(server.info)}
                run.write_part(_FOLDER, variant, values | {"batches": [dataclasses.asdict(one) for one in found]})


def _behind_python(profile: Profile, variant: str) -> Profile:
    """`profile` with vLLM's Python API server for `variant`: the Rust one takes no batch as one request."""
    one = profile.variant(variant)
    env = {key: value for key, value in one.env.items() if key != RUST}
    return dataclasses.replace(
        profile, variants={**profile.variants, variant: dataclasses.replace(one, env=env, api_server="python")}
    )


def _profiled(profile: Profile, folder: str) -> Profile:
    """`profile` with vLLM's torch profiler, which writes to `folder` when it is asked."""
    options = {
        "profiler": "torch", "torch_profiler_dir": folder, "torch_profiler_with_stack": False, "ignore_frontend": True,
        "torch_profiler_dump_cuda_time_total": False, "detailed_trace_annotation": True, "max_iterations": _PROFILED_STEPS,
    }  # fmt: skip
    flags = (*profile.server.flags, "--profiler-config", json.dumps(options))
    return dataclasses.replace(profile, server=dataclasses.replace(profile.server, flags=flags))


def _batch(server: Server, batch: int, traces: Path) -> BatchAnatomy:
    status, dilation, on_gpu = StatusLine(), server.profile.time_dilation, server.profile.device == "cuda"
    what = f"{server.variant}, {batch} at once"
    profiled: list[Step] = []
    if on_gpu:
        _ask(server, "/start_profile")
    with _held(server, batch, status, what):
        if on_gpu:
            # What decodes right after the prompts has shorter contexts than what is counted.
            profiled += [step for step in _stop_profile(server, traces) if step.work.name != "decode"]
        status.update(what, "counting steps")
        counted = [_count_steps(server, batch)]
        if on_gpu:
            status.update(what, "profiling")
            _ask(server, "/start_profile")
            time.sleep(2 * _PROFILED_STEPS * counted[0].seconds / counted[0].steps)
            profiled += [step for step in _stop_profile(server, traces) if step.work.running >= 0.9 * batch]
        # On both sides of the profiled steps, so that these have the mean context of those that were counted.
        counted.append(_count_steps(server, batch))
        wall_s = sum(one.seconds for one in counted) / sum(one.steps for one in counted)
        status.update(what, "sampling the EngineCore")
        host, note = _sample_host(server, min(_SAMPLED_S, _SAMPLED_STEPS * wall_s))
    _wait(server, lambda seen: not seen["running"] and not seen["waiting"], "the batch before did not end")
    status.done(f"{what}: a step takes {1e3 * wall_s / dilation:,.2f} ms")
    rows = [row for one in counted for row in one.gpu]
    gpu = {key: fmean(known) for key in ("gpu_util", "gpu_power_w", "gpu_sm_mhz")
           if (known := [row[key] for row in rows if row.get(key) is not None])}  # fmt: skip
    tokens = server.info.kv_cache_tokens
    context = fmean(one.kv_usage for one in counted) * tokens / batch if tokens else None
    return BatchAnatomy(batch, 1e3 * wall_s / dilation, context, gpu, host, note, _averaged(profiled))


def _averaged(steps: Sequence[Step]) -> tuple[StepAnatomy, ...]:
    kinds: dict[str, list[Step]] = {}
    for step in steps:
        kinds.setdefault(step.work.name, []).append(step)
    return tuple(
        StepAnatomy(name, len(held), Work.mean([step.work for step in held]),
                    fmean(step.busy_us for step in held) / 1e3, kernel_times(held))
        for name, held in kinds.items()
    )  # fmt: skip


@contextlib.contextmanager
def _held(server: Server, batch: int, status: StatusLine, what: str) -> Iterator[None]:
    """`batch` requests decode in the block, sent as one: the API server then has next to nothing to do for them. vLLM
    ends them when the connection closes."""
    level = Level(variant=server.variant, rate=math.inf, requests=batch)
    asked = {"max_tokens": _ANSWER_TOKENS, "ignore_eos": True, "temperature": 0}
    body = {"model": server.model, "prompt": trace_for(server.profile, level).prompts, **asked}
    connection = http.client.HTTPConnection(HOST, server.port, timeout=_PATIENCE_S)
    try:
        headers = {"Authorization": f"Bearer {server.api_key}", "Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        status.update(what, "reading the prompts")
        few = f"{batch} requests did not come to decode together; its KV cache may be too small: take smaller batches"

        def together(seen: Mapping[str, float]) -> bool:
            if select.select([connection.sock], [], [], 0)[0]:
                answer = connection.getresponse()
                said = answer.read(2000).decode(errors="replace")
                raise LevelFailed(f"{what}: answered before they ran together, HTTP {answer.status}: {said[:300]}")
            return seen["running"] == batch and not seen["waiting"]

        _wait(server, together, few)
        yield
    finally:
        connection.close()


def _wait(server: Server, until, otherwise: str) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not until(_metrics(server)):
        if trouble := server.problem():
            raise LevelFailed(trouble)
        if time.monotonic() > deadline:
            raise LevelFailed(f"{server.variant}: {otherwise}")
        time.sleep(0.1)


def _metrics(server: Server) -> dict[str, float]:
    try:
        return dict.fromkeys(("running", "waiting", "iterations", "kv_cache_usage"), 0.0) | parse_metrics(
            server.metrics()
        )
    except OSError as error:
        raise LevelFailed(str(error)) from None


class _Counted(NamedTuple):
    """`steps` that ended in `seconds`, the mean share of the KV cache in use, and what NVML said meanwhile."""

    seconds: float
    steps: float
    kv_usage: float
    gpu: list[dict]


def _count_steps(server: Server, batch: int) -> _Counted:
    """Counts for `_COUNTED_S` of the server's time. Raises LevelFailed when not all of the batch ran to the end."""
    seconds, rows = _COUNTED_S * min(server.profile.time_dilation, 4), []
    with GpuReader(server.cards) as gpu:
        begin, first = time.monotonic(), _metrics(server)
        while time.monotonic() < begin + seconds:
            rows.append(gpu.read(slow=False))
            time.sleep(0.2)
        last, end = _metrics(server), time.monotonic()
    if last["running"] != batch:
        raise LevelFailed(
            f"{server.variant}: only {last['running']:.0f} of {batch} requests ran on while steps were counted"
        )
    steps = last["iterations"] - first["iterations"]
    if steps < 1:
        raise LevelFailed(f"{server.variant}: no step ended within {seconds:.0f} s")
    return _Counted(end - begin, steps, fmean((first["kv_cache_usage"], last["kv_cache_usage"])), rows)


def _ask(server: Server, path: str) -> None:
    try:
        status, text = server.ask("POST", path, within=_PATIENCE_S)
    except OSError as error:
        raise LevelFailed(f"{server.variant}: the profiler did not answer ({path}): {error}") from None
    if status != 200:
        raise LevelFailed(f"{server.variant}: the profiler refused {path}: HTTP {status} {text[:200]}")


def _stop_profile(server: Server, traces: Path) -> list[Step]:
    """The steps that were profiled. Raises LevelFailed when the profiler wrote nothing that can be read."""
    _ask(server, "/stop_profile")
    steps = []
    for path in sorted(traces.glob("*.json.gz")):
        try:
            steps += read_steps(json.loads(gzip.decompress(path.read_bytes())))
        except (OSError, ValueError, EOFError, KeyError) as error:
            raise LevelFailed(f"{server.variant}: the profiler's trace cannot be read: {error!r}") from None
        path.unlink()
    if not steps:
        raise LevelFailed(f"{server.variant}: the profiler saw no step; see {server.log_path}")
    return steps


def _sample_host(server: Server, seconds: float) -> tuple[dict[str, dict[str, float]], str]:
    """The EngineCore's stages over (whole) `seconds`, by py-spy, and why there are none."""
    spy = shutil.which("py-spy", path=str(Path(sys.executable).parent)) or shutil.which("py-spy")
    if not spy:
        return {}, "py-spy is not installed (`make env` installs it)"
    engines = [pid for pid in server.pids() if _is_engine(pid)]
    if not engines:
        return {}, "no EngineCore process was found"
    with tempfile.TemporaryDirectory() as folder:
        stacks = Path(folder) / "stacks.txt"
        command = [spy, "record", "--pid", str(engines[0]), "--duration", f"{max(1, int(seconds))}", "--rate",
                   str(_SAMPLES_PER_S), "--idle", "--format", "raw", "--output", str(stacks)]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_PATIENCE_S)
        if not stacks.is_file():
            why = done.stderr.strip().splitlines() or ["no reason given"]
            return {}, f"py-spy could not look into the EngineCore ({why[-1][:200]})"
        return host_stages(stacks.read_text().splitlines()), ""


def _is_engine(pid: int) -> bool:
    with contextlib.suppress(psutil.Error):
        return "EngineCore" in " ".join(psutil.Process(pid).cmdline())
    return False
