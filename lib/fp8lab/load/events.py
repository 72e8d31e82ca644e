"""What the body of a stream says, read as it arrives, event by event: `data:` lines up to a blank line, of any line ending;
comments and other fields are skipped. `tests/slow_stream.py` reads it once more by this table, slowly, for the tests.

| what arrives | what it is |
|---|---|
| a choice with a non-empty text, content, refusal, tool call, function call or audio | output, and an answer |
| a choice with non-empty reasoning (`reasoning_content`, `reasoning`, `reasoning_details`, `thinking`) | output |
| a choice whose text or content is "", without a role; a closing one without output | a token without text where the \
server's count says that each chunk was one token, or where no chunk had text; where it says that chunks held more, one without \
text is a token and a closing one none; else nothing |
| a choice with a role alone, or with a `delta` that is null or empty; no `choices`, or none in them | no output |
| `usage` | the server's count, each number by itself, the last one given; what is no number ≥ 0 counts as not given; \
a missing `completion_tokens`, or one that leaves out the reasoning which `completion_tokens_details` counts and the total holds, \
is `total_tokens` - `prompt_tokens`; 0 beside output, and where answers end by themselves fewer than their chunks, count as not given |
| an `index` of a choice | as many choices as there are different ones |
| `[DONE]` | the end: what comes after it is not read |
| a `finish_reason` | the end of a choice; one that speaks of abort, cancelling, an error or a time-out: failed |
| the end of the body, also where the connection's end ends it | the end; an event needs no blank line then |
| the end of the connection before that of the body | failed, but after `[DONE]` |
| finish reason "stop" without a count, fewer chunks than tokens asked for where all were to come | failed |
| an end with neither `[DONE]` nor a finish reason nor a count of the length asked for | failed |
| `error`, `"object": "error"`, `event: error`; no `choices` and no `usage` but a `message`, `detail` or the like | failed, \
in the server's words |
| an event that is no JSON object (of another type than `message`: skipped) | failed |
| a body without a single event: JSON, a page; a compressed one | failed, with what it is |

A chunk is an event's choice with output. Its time is that at which the last byte of its event's blank line was read;
chunks read at once have one time. TTFT is the time of the first chunk, whatever its kind, as in
vllm/benchmarks/lib/endpoint_request_func.py; there chat's opening role counts too, and a chunk without text always.

The hot path is a chunk that differs from one already decoded in its text alone: comparing what stands before and after the
text tells so, without decoding, and proves that it means the same. Everything else is decoded.
"""

import json
import re
from array import array
from dataclasses import dataclass, field
from typing import NamedTuple

import orjson

from .endpoint import KEYS, sentence, words

ANSWER = ("text", "content", "refusal", "tool_calls", "function_call", "audio")
REASONING = ("reasoning_content", "reasoning", "reasoning_details", "thinking")
_BROKEN = re.compile("abort|cancel|error|fail|insufficient|interrupt|time.?out", re.IGNORECASE)
_USUAL = (None, "stop", "length")
_MAX_EVENT_BYTES = 1 << 20
_MAX_WORDS = 2000
_MAX_COUNT = 1 << 31
_MAX_CHOICES = 1 << 10
_EXCERPT = 80
_BOM = b"\xef\xbb\xbf"
_FIELDS = (b"data", b"event", b"id", b"retry")
_BLANK_LINES = (b"\n\n", b"\r\n\r\n")
_MATCHES_NOTHING = b"\x00"
# How often in a row a chunk is taken for the pattern of those that follow, without any that fits.
_PATTERNS = 4


@dataclass(slots=True)
class Outcome:
    """One request as the client saw it. Times are CLOCK_MONOTONIC seconds; 0.0 is "never".

    `endpoint` is the number of the one that was asked, in a fleet (-1: none was). `slot` is when the slot that it took in a
    closed loop had become free (0.0: it always was). `chunks` holds the arrival time of every chunk with output,
    `first_answer` that of the first with more than reasoning; `output_tokens` and `prompt_tokens` are the server's own
    count (-1 if it gave none), over all `choices`; `error` is None or one sentence.
    """

    index: int
    asked_tokens: int
    sent: float = 0.0
    endpoint: int = 0
    slot: float = 0.0
    chunks: array = field(default_factory=lambda: array("d"))
    first_answer: float = 0.0
    prompt_tokens: int = -1
    output_tokens: int = -1
    choices: int = 1
    finish_reason: str | None = None
    error: str | None = None
    done_seen: bool = False

    def verdict(self, exact_tokens: bool) -> str | None:
        """The reason why this stream does not count as completed, or None. Where lengths are not exact a count below what came is
        no count of all of it, and is forgotten."""
        if not exact_tokens and self.output_tokens < len(self.chunks):
            self.output_tokens = -1
        if self.error:
            return self.error
        if broken(self.finish_reason):
            return f'the server gave up with finish reason "{self.finish_reason}" after {len(self.chunks)} chunks'
        if not self.chunks:
            return "the response ended without a token"
        asked = self.asked_tokens * self.choices
        if not (self.done_seen or self.finish_reason or self.output_tokens == asked):
            return f"the stream ended without a finish reason or [DONE] after {len(self.chunks)} chunks"
        if exact_tokens and self.output_tokens not in (-1, asked):
            return f"{self.output_tokens} output tokens instead of the {asked} asked for"
        if exact_tokens and self.output_tokens < 0 and self.finish_reason == "stop" and len(self.chunks) < asked:
            return f"{len(self.chunks)} chunks without a count instead of the {asked} tokens asked for, ended by the model itself"
        return None


