"""Fits a step model to the levels of a recorded run, and plays a level in virtual time with it.

Passes of least squares. First over telemetry: between two samples so many tokens came and so much context was read,
which says how many steps there were and how long they took. Then over the levels themselves: what they delivered, played in
virtual time, and the steps of them that were taken apart, against what was measured. Last what they took of energy, and the
power between samples. Levels that `data/fits/held_out.toml` names are never seen by a fit.
"""

import dataclasses
import fnmatch
import itertools
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ..config.dimensions import cards, count_of, fp8_kv, most_running, replicas, weight_format
from ..config.flags import flag_of, parse
from ..config.profile import RUST
from ..errors import BadInput
from ..metrics.anatomy import ATTENTION
from ..metrics.bottleneck import PREEMPTED, backlog_growth, growth_by_chance, keeps_up
from ..metrics.performance import latencies
from ..metrics.statistics import student_t
from ..metrics.step_model import ENERGY, FITS, FITTED, JOULES, JUDGED, MOST, STEPS, TIMES, UNTOLD, StepModel
from ..metrics.summary import Summary
from ..metrics.virtual import Course, Limits, Step, play
from ..results.run_folder import LevelResult, Run
from ..ui import StatusLine
from .anatomy import anatomies

# Power is NVML's mean over the second before.
_POWER_LATE_S = 0.5
# vLLM's default of --max-num-batched-tokens on a Hopper card.
_STEP_TOKENS = 8192
# How full the cache is where it holds others back.
_FULL = 0.99
# The part of a core from which on an API server's process is full.
_FULL_CORE = 0.95
# More requests than these, and than this part of all, that have no first token when the last one comes are a queue.
_QUEUE, _QUEUED = 10, 0.1
# An API server that was so far behind, as a part of a level's time, was its limit.
_BEHIND = 0.1
# Steps of so many batch sizes have to be taken apart to tell a token of context from a request, and both from a step.
_TELL = 3
# vLLM's largest CUDA graph, by default.
_GRAPHS = 512
_START = {"base_ms": 2.0, "weights_ms": 3.0, "token_us": 15.0, "request_us": 2.0, "context_ns": 40.0, "mixed_ms": 1.0,
          "mixed_context_ns": 60.0, "eager_ms": 5.0, "api_ms": 2.0}  # fmt: skip


@dataclass(frozen=True)
class Played:
    """A level in virtual time: its course, its records as a run's, what is `JUDGED` of it (joules where the model has them),
    how many blocks of KV cache there were, and how far the API server was behind at most, as a part of the level's time."""

    course: Course
    records: pd.DataFrame
    found: dict[str, float]
    blocks: int
    behind: float = 0.0

    @property
    def limit(self) -> str:
        """What limits it: the "offered load", the "API server", the "KV capacity", or the "GPU" with the EngineCore, whose parts of a step no
        model of this kind tells apart."""
        if keeps_up(self.records) is not False:
            return "offered load"
        if self.behind > _BEHIND:
            return "API server"
        if self.course.preemptions > PREEMPTED * len(self.records) or self.course.blocks_max > _FULL * self.blocks:
            return "KV capacity"
        queue = (self.records["first_token_s"] > self.records["scheduled_s"].max()).sum()
        grew = backlog_growth(self.records) > growth_by_chance(self.records)
        if grew or queue > _QUEUE + _QUEUED * len(self.records):
            return "GPU"
        return "not known: too short to tell a backlog from chance, more requests tell"


def held_out(run: Run) -> list[str]:
    """The levels of a run that no fit may see."""
    patterns = tomllib.loads((FITS / "held_out.toml").read_text())
    mine = [*patterns.get("every run", []), *patterns.get(run.path.name, [])]
    return [level for level in run.summaries() if any(fnmatch.fnmatch(level, pattern) for pattern in mine)]


