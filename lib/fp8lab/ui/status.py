"""One line that says what long work is doing and ends as one line that says what came of it.

In a notebook it is one display handle, in a terminal one rewritten line, elsewhere (a log, CI) one line
for each phase. It goes to standard error, so that standard output stays for results.
"""

import html
import os
import sys
import time

from .text import visible

# A notebook's kernel that runs headless also writes its progress into this file, for the terminal.
PROGRESS_FILE_VARIABLE = "FP8LAB_PROGRESS_FILE"


class StatusLine:
    """`update(phase, detail)` while the work goes on, then `done(text)`."""

    def __init__(self, minimum_interval_s: float = 0.5):
        self._interval = minimum_interval_s
        self._shown_at = 0.0
        self._phase = None
        self._width = 0
        self._handle = None
        self._notebook = _in_notebook()
        self._terminal = sys.stderr.isatty()

    def update(self, phase: str, detail: str = "", picture: str = "") -> None:
        """Shows `phase` and `detail`, in a notebook with a `picture` (HTML); calls in quick succession with the same
        phase are skipped."""
        now = time.monotonic()
        if phase == self._phase and (now - self._shown_at < self._interval or not (self._notebook or self._terminal)):
            return
        self._phase, self._shown_at = phase, now
        self._show("update", f"{phase}{': ' if detail else ''}{detail}", picture)

    def done(self, text: str, picture: str = "") -> None:
        """Replaces the line by its summary."""
        self._show("done", text, picture)

    def _show(self, kind: str, text: str, picture: str) -> None:
        text = " ".join(visible(text, limit=1000).splitlines())
        if self._notebook:
            self._show_in_cell(kind, text, picture)
        elif self._terminal:
            end = "\n" if kind == "done" else ""
            print(f"\r{text:<{self._width}}", end=end, file=sys.stderr, flush=True)
            self._width = 0 if end else len(text)
        else:
            print(text, file=sys.stderr, flush=True)

    def _show_in_cell(self, kind: str, text: str, picture: str) -> None:
        from IPython.display import display

        content = {"text/plain": text}
        if picture:
            content["text/html"] = f"<div>{picture}</div><samp>{html.escape(text)}</samp>"
        if self._handle is None:
            self._handle = display(content, raw=True, display_id=True)
        else:
            self._handle.update(content, raw=True)
        if path := os.environ.get(PROGRESS_FILE_VARIABLE):
            with open(path, "a") as file:
                file.write(f"{kind} {text}\n")


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return getattr(shell, "kernel", None) is not None