def broken(finish_reason: str | None) -> bool:
    """Whether a finish reason says that the server did not finish (abort, error, cancelled and the like)."""
    return finish_reason not in _USUAL and bool(_BROKEN.search(finish_reason))


class _Pattern(NamedTuple):
    """A chunk of any stream of a server: `head`, its id, `middle`, any plain text, `after`. It holds reasoning or an answer of
    its first choice, which is `indexed` (0) or the only one."""

    head: bytes
    middle: bytes
    after: bytes
    reasoning: bool
    indexed: bool


class Reader:
    """Reads the body of one stream into `outcome`."""

    # One block of memory without a dictionary: a chunk that wakes an idle worker finds nothing of it in the caches.
    __slots__ = ("_after", "_after_cr", "_append", "_before", "_blanks", "_clean", "_closings", "_data", "_first_line",
                 "_held", "_index", "_indices", "_kind", "_no_event", "_now", "_outcome", "_pattern_at", "_patterns", "_reasoned", "_stray",
                 "_tail")  # fmt: skip

    # The last pattern that was proved; what it proves holds for every stream.
    _known: _Pattern | None = None

    def __init__(self, outcome: Outcome):
        self._outcome = outcome
        self._append = outcome.chunks.append
        self._now = 0.0
        self._before, self._after = _MATCHES_NOTHING, b""
        self._patterns, self._pattern_at = _PATTERNS, 0
        # What is not complete yet: a line, the kind of an event, its data; and how much is held.
        self._tail, self._kind, self._held = b"", b"", 0
        self._data: list[bytes] = []
        self._first_line, self._after_cr, self._clean, self._no_event = True, False, True, True
        self._reasoned = False
        self._blanks: list[float] = []  # times of chunks that may be a token without text
        self._closings: list[float] = []  # of those that end a choice
        self._indices: set[int] = set()  # of choices
        self._index = -1  # the last one
        self._stray: list[bytes] = []  # lines where events should stand

    def feed(self, body: bytes, now: float) -> str | None:
        """Takes bytes that arrived at `now`; the reason why nothing more of this stream can be read, or None."""
        if self._clean and body.startswith(self._before) and body.endswith(self._after):
            # Printable text without quotes and backslashes is the inside of a JSON string, whatever its words.
            text = body[len(self._before) : -len(self._after)].decode("utf-8", "replace")
            if text and text.isprintable() and '"' not in text and "\\" not in text:
                self._append(now)
                return None
        return self._decode(body, now)

    def end(self) -> str | None:
        """The body ended as it should; the reason why it is no complete stream, or None. An event counts without the
        blank line behind it."""
        outcome = self._outcome
        if not self._clean:
            self._line(self._tail)
            self._event(b"\n".join(self._data), "the stream ended inside an event")
        if self._stray and (stray := b"\n".join(self._stray).strip()):
            return outcome.error or _no_stream(stray)
        if self._blanks or self._closings:
            self._settle_blanks()
        if outcome.chunks and not self._reasoned:
            outcome.first_answer = outcome.chunks[0]
        if not outcome.output_tokens and outcome.chunks:
            outcome.output_tokens = -1  # a count of nothing beside output is none
        return outcome.error

    def _settle_blanks(self) -> None:
        """Chunks without text are tokens where the server's count says so: that each chunk was one, or that all were such, or
        that chunks held several, which a closing one is no part of."""
        outcome, blanks = self._outcome, sorted([*self._blanks, *self._closings])
        full, count = len(outcome.chunks), outcome.output_tokens
        if full and count > full + len(blanks):
            blanks = self._blanks
        if count > 0 and (not full or count >= full + len(blanks)):
            outcome.chunks = array("d", sorted([*outcome.chunks, *blanks[: count - full]]))

    def _decode(self, body: bytes, now: float) -> str | None:
        self._now = now
        if self._clean and body.startswith(b"data: "):
            if self._before is _MATCHES_NOTHING and self._adopt(body):
                problem = self.feed(body, now)
                if self._outcome.chunks and self._index < 0 and Reader._known.indexed:
                    self._indices.add(0)
                    self._index = 0
                if self._outcome.chunks and Reader._known.reasoning:
                    self._reasoned = True
                elif self._outcome.chunks:
                    self._outcome.first_answer = now
                return problem
            for blank in _BLANK_LINES:  # one whole event of one line, as most servers send them
                if body.endswith(blank) and body.find(blank[:1]) == len(body) - len(blank):
                    self._first_line, chunks = False, len(self._outcome.chunks)
                    data = body[6 : -len(blank)]
                    event = self._event(data)
                    if len(self._outcome.chunks) == chunks + 1 and not self._outcome.finish_reason:
                        self._learn(event, data, blank)
                    return None
        if self._after_cr:
            body = body.removeprefix(b"\n")
            self._after_cr = False
        if b"\r" in body:
            self._after_cr = body.endswith(b"\r")
            body = body.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *lines, self._tail = (self._tail + body).split(b"\n")
        for line in lines:
            if line:
                self._line(line)
                continue
            self._event(b"\n".join(self._data))
            self._data, self._kind = [], b""
            self._held = self._held if self._stray else 0
        self._clean = not (self._tail or self._data or self._kind or self._after_cr)
        if len(self._tail) + self._held > _MAX_EVENT_BYTES:
            return f"an event of more than {_MAX_EVENT_BYTES >> 20} MiB"
        return None

    def _adopt(self, body: bytes) -> bool:
        """Takes the known pattern for this stream's, with its id, where the first chunk looks so."""
        known, outcome = Reader._known, self._outcome
        if known is None or outcome.chunks or outcome.done_seen or not body.startswith(known.head):
            return False
        end = body.find(b'"', len(known.head))
        name = body[len(known.head) : end].decode("utf-8", "replace")
        if not (
            body.endswith(known.after)
            and body.startswith(known.middle, end)
            and name.isprintable()
            and "\\" not in name
        ):
            return False
        self._first_line = self._no_event = False
        self._stray, self._before, self._after = [], body[: end + len(known.middle)], known.after
        return True

    def _line(self, line: bytes) -> None:
        if self._first_line:
            line, self._first_line = line.removeprefix(_BOM), False
        name, _, value = line.partition(b":")
        if name == b"data":
            self._data.append(value.removeprefix(b" "))
            self._held += len(line)
        elif name == b"event":
            self._kind = value.strip()
        elif name and name not in _FIELDS and self._no_event:
            self._stray.append(line)
            self._held += len(line)

    def _event(self, data: bytes, malformed: str = "malformed chunk") -> dict | None:
        """Reads one event and returns its JSON object, if it is one."""
        outcome, data = self._outcome, data.strip()
        if outcome.done_seen or not (data or self._kind):
            return None
        self._no_event, self._stray = False, []
        if data == b"[DONE]":
            outcome.done_seen = True
            self._before = _MATCHES_NOTHING
            return None
        event = _json(data)
        if self._kind == b"error":
            self._fail(_said(event, data) or "without a word")
        elif type(event) is dict:
            self._read(event, data)
            return event
        elif b"\n" in data:  # not one event of several lines, as it should be, but one a line
            for line in data.split(b"\n"):
                self._event(line, malformed)
        elif data and self._kind in (b"", b"message"):
            outcome.error = outcome.error or f"{malformed}: {_excerpt(data)}"
        return None

    def _read(self, event: dict, data: bytes) -> None:
        choices, usage = event.get("choices"), event.get("usage")
        if type(choices) is list:
            for choice in choices:
                if type(choice) is dict:
                    self._choice(choice)
        elif type(usage) is not dict and _complains(event):
            self._fail(_said(event, data))
        if event.get("error") or event.get("object") == "error":
            self._fail(_said(event, data))
        if type(usage) is dict:
            self._count(usage)

    def _count(self, usage: dict) -> None:
        prompt, output = _whole(usage.get("prompt_tokens")), _whole(usage.get("completion_tokens"))
        details, total = usage.get("completion_tokens_details"), _whole(usage.get("total_tokens"))
        thought = _whole(details.get("reasoning_tokens")) if type(details) is dict else -1
        # Some leave reasoning out of the answer's count, and in the total.
        if prompt >= 0 and total >= prompt and (output < 0 or 0 < thought == total - prompt - output):
            output = total - prompt
        if prompt >= 0:
            self._outcome.prompt_tokens = prompt
        if output >= 0:
            self._outcome.output_tokens = output

    def _choice(self, choice: dict) -> None:
        outcome, said, reason = self._outcome, _output(choice), choice.get("finish_reason")
        answer, reasoning = _first(said, ANSWER), _first(said, REASONING)
        if answer or reasoning:
            self._append(self._now)
        elif reason or (not said.get("role") and "" in (said.get("text"), said.get("content"))):
            (self._closings if reason else self._blanks).append(self._now)
        if reasoning:
            self._reasoned = True
        if answer and not outcome.first_answer:
            outcome.first_answer = self._now
        if reason and not broken(outcome.finish_reason):
            outcome.finish_reason = str(reason)[:_EXCERPT]
        index = choice.get("index")
        if type(index) is int and index != self._index and 0 <= index < _MAX_CHOICES:
            self._indices.add(index)
            outcome.choices, self._index = max(1, len(self._indices)), index

    def _fail(self, words: str) -> None:
        self._outcome.error = self._outcome.error or f"error in the stream: {words[:_MAX_WORDS]}"

    def _learn(self, event: dict | None, data: bytes, blank: bytes) -> None:
        """Takes the chunk that `event` was, all of a body, for the pattern of those that follow, where that is certain:
        with any plain text in place of its own it still says the same."""
        chunks = len(self._outcome.chunks)
        self._patterns = _PATTERNS if chunks > self._pattern_at + 1 else self._patterns - 1
        self._pattern_at = chunks
        if self._patterns < 0 or event is None or event.get("usage") or event.get("error") or len(event["choices"]) > 1:
            return
        choice = event["choices"][0]
        said = _output(choice)
        name = _first(said, ANSWER) or _first(said, REASONING)
        if choice.get("finish_reason") or not isinstance(said[name], str):
            return
        quoted, at = b'"%s"' % said[name].encode(errors="replace"), -1
        said[name] = "x"
        while (at := data.find(quoted, at + 1)) >= 0:
            before, after = data[: at + 1], data[at + len(quoted) - 1 :]
            if _json(before + b"x" + after) == event:
                self._before, self._after = b"data: " + before, after + blank
                alone = sum(bool(said.get(name)) for name in (*ANSWER, *REASONING)) == 1
                if alone and choice.get("index") in (0, None):
                    indexed = type(choice.get("index")) is int
                    self._share(event, before, after, blank, reasoning=name in REASONING, indexed=indexed)
                return

    @staticmethod
    def _share(event: dict, before: bytes, after: bytes, blank: bytes, reasoning: bool, indexed: bool) -> None:
        """Makes a pattern known, where any plain id in place of this one says the same too."""
        name = event.get("id")
        if not isinstance(name, str):
            return
        head, found, middle = before.partition(b'"%s"' % name.encode(errors="replace"))
        event["id"] = "x"
        if found and _json(head + b'"x"' + middle + b"x" + after) == event:
            Reader._known = _Pattern(b'data: %s"' % head, b'"' + middle, after + blank, reasoning, indexed)


