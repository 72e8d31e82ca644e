import itertools
import json
import math
import shutil

import pytest

import fp8lab as lab
from conftest import recorded
from fp8lab.config.profile_file import read_profile
from fp8lab.paths import DATA
from fp8lab.report import claims, drawing, judges, verdict
from fp8lab.results.evidence import evidence
from fp8lab.results.files import write_json
from fp8lab.results.run_folder import open_run

# What the published experiment reports, as if a run had measured just that.
PUBLISHED = {
    ("bf16", 50): {"output_token_throughput": 7437, "peak_concurrent_requests_vllm": 170, "request_throughput": 39.4, "mean_tpot_ms": 15},
    ("fp8", 100): {"output_token_throughput": 11921, "peak_concurrent_requests_vllm": 1033, "request_throughput": 63.15, "mean_tpot_ms": 38.75},
}  # fmt: skip
EQUAL = {
    ("bf16", 100): PUBLISHED[("fp8", 100)] | {"output_token_throughput": 11500, "peak_concurrent_requests_vllm": 1100},
    ("fp8", 50): PUBLISHED[("bf16", 50)] | {"output_token_throughput": 7500, "peak_concurrent_requests_vllm": 120},
}


EVERY_CLAIM = ["C1", "C2", "C3", "C4", "M1", "B1", "B2", "B3", "B4", "R1", "R2", "R3", "R4", "R5", "Q1"]


@pytest.fixture
def run(tmp_path):
    """An empty run of a GPU profile: made without a GPU, for the verdicts' logic alone."""
    return open_run(tmp_path / "run", read_profile("h100-80gb"))


def fill(run, levels, repeats=(1, 2, 3), **common):
    """Each level in so many seeds that agree."""
    for ((variant, rate), values), repeat in itertools.product(levels.items(), repeats):
        folder = run.path / "levels" / f"{variant}-{rate}rps-r{repeat}"
        folder.mkdir(parents=True, exist_ok=True)
        level = {"variant": variant, "rate": rate, "requests": 1000, "repeat": repeat}
        summary = {
            "valid": True,
            "invalid_reason": None,
            "emulated": False,
            "level": level,
            "requests": 1000,
            "completed": 1000,
            "failed": 0,
        }
        rest = dict.fromkeys(("steady_output_token_throughput", "mean_ttft_ms", "p99_ttft_ms"), 1.0)
        write_json(folder / "summary.json", summary | rest | values | common)
    return {v.id: v for v in claims.judge(run) if v.id.startswith("C")}


def test_an_empty_run_judges_nothing(run):
    assert {v.verdict for v in claims.judge(run)} == {"not run"}


def test_the_two_values_of_a_claim_are_of_the_seeds_that_its_ratio_is_of(run):
    low = {
        key: PUBLISHED[key] | {"output_token_throughput": tokens}
        for key, tokens in ((("bf16", 50), 8000), (("fp8", 100), 12000))
    }
    fill(run, low, repeats=(1, 2))
    found = fill(run, {("fp8", 100): low["fp8", 100] | {"output_token_throughput": 15000}}, repeats=(3,))["C1"]
    assert found.measured == pytest.approx(1.5) and found.measured_parts == pytest.approx({"bf16": 8000, "fp8": 12000})


def test_levels_of_other_loads_are_not_compared(run):
    fill(run, {("bf16", 50): PUBLISHED["bf16", 50]})
    fill(run, {("fp8", 50): PUBLISHED["bf16", 50]}, repeats=(1,))
    seen = evidence(open_run(run.path))
    assert seen.compare("fp8", "bf16", 50, "output_token_throughput").pairs == 1
    path = run.path / "levels/fp8-50rps-r1/summary.json"
    said = json.loads(path.read_text())
    write_json(path, said | {"level": said["level"] | {"requests": 500}})
    assert evidence(open_run(run.path)).compare("fp8", "bf16", 50, "output_token_throughput") is None
    # Sent twice as much on two cards it is compared by card.
    cards = evidence(open_run(source="h200-80gb-x2-8b"))
    assert cards.compare("fp8-dp2", "fp8-unsealed", math.inf, "output_token_throughput").value > 1.8


def test_the_published_numbers_alone_are_reproduced(run):
    verdicts = fill(run, PUBLISHED)
    assert {v.verdict for v in verdicts.values()} == {"reproduced"}
    assert verdicts["C1"].measured == pytest.approx(11921 / 7437)
    assert verdicts["C2"].measured == pytest.approx(1033 / 170)


