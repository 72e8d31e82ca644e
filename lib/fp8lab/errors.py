"""Everything fp8lab raises on purpose, in one shallow tree.

Fp8labError
├── BadInput          the caller asked for something that cannot be done   (exit code 2)
│   ├── RunMismatch   a run folder holds another experiment than the one asked for
│   └── InUse         another process holds the run folder, the port or the GPU
├── ServerFailed      a vLLM server did not start, did not get ready, or died
├── LevelFailed       a level could not be measured at all
├── RunDamaged        a run folder has a file that cannot be read
└── NotWritten        a file could not be written: full disk, read-only folder

Beside it stands Stopped, a KeyboardInterrupt: Ctrl-C, or a notebook's stop button, in a start or a level.

Every message names the offending value, what was expected, and what to do.
"""

from .ui.text import visible

# The exit code where a level is INVALID: all else was measured and printed.
INVALID = 3


class Fp8labError(Exception):
    """Base of all errors that fp8lab raises on purpose. Its message may quote foreign text: that is made visible."""

    def __init__(self, message: str = ""):
        super().__init__(visible(message))

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows: one message, as in a terminal."""
        return [f"{type(self).__name__}: {self}"]


class BadInput(Fp8labError, ValueError):
    """An argument, file or environment that cannot work as given."""


class RunMismatch(BadInput):
    """A run folder was opened for another profile than the one it holds."""


class InUse(BadInput):
    """A run folder, port or GPU that another process holds."""


class ServerFailed(Fp8labError):
    """A vLLM server failed to start, to become ready, or to stay alive."""


class LevelFailed(Fp8labError):
    """A level ended without anything worth keeping."""


class RunDamaged(Fp8labError):
    """A file inside a run folder is truncated or unreadable."""


class NotWritten(Fp8labError):
    """A file of a run could not be written."""


class Stopped(KeyboardInterrupt):
    """A start or a level that its user stopped. A notebook shows it as one line: nothing failed."""

    def _render_traceback_(self) -> list[str]:
        return [f"Stopped: {self}"]
