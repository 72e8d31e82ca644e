"""Variants that serve a checkpoint made by a recipe: what is served, what it must weigh, and what the claims about number
formats come to."""

import dataclasses
import math
import os
from types import SimpleNamespace

import pytest

import fp8lab as lab
from fp8lab.config.dimensions import FORMATS, RECIPES, weight_format
from fp8lab.config.flags import joined
from fp8lab.config.profile_file import read_profile
from fp8lab.errors import BadInput
from fp8lab.models.checkpoints import model_folder
from fp8lab.models.quantize import checkpoint_bytes
from fp8lab.report import claims
from fp8lab.results.files import write_json
from fp8lab.results.run_folder import open_run
from fp8lab.server import log
from fp8lab.server.command import build_command, build_environment, make_checkpoint, served_model
from fp8lab.server.launch import Server

PROFILE = "h100-80gb-recipes"


def profile_with(tmp_path, variants: str, *, base="emulated-recipes", more=""):
    (tmp_path / "mine.toml").write_text(f'extends = "{base}"\n{more}\n[variants]\n{variants}\n')
    return read_profile(str(tmp_path / "mine.toml"))


def test_a_recipe_is_known_or_refused_where_it_stands(tmp_path):
    with pytest.raises(BadInput, match=r"mine.toml: variants.q.recipe: no recipe 'int3' \(there are: bf16, fp8-static"):
        profile_with(tmp_path, 'q = { recipe = "int3" }')


def test_a_recipe_is_inherited_and_makes_another_format(tmp_path):
    profile = profile_with(tmp_path, 'mine = { base = "int8", flags = ["--max-num-seqs", "64"] }')
    assert (
        profile.variant("mine").recipe == "int8" and profile.base("mine") == "int8" and profile.base("int8") == "int8"
    )
    assert profile.changes("int4", "int8") == "recipe int4"


def test_what_is_served_is_made_of_the_model_and_read_from_disk():
    profile = read_profile(PROFILE)
    command = build_command(profile, "int8")
    assert command[command.index("--model") + 1].endswith("models/llama-3-8b-int8") and "--load-format" not in command
    checkpoints = {"default": "/models/mine"}
    model = dataclasses.replace(profile.model, weights="checkpoint", checkpoints=checkpoints)
    with pytest.raises(BadInput, match="no model at '/models/mine'"):
        served_model(dataclasses.replace(profile, model=model), "int8")
    hub = dataclasses.replace(profile, model=dataclasses.replace(model, checkpoints={"default": "org/name"}))
    with pytest.raises(BadInput, match="recipe int8 of variant int8: org/name is a hub's name; download it"):
        make_checkpoint(hub, "int8")


def test_made_up_weights_of_a_quantised_checkpoint_are_refused():
    """Zeros run faster."""
    profile = read_profile(PROFILE)
    variants = profile.variants | {
        "int8": dataclasses.replace(profile.variant("int8"), flags=("--load-format", "dummy"))
    }
    with pytest.raises(
        BadInput, match="variant int8: --load-format dummy makes up zeros, or nothing, for int8 weights"
    ):
        build_command(dataclasses.replace(profile, variants=variants), "int8")


def test_an_emulated_card_is_told_the_format_and_reads_no_weights(monkeypatch):
    profile = read_profile("emulated-recipes")
    assert served_model(profile, "int4") == str(model_folder("llama-3-8b"))
    make_checkpoint(profile, "int4")  # nothing to make
    named = {v: build_environment(profile, v)["FP8LAB_EMULATED_GPU"] for v in profile.variants}
    assert all(
        f'"weights": "{name}"' in named[v] for v, name in (("bf16", "bf16"), ("fp8-online", "fp8"), ("w4a8", "w4a8"))
    )


@pytest.mark.parametrize("variant", read_profile(PROFILE).variants)
def test_the_weights_take_what_their_format_says(variant):
    profile = read_profile(PROFILE)
    one, shape = profile.variant(variant), profile.shape(variant)
    asked = weight_format(joined(profile.server.flags, one.flags), shape)
    made = one.recipe if one.recipe != "bf16" or asked is FORMATS["bf16"] else "fp8-static"  # quantised at the start
    # On the card the scales of W4A8 take eight times what they take in the file, AWQ's zero points four times.
    more = {"w4a8": 7 / 128, "int4-awq": 1.5 / 128}.get(made, 0) * shape.layer_parameters
    assert shape.weight_bytes(asked) == pytest.approx(
        checkpoint_bytes(model_folder("llama-3-8b"), made, drawn=True) + more, rel=0.02
    )