def test_an_effect_that_the_load_alone_brings_has_another_cause(run):
    verdicts = fill(run, PUBLISHED | EQUAL)
    assert verdicts["C1"].verdict == verdicts["C2"].verdict == "reproduced, other cause"
    assert "BF16 alone, from 50 to 100 req/s: 1.55× (1.55 to 1.55)" in verdicts["C1"].reason
    assert "1.01× (1.01 to 1.01) at 50 req/s, 1.04×" in verdicts["C1"].reason


def test_an_effect_that_the_load_alone_does_not_bring_is_reproduced(run):
    slow = {("bf16", 100): PUBLISHED[("bf16", 50)], ("fp8", 50): PUBLISHED[("bf16", 50)]}
    assert fill(run, PUBLISHED | slow)["C1"].verdict == "reproduced"


def test_without_bf16_at_the_higher_load_no_other_cause_is_claimed(run):
    assert fill(run, PUBLISHED | {("fp8", 50): EQUAL[("fp8", 50)]})["C1"].verdict == "reproduced"


def test_all_seeds_are_judged_and_their_disagreement_is_said(run):
    odd = {
        key: {name: value * (0.7 if key[0] == "fp8" else 1) for name, value in v.items()}
        for key, v in PUBLISHED.items()
    }
    fill(run, PUBLISHED, (1,))
    found = fill(run, odd, (2,))["C1"]
    assert found.measured == pytest.approx(11921 / 7437 * 0.7**0.5)
    assert "seeds 1.60×, 1.12× (they disagree about the tolerance)" in found.reason and len(found.levels) == 4


def test_an_interval_across_the_tolerance_is_undecided_whatever_the_mean(run):
    """Three seeds with a mean as published: far apart they decide nothing, close together they do."""
    for spread, expected in ((0.3, "undecided"), (0.02, "reproduced, other cause")):
        for seed, factor in enumerate((1 - spread, 1, 1 / (1 - spread)), start=1):
            scattered = {
                key: {name: value * (factor if key[0] == "fp8" else 1) for name, value in values.items()}
                for key, values in (PUBLISHED | EQUAL).items()
            }
            found = fill(run, scattered, (seed,))["C1"]
        assert found.measured == pytest.approx(11921 / 7437) and found.verdict == expected
        assert found.cause == "no (the offered load)"
    assert "allows both answers" not in found.reason


def test_whether_the_stated_cause_holds_is_told_whatever_the_value(run):
    """Twice the published gain, and the load alone brings all of it."""
    double = {
        key: {name: value * (2 if key[1] == 100 else 1) for name, value in values.items()}
        for key, values in (PUBLISHED | EQUAL).items()
    }
    found = fill(run, double)["C1"]
    assert found.verdict == "not reproduced" and found.cause == "no (the offered load)"
    assert claims.claims_table(run).rows[0][5:7] == ("not reproduced (better than published)", "no (the offered load)")


def test_one_seed_decides_nothing_and_says_what_is_missing(run):
    for found in fill(run, PUBLISHED | EQUAL, (1,)).values():
        assert found.verdict == "undecided" and "more seeds (repeats) are missing" in found.reason, found
    assert claims.judge(run)[0].cause == "undecided"


def test_a_value_that_is_not_reproduced_is_said_to_be_better_or_worse(run):
    """Half of each published value: of TPOT that is the better side, and of requests in flight neither is."""
    half = {("fp8", 100): {name: value / 2 for name, value in PUBLISHED["fp8", 100].items()}}
    found = fill(run, PUBLISHED | half)
    worse, better = (f"not reproduced ({way} than published)" for way in ("worse", "better"))
    assert [one.said for one in found.values()] == [worse, "not reproduced", worse, better]
    assert claims.claims_table(run, brief=True).rows[3][5] == better
    assert better in claims.claims_across(run).rows[3][3] and better in claims.conclusion(run, "C4").so
    assert {one.verdict for one in found.values()} == {"not reproduced"}


def test_what_would_measure_a_missing_level_is_named(run):
    reasons = {one.id: one.reason for one in claims.judge(run)}
    assert reasons["R1"].endswith(
        f'fp8-60rps-r1; to measure it: fp8lab measure --run {run.path} --protocol "service line"'
    )
    assert reasons["B4"].endswith("; profile h100-80gb-recipes has them")


