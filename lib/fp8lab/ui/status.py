"""The terminal: its characters, a reader that went away, and the status line, one line that says what long work is doing and
ends as one line that says what came of it. In a notebook it is one display handle, in a terminal one rewritten line, elsewhere
(a log, CI) one line for each phase, on standard error: standard output stays for results."""

import codecs
import html
import locale
import os
import select
import sys
import time
import warnings

from .text import visible

# A notebook's kernel that runs headless also writes its progress into this file, for the terminal.
PROGRESS_FILE_VARIABLE = "FP8LAB_PROGRESS_FILE"
_INTERVAL_S = 0.5


class StatusLine:
    """`update(phase, detail)` while the work goes on, then `done(text)`."""

    def __init__(self):
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
        if phase == self._phase and (now - self._shown_at < _INTERVAL_S or not (self._notebook or self._terminal)):
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


# What the house writes beyond ASCII, for a terminal that knows ASCII alone.
_PLAIN = str.maketrans(
    {"µ": "u", "×": "x", "–": "-", "−": "-", "…": "...", "≤": "<=", "─": "-", "│": "|", "└": "`", "├": "|", "\xa0": " "}
)


def settle() -> None:
    """Makes this process's terminal and files fit for what is written: for a command of its own, before it does anything.
    Files are UTF-8 whatever the locale is: where it is another one, this process is begun anew in Python's UTF-8 mode."""
    if not sys.flags.utf8_mode and codecs.lookup(locale.getencoding()).name != "utf-8":
        os.environ |= {"PYTHONUTF8": "1", "PYTHONIOENCODING": getattr(sys.stdout, "encoding", None) or "ascii"}
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    named = os.environ.pop("PYTHONIOENCODING", "")  # of this terminal alone, not of what is started
    plain = {"encoding": "ascii"} if not named and os.environ.get("LC_ALL") in ("C", "POSIX") else {}
    codecs.register_error("fp8lab.plain", _plain)
    for name, descriptor in (("stdin", 0), ("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:  # closed; the next file that is opened would take its place
            os.dup2(os.open(os.devnull, os.O_RDWR), descriptor)
            setattr(sys, name, os.fdopen(descriptor, "r" if name == "stdin" else "w"))
        elif name != "stdin":
            getattr(sys, name).reconfigure(errors="fp8lab.plain", **plain)
    # What libraries say to their programmers is left out; a stricter wish would end them in the midst of their imports.
    os.environ.pop("PYTHONWARNINGS", None)
    warnings.resetwarnings()
    warnings.simplefilter("ignore")
    warnings.simplefilter("default", UserWarning)
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr, flush=True)


def reader_gone() -> bool:
    """Whether what this process writes is read no more (`| head`); its further writing then goes nowhere."""
    gone = False
    for descriptor in (1, 2):
        poll = select.poll()
        poll.register(descriptor, 0)
        if any(event & select.POLLERR for _, event in poll.poll(0)):
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
            gone = True
    return gone


def _plain(error: UnicodeError) -> tuple[str, int]:
    text = error.object[error.start : error.end].translate(_PLAIN)
    return text.encode("ascii", "backslashreplace").decode(), error.end
