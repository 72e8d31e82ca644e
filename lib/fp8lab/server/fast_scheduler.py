"""EXPERIMENTAL: vLLM's scheduler with a fast path for requests that decode, for `--scheduler-cls`.

    --scheduler-cls fp8lab.server.fast_scheduler.FastScheduler

vLLM spends some 20 to 35 µs of EngineCore CPU on each running request in each step. Fifteen of sixteen such steps need
nothing but counters: the request gets one token, and its last KV block has room. Those are done here, by the same rules,
in two plain loops; everything else (prompts, new and preempted requests, stops, a cache that runs full) is left to vLLM's
own code, which is called with what remains. Configurations and versions of vLLM that this was not tested with get vLLM's
scheduler unchanged, and the log says so.

Names as of vLLM 0.26 and 0.32 (vllm/v1/core/sched/scheduler.py, async_scheduler.py, vllm/v1/core/kv_cache_manager.py).
"""

import dataclasses
from collections import deque

import vllm
from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.request import Request, RequestStatus

# Below vLLM's own package, so that its log configuration applies and the lines reach the server's log.
logger = init_logger("vllm.fp8lab.fast_scheduler")

VERSIONS = ("0.26.", "0.32.")
_RUNNING = RequestStatus.RUNNING
# How many requests may run; and of a preempted request the tokens under way that count no more.
_SEATS, _STALE = ("max_num_running_reqs",), "async_tokens_to_discard"
if vllm.__version__.startswith("0.32."):
    _SEATS, _STALE = (*_SEATS, "max_num_active_reqs"), "num_stale_output_tokens"
# Asynchronous scheduling is one step ahead; a step that failed is never heard of again.
_MOST_UNDER_WAY = 16


