"""How much KV cache the requests of a level held, and what blocks waste of it. Pure functions on records."""

import numpy as np
import pandas as pd

from .performance import completed


def held_tokens(records: pd.DataFrame) -> float:
    """KV tokens that a running request holds, averaged over all decoding steps (a long answer holds for longer)."""
    return float(_contexts(records).mean())


def paging_waste(records: pd.DataFrame, block_size: int = 16) -> float:
    """The share of allocated KV slots that hold no token, with blocks of `block_size` tokens, over all steps.

    Only a request's last block can be partly empty: vLLM allocates a block when the one before is full
    (Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention", 2023).
    """
    contexts = _contexts(records)
    return 1 - contexts.sum() / (np.ceil(contexts / block_size) * block_size).sum()


def reserving_waste(records: pd.DataFrame, length: int) -> float | None:
    """The same if every request reserved `length` tokens from its first step on, as servers did before paging; None
    where some request holds more than that."""
    return None if _contexts(records).max(initial=0) > length else 1 - held_tokens(records) / length


def _contexts(records: pd.DataFrame) -> np.ndarray:
    """The context of every decoding step of every completed request, in tokens."""
    done = completed(records)
    prompts, outputs = done["prompt_tokens"].to_numpy(int), done["output_tokens"].to_numpy(int)
    step = np.arange(outputs.sum()) - np.repeat(np.cumsum(outputs) - outputs, outputs)
    return np.repeat(prompts, outputs) + step + 1
