"""The notebooks as users run them, through papermill: the front one on real vLLM servers with the emulated GPU, the steps
on a stand-in for vLLM."""

import itertools
import json
import re
import subprocess
import sys

import nbformat
import pytest

from conftest import SHORT
from fp8lab.commands import _default_notebook
from fp8lab.errors import BadInput
from fp8lab.report import notebooks
from fp8lab.results.run_folder import open_run

ALL = [notebooks.FRONT, *sorted(notebooks.STEPS.glob("*.ipynb"))]
FRONT_FIGURES = notebooks.FRONT.read_text().count("_figure(")


def reproduce(*arguments, timeout=900):
    command = [sys.executable, "-m", "fp8lab.cli", "reproduce", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The front notebook on the short profile, measured once; (run folder, finished process)."""
    folder = tmp_path_factory.mktemp("front")
    (folder / "short.toml").write_text(SHORT)
    done = reproduce("--profile", folder / "short.toml", "--run", folder / "run")
    assert done.returncode == 0, done.stderr
    return folder / "run", done


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_notebooks_keep_the_house_rules(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code[0].metadata.tags == ["parameters"]
    assert max(len(cell.source.splitlines()) for cell in code) <= 12
    assert notebook.metadata.kernelspec.name == "python3"
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    levels = [len(marks) for marks in re.findall(r"^(#+) ", text, re.MULTILINE)]
    assert levels.count(1) == 1 and levels[0] == 1
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels))


def test_the_front_notebook_tells_the_whole_story(measured):
    run_dir, done = measured
    page = (run_dir / "rendered" / "project_reproduce.html").read_text()
    figures = re.findall(r'<figure><img alt="([^"]+)" src="data:image/svg\+xml;base64,', page)
    assert len(figures) == FRONT_FIGURES >= 4 and all(len(alt) > 40 for alt in figures)
    others = 3  # the number line is arithmetic, the worth of FP8 and the clocks are told by the recorded runs
    assert len(re.findall(r"<figcaption>EMULATED GPU", page)) == FRONT_FIGURES - others
    assert "EMULATED GPU, nothing measured. The published claims" in page
    claims = json.loads((run_dir / "claims.json").read_text())["claims"]
    assert [claim["id"] for claim in claims] == [
        "C1",
        "C2",
        "C3",
        "C4",
        "M1",
        "B1",
        "B2",
        "B3",
        "B4",
        "R1",
        "R2",
        "R3",
        "R4",
        "R5",
        "Q1",
    ]
    for claim in claims[:4]:
        assert claim["verdict"] == "not run" and "EMULATED" in claim["reason"] and claim["measured"] > 0
        assert claim["protocol"] == "as published" and claim["unit"]
    assert "C1" in done.stdout and "project_reproduce.html" in done.stdout
    assert "bf16 ready after" in done.stderr  # the kernel's progress reaches the terminal


def test_the_page_asks_no_other_host(measured):
    page = (measured[0] / "rendered" / "project_reproduce.html").read_text()
    fetched = re.findall(r'<(?:script|img|link|iframe)[^>]*(?:src|href)="(?!data:)([^"#]+)"', page)
    assert fetched == [] and "@import" not in page


def test_the_servers_were_vllm(measured):
    run_dir, _ = measured
    for variant, tokens in (("bf16", 431_568), ("fp8", 969_648)):
        log = (run_dir / "logs" / f"{variant}.log").read_text()
        assert "Initializing a V1 LLM engine" in log and f"KV cache size: {tokens:,} tokens" in log
        assert "EMULATED GPU" in log and "Application startup complete" in log


def test_measuring_again_measures_nothing(measured):
    run_dir, _ = measured
    before = {path: path.stat().st_mtime_ns for path in run_dir.glob("levels/*/summary.json")}
    done = reproduce("--run", run_dir, timeout=120)
    assert done.returncode == 0 and "ready after" not in done.stderr
    assert before == {path: path.stat().st_mtime_ns for path in run_dir.glob("levels/*/summary.json")}


def test_a_recorded_run_is_redrawn_and_left_alone(measured, tmp_path):
    """The front notebook: see below."""
    run_dir, _ = measured
    before = {path: path.read_bytes() for path in [*run_dir.glob("levels/*/*"), *ALL]}
    for name in ("03", "06"):  # they would measure
        (step,) = notebooks.find(name)
        page = notebooks.execute(step, tmp_path / step.name, {"source": str(run_dir)} | short_load(step)).read_text()
        assert "<table" in page and "recorded" not in (run_dir / "run.json").read_text()
    assert before == {path: path.read_bytes() for path in before}


@pytest.mark.servers
@pytest.mark.parametrize(
    ("step", "source"),
    [("08", "h100-80gb-unseal"), ("09", "h200-80gb-recipes"), ("10", "h200-80gb-x2-8b"), ("10", "h200-80gb-x4-70b")],
)
def test_what_was_recorded_on_cards_is_drawn_without_one(step, source, tmp_path):
    (notebook,) = notebooks.find(step)
    page = notebooks.execute(notebook, tmp_path / notebook.name, {"source": source}).read_text()
    assert "Traceback" not in page and page.count("<table") > 5


@pytest.mark.parametrize(
    ("source", "name"),
    [("h200-80gb", "front"), ("h100-80gb-long-prompts", "front"), ("h100-80gb-unsealed", "08_unseal"),
     ("h100-80gb-azure-conv", "08_unseal"), ("h100-80gb-recipes", "09_recipes"), ("h200-80gb-x2-32b", "10_more_cards"),
     ("h100-80gb-rust", "05_fair_comparison"), ("smollm2-h200", "07_quality")],
)  # fmt: skip
def test_a_run_is_drawn_by_the_notebook_that_has_something_to_show(source, name):
    assert _default_notebook(open_run(source=source)) == name


@pytest.mark.servers
def test_what_a_cell_refuses_leaves_no_page(tmp_path):
    (step,) = notebooks.find("02")
    with pytest.raises(BadInput, match="no variant 'bf16' in profile h200-80gb-x4-70b"):
        notebooks.execute(step, tmp_path / step.name, {"source": "h200-80gb-x4-70b"})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", [
    "import fp8lab", '{"cells": [', '{"a": 1}', "[1]", "root:x:0:0::/root:/bin/sh",
    '{"nbformat": 4, "nbformat_minor": 4, "metadata": {}, "cells": [{"cell_type": "code"}]}',
    '{"nbformat": 4, "nbformat_minor": 4, "metadata": {}, "cells": [{"cell_type": "code", "source": "a = (", "outputs": [], '
    '"execution_count": null, "metadata": {"tags": ["parameters"]}}]}',
])  # fmt: skip
def test_a_file_that_is_no_notebook_is_refused(tmp_path, text):
    (tmp_path / "mine.ipynb").write_text(text)
    (path,) = notebooks.find(str(tmp_path / "mine.ipynb"))
    with pytest.raises(BadInput, match="mine.ipynb is no notebook .*expected a Jupyter notebook"):
        notebooks.check_parameters(path, {})


def short_load(step) -> dict:
    """Parameters with which a step takes seconds."""
    search = {"share": 0.9, "seconds": 0.5, "start": 60, "max_probes": 3, "variants": ["fp8"]}
    short = {"02_bf16_baseline": {"requests": 20}, "03_fp8": {"requests": 40}, "06_capacity": search}
    return short.get(step.stem, {})


def test_the_steps_one_after_the_other_share_a_run(tmp_path, fake_vllm):
    run_dir = tmp_path / "run"
    (tmp_path / "short.toml").write_text(SHORT)
    open_run(run_dir, str(tmp_path / "short.toml"))
    pages = {}
    for step in notebooks.find("steps"):
        page = notebooks.execute(step, run_dir / "rendered" / step.name, {"run_dir": str(run_dir)} | short_load(step))
        pages[step.stem[:2]] = page.read_text()
    run = open_run(source=run_dir)
    four = {"bf16-100rps-r1", "bf16-50rps-r1", "fp8-100rps-r1", "fp8-50rps-r1"}
    probes = set(run.summaries()) - four
    assert four <= set(run.summaries()) and len(probes) == 3 and all(level.startswith("fp8-") for level in probes)
    assert all(summary.failed == 0 for summary in run.summaries().values())
    assert [pages[step].count("<figure>") for step in ("04", "05", "06")] == [4, 6, 1]
    assert "fp8: the SLO limit is" in pages["06"] and "EMULATED GPU, nothing measured" in pages["05"]


@pytest.mark.servers
def test_the_front_notebook_shows_the_recorded_run(tmp_path):
    """Its committed outputs are what the recorded data gives today: `make front` brings them up to date."""
    output, run = tmp_path / "front.ipynb", open_run(source="h200-80gb")
    before = {path: path.read_bytes() for path in [*run.path.rglob("*"), *ALL] if path.is_file()}
    page = notebooks.execute(notebooks.FRONT, output, {"source": "h200-80gb"}).read_text()
    assert page.count("<figure>") == FRONT_FIGURES and "outputs kept in this file" not in page
    assert before == {path: path.read_bytes() for path in [*run.path.rglob("*"), *ALL] if path.is_file()}
    fresh = {cell.id: cell for cell in nbformat.read(output, as_version=4).cells}

    def shown(cell):
        return [out.get("data", out).get("text/plain") for out in cell.outputs]

    for cell in nbformat.read(notebooks.FRONT, as_version=4).cells:
        if cell.cell_type == "code":
            assert shown(cell) == shown(fresh[cell.id]), cell.source
            assert not any(out.output_type in ("error", "stream") for out in cell.outputs)


def test_the_committed_front_notebook_reads_without_styles_and_scripts():
    """As GitHub shows it: what styles and scripts alone would tell is lost."""
    outputs = [
        out.data for cell in nbformat.read(notebooks.FRONT, as_version=4).cells for out in cell.get("outputs", ())
    ]
    pages = [re.sub(r' (?:style|class)="[^"]*"', "", data.get("text/html", "")) for data in outputs]
    figures = [page for page in pages if "<figure" in page]
    tables = [page for page in pages if "<table" in page]
    said = [page for page in pages if page.startswith("<p><strong>")]  # conclusions
    assert len(figures) >= 4 and len(tables) >= 4 and len(said) >= 8
    assert len(figures) + len(tables) + len(said) == len(outputs)
    for page in pages:
        assert not re.search(r"<(script|style|svg|link|iframe)|\son\w+=|https?:", page)
    for page in figures:
        told = re.fullmatch(r'<figure><img src="[^"]+" alt="([^"]+)"><figcaption>(.+)</figcaption></figure>', page)
        assert len(told[1]) > 40 and len(told[2]) > 20
    for page in tables:
        assert re.search(r"<caption>[^<]{10,}</caption>", page) and '<th scope="col">' in page
    answers = [page for page in tables if "The published claims against" in page]
    assert len(answers) == 2  # brief, and with the reasons
    for answer in answers:
        words = re.findall(
            r"<td>((?:not )?reproduced(?:, other cause)?|undecided|not run|invalid run)(?: \([^<]+\))?</td>", answer
        )
        assert len(words) == answer.count("<tr>") - 1


@pytest.mark.servers
def test_a_cell_that_fails_is_named_and_the_rest_is_kept(tmp_path):
    broken = nbformat.read(notebooks.FRONT, as_version=4)
    broken.cells[4].source = "raise RuntimeError('out of <luck>')"
    nbformat.write(broken, tmp_path / "broken.ipynb")
    with pytest.raises(notebooks.NotebookFailed, match="RuntimeError: out of <luck>"):
        notebooks.execute(tmp_path / "broken.ipynb", tmp_path / "out" / "broken.ipynb", {})
    assert "<luck>" not in (tmp_path / "out" / "broken.html").read_text()
