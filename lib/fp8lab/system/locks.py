"""Locks that die with their holder (flock): none is ever left over, none has to be removed by hand."""

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
import time
from pathlib import Path

from ..errors import InUse, NotWritten
from ..paths import cache_dir

# Where every user may make a file and none may remove another's. The same for all, so not TMPDIR; not /dev/shm, from
# which systemd removes a user's files when they log out.
_SHARED = (Path("/run/lock"), Path("/tmp"))
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
_STICKY_FOR_ALL = stat.S_ISVTX | stat.S_IWOTH


def machine_lock(name: str, what: str) -> "Lock":
    """A lock that is the same for all users of this machine (of one container: each has folders of its own). Where no
    folder is for all, the user's cache folder has it. Raises as `Lock`."""
    for folder in _SHARED:
        with contextlib.suppress(OSError):
            if folder.stat().st_mode & _STICKY_FOR_ALL == _STICKY_FOR_ALL and os.access(folder, os.W_OK):
                return Lock(folder / f"fp8lab-{name}.lock", what, for_all=True)
    return Lock(cache_dir() / "locks" / f"{name}.lock", what)


class Lock:
    """Holds `path` locked, from its making until `release()`, or the end of a `with` block.

    It lasts as long as any process has `fd` open: hand it to a child (`pass_fds`) and it outlives this process
    until the child ends too. Raises InUse, with who holds it, when another process does; NotWritten when the
    file cannot be made. With `for_all` its folder is one that all users write to.
    """

    def __init__(self, path: Path, what: str, *, for_all: bool = False):
        try:
            self.fd = _open_for_all(path) if for_all else _open(path)
        except OSError as error:
            raise NotWritten(f"{what} cannot be locked: {path}: {error.strerror}") from None
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS and not for_all:
                # A network's file system without locks: one of this machine guards the file among its processes.
                os.close(self.fd)
                self.fd = machine_lock(hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16], what).fd
                return
            if not isinstance(error, BlockingIOError):
                os.close(self.fd)
                raise NotWritten(f"{what} cannot be locked: {path}: {error.strerror}") from None
            holder = os.pread(self.fd, 100, 0).decode(errors="replace").strip()
            os.close(self.fd)
            raise InUse(f"{what} is in use by {holder or 'another process'}; wait for it to end, or end it") from None
        with contextlib.suppress(OSError):  # a full disk: the lock holds, only who holds it stays unsaid
            os.ftruncate(self.fd, 0)
            os.pwrite(self.fd, f"pid {os.getpid()}\n".encode(), 0)

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_exc) -> None:
        self.release()

    def release(self) -> None:
        """May be called twice. The file stays: removing it would let two processes hold two locks of one name."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _open(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)


def _open_for_all(path: Path) -> int:
    """Opens a file that any user may have made, and makes it for any user; a link or a pipe in its place is refused."""
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        fd = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o666)
        os.fchmod(fd, 0o666)  # whatever the umask
    except FileExistsError:
        # Without O_CREAT, which Linux refuses for another user's file in such a folder (fs.protected_regular).
        fd = os.open(path, flags)
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
        os.close(fd)
        raise OSError(errno.EPERM, "not a plain file; remove it")
    return fd


_PREFIX, _SHORT = "fp8lab-scratch-", "/tmp"
# A folder is locked a moment after it is made.
_YOUNG_S = 60.0
# A socket's path has at most 107 bytes (sun_path in unix(7)); vLLM names its sockets by 36 characters.
_LONGEST_FOR_SOCKETS = 107 - len("/") - 36


class Scratch:
    """A folder that is locked (flock) as long as any process has `fd` open: hand it to a watchdog (`pass_fds`). In a `with`
    block its path. Making one removes those that were left over. One `for_sockets` of vLLM has a short path: where TMPDIR is
    a long one it lies in /tmp. Raises NotWritten when none can be made."""

    def __init__(self, *, for_sockets: bool = False):
        try:
            sweep()
            self.path = tempfile.mkdtemp(prefix=_PREFIX)
            if for_sockets and len(os.fsencode(self.path)) > _LONGEST_FOR_SOCKETS:
                os.rmdir(self.path)
                self.path = tempfile.mkdtemp(prefix=_PREFIX, dir=_SHORT)
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
    for path in (path for folder in {tempfile.gettempdir(), _SHORT} for path in Path(folder).glob(f"{_PREFIX}*")):
        with contextlib.suppress(OSError):  # another user's, a link, in use, or gone meanwhile
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                found = os.fstat(fd)
                if found.st_uid == os.getuid() and time.time() - found.st_mtime > _YOUNG_S:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(fd)
