"""A Llama-like model's sizes, by arithmetic: what its weights and its KV cache take, what a token costs to compute; and the
number formats that its weights can be written in."""

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass
from pathlib import Path
from types import SimpleNamespace

from ..errors import BadInput
from ..paths import DATA, PLAIN_NAME
from .flags import flag_of

# Models whose layers are Llama's: grouped-query attention over the whole context and an MLP of three matrices. The
# arithmetic below is no other's.
_LLAMAS_KIN = {"llama", "mistral", "qwen2", "qwen3", "granite", "phi3", "smollm3", "olmo2"}
_LENGTH = re.compile(r"(\d+(?:\.\d+)?)([kKmM]?)")
_UNITS = {"": 1, "k": 1000, "K": 1 << 10, "m": 10**6, "M": 1 << 20}


@dataclass(frozen=True)
class WeightFormat:
    """How the matrices of a model's layers are held and multiplied. `weight_bytes`: a weight's on the card, with its share of scales;
    `eight_bit`: products run at the card's FP8 peak, which on Hopper is INT8's too (NVIDIA's datasheets), and their inputs
    are quantised step by step; `head`: the output head is held and multiplied so too."""

    name: str
    weight_bytes: float = 2.0
    eight_bit: bool = False
    head: bool = False

    @property
    def head_bytes(self) -> float:
        return self.weight_bytes if self.head else 2.0


# A group of 128 has a scale of 16 bits.
_GROUPS = 0.5 + 2 / 128
_ALL = [
    WeightFormat("bf16"),
    WeightFormat("fp8", 1.0, eight_bit=True),
    WeightFormat("fp8-head", 1.0, eight_bit=True, head=True),
    WeightFormat("int8", 1.0, eight_bit=True),
    WeightFormat("int4", _GROUPS),
    WeightFormat("int4-64", 0.5 + 2 / 64),
    # As AWQ has it, groups have a zero point too: 4 bits in the file, and as wide as the scale for the kernel (vLLM's Machete).
    WeightFormat("int4-asymmetric", 0.5 + 4 / 128),
    # Its kernel wants each group's FP8 scale eight times over (vLLM's cutlass_pack_scale_fp8): on the card, not in the file.
    WeightFormat("w4a8", 0.5 + 8 / 128, eight_bit=True),
]
FORMATS: Mapping[str, WeightFormat] = {one.name: one for one in _ALL}
BF16, FP8 = FORMATS["bf16"], FORMATS["fp8"]


@dataclass(frozen=True)
class Recipe:
    """How a checkpoint's weights are written by `models.quantize`, and named by a variant that serves them (`recipe = "int8"`):
    `weights` names their format, `scheme` compressed-tensors' name of its kind (None: `method` has one of its own), `says` what
    it is. `group`: for how many weights of a row INT4 has one scale. `divisor`: what both dimensions of a matrix must be a
    multiple of. `calibration`: by what llmcompressor rounds the weights on a text, gptq or awq ("": each is rounded to the
    nearest value)."""

    says: str
    weights: str
    scheme: str | None = None
    method: str = "compressed-tensors"
    format: str = "float-quantized"
    group: int = 128
    divisor: int = 16
    calibration: str = ""

    @property
    def head(self) -> bool:
        return FORMATS[self.weights].head


_NEAREST = {
    "bf16": Recipe("BF16 weights, as they are", "bf16", method="none", divisor=1),
    "fp8-static": Recipe("FP8 weights and activations, a fixed scale a tensor", "fp8", "FP8"),
    "fp8-channel": Recipe("FP8 weights with a scale a row, activations scaled token by token", "fp8", "FP8_DYNAMIC"),
    "fp8-block": Recipe("FP8 weights with a scale for each 128 x 128 of them", "fp8", "FP8_BLOCK", divisor=128),
    "fp8-head": Recipe("as fp8-channel, the output head too", "fp8-head", "FP8_DYNAMIC"),
    "int8": Recipe(
        "INT8 weights with a scale a row, activations scaled token by token", "int8", "W8A8", format="int-quantized"
    ),
    "int4": Recipe("INT4 weights in groups of 128, BF16 activations", "int4", "W4A16", format="pack-quantized", divisor=128),
    "int4-64": Recipe(
        "INT4 weights in groups of 64, BF16 activations", "int4-64", "W4A16", format="pack-quantized", group=64, divisor=64
    ),
    "w4a8": Recipe("INT4 weights in groups of 128, FP8 activations", "w4a8", "W4AFP8", format="pack-quantized", divisor=128),
    "int4-gptq": Recipe("INT4 weights in groups of 128, in GPTQ's format", "int4", method="gptq", divisor=128),
    "int4-awq": Recipe("INT4 weights in groups of 128, in AWQ's format", "int4-asymmetric", method="awq", divisor=128),
}  # fmt: skip
_METHODS = {"int8": ("gptq",), "int4": ("gptq", "awq"), "int4-64": ("gptq", "awq"), "w4a8": ("gptq",)}
RECIPES: Mapping[str, Recipe] = _NEAREST | {
    f"{name}-by-{by}": dataclasses.replace(_NEAREST[name], says=f"{_NEAREST[name].says}; {by.upper()}", calibration=by)
    for name, methods in _METHODS.items()
    for by in methods
}


