"""What a server would do under a load that nobody measured: played in virtual time with a fitted step model. PREDICTED."""

import contextlib
import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..config.profile import names_of, rate_name
from ..config.profile_file import read_profile
from ..config.trace import Trace, arrival_times, begun_anew
from ..errors import BadInput
from ..metrics.slo import SLO, Bracket, attains, probe_requests, search
from ..metrics.step_model import StepModel, read_fits
from ..metrics.virtual import Course, Limits, Step, attended, play
from ..models.checkpoints import model_folder
from .step_fit import Played, play_level

# A level goes on for so long that what is slow shows, and a backlog; to find a highest rate for longer, and over several seeds
# of arrivals: chance moves where a bracket ends by more than its width.
_LEVEL_S, _SEARCHED_S, _SEEDS = 60.0, 300.0, 3
_SLOWEST, _FASTEST = 1e-3, 1e6  # requests/s
_MOST_REQUESTS = 10_000
_PROBES = 16
# A seed's bracket is made this narrow, if each rate in it can be decided; after the first seed the search begins at its limit,
# with steps of this.
_NARROW, _NEARBY = 0.02, 1.08
# What vLLM's Python API server took of CPU, a token, where it was full, on the host of `h100-80gb` (92 to 129 µs).
PYTHON_US = 105.0
# What every step answers in vLLM's own scheduling.
_TOKEN = 7


@dataclass(frozen=True)
class Predicted:
    """A variant under a load: the requests of `trace` at `rate` requests/s (inf: all at once, None: at the trace's own times), and
    what comes of it."""

    variant: str
    rate: float | None
    trace: Trace
    played: Played

    @property
    def offered(self) -> str:
        return "replay" if self.rate is None else rate_name(self.rate)


def predict(
    variant: str, model: StepModel, trace: Trace, rate: float | None, *, seed: int = 0, scheduler: str = "virtual"
) -> Predicted:
    """What `variant` does when the requests of `trace` come at `rate`, or at their own times. Raises BadInput for a request that
    the KV cache cannot hold, and for a rate beyond any."""
    if rate is not None:
        _check_rate(rate)
    elif trace.arrival_s is None:
        raise BadInput(f"the trace {trace.name!r} holds no arrival times to be replayed: name a rate")
    if scheduler not in SCHEDULERS:
        raise BadInput(f"scheduler {scheduler!r} is none of {', '.join(SCHEDULERS)}")
    due = trace.arrival_s if rate is None else arrival_times(len(trace), rate, seed=seed)
    played = play_level(model, trace.prompt_tokens, trace.output_tokens, due, by=SCHEDULERS[scheduler])
    return Predicted(variant, rate, trace, played)


def _check_rate(rate: float) -> None:
    if not (rate == math.inf or _SLOWEST <= rate <= _FASTEST):
        raise BadInput(
            f"rate {rate:g}: expected {_SLOWEST:g} to {_FASTEST:g} requests/s, or inf, which sends all at once"
        )


def predict_rates(
    models: Mapping[str, StepModel], draw: Callable[[int], Trace], rates: Sequence[float]
) -> list[Predicted]:
    """What each variant does with a minute of arrivals at each of these rates (requests/s; inf: 2,000 at once), ten requests at
    least and ten thousand at most. Raises BadInput as `predict`."""
    for rate in rates:
        _check_rate(rate)
    counts = [2000 if rate == math.inf else round(min(max(_LEVEL_S * rate, 10), _MOST_REQUESTS)) for rate in rates]
    return [
        predict(variant, model, draw(count), rate)
        for variant, model in models.items()
        for rate, count in zip(rates, counts, strict=True)
    ]


