"""Files of a run: JSON and tables, written whole or not at all, and read with one clear error when damaged."""

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import pandas as pd

from .errors import NotWritten, RunDamaged


def write_tables(folder: Path, **tables: pd.DataFrame | None) -> None:
    """Each table that is not None as <name>.parquet into `folder`, on the disk when this returns."""
    for name, table in tables.items():
        if table is not None:
            path = folder / f"{name}.parquet"
            with told(path):
                # Floats by their bytes' place: a third smaller than as they lie, and nothing is lost.
                floats = list(table.select_dtypes("floating"))
                others = [column for column in table if column not in floats] if floats else True
                table.to_parquet(
                    path, compression="zstd", index=False, use_byte_stream_split=floats, use_dictionary=others
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


def read_parquet(path: Path, remedy: str) -> pd.DataFrame:
    try:
        return pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise RunDamaged(f"{path} cannot be read ({error}); {remedy}") from None


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
