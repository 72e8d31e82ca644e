"""Where the project's own files are, and where generated ones go."""

import os
import re
from pathlib import Path

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
