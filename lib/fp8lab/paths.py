"""Where the project's own files are, and where generated ones go."""

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from .errors import NotWritten

PROJECT = Path(__file__).resolve().parents[2]
DATA = PROJECT / "data"
RUNS = PROJECT / "runs"
# A name that becomes one folder's: no path, nothing hidden.
PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def cache_dir() -> Path:
    """The folder for things that are built once for a user (model folders, locks)."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fp8lab"


def repository_relative(path: Path) -> str:
    """`path` as it should be shown: relative to the project where it lies inside it."""
    path = Path(path).resolve()
    return str(path.relative_to(PROJECT)) if path.is_relative_to(PROJECT) else str(path)


def portable(argument: str) -> str:
    """A command's argument without this machine's paths: it may be shared."""
    if argument == sys.executable:
        return "python3"
    inside = _below(argument, PROJECT, ".")
    return without_home(argument) if inside is None else inside


def without_home(path: str) -> str:
    """`path` with ~ for the home folder it lies in, and still the same path wherever it is read: it may be shared."""
    inside = _below(path, Path.home(), "~")
    return path if inside is None else inside


def _below(path: str, folder: Path, name: str) -> str | None:
    """`path` with `name` for `folder`; None when it does not lie in it."""
    if not Path(path).is_relative_to(folder):
        return None
    return "/".join((name, *Path(path).relative_to(folder).parts))


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an OSError of writing `path` into NotWritten, which says what to do."""
    try:
        yield
    except OSError as error:
        raise NotWritten(
            f"{path} cannot be written: {error.strerror or error}; what was complete before is untouched. "
            "Make room (or choose another --run folder) and run the same command again"
        ) from None
