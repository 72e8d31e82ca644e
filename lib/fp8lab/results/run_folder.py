"""The run folder: write, read, resume. Its layout is the same for a recorded run, which is read-only.

run.json                          provenance and the resolved profile
levels/<variant>-<rate>rps-r<n>/  records, tokens, telemetry .parquet; summary.json (last: the level is complete)
unfinished/                       a level while it is being written
set-aside/                        levels that were to be measured again, as they were
logs/<variant>.log                the server's own output
rendered/                         executed notebooks and pages
quality/<variant>.json, .parquet  what its answers were (fp8lab.experiment.quality)
claims.json                       the verdicts
"""

import contextlib
import dataclasses
import datetime
import functools
import itertools
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from pandas.api.types import is_numeric_dtype

from ..config.profile import Level, Profile, rate_name
from ..config.profile_file import from_dict
from ..config.this_machine import load_profile
from ..config.trace import Trace
from ..errors import BadInput, RunDamaged, RunMismatch
from ..metrics.summary import Summary
from ..paths import DATA, PLAIN_NAME, RUNS, RUNS_VARIABLE, in_command, made, repository_relative, writing
from ..system.locks import Lock
from ..ui import Shown, Table, shown
from .files import copy_file, plain, put_in_place, read_json, read_parquet, sync, unpacked, write_json, write_tables
from .provenance import collect, digest

SCHEMA = 1
_LEVEL_ID = re.compile(r"(.+?)-(\d[\d.]*(?:e[+-]?\d+)?|inf)rps-r(\d+)")
# The columns of its tables; see `load.level.to_tables`.
_RECORDS = ("request", "prompt_tokens", "output_tokens_asked", "output_tokens", "chunks", "scheduled_s", "sent_s")
_RECORDS += ("first_token_s", "last_token_s", "finish_reason", "error")
_TEXTS = ("finish_reason", "error")
_TOKENS = ("request", "at_s")
_TELEMETRY = ("at_s", "running", "waiting", "kv_cache_usage", "prompt_tokens", "generation_tokens", "gpu_power_w")
# A day of telemetry, five times a second.
_MOST_SAMPLES = 24 * 3600 * 5


@dataclass(frozen=True, repr=False)
class LevelResult(Shown):
    """A measured level: its summary and tables (see `load.level.to_tables` and `Telemetry.table` for their columns). Shown as a
    table in a notebook."""

    summary: Summary
    records: pd.DataFrame
    tokens: pd.DataFrame | None
    telemetry: pd.DataFrame | None = None

    @property
    def level(self) -> Level | None:
        """What was measured, as a profile plans it; None for a load test of a foreign endpoint."""
        return self.summary.level and self.summary.level.asked

    @property
    def valid(self) -> bool:
        return self.summary.valid

    def _table(self) -> Table:
        s = self.summary

        def show(key, pattern=",.0f", unit=""):
            return shown(getattr(s, key), pattern, unit)

        first = f"{show('mean_ttfo_ms')} / {show('p99_ttfo_ms', unit=' ms')}"
        rows = [
            ("completed", f"{s.completed:,} of {s.requests:,}"),
            ("request throughput", show("request_throughput", ",.2f", " req/s")),
            ("output throughput, whole run", show("output_token_throughput", unit=" tok/s")),
            ("output throughput, steady state", show("steady_output_token_throughput", unit=" tok/s")),
            ("peak concurrent requests", show("peak_concurrent_requests_vllm")),
            ("TTFT mean / p99", f"{show('mean_ttft_ms')} / {show('p99_ttft_ms', unit=' ms')}"),
            *([("first answer token mean / p99", first)] if s.mean_ttfo_ms else []),
            ("TPOT mean / p99", f"{show('mean_tpot_ms', ',.1f')} / {show('p99_tpot_ms', ',.1f', ' ms')}"),
            ("the measurement is", "VALID" if self.valid else f"INVALID: {s.invalid_reason}"),
            *(("note", note) for note in s.notes),
        ]
        emulated = " (EMULATED GPU)" if s.emulated else ""
        name = f"{self.level.variant} at {rate_name(self.level.rate)}" if self.level else "a level"
        return Table(f"{name}{emulated}", ("", "value"), rows)


def a_run(run: object) -> "Run":
    """`run`. Raises BadInput for what is none, such as a run's name."""
    if not isinstance(run, Run):
        raise BadInput(
            f"{run!r} is no run, expected an open one: lab.open_run(source=…) opens a run by its name or folder"
        )
    return run


