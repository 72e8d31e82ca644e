"""Several runs side by side, from the recorded ones."""

import dataclasses
import math
import runpy
from statistics import fmean

import nbformat
import pytest
from PIL import Image

import fp8lab as lab
from conftest import recorded, whole_run_mhz
from fp8lab.metrics.summary import Summary
from fp8lab.paths import DATA
from fp8lab.report import notebooks
from fp8lab.report.comparison import causes, worth_figure
from fp8lab.results.evidence import Evidence, evidence

H100, H200, LONG, EMULATED = "h100-80gb", "h200-80gb", "h100-80gb-long-prompts", "emulated-h100"
STARTS = "h100-80gb-starts"


def several(*names):
    return [recorded(name) for name in names]


def test_claims_stand_run_by_run_and_a_run_named_twice_once():
    table = lab.claims_across(*several(H200, H100, H200))
    assert list(table.columns[3:]) == [H200, H100]
    alone = {v.id: v for v in lab.judge(recorded(H100))}
    for row in table.rows:
        assert alone[row[0]].verdict in row[4]
    assert table.rows[0][4] == "1.28× (1.17× to 1.39×): not reproduced (worse than published); stated cause: undecided"
    emulated = lab.claims_across(*several(EMULATED, H100))
    assert emulated.columns[3] == "emulated-h100 (EMULATED)"
    assert {row[3] for row in emulated.rows} == {"not run"}


def test_what_fp8_is_worth_names_the_limit_beside_each_ratio():
    rows = {(row[0], row[1], row[2]): row for row in lab.worth_table(*several(H100, H200, LONG)).rows}
    card = rows[LONG, "all at once", "one Python process"]
    assert card[3].startswith("1.65×") and card[6:8] == ("KV capacity", "GPU, nearer memory")
    assert rows[H100, "100 req/s", "one Python process"][6:8] == ("API server", "API server")
    figure = worth_figure(*several(H100, H200, LONG))
    names = [tick.get_text() for tick in figure.canvas.axes[0].get_yticklabels()]
    assert names[0] == "published, other loads:\nFP8 at 100, BF16 at 50 req/s"
    assert "h100-80gb-long-prompts, all at once\nlimit: BF16 KV capacity, FP8 GPU" in names
    # A ratio without repeats is not drawn.
    assert not any("75 req/s" in name for name in names)


def test_an_invalid_seed_is_no_cause():
    seen = Evidence(recorded(H100))
    whole = causes(seen, "fp8", 100)
    seen.summaries = seen.summaries | {
        "fp8-100rps-r2": dataclasses.replace(seen.summaries["fp8-100rps-r2"], valid=False)
    }
    assert (whole.total(), causes(seen, "fp8", 100).total()) == (3, 2)


def test_an_emulated_run_marks_what_it_is_drawn_in():
    assert "EMULATED" in lab.worth_table(*several(EMULATED, H100)).caption
    # It has one seed: nothing of it is drawn, so that nothing needs the mark.
    beside = worth_figure(*several(EMULATED, H100))
    assert EMULATED not in beside.caption and "EMULATED" not in beside.caption
    alone = worth_figure(*several(EMULATED))
    assert "EMULATED" in alone.caption and any("EMULATED" in text.get_text() for text in alone.canvas.axes[0].texts)


def test_the_readmes_figure_is_that_of_the_recorded_runs():
    """`make front` brings it up to date."""
    front = runpy.run_path(str(DATA / "front.py"))
    assert front["FIGURE"].read_text() == front["readme_figure"]().svg


def test_the_readmes_picture_of_the_page_shows_the_verdicts_of_today():
    """`make front` brings it up to date."""
    front = runpy.run_path(str(DATA / "front.py"))
    with Image.open(front["PAGE"]) as picture:
        assert picture.text["Description"] == front["verdicts"]()


def test_the_front_notebooks_prose_says_what_the_recorded_runs_say():
    prose = " ".join(
        " ".join(cell.source.split())
        for cell in nbformat.read(notebooks.FRONT, as_version=4).cells
        if cell.cell_type == "markdown"
    )
    seen = evidence(recorded(LONG))
    tokens, joules = (
        seen.compare("fp8", "bf16", math.inf, metric)
        for metric in ("output_token_throughput", "joules_per_output_token")
    )
    assert f"FP8 gives {tokens.value:.2f} times the tokens for {joules.value:.2f} times the energy each" in prose
    own = evidence(recorded(STARTS))
    tokens = own.compare("fp8-rust-graphs", "bf16-rust-graphs", math.inf, "output_token_throughput").value
    levels = {name: own.levels((f"{name}-rust-graphs",)).values() for name in ("fp8", "bf16")}
    assert all(s.power_limited_steady == 1.0 for s in levels["bf16"])
    fp8, bf16 = (fmean(s.gpu_sm_mhz_steady for s in each if s.level.repeat <= 2) for each in levels.values())
    whole = {
        name: fmean(whole_run_mhz(own, s.level.id) for s in each if s.level.repeat <= 2)
        for name, each in levels.items()
    }
    assert (
        f"Its {tokens:.2f} times the tokens came with a clock {whole['fp8'] / whole['bf16']:.2f} times as fast, {fp8 / bf16:.2f} times in"
    ) in prose
    assert 0.8 <= bf16 / 1980 < 0.85 and fp8 / 1980 > 0.99  # "almost a fifth", "hardly any"
    low, high = zip(*(_frontend_costs(name) for name in (H100, H200)), strict=True)
    assert f"needs {low[0]} to {high[0]} µs of CPU" in prose and f"H200's host {low[1]} to {high[1]}" in prose


def _frontend_costs(name):
    summaries = recorded(name).summaries()
    ids = [f"{variant}-100rps-r{seed}" for variant in ("bf16", "fp8") for seed in (1, 2, 3)]
    costs = [round(summaries[level].frontend_us_per_token) for level in ids]
    return min(costs), max(costs)


def test_the_api_servers_cost_is_cpu_time_over_tokens():
    used = {"frontend_cpu_steady": 1.04, "steady_output_token_throughput": 10_000.0}
    summary = Summary(valid=True, requests=1, completed=1, failed=0, **used)
    assert summary.frontend_us_per_token == pytest.approx(104)
    assert dataclasses.replace(summary, time_dilation=2.0).frontend_us_per_token == pytest.approx(208)
    assert dataclasses.replace(summary, frontend_cpu_steady=None).frontend_us_per_token is None
