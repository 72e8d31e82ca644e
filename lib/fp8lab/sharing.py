"""Sends a run to someone else: one page that opens anywhere, and one archive that `--source` opens again."""

import hashlib
import shutil
import tempfile
import zipfile
import zlib
from pathlib import Path

from .errors import BadInput
from .paths import cache_dir, repository_relative
from .recording import files
from .runs import Run
from .text import visible

# Hundreds of times the largest recorded run, whose token timestamps are left out; more than that is not one of ours.
_LARGEST_BYTES = 2 * 2**30


def share(run: Run, target: Path, *, notebooks: list[Path], tokens: bool = False) -> tuple[list[Path], Path]:
    """Writes the pages and the archive of `run` into the folder `target`; (pages, archive).

    The notebooks are executed on the run as it is: nothing is measured. The archive holds provenance, records
    and telemetry of every complete level, what was measured of quality, no logs, and token timestamps only with
    `tokens` (they are large). Raises BadInput for a run that holds neither levels nor answers.
    """
    from .notebooks import execute

    if not run.summaries() and not run.read_parts("quality"):
        raise BadInput(f"{run.path.name} holds no complete level and no answers yet: there is nothing to share")
    target.mkdir(parents=True, exist_ok=True)
    pages = []
    with tempfile.TemporaryDirectory() as scratch:
        for notebook in notebooks:
            page = execute(notebook, Path(scratch) / notebook.name, {"source": repository_relative(run.path)})
            name = run.path.resolve().name if len(notebooks) == 1 else f"{run.path.resolve().name}-{notebook.stem}"
            pages.append(Path(shutil.copyfile(page, target / f"{name}.html")))
    archive = target / f"{run.path.resolve().name}.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for path in files(run, list(run.summaries()) if tokens else ()):
            file.write(path, Path(run.path.resolve().name) / path.relative_to(run.path))
    return pages, archive


def unpacked(archive: Path) -> Path:
    """The run folder inside an archive that `share` wrote, unpacked once into the cache folder.

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
    # RuntimeError: encrypted; NotImplementedError: an unknown way of packing; ValueError, OSError: names that cannot be.
    except (zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError, ValueError, OSError) as error:
        raise BadInput(f"{archive.name} cannot be unpacked: {visible(str(error))}") from None
    return target / top.pop()
