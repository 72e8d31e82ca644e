"""What limited a level: on constructed telemetry, and on every recorded level."""

import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from conftest import make_records, make_tokens, recorded
from fp8lab.config.dimensions import BF16, FP8, fp8_kv, model_shape, weight_format
from fp8lab.config.profile_file import read_profile
from fp8lab.config.trace import arrival_times, sharegpt_like
from fp8lab.metrics.bottleneck import (
    CAUSES,
    backlog_growth,
    growth_by_chance,
    held_by_api_server,
    keeps_up,
    lasted,
    what_limited,
)
from fp8lab.metrics.performance import paging_waste, reserving_waste, steady_window
from fp8lab.metrics.resources import POWER, clock, roofline
from fp8lab.metrics.summary import ServerInfo, Summary
from fp8lab.paths import DATA
from fp8lab.results.evidence import evidence

IDLE = {
    "gpu_util_steady": 0.99,
    "frontend_cpu_max_steady": 0.5,
    "engine_cpu_max_steady": 0.6,
    "client_cpu_max_steady": 0.1,
}


def served(rate=50.0, capacity=100.0, requests=1000):
    """Records of a server that begins `capacity` requests/s at most and takes 1 s for each."""
    sent = np.arange(requests) / rate
    began = np.maximum(sent, np.arange(requests) / capacity)
    return make_records(sent, began + 0.1, began + 1.0, np.full(requests, 10))


def judged(records, telemetry=None, **changed):
    begin, end = steady_window(records, make_tokens(records))
    fields = {
        "client_busiest_core": 0.1,
        "preemptions": 0.0,
        "requests": 1000,
        "completed": 1000,
        "failed": 0,
        "valid": True,
    }
    window = {"steady_begin_s": begin, "steady_end_s": end} if end > begin else {}
    return what_limited(Summary(**fields | window | IDLE | changed), records, telemetry, power_limit_w=700)


def test_backlogs_grow_by_what_is_not_served():
    assert abs(backlog_growth(served(50, 100))) < 0.01 and keeps_up(served(50, 100))
    assert backlog_growth(served(100, 60)) == pytest.approx(0.4, abs=0.02) and not keeps_up(served(100, 60))
    burst = served().assign(scheduled_s=0.0)
    assert math.isnan(backlog_growth(burst)) and not keeps_up(burst)


@pytest.mark.parametrize("seed", range(4))
def test_a_ramp_is_no_backlog(seed):
    """A server without any limit: long answers still join long after the start, and none of it is a backlog."""
    trace, sent = sharegpt_like(2000, seed), arrival_times(2000, 100, seed=seed)
    tokens = np.asarray(trace.output_tokens)
    assert backlog_growth(make_records(sent, sent + 0.02, sent + 0.02 * tokens, tokens)) < 0.05


def test_a_growth_that_chance_makes_decides_nothing():
    """Poisson arrivals at a server without any limit: how far the slopes scatter is foretold, and none counts as a backlog."""
    slopes, foretold = [], []
    for seed in range(200):
        sent = arrival_times(200, 10, seed=seed)
        stay = np.random.default_rng(seed).gamma(4.0, 0.25, sent.size)
        records = make_records(sent, sent + 0.01, sent + stay, np.full(sent.size, 10))
        slopes.append(backlog_growth(records))
        foretold.append(growth_by_chance(records))
    assert 2 * np.std(slopes) == pytest.approx(np.mean(foretold), rel=0.25)
    grew = [slope > max(0.05, chance) for slope, chance in zip(slopes, foretold, strict=True)]
    assert np.mean(grew) < 0.06 < np.mean(np.array(slopes) > 0.05)
    assert keeps_up(served(100, 60)) is False  # long stays of its own backlog excuse nothing


def test_a_backlog_that_outlasts_the_arrivals_is_no_ramp():
    """Half a minute's arrivals for five minutes' work: the early ones too stay for longer than the arrivals go on."""
    deep = served(300, 10, requests=9000)
    assert backlog_growth(deep) < 0.05 and keeps_up(deep) is False
    found = judged(deep)
    assert found.cause.startswith("GPU") and "stayed for longer than all arrivals took" in found.evidence
    assert growth_by_chance(served(50, 100, requests=2).iloc[1:]) == math.inf


def test_failed_requests_are_no_backlog():
    records = served(50, 100)
    records.loc[::10, ["error", "last_token_s", "first_token_s"]] = ["HTTP 500", np.nan, np.nan]
    assert keeps_up(records)


def test_a_level_is_as_long_as_its_slow_requests():
    assert lasted(served(50, 100)) > 3 > lasted(served(50, 100, requests=100)) > 0
    assert lasted(served(50, 100).assign(error="HTTP 500")) == 0