def recipe(name: str) -> Recipe:
    """The recipe of this name. Raises BadInput for another."""
    if name not in RECIPES:
        raise BadInput(f"no recipe {name!r} (there are: {', '.join(RECIPES)})")
    return RECIPES[name]


@dataclass(frozen=True, kw_only=True)
class Dimensions:
    """What a Llama-like model's sizes follow from, under the names of its Hugging Face configuration; the format of its
    checkpoint's weights (`FORMATS`), and whether that asks for an FP8 KV cache."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    head_dim: int | None = None
    tie_word_embeddings: bool = False
    max_position_embeddings: int | None = None
    weights: str = "bf16"
    fp8_kv: bool = False
    fp8_weights: InitVar[bool] = False  # what older runs say instead of `weights`

    def __post_init__(self, fp8_weights: bool) -> None:
        if fp8_weights:
            object.__setattr__(self, "weights", "fp8")


def dimensions(config: Mapping) -> Dimensions | None:
    """The dimensions in a checkpoint's configuration; None for a model that is not Llama's kin, or whose weights are in a
    format that is not known here: this arithmetic is not theirs. Raises ValueError for one that is no count."""
    quantised = quantisation(config)
    weights = _weights_of(quantised)
    windowed = config.get("sliding_window") and config.get("use_sliding_window", True)
    if config.get("model_type") not in _LLAMAS_KIN or windowed or weights is None:
        return None
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    optional = ("num_key_value_heads", "head_dim", "max_position_embeddings")
    counts = {name: config[name] for name in (*names, *optional) if config.get(name) is not None}
    if not counts.keys() >= set(names):
        return None
    for name, count in counts.items():
        if type(count) is not int or count < 1:
            raise ValueError(f"{name} is {count!r}, expected a whole number of at least 1")
    counts.setdefault("num_key_value_heads", counts["num_attention_heads"])
    kv = quantised.get("kv_cache_scheme") or quantised.get("kv_cache_quant_algo")
    fp8_kv, tied = _is_float8(kv) or str(kv).upper() == "FP8", bool(config.get("tie_word_embeddings"))
    return Dimensions(**counts, tie_word_embeddings=tied, weights=weights, fp8_kv=fp8_kv)


def quantisation(config: Mapping) -> Mapping:
    """What a checkpoint's configuration says of how it is quantised; empty where it says nothing."""
    return config.get("quantization_config") or config.get("compression_config") or {}


def _weights_of(quantised: Mapping) -> str | None:
    """The format of a checkpoint's weights by its `quantization_config` (none, fp8, modelopt, gptq, awq, compressed-tensors);
    None for another one."""
    if not quantised:
        return "bf16"
    if quantised.get("quant_method") == "fp8" or quantised.get("quant_algo") == "FP8":
        return "fp8"
    if (method := quantised.get("quant_method")) in ("gptq", "awq") and quantised.get("bits") == 4:
        symmetric = quantised.get("sym", True) if method == "gptq" else not quantised.get("zero_point", True)
        return "int4" if symmetric else "int4-asymmetric"
    found = {_of_group(group) for group in (quantised.get("config_groups") or {}).values()}
    return found.pop() if len(found) == 1 else None


def _of_group(group: Mapping) -> str | None:
    weights, inputs = (group.get(name) or {} for name in ("weights", "input_activations"))
    held = weights.get("num_bits"), weights.get("type")
    if held == (8, "float"):
        return "fp8-head" if any("lm_head" in str(target) for target in group.get("targets") or ()) else "fp8"
    if held == (8, "int") and (inputs.get("num_bits"), inputs.get("type")) == (8, "int"):
        return "int8"
    if held == (4, "int"):
        if inputs:
            return "w4a8" if _is_float8(inputs) else None
        return "int4" if weights.get("symmetric", True) else "int4-asymmetric"
    return None


def _is_float8(scheme) -> bool:
    return isinstance(scheme, Mapping) and (scheme.get("num_bits"), scheme.get("type")) == (8, "float")