def _first(said: dict, names: tuple[str, ...]) -> str:
    """The first of `names` under which `said` holds something; "" for none."""
    for name in names:
        if said.get(name):
            return name
    return ""


def _output(choice: dict) -> dict:
    """Where a choice holds its output: chat's delta, or the choice itself."""
    delta = choice.get("delta")
    return delta if type(delta) is dict else choice


def _json(data: bytes):
    """What `data` holds as the standard library reads it, of invalid UTF-8 and lone surrogates too; None for no JSON."""
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        try:
            return json.loads(data.decode("utf-8", "replace"))
        except (ValueError, RecursionError):
            return None


def _whole(value) -> int:
    """A count of tokens as a server gives it; -1 for what cannot be one."""
    whole = type(value) is int or (type(value) is float and value.is_integer())
    return int(value) if whole and 0 <= value < _MAX_COUNT else -1


def _complains(event: dict) -> bool:
    return any(event.get(name) for name in KEYS)


def _said(event, data: bytes) -> str:
    """The words of an error, of whatever shape; where it has none, all of it as it came."""
    return sentence(event) or data.decode(errors="replace")


def _excerpt(data: bytes) -> str:
    return repr(data[:_EXCERPT].decode(errors="replace"))


def _no_stream(body: bytes) -> str:
    """What a body without a single event is, and what to do about it."""
    document = _json(body)
    if isinstance(document, dict) and isinstance(document.get("choices"), list):
        return (
            f"the server sent the whole completion as one JSON document, not as a stream ({_excerpt(body)}): TTFT and TPOT "
            'are not to be had; does "stream": true reach it, and does it, or a proxy before it, stream?'
        )
    if isinstance(document, dict) and _complains(document):
        return f"the server answered with an error instead of a stream: {_said(document, body)[:_MAX_WORDS]}"
    page = words(body)
    kind = page[:_MAX_WORDS] if page.startswith("a web page") else f"what is no event stream: {_excerpt(body)}"
    return f"the server answered with {kind}; is this the API's address?"