def highest_rate(variant: str, model: StepModel, draw: Callable[[int], Trace], slo: SLO, *, seed: int = 0) -> Bracket:
    """The rates between which the highest one lies that meets `slo`: the lowest and the highest end of the brackets of several
    seeds of arrivals, each level minutes long. `draw` gives so many requests."""
    alone = predict(variant, model, draw(probe_requests(slo)), 1e-3, seed=seed).played.records
    if attains(alone, slo).bound == "missed":
        return Bracket(0.0, 0.0)
    found, start, step = [], 10.0, 2.0
    for one in range(seed, seed + _SEEDS):

        def probe(rate: float, seed: int = one) -> str:
            requests = max(probe_requests(slo), math.ceil(rate * _SEARCHED_S))
            return attains(predict(variant, model, draw(requests), rate, seed=seed).played.records, slo).bound

        found.append(search(probe, start, step=step, tolerance=_NARROW, max_probes=_PROBES)[0])
        if found[-1].low:
            start, step = found[-1].low, _NEARBY  # another seed's limit is not far
    return Bracket(min(one.low for one in found), max(one.high for one in found))


def step_models(fit: str, variants: str | Sequence[str] | None = None, *, card: str = "") -> dict[str, StepModel]:
    """The step models of a fit in `data/fits` (or a .toml file) for these variants, or for all; `fitted=name` gives one another
    name, such as a run's. With a `card`, a profile's name, they are as they would be there by the datasheets. Raises BadInput
    for a fit, variant or card that there is not."""
    fits = read_fits(fit)
    named = [one.partition("=") for one in names_of(variants or list(fits))]
    if unknown := [one for one, _, _ in named if one not in fits]:
        raise BadInput(f"the fit holds no variant {', '.join(unknown)} (it holds: {', '.join(fits)})")
    models = {name or one: fits[one] for one, _, name in named}
    if len(models) < len(named):
        raise BadInput(f"two of the variants are called the same ({', '.join(name or one for one, _, name in named)})")
    if not card:
        return models
    if (other := read_profile(card).gpu) is None:
        raise BadInput(f"card {card} has no datasheet ([gpu]); name a profile of a card")
    return {variant: model.on(other, card) for variant, model in models.items()}


def most_taken(models: Mapping[str, StepModel], most: int | None = None) -> int | None:
    """The most tokens of a request, in and out together, that all of the models take, or `most` where that is fewer."""
    # As in a profile's levels: a tokenizer may begin every prompt with a token of its own.
    known = [model.context - 1 for model in models.values() if model.context]
    return min(known if most is None else (most, *known), default=None)


def drawing(
    trace: str = "sharegpt-like", *, input_tokens: int = 1024, output_tokens: int = 128, seed: int = 0,
    tokenizer: str | None = None, max_context: int | None = None, models: Mapping[str, StepModel] | None = None,
) -> Callable[[int], Trace]:  # fmt: skip
    """What draws so many requests of a trace that all `models` take, a file that holds fewer begun anew, without its arrival
    times. Raises BadInput, when it draws, for one that cannot be read."""
    held, max_context = [], most_taken(models or {}, max_context)

    def first(requests: int) -> Trace:
        # A trace is the beginning of any longer one: a search asks for many, and the words of prompts take longer than playing.
        if not held or len(held[0]) < requests:
            held[:] = [begun_anew(
                trace, requests, seed=seed, input_tokens=input_tokens, output_tokens=output_tokens, tokenizer=tokenizer,
                max_context=max_context,
            )]  # fmt: skip
        return held[0].head(requests)

    return first


def what_if(model: StepModel) -> dict[str, StepModel]:
    """The model as it would be with something twice as fast, by what that is."""
    halves = {
        "what each step costs, batch or not": ("base_ms", "mixed_ms"),
        "memory": ("weights_ms", "context_ns", "mixed_context_ns"),
        "matrix products": ("token_us", "pair_ns"),
        "what each token costs beside them": ("request_us",),
    }
    changed = {
        f"{what}: half the time": dataclasses.replace(model, **{name: getattr(model, name) / 2 for name in names})
        for what, names in halves.items()
    }
    if model.host_ms or model.host_us:
        parts = (("base_ms", model.host_ms), ("request_us", model.host_us))
        faster = {name: getattr(model, name) - min(host, getattr(model, name)) / 2 for name, host in parts}
        changed["the EngineCore: half of what it adds to a step"] = dataclasses.replace(model, **faster)
    if model.queue_us:
        changed["an API server that is never full"] = dataclasses.replace(model, queue_us=0.0)
    else:
        changed[f"one Python API server process, {PYTHON_US:g} µs a token"] = model.behind(PYTHON_US)
    return changed


