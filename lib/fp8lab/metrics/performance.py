"""From records to metrics. Pure functions on tables; units are in the names.

TTFT, TPOT, ITL, E2EL, throughput and the per-second peak concurrency are those of `vllm bench serve`
(vllm/benchmarks/serve.py, calculate_metrics), so that numbers can be set beside the published ones.
Failed requests are counted and add nothing to a numerator; they stay in every denominator.

A chunk may hold several tokens. The server counts those of a request; each of its chunks is taken to hold the same share,
output tokens / chunks, which is one where every chunk is a token. The peak by second goes by tokens so spread, and so does
the steady window unless the server's own counter says better (`counted_window`); ITL is the gap between chunks, as vLLM's is.
"""

import numpy as np
import pandas as pd

PERCENTILES = (50, 90, 99)
_STEADY = (0.2, 0.8)
# Tokens a chunk: below, a chunk is a token but for characters of several tokens (1.01 to 1.02 with drawn weights).
_MERGED = 1.02
_OTHERS = 0.01
_BLOCK = 16


def latencies(records: pd.DataFrame) -> pd.DataFrame:
    """Per completed request: ttft_ms, e2el_ms, tpot_ms, ttft_from_schedule_ms, lag_ms. TPOT = (E2EL - TTFT) / (output
    tokens - 1), as vLLM has it: its servers send a request's first token alone; nan for a single token, and where all
    came in one chunk. The lag is how long after its scheduled instant the request was sent."""
    done = completed(records)
    ttft = (done["first_token_s"] - done["sent_s"]) * 1e3
    e2el = (done["last_token_s"] - done["sent_s"]) * 1e3
    lag = (done["sent_s"] - done["scheduled_s"]) * 1e3
    later = (done["output_tokens"] - 1).where(done["chunks"] > 1)
    return pd.DataFrame(
        {
            "ttft_ms": ttft,
            "e2el_ms": e2el,
            "tpot_ms": (e2el - ttft) / later.where(later > 0),
            "ttft_from_schedule_ms": ttft + lag,
            "lag_ms": lag,
        }
    )


def send_lag_ms(records: pd.DataFrame) -> pd.Series:
    """How late the client sent each completed request after the moment when it could, in ms: when it was due and, in a
    closed loop, had its slot. Waiting for a slot is the loop's doing, not the client's."""
    done = completed(records)
    could = done.reindex(columns=["scheduled_s", "slot_s"]).max(axis=1)
    return (done["sent_s"] - could) * 1e3


def first_answer_ms(records: pd.DataFrame) -> pd.Series:
    """From sending to the first output that is not reasoning, of each completed request, in ms; nan where there was none.
    Empty for a level none of whose output was reasoning: it is the TTFT then."""
    done = completed(records)
    if "first_answer_s" not in done:
        return pd.Series(dtype=float)
    return (done["first_answer_s"] - done["sent_s"]) * 1e3


def tokens_a_chunk(records: pd.DataFrame) -> pd.Series:
    """Each request's output tokens / chunks; nan for none."""
    return records["output_tokens"] / records["chunks"].where(records["chunks"] > 0)


def completed(records: pd.DataFrame) -> pd.DataFrame:
    """The records of requests that ended as asked."""
    return records[records["error"].isna()]


def inter_token_ms(tokens: pd.DataFrame, records: pd.DataFrame) -> np.ndarray:
    """ITL: the gaps between chunks of a request, pooled over completed requests, in ms."""
    kept = tokens[tokens["request"].isin(completed(records)["request"])]
    return kept.groupby("request")["at_s"].diff().dropna().to_numpy() * 1e3


def peak_concurrency(records: pd.DataFrame) -> int:
    """The most requests in flight at one instant: an exact sweep over sent and last token."""
    return int(concurrency_over_time(records)[1].max(initial=0))


def peak_concurrency_per_second(records: pd.DataFrame) -> int:
    """vLLM's peak: each request counts in every whole second it touches; the fullest second wins. It is never below the
    exact sweep, and above it by the requests that come and go within a second."""
    begin, end = _spans(records)
    if not begin.size:
        return 0
    first, last = (np.floor(t - begin.min()).astype(int) for t in (begin, end))
    seconds = last.max() + 2
    return int(np.cumsum(np.bincount(first, minlength=seconds) - np.bincount(last + 1, minlength=seconds)).max())


