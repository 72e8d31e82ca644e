"""Checkpoints by a recipe (`config.dimensions`), made here out of one in BF16, or out of a model's shapes with random weights.

Each weight of the layers' matrices is rounded to the nearest value that its format has, and packed as vLLM reads it: all that
speed needs. For better answers a recipe `...-by-gptq` or `...-by-awq` has llmcompressor calibrate the rounding on a text
(`calibrate.py`), in the same format.

torch, transformers and compressed-tensors are imported where they are used: they take seconds, and what cannot be quantised is
said at once.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from ..config.dimensions import RECIPES, Recipe, model_config, model_names, recipe
from ..errors import BadInput, InUse, NotWritten
from ..paths import DATA, PROJECT, cache_dir, with_library
from ..system.locks import Lock
from ..ui import StatusLine
from .checkpoints import PACKAGED, model_folder, packaged_model, weight_files

if TYPE_CHECKING:
    import torch

_LAYER = re.compile(r"^model\.layers\.\d+\..*_proj\.weight$")
_HEAD = "lm_head.weight"
_SHARD_BYTES = 2 << 30
# AutoAWQ's order of the eight 4-bit values in an int32.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_TO_SPARE = 64 << 20
CALIBRATOR = PROJECT / ".venv" / "calibrator" / "bin" / "python"
# What calibrates where no other text is named: not the one that answers are judged on, though of the same author.
TEXT = DATA / "texts" / "opticks-book-2.txt"
# Beside the weights, what they were made of: a source that was changed since gives another checkpoint.
_MADE_OF = ".fp8lab-made-of"
# What stands beside a checkpoint's weights: tokenizer, configurations, templates.
_BESIDE = (".json", ".model", ".txt", ".jinja")


def source_of(model: str) -> tuple[Path, bool]:
    """The folder that `model` means, and whether its weights are to be drawn: a folder with weights, a model that a package
    ships, or one of `data/models/` of which there are shapes alone. Raises BadInput for anything else."""
    if (Path(model) / "config.json").is_file():
        return Path(model), False
    if model_config(model) is None:
        raise BadInput(
            f"no model at {model!r}: expected a folder with a config.json and safetensors, or one of {model_names()}"
        )
    return (packaged_model(model), False) if model in PACKAGED else (model_folder(model), True)


def quantize(source: Path, recipe_name: str, target: Path, *, drawn: bool = False, text: Path = TEXT) -> Path:
    """Writes the checkpoint in `source` (safetensors, BF16; with `drawn` only its configuration is read, the weights are
    drawn) into the folder `target` by a recipe, calibrated on `text` if it is one that calibrates, and returns that.

    A target that is there is whole, and returned as it is; one that another process is making is waited for. An interrupted
    call leaves whole files in `TARGET.partial`, from which the next one goes on (one that calibrates begins anew). Raises
    BadInput for what cannot be quantised so or has no room, NotWritten when the disk fills up, with nothing of it left."""
    how, weights = recipe(recipe_name), _Random(source) if drawn else _Stored(source)
    if how.calibration and drawn:
        raise BadInput(f"recipe {recipe_name}: there is nothing to calibrate in random weights; choose "
                       f"{recipe_name.partition('-by-')[0]}, or a trained model")  # fmt: skip
    config = json.loads((source / "config.json").read_text())
    made = config | ({"quantization_config": _quantization_config(how)} if how.method != "none" else {})
    key = _key(made, weights, text if how.calibration else None)
    if (target / "config.json").is_file():
        kept = target / _MADE_OF
        same = json.loads((target / "config.json").read_text()) == made
        if not same or (kept.is_file() and kept.read_text() != key):
            raise BadInput(
                f"{target} holds another checkpoint, or one of other weights: choose another folder, or remove it"
            )
        return target
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise BadInput(f"{target} is there and is no checkpoint: choose another folder, or remove it")
    shards = _plan(how, weights)
    lock = _alone(target)
    try:
        if not (target / "config.json").is_file():
            if how.calibration:
                _calibrate(source, target, how, made, shards, key, text)
            else:
                _write(source, target, how, weights, made, shards, key)
            StatusLine().done(f"{target.name}: {sum(map(_bytes, shards)) / 2**30:.2f} GiB of weights, {how.says}")
    except OSError as error:
        raise NotWritten(f"{target} cannot be written: {error.strerror or error}; nothing of it is left") from None
    finally:
        lock.release()
    return target


def _key(made: dict, weights, text: Path | None) -> str:
    """What a checkpoint is made of: its configuration, the source's files or that they are drawn, and what calibrates it."""
    of = [made, weights.key, sorted(weights.shapes)]
    try:
        of += [hashlib.sha256(text.read_bytes()).hexdigest()] if text else []
    except OSError as error:
        raise BadInput(f"no text at {text} to calibrate on ({error.strerror})") from None
    return hashlib.sha256(json.dumps(of).encode()).hexdigest()