class FastScheduler(AsyncScheduler):
    """vLLM's asynchronous scheduler; what it schedules, and what comes of it, is the same."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        why = self._unsupported()
        self._fast = not why
        if why:
            logger.warning("fast path off, vLLM's own scheduler serves: %s", why)
            return
        logger.info("EXPERIMENTAL: decoding requests take a fast path through the scheduler")
        manager = self.kv_cache_manager.coordinator.single_type_managers[0]
        self._blocks_of, self._block_size = manager.req_to_blocks, manager.block_size
        self._cached_of = manager.num_cached_block
        self._stagger = getattr(self, "decode_stagger", self.pp_size)
        # Each step with its requests that took the fast path, until the step's tokens come back.
        self._under_way: deque[tuple[SchedulerOutput, list[Request]]] = deque(maxlen=_MOST_UNDER_WAY)

    def _unsupported(self) -> str:
        """What of this configuration the fast path does not know; empty when it knows all."""
        known = {
            f"vLLM {vllm.__version__} (tested: {', '.join(v + 'x' for v in VERSIONS)})": vllm.__version__.startswith(
                VERSIONS
            ),
            "speculative decoding": self.num_spec_tokens == 0 and self.num_sampled_tokens_per_step == 1,
            "LoRA": not self.lora_config,
            "a connector": self.connector is None and self.ec_connector is None,
            "an encoder": not self.is_encoder_decoder,
            "a priority policy": self.policy == SchedulingPolicy.FCFS,
            "pipeline parallel": not self.use_pp,
            "deferred freeing of blocks": not self.defer_block_free,
            "returned experts": not getattr(self, "enable_return_routed_experts", False)
            and getattr(self, "aux_output_connector", None) is None,
            "performance metrics": not (self.perf_metrics and self.perf_metrics.is_enabled()),
            "a threshold for long prompts": not self.scheduler_config.long_prefill_token_threshold,
            "a sampling mask": not getattr(self, "return_sampling_mask", False),
        }
        managers = self.kv_cache_manager.coordinator.single_type_managers
        known["a KV cache other than one of full attention"] = [type(one) for one in managers] == [FullAttentionManager]
        sharded = self.parallel_config.decode_context_parallel_size * self.parallel_config.prefill_context_parallel_size
        known["context parallel"] = sharded == 1
        return ", ".join(what for what, fine in known.items() if not fine)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        running = self.running
        # Throttled, what is read of prompts depends on whether anything decodes.
        if not self._fast or throttle_prefills or self._pause_state.name != "UNPAUSED" or not self._room():
            return super().schedule(throttle_prefills)
        taken, scheduled, new_blocks, computed, output = self._take(running)
        if not taken:
            return super().schedule()
        # vLLM schedules the others as if those taken were not there.
        limits = {name: getattr(self, name) for name in ("max_num_scheduled_tokens", *_SEATS)}
        self.running = running[taken:]
        self.max_num_scheduled_tokens -= len(scheduled)
        for name in _SEATS:
            setattr(self, name, limits[name] - taken)
        try:
            others = super().schedule()
        finally:
            self.running = running[:taken] + self.running
            for name, value in limits.items():
                setattr(self, name, value)
        return self._joined(others, scheduled, new_blocks, computed, output)

    def _room(self) -> bool:
        """Whether no allocation of this step can fail: those that can are vLLM's to decide (preemption, admission)."""
        most = len(self.running) + self.max_num_running_reqs
        most += (self.max_num_scheduled_tokens + self.max_model_len) // self._block_size
        watermark = getattr(self.kv_cache_manager, "watermark_blocks", 0)
        return self.kv_cache_manager.block_pool.get_num_free_blocks() > most + watermark

    def _take(self, running: list[Request]):
        """Schedules one token for each request from the front of `running` on that decodes and needs nothing else; ends at
        the first that does. Returns how many were taken, those that are scheduled (one whose last token is under way is
        not), and for each its new blocks, computed tokens and output tokens."""
        scheduled, new_blocks, computed_tokens, output_tokens = [], [], [], []
        blocks_of, block_size, most = self._blocks_of, self._block_size, self.max_model_len - 1
        caching, cached_of = self.kv_cache_manager.enable_caching, self._cached_of
        allocate, v2 = self.kv_cache_manager.allocate_slots, self.use_v2_model_runner
        step = self.current_step + 1
        last_step = self.prev_step_scheduled_req_ids if not v2 else None
        left = self.max_num_scheduled_tokens
        taken = 0
        for request in running:
            computed, ahead = request.num_computed_tokens, request.num_output_placeholders
            if request.is_prefill_chunk or computed >= most or left == 0 or not _plain(request):
                break
            if ahead > 0 and computed + 2 - ahead >= request.num_prompt_tokens + request.max_tokens:
                taken += 1  # its last token is under way
                continue
            name, tokens = request.request_id, len(request._all_token_ids)
            if tokens + ahead - computed != 1 or step < request.next_decode_eligible_step:
                break
            if last_step is not None and name not in last_step:
                break
            blocks = None
            full = caching and cached_of.get(name, 0) < min(computed + 1, tokens) // block_size
            if full or computed >= len(blocks_of[name]) * block_size:
                blocks = allocate(request, 1, num_lookahead_tokens=self.num_lookahead_tokens).get_block_ids(
                    allow_none=True
                )
            taken += 1
            left -= 1
            scheduled.append(request)
            new_blocks.append(blocks)
            computed_tokens.append(computed)
            output_tokens.append(len(request._output_token_ids) + ahead)
            request.num_computed_tokens = computed + 1
            request.num_in_flight_tokens += 1
            request.num_output_placeholders = ahead + 1
            request.spec_token_ids = self._spec_token_placeholders
            if v2:
                request.next_decode_eligible_step = step + self._stagger
        return taken, scheduled, new_blocks, computed_tokens, output_tokens

    def _joined(self, others: SchedulerOutput, scheduled, new_blocks, computed, output) -> SchedulerOutput:
        """vLLM's output for the others with those scheduled here in front, where its own loop would have put them."""
        mine = dict.fromkeys([request.request_id for request in scheduled], 1)
        cached = others.scheduled_cached_reqs
        others.scheduled_cached_reqs = dataclasses.replace(
            cached,
            req_ids=[*mine, *cached.req_ids],
            new_block_ids=new_blocks + cached.new_block_ids,
            num_computed_tokens=computed + cached.num_computed_tokens,
            num_output_tokens=output + cached.num_output_tokens,
        )
        others.num_scheduled_tokens = mine | others.num_scheduled_tokens
        others.total_num_scheduled_tokens += len(mine)
        if not self.use_v2_model_runner:
            self.prev_step_scheduled_req_ids.update(mine)
        if getattr(others, "num_common_prefix_blocks", None):  # vLLM 0.32 leaves it empty
            first = self.running[0].request_id
            others.num_common_prefix_blocks = self.kv_cache_manager.get_num_common_prefix_blocks(first)
        self._under_way.append((others, scheduled))
        return others

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output
    ) -> dict[int, EngineCoreOutputs]:
        if self._fast:
            for entry in self._under_way:
                if entry[0] is scheduler_output:
                    self._under_way.remove(entry)
                    return self._updated(scheduler_output, entry[1], model_runner_output)
        return super().update_from_output(scheduler_output, model_runner_output)

    def _updated(
        self, scheduler_output: SchedulerOutput, requests: list[Request], answer
    ) -> dict[int, EngineCoreOutputs]:
        odd = answer.logprobs or answer.prompt_logprobs_dict or answer.pooler_output or answer.num_nans_in_logits
        if odd or answer.kv_connector_output:
            return super().update_from_output(scheduler_output, answer)
        left = dict(scheduler_output.num_scheduled_tokens)
        # A client for whom vLLM's own code will tell something keeps its place among the others with an empty list.
        outputs: dict[int, list[EngineCoreOutput]] = {}
        index_of, sampled, most = answer.req_id_to_index, answer.sampled_token_ids, self.max_model_len
        caching, cache = self.kv_cache_manager.enable_caching, self.kv_cache_manager.cache_blocks
        for request in requests:
            name = request.request_id
            if request.is_finished():
                continue
            told = outputs.setdefault(request.client_index, [])
            if (
                request.status is not _RUNNING
                or getattr(request, _STALE)
                or request.events
                or request.prefill_stats is not None
            ):
                continue
            tokens = sampled[index_of[name]]
            if len(tokens) != 1 or _stops(request, tokens[0], most):
                continue
            del left[name]
            request.append_output_token_ids(tokens[0])
            request.num_in_flight_tokens -= 1
            request.num_output_placeholders -= 1
            if caching:
                cache(request, request.num_computed_tokens - request.num_output_placeholders)
            told.append(EngineCoreOutput(request_id=name, new_token_ids=tokens))
        found = super().update_from_output(dataclasses.replace(scheduler_output, num_scheduled_tokens=left), answer)
        return _merged(outputs, found) if any(outputs.values()) else found


