"""A run that was measured on another card than its profile names says so wherever it is shown, and judges nothing."""

import json
import re
import shutil

import pytest

import fp8lab as lab
from fp8lab.errors import BadInput
from fp8lab.paths import DATA
from fp8lab.report.comparison import worth_figure
from fp8lab.report.quality import answers_table, asked_table, published_table, quality_table
from fp8lab.results.evidence import evidence
from fp8lab.results.run_folder import open_run
from test_fair import FIGURES, TABLES

A100 = "NVIDIA A100-SXM4-80GB"
NOTE = f"OTHER CARD: {A100}, not the profile's H100 SXM 80 GB. "
SHOWN = [lab.levels_table, lab.resources_table, lab.memory_table, lab.cross_check_table, lab.environment_table]
DRAWN = [
    lab.throughput_figure, lab.concurrency_figure, lab.rate_figure, lab.tpot_figure, lab.memory_figure,
    lab.batching_figure, worth_figure,
]  # fmt: skip


def measured_on(name: str, tmp_path, *, later: bool = False):
    """The recorded run h100-80gb as if it, or only its last part, had been measured on that card."""
    folder = tmp_path / "other"
    folder.mkdir(exist_ok=True)
    (folder / "levels").symlink_to(DATA / "recorded" / "h100-80gb" / "levels")
    manifest = json.loads((DATA / "recorded" / "h100-80gb" / "run.json").read_text())
    for place in manifest["continued"][-1:] if later else [manifest, *manifest["continued"]]:
        place["machine"]["gpus"] = [name]
    (folder / "run.json").write_text(json.dumps(manifest))
    return open_run(source=folder)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return measured_on(A100, tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize("table", [*TABLES, *SHOWN, lab.claims_table, lab.worth_table])
def test_every_table_says_so(other, table):
    assert table(other).caption.startswith(NOTE)


@pytest.mark.parametrize("figure", [*FIGURES, *DRAWN])
def test_every_figure_says_so(other, figure):
    drawn = figure(other)
    assert drawn.caption.startswith(NOTE)
    assert any("OTHER CARD" in text.get_text() for text in drawn.canvas.axes[0].texts)


def test_it_gives_no_verdict_and_no_share_of_a_datasheet_that_is_not_its_own(other):
    judged = {v.id: v for v in lab.judge(other)}
    assert {v.verdict for v in judged.values()} == {"not run"}
    assert judged["C1"].measured and judged["C1"].reason.startswith(f"{NOTE[:-2]}, so no verdict")
    assert lab.claims_across(other).columns[3] == "other (OTHER CARD)"
    seen = evidence(other)
    assert all(seen.roofline(level_id) is None for level_id in seen.summaries)


def test_a_part_of_it_is_enough(tmp_path):
    run = measured_on("NVIDIA H100 PCIe", tmp_path, later=True)
    assert "OTHER CARD: NVIDIA H100 PCIe" in lab.levels_table(run).caption
    assert {v.verdict for v in lab.judge(run)} == {"not run"}


@pytest.mark.parametrize("table", [quality_table, asked_table, answers_table, published_table])
def test_quality_says_so_too(tmp_path, table):
    shutil.copytree(DATA / "recorded" / "smollm2-h200", tmp_path / "run")
    manifest = json.loads((tmp_path / "run" / "run.json").read_text())
    manifest["profile"]["gpu"] = json.loads((DATA / "recorded" / "h200-80gb" / "run.json").read_text())["profile"][
        "gpu"
    ]
    assert not table(open_run(source=_with(tmp_path, manifest, manifest["machine"]["gpus"]))).caption.startswith(
        "OTHER"
    )
    assert table(open_run(source=_with(tmp_path, manifest, [A100]))).caption.startswith("OTHER CARD: NVIDIA A100")


@pytest.mark.parametrize(
    ("run", "variant", "said"),
    [
        ("smollm2-h200-recipes", "fp8-online", "holds no answers of 'fp8-online' (it holds those of: bf16, bf16-again"),
        ("h100-80gb", "fp8", "holds no quality measurement; make one"),
    ],
)
def test_answers_that_a_run_does_not_hold_are_one_clear_error(run, variant, said):
    with pytest.raises(BadInput, match=re.escape(said)):
        answers_table(open_run(source=run), variant)


def _with(tmp_path, manifest, gpus):
    manifest["machine"]["gpus"] = gpus
    (tmp_path / "run" / "run.json").write_text(json.dumps(manifest))
    return tmp_path / "run"


def test_no_mark_where_there_is_no_reason_for_one():
    for name in ("h100-80gb", "h200-80gb", "h100-80gb-long-prompts"):
        run = open_run(source=name)
        assert "CARD" not in lab.levels_table(run).caption + lab.saturation_figure(run).caption


def test_the_line_of_vllms_share_is_that_of_the_commands(tmp_path):
    """A variant may take another share than the one that all have."""
    folder = tmp_path / "run"
    shutil.copytree(DATA / "recorded" / "h100-80gb", folder)

    def named():
        return [text.get_text() for text in lab.memory_figure(open_run(source=folder)).canvas.axes[0].texts]

    assert "vLLM's share 71.6" in named()
    for path in folder.glob("levels/*/summary.json"):
        summary = json.loads(path.read_text())
        command = summary["server"]["command"]
        command[command.index("--gpu-memory-utilization") + 1] = "0.5" if "fp8" in path.parent.name else "0.6"
        path.write_text(json.dumps(summary))
    assert not any("vLLM's share" in text for text in named())
