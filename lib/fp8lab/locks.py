"""Locks that die with their holder (flock): none is ever left over, none has to be removed by hand."""

import contextlib
import fcntl
import os
from pathlib import Path

from .errors import InUse, NotWritten


class Lock:
    """Holds `path` locked, from its making until `release()`.

    It lasts as long as any process has `fd` open: hand it to a child (`pass_fds`) and it outlives this process
    until the child ends too. Raises InUse, with who holds it, when another process does; NotWritten when the
    file cannot be made.
    """

    def __init__(self, path: Path, what: str):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise NotWritten(f"{what} cannot be locked: {path}: {error.strerror}") from None
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self.fd, 100, 0).decode(errors="replace").strip()
            os.close(self.fd)
            raise InUse(f"{what} is in use by {holder or 'another process'}; wait for it to end, or end it") from None
        with contextlib.suppress(OSError):  # a full disk: the lock holds, only who holds it stays unsaid
            os.ftruncate(self.fd, 0)
            os.pwrite(self.fd, f"pid {os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """May be called twice. The file stays: removing it would let two processes hold two locks of one name."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
