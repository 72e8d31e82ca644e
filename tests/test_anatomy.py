"""A step taken apart: kernels by kind, floors from the datasheet, the EngineCore's stages."""

import dataclasses

import pytest

import fp8lab as lab
from fp8lab.config.dimensions import BF16, FP8, model_shape
from fp8lab.config.profile_file import read_profile
from fp8lab.experiment import anatomy as experiment
from fp8lab.metrics import anatomy
from fp8lab.metrics.anatomy import Work
from fp8lab.report import claims, notebooks
from fp8lab.report.anatomy import host_adds

# Names as profilers on a Hopper card show them.
NAMES = {
    "void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<flash::CollectiveMainloop": anatomy.ATTENTION,
    "flash_fwd_splitkv_combine_kernel": anatomy.ATTENTION,
    "kernel_mha(unsigned int, float, float const*, Vec<__nv_bfloat16, 128u>*": anatomy.ATTENTION,
    "void flashinfer::PrefillWithKVCacheKernel<flashinfer::CollectiveMainloop": anatomy.ATTENTION,
    "cutlass_3x_gemm_sm90_fp8<cutlass::float_e4m3_t>": anatomy.LAYERS,
    "nvjet_sm90_tst_128x256_64x4_1x2_h_bz_coopA_TNT": anatomy.LAYERS,
    "void cublasLt::splitKreduce_kernel<32, 16, int, __nv_bfloat16>": anatomy.LAYERS,
    "void vllm::reshape_and_cache_flash_kernel<__nv_bfloat16, unsigned char>": anatomy.KV_WRITE,
    "void vllm::dynamic_per_token_scaled_fp8_quant_kernel_strided<c10::BFloat16>": anatomy.QUANTISATION,
    "triton_red_fused__to_copy_abs_amax_clamp_mul_reciprocal_0": anatomy.QUANTISATION,
    "triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_1": anatomy.NORMS,
    "triton_red_fused__to_copy_abs_clamp_cutlass_scaled_mm_div_max_mul_reciprocal_silu_slice_unsqueeze_2": anatomy.QUANTISATION,
    "triton_poi_fused_mul_silu_slice_1": anatomy.NORMS,
    "_gumbel_sample_kernel": anatomy.SAMPLING,
    "Memcpy DtoD (Device -> Device)": anatomy.COPIES,
    "somebody_elses_kernel": anatomy.OTHER,
}


@pytest.mark.parametrize("name", NAMES)
def test_a_kernel_is_known_by_its_name(name):
    assert anatomy.kind_of(name) == NAMES[name]


def _trace(steps) -> dict:
    """A Chrome trace as vLLM's profiler writes it: `steps` are (annotation, [(kernel, us)]); kernels of a CUDA graph share
    the launch's correlation."""
    events, at, gpu_at = [], 1000.0, 1500.0
    for number, (annotation, kernels) in enumerate(steps):
        events.append({"ph": "X", "cat": "user_annotation", "name": annotation, "ts": at, "dur": 50.0, "args": {}})
        graph = {"correlation": 10 * number + 1}
        events.append(
            {"ph": "X", "cat": "cuda_runtime", "name": "cudaGraphLaunch", "ts": at + 10, "dur": 5, "args": graph}
        )
        for i, (name, duration) in enumerate(kernels):
            args = graph
            if i == len(kernels) - 1:  # launched by itself, when the annotation has ended
                args = {"correlation": 10 * number + 2}
                events.append(
                    {
                        "ph": "X",
                        "cat": "cuda_runtime",
                        "name": "cudaLaunchKernel",
                        "ts": at + 60,
                        "dur": 5,
                        "args": args,
                    }
                )
            events.append({"ph": "X", "cat": "kernel", "name": name, "ts": gpu_at, "dur": duration, "args": args})
            gpu_at += duration + 1
        at += 100
    return {"traceEvents": [{"ph": "M", "name": "process_name"}, *events]}


DECODE = "execute_256_context_0(sq0sk0sqsq0sqsk0)_generation_256(sq256sk76800sqsq256sqsk76800)"
MIXED = "execute_80_context_1(sq73sk482sqsq5329sqsk35186)_generation_7(sq7sk1799sqsq7sqsk1799)"
LAYERS = [
    ("nvjet_a", 100.0),
    ("FlashAttnFwdSm90", 40.0),
    ("nvjet_b", 60.0),
    ("nvjet_head", 30.0),
    ("_gumbel_sample_kernel", 5.0),
]