def _alone(target: Path) -> Lock:
    """The lock on making `target`, as soon as no other process has it."""
    status, name = StatusLine(), hashlib.sha256(os.fsencode(target.absolute())).hexdigest()[:16]
    while True:
        try:
            return Lock(cache_dir() / "locks" / f"quantize-{name}.lock", f"checkpoint {target.name}")
        except InUse:
            status.update(f"{target.name}: another process is making it")
            time.sleep(1.0)


def _write(source: Path, target: Path, how: Recipe, weights, made: dict, shards: list, key: str) -> None:
    import torch

    files = {f"model-{n:05d}-of-{len(shards):05d}.safetensors": shard for n, shard in enumerate(shards, start=1)}
    partial = target.with_name(f"{target.name}.partial")
    plan, planned = partial / "plan", json.dumps([key, [list(shard) for shard in shards]])
    if partial.is_dir() and not (plan.is_file() and plan.read_text() == planned):
        shutil.rmtree(partial)
    _check_room(sum(_bytes(shard) for file, shard in files.items() if not (partial / file).exists()), target)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        plan.write_text(planned)
        for number, (file, shard) in enumerate(files.items(), start=1):
            _write_shard(partial / file, shard, how, weights, f"{number} of {len(shards)}")
        held = {part: file for file, shard in files.items() for parts in shard.values() for part in parts}
        index = {"metadata": {"total_size": sum(map(_bytes, shards))}, "weight_map": held}
        (partial / "model.safetensors.index.json").write_text(json.dumps(index))
        plan.unlink()
        _finish(source, partial, made, key, target)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    except torch.OutOfMemoryError:
        raise BadInput(
            "the GPU has no room to round weights on: another process holds it; wait, or set CUDA_VISIBLE_DEVICES= (empty) to "
            "round on the CPU"
        ) from None


def _calibrate(source: Path, target: Path, how: Recipe, made: dict, shards: list, key: str, text: Path) -> None:
    """As `_write`, with the rounding left to llmcompressor; that it wrote what the recipe says is checked tensor by tensor."""
    if not CALIBRATOR.is_file():
        raise BadInput(
            f"{target.name}: no llmcompressor in .venv/calibrator to calibrate it: run `make calibrator` once, or make the "
            "checkpoint where there is network and bring its folder"
        )
    planned = {part: tensor for shard in shards for parts in shard.values() for part, tensor in parts.items()}
    _check_room(sum(map(_bytes, shards)), target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        folder = Path(scratch, "checkpoint")
        asked = how.scheme, str(how.group), how.calibration
        _run_calibrator(
            [str(source.resolve()), str(folder.resolve()), str(text.resolve()), *asked], scratch, target.name
        )
        written = {}
        for file in weight_files(folder):
            with safe_open(file, framework="pt") as opened:
                written |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
        if written != {name: tuple(tensor.shape) for name, tensor in planned.items()}:
            odd = ", ".join(sorted(written.keys() ^ planned.keys())[:3]) or "shapes"
            raise BadInput(f"llmcompressor wrote another checkpoint than {how.says} has ({odd})")
        _finish(source, folder, made, key, target)


def _run_calibrator(arguments: list[str], scratch: str, name: str) -> None:
    """Runs `calibrate.py` in its own environment, in the folder `scratch`. Raises BadInput with its last line when it fails."""
    status, said = StatusLine(), b""
    environment = with_library({key: value for key, value in os.environ.items() if key != "PYTHONPATH"})
    environment["LLM_COMPRESSOR_LOG_LEVEL"] = "ERROR"
    command = [CALIBRATOR, "-m", f"{__package__}.calibrate", *arguments]
    with subprocess.Popen(command, env=environment, cwd=scratch, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT) as process:  # fmt: skip
        try:
            while more := process.stdout.read1():
                said = (said + more)[-4096:]
                if layers := re.findall(rb"\((\d+)/(\d+)\): ", said):
                    status.update(f"{name}: layer {int(layers[-1][0])} of {int(layers[-1][1])} calibrated")
            process.wait()  # it may take a moment to end after its last word
        finally:
            process.kill()
    if process.returncode:
        last = said.decode(errors="replace").strip().splitlines() or [f"exit code {process.returncode}"]
        raise BadInput(f"{name} cannot be calibrated: {last[-1].strip()[:300]}")


def checkpoint_bytes(source: Path, recipe_name: str, *, drawn: bool = False) -> int:
    """Bytes of all tensors that `quantize` would write, exactly."""
    weights = _Random(source) if drawn else _Stored(source)
    return sum(map(_bytes, _plan(recipe(recipe_name), weights)))


class _Stored:
    """The tensors of a checkpoint: safetensors, in one file or by their index."""

    def __init__(self, folder: Path):
        self._files, files = {}, weight_files(folder)
        for file in files:
            try:
                opened = safe_open(file, framework="pt")
            except SafetensorError as error:
                raise BadInput(f"{file} cannot be read as safetensors: {error}") from None
            self._files |= dict.fromkeys(opened.keys(), opened)
        self.shapes = {name: tuple(opened.get_slice(name).get_shape()) for name, opened in sorted(self._files.items())}
        if held := json.loads((folder / "config.json").read_text()).get("quantization_config"):
            raise BadInput(f"{folder} is quantised already ({held.get('quant_method')}): expected a checkpoint in BF16")
        self.key = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]

    def tensor(self, name: str) -> torch.Tensor:
        import torch

        return self._files[name].get_tensor(name).to(_device(), torch.bfloat16)