def test_an_invalid_seed_is_left_out_and_said(run):
    fill(run, PUBLISHED)
    found = fill(run, {("fp8", 100): PUBLISHED["fp8", 100]}, (2,), valid=False, invalid_reason="late")["C1"]
    assert "left out as INVALID: fp8-100rps-r2" in found.reason and "fp8-100rps-r2" not in found.levels


def test_other_numbers_are_not_reproduced(run):
    other = {
        key: {name: value * (2 if key[0] == "fp8" else 1) for name, value in v.items()} for key, v in PUBLISHED.items()
    }
    assert {v.verdict for v in fill(run, other).values()} == {"not reproduced"}


def test_an_invalid_level_spoils_what_rests_on_it(run):
    verdicts = fill(run, PUBLISHED, valid=False, invalid_reason="the client fell behind")
    assert {v.verdict for v in verdicts.values()} == {"invalid run"}
    assert "the client fell behind" in verdicts["C3"].reason


def test_emulated_numbers_get_no_verdict(tmp_path):
    run = open_run(tmp_path / "run", read_profile("emulated-h100"))
    verdicts = fill(run, PUBLISHED | EQUAL, emulated=True)
    assert {(v.verdict, v.cause) for v in verdicts.values()} == {("not run", "")}
    assert all("EMULATED" in v.reason and v.measured for v in verdicts.values())
    assert "EMULATED" in repr(claims.claims_table(run))


def test_claims_json_holds_all_that_a_verdict_needs(run):
    fill(run, PUBLISHED)
    assert not (run.path / "claims.json").exists()  # a table writes nothing
    lab.write_claims(run)
    stored = json.loads((run.path / "claims.json").read_text())["claims"]
    assert [claim["id"] for claim in stored] == EVERY_CLAIM
    for claim in stored:
        assert {"published", "measured", "unit", "protocol", "verdict", "reason", "levels", "limits"} <= claim.keys()
        assert claim["protocol"] == "as published" or claim["id"][0] in "MBRQ"


def test_the_recorded_run_judges_what_was_recommended():
    verdicts = {v.id: v for v in claims.judge(recorded("h200-80gb"))}
    assert verdicts["R3"].verdict == "reproduced" and 1 < verdicts["R3"].measured < 4
    assert verdicts["R2"].interval[0] < verdicts["R2"].measured < verdicts["R2"].interval[1]
    assert "pre-quantised checkpoint" in verdicts["R2"].reason
    assert set(verdicts["C1"].limits) == {f"{level}-r{n}" for level in ("bf16-50rps", "fp8-100rps") for n in (1, 2, 3)}
    assert verdicts["C1"].interval[0] < verdicts["C1"].measured < verdicts["C1"].interval[1]


def test_a_limit_that_is_not_the_cards_is_another_cause(run, monkeypatch):
    from fp8lab.metrics.bottleneck import Limit

    for cause, expected in (("API server", "reproduced, other cause"), ("GPU compute", "reproduced")):
        monkeypatch.setattr("fp8lab.results.evidence.Evidence.limit", lambda self, level, c=cause: Limit(c, "seen"))
        found = fill(run, PUBLISHED)["C3"]
        assert found.verdict == expected and set(found.limits.values()) == {cause}


@pytest.mark.parametrize("draw", [lab.throughput_figure, lab.concurrency_figure, lab.rate_figure, lab.tpot_figure])
@pytest.mark.parametrize("levels", [{}, PUBLISHED, PUBLISHED | EQUAL])
def test_figures_draw_what_there_is(run, draw, levels):
    fill(run, levels)
    shown = draw(run)
    page = shown._repr_html_()
    assert page.startswith("<figure><img src=") and 'alt="' in page and "<figcaption>" in page
    assert "published" in shown.alt.lower() or "published" in shown.caption.lower()


def test_the_memory_figure_shows_what_vllm_may_take_and_where_the_card_ends():
    drawn = {name: lab.memory_figure(recorded(name)) for name in ("h100-80gb", "h200-80gb")}
    said = {name: [text.get_text() for text in one.canvas.axes[0].texts] for name, one in drawn.items()}
    assert {"vLLM's share 71.6", "the card 79.6"} <= set(said["h100-80gb"])
    beyond = [text.xy[0] for text in drawn["h100-80gb"].canvas.axes[0].texts if text.get_text() in ("4.8", "4.3")]
    assert len(beyond) == 2 and min(beyond) > 72  # no line goes through a number
    assert "vLLM's share 71.3" in said["h200-80gb"]  # held to the memory of a smaller card
    assert not any(text.startswith("the card") for text in said["h200-80gb"])


