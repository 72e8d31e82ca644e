"""Outcomes as tables: one row a request, one row a token chunk. From here on all time is model time."""

import numpy as np
import pandas as pd

from ..traces import Trace
from .generator import Sent


def to_tables(sent: Sent, trace: Trace, time_dilation: float = 1.0) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(records, tokens) of a level, in model seconds from its start.

    records: request, prompt_tokens (the server's count, else as asked), output_tokens_asked,
    output_tokens (the server's count, else chunks), chunks, scheduled_s, sent_s, first_token_s,
    last_token_s (nan: never), finish_reason, error (None: completed); of a closed loop also slot_s, when
    the slot that it took had become free (nan: it always was).
    tokens: request, at_s.
    """

    def model_time(moment: float) -> float:
        return (moment - sent.start) / time_dilation if moment else np.nan

    rows = [
        {
            "request": o.index,
            "prompt_tokens": o.prompt_tokens if o.prompt_tokens >= 0 else trace.prompt_tokens[o.index],
            "output_tokens_asked": trace.output_tokens[o.index],
            "output_tokens": o.output_tokens if o.output_tokens >= 0 else len(o.chunks),
            "chunks": len(o.chunks),
            "scheduled_s": float(sent.due_s[o.index]),
            "sent_s": model_time(o.sent),
            "first_token_s": model_time(o.chunks[0]) if o.chunks else np.nan,
            "last_token_s": model_time(o.chunks[-1]) if o.chunks else np.nan,
            "finish_reason": o.finish_reason,
            "error": o.error,
        }
        | ({"slot_s": model_time(o.slot)} if sent.client.closed_loop else {})
        for o in sent.outcomes
    ]
    records = pd.DataFrame(rows).astype({"finish_reason": "object", "error": "object"})
    chunks = [np.asarray(o.chunks) for o in sent.outcomes]
    tokens = pd.DataFrame(
        {
            "request": np.repeat(records["request"].to_numpy(np.int32), records["chunks"]),
            "at_s": (np.concatenate(chunks) - sent.start) / time_dilation,
        }
    )
    return records, tokens
