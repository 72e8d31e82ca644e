"""A matrix of runs, one after the other on each GPU, of this machine or of a Ray cluster, as a queue that survives a crash.

<batch folder>/queue.json           every job, its host and its state: waiting, running, done, invalid (done, with INVALID levels), failed
<batch folder>/<job>/profile.toml   what the job runs
<batch folder>/<job>/run/           its run folder, which resumes by itself
<batch folder>/<job>/log.txt        what its process said
<batch folder>/index.html           all jobs; comparison.html: their levels side by side; both as of the last job that ended
"""

import contextlib
import html
import itertools
import json
import sys
import threading
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from . import hosts
from .config.dimensions import cards
from .config.profile import Level, Profile
from .config.profile_file import read_changed, read_profile, with_paths
from .config.this_machine import check_environment, check_workload
from .errors import INVALID, BadInput, Fp8labError
from .experiment.speed import trace_for
from .hosts import Job, Lost, Place
from .paths import PLAIN_NAME, RUNS, RUNS_VARIABLE, made, repository_relative
from .report.claims import claims_table
from .report.levels import validity_table
from .report.notebooks import check_parameters, find
from .report.verdict import card_mark, card_note
from .results.evidence import evidence
from .results.files import write_json
from .results.run_folder import Run, open_run
from .system.locks import Lock
from .ui import COUNTS, LEVEL, Column, Table, toml, view

_LOOK_S = 0.5
# How often a job's host may be lost before the job is what ends them.
_LOSSES = 3
_KEYS = {"title", "profiles", "variants", "protocols", "notebook", "workloads"}

