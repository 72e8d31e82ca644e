"""What a number format does: to a model's answers, and what rounding to it does to a tensor. Pure functions.

A reading holds, at every position of a text, the k likeliest next tokens and the one that came, with their
log-probabilities; two readings of the same text are compared position by position. Logarithms are natural.

Of the FP8 formats E4M3 (4 exponent bits, 3 mantissa bits; up to 448, no infinity) is for inference, E5M2 (5 and 2; up to
57,344) for gradients: OCP 8-bit Floating Point Specification 1.0. INT8 stands beside them for what an outlier does to a
format whose steps are all the same.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    import torch

RESAMPLES, _SEED = 1000, 0
_ROWS_AT_ONCE = 8192
_RATIOS = ("perplexity_ratio", "output_ratio")


@dataclass(frozen=True)
class Reading:
    """The next-token distributions along a text, one row a predicted token, n rows in the text's order. `document` (n,)
    int32: its document; `token` (n,) int32: the token that came; `logprob` (n,) float32: its natural log-probability;
    `top_ids` (n, k) int32 and `top_logprobs` (n, k) float32: the k likeliest, likeliest first."""

    document: np.ndarray
    token: np.ndarray
    logprob: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray

    def to_table(self) -> pd.DataFrame:
        columns = {"document": self.document, "token": self.token, "logprob": self.logprob}
        return pd.DataFrame(columns | {"top_ids": list(self.top_ids), "top_logprobs": list(self.top_logprobs)})

    @classmethod
    def from_table(cls, table: pd.DataFrame) -> "Reading":
        plain = (table[name].to_numpy() for name in ("document", "token", "logprob"))
        return cls(*plain, *(np.stack(table[name].to_numpy()) for name in ("top_ids", "top_logprobs")))


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """A variant against the reference, on the same text and prompts.

    perplexity        exp(mean negative log-probability) of the text
    perplexity_ratio  the variant's over the reference's, resampled in pairs; 1 is no difference
    kl_mean, kl_p99   nats a token, KL(reference || variant), a lower bound (see `kl_lower_bound`)
    unlisted_mass     mean probability outside the tokens that both list: what the bound could not tell apart
    top1_agreement    share of positions at which both find the same token likeliest
    same_prefix       mean number of tokens for which two greedy answers are the same
    same_answers      share of answers that are the same to their end
    output_ratio      output tokens of all answers, the variant's over the reference's
    """

    perplexity: Estimate
    perplexity_ratio: Estimate
    kl_mean: Estimate
    kl_p99: Estimate
    unlisted_mass: float
    top1_agreement: Estimate
    same_prefix: Estimate
    same_answers: Estimate
    output_ratio: Estimate

    @property
    def kept(self) -> Estimate:
        """The reference's perplexity over the variant's."""
        ratio = self.perplexity_ratio
        return Estimate(1 / ratio.value, 1 / ratio.high, 1 / ratio.low)


def compare(positions: pd.DataFrame, answers: pd.DataFrame, reference: tuple[pd.DataFrame, pd.DataFrame]) -> Comparison:
    """The comparison out of the stored tables: `position_table` of a variant with its answers, and the reference's.
    Intervals are bootstrapped over documents for the text and over prompts for the answers."""
    before, answers_before = reference
    document = positions["document"].to_numpy()
    logprob, logprob_before = (table["logprob"].to_numpy(float) for table in (positions, before))
    kl = positions["kl"].to_numpy(float)
    same_top = positions["same_top"].to_numpy(float)
    pairs = list(zip(answers_before["tokens"], answers["tokens"], strict=True))
    prompts = np.arange(len(pairs))
    prefix = np.array([identical_prefix(a, b) for a, b in pairs], float)
    same = np.array([len(a) == len(b) == p for (a, b), p in zip(pairs, prefix, strict=True)], float)
    lengths = [np.array([len(tokens) for tokens in side], float) for side in zip(*pairs, strict=True)]
    return Comparison(
        perplexity=_exp(mean_interval(-logprob, document)),
        perplexity_ratio=_exp(mean_interval(logprob_before - logprob, document)),
        kl_mean=mean_interval(kl, document),
        kl_p99=quantile_interval(kl, document, 0.99),
        unlisted_mass=float(positions["unlisted"].to_numpy(float).mean()),
        top1_agreement=mean_interval(same_top, document),
        same_prefix=mean_interval(prefix, prompts),
        same_answers=mean_interval(same, prompts),
        output_ratio=mean_interval(lengths[1], prompts, weights=lengths[0]),
    )


def position_table(reading: Reading, reference: Reading) -> pd.DataFrame:
    """What is kept of a reading, one row a position: document, logprob, and against the reference same_top, kl,
    unlisted. `kl` and `unlisted` are those of `kl_lower_bound` in half precision, three digits of a bound. Raises
    ValueError when the two read different texts."""
    if not np.array_equal(reading.token, reference.token):
        raise ValueError("the two readings are of different texts")
    kl, unlisted = kl_lower_bound(reference, reading)
    table = pd.DataFrame({"document": reading.document, "logprob": reading.logprob})
    table["same_top"] = reading.top_ids[:, 0] == reference.top_ids[:, 0]
    return table.assign(kl=kl.astype(np.float16), unlisted=unlisted.astype(np.float16))


def kl_lower_bound(reference: Reading, variant: Reading) -> tuple[np.ndarray, np.ndarray]:
    """A lower bound of KL(reference || variant) at every position, (n,) nats, and the mass it lumps together, (n,).

    Let S be the tokens that both readings list (their top k and the token that came). All others count as one
    outcome: the bound is sum over S of p ln(p/q), plus r ln(r/s) with r = 1 - p(S), s = 1 - q(S). By the log-sum
    inequality (data processing) that never exceeds the full divergence, and equals it where p/q is constant
    outside S. From above the full divergence is not bounded by k log-probabilities; `unlisted` is r, the part of
    the reference's probability that was lumped: where it is small, so is what may be missing. SmolLM2-135M on the
    shipped text: 20 tokens list 80 % of the probability, and the bound is 70 to 75 % of the full divergence.
    """
    bounds, masses = [], []
    for start in range(0, len(reference.token), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        ids_p, logs_p = _listed(reference, rows)
        ids_q, logs_q = _listed(variant, rows)
        matches = (ids_p[:, :, None] == ids_q[:, None, :]) & (ids_p[:, :, None] >= 0)
        shared = matches.any(axis=2)
        logs_q_at_p = np.take_along_axis(logs_q, matches.argmax(axis=2), axis=1)
        p, q = np.where(shared, np.exp(logs_p), 0.0), np.where(shared, np.exp(logs_q_at_p), 0.0)
        listed = np.where(shared, p * (logs_p - logs_q_at_p), 0.0).sum(axis=1)
        # Log-probabilities in single precision may add up to a little over 1; what is left is known to about 1e-7.
        r, s = (np.clip(1 - side.sum(axis=1), 1e-7, 1) for side in (p, q))
        bounds.append(np.maximum(listed + r * np.log(r / s), 0))
        masses.append(np.clip(1 - p.sum(axis=1), 0, 1))
    return np.concatenate(bounds), np.concatenate(masses)


def identical_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many leading tokens two answers share."""
    length = min(len(one), len(other))
    differing = np.flatnonzero(np.asarray(one[:length]) != np.asarray(other[:length]))
    return int(differing[0]) if differing.size else length


