"""vLLM's client as a second witness: a stand-in for it that fails, hangs or outlives its owner must harm nothing."""

import dataclasses
import subprocess
import sys
import time

import psutil
import pytest

import fp8lab as lab
from conftest import running, wait_for
from fp8lab.errors import InUse, LevelFailed, ServerFailed
from fp8lab.experiment import speed
from fp8lab.load import vllm_bench
from fp8lab.load.endpoint import Endpoint
from fp8lab.results.run_folder import open_run

HANGS = "import sys, time; print('sending', flush=True); time.sleep(600)"
BREAKS = "import sys; sys.exit('KeyError: no such dataset')"
HALF = "import sys; open(sys.argv[sys.argv.index('--result-dir') + 1] + '/result.json', 'w').write('{\"dura')"
WORKS = """
import json, sys
said = {kind + "_" + name: 1.0 for kind in ("mean", "p99") for name in ("ttft_ms", "tpot_ms", "itl_ms")}
said |= {"completed": 20, "num_prompts": 20, "duration": 1.0, "request_throughput": 20.0, "output_throughput": 20.0}
folder = sys.argv[sys.argv.index("--result-dir") + 1]
json.dump(said | {"total_output_tokens": 20}, open(folder + "/result.json", "w"))
"""
ENDPOINT = Endpoint("http://127.0.0.1:9", "m", "sk-very-secret-value")


def run_client(**options) -> dict:
    return vllm_bench.run(ENDPOINT, lab.fixed_length(20, input_tokens=64), 10.0, tokenizer="none", **options)


def test_the_result_is_read(monkeypatch):
    monkeypatch.setattr(vllm_bench, "_RUN", WORKS)
    assert run_client(time_dilation=2.0)["request_throughput"] == 40.0


@pytest.mark.parametrize(("client", "said"), [(BREAKS, "KeyError: no such dataset"), (HALF, "")])
def test_a_client_that_fails_is_one_clear_error(monkeypatch, client, said):
    monkeypatch.setattr(vllm_bench, "_RUN", client)
    with pytest.raises(LevelFailed, match=f"^vllm bench serve failed: {said}"):
        run_client()


def test_requests_that_the_client_would_leave_out_are_no_cross_check():
    for lengths in (
        {"input_tokens": 1024},
        {"input_tokens": 64, "output_tokens": 3},
        {"input_tokens": 1000, "output_tokens": 1048},
    ):
        with pytest.raises(lab.LevelFailed, match="20 of 20 requests are none"):
            vllm_bench.run(ENDPOINT, lab.fixed_length(20, **lengths), 10.0, tokenizer="none")


def test_a_client_that_hangs_is_ended_at_its_deadline(monkeypatch):
    monkeypatch.setattr(vllm_bench, "_RUN", HANGS)
    began, before = time.monotonic(), psutil.Process().children()
    with pytest.raises(LevelFailed, match="vllm bench serve did not end within 1 s: sending"):
        run_client(timeout_s=1.0)
    assert time.monotonic() - began < 10
    assert psutil.Process().children() == before


def test_a_failure_quotes_no_key(monkeypatch):
    monkeypatch.setattr(vllm_bench, "_RUN", "import os, sys; sys.exit('key ' + os.environ['OPENAI_API_KEY'])")
    with pytest.raises(LevelFailed, match=r"failed: key \*\*\*\*") as failed:
        run_client()
    assert "sk-very" not in str(failed.value)


def test_the_client_of_a_killed_owner_ends():
    owner = (
        "import fp8lab as lab; from fp8lab.load import vllm_bench as bench; from fp8lab.load.endpoint import Endpoint; "
        f"bench._RUN = {HANGS!r}; "
        "bench.run(Endpoint('http://127.0.0.1:9', 'm'), lab.fixed_length(20, input_tokens=64), 10.0, tokenizer='none')"
    )
    with subprocess.Popen([sys.executable, "-c", owner]) as process:
        family = wait_for(
            lambda: len(found := psutil.Process(process.pid).children(recursive=True)) == 2 and found,
            what="the watchdog and the client",
        )
        process.kill()
    wait_for(lambda: not any(running(member.pid) for member in family), 20, "the end of the client")


