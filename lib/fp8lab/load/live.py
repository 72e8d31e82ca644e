"""A level while it runs, in one line and as a small picture for a notebook cell: four traces that end as a static figure.

Drawn as plain SVG text: a plotting library would take the client's time from the requests.
"""

import base64
import html
import math
from dataclasses import dataclass

from ..ui.text import shown

_WIDTH, _HEIGHT, _GAP = 190, 64, 12
_POINTS = 240
# Four ticks of every worker: a shorter stretch counts what some of them sent and not the others.
_SAMPLE_S = 1.0


@dataclass(frozen=True)
class Progress:
    """A level while it runs; times in model seconds. `ttft_ms` is the mean so far, nan before the first token; `waiting`
    are the requests of a closed loop that are due and wait for a slot."""

    elapsed_s: float
    planned_s: float
    requests: int
    sent: int
    in_flight: int
    done: int
    failed: int
    tokens_per_s: float
    ttft_ms: float
    waiting: int = 0

    def __str__(self) -> str:
        left = f", {self.waiting:,} wait for a slot" if self.waiting else ""
        if self.sent < self.requests and (seconds := self.planned_s - self.elapsed_s) > 0:
            left += f", {seconds:.0f} s of arrivals left"
        failed = f", {self.failed} FAILED" if self.failed else ""
        return (
            f"{self.sent}/{self.requests} sent, {self.in_flight} in flight, {self.done} done{failed}, "
            f"{self.tokens_per_s:,.0f} tok/s, TTFT {shown(self.ttft_ms)} ms{left}"
        )


class LiveChart:
    """Collects a level's progress; `add` and `picture` return HTML with the traces so far."""

    def __init__(self, name: str):
        self._name = name
        self._at: list[float] = []
        self._series: dict[str, list[float]] = {"sent, requests/s": [], "in flight": [], "tokens/s": [], "TTFT, ms": []}
        self._last: Progress | None = None
        self._drawn = ""

    def add(self, progress: Progress) -> str:
        """Takes one more sample, if the last one is a second old; the picture with it."""
        if self._last and progress.elapsed_s - self._last.elapsed_s < _SAMPLE_S:
            return self._drawn
        last, self._last = self._last, progress
        if last:
            sent = (progress.sent - last.sent) / (progress.elapsed_s - last.elapsed_s)
            values = (sent, progress.in_flight, progress.tokens_per_s, progress.ttft_ms)
            self._at.append(progress.elapsed_s)
            for series, value in zip(self._series.values(), values, strict=True):
                series.append(float(value))
            if len(self._at) > _POINTS:  # every second sample says as much; the newest stays
                for series in (self._at, *self._series.values()):
                    del series[-2::-2]
        self._drawn = self.picture()
        return self._drawn

    def picture(self) -> str:
        """An `<img>` with its alternative text; empty before the second sample."""
        if not self._at:
            return ""
        panels = [self._panel(i * (_WIDTH + _GAP), *series) for i, series in enumerate(self._series.items())]
        width = 4 * _WIDTH + 3 * _GAP
        if "EMULATED" in self._name:
            mark = f'<text x="{width / 2}" y="{_HEIGHT * 0.8}" fill="#ccc" font-size="34" text-anchor="middle">EMULATED</text>'
            panels.insert(0, mark)
        svg = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {_HEIGHT + 18}" width="{width}" '
            f'font-family="sans-serif" font-size="11">{"".join(panels)}</svg>'
        )
        told = ", ".join(f"{name} {shown(values[-1])}" for name, values in self._series.items())
        alt = html.escape(f"{self._name} after {self._at[-1]:.0f} s: {told}", quote=True)
        data = base64.b64encode(svg.encode()).decode()
        return f'<img src="data:image/svg+xml;base64,{data}" alt="{alt}" style="max-width:100%">'

    def _panel(self, left: float, name: str, values: list[float]) -> str:
        # What is not known yet (TTFT before a first token) is no point of the line.
        known = [(at, value) for at, value in zip(self._at, values, strict=True) if not math.isnan(value)]
        most, end = max((value for _, value in known), default=math.nan), max(self._at[-1], 1e-9)
        top = (most or 1.0) * 1.1
        points = " ".join(
            f"{left + _WIDTH * at / end:.1f},{18 + _HEIGHT * (1 - value / top):.1f}" for at, value in known
        )
        return (
            f'<text x="{left}" y="11" fill="#222">{html.escape(name)}: {shown(values[-1])} (most {shown(most)})</text>'
            f'<line x1="{left}" y1="{18 + _HEIGHT}" x2="{left + _WIDTH}" y2="{18 + _HEIGHT}" stroke="#999"/>'
            f'<polyline points="{points}" fill="none" stroke="#0072B2" stroke-width="1.5"/>'
        )
