"""A table as a view of levels: what each column is called, which field it shows, and how its numbers are written."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from ...ui.table import Table
from ...ui.text import shown


@dataclass(frozen=True)
class Column:
    """`value` is a field of the frame, or a function of its row; `pattern` a format specification ("": text)."""

    title: str
    value: str | Callable[[Any], Any]
    pattern: str = ""

    def of(self, row) -> str:
        value = self.value(row) if callable(self.value) else getattr(row, self.value, None)
        return shown(value, self.pattern) if self.pattern or value is None else str(value)


def view(caption: str, frame: pd.DataFrame, columns: Sequence[Column]) -> Table:
    """The rows of `frame`, one line each."""
    # Objects, so that None stays None and a count a whole number.
    rows = frame.astype(object).where(frame.notna(), None).itertuples(index=False)
    titles = [column.title for column in columns]
    return Table(caption, titles, [[column.of(row) for column in columns] for row in rows])


LEVEL = Column("level", "level_id")
COUNTS = Column("measurement", lambda row: "VALID" if row.valid else "INVALID")
