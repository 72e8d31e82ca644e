"""Everything fp8lab raises on purpose, in one shallow tree.

Fp8labError
├── BadInput          the caller asked for something that cannot be done   (exit code 2)
│   └── RunMismatch   a run folder holds another experiment than the one asked for
├── ServerFailed      a vLLM server did not start, did not get ready, or died
├── LevelFailed       a level could not be measured at all
└── RunDamaged        a run folder has a file that cannot be read

Every message names the offending value, what was expected, and what to do.
"""


class Fp8labError(Exception):
    """Base of all errors that fp8lab raises on purpose."""


class BadInput(Fp8labError, ValueError):
    """An argument, file or environment that cannot work as given."""


class RunMismatch(BadInput):
    """A run folder was opened for another profile than the one it holds."""


class ServerFailed(Fp8labError):
    """A vLLM server failed to start, to become ready, or to stay alive."""


class LevelFailed(Fp8labError):
    """A level ended without anything worth keeping."""


class RunDamaged(Fp8labError):
    """A file inside a run folder is truncated or unreadable."""
