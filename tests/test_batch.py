"""The queue of runs: what a matrix means, and that a crash costs nothing that is done."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest

from conftest import marked, nothing_left, wait_for
from fp8lab import batch as batches
from fp8lab import hosts
from fp8lab.batch import _Queue, load_matrix, write_pages
from fp8lab.config.profile_file import read_profile
from fp8lab.errors import BadInput, InUse
from fp8lab.hosts import Job, Place
from fp8lab.paths import DATA
from fp8lab.results.files import write_json
from fp8lab.results.run_folder import open_run
from fp8lab.system.locks import Lock
from warm_cli import fp8lab

# One level of some requests in a tiny run.
PROFILE = """
extends = "emulated-h100"
title = "For a batch"
[emulation]
time_dilation = 8
[workload]
warmup_requests = 2
[protocols."as published"]
levels = [{ variant = "bf16", rate = 100, requests = 20 }]
[protocols."equal load"]
levels = [{ variant = "fp8", rate = 100, requests = 20 }]
"""
# A notebook that measures and shows no figure: the front one has tests of its own.
CELLS = (
    'profile_name = "auto"\nrun_dir = ""\nsource = ""\nprotocols = ["as published"]',
    "import fp8lab as lab\nrun = lab.open_run(run_dir, profile_name, source=source)",
    "results = lab.measure(run, run.profile, protocols)\nlab.levels_table(run)",
)
MATRIX = """
profiles = ["small.toml"]
notebook = "NOTEBOOK"
protocols = ["as published"]
[workloads.chat]
[workloads.short]
trace = "random"
input_tokens = 16
output_tokens = 8
"""


@pytest.fixture
def short(tmp_path):
    """The path of a notebook that takes seconds."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    notebook.cells[0].metadata.tags = ["parameters"]
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, tmp_path / "short.ipynb")
    return tmp_path / "short.ipynb"


@pytest.fixture
def matrix(tmp_path, short):
    (tmp_path / "small.toml").write_text(PROFILE)
    (tmp_path / "matrix.toml").write_text(MATRIX.replace("NOTEBOOK", str(short)))
    return tmp_path / "matrix.toml"


class ThisHost(Place):
    """A host whose jobs the tests end themselves."""

    def run(self, job, cards, closed):
        raise AssertionError("no job is run here")


def jobs(*names: str) -> list[Job]:
    return [Job(name, Path(name), ()) for name in names]


def taken(queue: _Queue) -> tuple[str, int]:
    job, number, mine = queue.take(queue.places[0])
    assert len(mine) == 1
    return job.name, number


