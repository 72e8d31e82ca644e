"""What fits on a card before anything is started: weights, and the tokens of KV cache that they leave. Arithmetic alone."""

from dataclasses import dataclass

from ..config.dimensions import ModelShape, WeightFormat
from ..config.profile import Card

GIB = 2**30
# What a start takes beside weights and KV cache: CUDA's context and buffers, and the activations of a full step (gate, up
# and their product in BF16). With it the recorded starts of Llama-3-8B are met within 1 %.
_FIXED_GIB = 0.7
_ACTIVATIONS = 3 * 2


@dataclass(frozen=True)
class Fit:
    """A model on `shared_by` cards that share each layer: GiB of weights a card, and the KV cache's tokens on all of them
    together; 0 tokens: it does not fit."""

    shared_by: int
    weights_gib: float
    kv_tokens: int


def fit(
    shape: ModelShape, weights: WeightFormat, kv_itemsize: int, card: Card, shared_by: int = 1, *,
    share: float = 0.9, batched_tokens: int = 8192,
) -> Fit:  # fmt: skip
    """How a model fits that is served in a format, with a KV cache of `kv_itemsize` bytes an element, when vLLM may take
    `share` (0 to 1) of each card and computes at most `batched_tokens` a step."""
    held = shape.weight_bytes(weights) / shared_by
    activations = _ACTIVATIONS * batched_tokens * shape.intermediate / shared_by
    left = card.memory_gib * share * GIB - held - activations - _FIXED_GIB * GIB
    # Each card holds the KV heads that it computes; with more cards than heads they are held more than once.
    token = shape.kv_bytes_per_token(kv_itemsize) / min(shared_by, shape.kv_heads)
    return Fit(shared_by, held / GIB, max(0, int(left / token)))