def play_level(model: StepModel, prompts, answers, due_s, limits: Limits | None = None, *, by=play) -> Played:
    """A load, each shape (requests,), in virtual time, played `by` the fast scheduling or another like it. A request's way
    through the API server comes before its first token."""
    due, limits = np.asarray(due_s, dtype=float), limits or model.limits
    course = by(prompts, answers, due + 1e-3 * model.api_ms, limits, model.seconds)
    records = pd.DataFrame({
        "request": np.arange(due.size), "prompt_tokens": prompts, "output_tokens_asked": answers, "output_tokens": answers,
        "chunks": answers, "scheduled_s": due, "sent_s": due, "first_token_s": course.first_s, "last_token_s": course.last_s,
        "finish_reason": "length", "error": None,
    }).astype({"error": "object"})  # fmt: skip
    each = latencies(records)
    tokens, span = float(np.sum(answers)), float(np.nanmax(course.last_s) - due.min())
    found = {"output_token_throughput": tokens / span}
    for name in ("tpot", "ttft"):
        values = each[f"{name}_ms"].dropna()
        found |= {f"mean_{name}_ms": float(values.mean()), f"p99_{name}_ms": float(values.quantile(0.99))}
    if joules := model.joules(course, span):
        found[JOULES] = joules / tokens
    return Played(course, records, found, limits.blocks, course.behind_s / span)


def replay(model: StepModel, level: LevelResult) -> Played:
    """A measured level in virtual time: the same requests at the same instants, on a server with as much KV cache."""
    records, kv_tokens = level.records, level.summary.kv_cache_tokens
    columns = (records[name].to_numpy() for name in ("prompt_tokens", "output_tokens", "scheduled_s"))
    return play_level(dataclasses.replace(model, kv_tokens=kv_tokens), *columns)


def apart(played: Played, measured: Summary) -> dict[str, float]:
    """How far off (a share: 0.1 is 10 % too much) what is foretold of a level is, by metric; joules where both have them."""
    return {
        name: played.found[name] / value - 1
        for name in JUDGED
        if (value := getattr(measured, name)) and name in played.found
    }


