"""Is a difference between variants real? Contrasts of log values, paired by seed, with a 95 % interval.

Variants answer the same requests at the same instants when they share a rate and a seed, so they are compared
within a seed. On the log scale a difference is a ratio, and the noise of a fast level and of a slow one compare.

Repeats that share one start of a server leave out what differs from start to start; an interval says over what it is.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np

CONFIDENCE = 0.95
# Fewer pairs than this say too little of their own spread where that of comparable levels is known.
_OWN_SPREAD = 3

# One variant's values by seed, and several variants' by name.
Seeds = Mapping[int, float]
Cells = Mapping[str, Seeds]


@dataclass(frozen=True)
class Ratio:
    """An estimated ratio with its 95 % interval (nan: none can be given), and how the interval came about."""

    value: float
    low: float
    high: float
    pairs: int
    model: str
    starts: int = 1

    @property
    def shown(self) -> bool:
        """Whether the interval leaves out 1: without it no difference is claimed."""
        return self.low > 1 or self.high < 1

    @property
    def interval(self) -> tuple[float, float] | None:
        return None if math.isnan(self.low) else (self.low, self.high)

    def over(self, starts: int) -> "Ratio":
        """This ratio, told that its seeds are spread over so many server starts of each variant."""
        if self.pairs < 2:
            return dataclasses.replace(self, starts=starts)
        each = "a start each" if starts >= self.pairs else f"{starts} start{'s' * (starts > 1)} a variant"
        missing = "" if starts >= self.pairs else ": what differs from start to start is not in it"
        return dataclasses.replace(self, starts=starts, model=f"{self.model}, {each}{missing}")

    def times(self, factor: float) -> "Ratio":
        """This ratio and its interval times an exact number, such as that of cards."""
        return dataclasses.replace(self, value=self.value * factor, low=self.low * factor, high=self.high * factor)

    def at_least(self, apart: float) -> "Ratio":
        """This ratio with an interval that reaches at least `apart`, a logarithm, to either side."""
        if math.isnan(self.low):
            return self
        ends = min(self.low, self.value * math.exp(-apart)), max(self.high, self.value * math.exp(apart))
        wider = "; widened to what its two meters are apart" if ends != (self.low, self.high) else ""
        return dataclasses.replace(self, low=ends[0], high=ends[1], model=self.model + wider)

    def __str__(self) -> str:
        if math.isnan(self.low):
            return f"{self.value:.2f}× (one pair, no interval)"
        return f"{self.value:.2f}× ({self.low:.2f} to {self.high:.2f})"


@dataclass(frozen=True)
class Noise:
    """The spread of one log value from repeat to repeat, and the degrees of freedom that it is known with."""

    sigma: float
    freedom: int


def pooled_noise(groups: Sequence[Cells]) -> Noise | None:
    """The noise that all groups share; None without a repeat. A group holds variants measured at the same rate with the
    same seeds. What is left of its log values after the effect of each variant and of each seed is noise (a two-way
    layout without interaction)."""
    squares, freedom = 0.0, 0
    for cells in groups:
        seeds = _common_seeds(cells)
        if len(seeds) < 2 or len(cells) < 2:
            continue
        logs = np.log([[values[seed] for seed in seeds] for values in cells.values()])
        left = logs - logs.mean(axis=0) - logs.mean(axis=1, keepdims=True) + logs.mean()
        squares += float((left**2).sum())
        freedom += (len(seeds) - 1) * (len(cells) - 1)
    return Noise(math.sqrt(squares / freedom), freedom) if freedom else None


def ratio(over: Seeds, under: Seeds, noise: Noise | None = None) -> Ratio | None:
    """`over` / `under`, paired by seed; None when they share no seed."""
    return contrast({"over": over, "under": under}, {"over": 1.0, "under": -1.0}, noise)


def contrast(cells: Cells, weights: Mapping[str, float], noise: Noise | None = None) -> Ratio | None:
    """exp(sum of weight x log value) over the seeds that all weighted cells share; None when they share none.

    With three seeds or more the interval is Student's from the contrasts themselves. With fewer the spread is
    taken to be `noise`, that of comparable levels: a stated model, and the best there is. Without `noise` two seeds
    give Student's interval with its one degree of freedom, and a single one gives none.
    """
    used = {name: cells[name] for name, weight in weights.items() if weight}
    seeds = _common_seeds(used)
    if not seeds:
        return None
    each = [sum(weights[name] * math.log(values[seed]) for name, values in used.items()) for seed in seeds]
    mean, pairs = fmean(each), len(each)
    if pairs >= (_OWN_SPREAD if noise else 2):
        half = student_t(pairs - 1) * stdev(each) / math.sqrt(pairs)
        model = f"Student's t from {pairs} seeds"
    elif noise:
        half = student_t(noise.freedom) * noise.sigma * math.sqrt(sum(w * w for w in weights.values()) / pairs)
        model = f"{pairs} seed{'s' if pairs > 1 else ''}; noise of {noise.sigma:.1%} pooled from comparable levels ({noise.freedom} degree{'s' * (noise.freedom > 1)} of freedom)"
    else:
        half, model = math.nan, "one pair, no repeats anywhere"
    return Ratio(math.exp(mean), math.exp(mean - half), math.exp(mean + half), pairs, model)


# The 2x2 of FP8's halves on the log scale: a main effect is the mean of its effect without and with the other half.
ABLATION = {
    "FP8 weights": {"bf16": -0.5, "fp8-weights": 0.5, "fp8-kv": -0.5, "fp8": 0.5},
    "FP8 KV cache": {"bf16": -0.5, "fp8-weights": -0.5, "fp8-kv": 0.5, "fp8": 0.5},
    "interaction": {"bf16": 1.0, "fp8-weights": -1.0, "fp8-kv": -1.0, "fp8": 1.0},
}


def student_t(freedom: int) -> float:
    """The two-sided 95 % quantile of Student's t."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 0.5 + CONFIDENCE / 2))


def _common_seeds(cells: Cells) -> list[int]:
    return sorted(set.intersection(*(set(values) for values in cells.values()))) if cells else []
