"""The requests of a level, in order (trace), and when they arrive (schedule). Both come from a seed: a trace is a prefix of any
longer one of the same kind and seed, so that levels with different numbers of requests send the same first requests."""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal, NoReturn

import numpy as np

from ..errors import BadInput
from ..paths import DATA
from ..ui import visible
from .conversations import check_conversations, read_conversations
from .trace_file import Lengths, read_lengths

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
_MAX_TRACE_TOKENS = 1 << 27
# Recorded by others, in data/traces/.
RECORDED = ("azure-conv", "azure-code")
NAMES = ("sharegpt-like", "random", *RECORDED)
Times = Literal["kept", "dropped", "refused"]


@dataclass(frozen=True)
class Trace:
    """Requests in order. `prompt_tokens` and `output_tokens` are per request; `arrival_s` holds arrival times (s) that are to
    be replayed, else None. `notes` say in sentences what of its file was left out or changed."""

    name: str
    prompts: tuple[str, ...]
    prompt_tokens: tuple[int, ...]
    output_tokens: tuple[int, ...]
    arrival_s: tuple[float, ...] | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self):
        if not self.prompts:
            told = "".join(f"; {note}" for note in self.notes)
            raise BadInput(f"the trace {self.name!r} is empty: a level needs at least one request{told}")

    def __len__(self) -> int:
        return len(self.prompts)

    @functools.cached_property
    def digest(self) -> str:
        """What tells these requests from any others: 16 hexadecimal digits over prompts, lengths and arrival times."""
        held = json.dumps([self.prompts, self.prompt_tokens, self.output_tokens, self.arrival_s])
        return hashlib.sha256(held.encode()).hexdigest()[:16]

    @property
    def lengths(self) -> str:
        """Whose lengths its requests have, whatever the seed that drew them: "azure-conv", "random 1024/128"."""
        return self.name.partition(" seed ")[0]

    def __repr__(self) -> str:
        mean_in, mean_out = (sum(tokens) / len(self) for tokens in (self.prompt_tokens, self.output_tokens))
        told = f"trace {visible(self.name)}: {len(self):,} requests, mean {mean_in:.0f} tokens in, {mean_out:.0f} out"
        return visible("; ".join((told, *self.notes)))

    def head(self, requests: int) -> "Trace":
        """The first `requests` requests. Raises BadInput when the trace is shorter, or none are asked for."""
        _check_requests(requests)
        _check_enough(self.name, len(self), requests, self.notes)
        arrival = self.arrival_s and self.arrival_s[:requests]
        parts = self.prompts, self.prompt_tokens, self.output_tokens
        return Trace(self.name, *(part[:requests] for part in parts), arrival, self.notes)

    def to_sharegpt(self, begin_tokens: int = 0) -> list[dict]:
        """The trace in ShareGPT's form, for tools that read it (`vllm bench serve --dataset-name sharegpt`). Answers are words,
        `begin_tokens` fewer than asked for: readers count the BOS token that a tokenizer adds."""
        lengths = np.maximum(np.asarray(self.output_tokens) - begin_tokens, 1)
        words = _word_prompts(lengths, np.random.default_rng(1))
        return [
            {"conversations": [{"from": "human", "value": p}, {"from": "gpt", "value": w}]}
            for p, w in zip(self.prompts, words, strict=True)
        ]


def sharegpt_like(requests: int = 1000, seed: int = 0) -> Trace:
    """Lengths shaped like ShareGPT under vLLM's filter: lognormal, truncated to 4...1,024 tokens. Prompts have mu 4.85, sigma
    1.4 (mean about 200), outputs mu 4.83, sigma 1.13 (mean about 183)."""
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
    _check_size(name, requests, requests * (input_tokens + output_tokens))
    return _of_words(name, np.full(requests, input_tokens), np.full(requests, output_tokens), _streams(seed)[2])


