"""How far a level was from what the card can physically do: an estimate from the server's own counters, not a profile.

Each step must read the weights once and the KV cache of every running request; each token must pass through the
weights. What the datasheet allows in the same time is the limit (Williams, Waterman and Patterson, "Roofline", 2009).
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from ..config.dimensions import ModelShape
from ..config.profile import Card


@dataclass(frozen=True)
class Roofline:
    """Shares (0 to 1) of the card's memory bandwidth and of its matrix peak that a window's work needed.

    `bytes_per_s` and `flops_per_s` are what was needed; `steps_per_s` how often a batch was computed.
    """

    memory: float
    compute: float
    bytes_per_s: float
    flops_per_s: float
    steps_per_s: float

    @property
    def intensity(self) -> float:
        """FLOP for each byte."""
        return self.flops_per_s / self.bytes_per_s

    @property
    def nearest(self) -> str:
        """Which of the two limits is the nearer one."""
        return "compute" if self.compute > self.memory else "memory"


def roofline(
    telemetry: pd.DataFrame,
    window: tuple[float, float],
    shape: ModelShape,
    card: Card,
    *,
    fp8_weights: bool,
    fp8_kv: bool,
    kv_cache_tokens: int,
) -> Roofline | None:
    """What the work of `window` (s) needed; None when the server's counters were not sampled in it.

    A running request gets one token a step, so there are as many steps as tokens for each of them, and each reads the
    KV blocks in use. The output head is BF16 in every variant. Left out: activations, writing the KV cache, the
    products inside attention (about 1 % of a token's), and whatever the kernels read twice.
    """
    columns = ["at_s", "running", "kv_cache_usage", "prompt_tokens", "generation_tokens"]
    known = telemetry[columns].dropna()
    inside = known[known["at_s"].between(*window)]
    seconds = window[1] - window[0]
    if len(inside) < 2 or not inside["running"].sum():
        return None

    def counted(column: str) -> float:
        at = np.interp(window, known["at_s"], known[column])
        return float(at[1] - at[0])

    emitted = counted("generation_tokens")
    tokens = emitted + counted("prompt_tokens")
    steps = emitted / inside["running"].mean()
    resident = inside["kv_cache_usage"].mean() * kv_cache_tokens
    kv_bytes = resident * shape.kv_bytes_per_token(1 if fp8_kv else 2)
    moved = steps * (shape.weight_bytes_read(fp8_weights) + kv_bytes)
    layers, head = shape.flops(tokens, emitted)
    peak = card.fp8_flops if fp8_weights else card.bf16_flops
    return Roofline(
        memory=moved / seconds / card.hbm_bytes_per_s,
        compute=(layers / peak + head / card.bf16_flops) / seconds,
        bytes_per_s=moved / seconds,
        flops_per_s=(layers + head) / seconds,
        steps_per_s=steps / seconds,
    )