class Run:
    """An open run folder. Use `open_run` to get one."""

    def __init__(self, path: Path, manifest: dict, read_only: bool):
        self.path, self.manifest, self.read_only = path, manifest, read_only
        self._lock: Lock | None = None

    @functools.cached_property
    def profile(self) -> Profile:
        """The profile that this run was made with, as resolved then."""
        with self.reading("run.json"):
            return from_dict(self.manifest["profile"])

    @contextlib.contextmanager
    def reading(self, name: str) -> Iterator[None]:
        """Turns what comes of a file that holds something else than it should into RunDamaged."""
        try:
            yield
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            said = f"{type(error).__name__}: {error}"
            raise RunDamaged(
                f"{self.path / name} cannot be used ({said}); restore it from a copy of the run, or choose another"
            ) from None

    @property
    def emulated(self) -> bool:
        return self.profile.emulated

    def check_writable(self) -> None:
        """Raises BadInput for a recorded run."""
        if self.read_only:
            raise BadInput(f"run {self.path.name} is a recorded run and read-only")

    def log_path(self, variant: str) -> Path:
        """Where the next server of `variant` logs; logs of earlier starts are kept."""
        return _unused(self.path / "logs", variant, ".log")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from writing to this run meanwhile; may be nested. Raises InUse when one does."""
        if self._lock or self.read_only:
            yield
            return
        self._lock = Lock(self.path / ".lock", f"run folder {repository_relative(self.path)}")
        try:
            yield
        finally:
            self._lock.release()
            self._lock = None

    def has(self, level: Level, trace: Trace | None = None) -> bool:
        """Whether the level is complete. Raises RunMismatch when it was measured with other requests, by their number or,
        with a `trace`, by what they are; RunDamaged when its summary cannot be read."""
        if not (self._folder(level.id) / "summary.json").is_file():
            return False
        held = self._summary(level.id).level
        differs = f"{held.requests} requests, not {level.requests}" if held.requests != level.requests else ""
        if trace:
            # A run from before digests were stored knows its trace by name alone.
            name, digest = held.trace or trace.name, held.trace_digest or trace.digest
            if (name, digest) != (trace.name, trace.digest):
                differs = f"the requests of {name} (digest {digest}), not those of {trace.name} (digest {trace.digest})"
        if differs:
            raise RunMismatch(
                f"run {self.path.name} holds level {level.id} with {differs}; choose another run folder, or set that level "
                f"aside and measure it with these: in Python, run.set_aside({level.id!r})"
            )
        return True

    def summaries(self) -> dict[str, Summary]:
        """The summary of every complete level, by level id: by variant as in the profile, by rate, by repeat. Raises
        RunDamaged when one cannot be read."""
        order = {variant: number for number, variant in enumerate(self.profile.variants)}
        found = {path.parent.name: self._summary(path.parent.name) for path in self.path.glob("levels/*/summary.json")}

        def place(item: tuple[str, Summary]):
            level = item[1].level
            return order.get(level.variant, len(order)), level.rate, level.repeat

        return dict(sorted(found.items(), key=place))

    @property
    def valid(self) -> bool:
        """Whether every complete level counts. Raises RunDamaged when one cannot be read."""
        return all(summary.valid for summary in self.summaries().values())

    def stored(self, level_id: str) -> Path | None:
        """Where a level lies, whole or damaged: in `levels/`, else its last copy in `set-aside/`; None: in neither."""
        if level_id in {path.name for path in self.path.glob("levels/*") if path.is_dir()}:
            return self._folder(level_id)
        named = [(path, *path.name.rpartition("-")) for path in self.path.glob("set-aside/*-*")]
        copies = {int(number): path for path, name, _, number in named if name == level_id and number.isdecimal()}
        return copies[max(copies)] if copies else None

    def level(self, level_id: str, planned: Iterable[Level] = ()) -> Level:
        """What a `stored` level is, with its trace (`MeasuredLevel`) where its summary can be read; else by its name
        and number of requests: that of `planned`, or of its records. Raises RunDamaged when these are damaged too."""
        folder = self.stored(level_id)
        with contextlib.suppress(RunDamaged):
            if (held := self._read_summary(folder, "").level).id == level_id:
                return held
        for level in planned:
            if level.id == level_id:
                return level
        with contextlib.suppress(RunDamaged, AttributeError, ValueError):
            variant, rate, repeat = _LEVEL_ID.fullmatch(level_id).groups()
            requests = len(read_parquet(folder / "records.parquet", "", _RECORDS))
            return Level(variant=variant, rate=float(rate), requests=requests, repeat=int(repeat))
        raise RunDamaged(
            f"{folder}: its summary cannot be read, nor can its records, and no protocol of the profile names it: how many "
            "requests it had is not known; to measure it again, move it away and call load_test"
        )

    def read(self, level: Level) -> LevelResult:
        """A complete level. Raises BadInput when the run does not hold it, RunDamaged when it cannot be read."""
        if not self.has(level):
            held = ", ".join(self.summaries()) or "none"
            raise BadInput(f"run {self.path.name} holds no complete level {level.id} (it holds: {held})")
        folder, summary, remedy = self._folder(level.id), self._summary(level.id), self._again(level.id)
        kept, token, sample = (folder / f"{name}.parquet" for name in ("records", "tokens", "telemetry"))
        records = read_parquet(kept, remedy, _RECORDS, most_rows=level.requests)
        numbers = records[[column for column in _RECORDS if column not in _TEXTS]].dropna(axis=1, how="all")
        if odd := [name for name, held in numbers.items() if not is_numeric_dtype(held) or held.max() == math.inf]:
            raise RunDamaged(f"{kept} holds {', '.join(odd)} that are no numbers; {remedy}")
        if len(records) != summary.requests:
            raise RunDamaged(f"{kept} holds {len(records)} requests, its summary {summary.requests}; {remedy}")
        chunks = int(records["chunks"].sum())
        tokens = read_parquet(token, remedy, _TOKENS, chunks) if token.exists() else None
        telemetry = read_parquet(sample, remedy, _TELEMETRY, _MOST_SAMPLES) if sample.exists() else None
        return LevelResult(summary, records, tokens, telemetry)

    def write(self, result: LevelResult) -> None:
        """Stores a level. It is written beside and renamed: at every instant it is complete or not there, and what
        it replaces is set aside. Raises NotWritten, with the folder as it was, when the disk is full."""
        self.check_writable()
        with self.locked():
            part = self._note_place()
            folder, unfinished = self._folder(result.level.id), self.path / "unfinished"
            scratch = unfinished / result.level.id
            shutil.rmtree(unfinished, ignore_errors=True)
            try:
                with writing(scratch):
                    scratch.mkdir(parents=True)
                    folder.parent.mkdir(exist_ok=True)
                write_tables(scratch, records=result.records, tokens=result.tokens, telemetry=result.telemetry)
                write_json(scratch / "summary.json", dataclasses.replace(result.summary, part=part))
                with writing(folder):
                    sync(scratch)
                    if folder.exists():
                        self.set_aside(result.level.id)
                    scratch.rename(folder)
                    sync(folder.parent)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)

    def set_aside(self, level_id: str) -> Path:
        """Moves a level, whole or damaged, into `set-aside/` and returns where to: it will be measured again."""
        folder = self._folder(level_id)
        self.check_writable()
        if not folder.is_dir():
            held = ", ".join(sorted(path.name for path in self.path.glob("levels/*"))) or "none"
            raise BadInput(f"run {self.path.name} holds no level {level_id!r} to set aside (it holds: {held})")
        with self.locked(), writing(self.path / "set-aside"):
            names = (self.path / "set-aside" / f"{level_id}-{n}" for n in itertools.count(1))
            target = next(path for path in names if not path.exists())
            target.parent.mkdir(exist_ok=True)
            return folder.rename(target)

    def write_cross_check(self, level: Level, result: Mapping) -> None:
        """What another client measured of the same load, beside ours."""
        write_json(self._folder(level.id) / "vllm_bench.json", result)

    def cross_checks(self) -> dict[str, dict]:
        """The cross-check of every level that has one, by level id."""
        paths = sorted(self.path.glob("levels/*/vllm_bench.json"))
        return {path.parent.name: read_json(path, self._again(path.parent.name)) for path in paths}

    def write_part(self, folder: str, name: str, summary: Mapping, **tables: pd.DataFrame | None) -> None:
        """Stores `tables` as <folder>/<table>.parquet and then, atomically, `summary` as <folder>/<name>.json."""
        self.check_writable()
        with self.locked():
            self._note_place()
            with writing(self.path / folder):
                (self.path / folder).mkdir(exist_ok=True)
            write_tables(self.path / folder, **tables)
            write_json(self.path / folder / f"{name}.json", summary)

    def read_parts(self, folder: str) -> dict[str, dict]:
        """The summaries that `write_part` stored in `folder`, by name."""
        paths = sorted(self.path.glob(f"{folder}/[!.]*.json"), key=lambda path: path.stem)
        return {path.stem: read_json(path, f"delete it to measure {path.stem} again") for path in paths}

    def read_table(self, folder: str, name: str) -> pd.DataFrame:
        """A table that `write_part` stored. Raises RunDamaged when it is missing or cannot be read."""
        return read_parquet(self.path / folder / f"{name}.parquet", "delete the .json beside it to measure it again")

    def files(self, tokens: Sequence[str] = ()) -> list[Path]:
        """What another reader of the run needs: provenance, every complete level, what was measured of quality (less
        the likeliest tokens of every position) and of steps, figures as SVG. No logs, and token timestamps of the levels `tokens`
        only."""
        found = [self.path / "run.json", *sorted(self.path.glob("figures/*.svg"))]
        for level_id in self.summaries():
            held = sorted((self.path / "levels" / level_id).iterdir())
            found += [file for file in held if file.stem != "tokens" or level_id in tokens]
        found += [file for file in sorted(self.path.glob("quality/[!.]*")) if not file.stem.endswith("-top")]
        found += sorted(self.path.glob("anatomy/[!.]*.json"))
        return found

    def check_profile(self, profile: Profile) -> None:
        """Raises RunMismatch unless this run was made with `profile`."""
        if self.read_only:
            return
        # Read back and written again, so that a run from before a key existed has its default.
        mine, other = (plain(one.identity()) for one in (self.profile, profile))
        differing = {key for key in mine.keys() | other.keys() if mine.get(key) != other.get(key)}
        # A run may take in more levels and variants; what a level is must not change.
        shared = mine["variants"].keys() & other["variants"].keys()
        if all(mine["variants"][variant] == other["variants"][variant] for variant in shared):
            differing.discard("variants")
        if differing := sorted(differing - {"protocols", "title"}):
            raise RunMismatch(
                f"run folder {self.path} was made with profile {mine['name']!r}, not with this {profile.name!r} "
                f"(they differ in: {', '.join(differing)}); choose another --run folder, or that profile"
            )

    def adopt(self, profile: Profile) -> None:
        """Goes on with `profile`, which may name other protocols than when the run was made. A variant that it no longer
        names stays as it was: its levels may be here."""
        self.check_profile(profile)
        if self.read_only or self._joined(profile) == self.profile:
            return
        with self.locked():
            self._read_again()
            self.manifest["profile"] = plain(self._joined(profile).as_dict())
            write_json(self.path / "run.json", self.manifest)
        del self.profile

    def _joined(self, profile: Profile) -> Profile:
        return dataclasses.replace(profile, variants={**self.profile.variants, **profile.variants})

    def _read_again(self) -> None:
        """Reads what another process may have added since, before this one writes: it holds the lock."""
        self.manifest = _manifest(self.path)
        self.__dict__.pop("profile", None)

    @property
    def parts(self) -> list[dict]:
        """Where the run was measured, a part for each machine, software and profile: `Summary.part` counts them from 1."""
        return [self.manifest, *self.manifest.get("continued", [])]

    def _note_place(self) -> int:
        """The part of the run, from 1, that is measured here and now. A machine, software, source or profile that the run
        was not begun or continued with is another part: it is added to `continued`."""
        self._read_again()
        here = plain(_place(self.profile))
        alike = ("machine", "software", "measured_with")
        for part, place in enumerate(self.parts, start=1):
            if all(place.get(key) == here[key] for key in alike):
                return part
        self.manifest.setdefault("continued", []).append(here)
        write_json(self.path / "run.json", self.manifest)
        return len(self.parts)

    def _folder(self, level_id: str) -> Path:
        return self.path / "levels" / level_id

    def _summary(self, level_id: str) -> Summary:
        return self._read_summary(self._folder(level_id), self._again(level_id))

    def _read_summary(self, folder: Path, remedy: str) -> Summary:
        values = read_json(folder / "summary.json", remedy, ("level", "requests", "completed", "failed", "valid"))
        try:
            summary = Summary.read(values)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise RunDamaged(f"{folder / 'summary.json'} cannot be used ({error}); {remedy}") from None
        if summary.level is None:
            raise RunDamaged(f"{folder / 'summary.json'} names no level; {remedy}")
        return summary

    def _again(self, level_id: str) -> str:
        """What to do about a level that cannot be used as it is."""
        if self.path.resolve().is_relative_to(DATA / "recorded"):
            return "it is a recorded run's: restore it from the repository"
        return f"measure it again with `fp8lab measure --run {in_command(self.path)} --again {level_id}`"

    def __repr__(self) -> str:
        kind = "recorded run" if self.read_only else "run"
        return f"{kind} {self.path.name}: {len(self.summaries())} complete levels, profile {self.profile.name}"


def open_run(
    run_dir: str | Path = "", profile: Profile | str = "auto", *, source: str | Path = "", check: Callable | None = None
) -> Run:
    """Opens the run folder `run_dir`, which is made if it is new: empty makes `runs/<profile>-<date>-<time>`, "latest" (or
    `runs/latest`) goes on with the last one. `profile` is one or its name; "auto" is the run's own, for a new run the machine's.
    `check` is shown the profile of a new run before its folder is made. `source` (a folder, an archive, or a name in
    `data/recorded/`) is opened read-only instead. Raises RunMismatch for a folder of another profile, BadInput for one that is
    no run folder, and what `check` raises."""
    if source:
        path = Path(source)
        if path.suffix == ".zip" and path.is_file():
            path = unpacked(path)
        path = path if path.is_dir() else DATA / "recorded" / str(source)
        return Run(path, _manifest(path), read_only=True)
    latest, path = RUNS / "latest", Path(run_dir) if str(run_dir) else None
    if path and (str(path) == "latest" or path.parent.resolve() / path.name == latest):
        path = latest.resolve() if latest.is_symlink() and latest.exists() else None
    remedy = f"choose another --run folder, or name one for all runs in the variable {RUNS_VARIABLE}"
    if path and (path / "run.json").is_file():
        if path.resolve().is_relative_to(DATA / "recorded"):
            raise BadInput(f"{path} is a recorded run: read it with --source; to measure, choose another --run folder")
        made(path, f"read this run with --source, or {remedy}")
        run = Run(path, _manifest(path), read_only=False)
        if profile != "auto":
            run.adopt(load_profile(profile) if isinstance(profile, str) else profile)
        return run
    profile = load_profile(profile) if isinstance(profile, str) else profile
    path = path or _unused(RUNS, f"{profile.name}-{datetime.datetime.now():%Y%m%d-%H%M%S}")
    if (here := path.resolve().parent == RUNS) and latest.exists() and not latest.is_symlink():
        raise BadInput(f"{repository_relative(latest)} stands where the link to the last run belongs: rename it")
    # What an `open_run` that was killed leaves is still new.
    if path.exists() and not (
        path.is_dir() and all(one.name == ".lock" or one.name.startswith(".run.json.") for one in path.iterdir())
    ):
        raise BadInput(f"{path} exists and is no run folder (it has no run.json); choose another --run folder")
    if check:
        check(profile)
    made(path, remedy)
    manifest = plain({"schema": SCHEMA, "profile": profile.as_dict()} | _place(profile))
    write_json(path / "run.json", manifest)
    if here:
        scratch = RUNS / f".latest-{os.getpid()}"
        scratch.unlink(missing_ok=True)
        scratch.symlink_to(path.name, target_is_directory=True)
        scratch.replace(latest)
    return Run(path, manifest, read_only=False)


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
    copied = run.files(tokens)
    made(target.parent, "a run is recorded into the checkout itself; `fp8lab share` writes to any folder (--out)")
    with writing(target), tempfile.TemporaryDirectory(prefix=".recording-", dir=DATA) as scratch:
        whole = Path(scratch, "whole")
        for file in copied:
            copy_file(file, whole / file.relative_to(run.path))
        put_in_place(whole, target)
    return target


def _unused(folder: Path, name: str, suffix: str = "") -> Path:
    """The first of `name`, `name`-2, `name`-3, … that `folder` does not hold."""
    names = itertools.chain([name], (f"{name}-{n}" for n in itertools.count(2)))
    return next(path for path in (folder / f"{one}{suffix}" for one in names) if not path.exists())


def _place(profile: Profile) -> dict:
    """Provenance of what is measured here and now. `measured_with` tells one way of measuring from another: a digest of
    this library and of the profile. A notebook that was saved, or a level that was added, changes neither."""
    made_of = {key: value for key, value in plain(profile.identity()).items() if key not in ("title", "protocols")}
    return collect() | {"measured_with": digest(json.dumps(made_of, sort_keys=True))}


def _manifest(path: Path) -> dict:
    if not (path / "run.json").is_file():
        recorded = ", ".join(sorted(p.name for p in (DATA / "recorded").glob("*") if p.is_dir())) or "none"
        raise BadInput(f"no run folder at {str(path)!r}: it has no run.json (recorded runs: {recorded})")
    remedy = "restore it from a copy of the run, or choose another --run folder"
    manifest = read_json(path / "run.json", remedy, ("schema", "profile"))
    if manifest.get("schema") != SCHEMA:
        raise BadInput(f"{path}/run.json has schema {manifest.get('schema')!r}; this version reads {SCHEMA}")
    return manifest