def from_file(
    path: str | Path,
    *,
    requests: int | None = None,
    seed: int = 0,
    tokenizer: str | Callable[[], str] | None = None,
    times: Times = "kept",
    max_context: int | None = None,
    fewer: bool = False,
    name: str = "",
) -> Trace:
    """A trace from a file of lengths (fp8lab's own, Azure's, BurstGPT's, Mooncake's) or of conversations (ShareGPT's form or
    OpenAI's); which it is shows in its columns or keys. It has the file's name, or `name`.

    `requests` of them are drawn by the seed, a shorter trace again a prefix of a longer one; all, or None, come in the file's
    order (but with `fewer` they are drawn). Arrival times that are kept make that a stretch of consecutive requests, begun
    where the seed says, from its first arrival on; "refused" refuses those of fp8lab's own format and drops the others.
    Prompts of lengths are words. Conversations need a `tokenizer` (a folder or hub name, or what gives it); vLLM's filter is
    applied: question and answer of at least 4 tokens, the question <= 1,024, both <= 2,048. Requests of more than `max_context`
    tokens in and out are left out, and `notes` say how many. Raises BadInput for a file that cannot be read, or holds fewer than
    `requests` unless `fewer` will do."""
    _check_seed(seed)
    path = _trace_path(path)
    name = name or path.name
    if requests is not None:
        _check_requests(requests)
    if max_context is not None and max_context < 2:
        raise BadInput(f"a context of {max_context} tokens takes no request: it needs one token in and one out")
    lengths, least = read_lengths(path, times=times == "kept"), None if fewer else requests
    if lengths is not None:
        if times == "refused" and lengths.to_be_replayed:
            refuse_times(name)
        return _of_lengths(lengths, name, requests, least, seed, max_context)
    if tokenizer is None:
        check_conversations(path)
        raise BadInput(
            f"{name}: conversations need a tokenizer (a model's folder or hub name) that counts their tokens"
        )
    tokenizer = tokenizer if isinstance(tokenizer, str) else tokenizer()
    kept, notes = read_conversations(path, path.stat().st_mtime_ns, tokenizer, requests, seed, max_context)
    prompts, inputs, outputs = zip(*kept, strict=True) if kept else ((), (), ())
    _check_enough(name, len(kept), least, notes)
    return Trace(name, prompts, inputs, outputs, notes=notes)


def _trace_path(path: str | Path) -> Path:
    path = Path(path)
    if not os.path.exists(path):  # False too for a name that no file can have
        raise BadInput(
            f"no trace file {str(path)!r}; expected a table of lengths (.csv) or conversations (.json, .jsonl)"
        )
    if not path.is_file():
        raise BadInput(f"{str(path)!r} is no file but a folder or device; name the trace file in it")
    return path


def _check_enough(name: str, held: int, requests: int | None, notes: Sequence[str]) -> None:
    if requests is not None and held < requests:
        told = "".join(f"; {note}" for note in notes)
        raise BadInput(f"the trace {name!r} has {held} requests, {requests} were asked for{told}")


def _of_lengths(
    lengths: Lengths, name: str, requests: int | None, least: int | None, seed: int, max_context: int | None
) -> Trace:
    notes, rows = list(lengths.notes), np.arange(len(lengths.prompt))
    if max_context is not None:
        rows = np.flatnonzero(lengths.prompt + lengths.output <= max_context)
        if left := len(lengths.prompt) - len(rows):
            share = f"{left:,} of {len(lengths.prompt):,} requests left out"
            notes.append(f"{share}: more than the {max_context:,} tokens in and out together that the context takes")
    _check_enough(name, len(rows), least, notes)
    # One that is begun anew is drawn whole, too: a shorter draw is then the beginning of a longer one.
    if requests is not None and (requests < len(rows) or (least is None and lengths.arrival_s is None)):
        draw = np.random.default_rng([seed, 0, 3])
        if lengths.arrival_s is None:
            rows = draw.permutation(rows)[:requests]
        else:
            begin = draw.integers(len(rows) - requests + 1)
            rows = rows[begin : begin + requests]
    prompt, output = (part[rows].astype(int) for part in (lengths.prompt, lengths.output))
    arrival = None
    if lengths.arrival_s is not None and len(rows):
        arrival = tuple((lengths.arrival_s[rows] - lengths.arrival_s[rows[0]]).tolist())
    return _of_words(name, prompt, output, _streams(seed)[2], arrival, tuple(notes))


