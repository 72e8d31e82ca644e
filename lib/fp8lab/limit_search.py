"""Finds the highest rate at which a server meets an objective, by measuring levels around it."""

import math

from .experiment import RecordedServer, load_test
from .measure import capacity
from .profiles import Level
from .progress import StatusLine
from .report.capacity import attainment
from .report.evidence import evidence
from .runs import Run
from .server.launch import Server


def find_limit(
    server: Server | RecordedServer,
    slo: capacity.SLO = capacity.DEFAULT,
    *,
    run: Run,
    start: float = 25.0,
    seconds: float = 20.0,
    max_probes: int = 8,
    workers: int | None = None,
) -> capacity.Bracket:
    """Searches the highest rate at which `server` meets `slo`; returns the bracket that it lies in, at best 5 % wide.

    Every probe is a level of `run`, of at least `seconds` and of as many requests as its percentile needs, so that
    an interrupted search goes on where it stopped. From a recorded run the bracket is that of its levels.
    """
    if isinstance(server, RecordedServer):
        return capacity.bracket(attainment(evidence(server.run), server.variant, slo))

    def probe(rate: float) -> str:
        level = Level(variant=server.variant, rate=rate, requests=1)
        held = run.summaries().get(level.id)
        # A level that is there already counts as it was measured.
        needed = max(capacity.required_requests(1, slo.share), math.ceil(seconds * rate))
        requests = held["level"]["requests"] if held else needed
        result = load_test(server, rate=rate, requests=requests, run=run, workers=workers)
        if not result.valid:
            StatusLine().done(f"{level.id}: INVALID, so the search ends here: {result.summary['invalid_reason']}")
            return "invalid"
        found = capacity.attains(result.records, slo)
        StatusLine().done(f"{level.id}: objective {found.state}: {found.reason}")
        return found.state

    return capacity.search(probe, start, max_probes=max_probes)[0]