@pytest.mark.parametrize("name", ["h100-80gb-recipes", "h200-80gb-recipes"])
def test_recorded_weights_took_on_the_card_what_their_format_says(name):
    run = open_run(source=name)
    for one in run.summaries().values():
        shape = run.profile.shape(one.level.variant)
        said = shape.weight_bytes(weight_format(run.profile.flags(one.level.variant), shape)) / 2**30
        assert said <= one.server.model_memory_gib <= said * 1.014, one.level.id


def test_weights_that_are_served_in_bf16_all_the_same_are_doubted():
    profile = read_profile(PROFILE)

    def doubt(variant: str, gib: float | None) -> str:
        return Server._weights_doubt(SimpleNamespace(profile=profile, variant=variant), gib)

    assert not any(
        (
            doubt("int4-gptq", 5.45),
            doubt("fp8-online", 8.5),
            doubt("w4a8", 5.67),
            doubt("bf16", 15.0),
            doubt("int8", None),
        )
    )
    assert doubt("fp8-head", 8.46)  # its head stayed in BF16
    # What is quantised while it is read leaves memory of its largest BF16 layer taken.
    assert not doubt("fp8-online", 8.47 * 33.06 / 31.96)
    assert doubt("fp8-online", 14.96) and doubt("fp8-channel", 8.47 * 33.06 / 31.96)
    assert doubt("int4-gptq", 14.96) == (
        "its weights take 14.96 GiB, int4 ones 5.31: vLLM serves another format than was asked for"
    )


def test_the_log_tells_kernels_and_how_long_the_weights_took():
    said = log.reported(
        "INFO [x.py:1] Model loading took 8.49 GiB memory and 12.345678 seconds\nINFO Using MacheteLinearKernel for "
        "CompressedTensorsWNA16\nINFO Selected CutlassInt8ScaledMMLinearKernel for CompressedTensorsW8A8Int8\n"
        "INFO Using FLASH_ATTN backend for attention\nINFO Using MacheteLinearKernel for CompressedTensorsWNA16"
    )
    assert (said["model_memory_gib"], said["load_s"]) == (8.49, 12.345678)
    assert said["kernels"] == (
        "MacheteLinearKernel for CompressedTensorsWNA16",
        "CutlassInt8ScaledMMLinearKernel for CompressedTensorsW8A8Int8",
    )
    # Two of vLLM's model runners word it in two ways.
    assert log.reported("INFO Model loading took 5.35 GiB and 3.662403 seconds")["load_s"] == 3.662403
    assert log.reported("Model loading took 8.49 GiB")["load_s"] is None and log.reported("")["kernels"] == ()


@pytest.fixture
def run(tmp_path):
    """An empty run of a GPU profile: made without a GPU, for the verdicts' logic alone."""
    return open_run(tmp_path / "run", read_profile(PROFILE))


def fill(run, tokens: dict[str, float], *, load_s=None, kernels=None, spread=0.0, starts=1, **common):
    """A burst of three seeds of each variant, 1 % apart, on a start each (`starts` 0: on one); loads `spread` apart."""
    for (variant, value), seed in ((item, seed) for item in tokens.items() for seed in (1, 2, 3)):
        folder = run.path / "levels" / f"{variant}-infrps-r{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        server = {
            "variant": variant, "startup_s": 100.0,
            "command": ["vllm", *run.profile.variant(variant).flags, "--served-model-name", f"{variant}-{seed * starts}"],
            "load_s": (load_s or {}).get(variant) and load_s[variant] * (1 + spread * (seed - 2) * (variant == "fp8-online")), "kernels": (kernels or {}).get(variant, ()), "model_memory_gib": 8.5,
        }  # fmt: skip
        summary = {
            "valid": True, "invalid_reason": None, "emulated": False, "requests": 2000, "completed": 2000, "failed": 0,
            "level": {"variant": variant, "rate": math.inf, "requests": 2000, "repeat": seed}, "server": server,
            "output_token_throughput": value * (0.98 + 0.01 * seed),
            "steady_output_token_throughput": value * (0.98 + 0.01 * seed), "mean_tpot_ms": 50.0,
            "mean_ttft_ms": 100.0, "p99_ttft_ms": 100.0, "gpu_util_steady": 1.0, "engine_cpu_max_steady": 0.4,
            "frontend_cpu_max_steady": 0.4, "model_memory_gib": 8.5,
        }  # fmt: skip
        write_json(folder / "summary.json", {k: v for k, v in (summary | common).items() if k != "model_memory_gib"})
    return {v.id: v for v in claims.judge(run) if v.id in ("B3", "B4", "R4")}


