import contextlib
import dataclasses
import json
import os
import re
from pathlib import Path

import pytest

from fp8lab.batch import load_matrix
from fp8lab.config.dimensions import dimensions, most_running
from fp8lab.config.profile import Card, Level, Model
from fp8lab.config.profile_file import from_dict, profile_names, read_profile
from fp8lab.config.this_machine import load_profile
from fp8lab.errors import BadInput
from fp8lab.experiment.anatomy import check_asked
from fp8lab.experiment.quality import default_variants
from fp8lab.experiment.speed import measure, plan_table
from fp8lab.metrics.step_model import FITS, read_fits
from fp8lab.paths import DATA, PROJECT, portable
from fp8lab.results.files import plain
from fp8lab.results.run_folder import open_run
from fp8lab.server.command import build_command, make_checkpoint
from fp8lab.system import gpu


@pytest.mark.parametrize("name", profile_names())
def test_every_shipped_profile_reads_and_survives_provenance(name):
    profile = read_profile(name)
    assert from_dict(profile.as_dict()) == profile


def test_the_profiles_that_the_readme_names_exist():
    assert {"h100-80gb", "h200-80gb", "emulated-h100", "tiny-cpu"} <= set(profile_names())


def test_published_protocol_is_the_published_one():
    levels = read_profile("h100-80gb").levels("as published")
    assert [(level.variant, level.rate, level.requests) for level in levels] == [("bf16", 50, 1000), ("fp8", 100, 2000)]


def test_auto_is_the_machines_own(monkeypatch):
    for name, expected in (("NVIDIA H200", "h200-80gb"), ("NVIDIA H100 80GB HBM3", "h100-80gb")):
        monkeypatch.setattr(gpu, "gpu_names", lambda name=name: [name])
        assert load_profile("auto").name == expected


def test_variants_are_the_published_flags():
    variants = {name: one.flags for name, one in read_profile("h100-80gb").variants.items()}
    assert variants["fp8"][-4:] == ("--quantization", "fp8", "--kv-cache-dtype", "fp8")
    assert "--quantization" not in variants["fp8-kv"] and "--kv-cache-dtype" not in variants["fp8-weights"]


def test_a_variant_has_what_its_base_has_and_says_what_else_it_changes(tmp_path):
    """Bases and API servers are fields; where a profile does not say them they follow from the flags, never from names."""
    given = read_profile("h100-80gb")
    older = from_dict(json.loads((DATA / "recorded" / "h100-80gb" / "run.json").read_text())["profile"])
    for name, one in older.variants.items():
        assert (one, older.setup(name)) == (given.variants[name], given.setup(name))
    told = {name: (given.base(name), given.variants[name].api_server, given.setup(name)) for name in given.variants}
    assert told["fp8-weights-rust"] == ("fp8-weights", "rust", "Rust")
    assert told["bf16-api4"] == ("bf16", "python", "4 Python processes")
    assert told["fp8-rust-graphs"] == ("fp8", "rust", "Rust, max-cudagraph-capture-size 1024")
    (tmp_path / "mine.toml").write_text("""
        extends = "h100-80gb"
        [variants]
        fp8 = ["--quantization", "fp8"]
        quick = { base = "fp8-rust", flags = ["--quantization=fp8", "--block-size", "32"], env = { A = "1" } }
        [variants.fp8-rust]
        api_server = "python"
    """)
    mine = read_profile(tmp_path / "mine.toml")
    assert mine.variants["fp8-rust"].flags == ("--quantization", "fp8") and mine.variants["fp8-rust"].env == {}
    quick = mine.variants["quick"]
    assert (quick.base, quick.flags[-2:], quick.env) == ("fp8", ("--block-size", "32"), {"A": "1"})
    assert mine.setup("quick") == "one Python process, block-size 32, A=1"


def test_a_variant_serves_the_checkpoint_of_its_base(tmp_path):
    for name in ("plain", "quantised", "own"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "mine.toml").write_text("""
        extends = "h100-80gb"
        [model]
        weights = "checkpoint"
        checkpoints = { default = "plain", fp8 = "quantised", fp8-api4 = "own" }
    """)
    mine = read_profile(tmp_path / "mine.toml")
    served = {name: Path(mine.checkpoint(name)).name for name in ("bf16-rust", "fp8", "fp8-rust", "fp8-api4", "fp8-kv")}
    assert list(served.values()) == ["plain", "quantised", "quantised", "own", "plain"]
    # A run from before bases were stored served what it says: the default.
    older = plain(mine.as_dict())
    for one in older["variants"].values():
        del one["base"], one["api_server"]
    assert Path(from_dict(older).checkpoint("fp8-rust")).name == "plain"


