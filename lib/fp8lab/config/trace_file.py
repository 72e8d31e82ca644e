"""Reading traces that others recorded: the lengths of their requests and when they arrived, whoever wrote the file.

What a file is shows in its columns or keys, never in its name. It is text in UTF-8 (or UTF-16 with its byte-order mark, as
spreadsheets save it), plain or gzipped: a table with commas, semicolons or tabs, or JSON, as one list or an entry a line.
"""

import contextlib
import csv
import functools
import gzip
import io
import itertools
import json
import math
import re
import zlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..errors import BadInput

MAX_REQUEST_TOKENS = 1 << 20
_CHUNK = 1 << 20
# What has no end within these is no line of a table, and no entry of a trace.
_MAX_LINE = 1 << 16
_MAX_ENTRY = 1 << 24
_MAX_SPAN_S = 366 * 86400.0
_GAP = re.compile(r"[\s,]*")


@dataclass(frozen=True)
class Format:
    """A kind of trace: its columns, in small letters, and what a number in the column of times counts, in seconds. A `strict`
    one has no other column, and none of its rows is left out."""

    name: str
    prompt: str
    output: str
    time: str
    unit_s: float = 1.0
    strict: bool = False

    def of(self, names: Iterable[str]) -> bool:
        return {self.prompt, self.output} <= set(names)

    def __str__(self) -> str:
        return f"{self.name} ({self.prompt}, {self.output}, {self.time})"


FORMATS = (
    Format("fp8lab's own", "prompt_tokens", "output_tokens", "arrival_s", strict=True),
    Format("Azure LLM inference", "contexttokens", "generatedtokens", "timestamp"),
    Format("BurstGPT", "request tokens", "response tokens", "timestamp"),
    Format("Mooncake", "input_length", "output_length", "timestamp", unit_s=1e-3),
)
KNOWN = f"{'; '.join(map(str, FORMATS))}; conversations in ShareGPT's form (conversations: from, value) or OpenAI's (messages)"


@dataclass(frozen=True)
class Lengths:
    """The requests of a file, in their order, each array of shape (requests,): tokens, and seconds from the first arrival,
    ascending (None: not in the file, or not asked for). `to_be_replayed`: it is fp8lab's own format with times. `notes` say what
    was left out or changed."""

    to_be_replayed: bool
    prompt: np.ndarray
    output: np.ndarray
    arrival_s: np.ndarray | None
    notes: tuple[str, ...] = ()


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, str]]:
    """The bytes of a trace file, unpacked, and their encoding. Raises BadInput where it cannot be read, and for what the
    block finds wrong with it as text."""
    try:
        with contextlib.ExitStack() as stack:
            raw = stack.enter_context(path.open("rb"))
            if raw.peek(2)[:2] == b"\x1f\x8b":
                raw = stack.enter_context(gzip.open(raw))
            wide = raw.peek(2)[:2] in (b"\xff\xfe", b"\xfe\xff")
            if not wide and b"\0" in raw.peek(4096)[:4096]:
                raise BadInput(
                    f"trace file {path.name!r} is no text: expected a table or JSON, in UTF-8, plain or gzipped"
                )
            yield raw, "utf-16" if wide else "utf-8-sig"
    except UnicodeError as error:
        raise BadInput(f"{path.name}: not text in UTF-8: {error}; save it as UTF-8") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise BadInput(f"{path.name}: damaged gzip file: {error}; fetch or pack it again") from None
    except OSError as error:
        raise BadInput(f"trace file {path.name!r} cannot be read: {error.strerror or error}") from None


def _wrong(path: Path, line: int, said: str) -> BadInput:
    return BadInput(f"{path.name}, line {line}: {said}")


def is_json(path: Path) -> bool:
    """Whether a trace file begins as JSON does. Raises BadInput for one that holds nothing."""
    with opened(path) as (raw, encoding):
        for line in iter(functools.partial(io.TextIOWrapper(raw, encoding, errors="replace").readline, _MAX_LINE), ""):
            if text := line.strip():
                return text[0] in "[{"
    raise BadInput(f"trace file {path.name!r} is empty; expected one of: {KNOWN}")


