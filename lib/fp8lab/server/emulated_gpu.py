"""A vLLM executor whose GPU is a roofline model. vLLM imports it; fp8lab only names it.

    --distributed-executor-backend fp8lab.server.emulated_gpu.EmulatedGpuExecutor

What is real: vLLM's command line, HTTP server, tokenizer, scheduler, KV block manager and metrics.
What is modelled: the forward pass, as a wait. One step takes

    max(weight bytes read / HBM, FLOPs / peak) + KV bytes read / HBM + a constant,

with the bytes and FLOPs of `fp8lab.config.dimensions`. Cards that share each layer (tensor parallel) do their part
of them, and reduce their results twice a layer: 2 (n - 1) / n of the activations over the link, and a constant. A step takes
never less than the tokens that it emits x the API server's serial cost a token. With a step model that was fitted to a real
card (`metrics.step_model`) a step takes what that says instead. Overlap of scheduling
and computing, which vLLM has on a GPU, is modelled too: back-to-back steps are timed from the end of the
last one. Tokens have no meaning. The card comes as JSON in the environment variable FP8LAB_EMULATED_GPU.
Written against vLLM 0.32.0.
"""

import functools
import json
import multiprocessing
import os
import signal
import time
from concurrent.futures import Future

import torch
from vllm.logger import init_logger
from vllm.v1.engine import utils as engine
from vllm.v1.executor.uniproc_executor import UniProcExecutor
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.worker.worker_base import CompilationTimes

from ..config.dimensions import FORMATS, ModelShape
from ..metrics.step_model import StepModel
from ..metrics.virtual import Step, attended

SETTINGS_VARIABLE = "FP8LAB_EMULATED_GPU"
GIB = 2**30

# Below vLLM's own package, so that its log configuration applies and the lines reach the server's log.
logger = init_logger("vllm.fp8lab.emulated_gpu")

# vLLM's CPU build spawns its EngineCore, which then imports vLLM once more: OpenMP's threads do not survive a fork. Nothing
# is computed here, so it is forked: a start takes half the CPU time. The API server imports this before it starts one.
engine.get_mp_context = functools.partial(multiprocessing.get_context, "fork")
# The parent's event loop hears of signals through a descriptor that a forked process would write the child's into.
os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))

# What a worker answers that has nothing to do.
_ANSWERS = {
    "get_supported_tasks": ("generate",), "get_supported_kv_cache_layouts": ["LBHNC"], "set_kv_cache_layout": None,
    "compile_or_warm_up_model": CompilationTimes(language_model=0.0, encoder=0.0), "initialize_from_config": None,
    "reset_mm_cache": None, "sample_tokens": None,
}  # fmt: skip