@pytest.mark.parametrize("variants, said", [
    ('x = { base = "y" }', "variants.x.base: no variant 'y'"),
    ('x = { base = "y" }\ny = { base = "x" }', "derive from each other in a circle: x -> y -> x"),
    ('x = { api_server = "go" }', "variants.x.api_server: expected .*'python' or 'rust'"),
    ('x = { flag = [] }', "variants.x: unknown keys .'flag'.; known: .'api_server', 'base', 'env', 'flags'"),
    ('x = { base = "bf16", flags = ["oops", "--block-size", "8"] }', "variants.x.flags: it does not begin with a flag"),
])  # fmt: skip
def test_a_variant_that_cannot_be_is_refused(tmp_path, variants, said):
    (tmp_path / "mine.toml").write_text(f'extends = "emulated-h100"\n[variants]\n{variants}')
    with pytest.raises(BadInput, match=said):
        read_profile(tmp_path / "mine.toml")


def test_extending_merges_tables_and_replaces_the_rest():
    base, held = read_profile("h100-80gb"), read_profile("h200-80gb")
    assert base.variants.items() <= held.variants.items()
    assert held.gpu.bf16_flops == base.gpu.bf16_flops and held.gpu.hbm_bytes_per_s > base.gpu.hbm_bytes_per_s
    assert "0.51" in held.server.flags and "0.9" not in held.server.flags
    # The same experiment on either card; the emulated one, where nothing is measured, has a few levels only.
    assert held.protocols == base.protocols
    assert sum(map(len, read_profile("emulated-h100").protocols.values())) == 6


@pytest.mark.parametrize("rate", [0, -1, float("nan")])
def test_a_level_needs_a_positive_rate(rate):
    with pytest.raises(BadInput, match="above 0"):
        Level(variant="bf16", rate=rate, requests=1)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(BadInput, match="no profile 'h101'.*emulated-h100"):
        load_profile("h101")
    profile = read_profile("emulated-h100")
    with pytest.raises(BadInput, match="no variant 'fp4'.*bf16"):
        profile.variant("fp4")
    with pytest.raises(BadInput, match="no protocol 'x'.*equal load"):
        profile.levels("x")


def test_a_gpu_profile_without_a_gpu_says_what_to_do(monkeypatch):
    monkeypatch.setattr(gpu, "gpu_names", list)
    with pytest.raises(BadInput, match="needs an NVIDIA GPU.*emulated-h100"):
        load_profile("h100-80gb")
    assert load_profile("auto").name == "emulated-h100"


@pytest.mark.parametrize("model", ["/no/such/model", "./neither", "notahubname"])
def test_a_missing_model_is_named(model):
    with pytest.raises(BadInput, match="no model at"):
        load_profile("emulated-h100", model=model)


