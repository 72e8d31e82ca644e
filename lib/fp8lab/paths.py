"""Where the project's own files are, and where generated ones go."""

import contextlib
import os
import pwd
import re
import shlex
import stat
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from .errors import BadInput, NotWritten

PROJECT = Path(__file__).resolve().parents[2]
DATA = PROJECT / "data"
# The variable names another folder, for a checkout that cannot be written to.
RUNS_VARIABLE = "FP8LAB_RUNS"
RUNS = Path(os.environ.get(RUNS_VARIABLE) or PROJECT / "runs").resolve()
# A name that becomes one folder's: no path, nothing hidden.
PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# Where programs write for a user: in the folder that the variable names, else below the home folder.
_BELOW_HOME = {"XDG_CACHE_HOME": ".cache", "XDG_CONFIG_HOME": ".config", "XDG_DATA_HOME": ".local/share"}
# The cache folder's name where no variable moves it.
_CACHE = "~/.cache/fp8lab"


def cache_dir() -> Path:
    """The folder for things that are built once for a user (model folders, locks)."""
    environment = with_home(os.environ)
    return Path(environment.get("XDG_CACHE_HOME") or f"{environment['HOME']}/.cache") / "fp8lab"


def with_home(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` with a home folder to write to: vLLM, Jupyter and matplotlib keep things there. Where HOME is not set or
    cannot be written to, it is one of this user's in the temporary folder; what XDG_* name in vain is left out. Raises
    BadInput when nothing can be written there either."""
    settled = dict(environment)
    for name in _BELOW_HOME:
        if name in settled and not _writable(settled[name]):
            del settled[name]
    if "HOME" not in settled:
        with contextlib.suppress(KeyError):  # a user that the machine has no name for, as in many containers
            settled["HOME"] = pwd.getpwuid(os.getuid()).pw_dir
    home = settled.get("HOME", "")
    if not all(_writable(settled.get(name) or os.path.join(home, below)) for name, below in _BELOW_HOME.items()):
        settled["HOME"] = _temporary_home()
    return settled


def with_library(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` in which Python finds this very library, and nothing in the folder that it happens to be started in."""
    search = filter(None, (str(PROJECT / "lib"), environment.get("PYTHONPATH")))
    return {**environment, "PYTHONPATH": os.pathsep.join(search), "PYTHONSAFEPATH": "1"}


def _writable(folder: str) -> bool:
    """Whether the folder, made if need be, can be written to."""
    with contextlib.suppress(OSError):
        os.makedirs(folder, exist_ok=True)
        return os.path.isabs(folder) and os.access(folder, os.W_OK | os.X_OK)
    return False


def _temporary_home() -> str:
    try:
        home = os.path.join(tempfile.gettempdir(), f"fp8lab-home-{os.getuid()}")
        with contextlib.suppress(FileExistsError):
            os.mkdir(home, 0o700)
        found = os.lstat(home)
    except OSError as error:
        raise BadInput(
            f"neither the home folder nor the temporary folder can be written to ({error.strerror}); name folders in HOME "
            "and TMPDIR that can"
        ) from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise BadInput(f"{home} is another user's; name a folder in HOME that can be written to")
    return home


def made(folder: Path, remedy: str) -> Path:
    """`folder`, made if need be. Raises BadInput with the `remedy` when nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise BadInput(f"{folder} cannot be written to ({error.strerror or error}); {remedy}") from None


def repository_relative(path: Path) -> str:
    """`path` as it should be shown: relative to the project where it lies inside it."""
    path = Path(path).resolve()
    return str(path.relative_to(PROJECT)) if path.is_relative_to(PROJECT) else str(path)


def in_command(path: Path) -> str:
    """`path`, as `repository_relative`, to be pasted into a shell."""
    return shlex.quote(repository_relative(path))


def portable(argument: str) -> str:
    """A command's argument without this machine's paths: it may be shared."""
    if argument.startswith("{"):  # JSON, with a path anywhere in it
        return nameless(argument)
    return _below(argument, PROJECT, ".") or _below(argument, cache_dir(), _CACHE) or without_home(argument)


def without_home(value):
    """A path, flag or variable, or any nest of them, with ~ for the home folder wherever a path in it begins: it may be shared."""
    return _swapped(value, str(Path(with_home(os.environ)["HOME"])), "~")


def with_homes(value):
    """What `without_home` wrote down, with this user's home folder."""
    return _swapped(value, "~", str(Path(with_home(os.environ)["HOME"])))


def _swapped(value, folder: str, name: str):
    if isinstance(value, str):  # a path may stand behind a flag's "=", among others, or in JSON
        return re.sub(rf'(?<![^=:,"]){re.escape(folder)}(?=[/:,"]|\Z)', lambda _: name, value)
    if isinstance(value, (list, tuple)):
        return type(value)(_swapped(one, folder, name) for one in value)
    return {key: _swapped(one, folder, name) for key, one in value.items()} if isinstance(value, dict) else value


def nameless(text: str) -> str:
    """`text` without where things lie on this machine: a page of it may be shared."""
    named = {str(RUNS): "runs", str(cache_dir()): _CACHE, with_home(os.environ)["HOME"]: "~"}
    named |= {tempfile.gettempdir(): "TMPDIR", sys.prefix: "PYTHON", sys.base_prefix: "PYTHON", str(PROJECT): "."}
    # The innermost first, each only where a path begins and a folder's name ends.
    for folder in sorted(named.keys() - {"/"}, key=len, reverse=True):
        text = re.sub(rf"(?<![\w.~/+-]){re.escape(folder)}(?![\w.+-])", named[folder], text)
    return text


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
            "Make room, or choose another folder, and run the same command again"
        ) from None


def write_text(path: Path, text: str) -> None:
    """Writes `text` beside `path` and renames: a reader sees the whole file or none. Raises NotWritten."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path):
        try:
            with scratch.open("w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            scratch.replace(path)
        finally:
            scratch.unlink(missing_ok=True)
