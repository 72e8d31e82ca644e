"""A page that opens anywhere and an archive that opens again."""

import re
import zipfile

import nbformat
import pytest

from fp8lab.config.profile_file import read_profile
from fp8lab.errors import BadInput
from fp8lab.report import notebooks
from fp8lab.report.notebooks import share
from fp8lab.results.run_folder import open_run


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.servers
def test_a_shared_run_opens_on_another_machine(home):
    run = open_run(source="h200-80gb")
    (page,), archive = share(run, home / "out", notebooks=notebooks.find("04"))
    text = page.read_text()
    fetched = re.findall(r'<(?:script|img|link|iframe)[^>]*(?:src|href)="(?!data:)([^"#]+)"', text)
    assert fetched == [] and "@import" not in text and 'lang="en"' in text and text.count("<figure>") >= 4
    again = open_run(source=archive)
    assert again.read_only and again.summaries() == run.summaries() and again.path.name == "h200-80gb"
    assert not any("tokens" in name or "log" in name for name in zipfile.ZipFile(archive).namelist())
    assert open_run(source=archive).path == again.path  # unpacked once


@pytest.mark.servers
def test_a_run_of_answers_alone_is_shared_too(home):
    run = open_run(source="smollm2-h200")
    (page,), archive = share(run, home / "out", notebooks=notebooks.find("07_quality"))
    text = page.read_text()
    assert not run.summaries() and text.count("<figure>") == 2 and "IProgress" not in text and "Traceback" not in text
    assert "bf16-again (noise floor)" in text and "99.28" in text
    assert open_run(source=archive).read_parts("quality") == run.read_parts("quality")


def test_nothing_measured_is_nothing_to_share(home):
    run = open_run(home / "run", read_profile("emulated-h100"))
    with pytest.raises(BadInput, match="nothing to share"):
        share(run, home / "out", notebooks=[notebooks.FRONT])


def test_what_is_of_no_run_is_not_shared(home):
    with pytest.raises(BadInput, match="11_planner.ipynb is of no run.*fp8lab reproduce --notebook 11_planner"):
        share(open_run(source="h200-80gb"), home / "out", notebooks=notebooks.find("11_planner"))
    assert not (home / "out").exists()


@pytest.mark.servers
def test_a_page_that_fails_names_no_file_that_is_gone(home):
    cells = [
        nbformat.v4.new_code_cell("source = ''", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell("1 / 0"),
    ]
    nbformat.write(
        nbformat.v4.new_notebook(cells=cells, metadata={"language_info": {"name": "python"}}), home / "mine.ipynb"
    )
    with pytest.raises(notebooks.NotebookFailed, match="ZeroDivisionError: division by zero$"):
        share(open_run(source="h200-80gb"), home / "out", notebooks=[home / "mine.ipynb"])
    assert list((home / "out").iterdir()) == []


@pytest.mark.parametrize("names", [["../evil"], ["/etc/evil"], ["a/run.json", "b/run.json"], []])
def test_archives_of_strangers_are_refused(home, names):
    path = home / "run.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, "{}")
    with pytest.raises(BadInput, match="not an archive of one run"):
        open_run(source=path)
    assert not list(home.glob("**/evil"))


def test_a_broken_archive_is_refused(home):
    (home / "run.zip").write_bytes(b"PK\x03\x04 and then nothing")
    with pytest.raises(BadInput, match="cannot be unpacked"):
        open_run(source=home / "run.zip")


def broken(path, *, at, to):
    """Changes one byte of a file; `at` counts from the first `PK` of its list of contents when it is negative."""
    data = bytearray(path.read_bytes())
    data[at if at >= 0 else data.index(b"PK\x01\x02") - at] = to
    path.write_bytes(data)


@pytest.mark.parametrize("at, to", [(60, 0xFF), (-8, 1), (-10, 99)], ids=["contents", "encrypted", "method"])
def test_a_damaged_archive_is_one_error(home, at, to):
    path = home / "run.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("run/run.json", "{}" * 1000)
    broken(path, at=at, to=to)
    with pytest.raises(BadInput, match="run.zip cannot be unpacked"):
        open_run(source=path)