@pytest.mark.parametrize("capacity, changed, cause, said", [
    (100, {}, "offered load", "no backlog grew"),
    (60, {"valid": False, "invalid_reason": "requests left late"}, "unknown", "requests left late"),
    (60, {"client_busiest_core": 0.97}, "client", "0.97 of a core"),
    (60, {"frontend_cpu_max_steady": 1.02, "gpu_util_steady": 0.69}, "API server", "no kernel running 31%"),
    (100, {"frontend_cpu_max_steady": 1.02}, "API server", "just kept up"),
    (60, {"gpu_util_steady": 0.6, "engine_cpu_max_steady": 1.0}, "EngineCore", "EngineCore 1.00"),
        (60, {"gpu_util_steady": 0.6}, "unknown", "no kernel running 40%"),
    (60, {"gpu_util_steady": 0.6, "running_steady": 90.0}, "EngineCore", "EngineCore 0.60"),
    (60, {"gpu_util_steady": 0.1, "engine_cpu_max_steady": 0.2, "running_steady": 90.0}, "unknown", "EngineCore 0.20"),
    (60, {"gpu_util_steady": 0.9}, "GPU and EngineCore", "no kernel running 10%"),
    (60, {"gpu_util_steady": 0.99}, "GPU, nearer compute", "grew by 40%"),
    (60, {"preemptions": 12.0}, "KV capacity", "12 preemptions"),
    (60, {"preemptions": 1.0, "frontend_cpu_max_steady": 1.0}, "API server", "API server 1.00"),
    (60, {"gpu_util_steady": None}, "unknown", "no GPU was sampled"),
])  # fmt: skip
def test_constructed_levels_are_attributed(capacity, changed, cause, said):
    found = judged(served(100, capacity) if capacity < 100 else served(50, capacity), **changed)
    assert found.cause == cause and said in found.evidence


def test_an_api_server_of_many_threads_is_not_full_at_one_core():
    records = served(100, 60)
    busy = {"frontend_cpu_max_steady": 1.09, "gpu_util_steady": 0.88}
    rust = ServerInfo(variant="fp8", command=(), environment={"VLLM_USE_RUST_FRONTEND": "1"})
    assert judged(records, sampled(records, 1.0), **busy).cause == "API server"
    assert judged(records, sampled(records, 1.0), **busy, server=rust).cause == "GPU and EngineCore"
    # What holds requests back is in the way, however many threads it has.
    assert judged(records, sampled(records, 0.8), **busy, server=rust).cause == "API server"


def test_waiting_for_kv_blocks_is_told_from_waiting_for_a_seat():
    full = sampled(served(100, 60), 1.0).assign(waiting=30.0, kv_cache_usage=0.99)
    assert judged(served(100, 60), full).cause == "KV capacity"
    assert judged(served(100, 60), full.assign(kv_cache_usage=0.4)).cause == "GPU, nearer compute"


def sampled(records, in_engine: float, seconds=20):
    """Telemetry of an engine that holds this share of what is in flight at each instant."""
    at = np.arange(0.0, seconds, 1.0)
    flying = [((records["sent_s"] <= t) & (records["last_token_s"] > t)).sum() for t in at]
    tokens = [records["output_tokens"][records["last_token_s"] <= t].sum() for t in at]
    return pd.DataFrame(
        {"at_s": at, "running": in_engine * np.array(flying), "waiting": 0.0, "kv_cache_usage": 0.1,
         "generation_tokens": np.array(tokens, float), "gpu_power_w": 500.0, "gpu_sm_mhz": 1980.0}
    )  # fmt: skip


def test_a_clock_that_the_power_limit_holds_back_is_the_limit():
    records = served(100, 60)
    held = sampled(records, 1.0).assign(gpu_power_w=694.0, gpu_sm_mhz=1510.0, gpu_power_limit_w=650.0)
    held.loc[0, "gpu_sm_mhz"] = 1980.0  # before the load the clock was free
    # NVML's other bits (idle 0x1, a set clock 0x2, heat 0x20) are not the power limit's.
    found = judged(records, held.assign(gpu_clock_reasons=float(POWER & 0x4)))
    assert found.cause == "GPU power limit"
    assert (
        "694 W of 650 W at 1,510 of 1,980 MHz (the power limit held the clock back in 100% of the samples)"
        in found.evidence
    )
    assert judged(records, held.assign(gpu_clock_reasons=float(0x1 | 0x2))).cause == "GPU, nearer compute"
    hot = judged(records, held.assign(gpu_clock_reasons=float(0x20)))
    assert hot.cause == "GPU, nearer compute" and "heat held the clock back in 100% of the samples" in hot.evidence
    # A card that touches its limit and keeps its clock is not limited by it.
    assert judged(records, held.assign(gpu_clock_reasons=4.0, gpu_sm_mhz=1965.0)).cause == "GPU, nearer compute"
    # In a few samples it is not what limits the level, and a GPU that waits for its host is not limited by its power.
    rarely = held.assign(gpu_clock_reasons=np.where(np.arange(len(held)) % 4, 0.0, 4.0))
    assert judged(records, rarely).cause == "GPU, nearer compute"
    assert judged(records, held.assign(gpu_clock_reasons=4.0), gpu_util_steady=0.9).cause == "GPU and EngineCore"


