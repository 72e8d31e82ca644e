"""Files of a run: JSON and tables, written whole or not at all, and read with one clear error when damaged."""

import dataclasses
import hashlib
import json
import math
import os
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from ..errors import BadInput, RunDamaged
from ..paths import cache_dir, write_text, writing

# More is damage: the likeliest tokens of every position of a text of three million tokens, the most that is stored.
_MOST_ROWS = 1 << 26
# A row holds numbers and, at the longest, a prompt's whole answer.
_MOST_BYTES_A_ROW = 1 << 16


def write_tables(folder: Path, **tables: pd.DataFrame | None) -> None:
    """Each table that is not None as <name>.parquet into `folder`, on the disk when this returns."""
    import pyarrow.parquet

    for name, table in tables.items():
        if table is not None:
            path = folder / f"{name}.parquet"
            # Whole numbers by their differences, floats by their bytes' place, and no description of pandas or of each
            # column's range: the recorded levels take under half of what they take with zstd alone, and nothing is lost.
            encodings = dict.fromkeys(table.select_dtypes("integer"), "DELTA_BINARY_PACKED")
            encodings |= {column: "BYTE_STREAM_SPLIT" for column in table.select_dtypes("floating")}
            with writing(path):
                pyarrow.parquet.write_table(
                    pyarrow.Table.from_pandas(table, preserve_index=False).replace_schema_metadata(), path,
                    compression="zstd", compression_level=19, column_encoding=encodings, write_page_checksum=True,
                    use_dictionary=[c for c in table if c not in encodings], store_schema=False, write_statistics=False,
                )  # fmt: skip
                sync(path)


def to_the_microsecond(table: pd.DataFrame) -> pd.DataFrame:
    """`table` with its times (columns in seconds, `..._s`) as whole microseconds (`..._us`), less than an event loop is late
    by: on disk they take less than half. `read_parquet` gives seconds again."""
    times = {name: f"{name[:-2]}_us" for name in table.select_dtypes("floating") if name.endswith("_s")}
    whole = {name: (1e6 * table[name]).round().astype("Int64") for name in times}
    return table.assign(**whole).rename(columns=times)


def copy_file(file: Path, copy: Path) -> None:
    """A run's file as a recorded run keeps it: a table with its times to the microsecond."""
    copy.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        write_tables(copy.parent, **{file.stem: to_the_microsecond(read_parquet(file, "record another run"))})
    else:
        shutil.copyfile(file, copy)


def write_json(path: Path, value) -> None:
    """`value` as JSON; see `write_text`."""
    write_text(path, json.dumps(plain(value), indent=2, allow_nan=False) + "\n")


def put_in_place(whole: Path, target: Path) -> None:
    """Renames the folder `whole` to `target`; what was there is removed then, and stays when that cannot be done."""
    earlier = whole.parent.with_name(f".earlier-{os.getpid()}-{target.name}")
    try:
        if target.exists():
            target.rename(earlier)
        whole.rename(target)
    except BaseException:
        if earlier.exists() and not target.exists():
            earlier.rename(target)
        raise
    shutil.rmtree(earlier, ignore_errors=True)


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
        for column in [name for name in table if name.endswith("_us")]:  # `to_the_microsecond`
            table[column] = table[column] / 1e6
        table = table.rename(columns=lambda name: f"{name[:-3]}_s" if name.endswith("_us") else name)
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


# Hundreds of times the largest recorded run, whose token timestamps are left out; more than that is not one of ours.
_LARGEST_BYTES = 2 * 2**30


def unpacked(archive: Path) -> Path:
    """The run folder inside an archive that `fp8lab share` wrote, unpacked once into the cache folder. Raises BadInput for
    anything else: it may come from a stranger."""
    with open(archive, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    target = cache_dir() / "shared" / digest
    try:
        with zipfile.ZipFile(archive) as file:
            names = file.namelist()
            top = {name.partition("/")[0] for name in names}
            strange = [name for name in names if name.startswith(("/", "\\")) or ".." in Path(name).parts]
            if strange or len(top) != 1 or sum(info.file_size for info in file.infolist()) > _LARGEST_BYTES:
                raise BadInput(f"{archive.name} is not an archive of one run; `fp8lab share RUN` makes one")
            if not target.is_dir():
                target.parent.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
                    file.extractall(Path(scratch) / "run")
                    (Path(scratch) / "run").rename(target)
    # RuntimeError: encrypted, or packed in a way that zipfile does not know; ValueError, OSError: names that cannot be.
    except (zipfile.BadZipFile, zlib.error, RuntimeError, ValueError, OSError) as error:
        raise BadInput(f"{archive.name} cannot be unpacked: {error}") from None
    return target / top.pop()