class EmulatedGpuExecutor(UniProcExecutor):
    """Answers what vLLM asks of its workers, without a worker."""

    def _init_executor(self) -> None:
        self.driver_worker = None
        self.card = json.loads(os.environ[SETTINGS_VARIABLE])
        self.shape = ModelShape(self.model_config.hf_text_config)
        weights = FORMATS[self.card["weights"]]
        self.kv_dtype = torch.uint8 if "fp8" in self.cache_config.cache_dtype else torch.bfloat16
        self.shared_by = self.parallel_config.tensor_parallel_size
        self.weight_bytes = self.shape.weight_bytes(weights) // self.shared_by
        self.weight_bytes_read = self.shape.weight_bytes_read(weights) // self.shared_by
        self.kv_bytes_per_token = self.shape.kv_bytes_per_token(self.kv_dtype.itemsize) // self.shared_by
        self.hbm = self.card["hbm_bytes_per_s"] * self.card["hbm_fraction"]
        peaks = [self.card["fp8_flops" if eight else "bf16_flops"] for eight in (weights.eight_bit, weights.head)]
        self.layer_flops, self.head_flops = (peak * self.card["flops_fraction"] * self.shared_by for peak in peaks)
        self.dilation = self.card["time_dilation"]
        fitted = self.card.get("step_model")
        self.model = StepModel(**fitted | {"levels": ()}) if fitted else None
        self.requests: dict[str, list[int]] = {}  # id -> [tokens it has, of those computed]
        self.free_at = 0.0
        logger.info("EMULATED GPU %s: Model loading took %.2f GiB", self.card["name"], self.weight_bytes / GIB)

    def collective_rpc(self, method, timeout=None, args=(), kwargs=None, non_block=False, single_value=False, **_):
        known = method in _ANSWERS
        answer = _ANSWERS[method] if known else getattr(self, f"_{method}")(*args, **(kwargs or {}))
        result = answer if single_value else [answer]
        if not non_block:
            return result
        future: Future = Future()
        future.set_result(result)
        return future

    def check_health(self) -> None:
        return

    def shutdown(self) -> None:
        return

    # What a worker is asked once, at start.

    def _get_kv_cache_spec(self):
        spec = FullAttentionSpec(
            block_size=self.cache_config.block_size, num_kv_heads=self.shape.kv_heads // self.shared_by,
            head_size=self.shape.head_size, dtype=self.kv_dtype,
        )  # fmt: skip
        return {f"model.layers.{i}.self_attn.attn": spec for i in range(self.shape.layers)}

    def _determine_available_memory(self) -> int:
        if self.model:
            return self.model.kv_tokens * self.kv_bytes_per_token
        budget = self.card["memory_gib"] * GIB * self.cache_config.gpu_memory_utilization
        available = budget - self.weight_bytes - self.card["reserved_gib"] * GIB
        if available <= 0:
            raise ValueError(f"the emulated card has no memory left for KV cache ({available / GIB:.1f} GiB)")
        return int(available)

    # What a worker is asked at every step.

    def _execute_model(self, scheduled) -> ModelRunnerOutput:
        for request in scheduled.finished_req_ids:
            self.requests.pop(request, None)
        for new in scheduled.scheduled_new_reqs:
            self.requests[new.req_id] = [len(new.prompt_token_ids), new.num_computed_tokens]
        cached = scheduled.scheduled_cached_reqs
        for request, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
            self.requests[request][1] = computed
        context, decoding, pairs, tokens_of = 0, 0, 0.0, {}
        for request, tokens in scheduled.num_scheduled_tokens.items():
            state = self.requests[request]
            decodes = state[1] > 0 and state[0] - state[1] == 1
            decoding += decodes
            pairs += 0.0 if decodes else attended(state[1], tokens)
            state[1] += tokens
            context += state[1]
            # A request whose tokens are all computed gets another one; one that is only part of the way, through a long
            # prompt or after it was preempted, is in the answer with none.
            tokens_of[request] = [self.shape.some_token] if state[1] == state[0] else []
            state[0] += len(tokens_of[request])
        if scheduled.num_scheduled_tokens:
            emitted = sum(map(len, tokens_of.values()))
            tokens = scheduled.total_num_scheduled_tokens
            if self.model:
                self._wait(self.model.seconds(Step(decoding, tokens - decoding, emitted, context, pairs)))
            else:
                self._wait(self.step_seconds(tokens, context, emitted))
        places = {request: i for i, request in enumerate(tokens_of)}
        return ModelRunnerOutput(list(tokens_of), places, sampled_token_ids=list(tokens_of.values()))

    def step_seconds(self, tokens: int, context_tokens: int, emitted: int) -> float:
        """Model time of one step: `tokens` computed, `context_tokens` of KV read, `emitted` streamed."""
        layers, head = self.shape.flops(tokens, emitted)
        matrices = max(self.weight_bytes_read / self.hbm, layers / self.layer_flops + head / self.head_flops)
        attention = context_tokens * self.kv_bytes_per_token / self.hbm
        gpu = matrices + attention + self._all_reduces(tokens) + self.card["step_overhead_us"] * 1e-6
        return max(gpu, emitted * self.card["frontend_us_per_token"] * 1e-6)

    def _all_reduces(self, tokens: int) -> float:
        """Seconds for the two all-reduces of each layer: each card sends and receives its share of the BF16 activations."""
        n = self.shared_by
        moved = 2 * (n - 1) / n * 2 * tokens * self.shape.hidden
        each = self.card["all_reduce_us"] * 1e-6 + moved / self.card["link_bytes_per_s"]
        return 2 * self.shape.layers * each if n > 1 else 0.0

    def _wait(self, seconds: float) -> None:
        now = time.monotonic()
        wall = seconds * self.dilation
        # An engine that came back within the last step's time was overlapped with it; otherwise it was idle.
        start = self.free_at if now - self.free_at < wall else now
        self.free_at = max(now, start + wall)
        time.sleep(self.free_at - now)