def json_entries(path: Path) -> Iterator[tuple[int, object]]:
    """The entries of a JSON list, or of JSON one after the other, each with the line that it begins in; one at a time is in
    memory."""
    decode = json.JSONDecoder().raw_decode
    buffer, at, line, more, listed, ended = "", 0, 1, _CHUNK, None, False
    with opened(path) as (raw, encoding):
        text = io.TextIOWrapper(raw, encoding)
        while True:
            line, at = _past(buffer, at, line)
            if at == len(buffer):
                if buffer := text.read(_CHUNK):
                    at = 0
                    continue
                break
            if listed is None and buffer[at] == "[":
                listed, at = True, at + 1
                continue
            if listed and buffer[at] == "]":
                listed, ended, at = False, True, at + 1
                continue
            if ended:
                raise _wrong(path, line, "something follows the end of the list")
            try:
                entry, end = decode(buffer, at)
            except json.JSONDecodeError as error:
                # Cut off by the end of the buffer, perhaps.
                if len(buffer) - at < _MAX_ENTRY and (read := text.read(more)):
                    buffer, at, more = buffer[at:] + read, 0, 2 * more
                    continue
                wrong = line + buffer.count("\n", at, error.pos)
                raise _wrong(path, wrong, f"not JSON, or cut off: {error.msg}") from None
            except (RecursionError, ValueError):  # ValueError: a number of thousands of digits
                raise _wrong(path, line, "JSON nested too deeply, or with numbers too long") from None
            listed, more = bool(listed), _CHUNK
            yield line, entry
            line, at = line + buffer.count("\n", at, end), end
    if listed:
        raise _wrong(path, line, "its list has no end: the file is cut off")


def _past(buffer: str, at: int, line: int) -> tuple[int, int]:
    """Line and place of what follows the white space and commas at `at`."""
    end = _GAP.match(buffer, at).end()
    return line + buffer.count("\n", at, end), end


def read_lengths(path: Path, *, times: bool) -> Lengths | None:
    """The lengths in a file, with its `times` or without; None for JSON that holds none. Raises BadInput for a file that is no
    trace, or is one with an error, naming line, column and value."""
    return _read_lengths(path, path.stat().st_mtime_ns, times)


@functools.lru_cache(maxsize=4)  # every level reads the same file
def _read_lengths(path: Path, _changed: int, times: bool) -> Lengths | None:
    if is_json(path):
        # The first entry that is an object says what the file is.
        entry = next((entry for _, entry in json_entries(path) if isinstance(entry, dict)), {})
        names = [name.strip().lower() for name in entry]
        if not (found := next((one for one in FORMATS if one.of(names)), None)):
            return None
        timed = found.time in names
        return _checked(path, found, timed, *_read_rows(path, _json_rows(path), found, times and timed))
    header, names, separator = _header(path)
    found = next((one for one in FORMATS if one.of(names)), None)
    if not found:
        raise BadInput(f"{path.name}: no trace that is known: it has the columns {_quoted(names)}; known: {KNOWN}")
    if found.strict and (unknown := set(names) - {found.prompt, found.output, found.time, ""}):
        known = ", ".join(sorted((found.prompt, found.output, found.time)))
        raise BadInput(f"{path.name}: unknown columns {_quoted(sorted(unknown))}; known: {known}")
    if twice := [name for name in (found.prompt, found.output, found.time) if names.count(name) > 1]:
        raise BadInput(f"{path.name}: the column {twice[0]!r} is there {names.count(twice[0])} times; keep one of them")
    timed = found.time in names
    read = _read_clean_table(path, header, names, separator, found, times and timed)
    read = read or _read_rows(path, _table_rows(path, header, names, separator), found, times and timed)
    return _checked(path, found, timed, *read)


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(repr(name[:40]) for name in itertools.islice(names, 20)) or "none"


