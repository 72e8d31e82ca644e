"""Conversations as requests: the first question of each and the length of its answer, in ShareGPT's form or OpenAI's."""

import functools
import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from ..errors import BadInput
from ..ui import storable
from .trace_file import KNOWN, json_entries

_LISTS = ("conversations", "conversation", "messages")
_ASK = {"human", "user"}
_SAY_FIRST = {"system", "developer", "tool", "function"}
_ANSWER = {"gpt", "assistant", "chatgpt", "bard", "bing", "claude", "model", "bot"}
# vLLM's filter for ShareGPT (vllm/benchmarks/datasets.py, is_valid_sequence).
_LEAST, _MOST_IN, _MOST = 4, 1024, 2048


def question_and_answer(entry: object) -> tuple[str, str] | None:
    """The first question of a conversation and its answer; None where one of them is missing or has no text."""
    if not isinstance(entry, dict):
        return None
    turns = next((entry[name] for name in entry if str(name).lower() in _LISTS and isinstance(entry[name], list)), [])
    turns = [turn for turn in turns if isinstance(turn, dict)]
    for asking, answering in itertools.pairwise(turns):
        who, by = (str(turn.get("from") or turn.get("role") or "").lower() for turn in (asking, answering))
        if who not in _ANSWER | _SAY_FIRST and by not in _ASK | _SAY_FIRST:
            asked, answer = _text(asking), _text(answering)
            return (asked, answer) if asked and answer else None
    return None


def _text(turn: dict) -> str:
    said = turn.get("value", turn.get("content"))
    if isinstance(said, list):  # OpenAI's parts: text, pictures
        said = "\n".join(str(part["text"]) for part in said if isinstance(part, dict) and part.get("text"))
    # Half a character, as some tools cut one, is no text that a tokenizer takes.
    return storable(said) if isinstance(said, str) else ""


def check_conversations(path: Path) -> None:
    """Raises BadInput for a file in which none is found."""
    found: Counter = Counter()
    if not any(_found(path, found)):
        raise _none(path, found)


def _found(path: Path, keys: Counter) -> Iterator[tuple[str, str] | None]:
    """Each entry's question and answer; the keys of what has none are counted in `keys`."""
    for _, entry in json_entries(path):
        pair = question_and_answer(entry)
        if pair is None:
            keys.update(list(entry) if isinstance(entry, dict) else [f"(no object but {type(entry).__name__})"])
        yield pair


def _names(keys: Counter) -> str:
    return ", ".join(repr(name[:40]) for name, _ in keys.most_common(8)) or "none"


def _none(path: Path, keys: Counter) -> BadInput:
    return BadInput(
        f"{path.name}: no entry in it has a question with its answer (keys found: {_names(keys)}); known: {KNOWN}"
    )


@functools.lru_cache(maxsize=4)  # every level reads the same file, and counting its tokens takes minutes
def read_conversations(
    path: Path, _changed: int, tokenizer: str, requests: int | None, seed: int, max_context: int | None
) -> tuple[list[tuple[str, int, int]], tuple[str, ...]]:
    """(prompt, its tokens, its answer's tokens) of conversations within vLLM's limits and `max_context`, and notes on those
    without: `requests` of them, drawn by the seed, or fewer where the file has fewer; None is all, in the file's order. The
    file, as it was last changed, is read in a stream, and no more of it is tokenised than is drawn."""
    candidates = None if requests is None else 2 * requests + 50
    while True:
        drawn, entries, keys = _drawn(path, candidates, seed)
        whole = candidates is None or len(drawn) < candidates
        tokens_in, kept, tested = token_counter(tokenizer), [], 0
        for prompt, answer in drawn:
            tested += 1
            n, m = tokens_in(prompt), tokens_in(answer, special=False)
            if min(n, m) >= _LEAST and n <= _MOST_IN and n + m <= min(_MOST, max_context or _MOST):
                kept.append((prompt, n, m))
            if len(kept) == requests:
                break
        if whole or len(kept) == requests:
            break
        candidates *= 8
    notes = []
    if skipped := entries[False]:
        told = f"{skipped:,} of {entries.total():,} entries were skipped: they have no question with its answer"
        notes.append(f"{told} (keys found in them: {_names(keys)})")
    if beyond := tested - len(kept):
        most = f" and {max_context:,} of the context" if max_context and max_context < _MOST else ""
        notes.append(
            f"{beyond:,} of the {tested:,} conversations whose tokens were counted were left out: outside vLLM's limits "
            f"(question and answer from {_LEAST} tokens, question to {_MOST_IN:,}, both to {_MOST:,}){most}"
        )
    return kept, tuple(notes)


def _drawn(path: Path, count: int | None, seed: int) -> tuple[list[tuple[str, str]], Counter, Counter]:
    """`count` conversations in an order drawn by the seed (None: all, in the file's): those with the smallest of the numbers
    that each draws. Beside them how many entries are conversations (True) and how many not, and the keys of the latter."""
    draw = np.random.default_rng([seed, 0, 3]).random
    entries, keys = Counter(), Counter()

    def numbered() -> Iterator[tuple[float, int, tuple[str, str]]]:
        for place, pair in enumerate(_found(path, keys)):
            entries[pair is not None] += 1
            if pair is not None:
                yield draw(), place, pair

    chosen = list(numbered()) if count is None else heapq.nsmallest(count, numbered())
    if not chosen:
        raise _none(path, keys)
    return [pair for _, _, pair in chosen], entries, keys


@functools.lru_cache(maxsize=2)  # every level asks for the same one
def token_counter(tokenizer: str) -> Callable[..., int]:
    """What counts a text's tokens; `special=False` leaves out those that the tokenizer adds. `tokenizer` is a model's folder
    or hub name. Raises BadInput when it is not there, cannot be fetched, or cannot be read."""
    folder = Path(tokenizer).expanduser()
    if not tokenizer or (not folder.is_dir() and (tokenizer.startswith((".", "/", "~")) or tokenizer.count("/") > 1)):
        raise BadInput(f"no tokenizer at {tokenizer!r}: expected a model's folder, or a hub name ORG/NAME")
    try:
        file = folder / "tokenizer.json" if folder.is_dir() else _of_hub(tokenizer)
        if file and file.is_file():
            from tokenizers import Tokenizer

            read = Tokenizer.from_file(str(file))
            read.no_truncation()
            read.no_padding()
            return lambda text, special=True: len(read.encode(text, add_special_tokens=special).ids)
        from transformers import AutoTokenizer  # seconds and half a GB: for tokenizers of another kind alone

        encode = AutoTokenizer.from_pretrained(str(folder) if folder.is_dir() else tokenizer).encode
    except Exception as error:  # a hub's, a network's, a file's, a missing package's: they have no base of their own
        why = (str(error).strip().partition("\n")[0] or type(error).__name__)[:300].rstrip(".")
        raise BadInput(
            f"the tokenizer {tokenizer!r} cannot be loaded: {why}. Name the folder of a model on this machine, or fetch it "
            "first where its hub can be reached (hf download ORG/NAME)"
        ) from None
    return lambda text, special=True: len(encode(text, add_special_tokens=special))


def _of_hub(name: str) -> Path | None:
    """The file of a hub's tokenizer, fetched unless it was; None where the hub has it in another form."""
    from huggingface_hub import hf_hub_download, model_info
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(name, "tokenizer.json", local_files_only=True))
    except EntryNotFoundError:
        # One question, answered at once: a download that cannot reach its hub tries for half a minute and logs every time.
        model_info(name, timeout=10)
    try:
        return Path(hf_hub_download(name, "tokenizer.json"))
    except EntryNotFoundError:
        return None
