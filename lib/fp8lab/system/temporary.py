"""A temporary folder for a server's sockets or a load's spools, and the removal of those that nobody could remove."""

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path

from ..errors import NotWritten

_PREFIX = "fp8lab-scratch-"
# A folder is locked a moment after it is made.
_YOUNG_S = 60.0


class Scratch:
    """A folder that is locked (flock) as long as any process has `fd` open: hand it to a watchdog (`pass_fds`). In a `with`
    block its path. Making one removes those that were left over. Raises NotWritten when none can be made."""

    def __init__(self):
        try:
            sweep()
            self.path = tempfile.mkdtemp(prefix=_PREFIX)
            self.fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            why = f"no temporary folder can be made ({error.strerror})"
            raise NotWritten(f"{why}; make room, or name another folder in TMPDIR") from None

    def __enter__(self) -> str:
        return self.path

    def __exit__(self, *_exc) -> None:
        self.remove()

    def remove(self) -> None:
        """May be called twice."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def sweep() -> None:
    """Removes this user's folders that no process holds: their owner was killed, and its watchdog too if it had one."""
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # another user's, a link, in use, or gone meanwhile
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                found = os.fstat(fd)
                if found.st_uid == os.getuid() and time.time() - found.st_mtime > _YOUNG_S:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(fd)
