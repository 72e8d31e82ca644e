"""The README is true: its tables come from the recorded runs, its commands and files exist."""

import math
import re

import pytest

from fp8lab import cli
from fp8lab.measure.compare import ratio
from fp8lab.paths import PROJECT
from fp8lab.report.claims import claims_table
from fp8lab.report.evidence import evidence
from fp8lab.report.fair import ablation_effects, kv_room
from fp8lab.runs import open_run

README, CHINESE, CONTRIBUTING = (
    (PROJECT / name).read_text() for name in ("README.md", "README.zh-CN.md", "CONTRIBUTING.md")
)


@pytest.mark.parametrize("name", sorted(path.name for path in (PROJECT / "data" / "recorded").iterdir()))
def test_claims_tables_are_those_of_the_recorded_runs(name):
    block = re.search(rf"<!-- claims {name} -->\n(.*?)\n<!-- end -->", README, re.DOTALL)
    if name == "h200-80gb":
        assert block, "the README shows the recorded run on a GPU"
    if block:
        assert block[1].strip() == claims_table(open_run(source=name), brief=True).to_markdown()


def headline_numbers() -> list[str]:
    """The numbers that the READMEs' prose rests on, as it writes them."""
    seen = evidence(open_run(source="h200-80gb"))
    metric, joules = "output_token_throughput", "joules_per_output_token"
    load = ratio(seen.seeds("bf16", 100, metric), seen.seeds("bf16", 50, metric))
    equal, rust = seen.compare("fp8", "bf16", 50, metric), seen.compare("fp8-rust", "bf16-rust", math.inf, metric)
    energy = seen.compare("fp8", "bf16", 50, joules)
    halves = {name: one for _, rate, name, one in ablation_effects(seen, joules) if rate == 50}
    fullest = {row[0]: row[4] for row in kv_room(seen)}
    told = [f"{one.value:.2f}×" for one in (load, equal, rust, energy, halves["FP8 weights"], halves["FP8 KV cache"])]
    told += [f"{one.low:.2f} to {one.high:.2f}" for one in (load, equal, rust, energy)]
    told += [f"{fullest[variant]:.0%}".replace("%", " %") for variant in ("bf16", "fp8")]
    most = max(s["request_throughput"] for s in seen.summaries.values())
    return [*told, f"{most:.0f} req/s"]


@pytest.mark.parametrize("text", [README, CHINESE], ids=["README.md", "README.zh-CN.md"])
def test_headline_numbers_are_those_of_the_recorded_run(text):
    missing = [number for number in headline_numbers() if number not in text]
    assert not missing


def test_the_chinese_readme_keeps_step():
    rows = claims_table(open_run(source="h200-80gb"), brief=True).rows
    block = re.search(r"<!-- claims h200-80gb zh -->\n(.*?)\n<!-- end -->", CHINESE, re.DOTALL)[1]
    shown = [line.strip("| ").split(" | ") for line in block.splitlines()[2:]]
    assert [(row[0], *row[2:]) for row in rows] == [(row[0], *row[2:]) for row in shown]
    commands = re.findall(r"^    (?:make|fp8lab) .*$", CHINESE, re.MULTILINE)
    assert len(commands) > 8 and set(commands) <= set(README.splitlines())
    assert set(re.findall(r"^\| (reproduced.*?|not.*?|und.*?|inv.*?) \|", CHINESE, re.MULTILINE)) == set(
        re.findall(r"^\| (reproduced.*?|not.*?|und.*?|inv.*?) \|", README, re.MULTILINE)
    )


@pytest.mark.parametrize(
    "text", [README, CHINESE, CONTRIBUTING], ids=["README.md", "README.zh-CN.md", "CONTRIBUTING.md"]
)
def test_linked_files_exist(text):
    targets = re.findall(r"\]\(([^)#:]+)\)", text)
    assert targets and all((PROJECT / target).exists() for target in targets)


def test_named_tests_exist():
    named = set(re.findall(r"\btest_[a-z_]+\.py", CONTRIBUTING + README))
    assert named and all((PROJECT / "tests" / name).exists() for name in named)


def test_named_commands_exist():
    used = set(re.findall(r"^    fp8lab ([a-z-]+)", README, re.MULTILINE))
    assert used and used <= set(cli.EXAMPLES)
    made = set(re.findall(r"^    make ([a-z]+)", README, re.MULTILINE))
    makefile = (PROJECT / "Makefile").read_text()
    assert made and all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in made)


def test_recorded_runs_are_whole_and_small():
    folders = list((PROJECT / "data" / "recorded").iterdir())
    assert sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file()) < 12e6
    for folder in folders:
        run = open_run(source=folder)
        for level_id, summary in run.summaries().items():
            assert summary["valid"] and summary["failed"] == 0, level_id
        assert run.manifest["source"]["commit"] and run.manifest["software"]["packages"]
