"""One kept-alive HTTP connection that carries streams, timestamped as their bytes arrive; how it is made: to which
address, through TLS or not, and how many may be open at once."""

import asyncio
import bisect
import contextlib
import errno
import math
import re
import resource
import socket
import ssl
from collections.abc import Sequence
from time import monotonic
from typing import NamedTuple
from urllib.parse import urljoin, urlsplit, urlunsplit

import httptools

from ..errors import BadInput
from .endpoint import Endpoint, words
from .events import Outcome, Reader

_MAX_ERROR_BYTES = 2000
_MAX_NAME = 80
_MAX_HEAD_BYTES = 1 << 20
_BLANK_LINE = b"\r\n\r\n"
_UNUSUAL = re.compile(rb"\n(?:content-encoding|keep-alive):", re.IGNORECASE)
# A refusal may repeat the whole prompt before, or after, it says what is wrong with it.
_MAX_REFUSAL_BYTES = 1 << 18
# uvicorn closes a connection that was idle for 5 s; one that might be closing is not used again. A server that says when
# (the header Keep-Alive) is taken at its word, with the same margin.
_MAX_IDLE_S = 4.0
_IDLE_SHARE = 0.8
_KEEP_ALIVE = re.compile(r"timeout\s*=\s*(\d{1,6})", re.IGNORECASE)

# Where a host has several addresses, one that does not accept within this is passed over. TCP asks again after 1 s.
_PROBE_S = 2.5
# A worker's own: its pipes, its spool, what the event loop holds.
_OWN_FILES = 32
# Within this no answer has ended: what is due together is in flight together.
_TOGETHER_S = 0.05
_AHEAD_S = 1.0
_REMEDIES = {
    errno.EMFILE: "; raise the limit on open files (`ulimit -n`), or have fewer at once (--max-concurrency)",
    errno.EADDRNOTAVAIL: "; every local port leads there already: have fewer at once (--max-concurrency)",
}


class Connection(asyncio.Protocol):
    """Carries one stream at a time, reports each end to `on_end`. `url` is what is asked, `clock` the time in s."""

    def __init__(self, on_end, url: str, clock=monotonic):
        self._on_end, self._url, self._clock = on_end, url, clock
        self._transport = None
        self._parser = None
        self._request = b""
        self._tail = b""
        self._reader: Reader | None = None
        self._head = b""
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
        self._head = self._tail = b""
        self._status, self._reader = 0, None
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
        if not self._status:
            self._head += data
            if len(self._head) > _MAX_HEAD_BYTES:
                return self.fail(f"not HTTP: more than {_MAX_HEAD_BYTES >> 20} MiB without an end of the headers")
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self.fail(f"not HTTP: {error}")

    def connection_lost(self, error) -> None:
        self._transport = None
        if error is None and self._status >= 200 and not self._framed():
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

    # No on_header: a call of it for each header cost as much as ten chunks.

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()
        compressed = False
        if _UNUSUAL.search(self._head):
            codings = self._header("content-encoding").lower().split(",")
            compressed = any(coding.strip() not in ("", "identity") for coding in codings)
            if seconds := _KEEP_ALIVE.search(self._header("keep-alive")):
                self._max_idle_s = min(_MAX_IDLE_S, _IDLE_SHARE * int(seconds[1]))
        if self.outcome and self._status == 200 and not compressed:
            self._reader = Reader(self.outcome)

    def _header(self, name: str) -> str:
        """A header of the answer, one that is repeated with commas between; "" where it has none."""
        head = self._head.lstrip(b"\r\n").partition(_BLANK_LINE)[0].decode(errors="replace")
        return ", ".join(value.strip() for value in re.findall(rf"(?im)^{name}:(.*)$", head))

    def _framed(self) -> bool:
        """Whether the answer says where it ends."""
        return bool(self._header("content-length")) or "chunked" in self._header("transfer-encoding").lower()

    def on_body(self, body: bytes) -> None:
        if self._reader:
            if problem := self._reader.feed(body, self._now):
                self.fail(problem)
        elif len(self._tail) < _MAX_REFUSAL_BYTES:
            self._tail += body[:_MAX_REFUSAL_BYTES]

    def on_message_complete(self) -> None:
        if 100 <= self._status < 200 and self._status != 101:
            # An interim answer (100 Continue, 103 Early Hints): the answer follows.
            self._status, self._head = 0, self._head.lstrip(b"\r\n").partition(_BLANK_LINE)[2]
            self._stale = False  # the server has begun to answer
            return
        outcome, self.outcome = self.outcome, None
        if outcome is None:
            return
        if self._reader:
            outcome.error = self._reader.end()
        elif self._status == 200:
            outcome.error = (
                f"the answer is compressed ({self._header('content-encoding')[:_MAX_NAME]}), though that was not asked for, and compressed streams are "
                "not timed; switch compression off in the server or the proxy before it (nginx: gzip off)"
            )
        elif 300 <= self._status < 400 and (location := self._header("location")):
            where = target(self._url, location)
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


