"""A trained model's own tensors, to round them and look: its weight matrices, and the KV cache of a text."""

from __future__ import annotations

import contextlib
import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import BadInput

if TYPE_CHECKING:
    import torch

_MATRIX = re.compile(r"\.([a-z]+_proj)\.weight$")


def matrices(folder: Path) -> Iterator[tuple[str, str, torch.Tensor]]:
    """(kind, name, tensor) of every weight matrix that FP8 rounds: the linear layers, neither embedding nor head.

    `kind` is q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj or down_proj. Tensors come one at a time.
    """
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    files = (
        sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    )
    for file in files:
        if not (folder / file).is_file():
            raise BadInput(f"{folder} holds no {file}; the weights must be safetensors")
        with safe_open(folder / file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                if kind := _MATRIX.search(name):
                    yield kind[1], name, opened.get_tensor(name)


def kv_cache(folder: Path, text: str, tokens: int = 512) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of every layer after the model has read the first `tokens` tokens of `text`.

    Each is (KV heads, tokens, head size) float32, computed in BF16 as served (on a GPU if there is one).
    """
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