class ModelShape:
    """A model's sizes, from its Hugging Face configuration or its `Dimensions` (an object with the configuration's names).
    `weights` is the format of the checkpoint that is served, by default that of the dimensions, or BF16."""

    def __init__(self, config, weights: WeightFormat | None = None):
        self.layers, self.hidden = config.num_hidden_layers, config.hidden_size
        self.intermediate = config.intermediate_size
        self.kv_heads = config.num_key_value_heads
        self.head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.heads, self.vocabulary = config.num_attention_heads, config.vocab_size
        heads = self.heads * self.head_size
        attention = config.hidden_size * (2 * heads + 2 * self.kv_heads * self.head_size)
        mlp = 3 * config.hidden_size * config.intermediate_size
        # Elements that a token brings into the layers' four matrix products: of attention (in and out) and of the MLP.
        self.product_inputs = self.layers * (2 * config.hidden_size + heads + config.intermediate_size)
        # Two products (scores and values) of two FLOPs a pair of tokens, head, and element.
        self.pair_flops = 4.0 * self.layers * heads
        self.context = getattr(config, "max_position_embeddings", None)
        self.layer_parameters = self.layers * (attention + mlp)
        self.vocabulary_parameters = config.vocab_size * config.hidden_size
        self.embeddings = 1 if config.tie_word_embeddings else 2
        self.some_token = min(1000, config.vocab_size - 1)
        self.weights = weights or FORMATS[getattr(config, "weights", "bf16")]
        self.fp8_kv = getattr(config, "fp8_kv", False)

    def weight_bytes(self, weights: WeightFormat) -> int:
        """The layers' matrices are quantised, and the output head where the format says so; the embedding stays BF16."""
        tied = (self.embeddings - 1) * weights.head_bytes
        return int(self.layer_parameters * weights.weight_bytes + self.vocabulary_parameters * (2 + tied))

    def weight_bytes_read(self, weights: WeightFormat) -> int:
        """What one step reads of the weights: all but the input embedding, of which it looks up a few rows."""
        return int(self.layer_parameters * weights.weight_bytes + self.vocabulary_parameters * weights.head_bytes)

    def kv_bytes_per_token(self, itemsize: int) -> int:
        return 2 * self.layers * self.kv_heads * self.head_size * itemsize

    def flops(self, tokens: float, emitted: float) -> tuple[float, float]:
        """(the layers', the output head's) matrix products of steps that compute `tokens` and emit `emitted` of them: the
        head runs for those alone. Attention's own products are left out: of Llama-3-8B's 1 % at a context of 300 tokens,
        9 % at 2,300."""
        return 2.0 * tokens * self.layer_parameters, 2.0 * emitted * self.vocabulary_parameters


def model_names() -> str:
    """The models in `data/models/`, for a message."""
    return ", ".join(sorted(path.name for path in (DATA / "models").iterdir()))


def model_config(name: str) -> Path | None:
    """The configuration of a model in `data/models/`; None when there is no such model. A path is no name of one."""
    path = DATA / "models" / name / "config.json"
    return path if PLAIN_NAME.fullmatch(name) and path.is_file() else None


def model_shape(name: str, weights: WeightFormat | None = None) -> ModelShape | None:
    """The shape of a model in `data/models/`, with its weights in this format; None when there is no such model."""
    path = model_config(name)
    return path and ModelShape(SimpleNamespace(**json.loads(path.read_text())), weights)


def weight_format(command: Sequence[str], shape: ModelShape | None = None) -> WeightFormat:
    """The format of the weights that a vLLM command (or a variant's flags) serves: FP8 by its flag, or as the checkpoint, of
    this `shape`, holds them."""
    held = shape.weights if shape else BF16
    return FP8 if held is BF16 and "fp8" in flag_of(command, "--quantization") else held


def fp8_kv(command: Sequence[str], shape: ModelShape | None = None) -> bool:
    """Whether a vLLM command (or a variant's flags) keeps the KV cache in FP8: by its flag, or, where that leaves it to the
    checkpoint, of this `shape`, because that asks for it."""
    dtype = flag_of(command, "--kv-cache-dtype")
    return dtype.startswith("fp8") or (dtype == "auto" and bool(shape and shape.fp8_kv))


def replicas(command: Sequence[str]) -> int:
    """How many copies of the model a vLLM command serves side by side (data parallel), each with an EngineCore of its own."""
    return count_of(command, "--data-parallel-size") or 1


def pipeline_stages(command: Sequence[str]) -> int:
    """In how many stages, each on cards of its own, a vLLM command puts the layers (pipeline parallel)."""
    return count_of(command, "--pipeline-parallel-size") or 1


def cards(command: Sequence[str]) -> int:
    """How many cards a vLLM command takes: those that share each layer, times those that share the layers, times its
    replicas."""
    shared = [count_of(command, name) or 1 for name in ("--tensor-parallel-size", "--prefill-context-parallel-size")]
    return replicas(command) * pipeline_stages(command) * math.prod(shared)


def most_running(command: Sequence[str]) -> int | None:
    """How many requests a vLLM command lets run at once; None when it leaves that to vLLM."""
    return count_of(command, "--max-num-seqs")


def count_of(command: Sequence[str], name: str) -> int | None:
    """A flag's whole number, also as 8k, 1000s, or 8K, 1024s."""
    written = _LENGTH.fullmatch(flag_of(command, name))
    return int(float(written[1]) * _UNITS[written[2]]) if written else None


def context(command: Sequence[str], shape: ModelShape | None = None) -> int | None:
    """The most tokens, in and out together, that a vLLM command takes in a request, else its model's, of this `shape`; None where
    that is not known."""
    return count_of(command, "--max-model-len") or (shape.context if shape else None)


def memory_share(command: Sequence[str]) -> float | None:
    """The share (0 to 1) of the card's memory that a vLLM command takes; None when it leaves that to vLLM."""
    try:
        return float(flag_of(command, "--gpu-memory-utilization"))
    except ValueError:
        return None