_COLUMNS = (
    LEVEL, Column("req/s", "request_throughput", ",.1f"), Column("tok/s", "output_token_throughput", ",.0f"),
    Column("TTFT p99 ms", "p99_ttft_ms", ",.0f"), Column("TPOT ms", "mean_tpot_ms", ",.1f"),
    Column("J/token", "joules_per_output_token", ".3f"), COUNTS,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """What a batch runs: every profile with every workload, a run each; in it the variants, one after the other."""

    name: str
    profiles: tuple[str, ...]
    variants: tuple[str, ...] = ()
    protocols: tuple[str, ...] = ("as published", "equal load")
    notebook: str = "front"
    workloads: Mapping[str, Mapping] = field(default_factory=lambda: {"": {}})

    def jobs(self) -> list[tuple[str, str, Mapping]]:
        """(job's name, profile, workload), in order."""
        pairs = [(profile, name) for profile in self.profiles for name in self.workloads]
        names = [f"{Path(one).stem}-{name}" if name else Path(one).stem for one, name in pairs]
        return [(job, one, self.workloads[name]) for job, (one, name) in zip(names, pairs, strict=True)]


def load_matrix(path: Path) -> Matrix:
    """Reads and checks a matrix. Raises BadInput for whatever could only fail hours later."""
    try:
        table = tomllib.loads(path.read_text("utf-8-sig"))
    except OSError:
        raise BadInput(f"no matrix at {str(path)!r}; `fp8lab batch --help` shows one") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: not valid TOML: {error}") from None
    if unknown := set(table) - _KEYS:
        raise BadInput(f"{path}: unknown keys {sorted(unknown)}; known: {sorted(_KEYS)}")
    if not table.get("profiles"):
        raise BadInput(f'{path}: name at least one profile: profiles = ["emulated-h100"]')
    table.pop("title", None)
    for key in ("profiles", "variants", "protocols"):
        if not (isinstance(names := table.get(key, []), list) and all(isinstance(name, str) for name in names)):
            raise BadInput(f"{path}: {key}: expected a list of names in quotes, not {names!r}")
    if not isinstance(table.get("notebook", ""), str):
        raise BadInput(f"{path}: notebook: expected a name in quotes, not {table['notebook']!r}")
    # A profile's file is named relative to the matrix, and so is a workload's trace.
    named = table.pop("profiles")
    profiles = tuple(str((path.parent / one).resolve()) if one.endswith(".toml") else one for one in named)
    workloads = table.pop("workloads", {"": {}})
    if not isinstance(workloads, dict) or not all(isinstance(one, dict) for one in workloads.values()):
        raise BadInput(f"{path}: workloads: expected a table for each: [workloads.NAME]")
    if odd := [name for name in workloads if name and not PLAIN_NAME.fullmatch(name)]:
        raise BadInput(f"{path}: workload {odd[0]!r} is no name: letters, digits, '.', '_' and '-', at most 64")
    folder = path.absolute().parent
    table["workloads"] = {k: with_paths({"workload": one}, folder)["workload"] for k, one in workloads.items()}
    lists = {key: tuple(table[key]) for key in ("variants", "protocols") if key in table}
    matrix = Matrix(name=path.stem, profiles=profiles, **table | lists)
    for notebook in find(matrix.notebook):
        check_parameters(notebook, {"protocols": list(matrix.protocols)})
    names = [name for name, _, _ in matrix.jobs()]
    if len(set(names)) < len(names):
        raise BadInput(f"{path}: two profiles have the same name: {', '.join(sorted(names))}")
    for profile, name in itertools.product(matrix.profiles, matrix.workloads):
        levels = [level for one in _levels(matrix, profile).values() for level in one]
        where = f"workloads.{name}" if name else "workloads"
        changed = read_changed(profile, {"workload": dict(matrix.workloads[name])}, path, where)
        check_environment(changed)
        try:
            check_workload(changed)
            if levels:
                trace_for(changed, max(levels, key=lambda level: level.requests))
        except BadInput as error:
            raise BadInput(f"{path}: {where}, with profile {changed.name}: {error}") from None
    return matrix


def run_batch(matrix: Matrix, folder: Path | None = None, *, ray: str = "") -> int:
    """Runs what is not done yet, on this machine or, with the address `ray`, on the hosts of that Ray cluster; returns 0 when
    every job is done, 1 when one failed, 3 when none did but a level is INVALID. Raises KeyboardInterrupt; BadInput when a job
    takes more cards than a host has. A job with INVALID levels runs again only once they are measured again and valid, to draw
    its pages anew: what they need is told by its page."""
    folder = (folder or RUNS / f"batch-{matrix.name}").resolve()
    made(folder, f"choose another --out folder, or name one for all runs in the variable {RUNS_VARIABLE}")
    with Lock(folder / ".lock", f"batch folder {repository_relative(folder)}"):
        return _run(matrix, folder, ray)


def _run(matrix: Matrix, folder: Path, ray: str) -> int:
    places = hosts.ray_hosts(ray, folder) if ray else [hosts.ThisMachine()]
    jobs = [_job(matrix, folder / name, name, profile, workload) for name, profile, workload in matrix.jobs()]
    most = max(place.cards for place in places)
    if large := [job for job in jobs if job.cards > most]:
        raise BadInput(f"job {large[0].name} takes {large[0].cards} GPUs on one host, and none has more than {most}")
    queue = _Queue(folder, jobs, places)
    # As many jobs at a time as a host has cards; without a GPU it is one.
    workers = [
        threading.Thread(target=_work, args=(queue, place), daemon=True) for place in places for _ in range(place.cards)
    ]
    _draw(folder)
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    except KeyboardInterrupt:
        # A Ctrl-C has reached the jobs as well; a signal to this process alone has not.
        queue.closed = True
        for worker in workers:
            worker.join()
        raise
    if left := [name for name, job in queue.jobs.items() if job["state"] == "waiting"]:
        print(f"not run, no host that could is left: {', '.join(left)}", file=sys.stderr, flush=True)
    print(repository_relative(folder / "index.html"))
    return queue.exit_code()


def _job(matrix: Matrix, folder: Path, name: str, profile: str, workload: Mapping) -> Job:
    """A job with its folder and, in it, its profile."""
    changed = _profile(matrix, profile, workload, name)
    folder.mkdir(exist_ok=True)
    (folder / "profile.toml").write_text(_text(changed))
    variants = {level.variant for levels in changed.protocols.values() for level in levels}
    most = max((cards(changed.flags(variant)) for variant in variants), default=1) if changed.device == "cuda" else 1
    arguments = ("reproduce", "--notebook", matrix.notebook, "-p", "protocols", toml(list(matrix.protocols)))
    return Job(name, folder, arguments, most)


class _Queue:
    """The jobs and their states; every change is on disk before it counts."""

    def __init__(self, folder: Path, jobs: Sequence[Job], places: Sequence[Place]):
        self.folder, self.places = folder, places
        self.asked = {job.name: job for job in jobs}
        self._lock = threading.Lock()
        self.closed = False  # once True no job is taken any more, and those that run are asked to end
        held = {}
        # A damaged one begins anew.
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
            noted = json.loads((folder / "queue.json").read_text())["jobs"].items()
            held = {name: job for name, job in noted if isinstance(job, dict)}
        # What was running when the last batch ended is run again: its run folder knows how far it came.
        # What has INVALID levels is not, unless they have been measured again since: its pages are then drawn anew.
        self.jobs = {name: held.get(name, {}) for name in self.asked}
        for name, job in self.jobs.items():
            state = job.get("state")
            if state != "done" and not (state == "invalid" and has_invalid(folder / name / "run")):
                self.jobs[name] = {"state": "waiting"}
        self._store()

    def take(self, place: Place) -> tuple[Job, int, list[int]] | None:
        """The next job for `place`, its place in the order of beginning, and the cards that it has; None as long as there is
        none, or while the next one's cards are not free: smaller ones do not overtake it for ever."""
        with self._lock:
            waiting = [name for name, job in self.jobs.items() if job["state"] == "waiting"]
            fitting = [name for name in waiting if self.asked[name].cards <= place.cards]
            if self.closed or not fitting or not place.alive or self.asked[fitting[0]].cards > len(place.free):
                return None
            job = self.asked[fitting[0]]
            mine, place.free = place.free[: job.cards], place.free[job.cards :]
            host = {"host": place.name} if place.name else {}
            self._set(job.name, **self.jobs[job.name] | {"state": "running"} | host)
            return job, len(self.jobs) - len(waiting) + 1, mine

    def put_back(self, name: str, place: Place, mine: Sequence[int]) -> bool:
        """A job whose host was lost waits again; False when that has happened too often."""
        with self._lock:
            place.free += mine
            lost = self.jobs[name].get("lost", 0) + 1
            if lost < _LOSSES:
                self._set(name, state="waiting", lost=lost)
            return lost < _LOSSES

    def finish(self, name: str, exit_code: int, place: Place | None = None, mine: Sequence[int] = ()) -> int:
        """Notes how a job ended, in the pages too; returns how many have."""
        # Within the lock: jobs that end together write the same pages.
        with self._lock:
            if place:
                place.free += mine
            state = {0: "done", INVALID: "invalid"}.get(exit_code, "failed")
            self._set(name, **self.jobs[name] | {"state": state, "exit_code": exit_code})
            _draw(self.folder)
            return sum(job["state"] in ("done", "invalid", "failed") for job in self.jobs.values())

    def exit_code(self) -> int:
        """What the batch ends with: 0 when all jobs are done, 1 when one is not, 3 when the worst is an INVALID level."""
        states = {job["state"] for job in self.jobs.values()}
        return 1 if states - {"done", "invalid"} else INVALID if "invalid" in states else 0

    @property
    def unfinished(self) -> bool:
        """Whether a job runs, and may yet have to be run again, or waits for a host that there is."""
        with self._lock:
            most = max((place.cards for place in self.places if place.alive), default=0)
            states = ((name, job["state"]) for name, job in self.jobs.items())
            left = [s == "running" or (s == "waiting" and self.asked[name].cards <= most) for name, s in states]
            return any(left) and not self.closed

    def _set(self, name: str, **job) -> None:
        self.jobs[name] = job
        self._store()

    def _store(self) -> None:
        write_json(self.folder / "queue.json", {"jobs": self.jobs})


def _draw(folder: Path) -> None:
    """Writes the pages; whatever fails in them, the queue goes on: pages can be written again."""
    try:
        write_pages(folder)
    except Exception as error:
        print(f"the pages of {folder.name} were not written: {error!r}", file=sys.stderr, flush=True)


def _work(queue: _Queue, place: Place) -> None:
    """Takes jobs for a host until none is left. A job is a process of its own, so that its end leaves nothing behind."""
    while queue.unfinished and place.alive:
        if not (taken := queue.take(place)):
            time.sleep(_LOOK_S)  # what others run may come back
            continue
        job, number, mine = taken
        on = f" on {place.name}" if place.name else ""
        print(f"[{number}/{len(queue.jobs)}] {job.name}{on}", file=sys.stderr, flush=True)
        try:
            exit_code = place.run(job, mine, lambda: queue.closed)
        except Lost as lost:
            again = queue.put_back(job.name, place, mine)
            said = "it runs again on another host" if again else f"and was {_LOSSES} times: it is not run again"
            print(f"{job.name}: {lost}; {said}", file=sys.stderr, flush=True)
            if again:
                continue
            exit_code, mine = 1, []
        except Exception as error:  # one job's trouble must not end the others
            said = error if isinstance(error, Fp8labError) else repr(error)
            print(f"{job.name}: {said}", file=sys.stderr, flush=True)
            exit_code = 1
        ended = queue.finish(job.name, exit_code, place, mine)
        how = {0: "done", INVALID: f"done, with INVALID levels; what to do: {queue.folder / 'index.html'}"}
        how = how.get(exit_code, f"FAILED with exit code {exit_code}; its log: {job.folder / 'log.txt'}")
        print(f"{job.name} {how} ({ended} of {len(queue.jobs)} ended)", file=sys.stderr, flush=True)


def _levels(matrix: Matrix, profile: str) -> dict[str, list[Level]]:
    read = read_profile(profile)
    for variant in matrix.variants:
        read.variant(variant)
    chosen = matrix.variants or read.variants
    return {name: [level for level in read.levels(name) if level.variant in chosen] for name in matrix.protocols}


def _profile(matrix: Matrix, profile: str, workload: Mapping, name: str) -> Profile:
    """`profile` with the job's workload and levels."""
    changed = read_changed(profile, {"workload": dict(workload)}, "matrix", "workloads")
    chosen = _levels(matrix, profile).items()
    levels = {protocol: tuple(replace(level, cross_check=False) for level in levels) for protocol, levels in chosen}
    return replace(changed, title=f"{changed.title} ({name})", protocols=levels)


def _text(profile: Profile) -> str:
    """A profile as TOML that needs no other profile; the files that it names (traces, models) have to be where it is read."""
    held = {key: value for key, value in profile.as_dict().items() if value is not None and key != "name"}
    return "".join(f"{key} = {toml(value)}\n" for key, value in held.items())


def has_invalid(run_dir: Path) -> bool:
    """Whether a level of the run is INVALID; False also for a run that cannot be read."""
    try:
        return not open_run(source=run_dir).valid
    except Fp8labError:
        return False


def write_pages(folder: Path) -> None:
    """index.html (every job, its state and its page; which levels are INVALID, and the remedy) and comparison.html (all
    levels side by side)."""
    jobs = json.loads((folder / "queue.json").read_text())["jobs"]
    items, rows, verdicts, remedies = [], [], [], []
    several = any("host" in job for job in jobs.values())
    for name, job in jobs.items():
        links = ", ".join(_links(folder, name, job["state"]))
        state = "done, with INVALID levels" if job["state"] == "invalid" else job["state"]
        cells = [state, *([job.get("host", "–")] if several else []), links or "–"]
        row = "".join(f"<td>{cell}</td>" for cell in cells)
        items.append(f"<tr><th scope='row'>{html.escape(name)}</th>{row}</tr>")
        if not (folder / name / "run" / "run.json").is_file():
            continue
        try:
            run = open_run(source=folder / name / "run")
            mark = f" ({word})" if (word := card_mark(run)) else ""
            rows += [(f"{name}{mark}", *row) for row in view("", evidence(run).frame, _COLUMNS).rows]
            told = _named(claims_table(run), f"The published claims against {name}: {run.profile.title}", run)
            if job["state"] == "invalid":
                remedies.append(_named(validity_table(run), f"Does {name} count?", run))
        except Fp8labError as error:  # one damaged run must not end the others
            told = f"<p>Its run cannot be read: {html.escape(str(error))}</p>"
        verdicts.append(f"<h2>{html.escape(name)}</h2>{told}")
    titles = ("job", "state", *(["host"] if several else []), "pages")
    head = f"<tr>{''.join(f'<th scope=col>{title}</th>' for title in titles)}</tr>"
    table = f"<table>{head}{''.join(items)}</table>"
    scrolling = f"<div role='group' aria-label='Jobs' tabindex='0' style='overflow-x:auto'>{table}</div>"
    index = f"<p><a href='comparison.html'>All levels side by side</a></p>{scrolling}{''.join(remedies)}"
    _write_page(folder / "index.html", f"Batch {folder.name}", index)
    columns = ("run", *(column.title for column in _COLUMNS))
    every = Table("Every level of every run", columns, rows)
    levels = every._repr_html_() if rows else "<p>Nothing is measured yet.</p>"
    _write_page(folder / "comparison.html", f"Batch {folder.name}: comparison", levels + "".join(verdicts))


def _links(folder: Path, name: str, state: str) -> list[str]:
    """A job's pages; with them its log when it failed."""
    pages = [(page.stem, page) for page in sorted((folder / name / "run").glob("rendered/*.html"))]
    log = folder / name / "log.txt"
    if state == "failed" and log.is_file():
        pages.append(("log", log))
    return [f'<a href="{html.escape(str(page.relative_to(folder)))}">{html.escape(text)}</a>' for text, page in pages]


def _named(table: Table, caption: str, run: Run) -> str:
    """A table of a job's run as HTML; every run's folder has the same name, so the job's stands in its caption."""
    return replace(table, caption=f"{card_note(run)}{caption}")._repr_html_()


def _write_page(path: Path, title: str, body: str) -> None:
    style = (
        "body{font:16px/1.5 sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}"
        "h1{overflow-wrap:anywhere}"
        "table{border-collapse:collapse;margin:1.5rem 0}th,td{padding:.3rem .7rem;border-bottom:1px solid #ccc;text-align:left}"
        "@media(max-width:40rem){td,th{vertical-align:top}th[style*=min-width]{min-width:22em!important}}"
        "@page{size:A4 landscape;margin:14mm}"
        "@media print{*{overflow:visible!important}tr{break-inside:avoid}table{font-size:7pt}th{min-width:0!important}}"
    )
    path.write_text(
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{style}</style></head>'
        f"<body><main><h1>{html.escape(title)}</h1>{body}</main></body></html>\n"
    )
