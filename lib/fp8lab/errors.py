"""Everything fp8lab raises on purpose, in one shallow tree. Every message names the offending value, what was expected, and
what to do."""

from .ui import visible

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
    """An argument, file or environment that cannot work as given (exit code 2)."""


class RunMismatch(BadInput):
    """A run folder was opened for another profile than the one it holds."""


class InUse(BadInput):
    """A run folder, port or GPU that another process holds."""


class ServerFailed(Fp8labError):
    """A vLLM server failed to start, to become ready, or to stay alive."""


class LevelFailed(Fp8labError):
    """A level could not be measured at all: nothing of it is worth keeping."""


class RunDamaged(Fp8labError):
    """A file inside a run folder is truncated or unreadable."""


class NotWritten(Fp8labError):
    """A file could not be written: a full disk, a read-only folder."""


class Stopped(KeyboardInterrupt):
    """A start or a level that its user stopped, by Ctrl-C or a notebook's button. A notebook shows one line: nothing failed."""

    def _render_traceback_(self) -> list[str]:
        return [f"Stopped: {self}"]
