"""How connections to an endpoint are made: to which address, through TLS or not, and how many may be open at once."""

import asyncio
import bisect
import contextlib
import errno
import math
import resource
import socket
import ssl
from collections.abc import Sequence
from typing import NamedTuple
from urllib.parse import urlsplit

from ..errors import BadInput
from .endpoint import Endpoint
from .stream import Connection

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


class Address(NamedTuple):
    """A numeric IP address and a port; `of` is how many addresses the endpoint's host has."""

    host: str
    port: int
    of: int


def find_address(endpoint: Endpoint) -> Address:
    """The address that a level goes to: the first of the host's that accepts a connection, or the first where none does.

    A host with one address is not asked. Raises BadInput for an unknown host.
    """
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
        """A new connection, its TLS handshake done. Raises OSError, also when the server does not accept in time: a full
        queue of it leaves one waiting."""
        async with asyncio.timeout(within_s if math.isfinite(within_s) else None):
            _, connection = await asyncio.get_running_loop().create_connection(self._make, *self._address, **self._tls)
        return connection


def said(error: OSError) -> str:
    """What is to be said of a connection that could not be made; empty for one that took too long."""
    return f"{error.strerror or error}{_REMEDIES.get(error.errno, '')}"


def opened_ahead(due_s: Sequence[float], first_s: float, cap: int | None, asked: int | None) -> int:
    """How many connections a worker opens before the start: as many as it may need in the level's first second, or as
    `asked`.

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
