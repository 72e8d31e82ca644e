"""The requests of a level, in order (trace), and when they arrive (schedule). Both come from a seed.

A trace is a prefix of any longer trace of the same kind and seed, so levels with different numbers of
requests send the same first requests.
"""

import csv
import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from ..errors import BadInput
from ..ui.text import visible

T = TypeVar("T")

# Common words that are one token each, with their leading space, in the tokenizers of Llama 3, GPT-2
# and their kin: a prompt of n of them is n tokens long (plus the BOS token where a model adds one).
_WORDS = """
time year people way day man thing woman life child world school state family student group country problem hand part
place case week company system program question work government number night point home water room mother area money
story fact month lot right study book eye job word business issue side kind head house service friend father power hour
game line end member law car city community name president team minute idea kid body information back parent face others
level office door health person art war history party result change morning reason research girl guy moment air teacher
force education
"""
WORDS = tuple(_WORDS.split())
# Beyond these a file is no trace: ShareGPT's own has 0.7 GB, a line of lengths 20 bytes.
_MAX_FILE_BYTES = {".csv": 64 << 20, ".json": 2 << 30}
_CSV_COLUMNS = {"prompt_tokens", "output_tokens", "arrival_s"}
_MAX_REQUEST_TOKENS = 1 << 20
_MAX_TRACE_TOKENS = 1 << 27


@dataclass(frozen=True)
class Trace:
    """Requests in order. `prompt_tokens` and `output_tokens` are per request; `arrival_s` holds given
    arrival times in seconds for a trace that is to be replayed, else None."""

    name: str
    prompts: tuple[str, ...]
    prompt_tokens: tuple[int, ...]
    output_tokens: tuple[int, ...]
    arrival_s: tuple[float, ...] | None = None

    def __post_init__(self):
        if not self.prompts:
            raise BadInput(f"the trace {self.name!r} is empty: a level needs at least one request")

    def __len__(self) -> int:
        return len(self.prompts)

    @functools.cached_property
    def digest(self) -> str:
        """What tells these requests from any others: 16 hexadecimal digits over prompts, lengths and arrival times."""
        held = json.dumps([self.prompts, self.prompt_tokens, self.output_tokens, self.arrival_s])
        return hashlib.sha256(held.encode()).hexdigest()[:16]

    def __repr__(self) -> str:
        mean_in, mean_out = (sum(tokens) / len(self) for tokens in (self.prompt_tokens, self.output_tokens))
        return f"trace {visible(self.name)}: {len(self):,} requests, mean {mean_in:.0f} tokens in, {mean_out:.0f} out"

    def head(self, requests: int) -> "Trace":
        """The first `requests` requests. Raises BadInput when the trace is shorter, or none are asked for."""
        _check_requests(requests)
        if requests > len(self):
            raise BadInput(f"the trace {self.name!r} has {len(self)} requests, {requests} were asked for")
        arrival = self.arrival_s and self.arrival_s[:requests]
        parts = self.prompts, self.prompt_tokens, self.output_tokens
        return Trace(self.name, *(part[:requests] for part in parts), arrival)

    def to_sharegpt(self, begin_tokens: int = 0) -> list[dict]:
        """The trace in ShareGPT's form, for tools that read it (`vllm bench serve --dataset-name sharegpt`).

        Answers are words, `begin_tokens` fewer than asked for: readers count the BOS token that a tokenizer adds.
        """
        lengths = np.maximum(np.asarray(self.output_tokens) - begin_tokens, 1)
        words = _word_prompts(lengths, np.random.default_rng(1))
        return [
            {"conversations": [{"from": "human", "value": p}, {"from": "gpt", "value": w}]}
            for p, w in zip(self.prompts, words, strict=True)
        ]


def sharegpt_like(requests: int = 1000, seed: int = 0) -> Trace:
    """Lengths shaped like ShareGPT under vLLM's filter: lognormal, truncated to 4...1,024 tokens.

    Prompts have mu 4.85, sigma 1.4 (mean about 200), outputs mu 4.83, sigma 1.13 (mean about 183).
    """
    _check_requests(requests)
    rng = _streams(seed)
    prompt = _truncated_lognormal(rng[0], 4.85, 1.4, requests)
    output = _truncated_lognormal(rng[1], 4.83, 1.13, requests)
    return _of_words(f"sharegpt-like seed {seed}", prompt, output, rng[2])