def test_kernels_belong_to_the_step_that_launched_them_and_add_up_to_its_time():
    steps = anatomy.read_steps(_trace([(DECODE, LAYERS), (DECODE, LAYERS), (MIXED, LAYERS), (DECODE, LAYERS)]))
    assert [step.work.name for step in steps] == ["decode", "mixed"]  # the first and the last may be cut
    assert steps[0].work == Work(running=256, decode_tokens=256, decode_context=76800)
    assert steps[1].work == Work(1, 73, 482, 35186, 7, 7, 1799)
    times = anatomy.kernel_times(steps[:1])
    assert times == {
        anatomy.ATTENTION: {"FlashAttnFwdSm90": 0.04}, anatomy.LAYERS: {"nvjet_a": 0.1, "nvjet_b": 0.06},
        anatomy.HEAD: {"nvjet_head": 0.03}, anatomy.SAMPLING: {"_gumbel_sample_kernel": 0.005},
    }  # fmt: skip
    assert sum(sum(each.values()) for each in times.values()) == pytest.approx(steps[0].busy_us / 1e3)


def test_kernels_beside_each_other_count_once():
    together = anatomy.Step(Work(), tuple(anatomy.Kernel("a", at, 10.0) for at in (0.0, 4.0, 20.0)))
    assert together.busy_us == 24.0


def test_a_trace_without_steps_or_of_another_kind_gives_none():
    assert anatomy.read_steps({}) == []
    assert anatomy.read_steps(_trace([("forward", LAYERS)] * 4)) == []


def test_floors_are_the_datasheets_arithmetic():
    profile = read_profile("h100-80gb")
    shape, card = model_shape(profile.model.shapes), profile.gpu
    decode = Work(running=64, decode_tokens=64, decode_context=64 * 300)
    bf16, fp8 = (anatomy.floors_ms(decode, shape, card, weights=FP8 if on else BF16, fp8_kv=on) for on in (False, True))
    layers_gb, kv_gb = 2 * shape.layer_parameters / 1e9, 64 * 300 * 131072 / 1e9  # 128 KiB a token in BF16
    assert bf16[anatomy.LAYERS] == pytest.approx(layers_gb / 3.35)
    assert bf16[anatomy.ATTENTION] == pytest.approx(kv_gb / 3.35)
    assert fp8[anatomy.LAYERS] == pytest.approx(bf16[anatomy.LAYERS] / 2)
    assert fp8[anatomy.ATTENTION] == pytest.approx(bf16[anatomy.ATTENTION] / 2)
    assert fp8[anatomy.HEAD] == bf16[anatomy.HEAD]  # BF16 in both
    assert anatomy.QUANTISATION in fp8 and anatomy.QUANTISATION not in bf16
    # A step that reads 8,192 tokens of prompts is bound by compute: twice the FLOPs, half the time.
    prefill = Work(prompts=8, prompt_tokens=8192, prompt_context=8192, prompt_pairs=8 * 1024 * 1024)
    slow, fast = (
        anatomy.floors_ms(prefill, shape, card, weights=FP8 if on else BF16, fp8_kv=on)[anatomy.LAYERS]
        for on in (False, True)
    )
    assert slow == pytest.approx(2e3 * 8192 * shape.layer_parameters / 989e12)
    # Each token of a prompt looks at itself and those before it: half of all pairs.
    whole = Work(prompts=1, prompt_tokens=8192, prompt_context=8192, prompt_pairs=8192**2)
    floor = anatomy.floors_ms(whole, shape, card, weights=BF16, fp8_kv=False)[anatomy.ATTENTION]
    assert floor == pytest.approx(1e3 * shape.pair_flops * 8192 * 8193 / 2 / 989e12)
    assert slow / fast == pytest.approx(1979 / 989)


LOOP = "<module> (<string>:1);EngineCoreProc.run_busy_loop (vllm/v1/engine/core.py:1555)"
STEP = f"{LOOP};EngineCoreProc._process_engine_step (vllm/v1/engine/core.py:1606);EngineCore.step (vllm/v1/engine/core.py:667)"
BESIDE = "Thread._bootstrap (threading.py:1002);EngineCoreProc.process_output_sockets (vllm/v1/engine/core.py:1968)"


