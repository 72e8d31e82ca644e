"""The README is true: its tables come from the recorded runs, its commands and files exist."""

import re

import pytest

from fp8lab import cli
from fp8lab.paths import PROJECT
from fp8lab.report.claims import claims_table
from fp8lab.runs import open_run

README = (PROJECT / "README.md").read_text()


@pytest.mark.parametrize("name", sorted(path.name for path in (PROJECT / "data" / "recorded").iterdir()))
def test_claims_tables_are_those_of_the_recorded_runs(name):
    block = re.search(rf"<!-- claims {name} -->\n(.*?)\n<!-- end -->", README, re.DOTALL)
    if name == "h200-80gb":
        assert block, "the README shows the recorded run on a GPU"
    if block:
        assert block[1].strip() == claims_table(open_run(source=name)).to_markdown()


def test_linked_files_exist():
    targets = re.findall(r"\]\(([^)#:]+)\)", README)
    assert targets and all((PROJECT / target).exists() for target in targets)


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
