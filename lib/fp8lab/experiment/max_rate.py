"""Finds the highest rate at which a server meets an objective, by measuring levels around it."""

import itertools
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from ..config.profile import Level, rate_name
from ..errors import BadInput
from ..metrics.slo import DEFAULT, SLO, Attainment, Bracket, attains, bracket, probe_requests, required_requests, search
from ..metrics.summary import Summary
from ..paths import writing
from ..results.evidence import evidence
from ..results.files import read_json, read_parquet, write_json, write_tables
from ..results.run_folder import LevelResult, Run, a_run
from ..server.launch import Server
from ..ui import StatusLine
from .speed import RecordedServer, a_server, load_test

# A probe goes on for at least so long.
_SECONDS = 20.0
# An INVALID probe is measured once more: what disturbed it may have passed.
_TRIES = 2
# How a request fails that the endpoint is not to blame for: the client lost it, or could not open a connection for it.
_CLIENTS_FAULT = r"^lost: |^not sent: |open files"


def find_max_rate(
    server: Server | RecordedServer,
    slo: SLO = DEFAULT,
    *,
    run: Run,
    start: float = 25.0,
    seconds: float = _SECONDS,
    max_probes: int = 8,
    workers: int | None = None,
) -> Bracket:
    """Searches the highest rate at which `server` meets `slo`; returns the bracket that it lies in, at best 5 % wide.

    Every probe is a level of `run`, of at least `seconds` and of as many requests as its percentile needs. The search goes
    on from all levels that the run holds of the variant, an interrupted search's among them; the bracket is that of
    `slo_table`. `start` is the first rate where they say nothing. A probe that is INVALID is set aside and measured once
    more; if it is INVALID again the search ends, and the next one begins with it. A level that was too short to tell is
    left as it is: its rate is measured with the next repeat, or with a longer `seconds`. From a recorded run the bracket is
    that of its levels.
    """
    if isinstance(server, RecordedServer):
        return evidence(server.run).slo_limit(server.variant, slo)
    a_run(run).check_profile(a_server(server).profile)  # before a level of the run counts, or is set aside

    def needed(rate: float) -> int:
        return max(probe_requests(slo), math.ceil(seconds * rate))

    def probe(rate: float) -> str:
        level = _free_level(server, rate, needed(rate), run)

        def measured() -> tuple[Summary, Attainment | None]:
            if level.id in run.summaries():
                run.set_aside(level.id)
            options = {"requests": level.requests, "repeat": level.repeat, "run": run, "workers": workers}
            result = load_test(server, rate=rate, **options)
            return result.summary, attains(result.records, slo) if result.summary.valid else None

        return _probe(level.id, measured, lambda summary: server.problem())

    known = _known(evidence(run).attainment(server.variant, slo), needed)
    return search(probe, start, known=known, max_probes=max_probes)[0]


def _known(found: Iterable[tuple[float, Attainment]], needed: Callable[[float], int]) -> list[tuple[float, str]]:
    """What `search` need not probe: not the rates that were measured with too few requests to tell."""
    return [(rate, one.bound) for rate, one in found if one.bound != "undecided" or one.requests >= needed(rate)]


def _probe(
    name: str, measured: Callable[[], tuple[Summary, Attainment | None]], hopeless: Callable[[Summary], object]
) -> str:
    """Measures one rate, once more if that does not count (None) and is not `hopeless`; says what came of it, and returns
    what `search` wants of a probe."""
    for _ in range(_TRIES):
        summary, found = measured()
        if found or hopeless(summary):
            break
    if not found:
        StatusLine().done(
            f"{name}: INVALID, so the search ends here: {summary.invalid_reason}; mend the cause and "
            "search again: it begins with this level"
        )
        return "invalid"
    StatusLine().done(f"{name}: objective {found.state}: {found.reason}")
    return found.bound


class Probed(NamedTuple):
    """A rate that was measured at an endpoint, and what its level says of the objective (None: it does not count)."""

    rate: float
    summary: Summary
    found: Attainment | None