def test_the_engine_cores_time_is_told_by_stage():
    stages = anatomy.host_stages([
        f"{STEP};Scheduler.schedule (vllm/v1/core/sched/scheduler.py:778);KVCacheManager.allocate_slots (kv_cache_manager.py:595) 40",
        f"{STEP};Scheduler.update_from_output (vllm/v1/core/sched/scheduler.py:2264) 20",
        f"{STEP};UniProcExecutor.execute_model (uniproc_executor.py:122);Event.synchronize (streams.py:9) 25",
        f"{STEP};UniProcExecutor.execute_model (uniproc_executor.py:122);GPUModelRunner._prepare_inputs (gpu_model_runner.py:9) 10",
        f"{LOOP};EngineCoreProc._process_input_queue (core.py:1);Queue.get (queue.py:171);Condition.wait (threading.py:327) 5",
        f"{BESIDE};Queue.get (queue.py:171);Condition.wait (threading.py:327) 90",
        f"{BESIDE};MsgpackEncoder.encode_into (serial_utils.py:1) 10",
    ])  # fmt: skip
    assert stages == {
        "schedule": {"allocate_slots": 0.4}, "take in results": {"update_from_output": 0.2},
        "prepare and launch": {"_prepare_inputs": 0.1}, anatomy.WAITING: {"synchronize": 0.25}, anatomy.IDLE: {"wait": 0.05},
        anatomy.BESIDE: {"encode_into": 0.1},
    }  # fmt: skip
    assert anatomy.host_stages(["main (app.py:1) 3", "no stack"]) == {}


def _measured(batch: int, wall_ms: float, kernels=None) -> experiment.BatchAnatomy:
    steps = ()
    if kernels:
        work = Work(running=batch, decode_tokens=batch, decode_context=batch * 300)
        busy = sum(sum(each.values()) for each in kernels.values())
        steps = (experiment.StepAnatomy("decode", 11, work, busy, kernels),)
    return experiment.BatchAnatomy(batch, wall_ms, 300.0, {"gpu_util": 0.9}, {"schedule": {"schedule": 0.6}}, "", steps)


def _store(run, variant: str, *batches) -> None:
    run.write_part("anatomy", variant, {"batches": [dataclasses.asdict(one) for one in batches]})


def test_tables_and_figures_show_what_is_stored(tmp_path):
    run = lab.open_run(tmp_path / "run", read_profile("h100-80gb"))
    kernels = {
        anatomy.ATTENTION: {"flash": 4.0},
        anatomy.LAYERS: {"nvjet": 6.0},
        anatomy.OTHER: {"new_a": 0.5, "new_b": 0.2},
    }
    _store(run, "bf16", _measured(256, 12.0, kernels))
    row = dict(zip(lab.steps_table(run).columns, lab.steps_table(run).rows[0], strict=True))
    assert (row["step, ms"], row["GPU, ms"], row["host adds, ms"]) == ("12.00", "10.70", "1.30")
    rows = {row[1]: row for row in lab.kernels_table(run, "bf16").rows}
    assert rows["attention"][4:6] == ("3.005", "75%")  # floor, reached
    assert rows["other"][6] == "new_a; new_b"  # unknown names are shown
    assert rows["all kinds"][3] == "100%"
    assert lab.host_table(run).rows[0][2] == "60%"
    assert "milliseconds a step" in lab.step_figure(run).alt


@pytest.mark.parametrize(
    ("wall_ms", "context", "told"),
    [(12.0, 300, "2.00"), (9.5, 300, "0.00"), (12.0, 200, "≥ 2.00"), (9.5, 200, "–"), (12.0, 320, "≤ 2.00")],
)
def test_what_the_host_adds_is_told_as_far_as_it_is_known(wall_ms, context, told):
    one = _measured(256, wall_ms, {anatomy.LAYERS: {"nvjet": 10.0}})  # profiled at 300 tokens of context
    assert host_adds(dataclasses.replace(one, context=context)) == told
    assert host_adds(_measured(256, wall_ms)) == "–"


def test_without_a_gpu_the_tables_say_not_run(tmp_path):
    run = lab.open_run(tmp_path / "run", read_profile("emulated-h100"))
    _store(run, "fp8", _measured(64, 5.0))
    assert "not run" in lab.steps_table(run).rows[0][-1]
    assert "not run" in lab.kernels_table(run, "fp8").caption
    assert "no GPU" in lab.step_figure(run).caption