def _merged(
    mine: dict[int, list[EngineCoreOutput]], found: dict[int, EngineCoreOutputs]
) -> dict[int, EngineCoreOutputs]:
    """`mine` in front of what vLLM `found`, by client; the step's statistics go to the first, and what was made for them
    alone goes."""
    stats = next((one.scheduler_stats for one in found.values() if one.scheduler_stats is not None), None)
    merged = {}
    for client in dict.fromkeys([*mine, *found]):
        theirs = found.get(client) or EngineCoreOutputs(outputs=[])
        theirs.outputs = mine.get(client, []) + list(theirs.outputs)
        theirs.scheduler_stats = None
        if theirs.outputs or theirs.finished_requests:
            merged[client] = theirs
    next(iter(merged.values())).scheduler_stats = stats
    return merged


def _plain(request: Request) -> bool:
    """Whether a request has nothing but tokens: no pictures, grammar, adapter, session or trace."""
    return (
        request.status is _RUNNING
        and request.structured_output_request is None
        and not request.mm_features
        and request.pooling_params is None
        and not request.resumable
        and request.trace_headers is None
        and request.sampling_params.repetition_detection is None
    )


def _stops(request: Request, token: int, most: int) -> bool:
    """Whether `token` may end the request; vLLM then decides."""
    asked = request.sampling_params
    return (
        token == asked.eos_token_id
        or token in (asked.stop_token_ids or ())
        or len(request._all_token_ids) + 1 >= most
        or len(request._output_token_ids) + 1 >= request.max_tokens
    )
