"""Files of a run: JSON and tables, written whole or not at all, and read with one clear error when damaged."""

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pandas as pd

from .errors import NotWritten, RunDamaged

# More is damage: the likeliest tokens of every position of a text of three million tokens, the most that is stored.
_MOST_ROWS = 1 << 26
# A row holds numbers and, at the longest, a prompt's whole answer.
_MOST_BYTES_A_ROW = 1 << 16


def write_tables(folder: Path, **tables: pd.DataFrame | None) -> None:
    """Each table that is not None as <name>.parquet into `folder`, on the disk when this returns."""
    for name, table in tables.items():
        if table is not None:
            path = folder / f"{name}.parquet"
            with told(path):
                # Whole numbers by their differences, floats by their bytes' place: the recorded levels take 0.69 of what
                # they take with zstd alone, and nothing is lost.
                encodings = {column: "DELTA_BINARY_PACKED" for column in table.select_dtypes("integer")}
                encodings |= {column: "BYTE_STREAM_SPLIT" for column in table.select_dtypes("floating")}
                table.to_parquet(
                    path, compression="zstd", compression_level=19, index=False, column_encoding=encodings,
                    use_dictionary=[column for column in table if column not in encodings], write_page_checksum=True,
                )  # fmt: skip
                sync(path)


def write_json(path: Path, value) -> None:
    """Writes `value` beside `path` and renames: a reader sees the whole file or none. Raises NotWritten."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    with told(path):
        try:
            with scratch.open("w") as file:
                json.dump(plain(value), file, indent=2, allow_nan=False)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            scratch.replace(path)
        finally:
            scratch.unlink(missing_ok=True)


@contextlib.contextmanager
def told(path: Path) -> Iterator[None]:
    """Turns an OSError of writing `path` into NotWritten, which says what to do."""
    try:
        yield
    except OSError as error:
        raise NotWritten(
            f"{path} cannot be written: {error.strerror or error}; what was complete before is untouched. "
            "Make room (or choose another --run folder) and run the same command again"
        ) from None


def sync(path: Path) -> None:
    """Returns when the file or folder is on the disk: a power cut must not leave a summary without its tables."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def read_json(path: Path, remedy: str, keys: tuple[str, ...] = ()) -> dict:
    """A JSON object that has `keys`. Raises RunDamaged with the `remedy` for anything else."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise RunDamaged(f"{path} cannot be read ({error}); {remedy}") from None
    lacking = [key for key in keys if key not in value] if isinstance(value, dict) else ["a JSON object"]
    if lacking:
        raise RunDamaged(f"{path} cannot be used (it lacks {', '.join(lacking)}); {remedy}")
    return value


def read_parquet(path: Path, remedy: str, columns: Sequence[str] = (), most_rows: int = _MOST_ROWS) -> pd.DataFrame:
    """A table that has `columns` and at most `most_rows` rows: more are refused unread, a small file can hold
    gigabytes. Raises RunDamaged with the `remedy` for anything else."""
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
            groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
            rows, size = sum(group.num_rows for group in groups), sum(group.total_byte_size for group in groups)
            if rows > most_rows or size > _MOST_BYTES_A_ROW * (rows + 1):
                raise ValueError(f"it holds {rows:,} rows, {size:,} bytes: more than there can be")
            table = file.read().to_pandas()
        if lacking := sorted(set(columns) - set(table)):
            raise ValueError(f"it lacks {', '.join(lacking)}")
        return table
    except Exception as error:  # a damaged file can make its reader fail in any way
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise RunDamaged(f"{path} cannot be read ({said[:300]}); {remedy}") from None


def plain(value):
    """`value` as JSON holds it: infinity as text, not-a-number as null, mappings and sequences as they are."""
    if dataclasses.is_dataclass(value):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value