def test_kinds_follow_todays_names_and_the_head_stays():
    stored = {
        anatomy.LAYERS: {"nvjet_a": 1.0, "triton_red_fused_clamp_scaled_mm_0": 0.5},
        anatomy.HEAD: {"nvjet_a": 0.2},
    }
    assert anatomy.by_kind(stored) == {
        anatomy.LAYERS: {"nvjet_a": 1.0}, anatomy.HEAD: {"nvjet_a": 0.2},
        anatomy.QUANTISATION: {"triton_red_fused_clamp_scaled_mm_0": 0.5},
    }  # fmt: skip


@pytest.mark.parametrize("name", ["h100-80gb", "h100-80gb-unsealed"])
def test_the_recorded_steps_add_up_and_are_judged(name):
    run = lab.open_run(source=name)
    for variant, batches in experiment.anatomies(run).items():
        # The fastest variant was taken apart on another day, and not at 128.
        assert [one.batch for one in batches] == [64, *([] if variant == "fp8-unsealed" else [128]), 256, 1024]
        for step in (step for one in batches for step in one.steps):
            assert sum(step.times.values()) == pytest.approx(step.busy_ms, rel=0.03)
            assert step.times.get(anatomy.OTHER, 0.0) < 0.01 * step.busy_ms
        for one in batches:
            assert sum(experiment.floors_of(run, "bf16", one.decode.work).values()) > 0
    verdicts = {one.id: one for one in lab.judge(run)}
    assert verdicts["B1"].verdict == verdicts["B2"].verdict == "not reproduced"
    # A decode step of 128 requests in FP8: 128 x 14 GFLOP of the layers and 1 of the head, and attention's, in 7.9 ms.
    assert verdicts["B1"].measured == pytest.approx(100 * (128 * (14 / 1979 + 1.05 / 989)) / 7.94, rel=0.1)
    assert 1.6 < verdicts["B2"].measured < 1.85


def test_a_step_on_an_emulated_card_carries_no_verdict(tmp_path):
    run = lab.open_run(tmp_path / "run", read_profile("emulated-h100"))
    kernels = {anatomy.ATTENTION: {"flash": 4.0}, anatomy.LAYERS: {"nvjet": 6.0}}
    for variant in ("bf16", "fp8"):
        _store(run, variant, _measured(128, 12.0, kernels))
    verdicts = {one.id: one for one in lab.judge(run)}
    assert verdicts["B1"].verdict == verdicts["B2"].verdict == "not run"
    assert verdicts["B2"].measured == 1.0


