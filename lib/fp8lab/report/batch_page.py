"""The pages of a batch: every job with its state, and the levels and verdicts of all runs side by side."""

import html
import json
from dataclasses import replace
from pathlib import Path

from ..errors import Fp8labError
from ..results.evidence import evidence
from ..results.run_folder import Run, open_run
from ..ui.table import COUNTS, LEVEL, Column, Table, view
from .caption import card_mark, card_note
from .claims import claims_table
from .tables.levels import validity_table

_STATES = {"invalid": "done, with INVALID levels"}
_COLUMNS = (
    LEVEL, Column("req/s", "request_throughput", ",.1f"), Column("tok/s", "output_token_throughput", ",.0f"),
    Column("TTFT p99 ms", "p99_ttft_ms", ",.0f"), Column("TPOT ms", "mean_tpot_ms", ",.1f"),
    Column("J/token", "joules_per_output_token", ".3f"), COUNTS,
)  # fmt: skip


def has_invalid(run_dir: Path) -> bool:
    """Whether a level of the run is INVALID; False also for a run that cannot be read."""
    try:
        return not all(summary.valid for summary in open_run(source=run_dir).summaries().values())
    except Fp8labError:
        return False


def write_pages(folder: Path) -> None:
    """index.html (every job, its state and its page; which levels are INVALID, and the remedy) and comparison.html (all
    levels side by side)."""
    jobs = json.loads((folder / "queue.json").read_text())["jobs"]
    items, rows, verdicts, remedies = [], [], [], []
    for name, job in jobs.items():
        links = ", ".join(_links(folder, name, job["state"]))
        items.append(
            f"<tr><th scope='row'>{html.escape(name)}</th><td>{_STATES.get(job['state'], job['state'])}</td><td>{links or '–'}</td></tr>"
        )
        if not (folder / name / "run" / "run.json").is_file():
            continue
        try:
            run = open_run(source=folder / name / "run")
            rows += _levels_of(run, name)
            told = _named(claims_table(run), f"The published claims against {name}: {run.profile.title}", run)
            if job["state"] == "invalid":
                remedies.append(_named(validity_table(run), f"Does {name} count?", run))
        except Fp8labError as error:  # one damaged run must not end the others
            told = f"<p>Its run cannot be read: {html.escape(str(error))}</p>"
        verdicts.append(f"<h2>{html.escape(name)}</h2>{told}")
    head = "<tr><th scope='col'>job</th><th scope='col'>state</th><th scope='col'>pages</th></tr>"
    table = f"<table>{head}{''.join(items)}</table>"
    scrolling = f"<div role='group' aria-label='Jobs' tabindex='0' style='overflow-x:auto'>{table}</div>"
    index = f"<p><a href='comparison.html'>All levels side by side</a></p>{scrolling}{''.join(remedies)}"
    _write_page(folder / "index.html", f"Batch {folder.name}", index)
    columns = ("run", *(column.title for column in _COLUMNS))
    levels = (
        Table("Every level of every run", columns, rows)._repr_html_() if rows else "<p>Nothing is measured yet.</p>"
    )
    _write_page(folder / "comparison.html", f"Batch {folder.name}: comparison", levels + "".join(verdicts))


def _links(folder: Path, name: str, state: str) -> list[str]:
    """A job's pages; with them its log when it failed."""
    pages = [(page.stem, page) for page in sorted((folder / name / "run").glob("rendered/*.html"))]
    log = folder / name / "log.txt"
    if state == "failed" and log.is_file():
        pages.append(("log", log))
    return [f'<a href="{html.escape(str(page.relative_to(folder)))}">{html.escape(text)}</a>' for text, page in pages]


def _levels_of(run: Run, name: str) -> list[tuple[str, ...]]:
    mark = f" ({word})" if (word := card_mark(run)) else ""
    return [(f"{name}{mark}", *row) for row in view("", evidence(run).frame, _COLUMNS).rows]


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
