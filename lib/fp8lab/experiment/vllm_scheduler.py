"""A load in virtual time with vLLM's own scheduler and block manager in place of `metrics.virtual`.

They are the installed version's, called as its EngineCore calls them, without a server, a model or a wait. The proof of the
fast one, and slower by a magnitude or two."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import BadInput
from ..metrics.virtual import Course, Limits, Step
from ..models.checkpoints import model_folder

_TOKEN = 7  # what every step answers


def play(
    prompts: Sequence[int], answers: Sequence[int], due_s: Sequence[float], limits: Limits,
    seconds: Callable[[Step], float], watch: Callable[[int, Sequence[int], int], None] | None = None,
) -> Course:  # fmt: skip
    """As `metrics.virtual.play`. Raises BadInput where vLLM is not installed, or refuses a request."""
    scheduler = _scheduler(limits, max(p + a for p, a in zip(prompts, answers, strict=True)))
    return _Course(scheduler, prompts, answers, [float(at) for at in due_s], limits, seconds, watch).run()


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

    with contextlib.redirect_stdout(None):
        return EngineArgs(
            model=str(model_folder("tiny-llama")), load_format="dummy", enable_prefix_caching=False, block_size=block,
            max_num_seqs=requests, max_num_batched_tokens=step_tokens, max_model_len=length,
            hf_overrides={"max_position_embeddings": length},
        ).create_engine_config()  # fmt: skip


@dataclass(frozen=True)
class _InHand:
    """A step that was put together: vLLM's output, the requests that get a token of it, and when it ends."""

    output: object
    emitting: frozenset[str]
    end: float


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
            self.in_hand[step] = _InHand(output, emitting, begins + took)
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
                self.course.first_s[number] = done.end
            if one.finish_reason is not None:
                self.course.last_s[number] = done.end

    def _step(self, output, lengths: dict[str, int]) -> tuple[Step, frozenset[str]]:
        """What a step computes, and who gets a token of it; `lengths` are those of the requests before it was put together."""
        decoding = prompt = context = 0
        emitting = set()
        for name, count in output.num_scheduled_tokens.items():
            one = self.scheduler.requests[name]
            # A request that was preempted in this very step begins anew.
            had, whole = one.num_computed_tokens - count, max(lengths[name], one.num_prompt_tokens)
            if had >= whole or (had and had >= one.num_prompt_tokens and count == 1):
                decoding += 1
            else:
                prompt += count
            context += had + count
            if had + count >= one.num_tokens:
                emitting.add(name)
        return Step(decoding, prompt, len(emitting), context), frozenset(emitting)

    def _note(self, step: int, now: Step, took: float) -> None:
        course, running = self.course, self.scheduler.running
        held = self.usable - self.pool.get_num_free_blocks()
        course.steps, course.busy_s = course.steps + 1, course.busy_s + took
        course.tokens, course.context = course.tokens + now.decoding + now.prompt, course.context + now.context
        course.running_max, course.blocks_max = max(course.running_max, len(running)), max(course.blocks_max, held)
        if self.watch:
            self.watch(step, [int(one.request_id) for one in running], held)
