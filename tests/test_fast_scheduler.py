"""The fast path through vLLM's scheduler: whatever comes in, what is scheduled and what comes of it is vLLM's own."""

import dataclasses
import json
import os
import subprocess
import sys
import zlib
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from conftest import NIGHTLY
from fp8lab.models.checkpoints import model_folder
from fp8lab.server.fast_scheduler import FastScheduler

BLOCK, EOS, STOP = 4, 48, 47
EXAMPLES = 3000 if NIGHTLY else 150


def engine_config(caching: bool, **sizes):
    """vLLM's configuration of the tiny model."""
    init_none_hash(sha256)
    folder = str(model_folder("tiny-llama"))
    arguments = {"load_format": "dummy", "enable_prefix_caching": caching, "block_size": BLOCK, **sizes}
    return EngineArgs(model=folder, **arguments).create_engine_config()


@pytest.fixture(scope="module")
def configs():
    """vLLM's configuration, by whether prefix caching is on."""
    sizes = {"max_num_seqs": 24, "max_num_batched_tokens": 64, "max_model_len": 128}
    made = {caching: engine_config(caching, **sizes) for caching in (False, True)}
    return made.__getitem__  # a function: hypothesis would print all of them


def scheduler(kind, config, blocks: int, v2: bool):
    config.cache_config.num_gpu_blocks, size = blocks, config.cache_config.block_size
    spec = FullAttentionSpec(block_size=size, num_kv_heads=1, head_size=8, dtype=torch.bfloat16)
    groups = [KVCacheGroupSpec(layer_names=["layer"], kv_cache_spec=spec)]
    cache = KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=groups)
    made = kind(
        vllm_config=config, kv_cache_config=cache, structured_output_manager=StructuredOutputManager(config),
        block_size=size, log_stats=True,
    )  # fmt: skip
    made.use_v2_model_runner = v2
    return made


@dataclasses.dataclass(frozen=True)
class Asked:
    prompt: int
    answer: int
    shared: bool = False
    stop: bool = False
    min_tokens: int = 0
    client: int = 0


def request(number: int, asked: Asked, caching: bool) -> Request:
    params = SamplingParams(
        max_tokens=asked.answer, min_tokens=min(asked.min_tokens, asked.answer), temperature=0.0,
        stop_token_ids=[STOP] if asked.stop else None, ignore_eos=not asked.stop,
    )  # fmt: skip
    params.update_from_generation_config({}, EOS)
    # Those that share a prefix can find it in the cache.
    prompt = list(range(asked.prompt)) if asked.shared else [number + 1000 + i for i in range(asked.prompt)]
    return Request(
        request_id=f"r{number}", client_index=asked.client, prompt_token_ids=prompt, sampling_params=params,
        pooling_params=None, arrival_time=0.0, block_hasher=get_request_block_hasher(BLOCK, sha256) if caching else None,
    )  # fmt: skip


def answer(scheduled, held) -> ModelRunnerOutput:
    """What a model might say: a token by request and place, none for a prompt that is not read to its end."""
    names = list(scheduled.num_scheduled_tokens)
    tokens = []
    for name in names:
        one = held.requests.get(name)
        done = one is not None and not one.is_prefill_chunk
        tokens.append([zlib.crc32(f"{name} {one.num_computed_tokens}".encode()) % 50] if done else [])
    return ModelRunnerOutput(
        req_ids=names, req_id_to_index={n: i for i, n in enumerate(names)}, sampled_token_ids=tokens
    )


def seen_schedule(output) -> SimpleNamespace:
    """All of a step that a worker is told, comparable."""
    new = [
        (one.req_id, one.prompt_token_ids, one.block_ids, one.num_computed_tokens) for one in output.scheduled_new_reqs
    ]
    cached = dataclasses.asdict(output.scheduled_cached_reqs)
    rest = {
        field.name: getattr(output, field.name)
        for field in dataclasses.fields(output)
        if field.name not in ("scheduled_new_reqs", "scheduled_cached_reqs")
    }
    return SimpleNamespace(new=new, cached=cached, order=list(output.num_scheduled_tokens), **rest)


def seen_outputs(outputs) -> dict:
    """All that clients are told, by client and request; times left out."""
    told = {}
    for client, found in outputs.items():
        stats = found.scheduler_stats
        each = {
            one.request_id: (
                one.new_token_ids, one.finish_reason, one.stop_reason, [event.type for event in one.events or ()],
                one.prefill_stats and vars(one.prefill_stats) if hasattr(one.prefill_stats, "__dict__") else str(one.prefill_stats),
            )
            for one in found.outputs
        }  # fmt: skip
        counted = stats and (
            stats.num_running_reqs,
            stats.num_waiting_reqs,
            stats.kv_cache_usage,
            str(stats.prefix_cache_stats),
        )
        told[client] = (each, found.finished_requests, counted)
    return told


def blocks_of(held) -> dict:
    manager = held.kv_cache_manager.coordinator.single_type_managers[0]
    tables = {name: [block.block_id for block in blocks] for name, blocks in manager.req_to_blocks.items()}
    return {
        "tables": tables,
        "cached": dict(manager.num_cached_block),
        "free": held.kv_cache_manager.block_pool.get_num_free_blocks(),
    }


