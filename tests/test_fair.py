"""The fair comparison's tables and figures, on the recorded runs and on runs that lack much."""

import dataclasses
import math
import re

import numpy as np
import pytest

import fp8lab as lab
from conftest import recorded
from fp8lab.config.dimensions import model_shape
from fp8lab.config.profile_file import read_profile
from fp8lab.errors import BadInput
from fp8lab.metrics.bottleneck import Limit
from fp8lab.metrics.slo import DEFAULT, MLPERF_SERVER
from fp8lab.metrics.statistics import Ratio
from fp8lab.report import comparison, drawing
from fp8lab.report.drawing import forest
from fp8lab.report.machine import _steps
from fp8lab.results.evidence import Compared, Evidence, evidence
from fp8lab.results.run_folder import open_run

TABLES = [
    lab.bottlenecks_table, lab.validity_table, lab.equal_load_table, lab.ablation_table, lab.throughputs_table,
    lab.kv_table, lab.paging_table, lab.roofline_table, lab.slo_table,
    lambda run: lab.attainment_table(run, DEFAULT), lambda run: lab.capacity_plan(run, MLPERF_SERVER, 500),
]  # fmt: skip
FIGURES = [
    lab.saturation_figure, lab.equal_load_figure, lab.ablation_figure, lab.littles_law_figure,
    lab.roofline_figure, lambda run: lab.objective_figure(run, DEFAULT),
]  # fmt: skip


@pytest.fixture(params=["h100-80gb", "h200-80gb", "emulated-h100", "empty"])
def run(request, tmp_path):
    if request.param == "empty":
        return open_run(tmp_path / "run", read_profile("h100-80gb"))
    return recorded(request.param)


@pytest.mark.parametrize("draw", TABLES)
def test_tables_say_what_there_is(run, draw):
    table = draw(run)
    assert table.caption and "<caption" in table._repr_html_() and repr(table)
    if run.emulated and draw is not lab.paging_table:
        assert "EMULATED" in table.caption


@pytest.mark.parametrize("draw", FIGURES)
def test_figures_ask_a_question_and_say_what_is_seen(run, draw):
    figure = draw(run)
    assert (figure.canvas.axes[0].get_title(loc="left") or figure.canvas.get_suptitle()).endswith("?")
    assert len(figure.alt) > 20 and run.path.name in figure.caption
    if run.emulated:
        assert "EMULATED" in figure.caption
        assert any("EMULATED" in text.get_text() for text in figure.canvas.axes[0].texts)


@pytest.mark.parametrize("draw", FIGURES)
def test_an_alternative_text_can_be_read_out(run, draw):
    alt = draw(run).alt
    assert len(alt) <= 650 and "?" in alt and alt.endswith("tables hold the numbers.")


def test_an_interval_beyond_the_axis_ends_in_an_arrow():
    within, beyond = (
        drawing.figure("f", "How?")(lambda axes, rows: forest(axes, rows, "ratio") or "c")([("a", one)])
        for one in (Ratio(1.2, 1.1, 1.3, 3, ""), Ratio(1.2, 0.1, 9.0, 3, ""))
    )
    arrows = [[line.get_marker() for line in figure.canvas.axes[0].lines] for figure in (within, beyond)]
    assert not {"<", ">"} & set(arrows[0]) and {"<", ">"} <= set(arrows[1])
    assert [text.get_text() for text in within.canvas.axes[0].texts] == ["1.20"]
    assert "arrow" in beyond.canvas.axes[0].get_xlabel() and "arrow" not in within.canvas.axes[0].get_xlabel()


def test_decode_is_bound_by_memory_and_prefill_by_compute_by_arithmetic():
    profile = read_profile("h100-80gb")
    shape, card = model_shape(profile.model.shapes), profile.gpu
    # A step multiplies each weight that it reads once for each request: two FLOP for two bytes.
    assert _steps(shape, context=0)["decode for 32"] == pytest.approx(32)
    steps = _steps(shape, context=400)
    assert steps["decode for 256"] < card.bf16_flops / card.hbm_bytes_per_s < steps["prefill of 2,048"]
    figure = lab.roofline_figure(recorded("h100-80gb"))
    assert re.search(r"memory is the limit of decode for 32 .*; compute is the limit of prefill", figure.caption)
    ticks = [note.get_text() for note in figure.canvas.axes[0].texts if re.match("decode|prefill", note.get_text())]
    assert ticks == list(steps) and all(f"{tick} (" in figure.caption for tick in ticks)