def test_checkpoints_by_variant():
    profile = load_profile("emulated-h100", weights="checkpoint")
    assert profile.checkpoint("fp8").endswith("FP8") and not profile.checkpoint("bf16").endswith("FP8")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("title = ", "not valid TOML"),
        ('[gpu]\nbf16_flops = "989e12"', r"mine.toml: gpu.bf16_flops: expected a number, not '989e12'"),
        ("[gpu]\nbf16_flops = nan", "mine.toml: gpu.bf16_flops: expected a finite number"),
        (
            '[gpu]\nname = "H20"',
            "mine.toml: gpu.memory_gib: is missing: a new name is another card, and replaces the whole",
        ),
        ('[workload]\ntrace = "sharegpt"', "no trace 'sharegpt'.*sharegpt-like"),
        ('[variants]\nbf16 = ["--api-k", "x"]', "--api-key holds a secret"),
        ("[gpu]\nbf16_flops = 989", "mine.toml: gpu.bf16_flops: 989 is in another unit: .* FLOP/s, such as 989e12"),
        ("[gpu]\nhbm_bytes_per_s = 3350", "mine.toml: gpu.hbm_bytes_per_s: 3350 is in .* bytes/s, such as 3.35e12"),
        ("[gpu]\nmemory_gib = 81559", "mine.toml: gpu.memory_gib: 81559 is in another unit: expected 1 to 2000 GiB"),
        ("[emulation]\nlink_bytes_per_s = 450", "mine.toml: emulation.link_bytes_per_s: 450 is in another unit"),
        ("[gpu]\nmemory_gib = -1", "mine.toml: gpu.memory_gib: expected a number above 0"),
        ("[emulation]\nhbm_fraction = 1.5", "mine.toml: emulation.hbm_fraction: expected at most 1"),
        ('[server]\nflags = "--enforce-eager"', "mine.toml: server.flags: expected a list, not a text"),
        (
            '[variants]\nbf16 = "--dtype bfloat16"',
            "mine.toml: variants.bf16: expected a list of flags or a table, not a text",
        ),
        (
            '[variants]\nbf16 = ["--max-num-seqs", 4]',
            r"mine.toml: variants.bf16.flags.1.: expected a text in quotes, not 4",
        ),
        ("[server.env]\nVLLM_USE_RUST_FRONTEND = 1", "server.env.VLLM_USE_RUST_FRONTEND: expected a text in quotes"),
        ("[server]\nstart_timeout_s = 0", "mine.toml: server.start_timeout_s: expected a number above 0"),
        ("[workload]\nseed = -1", "mine.toml: workload.seed: expected 0 or more, not -1"),
        (
            "[workload]\nwarmup_requests = true",
            "mine.toml: workload.warmup_requests: expected a whole number, not true",
        ),
        ("[workload]\nspeed = 3", r"mine.toml: workload: unknown keys .'speed'.; known: .*'trace'"),
        ("variants = 3", "mine.toml: variants: expected a table, not 3"),
        ("[protocols]\nx = []", "mine.toml: protocols.x: expected a table, not a list"),
        (
            '[server.env]\nVLLM_USE_RUST_FRONTEND = "1"',
            "mine.toml: server.env.VLLM_USE_RUST_FRONTEND: each variant says which API server it has",
        ),
        ("[protocols.x]", "mine.toml: protocols.x.levels: is missing"),
        ("[model]\ncheckpoints = 3", "mine.toml: model.checkpoints: expected a table, not 3"),
        ('[model.checkpoints]\nfp9 = "a/b"', "mine.toml: model.checkpoints.fp9: no variant 'fp9'"),
        ('[protocols.x]\nlevels = [{variant = "bf16", rate = nan, requests = 1}]', r"x.levels.0..rate: .*above 0.*nan"),
        (
            '[protocols.x]\nlevels = [{variant = "bf16", rate = 5, requests = 1.5}]',
            r"requests: expected a whole number",
        ),
        ("[protocols.x]\nlevels = [{rate = 5, requests = 1}]", r"protocols.x.levels.0..variant: is missing"),
        ("[protocols.x]\nstarts = 0\nlevels = []", "mine.toml: protocols.x.starts: expected 1 or more, not 0"),
        (
            '[protocols.x]\nstarts = 2\nlevels = [{variant = "bf16", rate = 5, requests = 1, repeat = 2}]',
            r"protocols.x.levels.0.: repeat stands beside starts",
        ),
        (
            '[protocols.x]\nlevels = [{variant = "bf16", rate = 5, requests = 1, repeat = 2, repeats = 3}]',
            r"protocols.x.levels.0.: repeat stands beside repeats, which numbers them from 1",
        ),
        (
            '[protocols.x]\nlevels = [{variant = "bf16", rate = 5, requests = 1, repeats = 0}]',
            r"protocols.x.levels.0..repeats: expected 1 or more, not 0",
        ),
        (
            '[protocols.x]\nlevels = [{variant = "bf16", rate = 50, requests = 3}]',
            "mine.toml: protocols.x: level bf16-50rps-r1 has 3 requests, in protocol 'as published' 1000.*replaces",
        ),
        (
            'replaces = ["variants"]\n[variants]\nmine = []',
            'no variant .bf16.*mine.toml replaces variants alone: .*replaces = ."variants", "protocols".$',
        ),
        ('[variants.bf16]\napi_server = "go"', "bf16.api_server: expected '', 'python' or 'rust', not 'go'"),
        ('replaces = ["protocols"]', "mine.toml: replaces: protocols is not given here"),
        ('replaces = "protocols"', "mine.toml: replaces: expected a list of tables"),
        (
            '[variants]\nbf16 = ["-q", "fp8", "--quantization=fp8"]',
            "mine.toml: variants.bf16.flags: --quantization is given twice",
        ),
        ('[server]\nflags = ["--port", "1"]', "mine.toml: server.flags: --port is not the profile's to set"),
        ('[variants]\nbf16 = ["--model=x"]', "mine.toml: variants.bf16.flags: --model is not the profile's to set"),
        ('[server.env]\nCUDA_VISIBLE_DEVICES = "1"', "server.env.CUDA_VISIBLE_DEVICES: .*the environment of fp8lab"),
        ('[server.env]\n"A=B" = "1"', "mine.toml: server.env: 'A=B' is no name of a variable; write NAME"),
        ('[variants.bf16.env]\n"" = "1"', "mine.toml: variants.bf16.env: '' is no name of a variable"),
        ('[server.env]\nA = "a\\u0000"', r"mine.toml: server.env: a text holds the character .x00, which no process"),
        ('[variants]\nbf16 = ["--x", "a\\u0000"]', "mine.toml: variants.bf16.flags: a text holds the character"),
        ('[variants.bf16]\npython = "a\\u0000"', "mine.toml: variants.bf16.python: a text holds the character"),
        ("[server.env]\nHF_TOKEN = true", "expected a text in quotes, not true"),
        ("extends = 3", "mine.toml: extends: expected the name of a profile"),
        ('extends = "nope.toml"', "no profile '.*/nope.toml' .which .*mine.toml extends"),
        ('[workload]\ntrace = "nope.csv"', "no trace file '.*/nope.csv'"),
        ('[workload]\ntokenizer = "nope"', "no tokenizer at '.*/nope'"),
        ('extends = "emulated-h100"\nspeed = 1', "unknown keys .'speed'"),
        ('extends = "emulated-h100"\n[emulation]\ntime_dilation = 0', "time_dilation"),
        ('extends = "emulated-h100"\ndevice = "tpu"', "device: expected 'cuda', 'emulated' or 'cpu', not 'tpu'"),
        (
            'extends = "emulated-h100"\n[protocols.mine]\nlevels = [{variant = "fp4", rate = 1, requests = 1}]',
            "no variant 'fp4'",
        ),
        (
            'extends = "emulated-h100"\n[protocols.mine]\nlevels = [{variant = "fp8", rate = 0, requests = 1}]',
            "above 0",
        ),
        ('extends = "emulated-h100"\n[model]\nweights = "some"', "weights 'some'"),
    ],
)
def test_a_bad_profile_file_is_one_clear_error(tmp_path, text, said):
    path = tmp_path / "mine.toml"
    path.write_text(text if re.search("(?m)^(extends|title) =", text) else f'extends = "emulated-h100"\n{text}')
    with pytest.raises(BadInput, match=said) as refused:
        load_profile(str(path))
    assert refused.value.__cause__ is None and "pydantic" not in str(refused.value)


