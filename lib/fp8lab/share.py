"""Sends a run to someone else: one page that opens anywhere, and one archive that `--source` opens again."""

import shutil
import tempfile
import zipfile
from pathlib import Path

from .errors import BadInput
from .paths import repository_relative
from .results.export import files
from .results.run_folder import Run


def share(run: Run, target: Path, *, notebooks: list[Path], tokens: bool = False) -> tuple[list[Path], Path]:
    """Writes the pages and the archive of `run` into the folder `target`; (pages, archive).

    The notebooks are executed on the run as it is: nothing is measured. The archive holds provenance, records
    and telemetry of every complete level, what was measured of quality, no logs, and token timestamps only with
    `tokens` (they are large). Raises BadInput for a run that holds neither levels nor answers.
    """
    from .report.notebooks import execute

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
