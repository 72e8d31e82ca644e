"""The streams that real servers send, as plans in time: what `sse_server.py` plays for a model of a shape's name.

A shape gives, for a number of tokens, pairs (when, what): in tokens after the first (negative: at once), and bytes of the
body. Token n of a true stream is there at n.
"""

import gzip
import json
from collections.abc import Callable, Iterator
from typing import NamedTuple

Steps = list[tuple[float, bytes]]
DONE = b"data: [DONE]\n\n"
AT_ONCE = -1


def data(event) -> bytes:
    return f"data: {json.dumps(event, separators=(',', ':'))}\n\n".encode()


def chunk(fields: dict, **more) -> bytes:
    """A chunk of chat."""
    choice = {"index": 0, "delta": fields, "logprobs": None, "finish_reason": None} | more
    return data(
        {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "ok", "choices": [choice]}
    )


def piece(text: str, **more) -> bytes:
    """A chunk of a completion."""
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": None} | more
    return data({"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "ok", "choices": [choice]})


def usage(completion, prompt=10) -> bytes:
    return data({"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": completion}})


def completion(n: int, *, ending: str | None = "length", tail: bytes | None = None) -> Steps:
    """A completion of n tokens, its finish reason with the last; then `tail`, else usage and [DONE]."""
    steps = [(float(t), piece(" time", finish_reason=ending if t == n - 1 else None)) for t in range(n)]
    return [*steps, (n - 1, usage(n) + DONE if tail is None else tail)]


def chat(n: int, kinds: Iterator[str], tail: bytes | None = None) -> Steps:
    """A chat answer: its role at once, a delta a token under the names of `kinds`, a closing delta."""
    steps = [(AT_ONCE, chunk({"role": "assistant", "content": ""}))]
    steps += [(float(t), chunk({kind: " time"})) for t, kind in enumerate(kinds)]
    return [*steps, (n - 1, chunk({}, finish_reason="length") + (usage(n) + DONE if tail is None else tail))]


def reasoned(n: int, name: str) -> Iterator[str]:
    """Three quarters of the tokens are reasoning."""
    return (name if t < n * 3 // 4 else "content" for t in range(n))


def grouped(n: int, size: int, tail: bytes) -> Steps:
    """`size` tokens a chunk, each there with the last of its tokens."""
    ends = range(size - 1, n, size)
    steps = [(float(t), piece(" time" * size, finish_reason="length" if t == n - 1 else None)) for t in ends]
    return [*steps, (n - 1, tail)]


def transformers_serve(n: int) -> Steps:
    """As transformers 5.19: no finish_reason before the last chunk, which has an empty delta and the usage; no [DONE]."""
    event = {"id": "1", "choices": [{"delta": {"content": " time"}, "index": 0}]}
    last = {"id": "1", "choices": [{"delta": {}, "index": 0, "finish_reason": "length"}]}
    last["usage"] = {"prompt_tokens": 10, "completion_tokens": n, "total_tokens": 10 + n}
    return [*((float(t), data(event)) for t in range(n)), (n - 1, data(last))]


def broken_off(n: int, after: int, tail: bytes) -> Steps:
    return [*((float(t), piece(" time")) for t in range(after)), (after, tail)]


def continuous(n: int) -> Steps:
    """Usage so far in every chunk, and once before the first."""

    def so_far(t: int) -> dict:
        return {"usage": {"prompt_tokens": 10, "completion_tokens": t, "total_tokens": 10 + t}}

    def with_usage(t: int) -> bytes:
        choice = {"index": 0, "text": f" {t}", "finish_reason": "length" if t == n else None}
        return data({"choices": [choice]} | so_far(t))

    steps = [(AT_ONCE, data({"choices": []} | so_far(0))), *((t - 1.0, with_usage(t)) for t in range(1, n + 1))]
    return [*steps, (n - 1, data({"choices": []} | so_far(n)) + DONE)]


def two_choices(n: int) -> Steps:
    steps = [
        (float(t), piece(" time", index=index, finish_reason="length" if t == n - 1 else None))
        for t in range(n)
        for index in range(2)
    ]
    return [*steps, (n - 1, usage(2 * n) + DONE)]


def interspersed(steps: Steps, odd: bytes) -> Steps:
    return [(when, odd + what) for when, what in steps]


def in_one_go(steps: Steps) -> Steps:
    return [(steps[-1][0], b"".join(what for _, what in steps))]


def in_pieces(steps: Steps, size: int) -> Steps:
    """As a proxy with a small buffer hands them on: `size` events at a time."""
    groups = [steps[at : at + size] for at in range(0, len(steps), size)]
    return [(group[-1][0], b"".join(what for _, what in group)) for group in groups]


def reasoning_apart(n: int) -> Steps:
    """The count leaves reasoning out, which stands beside it and is in the total."""
    answer = n - n * 3 // 4
    counts = {"prompt_tokens": 10, "completion_tokens": answer, "total_tokens": 10 + n}
    counts["completion_tokens_details"] = {"reasoning_tokens": n - answer}
    return chat(n, reasoned(n, "reasoning_content"), data({"choices": [], "usage": counts}) + DONE)


def whole(n: int) -> dict:
    """A completion that was not streamed."""
    counts = {"prompt_tokens": 10, "completion_tokens": n, "total_tokens": 10 + n}
    return {"id": "cmpl-1", "choices": [{"index": 0, "text": " time" * n, "finish_reason": "length"}], "usage": counts}


class Shape(NamedTuple):
    """How a stream is sent: what is said when, the head's lines, whether the body is chunked and whether it ends."""

    steps: Callable[[int], Steps]
    head: bytes = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
    chunked: bool = True
    ends: bool = True


JSON = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
PAGE = b"HTTP/1.1 200 OK\r\ncontent-type: text/html\r\n"
ZIPPED = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-encoding: gzip\r\n"
MOVED = (
    b"HTTP/1.1 308 Permanent Redirect\r\nlocation: https://user:secret@elsewhere.example/v1/completions?key=secret\r\n"
)
CLOSES = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n"
OWN_ERROR = data({"object": "error", "message": "out of KV cache", "code": 500})

SHAPES = {
    "reasoning": Shape(lambda n: chat(n, reasoned(n, "reasoning_content"))),
    "reasoning-short": Shape(lambda n: chat(n, reasoned(n, "reasoning"))),
    "only-reasoning": Shape(lambda n: chat(n, ("reasoning_content" for _ in range(n)))),
    "chat": Shape(lambda n: chat(n, ("content" for _ in range(n)))),
    "four-a-chunk": Shape(lambda n: grouped(n, 4, usage(n) + DONE)),
    "four-a-chunk-no-usage": Shape(lambda n: grouped(n, 4, DONE)),
    "ends-without-done": Shape(lambda n: completion(n, tail=usage(n))),
    "transformers-serve": Shape(transformers_serve),
    "done-unfinished": Shape(lambda n: completion(n, tail=usage(n) + DONE.strip())),
    "no-finish-reason": Shape(lambda n: completion(n, ending=None)),
    "null-usage": Shape(lambda n: completion(n, tail=usage(None) + DONE)),
    "null-delta": Shape(lambda n: interspersed(chat(n, ("content" for _ in range(n))), data({"choices": [{"delta": None}]}))),
    "abort": Shape(lambda n: broken_off(n, n // 2, piece("", finish_reason="abort") + usage(n // 2) + DONE)),
    "close-delimited": Shape(completion, CLOSES, chunked=False),
    "own-error": Shape(lambda n: broken_off(n, 4, OWN_ERROR + DONE)),
    "redirect": Shape(lambda n: [(0, b"moved")], MOVED),
    "buffered": Shape(lambda n: in_one_go(completion(n))),
    "buffered-chunk": Shape(lambda n: grouped(n, n, usage(n) + DONE)),
    "in-pieces": Shape(lambda n: in_pieces(completion(n), 6)),
    "reasoning-apart": Shape(reasoning_apart),
    "usage-a-chunk": Shape(lambda n: completion(n, tail=usage(1) + DONE)),
    "ended-by-itself": Shape(lambda n: completion(n // 4, ending="stop", tail=DONE)),
    "half-a-character": Shape(lambda n: broken_off(n, 4, data({"error": {"message": "bad \ud83d here"}}))),
    "one-choice-numbered-1": Shape(lambda n: [(float(t), piece(" time", index=1, finish_reason="length" if t == n - 1 else None)) for t in range(n)]
                                   + [(n - 1, usage(n) + DONE)]),
    "never-ends": Shape(completion, ends=False),
    "continuous-usage": Shape(continuous),
    "two-choices": Shape(two_choices),
    "comments": Shape(lambda n: interspersed(completion(n), b": ping\r\n\r\n")),
    "json": Shape(lambda n: [(n - 1, json.dumps(whole(n), indent=1).encode())], JSON),
    "json-error": Shape(lambda n: [(0, b'{"error":{"message":"the model sleeps","code":1}}')], JSON),
    "page": Shape(lambda n: [(0, b"<!DOCTYPE html><html><h1>Welcome</h1></html>")], PAGE),
    "empty": Shape(lambda n: []),
    "gzip": Shape(lambda n: [(n - 1, gzip.compress(b"".join(what for _, what in completion(n))))], ZIPPED),
}  # fmt: skip