def mean_interval(values: np.ndarray, group: np.ndarray, weights: np.ndarray | None = None) -> Estimate:
    """sum(values) / sum(weights) (weights 1: the mean), resampling whole groups; `values` and `group` are (n,)."""
    weights = np.ones_like(values, float) if weights is None else weights
    _, index = np.unique(group, return_inverse=True)
    sums, masses = np.bincount(index, values), np.bincount(index, weights)
    draws = np.random.default_rng(_SEED).integers(len(sums), size=(RESAMPLES, len(sums)))
    return _estimate(sums.sum() / masses.sum(), sums[draws].sum(axis=1) / masses[draws].sum(axis=1))


def quantile_interval(values: np.ndarray, group: np.ndarray, q: float) -> Estimate:
    """The quantile `q` (numpy's linear) of all values, resampling whole groups."""
    parts = [values[group == each] for each in np.unique(group)]
    draws = np.random.default_rng(_SEED).integers(len(parts), size=(RESAMPLES // 4, len(parts)))
    resampled = [np.quantile(np.concatenate([parts[i] for i in draw]), q) for draw in draws]
    return _estimate(np.quantile(values, q), np.array(resampled))


def distinguishable(metric: str, variant: Comparison, floor: Comparison) -> bool:
    """Whether a variant differs from the reference by more than the reference does from itself in another batch
    composition: further from no difference than the floor, and further from the floor than the two intervals, taken
    as independent (their facing half-widths added in quadrature), allow."""
    value, low, high = _differences(metric, getattr(variant, metric))
    own, own_low, own_high = _differences(metric, getattr(floor, metric))
    facing = (value - low, own_high - own) if value > own else (high - value, own - own_low)
    further = abs(value) > abs(own) if metric in _RATIOS else value > own
    return further and abs(value - own) > math.hypot(*facing)


def _differences(metric: str, estimate: Estimate) -> tuple[float, float, float]:
    """An estimate and its ends as differences that can be subtracted: of ratios the logarithms; shares and lengths
    that stay the same are turned round, so that more is further."""
    value, low, high = estimate.value, estimate.low, estimate.high
    if metric in _RATIOS:
        return math.log(value), math.log(low), math.log(high)
    return (value, low, high) if metric in ("kl_mean", "kl_p99") else (-value, -high, -low)


def _listed(reading: Reading, rows: slice) -> tuple[np.ndarray, np.ndarray]:
    """Ids and log-probabilities of the top k and the token that came, (n, k + 1); it counts once (-1: not again)."""
    ids, token = reading.top_ids[rows], reading.token[rows]
    again = (ids == token[:, None]).any(axis=1)
    ids = np.column_stack([ids, np.where(again, -1, token)])
    return ids, np.column_stack([reading.top_logprobs[rows], reading.logprob[rows]]).astype(float)


def _estimate(value: float, resampled: np.ndarray) -> Estimate:
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Estimate(float(value), float(low), float(high))


def _exp(estimate: Estimate) -> Estimate:
    return Estimate(math.exp(estimate.value), math.exp(estimate.low), math.exp(estimate.high))


# Bits of exponent and mantissa, and torch's name.
FORMATS = {"E4M3": (4, 3, "float8_e4m3fn"), "E5M2": (5, 2, "float8_e5m2")}
INT8_LARGEST = 127.0


@dataclass(frozen=True)
class Error:
    """What rounding did. `relative` is ||x - rounded|| / ||x||; `clipped` the share of values beyond the largest."""

    relative: float
    clipped: float


def values_of(name: str) -> np.ndarray:
    """All finite values of a format, ascending, each once (float64): 253 of E4M3, 247 of E5M2."""
    exponent_bits, mantissa_bits, _ = FORMATS[name]
    exponents, mantissas = np.divmod(np.arange(128), 2**mantissa_bits)
    bias = 2 ** (exponent_bits - 1) - 1
    numbers = ((exponents > 0) + mantissas / 2**mantissa_bits) * 2.0 ** (np.maximum(exponents, 1) - bias)
    # E4M3 gives up its last code alone, for NaN; E5M2 its last exponent, as IEEE's formats do.
    finite = numbers[:-1] if name == "E4M3" else numbers[exponents < exponents[-1]]
    return np.unique([-finite, finite])


def largest_of(name: str) -> float:
    """The largest finite value of a format, INT8 included."""
    return INT8_LARGEST if name == "INT8" else float(values_of(name)[-1])


def per_tensor_scale(tensor: "torch.Tensor", name: str) -> float:
    """The scale that maps the tensor's largest magnitude to the format's largest value; 1 for a tensor of zeros."""
    return float(tensor.abs().max()) / largest_of(name) or 1.0


def round_to(tensor: "torch.Tensor", name: str, scale: float) -> "torch.Tensor":
    """`tensor` divided by `scale`, rounded to the format (to nearest, beyond its largest value clipped), and back."""
    import torch

    limit = largest_of(name)
    scaled = (tensor.float() / scale).clamp(-limit, limit)
    rounded = scaled.round() if name == "INT8" else scaled.to(getattr(torch, FORMATS[name][2])).float()
    return rounded * scale


def rounding_error(tensor: "torch.Tensor", name: str, scale: float | None = None) -> Error:
    """The error of rounding `tensor`; `scale` defaults to the tensor's own (`per_tensor_scale`)."""
    tensor = tensor.float()
    scale = per_tensor_scale(tensor, name) if scale is None else scale
    relative = float((tensor - round_to(tensor, name, scale)).norm() / tensor.norm().clamp_min(1e-30))
    return Error(relative, float((tensor.abs() > largest_of(name) * scale).float().mean()))


def outlier_error(tensor: "torch.Tensor", name: str, times_rms: float) -> float:
    """The relative error of all other values after the first one is made `times_rms` times the tensor's RMS."""
    tensor = tensor.float().flatten().clone()
    tensor[0] = times_rms * float(tensor.square().mean().sqrt())
    rest, rounded = tensor[1:], round_to(tensor, name, per_tensor_scale(tensor, name))[1:]
    return float((rest - rounded).norm() / rest.norm())


def relative_step(name: str, magnitudes: np.ndarray) -> np.ndarray:
    """The worst relative rounding error at each magnitude (> 0): half the gap between its neighbours over it."""
    grid = values_of(name)[values_of(name) >= 0]
    above = np.clip(np.searchsorted(grid, magnitudes, side="right"), 1, len(grid) - 1)
    gap = grid[above] - grid[above - 1]
    # Beyond the largest value everything is clipped to it.
    return np.maximum(gap / 2, magnitudes - grid[-1]) / magnitudes