def is_file(trace: str) -> bool:
    """Whether a trace's name is that of a file: it has a folder or an ending."""
    return trace not in NAMES and ("/" in trace or bool(Path(trace).suffix))


def check_file(path: str | Path) -> None:
    """Raises BadInput unless `path` is a trace for levels that can be read, as far as that shows without a tokenizer."""
    path = _trace_path(path)
    lengths = read_lengths(path, times=False)
    if lengths is None:
        check_conversations(path)
    elif lengths.to_be_replayed:
        refuse_times(path.name)


def refuse_times(name: str) -> NoReturn:
    """Raises BadInput for a trace with arrival times of its own, which a level cannot keep."""
    raise BadInput(
        f"the trace {name!r} holds arrival times (arrival_s), and a level draws its own at its rate; leave that "
        "column out to use its lengths alone, or replay it with `fp8lab load-test --trace FILE`"
    )


def begun_anew(trace: str, requests: int, *, seed: int, **options) -> Trace:
    """As many requests of a named trace as asked for: a file that holds fewer is begun anew, with other prompts where those
    are drawn. Arrival times are left out. `options` are those of `named_trace`."""
    draw = functools.partial(named_trace, trace, times="dropped", fewer=True, **options)
    parts = [draw(requests, seed=seed)]
    first = parts[0]
    each = (sum(first.prompt_tokens) + sum(first.output_tokens)) / len(first)
    _check_size(first.name, requests, int(each * requests))
    lacking = requests - len(first)
    while lacking:
        parts.append(draw(lacking, seed=seed + len(parts)))
        lacking -= len(parts[-1])
    columns = ("prompts", "prompt_tokens", "output_tokens")
    joined = (tuple(chain(*(getattr(part, column) for part in parts))) for column in columns)
    return Trace(first.name, *joined, notes=first.notes)


def named_trace(
    trace: str, requests: int | None, *, seed: int, input_tokens: int, output_tokens: int, **options
) -> Trace:
    """The trace that a profile or the command line names: one of NAMES ("random" with its lengths), or a file. `requests` is
    how many; None means 1000, or all of a file. For the other `options`, and what is raised, see `from_file`."""
    if is_file(trace):
        return from_file(trace, requests=requests, seed=seed, **options)
    requests = 1000 if requests is None else requests
    if trace == "sharegpt-like":
        return sharegpt_like(requests, seed)
    if trace == "random":
        if (most := options.get("max_context")) is not None and input_tokens + output_tokens > most:
            raise BadInput(
                f"requests of {input_tokens:,} tokens in and {output_tokens:,} out have more together than the {most:,} that the "
                "context takes; ask for shorter ones"
            )
        return fixed_length(requests, seed=seed, input_tokens=input_tokens, output_tokens=output_tokens)
    if trace not in RECORDED:
        raise BadInput(f"no trace {trace!r} (there are: {', '.join(NAMES)}, or a file of lengths or conversations)")
    path = DATA / "traces" / f"{trace}.csv.gz"
    return from_file(path, requests=requests, seed=seed, name=f"{trace} seed {seed}", **options)