def fixed_length(requests: int = 1000, *, input_tokens: int = 1024, output_tokens: int = 128, seed: int = 0) -> Trace:
    """Random prompts that all have the same length, and outputs likewise ("random" in vLLM's tools)."""
    _check_requests(requests)
    if input_tokens < 1 or output_tokens < 1:
        raise BadInput(f"lengths must be at least 1 token, not {input_tokens} in and {output_tokens} out")
    name = f"random {input_tokens}/{output_tokens} seed {seed}"
    return _of_words(name, np.full(requests, input_tokens), np.full(requests, output_tokens), _streams(seed)[2])


def from_file(path: str | Path, *, requests: int | None = None, seed: int = 0, tokenizer: str | None = None) -> Trace:
    """A trace from the user's own file.

    `.csv` has the columns prompt_tokens, output_tokens and, to be replayed, arrival_s. `.json` is a
    ShareGPT file; `tokenizer` (a folder or hub name) counts its tokens and vLLM's filter is applied:
    prompt and output of at least 4 tokens, prompt <= 1,024, together <= 2,048.
    """
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"no trace file {str(path)!r}; expected a .csv of lengths or a ShareGPT .json")
    if path.suffix == ".csv":
        trace = _read_from(path, lambda file: _from_csv(file, seed))
    elif path.suffix == ".json":
        trace = _read_from(path, lambda file: _from_sharegpt(file, tokenizer))
    else:
        raise BadInput(f"trace file {path.name!r} is neither .csv nor .json")
    return trace if requests is None else trace.head(requests)


def _read_from(path: Path, read: Callable[[Path], T]) -> T:
    """What `read` makes of a file. Raises BadInput for one that is too large, cannot be read, or is no trace."""
    if (size := path.stat().st_size) > (limit := _MAX_FILE_BYTES.get(path.suffix, size)):
        raise BadInput(f"trace file {path.name!r} has {size >> 20:,} MiB; at most {limit >> 20:,} MiB are read")
    try:
        return read(path)
    except OSError as error:
        raise BadInput(f"{path.name}: it, or the tokenizer for it, cannot be read: {error}") from None
    except (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError, csv.Error) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{path.name}: not a trace: {type(error).__name__}: {error}") from None


def is_file(trace: str) -> bool:
    """Whether a trace's name is that of a file."""
    return trace.endswith((".csv", ".json"))


def check_file(path: str | Path) -> None:
    """Raises BadInput unless `path` is a trace for levels that can be read, as far as that shows without a tokenizer."""
    if Path(path).suffix == ".json" and Path(path).is_file():
        _read_from(Path(path), _conversations)
    else:
        refuse_times(from_file(path))


def refuse_times(trace: Trace) -> None:
    """Raises BadInput for a trace with arrival times of its own, which a level cannot keep."""
    if trace.arrival_s is not None:
        raise BadInput(
            f"the trace {trace.name!r} holds arrival times (arrival_s), and a level draws its own at its rate; leave that "
            "column out to use its lengths alone, or replay it with `fp8lab load-test --trace FILE`"
        )


def named_trace(
    trace: str, requests: int | None, *, seed: int, input_tokens: int, output_tokens: int, tokenizer: str | None = None
) -> Trace:
    """The trace that a profile or the command line names: "sharegpt-like", "random" (with lengths), or a file.

    `requests` is how many; None means 1000, or all of a file. Raises BadInput for a file that holds fewer.
    """
    if trace == "sharegpt-like":
        return sharegpt_like(1000 if requests is None else requests, seed)
    if trace == "random":
        count = 1000 if requests is None else requests
        return fixed_length(count, seed=seed, input_tokens=input_tokens, output_tokens=output_tokens)
    if not is_file(trace):
        raise BadInput(f"no trace {trace!r} (there are: sharegpt-like, random, a .csv of lengths, a ShareGPT .json)")
    return from_file(trace, requests=requests, seed=seed, tokenizer=tokenizer)


def arrival_times(
    requests: int, rate: float, *, burstiness: float = 1.0, seed: int = 0, normalised: bool = True
) -> np.ndarray:
    """When each request is to be sent: seconds from the level's start, ascending, shape (requests,).

    Gaps are gamma distributed with shape `burstiness` (1: Poisson arrivals, inf: constant gaps, below 1:
    bursts) and mean 1 / `rate`; a `rate` of inf sends all at once. `normalised` rescales the gaps so that
    the last arrival falls at requests / rate, as vLLM's client does (vllm/benchmarks/serve.py, get_request).
    """
    if not rate > 0:
        raise BadInput(f"rate {rate!r} is not above 0 (requests/s; inf sends all at once)")
    if not burstiness > 0:
        raise BadInput(f"burstiness {burstiness!r} is not above 0 (1 is Poisson, inf constant gaps)")
    if np.isinf(rate):
        return np.zeros(requests)
    if np.isinf(burstiness):
        gaps = np.full(requests, 1 / rate)
    else:
        gaps = np.random.default_rng([seed, 1]).gamma(burstiness, 1 / (rate * burstiness), requests)
    times = np.cumsum(gaps)
    return times * (requests / rate / times[-1]) if normalised else times


