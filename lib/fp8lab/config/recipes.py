"""Recipes: the number formats that a checkpoint's weights can be written in, and what each means for size and speed.

`models.quantize` writes them; a variant names one (`recipe = "int8"`) to be served with it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import BadInput


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


# A group of 128 has a scale of 16 bits; GPTQ and AWQ have a zero point of 4 bits beside it.
_GROUPS = 0.5 + 2 / 128
_ALL = [
    WeightFormat("bf16"),
    WeightFormat("fp8", 1.0, eight_bit=True),
    WeightFormat("fp8-head", 1.0, eight_bit=True, head=True),
    WeightFormat("int8", 1.0, eight_bit=True),
    WeightFormat("int4", _GROUPS),
    WeightFormat("int4-64", 0.5 + 2 / 64),
    # Its kernel wants each group's FP8 scale eight times over (vLLM's cutlass_pack_scale_fp8): on the card, not in the file.
    WeightFormat("w4a8", 0.5 + 8 / 128, eight_bit=True),
]
FORMATS: Mapping[str, WeightFormat] = {one.name: one for one in _ALL}
BF16, FP8 = FORMATS["bf16"], FORMATS["fp8"]


@dataclass(frozen=True)
class Recipe:
    """How a checkpoint's weights are written: `weights` names their format, `scheme` compressed-tensors' name of its kind
    (None: `method` has one of its own), `says` what it is. `group`: for how many weights of a row INT4 has one scale.
    `divisor`: what both dimensions of a matrix must be a multiple of."""

    says: str
    weights: str
    scheme: str | None = None
    method: str = "compressed-tensors"
    format: str = "float-quantized"
    group: int = 128
    divisor: int = 16

    @property
    def head(self) -> bool:
        return FORMATS[self.weights].head


RECIPES: Mapping[str, Recipe] = {
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
    "int4-awq": Recipe("INT4 weights in groups of 128, in AWQ's format", "int4", method="awq", divisor=128),
}  # fmt: skip


def recipe(name: str) -> Recipe:
    """The recipe of this name. Raises BadInput for another."""
    if name not in RECIPES:
        raise BadInput(f"no recipe {name!r} (there are: {', '.join(RECIPES)})")
    return RECIPES[name]