def longer(trace: Trace, *, prompts: int = 1, answers: int = 1) -> Trace:
    """The same requests with so many times the tokens."""
    return dataclasses.replace(
        trace, prompt_tokens=tuple(prompts * n for n in trace.prompt_tokens),
        output_tokens=tuple(answers * n for n in trace.output_tokens),
    )  # fmt: skip


def play_with_vllm(
    prompts: Sequence[int], answers: Sequence[int], due_s: Sequence[float], limits: Limits,
    seconds: Callable[[Step], float], watch: Callable[[int, Sequence[int], int], None] | None = None,
) -> Course:  # fmt: skip
    """As `metrics.virtual.play`, with vLLM's own scheduler and block manager: the installed version's, called as its EngineCore
    calls them, without a server, a model or a wait. The proof of the fast one, and slower by a magnitude or two. Raises
    BadInput where vLLM is not installed, or refuses a request."""
    scheduler = _scheduler(limits, max(p + a for p, a in zip(prompts, answers, strict=True)))
    return _Course(scheduler, prompts, answers, [float(at) for at in due_s], limits, seconds, watch).run()


@contextlib.contextmanager
def _quiet():
    """Nothing of what vLLM tells of a server: there is none."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(None):
            yield
    finally:
        logging.disable(logging.NOTSET)


@_quiet()
def _scheduler(limits: Limits, longest: int):
    try:
        import torch
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
        from vllm.v1.structured_output import StructuredOutputManager
    except ImportError as error:
        raise BadInput(f"vLLM's scheduler needs vLLM, which cannot be imported here: {error}") from None
    config = _config(limits.block, limits.requests, limits.step_tokens, 1 << max(longest, limits.block).bit_length())
    # The first block is vLLM's own, which nobody holds.
    config.cache_config.num_gpu_blocks = limits.blocks + 1
    config.scheduler_config.async_scheduling = limits.depth == 2
    spec = FullAttentionSpec(block_size=limits.block, num_kv_heads=1, head_size=8, dtype=torch.bfloat16)
    groups = [KVCacheGroupSpec(layer_names=["layer"], kv_cache_spec=spec)]
    cache = KVCacheConfig(num_blocks=limits.blocks + 1, kv_cache_tensors=[], kv_cache_groups=groups)
    made = (AsyncScheduler if limits.depth == 2 else Scheduler)(
        vllm_config=config, kv_cache_config=cache, structured_output_manager=StructuredOutputManager(config),
        block_size=limits.block, log_stats=False,
    )  # fmt: skip
    made.use_v2_model_runner = False
    return made


@functools.lru_cache(maxsize=8)
def _config(block: int, requests: int, step_tokens: int, length: int):
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(
        model=str(model_folder("tiny-llama")), load_format="dummy", enable_prefix_caching=False, block_size=block,
        max_num_seqs=requests, max_num_batched_tokens=step_tokens, max_model_len=length,
        hf_overrides={"max_position_embeddings": length},
    ).create_engine_config()  # fmt: skip


class _InHand(NamedTuple):
    """A step that was put together: vLLM's output, the requests that get a token of it, and when that is handed out."""

    output: object
    emitting: frozenset[str]
    given: float