def test_without_telemetry_no_step_is_drawn_or_told(monkeypatch):
    monkeypatch.setattr(Evidence, "kv_tokens_a_request", lambda self: None)
    figure = lab.roofline_figure(recorded("h100-80gb"))
    assert "Ticks" not in figure.caption and not any(
        "decode" in note.get_text() for note in figure.canvas.axes[0].texts
    )


def test_the_caption_explains_the_markers_that_were_drawn():
    told = {name: lab.saturation_figure(recorded(name)).caption for name in ("h100-80gb", "h200-80gb")}
    assert "left half full for 4 Python processes" in told["h200-80gb"]
    assert ("lower half full" in told["h100-80gb"], "lower half full" in told["h200-80gb"]) == (True, False)
    assert "Markers" not in lab.saturation_figure(recorded("h100-80gb-long-prompts")).caption
    # What all share is told by none.
    told = lab.saturation_figure(recorded("h200-80gb-x2-8b")).caption
    assert (
        "hollow for none of these; lower half full for data-parallel-size 2; full for tensor-parallel-size 2." in told
    )


@pytest.mark.parametrize("name", ["h100-80gb-versions", "h100-80gb-unseal", "h100-80gb-what-else", "h200-80gb-recipes"])
def test_what_a_level_needed_of_the_card_is_counted_by_steps_that_were(name):
    """vLLM's own counter of steps, where it was sampled; and no step brings less than a token."""
    seen, checked = evidence(recorded(name)), 0
    for level_id, s in seen.summaries.items():
        needed = seen.roofline(level_id)
        assert needed.memory < 0.7 and needed.steps_per_s <= s.output_tokens / (s.window[1] - s.window[0])
        telemetry = seen.level(level_id).telemetry
        if "iterations" in telemetry and len(known := telemetry[["at_s", "iterations"]].dropna()) > 1:
            counted = np.ptp(np.interp(s.window, known["at_s"], known["iterations"])) / (s.window[1] - s.window[0])
            assert needed.steps_per_s == pytest.approx(counted, rel=0.03 if s.level.rate == math.inf else 0.15), (
                level_id
            )
            checked += 1
    assert checked == {"h100-80gb-versions": 6, "h100-80gb-unseal": 3, "h100-80gb-what-else": 2}.get(name, 0)


def test_a_figure_draws_what_a_run_holds_or_says_that_there_is_nothing():
    """Runs without the published variants."""
    four, plain = recorded("h200-80gb-x4-70b"), recorded("h100-80gb-versions")
    power, clock = lab.clock_figure(four).canvas.axes
    assert [line.get_label() for line in clock.lines if "tp" in line.get_label()] == ["bf16-tp4", "fp8-tp2"]
    assert max(max(line.get_ydata()) for line in power.lines) < 720  # W of a card, of four and of two
    assert "2,739 W of 2,800 W" in lab.conclusion(four, "clock").because
    assert [tick.get_text() for tick in lab.memory_figure(four).canvas.axes[0].get_yticklabels()] == [
        "bf16-tp4",
        "fp8-tp2",
    ]
    assert lab.batching_figure(four).caption.startswith("Level fp8-tp2-dp2-infrps-r3. ")
    assert "fp8-tp2-dp2 not known." in lab.conclusion(four, "objective").because
    for drawn in (lab.equal_load_figure(plain), lab.ablation_figure(plain), lab.step_figure(plain)):
        assert [text.get_text() for text in drawn.canvas.axes[0].texts] == ["nothing to draw in this run"]
    assert lab.step_figure(plain).caption.startswith("No step was taken apart")


def test_little_s_law_is_held_against_levels_with_requests_enough():
    """Of a request every two seconds it is chance which samples meet one."""
    seen = evidence(recorded("h100-80gb-recipes"))
    assert "bf16-0.5rps-r1" in seen.summaries and "bf16-0.5rps-r1" not in seen.in_flight()
    assert all(0.95 < counted / expected < 1.07 for expected, counted in seen.in_flight().values())