def test_a_file_may_begin_with_the_mark_of_utf_8(tmp_path):
    """As Windows' Notepad writes it."""
    for name, text in (
        ("profile", 'extends = "emulated-h100"'),
        ("matrix", 'profiles = ["emulated-h100"]'),
        ("fit", (FITS / "h100-80gb-unsealed.toml").read_text()),
    ):
        (tmp_path / f"{name}.toml").write_text(text, encoding="utf-8-sig")
    assert read_profile(str(tmp_path / "profile.toml")).emulated
    assert load_matrix(tmp_path / "matrix.toml").profiles == ("emulated-h100",)
    assert read_fits(str(tmp_path / "fit.toml"))


def test_an_error_names_the_file_that_it_is_in(tmp_path):
    (tmp_path / "one.toml").write_text('extends = "emulated-h100"\n[workload]\nseed = "x"')
    (tmp_path / "two.toml").write_text('extends = "one.toml"\n[workload]\nwarmup_requests = 1')
    with pytest.raises(BadInput, match=f"^{tmp_path}/one.toml: workload.seed"):
        read_profile(str(tmp_path / "two.toml"))


def test_repeats_number_their_levels_and_cross_check_the_first(tmp_path):
    line = 'levels = [{variant = "bf16", rate = 5, requests = 3, cross_check = true, repeats = 2}, {variant = "fp8", rate = 5, requests = 3}]'
    (tmp_path / "mine.toml").write_text(f'extends = "emulated-h100"\nreplaces = ["protocols"]\n[protocols.x]\n{line}\n')
    levels = read_profile(str(tmp_path / "mine.toml")).protocols["x"]
    assert [(level.id, level.cross_check) for level in levels] == [
        ("bf16-5rps-r1", True), ("bf16-5rps-r2", False), ("fp8-5rps-r1", False)
    ]  # fmt: skip


def test_a_protocol_that_is_named_drops_no_other(tmp_path):
    base, path = read_profile("h100-80gb"), tmp_path / "mine.toml"
    mine = '[protocols."service line"]\nlevels = [{ variant = "fp8", rate = 61, requests = 10 }]'
    path.write_text(f'extends = "h100-80gb"\n{mine}')
    held = read_profile(str(path)).protocols
    assert list(held) == list(base.protocols) and [level.id for level in held["service line"]] == ["fp8-61rps-r1"]
    assert all(held[name] == levels for name, levels in base.protocols.items() if name != "service line")
    path.write_text(f'extends = "h100-80gb"\nreplaces = ["protocols"]\n{mine}')
    assert list(read_profile(str(path)).protocols) == ["service line"]


