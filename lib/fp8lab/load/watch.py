"""Asks a server once a second, beside a level, whether it can still be measured."""

import threading
from collections.abc import Callable

PERIOD_S = 1.0


class Watch:
    """While its `with` block runs, `problem()` says why the level should end, in words, or None.

    `ask` is asked from a thread of its own (it may take seconds) and answers likewise; its first problem stays. What it
    raises is a problem too: a level that nobody watched must not pass for a good one, nor cost its records.
    """

    def __init__(self, ask: Callable[[], str | None]):
        self._ask = ask
        self._problem: str | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_exc) -> None:
        self._stop.set()
        self._thread.join()
        # What happened since the last look: a server that died with its last answer.
        self._problem = self._problem or self._look()

    def problem(self) -> str | None:
        return self._problem

    def _run(self) -> None:
        while not self._problem and not self._stop.wait(PERIOD_S):
            self._problem = self._look()

    def _look(self) -> str | None:
        try:
            return self._ask()
        except Exception as error:
            return f"the server could not be watched any more: {error!r}"