def test_what_is_offered_is_drawn_by_the_requests_of_each_rate():
    """The few requests at 0.5 req/s have shorter answers than the thousands at 100."""
    run = recorded("h200-80gb-recipes")
    line = lab.saturation_figure(run).canvas.axes[0].lines[0]
    offered = dict(zip(*line.get_data(), strict=True))
    assert list(offered) == [0, 0.5, 25, 50, 100]
    for rate, level in ((0.5, "bf16-0.5rps-r1"), (100, "int8-100rps-r1")):
        s = run.summaries()[level]
        assert offered[rate] == pytest.approx(rate * s.output_tokens / s.completed)


def test_a_whole_runs_gain_is_its_ramp_and_drain_only_beyond_the_steady_states_interval(monkeypatch):
    told = {row[1]: row[5] for row in lab.equal_load_table(recorded("h200-80gb")).rows if "kept up" in row[5]}
    assert "in its ramp and drain; steady state 1.00×" in told["50 req/s"]
    assert told["60 req/s"].endswith("(both kept up; steady state 1.04× (0.98 to 1.11))")
    seen, said = evidence(recorded("h200-80gb")), []
    at_50 = Compared("one Python process", 50, "", {"bf16": "bf16", "fp8": "fp8"}, Ratio(1.05, 1.01, 1.09, 3, ""))
    for steady in (Ratio(1.2, 1.1, 1.3, 3, ""), Ratio(0.9, 0.8, 0.95, 3, "")):
        monkeypatch.setattr(Evidence, "compare", lambda self, *_, steady=steady: steady)
        said.append(comparison._steady_state(seen, "output_token_throughput", at_50))
    assert ["ramp" in text for text in said] == [False, True]


def test_a_reservation_that_cannot_hold_the_requests_is_no_waste():
    rows = dict(lab.paging_table(recorded("h100-80gb-long-prompts")).rows)
    assert rows["reserving 2,048 tokens a request"] == "too little: some hold more"
    assert rows["reserving 8,192 tokens a request"].endswith("%") and rows["the same, as published"] == "at most 4%"
    assert "%" in dict(lab.paging_table(recorded("h100-80gb")).rows)["reserving 2,048 tokens a request"]


def test_a_level_of_unknown_limit_keeps_up_if_its_records_say_so(monkeypatch):
    monkeypatch.setattr(Evidence, "limit", lambda self, level_id: Limit("unknown", "no GPU was sampled"))
    seen = Evidence(recorded("h200-80gb"))
    assert not seen.saturated("bf16", rate=25)
    assert seen.saturated("bf16", rate=100) and seen.saturated("bf16", rate=math.inf)


def test_a_level_that_does_not_count_is_left_out_everywhere():
    run = recorded("h200-80gb")
    whole, seen = Evidence(run), Evidence(run)
    seen.summaries = {
        level_id: dataclasses.replace(s, valid=False, completed=0) if level_id == "fp8-60rps-r1" else s
        for level_id, s in whole.summaries.items()
    }
    assert whole.parts(("bf16", "fp8"), 60) == "3, 4" and seen.parts(("bf16", "fp8"), 60) in ("3", "4")
    assert 60 in whole.rates("fp8") and 60 not in seen.rates("fp8")
    assert not seen.levels(("fp8",), 60) and list(seen.levels(("fp8",), 60, valid=False)) == ["fp8-60rps-r1"]
    # Valid, and nothing completed.
    seen.summaries["fp8-60rps-r1"] = dataclasses.replace(seen.summaries["fp8-60rps-r1"], valid=True)
    assert seen.parts(("fp8",), 60) == ""


@pytest.mark.parametrize("name", ["h200-80gb", "h100-80gb-recipes", "h100-x2-32b", "smollm2-gpu-recipes"])
def test_variants_are_told_apart_without_colour(name):
    profile = read_profile(name)
    styles = [drawing.style_of(profile, variant) for variant in profile.variants]
    shapes = [(style["marker"], style["fillstyle"]) for style in styles]
    assert len(set(shapes)) == len(shapes)


