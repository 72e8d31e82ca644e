"""One HTTP request to a server on this machine, with one deadline for all of it.

HTTP clients count the time of each read: a reply that drips holds them as long as it likes.
"""

import http.client
import io
import json
import socket
import time

from .command import HOST

# A busy API server answers a probe late.
PROBE_S = 4.0
_MAX_REPLY_BYTES = 4 << 20


def ask(port: int, method: str, path: str, *, key: str, within: float, body: dict | None = None) -> tuple[int, str]:
    """(status, text) of the reply; a text beyond 4 MiB is cut there.

    Raises ConnectionRefusedError where nobody listens, another OSError for what is no HTTP reply within `within` seconds.
    """
    deadline = time.monotonic() + within
    content = b"" if body is None else json.dumps(body).encode()
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: {HOST}:{port}\r\nAuthorization: Bearer {key}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    with socket.create_connection((HOST, port), timeout=within) as connection:
        connection.settimeout(_left(deadline))
        connection.sendall(head.encode() + content)
        reply = http.client.HTTPResponse(_Reply(connection, deadline), method=method)
        try:
            reply.begin()
            text = reply.read(_MAX_REPLY_BYTES)
        except http.client.HTTPException as error:
            raise OSError(f"no HTTP reply: {error!r}") from None
        finally:
            reply.close()
    return reply.status, text.decode(errors="replace")


class _Reply(io.RawIOBase):
    """What comes over `connection` until `deadline`, for http.client: each read may take what time is left."""

    def __init__(self, connection: socket.socket, deadline: float):
        self._connection, self._deadline = connection, deadline

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        self._connection.settimeout(_left(self._deadline))
        return self._connection.recv_into(buffer)


def _left(deadline: float) -> float:
    """Seconds until `deadline`; raises TimeoutError when there are none."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("timed out")
    return left