def _header(path: Path) -> tuple[int, list[str], str]:
    """The number of a table's first line that holds something, the names in it, and what separates them."""
    with opened(path) as (raw, encoding):
        text = io.TextIOWrapper(raw, encoding, errors="replace", newline="")
        for number in itertools.count(1):
            line = text.readline(_MAX_LINE)
            if len(line) == _MAX_LINE:
                raise _wrong(path, number, f"no end within {_MAX_LINE:,} characters; expected a table's header")
            if line.strip() and not line.lower().startswith("sep="):  # a spreadsheet's own first line
                break
    separator = max(",;\t", key=line.count)
    return number, [name.strip().lower() for name in next(csv.reader([line], delimiter=separator))], separator


def _read_clean_table(path, header, names, separator, kind, times):
    """As `_read_rows`, and fast, for a table without any peculiarity: plain numbers, ISO times, no blank in a row. None for
    every other, which is read row by row."""
    import pyarrow
    from pyarrow import csv as table

    if separator == ";":  # its numbers may be written 1.000,5
        return None
    number = pyarrow.float64()
    parts, skipped = [], 0
    for time in (number, pyarrow.timestamp("ns"), pyarrow.timestamp("ns", "UTC")) if times else (None,):
        types = {kind.prompt: number, kind.output: number} | ({kind.time: time} if time else {})
        try:
            with opened(path) as (raw, encoding):
                batches = table.open_csv(
                    raw,
                    # One thread and small blocks: what is read ahead would lie in memory.
                    read_options=table.ReadOptions(
                        use_threads=False, block_size=1 << 18, encoding=encoding.removesuffix("-sig"),
                        skip_rows=header, column_names=[name if name in types else f"{name} {i}" for i, name in enumerate(names)],
                    ),
                    parse_options=table.ParseOptions(delimiter=separator),
                    convert_options=table.ConvertOptions(include_columns=list(types), column_types=types),
                    memory_pool=pyarrow.system_memory_pool(),
                )  # fmt: skip
                for batch in batches:
                    if any(column.null_count for column in batch.columns):
                        return None
                    prompt, output, *when = (column.to_numpy(zero_copy_only=False) for column in batch.columns)
                    if not all(
                        ((n >= 0) & (n <= MAX_REQUEST_TOKENS) & (n == np.floor(n))).all() for n in (prompt, output)
                    ):
                        return None
                    kept = (prompt > 0) & (output > 0)
                    if kind.strict and not kept.all():
                        return None
                    skipped += int((~kept).sum())
                    part = [prompt[kept].astype(np.int32), output[kept].astype(np.int32)]
                    if times:
                        seconds = when[0].astype("datetime64[ns]").astype(float) * 1e-9 if time != number else when[0]
                        if not np.isfinite(seconds).all():
                            return None
                        part.append(seconds[kept] * (kind.unit_s if time == number else 1))
                    parts.append(part)
        except pyarrow.ArrowInvalid:
            if parts:
                return None
            continue
        columns = [np.concatenate(column) for column in zip(*parts, strict=True)] or [np.empty(0)] * 3
        return columns[0], columns[1], columns[2] if times else None, skipped
    return None


def _table_rows(path: Path, header: int, names: list[str], separator: str) -> Iterator[tuple[int, dict]]:
    with opened(path) as (raw, encoding):
        text = io.TextIOWrapper(raw, encoding, errors="replace", newline="")
        for _ in range(header):
            text.readline()
        # A spreadsheet that separates with semicolons may write 5,0.
        decimal = "," if separator == ";" else "."
        thousands = re.compile(r"\d{1,3}(\.\d{3})+" if separator == ";" else r"\d{1,3}(,\d{3})+")
        reader = csv.reader(text, delimiter=separator)
        begin = header + 1
        least = max(i for i, name in enumerate(names, 1) if name)
        try:
            for written in reader:
                row = [cell.strip() for cell in written]
                if any(row):
                    if len(row) < least or any(row[len(names) :]):
                        raise _wrong(path, begin, f"{len(row)} values for {len(names)} columns")
                    if grouped := next(filter(thousands.fullmatch, row), ""):
                        raise _wrong(path, begin, f"{grouped!r} may hold separators of thousands; write it without")
                    yield begin, dict(zip(names, (cell.replace(decimal, ".") for cell in row), strict=False))
                begin = header + 1 + reader.line_num
        except csv.Error as error:
            raise _wrong(path, header + reader.line_num, f"not a row of a table: {error}") from None