def test_pages_that_fail_do_not_end_the_queue(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(batches, "write_pages", lambda _folder: 1 / 0)
    queue = _Queue(tmp_path, jobs("one", "two"), [ThisHost("", 3)])
    assert taken(queue) == ("one", 1) and queue.finish("one", 0) == 1 and taken(queue) == ("two", 2)
    assert "the pages of" in capsys.readouterr().err


def test_a_matrix_is_every_profile_with_every_workload(matrix):
    jobs = load_matrix(matrix).jobs()
    assert [name for name, _, _ in jobs] == ["small-chat", "small-short"]
    assert dict(jobs[1][2]) == {"trace": "random", "input_tokens": 16, "output_tokens": 8}


@pytest.mark.parametrize("text, said", [
    ("profiles = []", "at least one profile"),
    ('profiles = ["emulated-h100"]\nwhat = 1', "unknown keys"),
    ('profiles = ["no-such-profile"]', "no profile"),
    ("profiles = [1]", "profiles: expected a list of names"),
    ('profiles = ["emulated-h100"]\nvariants = "bf16"', "variants: expected a list of names"),
    ('profiles = ["emulated-h100"]\nnotebook = 3', "notebook: expected a name"),
    ('profiles = ["emulated-h100"]\n[workloads."a/b"]', "workload 'a/b' is no name"),
    ('profiles = ["emulated-h100"]\n[workloads.x]\ntrace = "a.CSV"', "no trace file '.*a.CSV'"),
    ('profiles = ["emulated-h100"]\nvariants = ["fp4"]', "no variant 'fp4'"),
    ('profiles = ["emulated-h100"]\nprotocols = ["none"]', "no protocol"),
    ('profiles = ["emulated-h100"]\nnotebook = "none"', "no notebook"),
    ('profiles = ["emulated-h100", "emulated-h100"]', "the same name"),
    ("profiles = [", "not valid TOML"),
    ('profiles = ["emulated-h100"]\nworkloads = 3', "workloads: expected a table"),
    ('profiles = ["emulated-h100"]\n[workloads.a]\ninput_tokens = "8"', "workload.input_tokens: expected a whole number"),
    ('profiles = ["emulated-h100"]\n[workloads.a]\nfoo = 1', "m.toml: workloads.a: workload: unknown keys .'foo'"),
    ('profiles = ["emulated-h100"]\n[workloads.a]\n[workloads.b]\ntrace = "random"\ninput_tokens = 100000',
     "m.toml: workloads.b, with profile emulated-h100: requests of 100,000 tokens in .* ask for shorter ones"),
    ('profiles = ["emulated-h100"]\n[workloads.a]\ntrace = "nope.csv"', "no trace file '.*/nope.csv'"),
])  # fmt: skip
def test_a_matrix_that_cannot_work_is_refused_at_once(tmp_path, text, said):
    (tmp_path / "m.toml").write_text(text)
    with pytest.raises(BadInput, match=said):
        load_matrix(tmp_path / "m.toml")


def batch(matrix, **options):
    command = [sys.executable, "-m", "fp8lab.cli", "batch", str(matrix), "--out", str(matrix.parent / "out")]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_a_batch_that_is_killed_in_its_second_run_finishes_on_the_next_call(matrix, fake_vllm):
    out = matrix.parent / "out"
    first = batch(matrix, start_new_session=True)
    deadline = time.monotonic() + 240
    while not (queue := _queue(out)) or queue["small-short"]["state"] != "running":
        assert first.poll() is None and time.monotonic() < deadline, first.communicate()
        time.sleep(0.2)
    time.sleep(3)  # into the second run
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    done = out / "small-chat" / "run" / "levels" / "bf16-100rps-r1" / "summary.json"
    before = done.stat().st_mtime_ns
    second = batch(matrix)
    stdout, stderr = second.communicate(timeout=400)
    assert second.returncode == 0, stderr
    assert {name: job["state"] for name, job in _queue(out).items()} == dict.fromkeys(_queue(out), "done")
    assert done.stat().st_mtime_ns == before and "[2/2] small-short" in stderr and "index.html" in stdout
    index, comparison = ((out / name).read_text() for name in ("index.html", "comparison.html"))
    assert index.count("short.html") == 2 and "small-short (EMULATED)" in comparison
    short = open_run(source=out / "small-short" / "run")
    assert short.profile.workload.trace == "random" and list(short.summaries()) == ["bf16-100rps-r1"]
    assert short.summaries()["bf16-100rps-r1"].prompt_tokens == 20 * (16 + 1)  # Llama's begin-of-text token


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_a_batch_that_ends_alone_leaves_no_job_and_no_server(tmp_path, fake_vllm, signum):
    """Not its process group: a `kill` of the one process, or the kernel's for want of memory."""
    profile = fake_vllm(requests=2000)
    path = tmp_path / "m.toml"
    path.write_text(f'profiles = ["{profile}"]\n')
    process = batch(path, start_new_session=True)
    pids = wait_for(lambda: marked("profile"), 120, "a server")  # a job's profile is called so
    job = psutil.Process(process.pid).children()
    process.send_signal(signum)
    process.communicate(timeout=30)
    nothing_left("profile", [*pids, *(one.pid for one in job)])


def test_the_pages_name_the_job_and_link_the_log_of_one_that_failed(tmp_path):
    jobs = {"emulated-h100": {"state": "done"}, "<broken>": {"state": "failed"}, "damaged": {"state": "failed"}}
    write_json(tmp_path / "queue.json", {"jobs": jobs})
    for name in jobs:
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.txt").write_text("what was said\n")
    for name in ("emulated-h100", "damaged"):
        shutil.copytree(DATA / "recorded" / "emulated-h100", tmp_path / name / "run")
    next((tmp_path / "damaged").glob("run/levels/*/summary.json")).write_text("{")
    write_pages(tmp_path)
    index, comparison = ((tmp_path / name).read_text() for name in ("index.html", "comparison.html"))
    assert 'href="&lt;broken&gt;/log.txt"' in index and "emulated-h100/log.txt" not in index
    assert "claims against emulated-h100:" in comparison and "run run" not in comparison
    assert "EMULATED" in comparison and "Its run cannot be read" in comparison


def test_jobs_are_counted_by_what_has_begun_and_what_has_ended(tmp_path):
    queue = _Queue(tmp_path, jobs("a", "b", "c"), [ThisHost("", 3)])
    assert taken(queue) == ("a", 1) and taken(queue) == ("b", 2)  # two GPUs
    assert queue.finish("b", 1) == 1
    assert "failed" in (tmp_path / "index.html").read_text()  # the pages follow each job
    assert taken(queue) == ("c", 3) and queue.take(queue.places[0]) is None
    assert queue.finish("a", 0) == 2


def test_a_job_with_invalid_levels_is_done_and_its_page_says_which_and_what_to_do(tmp_path, fake_vllm, short):
    """The whole way: through papermill, the queue and the pages, to the remedy and the end of it."""
    refused = tmp_path / "refused"
    refused.write_text("100000")
    profile = fake_vllm(bf16=f"refuse:{refused}", requests=8, dilation=8)
    path, out = tmp_path / "m.toml", tmp_path / "out"
    path.write_text(f'profiles = ["{profile}"]\nprotocols = ["as published"]\nnotebook = "{short}"\n')

    def states() -> list[str]:
        return [job["state"] for job in _queue(out).values()]

    first = batch(path)
    _, said = first.communicate(timeout=300)
    assert first.returncode == 3 and states() == ["invalid"], said
    run = open_run(source=next(out.glob("*/run")))
    assert [s.valid for s in run.summaries().values()] == [False, True]
    assert "done, with INVALID levels" in said
    index = (out / "index.html").read_text()
    assert "done, with INVALID levels" in index and "bf16-50rps-r1" in index and "--again bf16-50rps-r1" in index
    # It is not run again for ever, and is still no success.
    second = batch(path)
    _, said = second.communicate(timeout=60)
    assert second.returncode == 3 and "[1/1]" not in said
    refused.write_text("0")
    assert fp8lab("measure", "--run", str(run.path), "--again", "bf16-50rps-r1").returncode == 0
    third = batch(path)
    _, said = third.communicate(timeout=300)
    assert third.returncode == 0 and states() == ["done"], said
    assert "INVALID" not in (out / "index.html").read_text()


def test_a_failed_job_wins_over_an_invalid_one(tmp_path):
    states = {"good": "done", "odd": "invalid", "bad": "failed"}
    for name in states:
        (tmp_path / name).mkdir()
    shutil.copytree(DATA / "recorded" / "emulated-h100", tmp_path / "odd" / "run")
    summary = tmp_path / "odd" / "run" / "levels" / "bf16-50rps-r1" / "summary.json"
    summary.write_text(summary.read_text().replace('"valid": true', '"valid": false'))
    for held, expected in ((["good"], 0), (["good", "odd"], 3), (["good", "odd", "bad"], 1)):
        write_json(tmp_path / "queue.json", {"jobs": {name: {"state": states[name]} for name in held}})
        queue = _Queue(tmp_path, jobs(*held), [ThisHost("", 3)])
        while again := queue.take(queue.places[0]):  # what failed is tried again; here it fails again
            queue.finish(again[0].name, 1, queue.places[0], again[2])
        assert queue.exit_code() == expected


def test_a_jobs_output_is_in_its_log_and_in_the_terminal(tmp_path, capfd):
    command = [sys.executable, "-c", "import sys; print('out', flush=True); sys.exit('why it failed')"]
    (tmp_path / "log.txt").write_text("an earlier try\n")
    assert hosts._run(command, tmp_path / "log.txt", os.environ, lambda: False, shown=True) == 1
    assert (tmp_path / "log.txt").read_text() == "an earlier try\nout\nwhy it failed\n"
    assert capfd.readouterr().err == "out\nwhy it failed\n"


def test_the_example_is_a_matrix_that_runs_without_a_gpu():
    matrix = load_matrix(DATA / "batches" / "two-workloads.toml")
    assert [name for name, _, _ in matrix.jobs()] == ["emulated-h100-chat", "emulated-h100-summaries"]
    assert all(read_profile(profile).device == "emulated" for profile in matrix.profiles)


def _queue(out):
    try:
        return json.loads((out / "queue.json").read_text())["jobs"]
    except (OSError, ValueError):
        return None


def test_the_profile_of_a_job_is_one_that_users_could_write(matrix, tmp_path):
    from fp8lab.batch import _profile, _text

    read = load_matrix(matrix)
    name, profile, workload = read.jobs()[1]
    path = tmp_path / "job.toml"
    path.write_text(_text(_profile(read, profile, workload, name)))
    made = read_profile(str(path))
    assert made.workload.input_tokens == 16 and list(made.protocols) == ["as published"]


def test_a_workloads_trace_is_relative_to_the_matrix(matrix, tmp_path, monkeypatch):
    from fp8lab.batch import _profile, _text

    (tmp_path / "mine.csv").write_text("prompt_tokens,output_tokens\n" + "8,8\n" * 20)
    matrix.write_text('profiles = ["small.toml"]\nprotocols = ["as published"]\n[workloads.mine]\ntrace = "mine.csv"\n')
    monkeypatch.chdir("/")
    read = load_matrix(matrix)
    (name, profile, workload), path = read.jobs()[0], tmp_path / "job" / "profile.toml"
    path.parent.mkdir()
    path.write_text(_text(_profile(read, profile, workload, name)))
    assert read_profile(str(path)).workload.trace == str(tmp_path / "mine.csv")


def test_a_job_keeps_the_starts_that_its_profile_asks_for(tmp_path):
    from fp8lab.batch import _profile, _text

    (tmp_path / "small.toml").write_text(PROFILE.replace("levels", "starts = 2\nlevels", 1))
    (tmp_path / "m.toml").write_text('profiles = ["small.toml"]\nprotocols = ["as published"]')
    read = load_matrix(tmp_path / "m.toml")
    name, profile, workload = read.jobs()[0]
    (tmp_path / "job.toml").write_text(_text(_profile(read, profile, workload, name)))
    made = read_profile(str(tmp_path / "job.toml")).levels("as published")
    assert [(level.repeat, level.start) for level in made] == [(1, 1), (2, 2)]


def test_a_workload_with_arrival_times_is_refused_before_any_job(tmp_path):
    (tmp_path / "mine.csv").write_text("prompt_tokens,output_tokens,arrival_s\n8,8,0\n8,8,1\n")
    matrix = tmp_path / "matrix.toml"
    matrix.write_text('profiles = ["emulated-h100"]\n[workloads.mine]\ntrace = "mine.csv"\n')
    with pytest.raises(BadInput, match="holds arrival times"):
        load_matrix(matrix)


@pytest.mark.parametrize("text", ["{}", "[]", '{"jobs": []}', '{"jobs": {"emulated-h100": "done"}}', "torn {"])
def test_a_damaged_queue_begins_anew(tmp_path, text):
    (tmp_path / "queue.json").write_text(text)
    queue = _Queue(tmp_path, jobs("emulated-h100"), [])
    assert queue.jobs == {"emulated-h100": {"state": "waiting"}}


def test_a_batch_folder_takes_one_batch_at_a_time(tmp_path, matrix):
    lock = Lock(tmp_path / "out" / ".lock", "another batch")
    with pytest.raises(InUse, match="batch folder"):
        batches.run_batch(load_matrix(matrix), tmp_path / "out")
    lock.release()


def test_a_matrix_with_a_secret_is_refused_before_it_is_written_down(tmp_path, matrix, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "a-secret-of-mine")
    with (tmp_path / "small.toml").open("a") as file:
        file.write('[variant_env.bf16]\nOTHER = "a-secret-of-mine"\n')
    with pytest.raises(BadInput, match="holds the value of MY_TOKEN"):
        load_matrix(matrix)