def test_a_colour_of_a_variant_means_that_variant():
    lines = lab.batching_figure(recorded("h200-80gb")).canvas.axes[0].lines
    assert len(lines) >= 3 and not {line.get_color() for line in lines} & {color for color, _ in drawing.STYLE.values()}


def test_arithmetic_is_of_no_run():
    drawn = lab.number_line_figure()
    assert "Run" not in drawn.caption and [t.get_text() for t in drawn.canvas.axes[0].get_xticklabels()][-1] == "16"


def test_names_at_the_ends_of_lines_do_not_lie_on_each_other():
    from matplotlib.text import Text

    canvas, axes = drawing._canvas([], "How?", 3.8, 1, 1)
    axes.set(xlim=(0, 1), ylim=(0, 100))
    drawing.label_ends(axes, [("b", 0.5, 51, "#000"), ("a", 0.5, 50, "#000"), ("c", 0.5, 50.5, "#000")])
    canvas.draw_without_rendering()
    boxes = sorted((*Text.get_window_extent(note).intervaly, note.get_text()) for note in axes.texts)
    assert [name for _, _, name in boxes] == ["a", "c", "b"]
    assert all(below[1] <= above[0] for below, above in itertools.pairwise(boxes))


def test_emulated_figures_say_so(tmp_path):
    run = open_run(tmp_path / "run", read_profile("emulated-h100"))
    fill(run, PUBLISHED | EQUAL, emulated=True)
    for draw in (lab.throughput_figure, lab.concurrency_figure, lab.rate_figure, lab.tpot_figure):
        drawn = draw(run)
        assert "EMULATED" in drawn.caption
        assert any("EMULATED" in text.get_text() for text in drawn.canvas.axes[0].texts)


def test_tables_escape_what_they_show():
    from fp8lab.ui import Table

    table = Table("<b>", ("a|b",), [("<script>",)])
    assert "<script>" not in table._repr_html_() and "a\\|b" in table.to_markdown()


def test_a_reservation_too_little_for_the_requests_is_said_to_be():
    said = {}
    for name, level_id in (("h100-80gb-long-prompts", "fp8-infrps-r1"), ("h100-80gb", "fp8-100rps-r1")):
        seen = evidence(recorded(name))
        said[name] = judges._paging_waste(verdict.claim_of("R3"), seen, [level_id])["reason"]
    assert said["h100-80gb-long-prompts"].endswith("reserving 2,048 tokens a request would be too little for some")
    assert said["h100-80gb"].endswith("%")


def test_parts_of_a_run_may_be_machines_or_commits():
    reason = next(v.reason for v in claims.judge(recorded("h200-80gb")) if v.id == "R2")
    assert "measured in parts 1, 4 of the run (other machines or commits, run.json)" in reason


def test_two_seeds_alone_decide_little(run):
    """Without levels to compare their noise with, the interval of two seeds is wide."""
    fill(run, {("fp8", 100): PUBLISHED["fp8", 100]}, (1,))
    found = fill(run, {("fp8", 100): PUBLISHED["fp8", 100] | {"mean_tpot_ms": 36}}, (2,))["C4"]
    assert found.verdict == "undecided" and found.interval[0] < 36 and found.interval[1] > 38.75


# Memory at the published loads: (preemptions, failed requests, fullest KV cache) by variant.
CALM, FULL = (0, 0, 0.5), (0, 0, 1.0)


def memory(run, bf16, fp8, **common):
    """The verdict on M1 of a run that holds both variants at 50 and 100 req/s, the second as given."""
    for rate in (50, 100):
        for variant, at_most in (("bf16", bf16), ("fp8", fp8)):
            values = dict(
                zip(("preemptions", "failed", "kv_cache_usage_max"), at_most if rate == 100 else CALM, strict=True)
            )
            fill(run, {(variant, rate): PUBLISHED[("bf16", 50)] | values}, (1,), **common)
    return next(v for v in claims.judge(run) if v.id == "M1")


