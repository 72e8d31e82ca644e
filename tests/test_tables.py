"""One table, three forms: what a page's form owes to readers who do not see it, or see little of it."""

import re

from fp8lab import ui
from fp8lab.ui import Table

TABLE = Table('Levels of "a" & <b>', ("", "req/s", "why"), [("bf16-50rps-r1", "39.5", "s" * 61), ("fp8", "–", "")])


def test_headers_name_rows_and_columns_and_none_is_empty():
    page = TABLE._repr_html_()
    assert re.findall(r'<th scope="(\w+)"[^>]*>([^<]*)</th>', page) == [
        ("col", "req/s"), ("col", "why"), ("row", "bf16-50rps-r1"), ("row", "fp8"),
    ]  # fmt: skip


def test_a_wide_table_scrolls_in_a_box_with_a_name_and_keeps_its_sentences_readable():
    page = TABLE._repr_html_()
    name = "Levels of &quot;a&quot; &amp; &lt;b&gt;"
    assert page.startswith(
        f'<div role="group" aria-label="{name}" tabindex="0" style="overflow-x:auto"><table><caption'
    )
    assert re.findall(r'min-width:12em">(\w+)</th>', page) == ["why"]


def test_a_number_and_its_unit_stay_on_one_line_in_a_page():
    table = Table("Use", ("level", "said"), [("fp8-weights-rust-infrps-r1", "60 % busy at 63 req/s; 5 samples")])
    assert (
        "60\xa0% busy at 63\xa0req/s; 5 samples" in table._repr_html_()
        and "\xa0" not in repr(table) + table.to_markdown()
    )
    assert 'white-space:nowrap">fp8-weights-rust-infrps-r1' in table._repr_html_()


def test_a_table_without_rows_says_so():
    assert Table("What", ("one", "two"), []).caption == "What: nothing to show"
    assert Table("What", ("one",), [("1",)]).caption == "What"


def test_a_table_is_as_wide_as_its_terminal(monkeypatch):
    """A row a line elsewhere; where wrapping leaves texts too little, a cell a line."""
    cells = ("C1", "FP8 raises output throughput by 60 %", "1.28×", "one reason after the other " * 9)
    table = Table("The published claims", ("", "claim", "this run", "reason"), [cells, cells])
    assert len(repr(table).splitlines()) == 5
    for columns in (200, 100, 40):
        monkeypatch.setattr(ui, "_room", lambda room=columns: room)
        told = repr(table).splitlines()
        assert max(map(len, told)) <= columns and set(" ".join(cells).split()) <= set(" ".join(told).split())
    assert told[1:4] == ["", "C1", "claim: FP8 raises output throughput by"]
