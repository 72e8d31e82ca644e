"""A run for others: its copy in `data/recorded`; one page that opens anywhere and one archive that `--source` opens again."""

import shutil
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from .errors import BadInput
from .paths import DATA, PLAIN_NAME, made, repository_relative, writing
from .results.files import put_in_place, read_parquet, to_the_microsecond, write_tables
from .results.run_folder import Run
from .ui.status import StatusLine


def share(run: Run, target: Path, *, notebooks: list[Path], tokens: bool = False) -> tuple[list[Path], Path]:
    """Writes the pages and the archive of `run` into the folder `target`; (pages, archive).

    The notebooks are executed on the run as it is: nothing is measured. The archive holds provenance, records
    and telemetry of every complete level, what was measured of quality, no logs, and token timestamps only with
    `tokens` (they are large). Raises BadInput for a run that holds neither levels nor answers.
    """
    from .report.notebooks import execute

    if not run.summaries() and not run.read_parts("quality"):
        raise BadInput(f"{run.path.name} holds no complete level and no answers yet: there is nothing to share")
    made(target, "choose another --out folder")
    pages, name, status = [], run.path.resolve().name, StatusLine()
    # Written beside and renamed: what was shared before stays until this is whole.
    with writing(target), tempfile.TemporaryDirectory(prefix=".sharing-", dir=target) as scratch:
        for notebook in notebooks:
            status.update(f"{name}: drawing {notebook.stem}")
            page = execute(notebook, Path(scratch) / notebook.name, {"source": repository_relative(run.path)})
            pages.append(target / f"{name if len(notebooks) == 1 else f'{name}-{notebook.stem}'}.html")
            page.rename(pages[-1])
        status.update(f"{name}: packing the archive")
        whole, archive = Path(scratch) / "whole.zip", target / f"{name}.zip"
        with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as file:
            for path in files(run, list(run.summaries()) if tokens else ()):
                file.write(path, Path(name) / path.relative_to(run.path))
        whole.rename(archive)
    status.done(f"{name}: {len(pages)} page{'s' * (len(pages) > 1)} and an archive")
    return pages, archive


def record(run: Run, name: str, tokens: Sequence[str] = ()) -> Path:
    """Copies a run's files, with the token timestamps of the levels `tokens`, to `data/recorded/<name>`, times to the
    microsecond; an earlier one is replaced once the copy is whole. Raises BadInput for a name that is no plain one or is this run's own, NotWritten,
    with the earlier one as it was, when the disk is full."""
    if not PLAIN_NAME.fullmatch(name):
        raise BadInput(f"name {name!r} is no name: letters, digits, '.', '_' and '-', at most 64")
    target = DATA / "recorded" / name
    if target.resolve() == run.path.resolve():
        raise BadInput(f"{name!r} is this recorded run itself; choose another name")
    if unknown := sorted(set(tokens) - set(run.summaries())):
        raise BadInput(f"run {run.path.name} holds no complete level {', '.join(unknown)}")
    copied = files(run, tokens)
    made(target.parent, "a run is recorded into the checkout itself; `fp8lab share` writes to any folder (--out)")
    with writing(target), tempfile.TemporaryDirectory(prefix=".recording-", dir=DATA) as scratch:
        whole = Path(scratch, "whole")
        for file in copied:
            copy = whole / file.relative_to(run.path)
            copy.parent.mkdir(parents=True, exist_ok=True)
            if file.suffix == ".parquet":
                write_tables(copy.parent, **{file.stem: to_the_microsecond(read_parquet(file, "record another run"))})
            else:
                shutil.copyfile(file, copy)
        put_in_place(whole, target)
    return target


def files(run: Run, tokens: Sequence[str] = ()) -> list[Path]:
    """What another reader of this run needs: provenance, every complete level, what was measured of quality (less
    the likeliest tokens of every position) and of steps, figures as SVG. No logs, and token timestamps of the levels `tokens`
    only."""
    found = [run.path / "run.json", *sorted(run.path.glob("figures/*.svg"))]
    for level_id in run.summaries():
        held = sorted((run.path / "levels" / level_id).iterdir())
        found += [file for file in held if file.stem != "tokens" or level_id in tokens]
    found += [file for file in sorted(run.path.glob("quality/[!.]*")) if not file.stem.endswith("-top")]
    found += sorted(run.path.glob("anatomy/[!.]*.json"))
    return found