@pytest.mark.parametrize(
    ("bf16", "fp8", "verdict", "said"),
    [
        (
            CALM,
            CALM,
            "not reproduced",
            "BF16 did not run out of memory: there was no risk to remove; bf16: 0 preemptions",
        ),
        (
            FULL,
            CALM,
            "reproduced",
            "KV cache at most 100 % full; fp8: 0 preemptions, 0 failed requests, KV cache at most 50 %",
        ),
        ((3, 0, 0.9), CALM, "reproduced", "bf16: 3 preemptions"),
        ((0, 7, 0.9), CALM, "reproduced", "7 failed requests"),
        (FULL, (1, 0, 1.0), "not reproduced", "FP8 ran out of memory"),
        (CALM, FULL, "not reproduced", "no risk to remove"),
        ((None, 0, None), CALM, "undecided", "unknown preemptions"),
        (FULL, (None, 0, None), "undecided", "not sampled at every level"),
        (CALM, (None, 0, None), "not reproduced", "no risk to remove"),
    ],
)
def test_memory_is_a_risk_removed_only_where_there_was_one(run, bf16, fp8, verdict, said):
    found = memory(run, bf16, fp8)
    assert found.verdict == verdict and said in found.reason
    assert found.published is None and len(found.levels) == 4
    row = next(row for row in claims.claims_table(run).rows if row[0] == "M1")
    assert row[2] == "–" and row[5] == found.said and ("no risk to remove" in row[5]) == ("no risk" in said)


def test_memory_is_judged_by_all_valid_seeds_and_not_by_half_of_the_loads(run, tmp_path):
    fill(run, {("bf16", 50): PUBLISHED[("bf16", 50)]}, (1,))
    missing = next(v for v in claims.judge(run) if v.id == "M1")
    assert missing.verdict == "not run" and "no level fp8-50rps-r1, bf16-100rps-r1, fp8-100rps-r1" in missing.reason
    memory(run, CALM, CALM)
    full = dict(zip(("preemptions", "failed", "kv_cache_usage_max"), FULL, strict=True))
    level = {("bf16", 50): PUBLISHED[("bf16", 50)] | full}
    fill(run, level, (2,), valid=False, invalid_reason="late")
    found = next(v for v in claims.judge(run) if v.id == "M1")
    assert found.verdict == "not reproduced" and found.reason.endswith("left out as INVALID: bf16-50rps-r2")
    fill(run, level, (2,))
    assert next(v for v in claims.judge(run) if v.id == "M1").verdict == "reproduced"
    emulated = open_run(tmp_path / "emulated", read_profile("emulated-h100"))
    found = memory(emulated, FULL, CALM)
    assert found.verdict == "not run" and "EMULATED" in found.reason


def test_the_recorded_runs_judge_memory_and_name_where_it_ran_out():
    for name in ("h100-80gb", "h200-80gb"):
        seen = evidence(recorded(name))
        found = next(v for v in claims.judge(seen.run) if v.id == "M1")
        by_hand = [s for s in seen.summaries.values() if s.level.variant == "bf16" and s.level.rate in (50, 100)]
        assert found.verdict == "not reproduced" and len(by_hand) == 6 and len(found.levels) == 12
        assert found.measured == pytest.approx(100 * max(s.kv_cache_usage_max for s in by_hand)) and found.measured < 95
        assert sum(s.preemptions + s.failed for s in by_hand) == 0
    found = next(v for v in claims.judge(recorded("h100-80gb-long-prompts")) if v.id == "M1")
    told = "memory did run out: bf16-infrps-r1, bf16-infrps-r2, bf16-infrps-r3 (120 preemptions, 0 failed requests"
    assert found.verdict == "not run" and told in found.reason and "fp8-infrps" not in found.reason


def test_what_is_not_measured_is_a_row_that_says_what_it_needs(run):
    fill(run, PUBLISHED | EQUAL)
    rows = {row[0]: row for row in claims.claims_table(run).rows}
    assert list(rows) == EVERY_CLAIM
    for claim in (one for one in verdict.published()["claims"] if one["id"] in ("B3", "B4", "R4", "R5")):
        row = rows[claim["id"]]
        assert row[5] == "not run" and ("; profile h100-" in row[7] or f"it needs {claim['needs']}" in row[7])
        assert claim["said"].startswith("Lab4AI: ") and row[3:5] == ("–", "–")
    assert rows["B1"][2] == "90 %" and rows["B2"][2] == "2.00×" and rows["B4"][2] == "–"
    brief = claims.claims_table(run, brief=True)
    assert max(len(row[1]) for row in brief.rows) <= 60 and brief.to_markdown()