@pytest.fixture(autouse=True)
def _limited_by_the_card(request, monkeypatch):
    """The rule for what limited a level is tested elsewhere; here levels have no records."""
    from fp8lab.metrics.bottleneck import Limit
    from fp8lab.results.evidence import Evidence

    cause = getattr(request, "param", "GPU, nearer compute")
    monkeypatch.setattr(Evidence, "limit", lambda _seen, _level: Limit(cause, "as the test has it"))


BURST = {"fp8-kv": 12_000, "fp8-channel": 17_000, "fp8-online": 17_000, "int8": 16_500, "int4": 11_500}


def test_int8_that_is_faster_where_the_card_is_the_limit_contradicts_the_claim(run):
    found = fill(run, BURST)["B4"]
    assert found.verdict == "not reproduced" and found.measured == pytest.approx(16_500 / 12_000, rel=0.01)
    assert "int8 1.37×" in found.reason and "int4 0.96×" in found.reason and "fp8-channel 1.42×" in found.reason
    assert found.levels[:3] == ["fp8-kv-infrps-r1", "fp8-kv-infrps-r2", "fp8-kv-infrps-r3"]


def test_formats_that_are_no_faster_bear_it_out(run):
    assert fill(run, BURST | {"int8": 12_100})["B4"].verdict == "reproduced"


@pytest.mark.parametrize("_limited_by_the_card", ["API server"], indirect=True)
def test_where_the_card_was_not_the_limit_no_format_can_show(run):
    found = fill(run, BURST)["B4"]
    assert found.verdict == "undecided" and found.reason.startswith("the card was not BF16's limit")


def test_without_every_format_nothing_is_judged(run):
    found = fill(run, {"fp8-kv": 1, "fp8-channel": 1, "int8": 1})
    assert found["B4"].verdict == "not run" and "int4-infrps-r1" in found["B4"].reason
    assert found["R4"].verdict == "not run" and "fp8-online-infrps-r1" in found["R4"].reason


def test_a_checkpoint_that_loads_sooner_and_serves_as_much_is_preferred(run):
    told = {"fp8-online": 20.0, "fp8-static": 6.0, "fp8-channel": 6.0}
    both = BURST | {"fp8-static": 17_000}
    found = fill(run, both, load_s=told)["R4"]
    assert found.verdict == "reproduced" and found.measured == 6.0 and found.measured_parts == told
    assert "fp8-online, which reads BF16 and quantises, loads its weights in 20 s" in found.reason
    assert "fp8-static in 6 s, 0.30×" in found.reason and "fp8-channel in 6 s, 0.30×" in found.reason
    assert fill(run, {"fp8-static": 15_000}, load_s=told)["R4"].verdict == "not reproduced"  # it serves less
    assert fill(run, both, load_s=told | {"fp8-online": 6.0})["R4"].verdict == "not reproduced"
    # One form that loads no sooner contradicts what is said of both.
    assert fill(run, both, load_s=told | {"fp8-channel": 20.0})["R4"].verdict == "not reproduced"
    # A second sooner, with starts that differ by as much; and one start of each.
    assert fill(run, both, load_s=told | {"fp8-online": 7.0}, spread=0.15)["R4"].verdict == "undecided"
    assert fill(run, both, load_s=told, starts=0)["R4"].verdict == "undecided"


def test_schemes_are_those_whose_kernels_vllm_names(run):
    one = {"fp8-static": ("CutlassFP8ScaledMMLinearKernel for CompressedTensorsW8A8Fp8",)}
    assert fill(run, {"fp8-static": 17_000}, kernels=one)["B3"].verdict == "undecided"
    both = one | {"fp8-block": ("DeepGemmFp8BlockScaledMMKernel for CompressedTensorsW8A8Fp8",)}
    found = fill(run, {"fp8-static": 17_000, "fp8-block": 16_000}, kernels=both)["B3"]
    assert (
        found.verdict == "not reproduced" and "fp8-block (FP8 weights with a scale for each 128 x 128" in found.reason
    )
    assert "fp8-static" not in found.reason  # others are named


