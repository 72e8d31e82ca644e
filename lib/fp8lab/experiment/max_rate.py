"""Finds the highest rate at which a server meets an objective, by measuring levels around it."""

import itertools
import math

from ..config.profile import Level
from ..metrics.slo import DEFAULT, SLO, Bracket, attains, probe_requests, search
from ..results.evidence import evidence
from ..results.run_folder import Run
from ..server.launch import Server
from ..ui.status import StatusLine
from .speed import RecordedServer, load_test

# An INVALID probe is measured once more: what disturbed it may have passed.
_TRIES = 2


def find_max_rate(
    server: Server | RecordedServer,
    slo: SLO = DEFAULT,
    *,
    run: Run,
    start: float = 25.0,
    seconds: float = 20.0,
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
    run.check_profile(server.profile)  # before a level of the run counts, or is set aside

    def needed(rate: float) -> int:
        return max(probe_requests(slo), math.ceil(seconds * rate))

    def probe(rate: float) -> str:
        level = _free_level(server, rate, needed(rate), run)
        for _ in range(_TRIES):
            if level.id in run.summaries():
                run.set_aside(level.id)
            options = {"requests": level.requests, "repeat": level.repeat, "run": run, "workers": workers}
            result = load_test(server, rate=rate, **options)
            if result.valid or server.problem():
                break
        if not result.valid:
            StatusLine().done(
                f"{level.id}: INVALID, so the search ends here: {result.summary.invalid_reason}; mend the cause and "
                "search again: it begins with this level"
            )
            return "invalid"
        found = attains(result.records, slo)
        StatusLine().done(f"{level.id}: objective {found.state}: {found.reason}")
        return found.bound

    known = [
        (rate, found.bound)
        for rate, found in evidence(run).attainment(server.variant, slo)
        if found.bound != "undecided" or found.requests >= needed(rate)
    ]
    return search(probe, start, known=known, max_probes=max_probes)[0]


def _free_level(server: Server, rate: float, requests: int, run: Run) -> Level:
    """The level to probe `rate` with: the first repeat that `run` does not hold, or holds as INVALID, and that the profile
    does not plan with fewer `requests`."""
    planned = {level.id: level for levels in server.profile.protocols.values() for level in levels}
    held = run.summaries()
    for repeat in itertools.count(1):
        level = Level(variant=server.variant, rate=rate, requests=requests, repeat=repeat)
        level = planned.get(level.id, level)
        if level.requests >= requests and not (level.id in held and held[level.id].valid):
            return level
