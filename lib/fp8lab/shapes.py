"""A Llama-like model's sizes, by arithmetic: what its weights and its KV cache take, what a token costs to compute."""

import itertools
import json
from collections.abc import Sequence
from types import SimpleNamespace

from .paths import DATA


class ModelShape:
    """A model's sizes, from its Hugging Face configuration (an object with the configuration's names)."""

    def __init__(self, config):
        self.layers = config.num_hidden_layers
        self.kv_heads = config.num_key_value_heads
        self.head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads = config.num_attention_heads * self.head_size
        attention = config.hidden_size * (2 * heads + 2 * self.kv_heads * self.head_size)
        mlp = 3 * config.hidden_size * config.intermediate_size
        self.layer_parameters = self.layers * (attention + mlp)
        self.vocabulary_parameters = config.vocab_size * config.hidden_size
        self.embeddings = 1 if config.tie_word_embeddings else 2
        self.some_token = min(1000, config.vocab_size - 1)

    def weight_bytes(self, fp8: bool) -> int:
        """FP8 quantises the layers' matrices; the embedding and the output head stay BF16."""
        return self.layer_parameters * (1 if fp8 else 2) + self.embeddings * self.vocabulary_parameters * 2

    def weight_bytes_read(self, fp8: bool) -> int:
        """What one step reads of the weights: all but the input embedding, of which it looks up a few rows."""
        return self.layer_parameters * (1 if fp8 else 2) + self.vocabulary_parameters * 2

    def kv_bytes_per_token(self, itemsize: int) -> int:
        return 2 * self.layers * self.kv_heads * self.head_size * itemsize

    def flops(self, tokens: float, emitted: float) -> tuple[float, float]:
        """(the layers', the output head's) matrix products of steps that compute `tokens` and emit `emitted` of them: the
        head, BF16 in every variant, runs for those alone. Attention's own products are left out (about 1 % here)."""
        return 2.0 * tokens * self.layer_parameters, 2.0 * emitted * self.vocabulary_parameters


def model_shape(name: str) -> ModelShape | None:
    """The shape of a model in `data/models/`; None when there is no such model."""
    path = DATA / "models" / name / "config.json"
    return ModelShape(SimpleNamespace(**json.loads(path.read_text()))) if name and path.is_file() else None


def fp8_weights(command: Sequence[str]) -> bool:
    """Whether a vLLM command (or a variant's flags) quantises the weights to FP8."""
    return flag_of(command, "--quantization", "-q").startswith("fp8")


def fp8_kv(command: Sequence[str]) -> bool:
    """Whether a vLLM command (or a variant's flags) keeps the KV cache in FP8."""
    return flag_of(command, "--kv-cache-dtype").startswith("fp8")


def most_running(command: Sequence[str]) -> int | None:
    """How many requests a vLLM command lets run at once; None when it leaves that to vLLM."""
    value = flag_of(command, "--max-num-seqs")
    return int(value) if value.isdecimal() else None


def memory_share(command: Sequence[str]) -> float | None:
    """The share (0 to 1) of the card's memory that a vLLM command takes; None when it leaves that to vLLM."""
    value = flag_of(command, "--gpu-memory-utilization")
    return None if value == "auto" else float(value)


def flag_of(command: Sequence[str], *names: str) -> str:
    """The value of a command's flag, given as `--flag value` or `--flag=value`; "auto" if it is not given."""
    words = [part for word in command for part in (word.split("=", 1) if word.startswith("-") else [word])]
    return next((value for name, value in itertools.pairwise(words) if name in names), "auto")