def readme_profile(tmp_path):
    """The README's mine.toml as it stands there, with its models' folders made below another root."""
    text = re.search(r"\n    # mine\.toml.*?\n((?:    .*\n)+)", (PROJECT / "README.md").read_text())[1]
    text = re.sub("(?m)^    ", "", text).replace("/models/", f"{tmp_path}/models/")
    for name, layers in (("mine", 8), ("mine-fp8", 9)):
        (tmp_path / "models" / name).mkdir(parents=True)
        config = json.loads((DATA / "models" / "llama-3-8b" / "config.json").read_text())
        (tmp_path / "models" / name / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    (tmp_path / "mine.toml").write_text(text)
    return tmp_path / "mine.toml"


def test_the_readmes_profile_serves_what_it_says(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "gpu_names", lambda: ["NVIDIA H20"])
    profile = load_profile(readme_profile(tmp_path))
    for variant in profile.variants:
        served = build_command(profile, variant)
        name = "mine-fp8" if profile.base(variant) == "fp8" else "mine"  # as its base, with other API servers
        assert served[served.index("--model") + 1] == f"{tmp_path}/models/{name}", variant
        assert profile.shape(variant).layers == (9 if name == "mine-fp8" else 8)
    assert build_command(profile, "fp8").count("--kv-cache-dtype") == 1
    assert profile.gpu.fits("NVIDIA H20") and not profile.gpu.fits("NVIDIA H100 80GB HBM3")
    assert profile.workload.input_tokens == 2048 and profile.protocols == read_profile("h100-80gb").protocols


def test_a_models_sizes_are_its_own_and_stay_known(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "gpu_names", lambda: ["NVIDIA H20"])
    profile = load_profile(readme_profile(tmp_path))
    os.rename(tmp_path / "models", tmp_path / "gone")
    stored = json.loads(json.dumps(plain(profile.as_dict())))
    assert from_dict(stored).shape("bf16").layers == 8
    # A hub's checkpoint is not read, and no other model's sizes stand in for it.
    assert read_profile("h100-80gb").shape("bf16").layers == 32
    profile = read_profile("h100-80gb")
    for checkpoints in (profile.model.checkpoints, {"default": "/no/such"}):
        model = dataclasses.replace(profile.model, weights="checkpoint", checkpoints=checkpoints)
        assert dataclasses.replace(profile, model=model).shape("bf16") is None
    with pytest.raises(BadInput, match="no model at"):
        load_profile(tmp_path / "mine.toml")


LLAMA = json.loads((DATA / "models" / "llama-3-8b" / "config.json").read_text())
FLOAT8, INT8, INT4 = ({"num_bits": bits, "type": kind} for bits, kind in ((8, "float"), (8, "int"), (4, "int")))


def quantised(weights: dict, inputs: dict | None = None, targets=("Linear",), **more) -> dict:
    group = {"weights": weights, "input_activations": inputs, "targets": list(targets)}
    return {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}} | more}


@pytest.mark.parametrize("changed, weights, kv", [
    ({}, "bf16", False),
    ({"quantization_config": {"quant_method": "fp8"}}, "fp8", False),
    (quantised(FLOAT8, kv_cache_scheme=FLOAT8), "fp8", True),
    ({"compression_config": {"config_groups": {"g": {"weights": FLOAT8}}}}, "fp8", False),
    ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}}, "fp8", True),
    (quantised(FLOAT8, FLOAT8, ("Linear", "re:.*lm_head")), "fp8-head", False),
    (quantised(INT8, INT8), "int8", False),
    (quantised(INT4), "int4", False),
    (quantised(INT4, FLOAT8), "w4a8", False),
    ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "int4-asymmetric", False),
    ({"quantization_config": {"quant_method": "awq", "bits": 4, "zero_point": False}}, "int4", False),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4, "sym": False}}, "int4-asymmetric", False),
    (quantised(INT4 | {"symmetric": False}), "int4-asymmetric", False),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "int4", False),
])  # fmt: skip
def test_a_checkpoint_says_in_which_format_it_is(changed, weights, kv):
    found = dimensions(LLAMA | changed)
    assert (found.weights, found.fp8_kv, found.num_hidden_layers) == (weights, kv, 32)