def _json_rows(path: Path) -> Iterator[tuple[int, dict]]:
    for line, entry in json_entries(path):
        if not isinstance(entry, dict):
            raise _wrong(path, line, f"found {str(entry)[:40]!r}, expected an object, as in the first entry")
        yield line, {name.strip().lower(): value for name, value in entry.items()}


def _read_rows(path: Path, rows: Iterable[tuple[int, dict]], kind: Format, times: bool):
    """Prompt and output tokens, seconds (or None), and how many rows were skipped because they have no tokens."""
    prompt, output, seconds, skipped = array("i"), array("i"), array("d"), 0
    for line, row in rows:
        column = ""
        try:
            found = []
            for column in (kind.prompt, kind.output):
                found.append(_tokens(row.get(column), least=1 if kind.strict else 0))
            if not all(found):
                skipped += 1
                continue
            if times:
                column = kind.time
                seconds.append(_seconds(row.get(column), kind.unit_s))
        except ValueError as error:
            value = row.get(column)
            is_there = "nothing" if value in (None, "") else repr(value)[:60]
            raise BadInput(f"{path.name}, line {line}, column {column!r}: found {is_there}, expected {error}") from None
        prompt.append(found[0])
        output.append(found[1])
    return np.array(prompt, np.int32), np.array(output, np.int32), np.array(seconds) if times else None, skipped


def _tokens(value: object, least: int) -> int:
    """A number of tokens. Raises ValueError saying what was expected."""
    if value in (None, "") and not least:
        return 0
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        number = float(value)
        if number.is_integer() and least <= number <= MAX_REQUEST_TOKENS and not isinstance(value, bool):
            return int(number)
    raise ValueError(f"a whole number of tokens from {least} to {MAX_REQUEST_TOKENS:,}")


def _seconds(value: object, unit_s: float) -> float:
    """A time in seconds: a number, or a date with its time, in UTC unless it says otherwise."""
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        number = float(value) * unit_s
        if math.isfinite(number) and not isinstance(value, bool):
            return number
    with contextlib.suppress(TypeError, ValueError):
        when = datetime.fromisoformat(value)
        return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
    raise ValueError("a number of seconds, or a date and time as 2024-05-10 00:00:00.5")


def _checked(path: Path, kind: Format, timed: bool, prompt, output, seconds, skipped: int) -> Lengths:
    notes = []
    if skipped:
        notes.append(f"{skipped:,} of {skipped + len(prompt):,} rows were skipped: they have no tokens in or out")
    if not len(prompt):
        why = "all its rows are without tokens in or out" if skipped else "it has a header and no rows"
        raise BadInput(f"the trace {path.name!r} is empty: {why}")
    if seconds is not None:
        # No date has so many seconds: these are milli-, micro- or nanoseconds.
        for _ in range(3):
            seconds = seconds / 1000 if abs(seconds[0]) > 1e11 else seconds
        if late := int((np.diff(seconds) < 0).sum()):
            order = np.argsort(seconds, kind="stable")
            prompt, output, seconds = prompt[order], output[order], seconds[order]
            notes.append(f"{late:,} of {len(prompt):,} rows are earlier than the row before: they were sorted by time")
        seconds = seconds - seconds[0]
        if seconds[-1] > _MAX_SPAN_S:
            raise BadInput(
                f"{path.name}: from the first to the last {kind.time!r} are {seconds[-1] / 86400:,.6g} days, expected at most "
                f"{_MAX_SPAN_S / 86400:.0f}; is one of them in another unit, or its date wrong?"
            )
    return Lengths(kind.strict and timed, prompt, output, seconds, tuple(notes))