@pytest.mark.parametrize(
    ("direction", "low", "value", "high", "expected"),
    [
        ("equal", 9.5, 10, 10.5, "reproduced"),
        ("equal", 8.5, 9.5, 10.5, "undecided"),
        ("equal", 9.5, 10.5, 11.5, "undecided"),
        ("equal", 8, 10, 12, "undecided"),
        ("equal", 12, 13, 14, "not reproduced"),
        ("at most", 1, 2, 3, "reproduced"),
        ("at most", 10, 12, 14, "undecided"),
        ("at least", 20, 30, 40, "reproduced"),
        ("at least", 8, 8.5, 8.9, "not reproduced"),
        ("equal", 10.9, 10.9, 10.9, "reproduced"),
    ],
)
def test_one_rule_judges_by_the_interval(direction, low, value, high, expected):
    word, said = verdict.by_interval({"tolerance": 0.1, "direction": direction}, 10, value, low, high)
    assert word == expected and ("allows both answers" in said) == (expected == "undecided")


def test_other_variants_stand_for_the_published_ones():
    """The same requests behind another API server: its levels are judged, told apart, and nothing else is."""
    run = recorded("h200-80gb")
    instead = {"bf16": "bf16-rust", "fp8": "fp8-rust"}
    verdicts = {one.id: one for one in lab.judge(run, instead)}
    assert list(verdicts) == ["C1", "C2", "C3", "C4", "R1", "R2", "R3"]
    p99 = run.summaries()["fp8-rust-60rps-r1"].p99_ttft_ms
    assert verdicts["R1"].measured == p99 and verdicts["R1"].published == 120
    assert verdicts["C3"].measured == pytest.approx(run.summaries()["fp8-rust-100rps-r1"].request_throughput)
    # BF16 was not sent 50 requests/s there.
    assert verdicts["C1"].verdict == "not run" and verdicts["C1"].reason == "the run holds no level bf16-rust-50rps-r1"
    assert verdicts["C3"].levels == list(verdicts["C3"].limits) == ["fp8-rust-100rps-r1"]
    assert verdicts["R1"].reason.endswith("the same rate: bf16-rust 88.45 ms")
    assert "bf16-rust stands for bf16 and fp8-rust stands for fp8" in repr(lab.claims_table(run, instead=instead))
    own = {one.id: one.measured for one in lab.judge(run)}
    assert own["C3"] != verdicts["C3"].measured and own["R1"] != p99
    with pytest.raises(lab.BadInput, match="no variant 'fp4'"):
        lab.judge(run, {"fp8": "fp4"})
    with pytest.raises(lab.BadInput, match="instead: 'bf16-rust' is no variant that claims are about .bf16, "):
        lab.claims_table(run, instead={"bf16-rust": "bf16"})


def test_levels_that_share_no_seed_leave_a_claim_open(tmp_path):
    for name, levels, claim in (("h200-80gb", ("bf16-rust-infrps-r[12]", "fp8-rust-infrps-r[23]"), "R2"),
                                ("h200-80gb-recipes", ("int8-infrps-r[12]", "fp8-kv-infrps-r[23]"), "B4"),
                                ("h200-80gb-x2-8b", ("fp8-unsealed-infrps-r1", "fp8-[td]p2-infrps-r[23]"), "R5")):  # fmt: skip
        shutil.copytree(DATA / "recorded" / name, tmp_path / name)
        for path in [path for pattern in levels for path in (tmp_path / name / "levels").glob(pattern)]:
            shutil.rmtree(path)
        found = next(one for one in lab.judge(open_run(source=tmp_path / name)) if one.id == claim)
        assert found.verdict == "undecided" and "no seed" in found.reason, found


def test_the_service_line_is_of_all_seeds(tmp_path):
    shutil.copytree(DATA / "recorded" / "h200-80gb", tmp_path / "run")
    levels = tmp_path / "run" / "levels"
    slow, name = levels / "fp8-100rps-r1", "fp8-60rps-r2"
    shutil.copytree(slow, levels / name)
    said = json.loads((slow / "summary.json").read_text())
    said["level"] |= {"rate": 60.0, "repeat": 2}
    (levels / name / "summary.json").write_text(json.dumps(said))
    found = next(one for one in lab.judge(open_run(source=tmp_path / "run")) if one.id == "R1")
    assert found.verdict == "not reproduced" and found.measured == said["p99_ttft_ms"] > 120
    assert name in found.levels and "of 2 seeds that is the slowest" in found.reason
