"""A process that ends with this one: started under a watchdog, its log without the secrets that it was given."""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..private import secrets_of
from . import watchdog


def popen(
    command: Sequence[str],
    environment: Mapping[str, str],
    log: Path,
    *,
    grace_s: float,
    options: Sequence[str] = (),
    held: Sequence[int] = (),
) -> subprocess.Popen:
    """The watchdog of `command`, which writes to `log`. Closing its standard input ends both; what it says, `watchdog`
    tells. `options` are the watchdog's own; the file descriptors `held` stay open until all has ended."""
    guard = [sys.executable, watchdog.__file__, "--log", str(log), "--grace", str(grace_s), *options]
    guard += [part for name in secrets_of(environment) for part in ("--secret", name)]
    return subprocess.Popen(
        [*guard, "--", *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=dict(environment),
        start_new_session=True,
        pass_fds=held,
    )
