"""Virtual time: what it foretells of vLLM's scheduling is what vLLM's own scheduler does."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import NIGHTLY
from fp8lab.errors import BadInput
from fp8lab.metrics.virtual import Limits, play
from fp8lab.models.checkpoints import model_folder

BLOCK, SEATS, TOKENS, LONGEST = 4, 12, 48, 128


def seconds(step):
    """Whole numbers of a power of two, so that sums are exact in any order."""
    return 1.0 + (step.decoding + step.prompt) / 64 + step.context / 4096


@pytest.fixture(scope="module")
def vllm_scheduler():
    """Makes vLLM's own scheduler with so many blocks of KV cache, one step in hand or two."""
    import torch
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    config = EngineArgs(
        model=str(model_folder("tiny-llama")), load_format="dummy", enable_prefix_caching=False, block_size=BLOCK,
        max_num_seqs=SEATS, max_num_batched_tokens=TOKENS, max_model_len=LONGEST,
    ).create_engine_config()  # fmt: skip
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.bfloat16)

    def make(blocks: int, depth: int):
        config.cache_config.num_gpu_blocks = blocks
        config.scheduler_config.async_scheduling = depth == 2
        groups = [KVCacheGroupSpec(layer_names=["layer"], kv_cache_spec=spec)]
        cache = KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=groups)
        made = (AsyncScheduler if depth == 2 else Scheduler)(
            vllm_config=config, kv_cache_config=cache, structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK, log_stats=False,
        )  # fmt: skip
        made.use_v2_model_runner = False
        return made

    return make


def vllms_course(scheduler, load, depth):
    """What vLLM's scheduler makes of a load, with steps that take `seconds`: as its EngineCore calls it (`step_with_batch_queue`,
    or `step`), a step's tokens given to it when they are known."""
    from vllm.sampling_params import SamplingParams
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

    def request(number):
        prompt, answer, _ = load[number]
        params = SamplingParams(max_tokens=answer, temperature=0.0, ignore_eos=True)
        return Request(
            request_id=str(number), prompt_token_ids=list(range(prompt)), sampling_params=params, pooling_params=None,
            arrival_time=0.0,
        )  # fmt: skip

    usable = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    found = SimpleNamespace(first={}, last={}, seen=[], preempted=0)
    arrived, step, made, begins, known, in_hand = 0, 1, 0.0, 0.0, 0, {}
    while True:
        while arrived < len(load) and load[arrived][2] <= made:
            scheduler.add_request(request(arrived))
            arrived += 1
        for number in [n for n in in_hand if n <= known]:
            scheduled, end = in_hand.pop(number)
            names = list(scheduled.num_scheduled_tokens)
            tokens = [[7] if name in scheduled.emitting else [] for name in names]
            places = {name: i for i, name in enumerate(names)}
            said = scheduler.update_from_output(
                scheduled.output, ModelRunnerOutput(req_ids=names, req_id_to_index=places, sampled_token_ids=tokens)
            )
            for one in (one for client in said.values() for one in client.outputs):
                if one.new_token_ids:
                    found.first.setdefault(int(one.request_id), end)
                if one.finish_reason is not None:
                    found.last[int(one.request_id)] = end
        if not scheduler.has_unfinished_requests():
            if arrived == len(load):
                return found
            made = begins = max(begins, load[arrived][2])
            continue
        before = {name: (one.num_computed_tokens, one.num_tokens) for name, one in scheduler.requests.items()}
        output = scheduler.schedule()
        found.preempted += len(output.preempted_req_ids or ())
        if not output.total_num_scheduled_tokens:
            made, known = begins, step - 1
            continue
        decoding = prompt = context = 0
        emitting = set()
        for name, count in output.num_scheduled_tokens.items():
            # A request that was preempted in this very step begins anew.
            had = scheduler.requests[name].num_computed_tokens - count
            whole = max(before[name][1], scheduler.requests[name].num_prompt_tokens)
            if had >= whole or (had and had >= scheduler.requests[name].num_prompt_tokens and count == 1):
                decoding += 1
            else:
                prompt += count
            context += had + count
            if had + count >= scheduler.requests[name].num_tokens:
                emitting.add(name)
        del before
        took = seconds(SimpleNamespace(decoding=decoding, prompt=prompt, context=context))
        in_hand[step] = (
            SimpleNamespace(output=output, emitting=emitting, num_scheduled_tokens=output.num_scheduled_tokens),
            begins + took,
        )
        held = usable - scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
        found.seen.append((step, [int(one.request_id) for one in scheduler.running], held))
        made = begins + took if depth == 1 else begins
        begins += took
        step += 1
        known = max(known, step - depth)


LOADS = st.lists(
    st.tuples(st.integers(1, 70), st.integers(1, 40), st.integers(0, 40)), min_size=1, max_size=40
)  # fmt: skip


@settings(max_examples=2000 if NIGHTLY else 150, deadline=None)
@given(load=LOADS, blocks=st.integers(34, 160), depth=st.sampled_from([1, 2]))
def test_it_does_what_vllms_scheduler_does(vllm_scheduler, load, blocks, depth):
    load = sorted(((p, a, float(t)) for p, a, t in load), key=lambda one: one[2])
    real = vllms_course(vllm_scheduler(blocks, depth), load, depth)
    prompts, answers, due = zip(*load, strict=True)
    limits = Limits(requests=SEATS, step_tokens=TOKENS, blocks=blocks - 1, block=BLOCK, depth=depth)
    seen = []
    mine = play(prompts, answers, due, limits, seconds, watch=lambda *step: seen.append(step))
    assert seen == real.seen
    assert mine.preemptions == real.preempted
    assert mine.first_s.tolist() == [real.first[i] for i in range(len(load))]
    assert mine.last_s.tolist() == [real.last[i] for i in range(len(load))]
    # Steps that are alike taken together: the same, but for rounding.
    fast = play(prompts, answers, due, limits, seconds)
    assert (fast.steps, fast.preemptions) == (mine.steps, mine.preemptions)
    assert np.allclose(fast.first_s, mine.first_s, rtol=0, atol=1e-6) and np.allclose(
        fast.last_s, mine.last_s, rtol=0, atol=1e-6
    )


def test_what_can_never_run_is_refused():
    limits = Limits(requests=4, step_tokens=64, blocks=6, block=16)
    with pytest.raises(BadInput, match=r"request 1 of 98 \+ 2 tokens does not fit in a KV cache of 96"):
        play([10, 98], [2, 2], [0.0, 0.0], limits, seconds)
    with pytest.raises(BadInput, match="a server of 0 requests"):
        play([10], [2], [0.0], Limits(0, 64, 6), seconds)