class _Random:
    """Weights of a model's true shapes, drawn from a normal distribution as wide as trained ones; norms are 1."""

    key = "random"

    def __init__(self, folder: Path):
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        tied = getattr(model.config, "tie_word_embeddings", False)
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        self.shapes = {name: shape for name, shape in sorted(shapes.items()) if not (tied and name == _HEAD)}

    def tensor(self, name: str) -> torch.Tensor:
        import torch

        shape = self.shapes[name]
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        # Which values they are is of no consequence: a GPU draws others than a CPU.
        device = _device()
        drawn = torch.Generator(device).manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]))
        return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0.0, 0.02, generator=drawn)


def _device() -> str:
    """Where weights are drawn and rounded: on a GPU in a hundredth of the time."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _plan(how: Recipe, weights) -> list[dict[str, dict[str, torch.Tensor]]]:
    """The files to write: of each, by the names of its source tensors, what each becomes (on no device: shapes and types).
    Raises BadInput for a matrix that the recipe cannot take."""
    import torch

    shards = [{}]
    for name, shape in weights.shapes.items():
        parts = _converted(how, name, torch.empty(shape, dtype=torch.bfloat16, device="meta"))
        if shards[-1] and _bytes(shards[-1]) + _bytes({name: parts}) > _SHARD_BYTES:
            shards.append({})
        shards[-1][name] = parts
    if not any(map(_LAYER.match, weights.shapes)):
        raise BadInput(
            "the checkpoint holds no matrix of a layer (model.layers.N.…_proj.weight): expected Llama's names"
        )
    if how.head and _HEAD not in weights.shapes:
        raise BadInput(
            f"the checkpoint has no output head of its own ({_HEAD}), it uses the embedding: choose fp8-channel"
        )
    return shards


def _converted(how: Recipe, name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """What stands in the checkpoint for the source tensor `name`: by name, itself or its values and scales."""
    if how.method == "none" or not (_LAYER.match(name) or (how.head and name == _HEAD)):
        return {name: weight}
    out, into = weight.shape
    if out % how.divisor or into % how.divisor:
        raise BadInput(
            f"{name} is {out:,} x {into:,}: {how.says} takes multiples of {how.divisor}; choose another recipe "
            f"(those that take it: {', '.join(k for k, r in RECIPES.items() if not (out % r.divisor or into % r.divisor)) or 'none'})"
        )
    parts = _planned(how, out, into) if weight.is_meta else _parts(how, weight)
    return {f"{name.removesuffix('weight')}{part}": tensor for part, tensor in parts.items()}


def _parts(how: Recipe, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    return (_packed if how.scheme is None else _compressed)(how, weight)


@functools.cache
def _planned(how: Recipe, out: int, into: int) -> dict[str, torch.Tensor]:
    """The parts of a matrix of this shape on no device; a model has a few shapes, each in every layer."""
    import torch

    return _parts(how, torch.empty(out, into, dtype=torch.bfloat16, device="meta"))


@functools.cache
def _scheme(how: Recipe):
    from compressed_tensors.quantization import preset_name_to_scheme

    # To vLLM the output head is no linear layer: it is named.
    scheme = preset_name_to_scheme(how.scheme, ["Linear", "lm_head"] if how.head else ["Linear"])
    if scheme.weights.group_size:
        scheme.weights.group_size = how.group
    return scheme


def _compressed(how: Recipe, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization.utils import calculate_qparams

    scheme = _scheme(how)
    strategy, (out, into) = scheme.weights.strategy, weight.shape
    # Of what each scale is the largest: (outputs, a group) x (inputs, a group).
    groups = {"tensor": (out, into), "channel": (1, into), "group": (1, how.group), "block": (128, 128)}
    rows, columns = groups[strategy]
    blocks = weight.unflatten(0, (-1, rows)).unflatten(2, (-1, columns))
    least, most = (extreme(blocks, (1, 3)).float() for extreme in (torch.amin, torch.amax))
    if strategy == "tensor":
        least, most = least.flatten(), most.flatten()
    scale = most if weight.is_meta else calculate_qparams(least, most, scheme.weights)[0]
    scale = scale.to(torch.bfloat16) if strategy == "group" else scale
    compress = BaseCompressor.get_value_from_registry(how.format).compress
    parts = compress({"weight": weight, "weight_scale": scale}, scheme)
    if scheme.input_activations and not scheme.input_activations.dynamic:
        # Activations come out of a norm: far below FP8's 448 without a scale.
        parts["input_scale"] = torch.ones(1, dtype=torch.float32, device=weight.device)
    return parts


def _packed(how: Recipe, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """4-bit values with a zero point of 8, in groups of 128 along the inputs, eight to an int32: GPTQ packs along the inputs,
    AWQ along the outputs. (What is packed here is less 8.)"""
    import torch
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    groups = weight.T.unflatten(0, (-1, 128)).float()  # (groups, 128, outputs)
    scales = (groups.abs().amax(1) / 7).clamp(min=1e-8)
    values = torch.round(groups / scales[:, None]).clamp(-8, 7).flatten(0, 1).to(torch.int8)
    zeros = torch.zeros(scales.shape, dtype=torch.int8, device=weight.device)
    if how.method == "awq":
        ordered = (one.unflatten(1, (-1, 8))[..., _AWQ_ORDER].flatten(1) for one in (values, zeros))
        packed, zeros = (pack_to_int32(one, 4) for one in ordered)
        return {"qweight": packed, "qzeros": zeros, "scales": scales.to(torch.float16)}
    index = torch.arange(weight.shape[1], dtype=torch.int32, device=weight.device) // 128
    packed, zeros = pack_to_int32(values, 4, packed_dim=0), pack_to_int32(zeros - 1, 4)  # a zero point is stored less 1
    return {"qweight": packed, "qzeros": zeros, "scales": scales.to(torch.float16), "g_idx": index}


def _quantization_config(how: Recipe) -> dict:
    """What the checkpoint's configuration says of it, for vLLM."""
    if how.method == "gptq":
        return {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True, "lm_head": False}
    if how.method == "awq":
        return {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
    from compressed_tensors.quantization import QuantizationConfig

    return QuantizationConfig(
        config_groups={"group_0": _scheme(how)}, quant_method="compressed-tensors", format=how.format,
        ignore=[] if how.head else ["lm_head"], quantization_status="compressed",
    ).model_dump(exclude_none=True, mode="json")  # fmt: skip


def _bytes(shard: Mapping[str, Mapping[str, torch.Tensor]]) -> int:
    return sum(tensor.nbytes for parts in shard.values() for tensor in parts.values())


def _check_room(needed: int, target: Path) -> None:
    there = next(folder for folder in target.absolute().parents if folder.is_dir())
    free = shutil.disk_usage(there).free
    if free < needed + _TO_SPARE:
        raise BadInput(
            f"{target} needs {needed / 2**30:.2f} GiB more, and {free / 2**30:.2f} GiB are free there: make room, or choose "
            "another folder"
        )


def _write_shard(path: Path, shard: Mapping, how: Recipe, weights, said: str) -> None:
    """Writes one file whole or not at all; one that is there is whole."""
    from safetensors.torch import save_file

    if path.exists():
        return
    status, parts, unfinished = StatusLine(), {}, path.with_suffix(".unfinished")
    for number, name in enumerate(shard):
        status.update(f"{path.parent.stem}: file {said}", f"{number:,} of {len(shard):,} tensors")
        converted = _converted(how, name, weights.tensor(name))
        parts |= {part: tensor.to("cpu").contiguous() for part, tensor in converted.items()}
    try:
        save_file(parts, unfinished, metadata={"format": "pt"})
        os.rename(unfinished, path)
    except SafetensorError as error:  # how it tells an OSError
        raise OSError(str(error)) from None
    finally:
        unfinished.unlink(missing_ok=True)


def _finish(source: Path, folder: Path, config: dict, key: str, target: Path) -> None:
    """Puts beside the weights in `folder` the tokenizer, the configuration and what they were made of, and makes it `target`."""
    for path in source.iterdir():
        if path.is_file() and path.suffix in _BESIDE and not path.name.startswith("model"):
            shutil.copyfile(path, folder / path.name)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / _MADE_OF).write_text(key)
    os.rename(folder, target)
