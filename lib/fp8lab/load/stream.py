"""One streamed completion over one kept-alive HTTP connection, timestamped as its bytes arrive.

The hot path is a chunk that carries nothing but tokens: it is recognised by two byte searches and costs
one timestamp, no JSON. Everything else (finish, usage, errors, oddities) is decoded.

Definitions follow vllm/benchmarks/lib/endpoint_request_func.py: the first token is the first chunk with
`choices`, the last token the last such chunk, the request starts just before it is written.
"""

import asyncio
import re
from array import array
from dataclasses import dataclass, field
from time import monotonic
from urllib.parse import urljoin, urlsplit, urlunsplit

import httptools
import orjson

from .refusal import words

_ORDINARY = b'"finish_reason":null'
_MAX_EVENT_BYTES = 1 << 20
_MAX_ERROR_BYTES = 2000
# A refusal may repeat the whole prompt before, or after, it says what is wrong with it.
_MAX_REFUSAL_BYTES = 1 << 18
_MAX_COUNT = 1 << 31
# uvicorn closes a connection that was idle for 5 s; one that might be closing is not used again. A server that says when
# (the header Keep-Alive) is taken at its word, with the same margin.
_MAX_IDLE_S = 4.0
_IDLE_SHARE = 0.8
_KEEP_ALIVE = re.compile(rb"timeout\s*=\s*(\d{1,6})", re.IGNORECASE)


@dataclass(slots=True)
class Outcome:
    """One request as the client saw it. Times are CLOCK_MONOTONIC seconds; 0.0 is "never".

    `slot` is when the slot that it took in a closed loop had become free (0.0: it always was). `chunks` holds the
    arrival time of every chunk with tokens; `output_tokens` and `prompt_tokens` are the server's own count (-1 if it
    gave none); `error` is None or one sentence.
    """

    index: int
    asked_tokens: int
    sent: float = 0.0
    slot: float = 0.0
    chunks: array = field(default_factory=lambda: array("d"))
    prompt_tokens: int = -1
    output_tokens: int = -1
    finish_reason: str | None = None
    error: str | None = None
    done_seen: bool = False

    def verdict(self, exact_tokens: bool) -> str | None:
        """The reason why this stream does not count as completed, or None."""
        if self.error:
            return self.error
        if not self.chunks:
            return "the response ended without a token"
        if not self.done_seen:
            return f"the stream ended without [DONE] after {len(self.chunks)} chunks"
        if self.finish_reason is None:
            return "the stream ended without a finish reason"
        if exact_tokens and self.output_tokens not in (-1, self.asked_tokens):
            return f"{self.output_tokens} output tokens instead of the {self.asked_tokens} asked for"
        return None


