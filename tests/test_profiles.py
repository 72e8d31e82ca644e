import dataclasses
import sys

import pytest

from fp8lab import gpu
from fp8lab.errors import BadInput
from fp8lab.paths import PROJECT
from fp8lab.profiles import Level, Model, from_dict, load_profile, profile_names, read_profile
from fp8lab.provenance import portable


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
    variants = read_profile("h100-80gb").variants
    assert variants["fp8"][-4:] == ("--quantization", "fp8", "--kv-cache-dtype", "fp8")
    assert "--quantization" not in variants["fp8-kv"] and "--kv-cache-dtype" not in variants["fp8-weights"]


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
        profile.variant_flags("fp4")
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
    model = load_profile("emulated-h100", weights="checkpoint").model
    assert model.checkpoint("fp8").endswith("FP8") and not model.checkpoint("bf16").endswith("FP8")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("title = ", "not valid TOML"),
        ('extends = "emulated-h100"\nspeed = 1', "unknown keys .'speed'"),
        ('extends = "emulated-h100"\n[emulation]\ntime_dilation = 0', "time_dilation"),
        ('extends = "emulated-h100"\ndevice = "tpu"', "device 'tpu'"),
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
    path.write_text(text)
    with pytest.raises(BadInput, match=said):
        load_profile(str(path))


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
    monkeypatch.setattr(gpu, "gpu_names", lambda: ["NVIDIA H100"])
    profile = load_profile("h100-80gb", model=str(tmp_path / "model"))
    stored = profile.as_dict()
    assert stored["model"]["checkpoints"] == {"default": "~/model"}
    again = from_dict(stored)
    assert again.as_dict() == stored and again.model.checkpoint("fp8") == str(tmp_path / "model")


def test_a_stored_model_is_found_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    # Inside the project, and beside it and the home folder under a name that begins as theirs do.
    named = [f"{PROJECT}/data/models/x", f"{PROJECT}-models/x", f"{tmp_path}-other/x", "org/name"]
    model = Model(checkpoints=dict(zip(("default", "bf16", "fp8", "fp8-kv"), named, strict=True)))
    stored = dataclasses.replace(read_profile("h100-80gb"), model=model).as_dict()
    assert list(stored["model"]["checkpoints"].values()) == named


def test_a_command_is_shown_without_this_machines_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shown = {
        sys.executable: "python3",
        f"{PROJECT}/data/x": "./data/x",
        f"{PROJECT}-models/x": f"{PROJECT}-models/x",
        f"{tmp_path}/x": "~/x",
        f"{tmp_path}-other/x": f"{tmp_path}-other/x",
        "--port": "--port",
    }
    assert [portable(argument) for argument in shown] == list(shown.values())