def rescaled(arrival_s: Sequence[float], rate: float) -> np.ndarray:
    """Arrival times with their own pattern at another mean `rate`, requests/s: the last one falls at requests / rate, as in
    `arrival_times`. Raises BadInput for times that are all the same."""
    _check_rate(rate)
    times = np.asarray(arrival_s, dtype=float)
    if not times[-1] > 0 and not np.isinf(rate):
        raise BadInput(f"all {len(times):,} requests of the trace arrive at once: that has no rate to be scaled")
    return times * 0 if np.isinf(rate) else times * (len(times) / rate / times[-1])


def arrival_times(
    requests: int, rate: float, *, burstiness: float = 1.0, seed: int = 0, normalised: bool = True
) -> np.ndarray:
    """When each request is to be sent: seconds from the level's start, ascending, shape (requests,). Gaps are gamma distributed
    with shape `burstiness` (1: Poisson arrivals, inf: constant gaps, below 1: bursts) and mean 1 / `rate`; a `rate` of inf sends
    all at once. `normalised` rescales the gaps so that the last arrival falls at requests / rate, as vLLM's client does
    (vllm/benchmarks/serve.py, get_request)."""
    _check_rate(rate)
    if not burstiness > 0:
        raise BadInput(f"burstiness {burstiness!r} is not above 0 (1 is Poisson, inf constant gaps)")
    _check_seed(seed)
    if np.isinf(rate):
        return np.zeros(requests)
    if np.isinf(burstiness):
        gaps = np.full(requests, 1 / rate)
    else:
        gaps = np.random.default_rng([seed, 1]).gamma(burstiness, 1 / (rate * burstiness), requests)
    times = np.cumsum(gaps)
    if not (np.isfinite(times[-1]) and times[-1] > 0):
        raise BadInput(f"rate {rate!r} with burstiness {burstiness!r} gives no arrival times: one of them is too small")
    return times * (requests / rate / times[-1]) if normalised else times


def _check_requests(requests: int) -> None:
    if requests < 1:
        raise BadInput(f"a trace of {requests} requests is empty: a level needs at least one request")
    _check_size("the trace", requests, requests)


def _check_rate(rate: float) -> None:
    if not rate > 0:
        raise BadInput(f"rate {rate!r} is not above 0 (requests/s; inf sends all at once)")


def _check_seed(seed: int) -> None:
    if seed < 0:
        raise BadInput(f"seed {seed} is below 0")


def _streams(seed: int) -> list[np.random.Generator]:
    _check_seed(seed)
    # One stream a column keeps a shorter trace a prefix of a longer one.
    return [np.random.default_rng([seed, 0, column]) for column in range(3)]


def _truncated_lognormal(rng: np.random.Generator, mu: float, sigma: float, requests: int) -> np.ndarray:
    parts, found = [], 0
    while found < requests:
        drawn = np.rint(rng.lognormal(mu, sigma, 4096)).astype(int)
        parts.append(drawn[(drawn >= 4) & (drawn <= 1024)])
        found += parts[-1].size
    return np.concatenate(parts)[:requests]


def _word_prompts(lengths: np.ndarray, rng: np.random.Generator) -> list[str]:
    spaced = [f" {word}" for word in WORDS]
    picks, ends = rng.integers(len(WORDS), size=int(lengths.sum())), np.cumsum(lengths)
    return ["".join([spaced[i] for i in picks[end - n : end].tolist()]) for end, n in zip(ends, lengths, strict=True)]


def _check_size(name: str, requests: int, tokens: int) -> None:
    if tokens > _MAX_TRACE_TOKENS:
        raise BadInput(
            f"{name}: {requests:,} requests of together {tokens:,} tokens, at most {_MAX_TRACE_TOKENS:,} are sent; "
            "ask for fewer requests"
        )


def _of_words(name, prompt, output, rng, arrival_s=None, notes=()) -> Trace:
    _check_size(name, len(prompt), int(prompt.sum() + output.sum()))
    prompts = tuple(_word_prompts(prompt, rng))
    return Trace(name, prompts, tuple(prompt.tolist()), tuple(output.tolist()), arrival_s, notes)