def state_of(held) -> list:
    return [
        (one.request_id, one.status, one.num_computed_tokens, one.num_output_placeholders, one.num_in_flight_tokens,
         list(one._all_token_ids), one.is_prefill_chunk, one.num_preemptions, one.next_decode_eligible_step)
        for one in held.requests.values()
    ]  # fmt: skip


ASKED = st.builds(
    Asked, prompt=st.integers(1, 90), answer=st.integers(1, 30), shared=st.booleans(), stop=st.booleans(),
    min_tokens=st.integers(0, 5), client=st.integers(0, 1),
)  # fmt: skip
DEEDS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.lists(ASKED, min_size=1, max_size=8)),
        st.tuples(st.just("step"), st.integers(1, 12)),
        st.tuples(st.just("abort"), st.integers(0, 40)),
    ),
    min_size=2, max_size=14,
)  # fmt: skip


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    deeds=DEEDS,
    blocks=st.sampled_from([60, 120, 4000]),
    caching=st.booleans(),
    v2=st.booleans(),
    ahead=st.integers(1, 2),
)
def test_the_same_is_scheduled_and_comes_of_it(configs, deeds, blocks, caching, v2, ahead):
    both = [scheduler(kind, configs(caching), blocks, v2) for kind in (AsyncScheduler, FastScheduler)]
    assert both[1]._fast
    added, under_way = 0, [[], []]

    def step():
        outputs = []
        for held, waiting in zip(both, under_way, strict=True):
            planned = held.schedule()
            waiting.append((planned, answer(planned, held)))
            outputs.append(planned)
        assert seen_schedule(outputs[0]) == seen_schedule(outputs[1])
        if len(under_way[0]) >= ahead or not outputs[0].num_scheduled_tokens:
            take_in()

    def take_in():
        told = [
            seen_outputs(held.update_from_output(*waiting.pop(0)))
            for held, waiting in zip(both, under_way, strict=True)
        ]
        assert told[0] == told[1]
        assert list(told[0]) == list(told[1])
        assert blocks_of(both[0]) == blocks_of(both[1])
        assert state_of(both[0]) == state_of(both[1])
        assert [r.request_id for r in both[0].running] == [r.request_id for r in both[1].running]

    for what, value in deeds:
        if what == "add":
            for asked in value:
                for held in both:
                    held.add_request(request(added, asked, caching))
                added += 1
        elif what == "abort":
            for held in both:
                held.finish_requests([f"r{value}"], RequestStatus.FINISHED_ABORTED)
        else:
            for _ in range(value):
                step()
    for _ in range(400):
        if not both[0].has_unfinished_requests() and not under_way[0]:
            break
        step()
    assert not both[0].has_unfinished_requests() and not both[1].has_unfinished_requests()


def test_what_decodes_takes_the_fast_path(configs):
    held = scheduler(FastScheduler, configs(False), 4000, v2=False)
    for number in range(20):
        held.add_request(request(number, Asked(prompt=3, answer=30), caching=False))
    taken = []
    for _ in range(20):
        planned = held.schedule()
        taken.append(len(held._under_way[-1][1]) if held._under_way else 0)
        held.update_from_output(planned, answer(planned, held))
    assert taken[-1] == 20
    assert not held._under_way


def test_a_version_that_is_not_known_serves_vllms_own(configs, monkeypatch):
    monkeypatch.setattr("vllm.__version__", "0.99.0")
    held = scheduler(FastScheduler, configs(False), 4000, v2=False)
    assert not held._fast
    held.add_request(request(0, Asked(prompt=3, answer=2), caching=False))
    planned = held.schedule()
    assert planned.num_scheduled_tokens == {"r0": 3}
    held.update_from_output(planned, answer(planned, held))


ENGINES = """
import json, sys
from vllm import LLM, SamplingParams
prompts = [f"{i} " + "time year people way day " * (1 + i % 13) for i in range(48)]
params = [
    SamplingParams(temperature=0.7 * (i % 2), top_p=1.0 if i % 3 else 0.9, max_tokens=4 + i % 40, min_tokens=i % 4,
                   stop_token_ids=[1000 + i], ignore_eos=bool(i % 5), presence_penalty=0.5 * (i % 4 == 0))
    for i in range(48)
]
told = []
for kind in ("vllm.v1.core.sched.async_scheduler.AsyncScheduler", "fp8lab.server.fast_scheduler.FastScheduler"):
    llm = LLM(sys.argv[1], load_format="dummy", enforce_eager=True, max_num_seqs=32, max_num_batched_tokens=256, max_model_len=256,
              enable_prefix_caching=bool(int(sys.argv[2])), scheduler_cls=kind, async_scheduling=True, seed=0, disable_log_stats=False)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    told.append([(list(one.outputs[0].token_ids), one.outputs[0].finish_reason, one.outputs[0].stop_reason) for one in outputs])
    del llm
print(json.dumps(told))
"""


@pytest.mark.servers
@pytest.mark.parametrize("caching", [0, 1] if NIGHTLY else [1])
def test_a_real_engine_answers_the_same(caching):
    environment = os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-c", ENGINES, str(model_folder("tiny-llama")), str(caching)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs, mine = json.loads(done.stdout.splitlines()[-1])
    assert theirs == mine
    assert {len(tokens) for tokens, *_ in mine} > {4, 10, 20}