def check_requests(requests: int, slo: SLO) -> None:
    """Raises BadInput for so few that they cannot show the objective met."""
    if requests < (fewest := required_requests(0, slo.share)):
        raise BadInput(
            f"{requests} requests cannot show that {100 * slo.share:.4g}% meet an objective: at least {fewest} can"
        )


def find_endpoint_max_rate(
    measure: Callable[[str, float, int, int], LevelResult],
    slo: SLO,
    folder: Path,
    *,
    start: float,
    requests: int | None,
    max_probes: int,
) -> tuple[Bracket, list[Probed]]:
    """The same search at any endpoint: (the bracket, all rates that `folder` then holds, ascending).

    `measure(name, rate, requests, number)` measures one level, the `number`-th of the folder. A probe has `requests`
    (`check_requests`), or, None, as many as arrive in 20 s, at least as many as its percentile needs. Each is stored in
    `folder` as `RATErps/`, an INVALID one is set aside when its rate is measured again, and what the folder holds counts, for
    `max_probes` too: an interrupted search goes on where it stopped. Unlike at a server of ours, requests that the endpoint
    refuses are its answer to the load, and miss the objective, as long as any completes.
    """

    def needed(rate: float) -> int:
        return requests or max(probe_requests(slo), math.ceil(_SECONDS * rate))

    def probe(rate: float) -> str:
        rate = float(f"{rate:g}")
        name = f"probe {len(list(folder.glob('*rps/'))) + 1} of at most {max_probes}, {rate_name(rate)}"

        def measured() -> tuple[Summary, Attainment | None]:
            target = folder / f"{rate:g}rps"
            number = len(list(folder.glob("*rps*")))
            if target.exists():  # what is left of an earlier try
                names = (target.with_name(f"{target.name}-set-aside-{n}") for n in itertools.count(1))
                with writing(target):
                    target.rename(next(path for path in names if not path.exists()))
            result = measure(name, rate, needed(rate), number)
            with writing(target):
                target.mkdir(parents=True)
            write_tables(target, records=result.records, tokens=result.tokens)
            write_json(target / "summary.json", result.summary)
            return result.summary, _counts(result.summary, result.records, slo)

        return _probe(name, measured, lambda summary: not summary.completed)

    known = _known(((one.rate, one.found) for one in held(folder, slo) if one.found), needed)
    if (left := max_probes - len(known)) > 0:
        search(probe, start, known=known, max_probes=left)
    probed = held(folder, slo)
    return bracket((one.rate, one.found.bound) for one in probed if one.found), probed


def held(folder: Path, slo: SLO) -> list[Probed]:
    """The probes that `folder` holds whole, ascending. Raises RunDamaged for one that cannot be read."""
    probed = []
    for path in folder.glob("*rps/summary.json"):
        again = f"move {path.parent.name}/ away and run the same command again: it is measured anew"
        summary = Summary.read(read_json(path, again, ("valid", "requests", "completed", "failed")))
        records = read_parquet(path.with_name("records.parquet"), again, ("sent_s", "first_token_s", "error"))
        probed.append(Probed(float(path.parent.name.removesuffix("rps")), summary, _counts(summary, records, slo)))
    return sorted(probed, key=lambda one: one.rate)


def _counts(summary: Summary, records: pd.DataFrame, slo: SLO) -> Attainment | None:
    """What a level says of `slo`, None when it does not count. One that is INVALID for what the endpoint refused does, as a
    miss: whether the client was late then makes no difference."""
    found = attains(records, slo)
    refused = records["error"].notna() & ~records["error"].fillna("").str.contains(_CLIENTS_FAULT)
    missed = summary.completed and found.state == "missed" and refused.sum() > (1 - slo.share) * len(records)
    return found if summary.valid or missed else None


def _free_level(server: Server, rate: float, requests: int, run: Run) -> Level:
    """The level to probe `rate` with: the first repeat that `run` holds no VALID one of, nor the profile plans with fewer requests."""
    planned = {level.id: level for levels in server.profile.protocols.values() for level in levels}
    held = run.summaries()
    for repeat in itertools.count(1):
        level = Level(variant=server.variant, rate=rate, requests=requests, repeat=repeat)
        level = planned.get(level.id, level)
        if level.requests >= requests and not (level.id in held and held[level.id].valid):
            return level