class Address(NamedTuple):
    """A numeric IP address and a port; `of` is how many addresses the endpoint's host has."""

    host: str
    port: int
    of: int


def find_address(endpoint: Endpoint) -> Address:
    """The address that a level goes to: the first of the host's that accepts a connection, or the first where none
    does. One alone is not asked. Raises BadInput for an unknown host."""
    url = urlsplit(endpoint.base_url)
    port = url.port or (443 if url.scheme == "https" else 80)
    host = url.hostname.replace("%25", "%")  # an IPv6 scope, as URLs write it
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        numeric = socket.NI_NUMERICHOST | socket.NI_NUMERICSERV
        # By name information, because a link-local address is one only with its scope.
        hosts = list(dict.fromkeys(socket.getnameinfo(entry[4], numeric)[0] for entry in found))
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or "not a host name"
        raise BadInput(f"no host {host!r} (from base URL {endpoint.base_url!r}): {why}") from None
    accepting = (one for one in hosts if len(hosts) == 1 or _accepts(one, port))
    return Address(next(accepting, hosts[0]), port, len(hosts))


def _accepts(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=_PROBE_S).close()
    except OSError:
        return False
    return True


def tls_context(insecure: bool) -> ssl.SSLContext:
    """Checks the server's certificate against this machine's trust store (SSL_CERT_FILE adds to it), or takes any."""
    context = ssl.create_default_context()
    if insecure:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


class Connector:
    """Makes a worker's connections. Loading a trust store takes tens of milliseconds: it is done once, here."""

    def __init__(self, endpoint: Endpoint, address: Address, on_end):
        url = urlsplit(endpoint.base_url)
        self._make = lambda: Connection(on_end, endpoint.url)
        self._address = address[:2]
        self._tls = {}
        if url.scheme == "https":
            name = url.hostname.partition("%")[0].rstrip(".")
            self._tls = {"ssl": tls_context(endpoint.insecure), "server_hostname": name}

    async def connect(self, within_s: float) -> Connection:
        """A new connection, its TLS handshake done. Raises OSError, also when a full server does not accept in time."""
        async with asyncio.timeout(within_s if math.isfinite(within_s) else None):
            _, connection = await asyncio.get_running_loop().create_connection(self._make, *self._address, **self._tls)
        return connection


def said(error: OSError) -> str:
    """What is to be said of a connection that could not be made; empty for one that took too long."""
    return f"{error.strerror or error}{_REMEDIES.get(error.errno, '')}"


def opened_ahead(due_s: Sequence[float], first_s: float, cap: int | None, asked: int | None) -> int:
    """How many connections a worker opens before the start: as `asked`, or what the level's first second may need.

    `due_s` are its arrival times in wall seconds, ascending, `first_s` the level's first; `cap` are its slots of a closed loop.
    Raises BadInput where the limit on open files leaves too few for them or for what is due at one time.
    """
    most = min(len(due_s), cap or len(due_s))
    ahead = min(most, bisect.bisect_left(due_s, first_s + _AHEAD_S) if asked is None else asked)
    together = max(bisect.bisect_left(due_s, due + _TOGETHER_S) - number for number, due in enumerate(due_s))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = most if hard == resource.RLIM_INFINITY else hard - _OWN_FILES
    if (need := max(min(most, together), ahead if asked is not None else 0)) > limit:
        raise BadInput(
            f"{need} connections at once are more than a load worker may have: its limit is {hard} open files, and {_OWN_FILES} "
            "are its own; raise the hard limit (`ulimit -n`), have fewer at once (--max-concurrency), or share them out (--workers)"
        )
    return min(ahead, limit)


def raise_open_files() -> None:
    """Raises this process's soft limit on open files, often 1,024, to the hard one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