def concurrency_over_time(records: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """(seconds, requests in flight from then on), as steps. At the same instant a request that begins meets one that ends."""
    begin, end = _spans(records)
    times = np.concatenate([begin, end])
    order = np.argsort(times, kind="stable")
    return times[order], np.cumsum(np.concatenate([np.ones(begin.size), -np.ones(end.size)])[order])


def steady_window(records: pd.DataFrame, tokens: pd.DataFrame) -> tuple[float, float]:
    """The steady state: from the instant when 20 % of all output tokens had arrived to that of 80 %, in s; (nan, nan)
    for none. It is the middle of the output, whatever the arrival process, and needs no tuning: ramp and drain lie outside.
    Of a burst that the server admits at once the prompts do too, and those running become fewer within it."""
    at, held = _arrivals(tokens, completed(records))
    if not held.sum():
        return np.nan, np.nan
    order = np.argsort(at, kind="stable")
    at, held = at[order], held[order]
    # As numpy's quantile, which this is where every chunk holds as much.
    share = (np.cumsum(held) - held) / (held.sum() - held[-1]) if at.size > 1 else np.zeros(1)
    return tuple(float(np.interp(part, share, at)) for part in _STEADY)


def counted_window(records: pd.DataFrame, counter: pd.DataFrame) -> tuple[float, float]:
    """The steady window by the server's own counter of tokens (at_s, generation_tokens), for a level whose chunks hold
    several: a busy API server merges more of them at some times than at others, which the client does not see. (nan, nan)
    where a chunk is a token, where nothing was counted, and where other clients' tokens were counted too."""
    done, counter = completed(records), counter.dropna()
    output, chunks = done["output_tokens"].sum(), done["chunks"].sum()
    made = counter["generation_tokens"]
    before = made[counter["at_s"] <= records["sent_s"].min()]
    # From what it read before the first request; else by what was still to come when it was last read.
    arrived = made - before.iloc[-1] if len(before) else output - (made.max() - made)
    merged = chunks and output / chunks > _MERGED
    within = len(counter) > 1 and -_OTHERS * output <= arrived.min() and arrived.max() <= (1 + _OTHERS) * output
    if not merged or not within or not (arrived.min() <= _STEADY[0] * output and arrived.max() >= _STEADY[1] * output):
        return np.nan, np.nan
    return tuple(float(np.interp(part * output, arrived, counter["at_s"])) for part in _STEADY)


def summarize(
    records: pd.DataFrame, tokens: pd.DataFrame, counter: pd.DataFrame | None = None
) -> dict[str, float | int | None]:
    """The fields of `summary.Summary` that follow from what the client saw, and from the server's counter of tokens where it
    has one (see `counted_window`)."""
    done, each = completed(records), latencies(records)
    duration = float(done["last_token_s"].max() - records["sent_s"].min()) if len(done) else None
    begin, end = counted_window(records, counter) if counter is not None else (np.nan, np.nan)
    if not end > begin:
        begin, end = steady_window(records, tokens)
    output = int(done["output_tokens"].sum())
    chunks = int(done["chunks"].sum())

    def rate(amount: float) -> float | None:
        return amount / duration if duration else None

    summary = {
        "steady_begin_s": begin if end > begin else None,
        "steady_end_s": end if end > begin else None,
        "requests": len(records),
        "completed": len(done),
        "failed": len(records) - len(done),
        "duration_s": duration,
        "prompt_tokens": int(done["prompt_tokens"].sum()),
        "output_tokens": output,
        "request_throughput": rate(len(done)),
        "output_token_throughput": rate(output),
        "steady_output_token_throughput": (_STEADY[1] - _STEADY[0]) * output / (end - begin) if end > begin else None,
        "peak_output_tokens_per_s": _fullest_second(tokens, records),
        "peak_concurrent_requests": peak_concurrency(records),
        "peak_concurrent_requests_vllm": peak_concurrency_per_second(records),
        "mean_concurrent_requests": rate(float(each["e2el_ms"].sum()) / 1e3),
        "tokens_per_chunk": output / chunks if chunks else None,
    }
    pooled = {name: each[f"{name}_ms"] for name in ("ttft", "tpot", "e2el", "ttft_from_schedule")}
    pooled["itl"] = inter_token_ms(tokens, records)
    pooled["ttfo"] = first_answer = first_answer_ms(records)
    summary["reasoning_only"] = int(first_answer.isna().sum())
    for name, values in pooled.items():
        summary |= _spread(name, np.asarray(values, dtype=float))
    lag = send_lag_ms(records).to_numpy()
    summary["schedule_lag_p99_ms"] = float(np.percentile(lag, 99)) if lag.size else None
    return summary


def _spread(name: str, values: np.ndarray) -> dict[str, float | None]:
    values = values[~np.isnan(values)]
    known = values.size > 0
    spread = {f"mean_{name}_ms": float(values.mean()) if known else None}
    return spread | {f"p{p}_{name}_ms": float(np.percentile(values, p)) if known else None for p in PERCENTILES}


def _spans(records: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    done = completed(records)
    return done["sent_s"].to_numpy(float), done["last_token_s"].to_numpy(float)


def _arrivals(tokens: pd.DataFrame, done: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """(when each chunk of the completed requests arrived, in s; how many tokens it is taken to hold)."""
    kept = tokens[tokens["request"].isin(done["request"])]
    held = kept["request"].map(tokens_a_chunk(done).set_axis(done["request"]))
    return kept["at_s"].to_numpy(), held.to_numpy(float)


def _fullest_second(tokens: pd.DataFrame, records: pd.DataFrame) -> int | None:
    at, held = _arrivals(tokens, completed(records))
    if not at.size:
        return None
    return round(np.bincount(np.floor(at - records["sent_s"].min()).astype(int), weights=held).max())


def paging_waste(records: pd.DataFrame) -> float:
    """The share of allocated KV slots that hold no token, with vLLM's blocks of 16 tokens, over all steps. Only a
    request's last block can be partly empty: vLLM allocates a block when the one before is full (Kwon et al.,
    "Efficient Memory Management for Large Language Model Serving with PagedAttention", 2023)."""
    contexts = _contexts(records)
    return 1 - contexts.sum() / (np.ceil(contexts / _BLOCK) * _BLOCK).sum()


def reserving_waste(records: pd.DataFrame, length: int) -> float | None:
    """The same if every request reserved `length` tokens, as servers did before paging; None where one holds more."""
    contexts = _contexts(records)
    return None if contexts.max(initial=0) > length else float(1 - contexts.mean() / length)


def _contexts(records: pd.DataFrame) -> np.ndarray:
    """The context of every decoding step of every completed request, in tokens."""
    done = completed(records)
    prompts, outputs = done["prompt_tokens"].to_numpy(int), done["output_tokens"].to_numpy(int)
    step = np.arange(outputs.sum()) - np.repeat(np.cumsum(outputs) - outputs, outputs)
    return np.repeat(prompts, outputs) + step + 1
