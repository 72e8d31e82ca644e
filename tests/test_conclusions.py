"""What a claim or a figure comes to in a run: computed from that run, whichever it is."""

import dataclasses

import pandas as pd
import pytest

import fp8lab as lab
from conftest import recorded
from fp8lab.errors import BadInput
from fp8lab.metrics.summary import Summary
from fp8lab.report.claims import _FIGURES
from fp8lab.results.evidence import Evidence, evidence
from fp8lab.results.run_folder import open_run

RUNS = ["h100-80gb", "h100-80gb-starts", "h100-80gb-long-prompts", "h200-80gb", "emulated-h100"]
ABOUT = ["C1", "C2", "C3", "C4", "M1", "R1", "R3", "B1", *_FIGURES]


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("about", ABOUT)
def test_every_run_has_a_conclusion_about_everything(name, about):
    said = lab.conclusion(recorded(name), about)
    assert said.so.endswith((".", ".)")) or said.so[-1].isalnum() or said.so[-1] == "%"
    assert said.so.startswith("EMULATED") == (name == "emulated-h100")
    assert said._repr_html_().startswith("<p><strong>") and "nan" not in repr(said) and "None" not in repr(said)


def test_a_conclusion_says_what_the_verdict_says():
    run = recorded("h200-80gb")
    verdicts = {one.id: one for one in lab.judge(run)}
    for claim in ("C1", "C3", "M1", "R2"):
        said = lab.conclusion(run, claim)
        assert said.so == f"{claim}, {verdicts[claim].title}: {verdicts[claim].said}."
        assert verdicts[claim].reason in said.because
    assert "measured 1.65× (95 % interval 1.15× to 2.38×); stated cause: no (the offered load)" in repr(
        lab.conclusion(run, "C1")
    )
    emulated = lab.conclusion(recorded("emulated-h100"), "C1").because
    assert "; emulated 1.58×; EMULATED GPU" in emulated and "; measured" not in emulated
    # One pair without a repeat says nothing, neither that there is a difference nor that none is shown.
    assert (
        "mean TPOT: no repeats, nothing is claimed." in lab.conclusion(recorded("emulated-h100"), "equal_load").because
    )
    means = lab.levels(run).groupby(["variant", "rate"])["steady_output_token_throughput"].mean()
    assert f"{means.max():,.0f} tokens/s: {means.idxmax()[0]}, all at once" in lab.conclusion(run, "saturation").so
    assert lab.conclusion(run, "kv_capacity").so == "The KV cache was the limit of no level."
    full = lab.conclusion(recorded("h100-80gb-long-prompts"), "kv_capacity").so
    assert full.startswith("The KV cache was the limit of bf16-infrps-r1, bf16-infrps-r2, bf16-infrps-r3")


def test_a_conclusion_changes_with_its_run():
    """The same levels with BF16 three times as fast at 50 req/s: what is concluded follows."""
    run = recorded("h200-80gb")
    seen = evidence(run)
    before = lab.conclusion(run, "equal_load").because
    faster = {
        name: dataclasses.replace(s, output_token_throughput=3 * s.output_token_throughput)
        for name, s in seen.summaries.items()
        if name.startswith("bf16-50rps")
    }
    try:
        seen.summaries = seen.summaries | faster
        after = _FIGURES["equal_load"](seen)[1]
    finally:
        evidence.__globals__["_evidence"].cache_clear()
    assert "50 req/s, one Python process 1.05×" in before and "50 req/s, one Python process 0.35×" in after


def test_what_is_concluded_about_nothing_known_is_refused():
    with pytest.raises(BadInput, match="nothing is concluded about 'C9' .there are: C1, .*objective"):
        lab.conclusion(recorded("emulated-h100"), "C9")


def test_the_levels_of_a_run_are_one_table(tmp_path):
    run = recorded("h100-80gb")
    frame = lab.levels(run)
    assert isinstance(frame, pd.DataFrame) and list(frame.index) == list(run.summaries())
    fields = {field.name for field in dataclasses.fields(Summary)} - {"level", "server"}
    assert fields | {"variant", "rate", "repeat", "base", "setup", "kv_cache_tokens", "limited_by"} <= set(
        frame.columns
    )
    seen = evidence(run)
    for level_id, row in frame.iterrows():
        assert row["output_token_throughput"] == run.summaries()[level_id].output_token_throughput
        assert row["limited_by"] == seen.limit(level_id).cause
    frame.to_parquet(tmp_path / "levels.parquet")
    assert list(pd.read_parquet(tmp_path / "levels.parquet")["base"]) == list(frame["base"])
    by_seed = frame[(frame["variant"] == "fp8") & (frame["rate"] == 100)].set_index("repeat")["mean_tpot_ms"].to_dict()
    assert by_seed == seen.seeds("fp8", 100, "mean_tpot_ms")


def test_an_empty_run_has_an_empty_table(tmp_path):
    from fp8lab.config.profile_file import read_profile

    run = open_run(tmp_path / "run", read_profile("h100-80gb"))
    assert len(lab.levels(run)) == 0 and "rate" in lab.levels(run) and lab.levels(run).columns.is_unique
    for table in (lab.levels_table, lab.latency_table, lab.client_table, lab.throughputs_table, lab.resources_table):
        assert list(table(run).rows) == []


def test_setups_pair_variants_that_differ_in_their_bases_alone():
    seen = Evidence(recorded("h200-80gb"))
    assert [setup for *_, setup in seen.pairs()] == ["one Python process", "4 Python processes", "Rust"]
    assert seen.setups("bf16", "fp8-weights", "fp8-kv", "fp8")["Rust"]["fp8-kv"] == "fp8-kv-rust"


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_a_figure_is_saved_where_it_is_asked_to_be_and_nowhere_else(tmp_path, ending):
    from fp8lab.config.profile_file import read_profile

    run = open_run(tmp_path / "run", read_profile("h100-80gb"))
    before = sorted(tmp_path.rglob("*"))
    figure = lab.throughput_figure(run)
    lab.claims_table(run), lab.levels_table(run)
    assert sorted(tmp_path.rglob("*")) == before
    path = figure.save(tmp_path / f"c1.{ending}")
    assert path.stat().st_size > 1000
    with pytest.raises(lab.NotWritten, match="cannot be written"):
        figure.save(tmp_path / "missing" / f"c1.{ending}")
    for name in ("c1", "c1.xyz", ".svg"):
        with pytest.raises(BadInput, match=f"{name}' ends in none of .svg, .png and .pdf"):
            figure.save(tmp_path / name)
