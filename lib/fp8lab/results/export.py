"""A run for others: what of it they need, and its copy in `data/recorded`."""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ..errors import BadInput
from ..paths import DATA, PLAIN_NAME, writing
from .run_folder import Run


def record(run: Run, name: str, tokens: Sequence[str] = ()) -> Path:
    """Copies `files(tokens)` to `data/recorded/<name>`; an earlier one of that name is replaced once the copy is
    whole. Raises BadInput for a name that is no plain one or is this run's own, NotWritten, with the earlier one
    as it was, when the disk is full."""
    if not PLAIN_NAME.fullmatch(name):
        raise BadInput(f"name {name!r} is no name: letters, digits, '.', '_' and '-', at most 64")
    target = DATA / "recorded" / name
    if target.resolve() == run.path.resolve():
        raise BadInput(f"{name!r} is this recorded run itself; choose another name")
    if unknown := sorted(set(tokens) - set(run.summaries())):
        raise BadInput(f"run {run.path.name} holds no complete level {', '.join(unknown)}")
    copied = files(run, tokens)
    with writing(target):
        DATA.joinpath("recorded").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".recording-", dir=DATA) as scratch:
            whole = Path(scratch, "whole")
            for file in copied:
                copy = whole / file.relative_to(run.path)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)
            if target.exists():
                target.rename(Path(scratch, "earlier"))
            whole.rename(target)
    return target


def files(run: Run, tokens: Sequence[str] = ()) -> list[Path]:
    """What another reader of this run needs: provenance, every complete level, what was measured of quality (less
    the likeliest tokens of every position), figures as SVG. No logs, and token timestamps of the levels `tokens`
    only."""
    found = [run.path / "run.json", *sorted(run.path.glob("figures/*.svg"))]
    for level_id in run.summaries():
        held = sorted((run.path / "levels" / level_id).iterdir())
        found += [file for file in held if file.stem != "tokens" or level_id in tokens]
    found += [file for file in sorted(run.path.glob("quality/[!.]*")) if not file.stem.endswith("-top")]
    return found
