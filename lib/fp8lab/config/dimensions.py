"""A Llama-like model's sizes, by arithmetic: what its weights and its KV cache take, what a token costs to compute."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

from ..paths import DATA
from .flags import flag_of

# Models whose layers are Llama's: grouped-query attention over the whole context and an MLP of three matrices. The
# arithmetic below is no other's.
_LLAMAS_KIN = {"llama", "mistral", "qwen2", "qwen3", "granite", "phi3", "smollm3", "olmo2"}
_LENGTH = re.compile(r"(\d+(?:\.\d+)?)([kKmM]?)")
_UNITS = {"": 1, "k": 1000, "K": 1 << 10, "m": 10**6, "M": 1 << 20}


@dataclass(frozen=True, kw_only=True)
class Dimensions:
    """What a Llama-like model's sizes follow from, under the names of its Hugging Face configuration, and whether its
    checkpoint holds FP8 weights or asks for an FP8 KV cache."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    head_dim: int | None = None
    tie_word_embeddings: bool = False
    max_position_embeddings: int | None = None
    fp8_weights: bool = False
    fp8_kv: bool = False


def dimensions(config: Mapping) -> Dimensions | None:
    """The dimensions in a checkpoint's configuration; None for a model that is not Llama's kin, or whose weights are
    quantised to something else than FP8: this arithmetic is not theirs. Raises ValueError for one that is no count."""
    quantised = config.get("quantization_config") or config.get("compression_config") or {}
    fp8 = _is_fp8(quantised)
    windowed = config.get("sliding_window") and config.get("use_sliding_window", True)
    if config.get("model_type") not in _LLAMAS_KIN or windowed or (quantised and not fp8):
        return None
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    if any(config.get(name) is None for name in names):
        return None
    optional = [
        name for name in ("num_key_value_heads", "head_dim", "max_position_embeddings") if config.get(name) is not None
    ]
    for name in (*names, *optional):
        if type(config[name]) is not int or config[name] < 1:
            raise ValueError(f"{name} is {config[name]!r}, expected a whole number of at least 1")
    kv = quantised.get("kv_cache_scheme") or quantised.get("kv_cache_quant_algo")
    return Dimensions(
        **{name: config[name] for name in names},
        num_key_value_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
        head_dim=config.get("head_dim"),
        tie_word_embeddings=bool(config.get("tie_word_embeddings")),
        max_position_embeddings=config.get("max_position_embeddings"),
        fp8_weights=fp8,
        fp8_kv=_is_float8(kv) or str(kv).upper() == "FP8",
    )


def _is_fp8(quantised: Mapping) -> bool:
    """Whether a checkpoint's `quantization_config` (fp8, compressed-tensors, modelopt) says FP8 weights."""
    groups = quantised.get("config_groups") or {}
    return (
        quantised.get("quant_method") == "fp8"
        or quantised.get("quant_algo") == "FP8"
        or (bool(groups) and all(_is_float8(group.get("weights")) for group in groups.values()))
    )


def _is_float8(scheme) -> bool:
    return isinstance(scheme, Mapping) and (scheme.get("num_bits"), scheme.get("type")) == (8, "float")


class ModelShape:
    """A model's sizes, from its Hugging Face configuration (an object with the configuration's names)."""

    def __init__(self, config):
        self.layers = config.num_hidden_layers
        self.kv_heads = config.num_key_value_heads
        self.head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.heads, self.vocabulary = config.num_attention_heads, config.vocab_size
        heads = self.heads * self.head_size
        attention = config.hidden_size * (2 * heads + 2 * self.kv_heads * self.head_size)
        mlp = 3 * config.hidden_size * config.intermediate_size
        # Elements that a token brings into the layers' four matrix products: of attention (in and out) and of the MLP.
        self.product_inputs = self.layers * (2 * config.hidden_size + heads + config.intermediate_size)
        self.context = getattr(config, "max_position_embeddings", None)
        self.layer_parameters = self.layers * (attention + mlp)
        self.vocabulary_parameters = config.vocab_size * config.hidden_size
        self.embeddings = 1 if config.tie_word_embeddings else 2
        self.some_token = min(1000, config.vocab_size - 1)
        self.fp8_weights, self.fp8_kv = (getattr(config, name, False) for name in ("fp8_weights", "fp8_kv"))

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


def fp8_weights(command: Sequence[str], shape: ModelShape | None = None) -> bool:
    """Whether a vLLM command (or a variant's flags) serves FP8 weights: by its flag, or because the checkpoint, of this
    `shape`, holds them."""
    return "fp8" in flag_of(command, "--quantization") or bool(shape and shape.fp8_weights)


def fp8_kv(command: Sequence[str], shape: ModelShape | None = None) -> bool:
    """Whether a vLLM command (or a variant's flags) keeps the KV cache in FP8: by its flag, or, where that leaves it to the
    checkpoint, of this `shape`, because that asks for it."""
    dtype = flag_of(command, "--kv-cache-dtype")
    return dtype.startswith("fp8") or (dtype == "auto" and bool(shape and shape.fp8_kv))


def most_running(command: Sequence[str]) -> int | None:
    """How many requests a vLLM command lets run at once; None when it leaves that to vLLM."""
    value = flag_of(command, "--max-num-seqs")
    return int(value) if value.isdecimal() else None


def context(command: Sequence[str], shape: ModelShape | None = None) -> int | None:
    """The most tokens, in and out together, that a vLLM command takes in a request (`--max-model-len`, also as 8k, 1000s, or
    8K, 1024s), else its model's, of this `shape`; None where that is not known."""
    if written := _LENGTH.fullmatch(flag_of(command, "--max-model-len")):
        return int(float(written[1]) * _UNITS[written[2]])
    return shape.context if shape else None


def memory_share(command: Sequence[str]) -> float | None:
    """The share (0 to 1) of the card's memory that a vLLM command takes; None when it leaves that to vLLM."""
    try:
        return float(flag_of(command, "--gpu-memory-utilization"))
    except ValueError:
        return None
