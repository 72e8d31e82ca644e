"""One small table, for a notebook cell and for a terminal. Whatever its cells hold, it is shown as text."""

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass

from .text import visible

# A number, perhaps with a sign and a unit: "1,033", "-0.4", "63.15 req/s", "1.60×".
_NUMBER = re.compile(r"[+\-−~]?[\d.,/]+ ?[^\s\d]{0,8}")
_NUMERIC = "text-align:right;font-variant-numeric:tabular-nums"
_TEXT = "text-align:left;white-space:normal"


@dataclass(frozen=True)
class Table:
    """Rows under named columns, with a caption. Cells are shown as they are: format them before."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __post_init__(self):
        object.__setattr__(self, "caption", visible(self.caption))
        object.__setattr__(self, "rows", [tuple(visible(cell) for cell in row) for row in self.rows])

    def _numeric(self, column: int) -> bool:
        cells = [row[column] for row in self.rows if row[column] not in ("", "–")]
        return bool(cells) and all(_NUMBER.fullmatch(cell) for cell in cells)

    def _repr_html_(self) -> str:
        styles = [_NUMERIC if self._numeric(i) else _TEXT for i in range(len(self.columns))]

        def line(cells, tag):
            scope = ' scope="col"' if tag == "th" else ""
            pairs = zip(cells, styles, strict=True)
            return "<tr>" + "".join(f'<{tag}{scope} style="{s}">{html.escape(c)}</{tag}>' for c, s in pairs) + "</tr>"

        body = "".join(line(row, "td") for row in self.rows)
        caption = f'<caption style="text-align:left">{html.escape(self.caption)}</caption>'
        return f"<table>{caption}<thead>{line(self.columns, 'th')}</thead><tbody>{body}</tbody></table>"

    def to_markdown(self) -> str:
        def line(cells):
            return "| " + " | ".join(c.replace("|", "\\|").replace("\n", " ") for c in cells) + " |"

        rule = "|" + "|".join("---:" if self._numeric(i) else "---" for i in range(len(self.columns))) + "|"
        return "\n".join([line(self.columns), rule, *(line(row) for row in self.rows)])

    def __repr__(self) -> str:
        grid = [self.columns, *self.rows]
        widths = [max(len(row[i]) for row in grid) for i in range(len(self.columns))]
        right = [self._numeric(i) for i in range(len(self.columns))]

        def line(cells):
            padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True))
            return "  ".join(padded).rstrip()

        return "\n".join([self.caption, line(self.columns), line(["-" * w for w in widths]), *map(line, self.rows)])