# A measurement goes on without it, and without a variant that does not start.


def checked(path):
    """The profile of the stand-in for vLLM, every level to be cross-checked."""
    profile = lab.load_profile(str(path))
    levels = {
        name: tuple(dataclasses.replace(level, cross_check=True) for level in levels)
        for name, levels in profile.protocols.items()
    }
    return dataclasses.replace(profile, protocols=levels)


def test_a_failed_cross_check_costs_no_level_and_is_made_up_for(fake_vllm, tmp_path, monkeypatch):
    profile = checked(fake_vllm())
    run = open_run(tmp_path / "run", profile)
    monkeypatch.setattr(vllm_bench, "_RUN", BREAKS)
    with pytest.raises(LevelFailed, match="bf16-50rps-r1 has no cross-check: .*no such dataset") as failed:
        lab.measure(run, profile)
    assert "fp8-100rps-r1 has no cross-check" in str(failed.value)
    assert sorted(run.summaries()) == ["bf16-50rps-r1", "fp8-100rps-r1"] and run.cross_checks() == {}
    deadlines, real = [], vllm_bench.run
    monkeypatch.setattr(vllm_bench, "_RUN", WORKS)
    monkeypatch.setattr(vllm_bench, "run", lambda *a, **o: deadlines.append(o["timeout_s"]) or real(*a, **o))
    assert [result.valid for result in lab.measure(run, profile)] == [True, True]
    assert sorted(run.cross_checks()) == ["bf16-50rps-r1", "fp8-100rps-r1"]
    assert all(300 < deadline < 900 for deadline in deadlines)


def test_a_variant_that_does_not_start_costs_no_other(fake_vllm, tmp_path):
    profile = lab.load_profile(str(fake_vllm("out-of-memory")))
    run = open_run(tmp_path / "run", profile)
    with pytest.raises(ServerFailed, match="the bf16 server ended with exit code 1") as failed:
        lab.measure(run, profile, ["as published", "equal load"])
    assert "not measured: bf16-50rps-r1, bf16-100rps-r1" in str(failed.value)
    assert sorted(run.summaries()) == ["fp8-100rps-r1", "fp8-50rps-r1"]


def test_every_failed_start_is_reported(fake_vllm, tmp_path):
    profile = lab.load_profile(str(fake_vllm("out-of-memory", "bad-model")))
    with pytest.raises(ServerFailed, match="the bf16 server ended") as failed:
        lab.measure(open_run(tmp_path / "run", profile), profile)
    assert "the fp8 server ended" in str(failed.value) and "not a valid model" in str(failed.value)


def test_what_is_wrong_for_all_variants_stops_at_once(fake_vllm, tmp_path, monkeypatch):
    profile, tried = lab.load_profile(str(fake_vllm())), []

    def occupied(_profile, variant, **_options):
        tried.append(variant)
        raise InUse("the GPU is in use")

    monkeypatch.setattr(speed, "start_server", occupied)
    with pytest.raises(InUse):
        lab.measure(open_run(tmp_path / "run", profile), profile)
    assert tried == ["bf16"]


def test_a_level_that_could_not_be_measured_costs_no_other(fake_vllm, tmp_path, monkeypatch):
    profile, real = lab.load_profile(str(fake_vllm())), speed.load_test

    def sometimes(server, **options):
        if server.variant == "bf16":
            raise LevelFailed("load worker 0 ended with exit code 1 before it was ready")
        return real(server, **options)

    monkeypatch.setattr(speed, "load_test", sometimes)
    run = open_run(tmp_path / "run", profile)
    with pytest.raises(LevelFailed, match="bf16-.* was not measured: load worker 0 ended with exit code 1"):
        lab.measure(run, profile)
    assert {summary.level.variant for summary in run.summaries().values()} == {"fp8"}
