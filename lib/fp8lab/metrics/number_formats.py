"""The two FP8 formats in numbers: their values, and what rounding to them does to a tensor. Pure functions.

E4M3 (4 exponent bits, 3 mantissa bits; up to 448, no infinity) is for inference, E5M2 (5 and 2; up to 57,344) for
gradients: OCP 8-bit Floating Point Specification 1.0. INT8 stands beside them for what an outlier does to a format
whose steps are all the same.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

# Bits of exponent and mantissa, and torch's name.
FORMATS = {"E4M3": (4, 3, "float8_e4m3fn"), "E5M2": (5, 2, "float8_e5m2")}
INT8_LARGEST = 127.0


@dataclass(frozen=True)
class Error:
    """What rounding did. `relative` is ||x - rounded|| / ||x||; `clipped` the share of values beyond the largest."""

    relative: float
    clipped: float


def values(name: str) -> np.ndarray:
    """All finite values of a format, ascending, each once (float64): 253 of E4M3, 247 of E5M2."""
    exponent_bits, mantissa_bits, _ = FORMATS[name]
    exponents, mantissas = np.divmod(np.arange(128), 2**mantissa_bits)
    bias = 2 ** (exponent_bits - 1) - 1
    numbers = ((exponents > 0) + mantissas / 2**mantissa_bits) * 2.0 ** (np.maximum(exponents, 1) - bias)
    # E4M3 gives up its last code alone, for NaN; E5M2 its last exponent, as IEEE's formats do.
    finite = numbers[:-1] if name == "E4M3" else numbers[exponents < exponents[-1]]
    return np.unique([-finite, finite])


def largest(name: str) -> float:
    """The largest finite value of a format, INT8 included."""
    return INT8_LARGEST if name == "INT8" else float(values(name)[-1])


def per_tensor_scale(tensor: "torch.Tensor", name: str) -> float:
    """The scale that maps the tensor's largest magnitude to the format's largest value; 1 for a tensor of zeros."""
    return float(tensor.abs().max()) / largest(name) or 1.0


def round_to(tensor: "torch.Tensor", name: str, scale: float) -> "torch.Tensor":
    """`tensor` divided by `scale`, rounded to the format (to nearest, beyond its largest value clipped), and back."""
    import torch

    limit = largest(name)
    scaled = (tensor.float() / scale).clamp(-limit, limit)
    rounded = scaled.round() if name == "INT8" else scaled.to(getattr(torch, FORMATS[name][2])).float()
    return rounded * scale


def rounding_error(tensor: "torch.Tensor", name: str, scale: float | None = None) -> Error:
    """The error of rounding `tensor`; `scale` defaults to the tensor's own (`per_tensor_scale`)."""
    tensor = tensor.float()
    scale = per_tensor_scale(tensor, name) if scale is None else scale
    relative = float((tensor - round_to(tensor, name, scale)).norm() / tensor.norm().clamp_min(1e-30))
    return Error(relative, float((tensor.abs() > largest(name) * scale).float().mean()))


def outlier_error(tensor: "torch.Tensor", name: str, times_rms: float) -> float:
    """The relative error of all other values after the first one is made `times_rms` times the tensor's RMS."""
    tensor = tensor.float().flatten().clone()
    tensor[0] = times_rms * float(tensor.square().mean().sqrt())
    rest, rounded = tensor[1:], round_to(tensor, name, per_tensor_scale(tensor, name))[1:]
    return float((rest - rounded).norm() / rest.norm())


def relative_step(name: str, magnitudes: np.ndarray) -> np.ndarray:
    """The worst relative rounding error at each magnitude (> 0): half the gap between its neighbours over it."""
    grid = values(name)[values(name) >= 0]
    above = np.clip(np.searchsorted(grid, magnitudes, side="right"), 1, len(grid) - 1)
    gap = grid[above] - grid[above - 1]
    # Beyond the largest value everything is clipped to it.
    return np.maximum(gap / 2, magnitudes - grid[-1]) / magnitudes
