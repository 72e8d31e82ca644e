"""What a stream says by the table of `fp8lab.load.events`, read the slow way: from the whole body with each byte's arrival
time, by the standard library, every event decoded. The fast reader is held to it (tests/test_streams.py)."""

import json
import re
from collections.abc import Sequence
from typing import NamedTuple

ANSWERS = ("text", "content", "refusal", "tool_calls", "function_call", "audio")
THOUGHTS = ("reasoning_content", "reasoning", "reasoning_details", "thinking")
WORDS = (
    "message", "msg", "detail", "error_description", "error", "errors", "error_msg", "title", "fault", "faultstring",
)  # fmt: skip
GAVE_UP = (
    "abort",
    "cancel",
    "error",
    "fail",
    "insufficient",
    "interrupt",
    "timeout",
    "time-out",
    "time_out",
    "timed out",
)
NO_STREAM = "no event stream"


class Event(NamedTuple):
    """Its time, its type ("" for none), its data's lines, and whether a blank line ended it."""

    at: float
    kind: bytes
    data: tuple[bytes, ...]
    whole: bool


class Seen(NamedTuple):
    """What the fields of `fp8lab.load.events.Outcome` should be, and its verdict."""

    chunks: list[float]
    first_answer: float
    prompt_tokens: int
    output_tokens: int
    choices: int
    finish_reason: str | None
    done_seen: bool
    verdict: str | None


def events_of(body: bytes, arrived: Sequence[float]) -> tuple[list[Event], list[bytes]]:
    """The events of a body whose byte i arrived at `arrived[i]`, and the lines before the first that belong to none."""
    events, strays, kind, data, begin = [], [], b"", [], 0
    ends = [(found.start(), found.end()) for found in re.finditer(rb"\r\n|\r|\n", body)]
    for number, (end, following) in enumerate([*ends, (len(body), len(body))]):
        line, begin = body[begin:end], following
        if number == 0:
            line = line.removeprefix(b"\xef\xbb\xbf")
        closing = number == len(ends)
        field, _, value = line.partition(b":")
        if field == b"data":
            data.append(value[1:] if value[:1] == b" " else value)
        elif field == b"event":
            kind = value.strip()
        elif field not in (b"", b"id", b"retry") and not events:
            strays.append(line)
        if not line or closing:
            if b"".join(data).strip() or kind:
                events.append(Event(arrived[min(end, len(body) - 1)], kind, tuple(data), not closing))
            kind, data = b"", []
    return events, [] if events else strays


