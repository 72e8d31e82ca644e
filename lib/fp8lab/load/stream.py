"""One streamed completion over one kept-alive HTTP connection, timestamped as its bytes arrive.

What a stream says, event by event (`data:` lines up to a blank line, of any line ending; comments and other fields are
skipped). `load.events` reads it so, and `tests/slow_stream.py` once more, slowly, for the tests.

| what arrives | what it is |
|---|---|
| a choice with a non-empty text, content, refusal, tool call, function call or audio | output, and an answer |
| a choice with non-empty reasoning (`reasoning_content`, `reasoning`, `reasoning_details`, `thinking`) | output |
| a choice whose text or content is "", without a role; a closing one without output | a token without text where the \
server's count says that each chunk was one token, or where no chunk had text; else nothing |
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
"""

import asyncio
import re
from time import monotonic
from urllib.parse import urljoin, urlsplit, urlunsplit

import httptools

from .events import Outcome, Reader
from .refusal import words

_MAX_ERROR_BYTES = 2000
_MAX_NAME = 80
_HEADERS = {b"content-length", b"transfer-encoding", b"location", b"content-encoding", b"keep-alive"}
# A refusal may repeat the whole prompt before, or after, it says what is wrong with it.
_MAX_REFUSAL_BYTES = 1 << 18
# uvicorn closes a connection that was idle for 5 s; one that might be closing is not used again. A server that says when
# (the header Keep-Alive) is taken at its word, with the same margin.
_MAX_IDLE_S = 4.0
_IDLE_SHARE = 0.8
_KEEP_ALIVE = re.compile(rb"timeout\s*=\s*(\d{1,6})", re.IGNORECASE)


class Connection(asyncio.Protocol):
    """A kept-alive connection that carries one stream at a time; reports each end to `on_end`. `url` is what is asked for,
    `clock` gives the time in s."""

    def __init__(self, on_end, url: str, clock=monotonic):
        self._on_end, self._url, self._clock = on_end, url, clock
        self._transport = None
        self._parser = None
        self._request = b""
        self._tail = b""
        self._reader: Reader | None = None
        self._framed, self._location, self._encoding = False, "", ""
        self._status = 0
        self._now = 0.0
        self._fresh, self._stale = True, False
        self._max_idle_s = _MAX_IDLE_S
        self.outcome: Outcome | None = None
        self.last_bytes = 0.0

    @property
    def usable(self) -> bool:
        """Whether another request may go out on this connection now."""
        idle = 0.0 if self._fresh else self._clock() - self.last_bytes
        return self._transport is not None and not self._transport.is_closing() and idle < self._max_idle_s

    def send(self, request: bytes, outcome: Outcome, stale: bool) -> None:
        """Writes `request`; `outcome` takes what comes back. A connection that waited (`stale`) may be closed by the server
        just as it is used: that is no failure, the request is handed back."""
        self.outcome, self._request, self._stale = outcome, request, stale
        self._tail, self._status, self._reader = b"", 0, None
        self.last_bytes = outcome.sent = outcome.sent or self._clock()
        self._transport.write(request)

    def close(self) -> None:
        if self._transport:
            self._transport.close()

    def fail(self, reason: str) -> None:
        """Ends the running stream as failed and closes the connection."""
        outcome, self.outcome = self.outcome, None
        self.close()
        if outcome:
            self._break_off(outcome, reason)
            self._on_end(self, outcome, None)

    def _break_off(self, outcome: Outcome, reason: str) -> None:
        """The body does not end; that is no failure where the stream in it has."""
        ended = self._reader.end() if self._reader and outcome.done_seen else reason
        outcome.error, self._reader = outcome.error or ended, None

    # asyncio.Protocol

    def connection_made(self, transport) -> None:
        self._transport = transport
        self._parser = httptools.HttpResponseParser(self)

    def data_received(self, data: bytes) -> None:
        self._now = self.last_bytes = self._clock()
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
            self._break_off(outcome, f"connection closed by the server after {got}{f' ({error})' if error else ''}")
        self._on_end(self, outcome, self._request if unused else None)

    # httptools callbacks

    def on_message_begin(self) -> None:
        self._framed, self._location, self._encoding = False, "", ""

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name not in _HEADERS:
            return
        if name == b"content-length" or (name == b"transfer-encoding" and b"chunked" in value.lower()):
            self._framed = True
        elif name == b"location":
            self._location = value.decode(errors="replace")
        elif name == b"content-encoding":
            self._encoding = value.decode(errors="replace")[:_MAX_NAME]
        elif name == b"keep-alive" and (seconds := _KEEP_ALIVE.search(value)):
            self._max_idle_s = min(_MAX_IDLE_S, _IDLE_SHARE * int(seconds[1]))

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()
        compressed = self._encoding.lower() not in ("", "identity")
        if self.outcome and self._status == 200 and not compressed:
            self._reader = Reader(self.outcome)

    def on_body(self, body: bytes) -> None:
        if self._reader:
            if problem := self._reader.feed(body, self._now):
                self.fail(problem)
        elif len(self._tail) < _MAX_REFUSAL_BYTES:
            self._tail += body[:_MAX_REFUSAL_BYTES]

    def on_message_complete(self) -> None:
        if 100 <= self._status < 200 and self._status != 101:
            return  # an interim answer (100 Continue, 103 Early Hints): the answer follows
        outcome, self.outcome = self.outcome, None
        if outcome is None:
            return
        if self._reader:
            outcome.error = self._reader.end()
        elif self._status == 200:
            outcome.error = (
                f"the answer is compressed ({self._encoding}), though that was not asked for, and compressed streams are "
                "not timed; switch compression off in the server or the proxy before it (nginx: gzip off)"
            )
        elif self._location and 300 <= self._status < 400:
            where = target(self._url, self._location)
            outcome.error = f"HTTP {self._status}: the server redirects to {where}; give that as --base-url"
        else:
            outcome.error = f"HTTP {self._status}: {words(self._tail)[:_MAX_ERROR_BYTES]}"
        self._fresh = False
        if self._parser is None or not self._parser.should_keep_alive():
            self.close()
        self._on_end(self, outcome, None)


def target(url: str, location: str) -> str:
    """Where `url` redirects to, without what may hold a secret: user, password, query and fragment."""
    try:
        parts = urlsplit(urljoin(url, location))
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))[:_MAX_ERROR_BYTES]
    except ValueError:
        return "what is no URL"