class Connection(asyncio.Protocol):
    """A kept-alive connection that carries one stream at a time; reports each end to `on_end`. `url` is what is asked for."""

    def __init__(self, on_end, url: str):
        self._on_end, self._url = on_end, url
        self._transport = None
        self._parser = None
        self._request = b""
        self._tail = b""
        self._status = 0
        self._now = 0.0
        self._fresh, self._stale = True, False
        self._max_idle_s = _MAX_IDLE_S
        self._framed, self._location = False, ""
        self.outcome: Outcome | None = None
        self.last_bytes = 0.0

    @property
    def usable(self) -> bool:
        """Whether another request may go out on this connection now."""
        idle = 0.0 if self._fresh else monotonic() - self.last_bytes
        return self._transport is not None and not self._transport.is_closing() and idle < self._max_idle_s

    def send(self, request: bytes, outcome: Outcome, stale: bool) -> None:
        """Writes `request`; `outcome` takes what comes back. A connection that waited (`stale`) may be closed by the server
        just as it is used: that is no failure, the request is handed back."""
        self.outcome, self._request, self._stale = outcome, request, stale
        self._tail, self._status = b"", 0
        self.last_bytes = outcome.sent = outcome.sent or monotonic()
        self._transport.write(request)

    def close(self) -> None:
        if self._transport:
            self._transport.close()

    def fail(self, reason: str) -> None:
        """Ends the running stream as failed and closes the connection."""
        outcome, self.outcome = self.outcome, None
        self.close()
        if outcome:
            outcome.error = outcome.error or reason
            self._on_end(self, outcome, None)

    # asyncio.Protocol

    def connection_made(self, transport) -> None:
        self._transport = transport
        self._parser = httptools.HttpResponseParser(self)

    def data_received(self, data: bytes) -> None:
        self._now = self.last_bytes = monotonic()
        if self.outcome is None:
            return self.close()  # bytes that nobody asked for
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self.fail(f"not HTTP: {error}")

    def connection_lost(self, error) -> None:
        self._transport = None
        if error is None and self._status >= 200 and not self._framed:
            self.on_message_complete()  # a body without a length ends where its connection does
        outcome, self.outcome = self.outcome, None
        self._parser = None
        if outcome is None:
            return
        unused = self._stale and self._status == 0
        if not unused:
            got = f"{len(outcome.chunks)} chunks" if outcome.chunks else "no token"
            outcome.error = (
                outcome.error or f"connection closed by the server after {got}{f' ({error})' if error else ''}"
            )
        self._on_end(self, outcome, self._request if unused else None)

    # httptools callbacks

    def on_message_begin(self) -> None:
        self._framed, self._location = False, ""

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name == b"content-length" or (name == b"transfer-encoding" and b"chunked" in value.lower()):
            self._framed = True
        elif name == b"location":
            self._location = value.decode(errors="replace")
        elif name == b"keep-alive" and (seconds := _KEEP_ALIVE.search(value)):
            self._max_idle_s = min(_MAX_IDLE_S, _IDLE_SHARE * int(seconds[1]))

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        if (
            _ORDINARY in body
            and not self._tail
            and body.startswith(b"data: {")
            and body.find(b"}\n\n") == len(body) - 3
            and (self.outcome.chunks or not self._first_needs_decoding)
        ):
            self.outcome.chunks.append(self._now)
            return
        self._slow_body(body)

    def on_message_complete(self) -> None:
        if 100 <= self._status < 200 and self._status != 101:
            return  # an interim answer (100 Continue, 103 Early Hints): the answer follows
        outcome, self.outcome = self.outcome, None
        if outcome is None:
            return
        if self._location and 300 <= self._status < 400:
            outcome.error = f"HTTP {self._status}: the server redirects to {target(self._url, self._location)}; give that as --base-url"
        elif self._status != 200:
            outcome.error = f"HTTP {self._status}: {words(self._tail)[:_MAX_ERROR_BYTES]}"
        elif self._tail.strip():
            outcome.error = outcome.error or f"the stream ended inside an event: {self._tail[:80]!r}"
        self._fresh = False
        if not self._parser.should_keep_alive():
            self.close()
        self._on_end(self, outcome, None)

    _first_needs_decoding = False

    def _slow_body(self, body: bytes) -> None:
        self._tail += body
        if self._status != 200:
            self._tail = self._tail[:_MAX_REFUSAL_BYTES]
            return
        if b"\r" in self._tail:
            self._tail = self._tail.replace(b"\r\n", b"\n")
        *events, self._tail = self._tail.split(b"\n\n")
        for event in events:
            for line in event.split(b"\n"):
                if line.startswith(b"data:"):
                    self._event(line[5:].strip())
        if len(self._tail) > _MAX_EVENT_BYTES:
            self.fail(f"an event of more than {_MAX_EVENT_BYTES >> 20} MiB")

    def _event(self, data: bytes) -> None:
        outcome = self.outcome
        if outcome is None:
            return
        if data == b"[DONE]":
            outcome.done_seen = True
            return
        try:
            event = orjson.loads(data)
            if error := event.get("error"):
                message = error.get("message", error) if isinstance(error, dict) else error
                outcome.error = outcome.error or f"error in the stream: {str(message)[:_MAX_ERROR_BYTES]}"
                return
            for choice in event.get("choices") or ():
                if reason := choice.get("finish_reason"):
                    outcome.finish_reason = str(reason)[:80]
                if "delta" in choice and not (choice["delta"].get("content") or choice.get("finish_reason")):
                    continue  # chat's opening chunk names a role and carries no token
                outcome.chunks.append(self._now)
            if usage := event.get("usage"):
                outcome.output_tokens = _count(usage["completion_tokens"])
                outcome.prompt_tokens = _count(usage["prompt_tokens"])
        except (orjson.JSONDecodeError, AttributeError, KeyError, TypeError, ValueError) as problem:
            outcome.error = outcome.error or f"malformed chunk ({type(problem).__name__}): {data[:80]!r}"


def _count(value) -> int:
    """A count of tokens as a server gives it. Raises ValueError for what cannot be one."""
    if type(value) is not int or not 0 <= value < _MAX_COUNT:
        raise ValueError(value)
    return value


class ChatConnection(Connection):
    """Chat streams open with a chunk that carries a role and no token: the first is looked into."""

    _first_needs_decoding = True


def target(url: str, location: str) -> str:
    """Where `url` redirects to, without what may hold a secret: user, password, query and fragment."""
    try:
        parts = urlsplit(urljoin(url, location))
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))[:_MAX_ERROR_BYTES]
    except ValueError:
        return "what is no URL"
