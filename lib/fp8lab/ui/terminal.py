"""The terminal as it is: its characters, a reader that went away, and warnings as one line each."""

import codecs
import locale
import os
import select
import sys
import warnings

# What the house writes beyond ASCII, for a terminal that knows ASCII alone.
_PLAIN = str.maketrans(
    {"µ": "u", "×": "x", "–": "-", "−": "-", "…": "...", "≤": "<=", "─": "-", "│": "|", "└": "`", "├": "|", "\xa0": " "}
)


def settle() -> None:
    """Makes this process's terminal and files fit for what is written: for a command of its own, before it does anything.

    Files are UTF-8 whatever the locale is: where it is another one, this process is begun anew in Python's UTF-8 mode.
    """
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