@pytest.mark.parametrize("changed", [
    {"model_type": "mixtral"}, {"sliding_window": 4096}, {"hidden_size": None},
    {"quantization_config": {"quant_method": "gptq", "bits": 3}}, quantised(INT8), quantised(INT4, INT8),
])  # fmt: skip
def test_sizes_that_this_arithmetic_cannot_tell_are_not_told(changed):
    assert dimensions(LLAMA | changed) is None


@pytest.mark.parametrize(
    "name, value", [("num_attention_heads", 0), ("head_dim", -1), ("hidden_size", "4096"), ("vocab_size", True)]
)
def test_a_checkpoint_whose_sizes_are_no_counts_is_refused(tmp_path, name, value):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(LLAMA | {name: value}))
    (tmp_path / "mine.toml").write_text(
        'extends = "emulated-h100"\n[model]\nweights = "checkpoint"\ncheckpoints = { default = "model" }'
    )
    with pytest.raises(
        BadInput, match=f"config.json is not a model's configuration: {name} is {value!r}, expected a whole"
    ):
        load_profile(tmp_path / "mine.toml")


def test_modelopt_writes_its_quantisation_beside(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "model" / "hf_quant_config.json").write_text(
        '{"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}}'
    )
    (tmp_path / "mine.toml").write_text(
        'extends = "emulated-h100"\n[model]\nweights = "checkpoint"\ncheckpoints = { default = "model" }'
    )
    shape = load_profile(tmp_path / "mine.toml").shape("bf16")
    assert (shape.weights.name, shape.fp8_kv) == ("fp8", True)


def test_paths_are_relative_to_their_file_and_read_before_anything_starts(tmp_path, monkeypatch):
    folder = tmp_path / "profiles"
    folder.mkdir()
    (folder / "trace.csv").write_text("prompt_tokens,output_tokens\n" + "8,8\n" * 20)
    (folder / "base.toml").write_text('extends = "emulated-h100"\n[workload]\ntrace = "trace.csv"\ntokenizer = "tok"')
    (folder / "mine.toml").write_text(
        'extends = "base.toml"\n[model]\ncheckpoints = { default = "./m", fp8 = "org/name" }'
    )
    (folder / "tok").mkdir()
    monkeypatch.chdir(tmp_path)
    profile = load_profile("profiles/mine.toml")
    assert profile.workload.trace == str(folder / "trace.csv") and profile.workload.tokenizer == str(folder / "tok")
    assert dict(profile.model.checkpoints) == {"default": str(folder / "m"), "fp8": "org/name"}
    monkeypatch.setenv("HOME", str(tmp_path))
    stored = profile.as_dict()
    assert stored["workload"]["trace"] == "~/profiles/trace.csv" and from_dict(stored) == profile
    # Too few requests for a level: said before a level is set aside or a server starts.
    run = open_run(tmp_path / "run", profile)
    (tmp_path / "run" / "levels" / "bf16-50rps-r1").mkdir(parents=True)
    with pytest.raises(BadInput, match=r"trace.csv' has 20 requests, 1000 were asked for"):
        measure(run, profile, "as published", again=["bf16-50rps-r1"])
    assert (tmp_path / "run" / "levels" / "bf16-50rps-r1").is_dir()
    for broken in (b"prompt_tokens,output_tokens\n8,x", b"\xff\xfe", b"nothing"):
        (folder / "trace.csv").write_bytes(broken)
        with pytest.raises(BadInput, match=r"trace.csv"):
            load_profile("profiles/mine.toml")


