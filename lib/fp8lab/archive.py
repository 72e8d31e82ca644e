"""A run in an archive from someone else, unpacked to be read."""

import hashlib
import tempfile
import zipfile
import zlib
from pathlib import Path

from .errors import BadInput
from .paths import cache_dir
from .text import visible

# Hundreds of times the largest recorded run, whose token timestamps are left out; more than that is not one of ours.
_LARGEST_BYTES = 2 * 2**30


def unpacked(archive: Path) -> Path:
    """The run folder inside an archive that `sharing.share` wrote, unpacked once into the cache folder.

    Raises BadInput for anything else: it may come from a stranger.
    """
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
        raise BadInput(f"{archive.name} cannot be unpacked: {visible(str(error))}") from None
    return target / top.pop()