def test_each_change_stands_beside_what_it_adds_to():
    run = lab.open_run(source="h100-80gb-unseal")
    table = lab.unsealing_table(run)
    rows = {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    assert [row["beside"] for row in rows.values()] == ["–", *list(rows)[:-1]]
    assert rows["fp8-rust"]["changes"] == "API server: Rust" and rows["fp8-unsealed"]["changes"] == "max-num-seqs 2048"
    assert "fp8-unsealed over fp8: 1.43×" in str(lab.conclusion(run, "unsealing"))


def test_changes_that_were_tried_beside_each_other_are_told_one_by_one():
    run = lab.open_run(source="h100-80gb-what-else")
    rows = {row[0]: row[1:3] for row in lab.unsealing_table(run).rows}
    # One takes back a flag of the published command, which is a change like any other.
    assert rows["fp8-kv16"] == ("kv-cache-dtype auto", "fp8-unsealed")
    assert {rows[f"fp8-{name}"][1] for name in ("budget", "triton")} == {"fp8-unsealed"}
    # It adds to the published command, of which this run holds no level.
    assert rows["fp8-intervals"] == ("stream-interval 10", "–")
    told = str(lab.conclusion(run, "unsealing"))
    assert told.startswith("What each change does alone.") and told.count(" over fp8-unsealed: ") == 3


def test_a_way_of_changes_ends_where_several_were_tried_beside_each_other(monkeypatch):
    run = lab.open_run(source="h100-80gb-unseal")
    ways = {
        "fp8-rust": "fp8",
        "fp8-mp": "fp8-rust",
        "fp8-unsealed": "fp8-mp",
        "fp8-mixed-graphs": "fp8-mp",
        "fp8-rust-graphs": "fp8",
    }
    steps = [("fp8", "", ""), *((variant, before, "") for variant, before in ways.items())]
    monkeypatch.setattr(claims, "unsealing_steps", lambda seen: steps)
    told = str(lab.conclusion(run, "unsealing"))
    assert told.startswith("What all changes together give.")
    pairs = [
        "fp8-mp over fp8:",
        "fp8-unsealed over fp8-mp:",
        "fp8-mixed-graphs over fp8-mp:",
        "fp8-rust-graphs over fp8:",
    ]
    assert all(pair in told for pair in pairs) and told.count(" over fp8") == 4


def test_fp8s_worth_is_that_of_the_fastest_of_each_whatever_was_added_last():
    run = lab.open_run(source="h100-80gb-unsealed")
    assert "fp8-unsealed over bf16-unsealed: 1.39×" in str(lab.conclusion(run, "unsealing"))
    slower = lab.open_run(
        source="h200-80gb"
    )  # one API server in Rust serves BF16 better than four in Python, FP8 worse
    assert "fp8-api4 over bf16-rust:" in str(lab.conclusion(slower, "unsealing"))


def test_another_version_of_vllm_is_a_change_like_any_other():
    run = lab.open_run(source="h200-80gb-versions")
    table = lab.unsealing_table(run)
    old, new = (dict(zip(table.columns, row, strict=True)) for row in table.rows)
    assert (new["variant"], new["beside"], new["changes"]) == (
        "fp8-unsealed-033",
        old["variant"],
        "vLLM 0.33.0: python v33/bin/python",
    )
    assert "fp8-unsealed-033 over fp8-unsealed: 0.98×" in str(lab.conclusion(run, "unsealing"))


@pytest.mark.servers
def test_the_unsealing_on_real_vllm(tmp_path):
    profile, run_dir = tmp_path / "unsealed.toml", tmp_path / "run"
    profile.write_text("""
        extends = "emulated-h100"
        replaces = ["protocols"]
        variants = { fp8-unsealed = { base = "fp8", flags = ["--max-num-seqs", "2048"] } }
        emulation = { time_dilation = 4 }
        [protocols.short]
        levels = [{ variant = "fp8-unsealed", rate = inf, requests = 30 }]
    """)
    parameters = {
        "profile_name": str(profile),
        "run_dir": str(run_dir),
        "protocols": [],
        "variants": ["fp8-unsealed"],
    }
    page = notebooks.execute(notebooks.find("08")[0], tmp_path / "08.ipynb", parameters | {"batches": [32]}).read_text()
    assert "EMULATED" in page and "not run: kernels are profiled on a GPU" in page
    run = lab.open_run(source=run_dir)
    found = experiment.anatomies(run)["fp8-unsealed"][0]
    # The emulated card's own arithmetic: weights, KV cache, and a fixed cost, which the host's part comes on top of.
    assert 3.0 < found.wall_ms < 30.0
    assert 200 < found.context < 1200
    # Its thread's whole time, that in which it waits for the emulated GPU too.
    shares = {stage: sum(each.values()) for stage, each in found.host.items()}
    assert 0 < shares["schedule"] < 1 and sum(shares.values()) - shares.get(anatomy.BESIDE, 0.0) == pytest.approx(1)
    assert run.path / "anatomy" / "fp8-unsealed.json" in run.files()


def test_a_batch_that_the_server_refuses_is_told_at_once_in_its_words(fake_vllm, tmp_path):
    profile = read_profile(str(fake_vllm(bf16="no-batches")))
    with pytest.raises(lab.LevelFailed, match="bf16, 8 at once: answered before .*, HTTP 400: .*one prompt a request"):
        lab.measure_anatomy(lab.open_run(tmp_path / "run", profile), profile, ["bf16"], batches=[8])


def test_a_variant_behind_the_rust_api_server_is_taken_apart_behind_pythons():
    profile = read_profile("h100-80gb")
    assert (
        profile.variant("fp8-rust").env and not experiment._behind_python(profile, "fp8-rust").variant("fp8-rust").env
    )


def test_a_batch_that_cannot_run_is_refused_before_a_start(tmp_path):
    profile = read_profile("emulated-h100")
    run = lab.open_run(tmp_path / "run", profile)
    with pytest.raises(lab.BadInput, match="batch 4096: fp8 lets at most 1024 requests run"):
        lab.measure_anatomy(run, profile, ["fp8"], batches=[4096])
    with pytest.raises(lab.BadInput, match="batch 0 is below 1"):
        lab.measure_anatomy(run, profile, ["fp8"], batches=[0])