def test_a_variants_flags_come_last_and_are_what_is_told(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('extends = "h100-80gb"\n[variants]\nbf16 = ["--max_num_seqs=256", "--dtype", "bfloat16"]')
    profile = read_profile(str(path))
    started = build_command(profile, "bf16", served_name="x")
    assert most_running(started) == 256 and "1024" not in started
    assert started.count("--max-num-seqs") == 1 and started.index("--max-num-seqs") < started.index("--host")
    assert most_running(build_command(profile, "fp8")) == 1024
    # As commands were made before, what the variants share last: that is what ran.
    assert most_running(["--max-num-seqs", "256", "--max-num-seqs", "1024"]) == 1024


def test_quality_measures_every_choice_of_numbers_however_it_is_written(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("""
extends = "smollm2-gpu"
replaces = ["variants"]
[server]
flags = ["--dtype", "bfloat16"]
[variants]
bf16 = []
long = ["--quantization=fp8"]
short = ["-q", "fp8"]
kv = ["--kv_cache_dtype=fp8"]
half = ["--dtype", "float16"]
""")
    profile = read_profile(str(path))
    assert default_variants(profile) == ["bf16", "long", "kv", "half"]
    (tmp_path / "m").mkdir()
    path.write_text(
        path.read_text() + '[model]\nweights = "checkpoint"\ncheckpoints = { default = "a/b", short = "./m" }'
    )
    assert default_variants(read_profile(str(path))) == ["bf16", "long", "short", "kv", "half"]


@pytest.mark.parametrize("card, name, fits", [
    ("H20", "NVIDIA H20", True), ("H20", "NVIDIA H20-3e", False), ("H20", "NVIDIA H200", False),
    ("H100 SXM 80 GB", "NVIDIA H100 80GB HBM3", True), ("H100 SXM 80 GB", "NVIDIA H100 PCIe", False),
    ("H100 PCIe", "NVIDIA H100 PCIe", True), ("H200 SXM 141 GB", "NVIDIA H200", True), ("H200", "NVIDIA H200 NVL", False),
    ("A100 SXM4 80GB", "NVIDIA A100-SXM4-80GB", True), ("L40S", "NVIDIA L40", False), ("GH200", "NVIDIA H200", False),
    ("RTX 6000 Ada", "NVIDIA RTX 6000 Ada Generation", True),
])  # fmt: skip
def test_a_card_without_nvmls_name_is_told_by_its_words(card, name, fits):
    one = Card(name=card, memory_gib=80, hbm_bytes_per_s=1e12, bf16_flops=1e15, fp8_flops=2e15)
    assert one.fits(name) == fits and not one.fits(name, 40.0)


def test_profiles_that_extend_each_other_are_refused(tmp_path):
    one, two = tmp_path / "one.toml", tmp_path / "two.toml"
    one.write_text(f'extends = "{two}"')
    two.write_text(f'extends = "{one}"')
    with pytest.raises(BadInput, match="circle"):
        load_profile(str(one))


def test_a_profile_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        read_profile("tiny-cpu").name = "other"


def test_a_stored_profile_names_no_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    monkeypatch.setattr(gpu, "gpu_names", lambda: ["NVIDIA H100 80GB HBM3"])
    profile = load_profile("h100-80gb", model=str(tmp_path / "model"))
    stored = profile.as_dict()
    assert stored["model"]["checkpoints"] == {"default": "~/model"}
    again = from_dict(stored)
    assert again.as_dict() == stored and again.checkpoint("fp8") == str(tmp_path / "model")


def test_a_stored_profile_names_no_home_folder_in_flags_and_variables(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    env = {"HF_HOME": f"{tmp_path}", "PATHS": f"/opt/x:{tmp_path}/a:{tmp_path}/b", "OTHER": f"{tmp_path}-other/x"}
    json_flag = f'{{"cache_dir": "{tmp_path}/c"}}'
    flags = (f"--tokenizer={tmp_path}/t", "--download-dir", f"{tmp_path}/d", "-cc", json_flag)
    profile = read_profile("tiny-cpu")
    variants = profile.variants | {"bf16": dataclasses.replace(profile.variants["bf16"], flags=flags)}
    server = dataclasses.replace(profile.server, env=env)
    profile = dataclasses.replace(profile, server=server, variants=variants)
    stored = plain(profile.as_dict())
    assert stored["variants"]["bf16"]["flags"] == ["--tokenizer=~/t", *flags[1:2], "~/d", "-cc", '{"cache_dir": "~/c"}']
    assert stored["server"]["env"] == {"HF_HOME": "~", "PATHS": "/opt/x:~/a:~/b", "OTHER": f"{tmp_path}-other/x"}
    again = from_dict(stored)
    assert again.server.env == env and again.variants["bf16"].flags == flags


def test_a_stored_model_is_found_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    # Inside the project, and beside it and the home folder under a name that begins as theirs do.
    named = [f"{PROJECT}/data/models/x", f"{PROJECT}-models/x", f"{tmp_path}-other/x", "org/name"]
    model = Model(checkpoints=dict(zip(("default", "bf16", "fp8", "fp8-kv"), named, strict=True)))
    stored = dataclasses.replace(read_profile("h100-80gb"), model=model).as_dict()
    assert list(stored["model"]["checkpoints"].values()) == named


def test_a_command_is_shown_without_this_machines_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "fast-disk"))
    shown = {
        f"{PROJECT}/data/x": "./data/x",
        f"{tmp_path}/fast-disk/fp8lab/models/x": "~/.cache/fp8lab/models/x",
        f"{PROJECT}-models/x": f"{PROJECT}-models/x",
        f"{tmp_path}/x": "~/x",
        f"--tokenizer={tmp_path}/x": "--tokenizer=~/x",
        f"{tmp_path}-other/x": f"{tmp_path}-other/x",
        "--port": "--port",
    }
    assert [portable(argument) for argument in shown] == list(shown.values())


def test_a_checkpoints_folder_beside_the_profile_is_no_hub_name(tmp_path):
    (tmp_path / "models" / "mine").mkdir(parents=True)
    (tmp_path / "models" / "mine" / "config.json").write_text(
        (DATA / "models" / "llama-3-8b" / "config.json").read_text()
    )
    path = tmp_path / "mine.toml"
    checkpoints = '{ default = "models/mine", fp8 = "some/where" }'
    path.write_text(f'extends = "emulated-h100"\n[model]\nweights = "checkpoint"\ncheckpoints = {checkpoints}\n')
    profile = load_profile(path)
    assert profile.checkpoint("bf16") == str(tmp_path / "models" / "mine") and profile.shape("bf16").layers == 32
    assert profile.checkpoint("fp8") == "some/where" and profile.shape("fp8") is None


@pytest.mark.parametrize("method, asked, taken", [
    ("compressed-tensors", "fp8", False), ("compressed-tensors", "compressed-tensors", True), ("fp8", "FP8", True),
    ("compressed_tensors", "humming", True), ("gptq", "fp8", False), ("gptq", "gptq_marlin", True), ("awq", "gptq", False),
    ("awq", "moe_wna16", True), ("quark", "fp8", False), ("modelopt", "fp8", True), ("auto-round", "gptq", True), (None, "fp8", True),
])  # fmt: skip
def test_a_quantization_that_vllm_would_refuse_beside_a_checkpoint_is_refused_before(tmp_path, method, asked, taken):
    """Which pairs those are is what the installed vLLM's ModelConfig says of them."""
    (tmp_path / "model").mkdir()
    said = {"quantization_config": {"quant_method": method}} if method else {}
    (tmp_path / "model" / "config.json").write_text(json.dumps(LLAMA | said))
    (tmp_path / "mine.toml").write_text(
        'extends = "h100-80gb"\n[model]\nweights = "checkpoint"\ncheckpoints = { default = "a/b", fp8 = "model" }\n'
        f'[variants]\nfp8 = ["--dtype", "bfloat16", "-q", "{asked}"]\n'
    )
    profile = read_profile(tmp_path / "mine.toml")
    build_command(profile, "fp8-weights")  # of a hub's, nothing is known here
    with contextlib.nullcontext() if taken else pytest.raises(BadInput) as refused:
        build_command(profile, "fp8")
    if not taken:
        told = (
            f"--quantization {asked.lower()} beside {tmp_path}/model, which says that it is quantised by {method}: vLLM"
        )
        assert told in str(refused.value) and "leave --quantization out" in str(refused.value)
        # Whoever would start it refuses it before it starts anything, and whatever derives from it.
        for asks in (
            lambda: plan_table(profile, ["as published"]), lambda: check_asked(profile, ["fp8-rust"], [64]),
        ):  # fmt: skip
            with pytest.raises(BadInput, match="which says that it is quantised by"):
                asks()


def test_a_recipe_beside_another_quantization_is_refused_before_it_is_made(tmp_path):
    flags = 'flags = ["--quantization", "fp8"]'
    (tmp_path / "mine.toml").write_text(
        f'extends = "h100-80gb-recipes"\n[variants]\na = {{ recipe = "int8", {flags} }}\nb = {{ recipe = "bf16", {flags} }}\n'
    )
    profile = read_profile(tmp_path / "mine.toml")
    build_command(profile, "b")
    with pytest.raises(
        BadInput, match="--quantization fp8 beside recipe int8, which says that it is quantised by compress"
    ):
        make_checkpoint(profile, "a")


def test_a_variant_with_anothers_formats_alone_does_not_get_its_flags_when_it_is_read_back(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        """
        extends = "tiny-cpu"
        title = "Formats alike, flags not"
        replaces = ["variants", "protocols"]
        [variants]
        bf16 = { flags = ["--max-num-seqs", "4"], env = { A = "1" } }
        plain = []
        rust = { base = "bf16", api_server = "rust" }
        [protocols.one]
        levels = [{ variant = "plain", rate = 1, requests = 3 }]
        """
    )
    profile = read_profile(str(path))
    assert profile.base("plain") == "bf16" and not profile.variants["plain"].flags
    assert from_dict(json.loads(json.dumps(plain(profile.as_dict())))) == profile