class _Course:
    def __init__(self, scheduler, prompts, answers, due, limits: Limits, seconds, watch):
        self.scheduler, self.prompts, self.answers, self.due = scheduler, prompts, answers, due
        self.limits, self.seconds, self.watch = limits, seconds, watch
        self.course = Course(np.full(len(due), np.nan), np.full(len(due), np.nan))
        self.pool = scheduler.kv_cache_manager.block_pool
        self.usable = self.pool.get_num_free_blocks()
        self.in_hand: dict[int, _InHand] = {}

    def run(self) -> Course:
        """vLLM's `step_with_batch_queue`, or with one step in hand its `step`: tokens are given to it when they are known."""
        scheduler, depth, arrived = self.scheduler, self.limits.depth, 0
        step, made, begins, known = 1, 0.0, 0.0, 0
        while True:
            while arrived < len(self.due) and self.due[arrived] <= made:
                scheduler.add_request(self._request(arrived))
                arrived += 1
            for number in [n for n in self.in_hand if n <= known]:
                self._give_tokens(self.in_hand.pop(number))
            if not scheduler.has_unfinished_requests():
                if arrived == len(self.due):
                    return self.course
                made = begins = max(begins, self.due[arrived])
                continue
            lengths = {name: one.num_tokens for name, one in scheduler.requests.items()}
            output = scheduler.schedule()
            self.course.preemptions += len(output.preempted_req_ids or ())
            if not output.total_num_scheduled_tokens:
                made, known = begins, step - 1
                continue
            now, emitting = self._step(output, lengths)
            took = self.seconds(now)
            given = self.course.hand_out(now.emitted * self.limits.api_s, 1, begins + took, begins + took)
            self.in_hand[step] = _InHand(output, emitting, given)
            self._note(step, now, took)
            made = begins + took if depth == 1 else begins
            begins, step = begins + took, step + 1
            known = max(known, step - depth)

    def _request(self, number: int):
        from vllm.sampling_params import SamplingParams
        from vllm.v1.request import Request

        asked = SamplingParams(max_tokens=int(self.answers[number]), temperature=0.0, ignore_eos=True)
        return Request(
            request_id=str(number), prompt_token_ids=[_TOKEN] * int(self.prompts[number]), sampling_params=asked,
            pooling_params=None, arrival_time=0.0,
        )  # fmt: skip

    def _give_tokens(self, done: _InHand) -> None:
        from vllm.v1.outputs import ModelRunnerOutput

        names = list(done.output.num_scheduled_tokens)
        tokens = [[_TOKEN] if name in done.emitting else [] for name in names]
        places = {name: place for place, name in enumerate(names)}
        said = self.scheduler.update_from_output(
            done.output, ModelRunnerOutput(req_ids=names, req_id_to_index=places, sampled_token_ids=tokens)
        )
        for one in (one for client in said.values() for one in client.outputs):
            number = int(one.request_id)
            if one.new_token_ids and np.isnan(self.course.first_s[number]):
                self.course.first_s[number] = done.given
            if one.finish_reason is not None:
                self.course.last_s[number] = done.given

    def _step(self, output, lengths: dict[str, int]) -> tuple[Step, frozenset[str]]:
        """What a step computes, and who gets a token of it; `lengths` are those of the requests before it was put together."""
        decoding, prompt, context, pairs = 0, 0, 0, 0.0
        emitting = set()
        for name, count in output.num_scheduled_tokens.items():
            one = self.scheduler.requests[name]
            # A request that was preempted in this very step begins anew.
            had, whole = one.num_computed_tokens - count, max(lengths[name], one.num_prompt_tokens)
            if had >= whole or (had and had >= one.num_prompt_tokens and count == 1):
                decoding += 1
            else:
                prompt += count
                pairs += attended(had, count)
            context += had + count
            if had + count >= one.num_tokens:
                emitting.add(name)
        return Step(decoding, prompt, len(emitting), context, pairs), frozenset(emitting)

    def _note(self, step: int, now: Step, took: float) -> None:
        course, running = self.course, self.scheduler.running
        held = self.usable - self.pool.get_num_free_blocks()
        course.steps, course.busy_s = course.steps + 1, course.busy_s + took
        course.tokens, course.context = course.tokens + now.decoding + now.prompt, course.context + now.context
        course.running_max, course.blocks_max = max(course.running_max, len(running)), max(course.blocks_max, held)
        if self.watch:
            self.watch(step, [int(one.request_id) for one in running], held)


# Whose scheduling is played; both come to the same (tests/test_virtual.py).
SCHEDULERS = {"virtual": play, "vllm": play_with_vllm}