def test_a_run_without_the_reasons_says_what_its_power_is_consistent_with():
    records = served(100, 60)
    seen = judged(records, sampled(records, 1.0).assign(gpu_power_w=694.0, gpu_sm_mhz=1510.0))
    assert seen.cause == "GPU, nearer compute" and "consistent with the power limit" in seen.evidence
    assert "power limit" not in judged(records, sampled(records, 1.0)).evidence
    h100 = evidence(recorded("h100-80gb"))
    for repeat in (1, 2, 3):
        assert "consistent with the power limit" in h100.limit(f"bf16-rust-graphs-infrps-r{repeat}").evidence
        assert "power limit" not in h100.limit(f"fp8-rust-infrps-r{repeat}").evidence
        assert h100.clock(f"bf16-rust-graphs-infrps-r{repeat}").mhz < 1540


def test_every_reader_of_a_level_has_the_same_steady_window():
    """Where the token timestamps are not kept, the window is the stored one and not another guess."""
    seen = evidence(recorded("h100-80gb"))
    for level_id, summary in seen.summaries.items():
        level = seen.level(level_id)
        begin, end = summary.window
        assert summary.steady_output_token_throughput * (end - begin) == pytest.approx(0.6 * summary.output_tokens)
        assert clock(level.telemetry, (begin, end)).power_w == pytest.approx(summary.gpu_power_w_steady)


def test_a_full_api_server_that_holds_nothing_back_is_not_the_limit():
    """Streaming what a full GPU makes can take a whole core, too: the requests then are in the engine."""
    records = served(100, 60)
    window = steady_window(records, make_tokens(records))
    assert held_by_api_server(records, sampled(records, 1.0), window) == pytest.approx(0, abs=0.01)
    assert held_by_api_server(records, sampled(records, 0.7), window) == pytest.approx(0.3, abs=0.01)
    assert held_by_api_server(records, None, window) is None
    full = {"frontend_cpu_max_steady": 0.99}
    assert judged(records, sampled(records, 1.0), **full).cause == "GPU, nearer compute"
    held = judged(records, sampled(records, 0.7), **full)
    assert held.cause == "API server" and "30% of the requests in flight were not in the EngineCore" in held.evidence
    # A GPU that waits is not the limit, wherever the requests are.
    assert judged(records, sampled(records, 1.0), **full, gpu_util_steady=0.9).cause == "API server"


@pytest.mark.parametrize("name", ["h100-80gb", "h100-80gb-long-prompts", "h200-80gb", "emulated-h100"])
def test_every_recorded_level_is_attributed(name):
    seen = evidence(recorded(name))
    for level_id, summary in seen.summaries.items():
        found = seen.limit(level_id)
        assert found.cause in (*CAUSES, "emulated card") and found.evidence, level_id
        if found.cause == "API server":
            assert summary.frontend_cpu_max_steady >= 0.95
        if found.cause.startswith("GPU"):
            assert summary.gpu_util_steady >= 0.85
            level = seen.level(level_id)
            held = held_by_api_server(level.records, level.telemetry, level.summary.window)
            assert summary.frontend_cpu_max_steady < 0.95 or (held < 0.05 and summary.gpu_util_steady >= 0.95)
        if found.cause == "offered load":
            assert keeps_up(seen.level(level_id).records)
        if seen.run.emulated and found.cause == "emulated card":
            assert "EMULATED" in found.evidence