def test_a_start_counts_once_however_many_levels_it_served():
    run = open_run(source="h200-80gb-recipes")
    rows = {row[0]: row for row in lab.checkpoints_table(run).rows}
    starts = {s.start: s.server for s in run.summaries().values() if s.level.variant == "fp8-static"}
    assert len(starts) == 3
    assert rows["fp8-static"][5] == f"{sum(s.load_s for s in starts.values()) / 3:.1f}"


def test_the_tables_hold_each_format_from_the_largest_to_the_smallest(run):
    fill(run, BURST, load_s={"int8": 5.0}, kernels={"int8": ("K for L",)})
    took = lab.checkpoints_table(run)
    assert [row[0] for row in took.rows] == ["fp8-kv", "fp8-online", "fp8-channel", "int8", "int4"]
    int8 = next(row for row in took.rows if row[0] == "int8")
    assert int8[1:4] == ("int8", "8.46", "8.50") and int8[5] == "5.0" and int8[7] == "K for L"
    served = lab.recipes_table(run, beside="fp8-kv")
    row = next(row for row in served.rows if row[1] == "int8")
    assert (
        row[0] == "all at once"
        and row[4] == "16,500"
        and row[5].startswith("1.37×")
        and row[9] == "GPU, nearer compute"
    )


def test_without_answers_a_format_is_drawn_by_what_it_costs(run):
    fill(run, {v: n for v, n in BURST.items() if v != "int4"}, joules_per_output_token=0.05)
    fill(run, {"int4": 11_500}, joules_per_output_token=None)
    figure = lab.recipes_figure(run)
    assert "Not drawn, theirs was not measured: int4. " in figure.caption and "a joule" in figure.caption


@pytest.mark.parametrize("name", ["h200-80gb-recipes", "h100-80gb-recipes"])
def test_formats_are_drawn_at_the_rates_that_all_have(name):
    run = open_run(source=name)
    loads = [axes.get_xlabel() for axes in lab.recipes_figure(run).canvas.axes[:2]]
    assert loads == ["output tokens/s, all at once", "tokens/s of a request, 0.5 req/s"]
    full, few = (len(axes.collections) for axes in lab.recipes_figure(run).canvas.axes[:2])
    formats = [row[0] for row in lab.checkpoints_table(run).rows]
    assert full == few == len(formats)
    # However near each other some lie, each has its name.
    for axes in lab.recipes_figure(run).canvas.axes[:2]:
        assert sorted(text.get_text() for text in axes.texts) == sorted(formats)


def test_the_formats_beside_the_answers_are_a_figure_of_their_own():
    run = open_run(source="h200-80gb-recipes")
    speed, answers = lab.recipes_figure(run), lab.recipes_figure(run, open_run(source="smollm2-h200-recipes"))
    titles = [one.canvas.axes[0].get_title(loc="left") for one in (speed, answers)]
    assert titles[0] != titles[1] and answers.alt.startswith(titles[1])
    assert max(answers.canvas.axes[0].get_yticks()) == 100


@pytest.mark.nightly  # two starts that compile
@pytest.mark.servers
def test_int8_is_made_and_served_on_a_cpu(tmp_path):
    """Real vLLM: the checkpoint is made at the first start, and the log names the kernel that multiplies it."""
    profile = profile_with(
        tmp_path, 'int8 = { recipe = "int8", flags = ["--dtype", "bfloat16"] }', base="tiny-cpu",
        more='replaces = ["protocols"]\n[protocols.one]\nlevels = [{ variant = "int8", rate = 5, requests = 5 }]\n',
    )  # fmt: skip
    run = open_run(tmp_path / "run", profile)
    lab.measure(run, profile, ["one"])
    summary = run.summaries()["int8-5rps-r1"]
    assert summary.completed == 5 and summary.server.weights_doubt == ""
    assert any("Int8" in kernel for kernel in summary.server.kernels), summary.server.kernels
    assert os.path.isfile(os.path.join(served_model(profile, "int8"), "config.json"))


def test_every_recipe_has_a_known_format():
    assert {one.weights for one in RECIPES.values()} <= FORMATS.keys()


def test_every_id_that_random_weights_may_answer_with_is_a_token_with_a_text():
    from transformers import AutoTokenizer  # 3 s of CPU, which every collection of the tests would pay

    tokenizer = AutoTokenizer.from_pretrained(model_folder("qwen2.5-32b"))
    assert len(tokenizer) >= 152_064
    assert all(tokenizer.decode([i]) for i in (0, 128_255, 128_256, 140_000, 152_063))
    assert tokenizer.encode("Hello world") == [128000, 9906, 1917]