def document(data: bytes):
    """The JSON in `data`, None for none."""
    try:
        return json.loads(data.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None


def words(said, data: bytes) -> str:
    """An error's words, or all of it as it came."""
    return inner(said, 8) or data.decode("utf-8", "replace")


def inner(said, depth: int) -> str:
    if isinstance(said, str):
        return said.strip()
    if not depth:
        return ""
    if isinstance(said, list):
        return "; ".join(text for text in (inner(one, depth - 1) for one in said[:3]) if text)
    if not isinstance(said, dict):
        return ""
    keys = {key.lower(): key for key in said}
    found = [inner(said[keys[name]], depth - 1) for name in WORDS if name in keys]
    text = next((one for one in found if one), "")
    place = said[keys["loc"]] if "loc" in keys else None
    return f"{'.'.join(map(str, place))}: {text}" if text and isinstance(place, list) else text


def excerpt(data: bytes) -> str:
    return repr(data[:80].decode("utf-8", "replace"))


def number(value) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value or value in (float("inf"),):
        return -1
    return int(value) if value == int(value) and 0 <= value < 2**31 else -1


def read(body: bytes, arrived: Sequence[float], asked_tokens: int, exact_tokens: bool = True) -> Seen:
    """What a body that ended as HTTP says it should came to."""
    events, strays = events_of(body, arrived)
    # Several data lines are one document or, where they are none, one document each.
    pieces = []
    for event in events:
        lines = [b"\n".join(event.data)]
        if len(event.data) > 1 and not isinstance(document(lines[0]), dict) and event.kind != b"error":
            lines = [line for line in event.data if line.strip()]
        pieces += [event._replace(data=(line.strip(),)) for line in lines]
    done = [number for number, piece in enumerate(pieces) if piece.data == (b"[DONE]",)]
    pieces = pieces[: done[0]] if done else pieces
    full, blank, unclosed, errors, reasons, answers, thoughts = [], [], [], [], [], [], False
    prompt, output, indices = -1, -1, set()
    for piece in pieces:
        said = document(piece.data[0])
        if piece.kind == b"error":
            text = words(said, piece.data[0]) or "without a word"
            errors.append(f"error in the stream: {text[:2000]}")
            continue
        if not isinstance(said, dict):
            if piece.kind in (b"", b"message") and piece.data[0]:
                what = "malformed chunk" if piece.whole else "the stream ended inside an event"
                errors.append(f"{what}: {excerpt(piece.data[0])}")
            continue
        usage = said.get("usage")
        listed = isinstance(said.get("choices"), list)
        complains = not listed and not isinstance(usage, dict) and any(said.get(name) for name in WORDS)
        if said.get("error") or said.get("object") == "error" or complains:
            errors.append(f"error in the stream: {words(said, piece.data[0])[:2000]}")
        for choice in said["choices"] if listed else []:
            if not isinstance(choice, dict):
                continue
            output_in = choice["delta"] if isinstance(choice.get("delta"), dict) else choice
            answer = any(output_in.get(name) for name in ANSWERS)
            thought = any(output_in.get(name) for name in THOUGHTS)
            empty = output_in.get("text") == "" or output_in.get("content") == ""
            reason = choice.get("finish_reason")
            if answer or thought:
                full.append(piece.at)
            elif reason or (empty and not output_in.get("role")):
                blank.append(piece.at)
                unclosed += [] if reason else [piece.at]
            answers += [piece.at] if answer else []
            thoughts |= thought
            reasons += [str(reason)[:80]] if reason else []
            if type(choice.get("index")) is int and 0 <= choice["index"] < 1024:
                indices.add(choice["index"])
        if isinstance(usage, dict):
            one, two, both = (number(usage.get(f"{name}_tokens")) for name in ("prompt", "completion", "total"))
            details = usage.get("completion_tokens_details")
            thinking = number(details.get("reasoning_tokens")) if isinstance(details, dict) else -1
            if 0 <= one <= both and (two < 0 or (thinking > 0 and one + two + thinking == both)):
                two = both - one
            prompt, output = one if one >= 0 else prompt, two if two >= 0 else output
    chunks, choices = full, max(1, len(indices))
    if output > 0 and not full:
        chunks = blank[:output]
    elif output == len(full) + len(blank):
        chunks = sorted(full + blank)
    elif output > len(full) + len(blank):
        chunks = sorted(full + unclosed)
    if chunks and not thoughts:
        answers = chunks[:1]
    if (output == 0 and chunks) or (not exact_tokens and output < len(chunks)):
        output = -1
    gave_up = [reason for reason in reasons if any(word in reason.lower() for word in GAVE_UP)]
    reason = (gave_up or reasons[-1:] or [None])[0]
    after = f"after {len(chunks)} chunks"
    if errors:
        verdict = errors[0]
    elif b"".join(strays).strip():
        verdict = NO_STREAM
    elif gave_up:
        verdict = f'the server gave up with finish reason "{reason}" {after}'
    elif not chunks:
        verdict = "the response ended without a token"
    elif not (done or reasons or output == asked_tokens * choices):
        verdict = f"the stream ended without a finish reason or [DONE] {after}"
    elif exact_tokens and output not in (-1, asked_tokens * choices):
        verdict = f"{output} output tokens instead of the {asked_tokens * choices} asked for"
    elif exact_tokens and output < 0 and reason == "stop" and len(chunks) < asked_tokens * choices:
        verdict = f"{len(chunks)} chunks without a count instead of the {asked_tokens * choices} tokens asked for, ended by the model itself"
    else:
        verdict = None
    first_answer = answers[0] if answers else 0.0
    return Seen(chunks, first_answer, prompt, output, choices, reason, bool(done), verdict)
