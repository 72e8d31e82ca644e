"""Checkpoints in other number formats: what is written, how large it is, and what ends in one error."""

import json
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from conftest import wait_for
from fp8lab import cli
from fp8lab.config.dimensions import RECIPES
from fp8lab.errors import BadInput, NotWritten
from fp8lab.models import quantize as making
from fp8lab.models.checkpoints import model_folder
from fp8lab.models.quantize import checkpoint_bytes, quantize
from fp8lab.paths import PROJECT

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 256, "intermediate_size": 384,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
    "max_position_embeddings": 128, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
MATRIX = "model.layers.0.mlp.down_proj"


# torch takes 2 s of CPU, which every collection of the tests would pay: it is imported where it is used.


def load_file(path) -> dict:
    from safetensors.torch import load_file

    return load_file(path)


def save_file(weights: dict, path) -> None:
    from safetensors.torch import save_file

    save_file(weights, path, metadata={"format": "pt"})


def checkpoint(folder, **changed):
    """A checkpoint of a small Llama in BF16, its weights drawn."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | changed))
    (folder / "tokenizer.json").write_text("{}")
    drawn = making._Random(folder)
    save_file({name: drawn.tensor(name) for name in drawn.shapes}, folder / "model.safetensors")
    return folder


@pytest.fixture
def source(tmp_path):
    return checkpoint(tmp_path / "model")


def tensors(folder) -> dict:
    held = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    read = {file: load_file(folder / file) for file in set(held.values())}
    return {name: read[file][name] for name, file in held.items()}


def values_of(parts: dict, how):
    """What the parts of one matrix stand for, written out slowly: (outputs, inputs)."""
    import torch

    if how.method in ("gptq", "awq"):
        order = making._AWQ_ORDER if how.method == "awq" else range(8)
        along = 1 if how.method == "awq" else 0
        packed = parts["qweight"].to(torch.int64) & 0xFFFFFFFF
        eights = torch.stack([torch.zeros_like(packed)] * 8, along + 1)
        for place, one in enumerate(order):
            eights.select(along + 1, one).copy_(packed >> 4 * place & 15)
        values = eights.flatten(along, along + 1) - 8
        return (values * parts["scales"].float().repeat_interleave(128, 0)).T
    scale = parts["weight_scale"].float()
    if "weight_packed" in parts:
        packed = parts["weight_packed"].to(torch.int64) & 0xFFFFFFFF
        values = torch.stack([packed >> 4 * place & 15 for place in range(8)], 2).flatten(1, 2) - 8
        return values * scale.repeat_interleave(how.group, 1)
    if scale.ndim == 2 and scale.shape[1] > 1:
        scale = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
    return parts["weight"].float() * scale


def assert_same(held: dict, weights: dict):
    assert held.keys() == weights.keys() and all(held[key].equal(weights[key]) for key in held)


@pytest.mark.parametrize("name", [name for name, how in RECIPES.items() if not how.calibration])
def test_a_checkpoint_holds_the_nearest_values_in_exactly_the_bytes_foretold(name, source, tmp_path):
    foretold, how = checkpoint_bytes(source, name), RECIPES[name]
    made = quantize(source, name, tmp_path / "made")
    held, weights = tensors(made), load_file(source / "model.safetensors")
    assert sum(t.numel() * t.element_size() for t in held.values()) == foretold
    assert (made / "tokenizer.json").exists() and not list(tmp_path.glob("*.partial"))
    heads = {key for key in held if key.startswith("lm_head")}
    assert (heads == {"lm_head.weight"}) == (not how.head)
    assert held["model.embed_tokens.weight"].equal(weights["model.embed_tokens.weight"])
    if how.method == "none":
        return assert_same(held, weights)
    parts = {key.removeprefix(f"{MATRIX}."): value for key, value in held.items() if key.startswith(MATRIX)}
    was = weights[f"{MATRIX}.weight"].float()
    off = (values_of(parts, how) - was).abs()
    # Half a step: of FP8 a 16th of the value, of INT8 and INT4 of the largest value beside it.
    most = {"fp8": was.abs() / 16 + 1e-4, "int8": was.abs().amax(1, keepdim=True) / 254}
    grouped = was.abs().unflatten(1, (-1, how.group)).amax(2).repeat_interleave(how.group, 1)
    allowed = most.get(name.partition("-")[0], grouped / 14)
    assert (off <= allowed * 1.02 + 1e-6).all() and off.max() > 0


def test_what_cannot_be_calibrated_is_one_error(source, tmp_path, monkeypatch):
    monkeypatch.setattr(making, "CALIBRATOR", tmp_path / "nowhere")
    with pytest.raises(BadInput, match=r"made: no llmcompressor .* run `make calibrator` once, or make the"):
        quantize(source, "int8-by-gptq", tmp_path / "made")
    without = tmp_path / "python"  # an environment without it
    without.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    without.chmod(0o755)
    monkeypatch.setattr(making, "CALIBRATOR", without)
    with pytest.raises(BadInput, match="made cannot be calibrated: ModuleNotFoundError: No module named 'torch'"):
        quantize(source, "int8-by-gptq", tmp_path / "made")
    with pytest.raises(BadInput, match="nothing to calibrate in random weights; choose int8, or a trained model"):
        quantize(source, "int8-by-gptq", tmp_path / "made", drawn=True)
    with pytest.raises(BadInput, match=r"no text at .*none\.txt to calibrate on \(No such file or directory\)"):
        quantize(source, "int8-by-gptq", tmp_path / "made", text=tmp_path / "none.txt")
    assert {path.name for path in tmp_path.iterdir()} == {source.name, without.name}


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["int8-by-gptq", "int4-64-by-awq"])
def test_a_calibrated_checkpoint_has_the_same_format_and_other_values(name, tmp_path):
    # The environment that runs this is taken as it is, though its lists be newer.
    here = Path(sys.prefix).name
    command = ["make", f"ENV={here}", "-o", f".venv/{here}/.ready", "calibrator"]
    subprocess.run(command, cwd=PROJECT, check=True)
    source = checkpoint(tmp_path / "model", vocab_size=128_256)
    for path in model_folder("tiny-llama").glob("tokenizer*"):
        shutil.copyfile(path, source / path.name)
    nearest, made = (quantize(source, one, tmp_path / one) for one in (name.partition("-by-")[0], name))
    assert json.loads((made / "config.json").read_text()) == json.loads((nearest / "config.json").read_text())
    (near, how), calibrated = (tensors(nearest), RECIPES[name]), load_file(next(made.glob("*.safetensors")))
    # llmcompressor's scales are BF16 as the model is, where ours may be float32; all else is alike.
    kinds = [{k: (v.shape, "scale" in k or v.dtype) for k, v in held.items()} for held in (near, calibrated)]
    assert kinds[0] == kinds[1]
    both = [
        {key.removeprefix(f"{MATRIX}."): held[key] for key in held if key.startswith(MATRIX)}
        for held in (near, calibrated)
    ]
    one, other = (values_of(parts, how) for parts in both)
    assert 0 < (one - other).abs().mean() < 0.5 * one.abs().mean()
    (short := tmp_path / "short.txt").write_text("Light is refracted.")
    with pytest.raises(BadInput, match=f"{made.name} holds another checkpoint, or one of other weights"):
        quantize(source, name, made, text=short)
    with pytest.raises(
        BadInput, match="other cannot be calibrated: its text has [0-9] tokens; at least 512 are needed"
    ):
        quantize(source, name, tmp_path / "other", text=short)


def test_weights_are_drawn_for_shapes_alone(torch, source, tmp_path):
    (source / "model.safetensors").unlink()
    held = tensors(quantize(source, "int8", tmp_path / "made", drawn=True))
    assert held[f"{MATRIX}.weight"].dtype is torch.int8 and held["model.norm.weight"].eq(1).all()
    assert held[f"{MATRIX}.weight"].float().std() > 10  # no zeros: those run faster


def test_a_whole_target_is_kept_and_another_is_refused(source, tmp_path):
    made = quantize(source, "int8", tmp_path / "made")
    before = {path: path.stat().st_mtime_ns for path in made.iterdir()}
    assert quantize(source, "int8", made) == made
    assert before == {path: path.stat().st_mtime_ns for path in made.iterdir()}
    with pytest.raises(BadInput, match="made holds another checkpoint, or one of other weights: choose another folder"):
        quantize(source, "fp8-channel", made)
    weights = load_file(source / "model.safetensors")
    save_file({key: 2 * tensor for key, tensor in weights.items()}, source / "model.safetensors")
    with pytest.raises(BadInput, match="or one of other weights"):
        quantize(source, "int8", made)
    with pytest.raises(BadInput, match="or one of other weights"):
        quantize(source, "int8", made, drawn=True)


def test_what_is_no_checkpoint_is_refused_before_any_work(source, tmp_path, monkeypatch):
    monkeypatch.setattr(making, "_write_shard", lambda *_: pytest.fail("it has begun"))
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("mine")
    folder.mkdir()
    (folder / "mine").write_text("")
    for target in (file, folder):
        with pytest.raises(BadInput, match=f"{target.name} is there and is no checkpoint"):
            quantize(source, "int8", target)


def test_the_folder_that_one_stands_in_can_be_named(source, monkeypatch, capsys):
    monkeypatch.chdir(source)
    assert cli.main(["quantize", ".", "--recipe", "int8"]) == 0
    assert (source.parent / f"{source.name}-int8" / "config.json").is_file()


def test_an_interrupted_call_goes_on_with_the_files_that_are_whole(source, tmp_path, monkeypatch):
    monkeypatch.setattr(making, "_SHARD_BYTES", 200_000)
    real, calls = making._write_shard, []

    def stopped(path, *arguments):
        calls.append(path.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(path, *arguments)

    monkeypatch.setattr(making, "_write_shard", stopped)
    with pytest.raises(KeyboardInterrupt):
        quantize(source, "int8", tmp_path / "made")
    partial = tmp_path / "made.partial"
    whole = {path: path.stat().st_mtime_ns for path in partial.glob("*.safetensors")}
    assert len(whole) == 2 and not (tmp_path / "made").exists()
    monkeypatch.setattr(making, "_write_shard", real)
    # What another recipe left there is of no use to this one.
    made = quantize(source, "int8", tmp_path / "made")
    assert all((made / path.name).stat().st_mtime_ns == at for path, at in whole.items()) and not partial.exists()
    assert len(tensors(made)) > 20


@pytest.mark.parametrize("plan", ["of another recipe", None])
def test_files_of_another_recipe_are_not_gone_on_with(source, tmp_path, plan):
    partial = tmp_path / "made.partial"
    partial.mkdir()
    if plan:
        (partial / "plan").write_text(plan)
    (partial / "model-00001-of-00001.safetensors").write_text("its file")
    assert len(tensors(quantize(source, "int8", tmp_path / "made"))) > 20


def test_a_disk_that_fills_up_leaves_nothing(source, tmp_path):
    """No file may grow beyond 100 kB: as a full disk, that ends the write in its middle."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(NotWritten, match="made cannot be written: .*File too large.*; nothing of it is left"):
            quantize(source, "int8", tmp_path / "made")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_what_has_no_room_is_refused_before_anything_is_written(source, tmp_path, monkeypatch):
    monkeypatch.setattr(making.shutil, "disk_usage", lambda _path: SimpleNamespace(free=1 << 20))
    with pytest.raises(BadInput, match=r"made needs 0\.00 GiB more, and 0\.00 GiB are free there: make room"):
        quantize(source, "int8", tmp_path / "made")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize("name, fits", [("int4", False), ("int4-awq", False), ("fp8-block", False), ("int8", True)])