def off_by(levels: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """How far `apart` levels are from what is foretold, either way, by metric: in the "median", and the "worst"."""
    off = pd.DataFrame(levels, columns=list(JUDGED), dtype=float).abs()
    return {"median": off.median().dropna().to_dict(), "worst": off.max().dropna().to_dict()}


def judgeable(summary: Summary) -> bool:
    """Whether a level holds all that a prediction is judged by."""
    return summary.valid and bool(summary.kv_cache_tokens) and all(getattr(summary, name) for name in TIMES)


def fit(run: Run, variant: str) -> StepModel:
    """The step model of a variant, from the levels of `run` that are not held out. Raises BadInput without two of them, or
    without telemetry."""
    from scipy.optimize import least_squares

    kept = set(run.summaries()) - set(held_out(run))
    if run.emulated:
        raise BadInput(f"run {run.path.name} is EMULATED: a fit of it would foretell the emulation")
    mine = {k: s for k, s in run.summaries().items() if s.level.variant == variant and judgeable(s)}
    summaries = {k: s for k, s in mine.items() if k in kept}
    if one := next((k for k, s in summaries.items() if s.replicas > 1), None):
        raise BadInput(
            f"{variant}: {one} ran {summaries[one].replicas} replicas, each with a scheduler of its own: fit one of them"
        )
    levels = {level_id: run.read(s.level) for level_id, s in summaries.items()}
    if one := next((k for k, level in levels.items() if _python_is_full(level.summary)), None):
        raise BadInput(
            f"{variant}: a Python process is its API server ({one}), which is full before the card is: how its queue grows is not "
            "fitted; fit a variant with the Rust API server or more processes, and ask what it does behind one process (--api-us)"
        )
    spans = [_spans(level) for level in levels.values() if level.telemetry is not None]
    if len(levels) < 2 or not (rows := [span for span in spans if len(span)]):
        raise BadInput(
            f"levels of {variant!r} with telemetry in run {run.path.name} that a fit may see: {len(levels)}; two at least are "
            "needed, one of them with the card full"
        )
    rows, server = np.vstack(rows), next(iter(levels.values())).summary
    requests, work = most_running(server.command) or 1024, run.profile.workload
    lengths = f"random {work.input_tokens}/{work.output_tokens}" if work.trace == "random" else Path(work.trace).name
    taken = {
        "requests": requests, "step_tokens": _most_tokens(server.command),
        "kv_tokens": server.kv_cache_tokens, "card": run.profile.name, "run": run.path.name, "levels": tuple(levels),
        "trace": lengths, "context": run.profile.context() or 0, "cards": server.cards, "graphs": _graphs(server.command, requests), **_measured(run, list(summaries.values())),
    }  # fmt: skip
    if limit := [s.gpu_power_limit_w for s in summaries.values() if s.gpu_power_limit_w]:
        taken["limit_w"] = float(max(limit))
    if gpu := run.profile.gpu:
        taken |= {"card_name": gpu.name, "hbm_bytes_per_s": gpu.hbm_bytes_per_s, "bf16_flops": gpu.bf16_flops}
    status = StatusLine()
    status.update(f"{variant}: {len(rows):,} intervals of {len(levels)} levels")

    graphed = taken["graphs"] >= taken["requests"]  # then no step is beyond its graphs
    floors, known, within = _not_fitted(run, variant)
    taken |= known
    names = [name for name in FITTED if name not in known and not (graphed and name == "eager_ms")]
    of_steps = len(names) - 1
    taken_apart = _decoding(run, variant)
    lowest = np.array([floors.get(name, -np.inf) for name in names])

    def of_spans(logs: np.ndarray) -> np.ndarray:
        return _foretold(known | dict(zip(names, np.exp(logs), strict=False)), taken["graphs"], rows) / rows[:, 0] - 1

    start = np.maximum(np.log([_START[name] for name in names]), lowest + 0.05)
    bounds = lowest[:of_steps], math.log(MOST)
    first = least_squares(of_spans, start[:of_steps], bounds=bounds, loss="soft_l1", f_scale=0.1)

    def model_of(logs: np.ndarray) -> StepModel:
        # As a file holds them: near saturation a level turns on the last digit.
        values = {name: float(f"{value:.6g}") for name, value in zip(names, np.exp(logs), strict=True)}
        return StepModel(**values, **taken)

    def of_levels(logs: np.ndarray) -> np.ndarray:
        model, apart = model_of(logs), []
        for level in levels.values():
            found = replay(model, level).found
            apart += [weight * math.log(found[name] / getattr(level.summary, name)) for name, weight in TIMES.items()]
        steps = [math.log(1e3 * model.seconds(step) / took) for step, took in taken_apart]
        # The first pass keeps its say, as much as one level has.
        spans = of_spans(logs[:of_steps]) / math.sqrt(len(rows))
        return np.concatenate([apart, steps, 2 * spans])

    status.update(f"{variant}: playing {len(levels)} levels again and again")
    begin, bounds = np.append(first.x, start[of_steps:]), (lowest, math.log(MOST))
    # Near saturation a level turns on chance, so that small steps may end where larger ones see a way down.
    for step, most in ((0.02, 25), (0.05, 12)):
        found = least_squares(of_levels, begin, bounds=bounds, diff_step=step, max_nfev=most)
        begin = found.x
    model = model_of(found.x)
    beside = _energy(model, list(levels.values()), rows) | _host_adds(run, variant, model.context_ns)
    model = dataclasses.replace(model, **beside)
    status.done(f"{variant}: fitted to {', '.join(levels)}")
    unseen = [run.read(s.level) for k, s in mine.items() if k not in kept]
    off = off_by([apart(replay(model, level), level.summary) for level in unseen])
    ends = _intervals(found, model, names, 2 * (len(levels) + 1) + len(taken_apart), lowest)
    return dataclasses.replace(model, **{end: ends[end] | within[end] for end in ends}, **off)


def _energy(model: StepModel, levels: Sequence[LevelResult], rows: np.ndarray) -> dict[str, float]:
    """What energy is made of: least squares over the levels as they are played, by the card's own meter, and, with a tenth of
    their say, over the spans with their power, a sensor's mean over a second; nothing where power was not sampled. None is below
    nothing, and idle the card draws no more than the least that was sampled."""
    from scipy.optimize import lsq_linear

    rows = rows[np.isfinite(rows[:, 6])]
    measured = [level for level in levels if getattr(level.summary, JOULES)]
    if not len(rows) or not measured:
        return {}
    seconds, steps, running, read, held, _, watts = rows.T
    busy = np.minimum(_foretold({name: getattr(model, name) for name in STEPS}, model.graphs, rows), seconds)
    parts = [np.stack([seconds, busy, steps * running + read, steps * held], axis=1)]
    joules, weights = [watts * seconds], [math.sqrt(0.1) / (watts * seconds)]
    for level in measured:
        played = replay(model, level)
        course, tokens = played.course, float(level.records["output_tokens"].sum())
        span = tokens / played.found["output_token_throughput"]
        parts.append(np.array([[span, course.busy_s, course.tokens, course.context]], float))
        joules.append(np.array([tokens * getattr(level.summary, JOULES)]))
        weights.append(math.sqrt(len(rows) / len(measured)) / joules[-1])
    weighted = np.concatenate(parts) * np.concatenate(weights)[:, None]
    scale = weighted.max(0)
    least = min(float(level.telemetry["gpu_power_w"].min()) for level in measured if level.telemetry is not None)
    most = np.array([least, np.inf, np.inf, np.inf]) * scale
    found = lsq_linear(weighted / scale, np.concatenate(joules) * np.concatenate(weights), (0.0, most)).x / scale
    units = (1.0, 1.0, 1e3, 1e6)
    return {name: float(f"{one * unit:.6g}") for name, one, unit in zip(ENERGY, found, units, strict=True)}


def _spans(level: LevelResult) -> np.ndarray:
    """(seconds, steps, decoding, prompt tokens, context tokens, steps with prompts, watts) between each two samples while
    requests ran, shape (spans, 7), watts nan where none were sampled. A request that decodes gets a token a step, so that tokens over requests are steps; prompts come
    into as many as their arrival by chance makes likely, or as the tokens of a step allow."""
    columns = ["at_s", "running", "kv_cache_usage", "prompt_tokens", "generation_tokens"]
    samples = level.telemetry[columns].dropna().to_numpy(float)
    power = level.telemetry[["at_s", "gpu_power_w"]].dropna().to_numpy(float)
    prompt, most = float(level.records["prompt_tokens"].mean()), _most_tokens(level.summary.command)
    found = []
    for before, after in itertools.pairwise(samples):
        running, tokens = (before[1] + after[1]) / 2, after[4] - before[4]
        if min(before[1], after[1]) < 1 or tokens <= 0 or after[0] <= before[0]:
            continue
        steps, read = tokens / running, after[3] - before[3]
        mixed = max(read / max(1.0, most - running), steps * -math.expm1(-read / prompt / steps)) if read > 0 else 0.0
        context = level.summary.kv_cache_tokens * (before[2] + after[2]) / 2
        at = np.linspace(before[0], after[0], 5) + _POWER_LATE_S
        watts = float(np.interp(at, *power.T).mean()) if len(power) else math.nan
        found.append((after[0] - before[0], max(steps, mixed), running, read, context, mixed, watts))
    return np.array(found).reshape(-1, 7)


def _foretold(values: Mapping[str, float], graphs: int, rows: np.ndarray) -> np.ndarray:
    """The seconds that steps take which so much was done in; `StepModel.seconds` for many at a time, but for the pairs of
    prompts, which are not sampled and take about 1 % of what their tokens do."""
    base, weights, token, request, context, mixed, mixed_context = (values[name] for name in STEPS[:-1])
    _, steps, running, read, held, with_prompts, _ = rows.T

    def products(tokens):
        return (weights**4 + (1e-3 * token * tokens) ** 4) ** 0.25

    eager = values.get("eager_ms", 0.0) * (running > graphs)
    alone = (steps - with_prompts) * (products(running) + 1e-6 * context * held + eager)
    together = products(running + read / np.maximum(with_prompts, 1e-9)) + mixed + 1e-6 * mixed_context * held
    return 1e-3 * (steps * (base + 1e-3 * request * running) + alone + with_prompts * together)


def _most_tokens(command: Sequence[str]) -> int:
    return count_of(command, "--max-num-batched-tokens") or _STEP_TOKENS


def _python_is_full(summary: Summary) -> bool:
    """Whether the API server is one Python process, which is full sooner or later, or one of several was."""
    several = flag_of(summary.command, "--api-server-count") not in ("auto", "1")
    python = summary.server.environment.get(RUST, "0") == "0"
    return python and (not several or (summary.frontend_cpu_max_steady or 0.0) > _FULL_CORE)


def _graphs(command: Sequence[str], requests: int) -> int:
    """The requests of the largest CUDA graph; all where there is none, so that every step is launched alike. Raises BadInput for a
    command that says it in JSON."""
    given = {flag.name: flag.values for flag in parse(command)}
    if "--compilation-config" in given:
        raise BadInput(
            "--compilation-config may end CUDA graphs anywhere: serve with --max-cudagraph-capture-size in its place"
        )
    asked = [*given.get("--cudagraph-capture-sizes", ()), *given.get("--max-cudagraph-capture-size", ())]
    most = max((int(one) for one in asked if one.isdecimal()), default=_GRAPHS)
    return requests if "--enforce-eager" in given or not most else most


def _measured(run: Run, levels: Sequence[Summary]) -> dict[str, object]:
    """What was measured beside the levels' times: the host, the API server's CPU a token, the clock."""
    fullest, parts = max(levels, key=lambda one: one.frontend_cpu_max_steady or 0.0), run.parts
    clocks = [one.gpu_sm_mhz_steady for one in levels if one.gpu_sm_mhz_steady] or [0.0]
    found = {"api_us": fullest.frontend_us_per_token or 0.0, "mhz_low": min(clocks), "mhz_high": max(clocks)}
    hosts = (parts[(one.part or 1) - 1]["machine"] for one in levels)
    named = "; ".join(dict.fromkeys(f"{host['cpu']}, {host['cores']} cores" for host in hosts))
    return {"host": named, **{name: float(f"{one:.6g}") for name, one in found.items()}}


def _decoding(run: Run, variant: str) -> list[tuple[Step, float]]:
    """Steps that only decode, and the ms that each took, where enough were taken apart."""
    held = [one for one in anatomies(run).get(variant, ()) if one.context]
    if len({one.batch for one in held}) < _TELL:
        return []
    return [(Step(one.batch, 0, one.batch, round(one.batch * one.context)), one.wall_ms) for one in held]


def _host_adds(run: Run, variant: str, context_ns: float) -> dict[str, float]:
    """What the host adds to a step, as so much a step and so much a request of it, by least squares over the steps that were taken
    apart; their timed and their profiled contexts made equal by what a token of context takes."""
    from scipy.optimize import nnls

    held = [one for one in anatomies(run).get(variant, ()) if one.decode and one.context and one.decode.context]
    if not held:
        return {}
    longer = [1e-6 * context_ns * one.batch * (one.context - one.decode.context) for one in held]
    adds = np.array([max(0.0, one.wall_ms - one.decode.busy_ms - more) for one, more in zip(held, longer, strict=True)])
    parts = np.stack([np.ones(len(held)), [1e-3 * one.batch * (len(held) > 1) for one in held]], axis=1)
    return {name: float(f"{one:.6g}") for name, one in zip(("host_ms", "host_us"), nnls(parts, adds)[0], strict=True)}


def _not_fitted(run: Run, variant: str) -> tuple[dict[str, float], dict[str, float], dict[str, dict[str, float]]]:
    """The logarithms that a fit may not go below, since weights and contexts are read at the card's bandwidth at most; what is
    known and not fitted, and the 95 % interval that it lies within. All empty without a datasheet or the model's shape."""
    profile = run.profile
    card, shape, flags = profile.gpu, profile.shape(variant), profile.flags(variant)
    if not (card and shape):
        return {}, {}, {"low": {}, "high": {}}
    shared_by, in_fp8 = cards(flags) // replicas(flags), fp8_kv(flags, shape)
    weights = 1e3 * shape.weight_bytes_read(weight_format(flags, shape)) / card.hbm_bytes_per_s / shared_by
    token = 1e9 * shape.kv_bytes_per_token(1 if in_fp8 else 2) / card.hbm_bytes_per_s / shared_by
    floors = {
        name: math.log(value)
        for name, value in (("weights_ms", weights), ("context_ns", token), ("mixed_context_ns", token))
    }
    known = {"pair_ns": float(f"{1e9 * shape.pair_flops / card.bf16_flops / shared_by:.6g}")}
    alike = [
        (held.batch, held.batch * held.decode.context, held.decode.times[ATTENTION])
        for other, steps in anatomies(run).items() if fp8_kv(profile.flags(other), shape) == in_fp8
        for held in steps if held.decode
    ]  # fmt: skip
    ends = {"low": {}, "high": {}}
    if len({batch for batch, _, _ in alike}) >= _TELL and len(alike) > 3:
        batch, context, took = np.array(alike, float).T
        parts = np.stack([np.ones_like(batch), 1e-3 * batch, 1e-6 * context], axis=1) / took[:, None]
        found, freedom = np.linalg.lstsq(parts, np.ones_like(took), rcond=None)[0], len(alike) - 3
        spread = np.linalg.inv(parts.T @ parts)[2, 2] * float(((parts @ found - 1) ** 2).sum()) / freedom
        read, half = max(float(found[2]), token), student_t(freedom) * math.sqrt(spread)
        known["context_ns"] = float(f"{read:.6g}")
        ends = {"low": {"context_ns": max(token, read - half)}, "high": {"context_ns": read + half}}
    return floors, known, ends


# Nearer than this to the datasheet's bound a number is at it.
_AT_BOUND = 1.02
# A number that moves nothing by more than this, relative to it, is told by nothing.
_UNFELT = 1e-6


def _intervals(
    found, model: StepModel, names: Sequence[str], told: int, lowest: np.ndarray
) -> dict[str, dict[str, float]]:
    """How well the levels tell each number, from the curvature at the best fit, of the logarithms of what was fitted; no lower
    than the datasheet allows, and the number itself where it is at that. What is judged of a level goes together: of what is `told`
    it counts as two, all of telemetry as one level does, and a step taken apart as one."""
    freedom = max(1, told - len(names))
    spread = np.linalg.pinv(found.jac.T @ found.jac) * (2 * found.cost / freedom)
    half = np.minimum(student_t(freedom) * np.sqrt(np.maximum(np.diag(spread), 0.0)), math.log(UNTOLD))
    half[np.abs(found.jac).max(axis=0) < _UNFELT] = math.log(UNTOLD)  # the levels do not tell it at all
    ends = {"low": {}, "high": {}}
    for name, spread, least in zip(names, half, np.exp(lowest), strict=True):
        value = getattr(model, name)
        at_bound = 0 < value <= _AT_BOUND * least
        ends["low"][name] = value if at_bound else max(float(least), value * math.exp(-spread))
        ends["high"][name] = value if at_bound else value * math.exp(spread)
    return ends
