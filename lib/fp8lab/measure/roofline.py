"""How far a level was from what the card can physically do. A lower bound by arithmetic, not a profile.

Each step must read the weights once and the KV cache of every running request; each token must pass through the
weights. What the datasheet allows in the same time is the limit (Williams, Waterman and Patterson, "Roofline", 2009).
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from ..profiles import Card
from ..shapes import ModelShape
from .metrics import completed, steady_window


@dataclass(frozen=True)
class Roofline:
    """Shares (0 to 1) of the card's memory bandwidth and of its matrix peak that the steady window needed at least.

    `intensity` is FLOP for each byte; `flops_per_s` and `bytes_per_s` are what was needed; `steps_per_s` how often
    a batch was computed.
    """

    memory: float
    compute: float
    bytes_per_s: float
    flops_per_s: float
    steps_per_s: float

    @property
    def intensity(self) -> float:
        return self.flops_per_s / self.bytes_per_s

    @property
    def nearest(self) -> str:
        """Which of the two limits is the nearer one."""
        return "compute" if self.compute > self.memory else "memory"


def roofline(records: pd.DataFrame, shape: ModelShape, card: Card, *, fp8_weights: bool, fp8_kv: bool) -> Roofline:
    """What the tokens of the steady window needed. A request's tokens are taken as spread evenly from first to last.

    The output head is BF16 in every variant. Left out, hence "at least": activations, writing the KV cache, the
    products inside attention (about 1 % of a token's), and whatever the kernels read twice.
    """
    begin, end = steady_window(records)
    seconds = end - begin
    done = completed(records)
    first, last = done["first_token_s"].to_numpy(float), done["last_token_s"].to_numpy(float)
    prompts, outputs = done["prompt_tokens"].to_numpy(float), done["output_tokens"].to_numpy(float)
    # The first token comes from the prefill; tokens 1 to n-1 from one decoding step each.
    gap = np.maximum(last - first, 1e-9) / np.maximum(outputs - 1, 1)
    low = np.maximum(np.ceil((begin - first) / gap), 1)
    high = np.minimum(np.floor((end - first) / gap), outputs - 1)
    decoded = np.maximum(high - low + 1, 0)
    context = float((decoded * (prompts + (low + high) / 2)).sum())
    prefilled = (first >= begin) & (first < end)
    running = np.clip(np.minimum(last, end) - np.maximum(first, begin), 0, None)
    steps = decoded.sum() / running.sum() * _covered(first, last, begin, end)
    emitted = float(decoded.sum() + prefilled.sum())
    tokens = float(decoded.sum() + prompts[prefilled].sum())

    moved = steps * shape.weight_bytes_read(fp8_weights) + context * shape.kv_bytes_per_token(1 if fp8_kv else 2)
    layers, head = 2.0 * tokens * shape.layer_parameters, 2.0 * emitted * shape.vocabulary_parameters
    peak = card.fp8_flops if fp8_weights else card.bf16_flops
    return Roofline(
        memory=moved / seconds / card.hbm_bytes_per_s,
        compute=(layers / peak + head / card.bf16_flops) / seconds,
        bytes_per_s=moved / seconds,
        flops_per_s=(layers + head) / seconds,
        steps_per_s=steps / seconds,
    )


def _covered(first: np.ndarray, last: np.ndarray, begin: float, end: float) -> float:
    """Seconds of [begin, end] in which at least one request was decoding."""
    order = np.argsort(first)
    start, stop = np.clip(first[order], begin, end), np.clip(last[order], begin, end)
    reached = np.maximum.accumulate(np.concatenate([[begin], stop[:-1]]))
    return float(np.clip(stop - np.maximum(start, reached), 0, None).sum())