def test_odd_dimensions_are_refused_by_name_before_anything_is_written(tmp_path, name, fits):
    source = checkpoint(tmp_path / "model", hidden_size=192, num_attention_heads=3, num_key_value_heads=3)
    if fits:
        assert quantize(source, name, tmp_path / "made").is_dir()
        return
    with pytest.raises(BadInput, match=r"mlp\.down_proj\.weight is 192 x 384: .* multiples of 128; choose .*int8"):
        quantize(source, name, tmp_path / "made")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize("spoil, said", [
    (lambda folder: (folder / "model.safetensors").unlink(), "holds no model.safetensors"),
    (lambda folder: (folder / "model.safetensors").write_text("{}"), "model.safetensors cannot be read as safetensors"),
    (lambda folder: (folder / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": {"quant_method": "awq"}})),
     r"is quantised already \(awq\)"),
    (lambda folder: save_file({"x": load_file(folder / "model.safetensors")["model.norm.weight"]}, folder / "model.safetensors"), "holds no matrix of a layer"),
])  # fmt: skip
def test_what_is_no_checkpoint_in_bf16_is_one_clear_error(source, tmp_path, capsys, spoil, said):
    spoil(source)
    assert cli.main(["quantize", str(source), "--recipe", "int8"]) == 2
    assert re.search(said, capsys.readouterr().err)


def test_a_head_that_is_the_embedding_is_refused(tmp_path):
    source = checkpoint(tmp_path / "model", tie_word_embeddings=True)
    with pytest.raises(BadInput, match="no output head of its own"):
        quantize(source, "fp8-head", tmp_path / "made")


def test_the_command_line_tells_the_size_and_where(source, capsys):
    assert cli.main(["quantize", str(source), "--recipe", "int8"]) == 0
    out, err = capsys.readouterr()
    assert (
        out.strip().endswith("model-int8")
        and "GiB in" in err
        and (source.parent / "model-int8" / "config.json").exists()
    )
    assert cli.main(["quantize", "no-such-model", "--recipe", "int8"]) == 2
    assert "no model at 'no-such-model': expected a folder" in capsys.readouterr().err


def test_a_killed_call_leaves_no_half_file(tmp_path):
    """By SIGKILL, wherever it is. How a file is written is the same in every recipe; BF16's imports are over soonest."""
    source = checkpoint(tmp_path / "model", num_hidden_layers=16)
    code = f"from pathlib import Path; from fp8lab.models import quantize as making; making._SHARD_BYTES = 100_000; making.quantize(Path({str(source)!r}), 'bf16', Path({str(tmp_path / 'made')!r}))"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    wait_for(lambda: list(tmp_path.glob("made.partial/*.safetensors")) or process.poll() is not None, 60)
    time.sleep(0.01)
    process.kill()  # no error where it has ended
    process.wait()
    for path in tmp_path.glob("made.partial/*.safetensors"):
        load_file(path)
    assert_same(tensors(quantize(source, "bf16", tmp_path / "made")), load_file(source / "model.safetensors"))