def _check_requests(requests: int) -> None:
    if requests < 1:
        raise BadInput(f"a trace of {requests} requests is empty: a level needs at least one request")


def _streams(seed: int) -> list[np.random.Generator]:
    # One stream a column keeps a shorter trace a prefix of a longer one.
    return [np.random.default_rng([seed, 0, column]) for column in range(3)]


def _truncated_lognormal(rng: np.random.Generator, mu: float, sigma: float, requests: int) -> np.ndarray:
    kept = np.empty(0, dtype=int)
    while kept.size < requests:
        drawn = np.rint(rng.lognormal(mu, sigma, 4096)).astype(int)
        kept = np.concatenate([kept, drawn[(drawn >= 4) & (drawn <= 1024)]])
    return kept[:requests]


def _word_prompts(lengths: np.ndarray, rng: np.random.Generator) -> list[str]:
    picks = rng.integers(len(WORDS), size=int(lengths.sum()))
    ends = np.cumsum(lengths)
    return ["".join(f" {WORDS[i]}" for i in picks[end - n : end]) for end, n in zip(ends, lengths, strict=True)]


def _of_words(name, prompt, output, rng, arrival_s=None) -> Trace:
    prompts = tuple(_word_prompts(prompt, rng))
    return Trace(name, prompts, tuple(prompt.tolist()), tuple(output.tolist()), arrival_s)


def _from_csv(path: Path, seed: int) -> Trace:
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or ()]
        rows = list(reader)
    if unknown := set(reader.fieldnames) - _CSV_COLUMNS:
        raise BadInput(
            f"{path.name}: unknown columns {', '.join(map(repr, sorted(unknown)))}; known: {', '.join(sorted(_CSV_COLUMNS))}"
        )
    prompt = np.array([int(row["prompt_tokens"]) for row in rows], dtype=int)
    output = np.array([int(row["output_tokens"]) for row in rows], dtype=int)
    if (prompt < 1).any() or (output < 1).any():
        raise BadInput(f"{path.name}: every prompt_tokens and output_tokens must be at least 1")
    most = max(prompt.max(initial=0), output.max(initial=0))
    # Summed as floats: the sum of hostile lengths must not wrap around.
    if most > _MAX_REQUEST_TOKENS or prompt.sum(dtype=float) + output.sum(dtype=float) > _MAX_TRACE_TOKENS:
        raise BadInput(
            f"{path.name}: a request has at most {_MAX_REQUEST_TOKENS:,} tokens each way, a trace {_MAX_TRACE_TOKENS:,}"
        )
    arrival = None
    if rows and "arrival_s" in reader.fieldnames:
        arrival = np.array([float(row["arrival_s"]) for row in rows])
        if not np.isfinite(arrival).all() or (np.diff(arrival) < 0).any() or (arrival < 0).any():
            raise BadInput(f"{path.name}: arrival_s must be ascending seconds from 0 up")
        arrival = tuple(arrival.tolist())
    return _of_words(path.name, prompt, output, _streams(seed)[2], arrival)


def _from_sharegpt(path: Path, tokenizer: str | None) -> Trace:
    if not tokenizer:
        raise BadInput(f"{path.name}: a ShareGPT file needs a tokenizer (a model folder or hub name)")
    return _counted(path, path.stat().st_mtime_ns, tokenizer)


@functools.lru_cache(maxsize=2)  # every level reads the same file, and counting its tokens takes minutes
def _counted(path: Path, _changed: int, tokenizer: str) -> Trace:
    from transformers import AutoTokenizer

    encode = AutoTokenizer.from_pretrained(tokenizer).encode
    kept = []
    for prompt, answer in _conversations(path):
        n, m = len(encode(prompt)), len(encode(answer, add_special_tokens=False))
        if min(n, m) >= 4 and n <= 1024 and n + m <= 2048:
            kept.append((prompt, n, m))
    prompts, inputs, outputs = zip(*kept, strict=True) if kept else ((), (), ())
    return Trace(path.name, prompts, inputs, outputs)


def _conversations(path: Path) -> list[tuple[str, str]]:
    """The first question and answer of every conversation of a ShareGPT file that has both."""
    found = []
    for entry in json.loads(path.read_text()):
        turns = entry.get("conversations", [])
        if len(turns) >= 2:
            found.append((turns[0]["value"], turns[1]["value"]))
    if not found:
        raise BadInput(f"{path.name}: no conversation in it has two turns; expected a ShareGPT file")
    return found
