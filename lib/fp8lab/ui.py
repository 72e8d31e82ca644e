"""What a person sees of the work: text made safe and how numbers are written, one small table of them, and one status line.

The status line says what long work is doing and ends as one line that says what came of it. In a notebook it is one display
handle, in a terminal one rewritten line, elsewhere (a log, CI) one line for each phase, on standard error: standard output stays
for results. Here too: the terminal's characters, and a reader that went away.
"""

import codecs
import html
import itertools
import json
import locale
import math
import os
import re
import select
import shutil
import sys
import textwrap
import time
import unicodedata
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

# Control and format characters (escape sequences, direction marks), surrogates, line and paragraph separators.
_UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def visible(text: str, limit: int = 8000) -> str:
    """`text`, which a server's reply or a file may hold, with what cannot be seen written out (`\\x1b`), lines and tabs
    kept; beyond `limit` characters cut."""
    if len(text) > limit:
        text = f"{text[:limit]} ... ({len(text) - limit:,} characters more)"
    if text.isprintable():
        return text
    hidden = {
        c: c.encode("unicode_escape").decode() for c in set(text) - {"\n", "\t"} if unicodedata.category(c) in _UNSEEN
    }
    return "".join(hidden.get(character, character) for character in text)


def storable(text: str) -> str:
    """`text` with a question mark for each half of a character (a lone surrogate), which UTF-8 does not hold."""
    return text.encode(errors="replace").decode()


def shown(value: float | None, pattern: str = ",.0f", unit: str = "") -> str:
    """A number as tables and sentences show it, by a format specification; a dash for what is not known (None, nan)."""
    return "–" if value is None or (isinstance(value, float) and math.isnan(value)) else f"{value:{pattern}}{unit}"


def four_digits(value: float) -> str:
    """Four digits that count, and no exponent."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def toml(value, digits: str = "") -> str:
    """A value as TOML writes it within a line, floats by a format specification; of a mapping what is None is left out."""
    if isinstance(value, Mapping):
        names = {key: key if re.fullmatch(r"[\w-]+", key, re.ASCII) else toml(key) for key in value}
        held = [f"{names[key]} = {toml(one, digits)}" for key, one in value.items() if one is not None]
        return f"{{ {', '.join(held)} }}" if held else "{}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(toml(one, digits) for one in value)}]"
    return f"{value:{digits}}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


# A number, perhaps with a sign and a unit: "1,033", "-0.4", "63.15 req/s", "1.60×".
_NUMBER = re.compile(r"(?:[+\-−~]|≥ )?[\d.,/]+ ?[^\s\d]{0,8}")
# Where a line may not break in a page: between a number and its unit.
_UNITS = "%|req/s|requests/s|tok/s|tokens/s|TB/s|TFLOP/s|GiB|KiB|GB|MB|ms|µs|s|min|W|J|tokens"
_NO_BREAK = "\N{NO-BREAK SPACE}"
_BEFORE_UNIT = re.compile(rf"(?<=\d) (?=(?:{_UNITS})(?![\w/]))")
_NUMERIC = "text-align:right;font-variant-numeric:tabular-nums"
_TEXT = "text-align:left;white-space:normal"
_NAME, _NAME_LENGTH = "text-align:left;white-space:nowrap", 32
# A column of sentences stays readable where the page is narrow: the table then scrolls in its own box.
_SENTENCE, _SENTENCE_WIDTH = 60, ";min-width:12em"
_CAPTION = "text-align:left;min-width:20em"
# What a column of text, and one of sentences, keeps in a narrow terminal.
_LEAST = 12, 40


@dataclass(frozen=True)
class Table:
    """Rows under named columns, with a caption, for a notebook's cell and a terminal. Whatever its cells hold is shown as text,
    as it is: format numbers before. Without a row the caption says so."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __post_init__(self):
        object.__setattr__(self, "caption", visible(self.caption) + ("" if self.rows else ": nothing to show"))
        object.__setattr__(self, "rows", [tuple(visible(cell) for cell in row) for row in self.rows])

    def _numeric(self, column: int) -> bool:
        cells = [row[column] for row in self.rows if row[column] not in ("", "–")]
        return bool(cells) and all(_NUMBER.fullmatch(cell) for cell in cells)

    def _names(self, column: int) -> bool:
        """Whether its cells are single words, which do not break at a hyphen."""
        return all(" " not in row[column] and len(row[column]) <= _NAME_LENGTH for row in self.rows)

    def _repr_html_(self) -> str:
        styles = [
            _NUMERIC if self._numeric(i) else _NAME if self._names(i) else _TEXT for i in range(len(self.columns))
        ]
        longest = [max((len(row[i]) for row in self.rows), default=0) for i in range(len(self.columns))]
        name_style = _NAME if longest[0] <= _NAME_LENGTH else styles[0]
        heads = [s + _SENTENCE_WIDTH * (n > _SENTENCE) for s, n in zip(styles, longest, strict=True)]
        head = "".join(map(_cell, self.columns, heads, itertools.repeat("col")))
        rows = (_cell(row[0], name_style, "row") + "".join(map(_cell, row[1:], styles[1:])) for row in self.rows)
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        name = html.escape(self.caption)
        caption = f'<caption style="{_CAPTION}">{name}</caption>'
        table = f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        # What scrolls must be within a keyboard's reach, and then has a name.
        return f'<div role="group" aria-label="{name}" tabindex="0" style="overflow-x:auto">{table}</div>'

    def to_markdown(self) -> str:
        def line(cells):
            return "| " + " | ".join(c.replace("|", "\\|").replace("\n", " ") for c in cells) + " |"

        rule = "|" + "|".join("---:" if self._numeric(i) else "---" for i in range(len(self.columns))) + "|"
        return "\n".join([line(self.columns), rule, *(line(row) for row in self.rows)])

    def __repr__(self) -> str:
        """A row a line; in a terminal that is narrower texts are wrapped, or, where that leaves too little, a cell a line."""
        grid, room = [self.columns, *self.rows], _room()
        widths = [max(len(row[i]) for row in grid) for i in range(len(self.columns))]
        right = [self._numeric(i) for i in range(len(self.columns))]
        least = [w if r else min(w, _LEAST[w > _SENTENCE]) for w, r in zip(widths, right, strict=True)]
        fits = sum(least) + 2 * len(least) - 2 <= room
        while fits and sum(widths) + 2 * len(widths) - 2 > room:
            widest = max(range(len(widths)), key=lambda i: widths[i] - least[i])
            widths[widest] -= 1
        caption = _wrapped(self.caption, room)
        if not fits:
            cells = (
                [f"{name}: {cell}" if name else cell for name, cell in zip(self.columns, row, strict=True)]
                for row in self.rows
            )
            blocks = ([line for cell in row for line in _wrapped(cell, room, "  ")] for row in cells)
            return "\n\n".join("\n".join(block) for block in (caption, *blocks))

        def lines(cells):
            for parts in itertools.zip_longest(*map(_wrapped, cells, widths), fillvalue=""):
                padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(parts, widths, right, strict=True))
                yield "  ".join(padded).rstrip()

        rule = ["-" * w for w in widths]
        return "\n".join([*caption, *(line for cells in (self.columns, rule, *self.rows) for line in lines(cells))])