def test_the_recorded_ratios_can_be_had_from_the_records_by_hand():
    """A spreadsheet's way: tokens over (last token - first sending), FP8 over BF16, the mean of the three seeds."""
    seen, logs = evidence(recorded("h200-80gb")), []
    for seed in (1, 2, 3):
        rate = {}
        for variant in ("bf16", "fp8"):
            records = seen.level(f"{variant}-50rps-r{seed}").records
            rate[variant] = records["output_tokens"].sum() / (records["last_token_s"].max() - records["sent_s"].min())
        logs.append(rate["fp8"] / rate["bf16"])
    by_hand = (logs[0] * logs[1] * logs[2]) ** (1 / 3)
    table = lab.equal_load_table(seen.run)
    shown = next(row for row in table.rows if row[0].startswith("output tokens") and row[1] == "50 req/s")
    assert float(shown[3]) == pytest.approx(by_hand, abs=5e-4)


def test_a_comparison_says_in_which_parts_of_the_run_it_was_measured():
    run = recorded("h200-80gb")
    begun = sorted(place["created"] for place in [run.manifest, *run.manifest["continued"]])
    assert len(begun) == 4
    equal = {(row[1], row[2]): row[-1] for row in lab.equal_load_table(run).rows}
    assert equal["50 req/s", "one Python process"] == "1" and equal["all at once", "4 Python processes"] == "2"
    assert equal["60 req/s", "one Python process"] == "3, 4" and equal["60 req/s", "Rust"] == "4"
    assert {row[-1] for row in lab.ablation_table(run).rows if row[2] == "Rust"} == {"1, 4"}
    # A run in one part has no such column.
    assert "part" not in str(lab.equal_load_table(recorded("emulated-h100")).columns)


def test_the_plan_is_arithmetic_on_the_bracket():
    run = recorded("h200-80gb")
    row = next(r for r in lab.capacity_plan(run, MLPERF_SERVER, 500).rows if r[0] == "bf16")
    low, planned, cards = float(row[1]), float(row[2]), int(row[3])
    assert planned == pytest.approx(low * 0.8, abs=0.05) and cards == -(-500 // planned)
    assert re.match(r"\d", row[4]) and re.match(r"\d", row[5])
    for rate, headroom in ((0, 0.2), (float("inf"), 0.2), (10, 1.0)):
        with pytest.raises(BadInput, match="target_rate"):
            lab.capacity_plan(run, MLPERF_SERVER, rate, headroom)


def test_a_recorded_run_brackets_its_limit():
    run = recorded("h200-80gb")
    with lab.serve(run.profile, "bf16", run=run) as server:
        assert lab.find_max_rate(server, MLPERF_SERVER, run=run) == (60, 75)


def test_the_function_measure_is_not_hidden_by_the_room_of_that_name():
    import fp8lab.metrics.performance  # noqa: F401

    assert callable(lab.measure)


def test_the_clock_figure_shows_what_was_sampled():
    held = lab.clock_figure(recorded("h100-80gb-starts"))
    assert "Levels bf16-rust-graphs-infrps-r1 and fp8-rust-graphs-infrps-r1" in held.caption
    said = lab.conclusion(recorded("h100-80gb-starts"), "clock")
    assert "the power limit held the clock back in 100% of the samples" in said.because
    assert "Ticks: samples in which NVML named the power limit" in held.caption
    before = lab.clock_figure(recorded("h100-80gb"))
    assert "What held the clock back was not sampled in this run" in before.caption
    assert "consistent with the power limit" in lab.conclusion(recorded("h100-80gb"), "clock").because
    assert "No GPU was sampled." in lab.clock_figure(recorded("emulated-h100")).caption


def test_a_comparison_names_the_clocks_that_it_also_compares():
    run = recorded("h100-80gb")
    rows = {(row[0], row[1], row[2]): row for row in lab.equal_load_table(run).rows}
    row = rows["output tokens/s, whole run", "all at once", "Rust, max-cudagraph-capture-size 1024"]
    assert row[3] == "1.242" and row[6] == "1.30× (1,959 / 1,512 MHz)"
    columns = lab.resources_table(run).columns
    used = {row[0]: dict(zip(columns, row, strict=True)) for row in lab.resources_table(run).rows}
    burst = used["bf16-rust-graphs-infrps-r1"]
    assert burst["MHz"] == "1,532" and burst["held back by"] == "power?" and burst["J/token"] == "0.054 (-0.1%)"
