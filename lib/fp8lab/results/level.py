"""What a level came to, as it is stored and shown."""

from dataclasses import dataclass

import pandas as pd

from ..config.profile import Level, rate_name
from ..metrics.summary import Summary
from ..ui.table import Table
from ..ui.text import shown


@dataclass(frozen=True)
class LevelResult:
    """A measured level: its summary and records. Shown as a table in a notebook."""

    level: Level
    summary: Summary
    records: pd.DataFrame
    tokens: pd.DataFrame | None
    telemetry: pd.DataFrame | None = None

    @property
    def valid(self) -> bool:
        return self.summary.valid

    def _table(self) -> Table:
        s = self.summary

        def show(key, pattern=",.0f", unit=""):
            return shown(getattr(s, key), pattern, unit)

        rows = [
            ("completed", f"{s.completed:,} of {s.requests:,}"),
            ("request throughput", show("request_throughput", ",.2f", " req/s")),
            ("output throughput, whole run", show("output_token_throughput", unit=" tok/s")),
            ("output throughput, steady state", show("steady_output_token_throughput", unit=" tok/s")),
            ("peak concurrent requests", show("peak_concurrent_requests_vllm")),
            ("TTFT mean / p99", f"{show('mean_ttft_ms')} / {show('p99_ttft_ms', unit=' ms')}"),
            *(
                [("first answer token mean / p99", f"{show('mean_ttfo_ms')} / {show('p99_ttfo_ms', unit=' ms')}")]
                if s.mean_ttfo_ms
                else []
            ),
            ("TPOT mean / p99", f"{show('mean_tpot_ms', ',.1f')} / {show('p99_tpot_ms', ',.1f', ' ms')}"),
            ("the measurement is", "VALID" if self.valid else f"INVALID: {s.invalid_reason}"),
            *(("note", note) for note in s.notes),
        ]
        emulated = " (EMULATED GPU)" if s.emulated else ""
        return Table(f"{self.level.variant} at {rate_name(self.level.rate)}{emulated}", ("", "value"), rows)

    def __repr__(self) -> str:
        return repr(self._table())

    def _repr_html_(self) -> str:
        return self._table()._repr_html_()