def _room() -> float:
    """How many characters a line may have: in a terminal as many as it has columns."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else math.inf


def _wrapped(text: str, room: float, indent: str = "") -> list[str]:
    return textwrap.wrap(text, int(room), subsequent_indent=indent) if len(text) > room else [text]


class Shown:
    """What is shown as its `_table()`, in a notebook's cell and in a terminal."""

    def __repr__(self) -> str:
        return repr(self._table())

    def _repr_html_(self) -> str:
        return self._table()._repr_html_()


def _cell(text: str, style: str, scope: str = "") -> str:
    """A cell, with a `scope` the header of its row or column; a header needs a text."""
    tag, scope = ("th", f' scope="{scope}"') if scope and text else ("td", "")
    return f'<{tag}{scope} style="{style}">{html.escape(_BEFORE_UNIT.sub(_NO_BREAK, text))}</{tag}>'


@dataclass(frozen=True)
class Column:
    """`value` is a field of the frame, or a function of its row; `pattern` a format specification ("": text)."""

    title: str
    value: str | Callable[[Any], Any]
    pattern: str = ""

    def of(self, row) -> str:
        value = self.value(row) if callable(self.value) else getattr(row, self.value, None)
        return shown(value, self.pattern) if self.pattern or value is None else str(value)


def view(caption: str, frame: "pd.DataFrame", columns: Sequence[Column]) -> Table:
    """The rows of `frame`, one line each."""
    # Objects, so that None stays None and a count a whole number.
    rows = frame.astype(object).where(frame.notna(), None).itertuples(index=False)
    titles = [column.title for column in columns]
    return Table(caption, titles, [[column.of(row) for column in columns] for row in rows])


LEVEL = Column("level", "level_id")
COUNTS = Column("measurement", lambda row: "VALID" if row.valid else "INVALID")


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