def test_the_roofline_is_the_arithmetic():
    """200 requests run all the time, 50 steps a second, a tenth of a cache of 400,000 tokens in use."""
    card, shape = read_profile("h200-80gb").gpu, model_shape("llama-3-8b")
    seconds = np.arange(0.0, 31.0)
    telemetry = pd.DataFrame(
        {
            "at_s": seconds, "running": 200.0, "kv_cache_usage": 0.1,
            "prompt_tokens": 8_000 * seconds, "generation_tokens": 10_000 * seconds,
        }
    )  # fmt: skip
    options = {"kv_cache_tokens": 400_000, "shape": shape, "card": card}
    found = roofline(telemetry, (5.0, 25.0), weights=BF16, fp8_kv=False, **options)
    assert found.steps_per_s == pytest.approx(50)
    weights = shape.layer_parameters * 2 + shape.vocabulary_parameters * 2
    assert found.bytes_per_s == pytest.approx(50 * (weights + 40_000 * 131072))
    assert found.memory == pytest.approx(found.bytes_per_s / 4.8e12)
    flops = 2 * (18_000 * shape.layer_parameters + 10_000 * shape.vocabulary_parameters)
    assert found.flops_per_s == pytest.approx(flops) and found.compute == pytest.approx(flops / 989e12)
    half = roofline(telemetry, (5.0, 25.0), weights=FP8, fp8_kv=True, **options)
    assert half.bytes_per_s < 0.6 * found.bytes_per_s and half.compute < 0.6 * found.compute
    assert found.nearest == "compute" and found.intensity == pytest.approx(found.flops_per_s / found.bytes_per_s)
    empty = telemetry.assign(running=np.nan)
    assert roofline(empty, (5.0, 25.0), weights=BF16, fp8_kv=False, **options) is None


@pytest.mark.parametrize("cache", ["auto", "fp8"])
def test_an_emulated_card_that_loses_nothing_is_at_its_roof(monkeypatch, cache):
    """The emulation and the roofline count the same bytes and FLOPs: 200 requests that decode in 40,000 tokens of context."""
    from fp8lab.server.emulated_gpu import SETTINGS_VARIABLE, EmulatedGpuExecutor

    card, config = (
        read_profile("h100-80gb").gpu,
        json.loads((DATA / "models" / "llama-3-8b" / "config.json").read_text()),
    )
    lost = {
        "hbm_fraction": 1,
        "flops_fraction": 1,
        "step_overhead_us": 0,
        "frontend_us_per_token": 0,
        "time_dilation": 1,
    }
    fp8 = cache == "fp8"
    lost |= {"weights": "fp8" if fp8 else "bf16", "all_reduce_us": 0, "link_bytes_per_s": 1}
    monkeypatch.setenv(SETTINGS_VARIABLE, json.dumps(dataclasses.asdict(card) | lost))
    executor = EmulatedGpuExecutor.__new__(EmulatedGpuExecutor)
    executor.model_config = SimpleNamespace(hf_text_config=SimpleNamespace(**config))
    executor.cache_config = SimpleNamespace(cache_dtype=cache)
    executor.parallel_config = SimpleNamespace(tensor_parallel_size=1)
    executor._init_executor()
    step = executor.step_seconds(200, 40_000, 200)
    seconds = np.arange(0.0, 31.0)
    telemetry = pd.DataFrame(
        {
            "at_s": seconds, "running": 200.0, "kv_cache_usage": 0.1,
            "prompt_tokens": 0 * seconds, "generation_tokens": 200 / step * seconds,
        }
    )  # fmt: skip
    found = roofline(
        telemetry,
        (5.0, 25.0),
        model_shape("llama-3-8b"),
        card,
        weights=FP8 if fp8 else BF16,
        fp8_kv=fp8,
        kv_cache_tokens=400_000,
    )
    assert found.memory == pytest.approx(1.0) and found.steps_per_s == pytest.approx(1 / step)
    # Where compute is the limit, the weights wait for it and only the KV cache is read beside it.
    step = executor.step_seconds(8000, 0, 10)
    layers, head = model_shape("llama-3-8b").flops(8000, 10)
    assert step == pytest.approx(layers / (card.fp8_flops if fp8 else card.bf16_flops) + head / card.bf16_flops)


def test_llamas_shape_is_the_public_arithmetic():
    shape = model_shape("llama-3-8b")
    norms = (2 * 32 + 1) * 4096
    assert shape.layer_parameters + 2 * shape.vocabulary_parameters + norms == 8_030_261_248
    assert shape.kv_bytes_per_token(2) == 128 * 1024 and shape.kv_bytes_per_token(1) == 64 * 1024
    assert model_shape("") is None and model_shape("no-such-model") is None


@pytest.mark.parametrize("flags, weights, kv", [
    (["--quantization", "fp8", "--kv-cache-dtype", "fp8"], True, True),
    (["--quantization=fp8", "--kv-cache-dtype=fp8_e4m3"], True, True),
    (["-q", "fp8"], True, False),
    (["--dtype", "bfloat16", "--quantization"], False, False),
])  # fmt: skip
def test_flags_are_read_as_vllm_reads_them(flags, weights, kv):
    assert (weight_format(flags) is FP8, fp8_kv(flags)) == (weights, kv)


def test_paging_wastes_the_end_of_the_last_block():
    records = make_records([0.0], [1.0], [2.0], [6])  # prompt 10, contexts 11 to 16: one block of 16
    assert paging_waste(records) == pytest.approx(1 - sum(range(11, 17)) / (6 * 16))
    assert reserving_waste(records, 27) == 0.5 and reserving_waste(records, 14) is None
