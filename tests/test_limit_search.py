"""The search for a limit on a stand-in for vLLM: what it makes of INVALID probes, and of levels that are there already."""

import dataclasses

import pytest

import fp8lab as lab
from conftest import make_records
from fp8lab.config.profile import Level
from fp8lab.config.this_machine import load_profile
from fp8lab.experiment.speed import start_server
from fp8lab.metrics.slo import SLO, required_requests
from fp8lab.results.run_folder import open_run
from test_runs import make_result

GENEROUS = SLO("a test's", 60_000, 60_000, share=0.9)
MANY = 100_000
PROBE = required_requests(1, 0.9)


@pytest.fixture
def refused(tmp_path):
    """The file that says how many requests the stand-in refuses."""
    return tmp_path / "refused"


@pytest.fixture
def profile(fake_vllm, refused):
    """The stand-in's BF16 refuses as many requests as `refused` says. All requests are alike, so that few suffice."""
    path = fake_vllm(bf16=f"refuse:{refused}", requests=20, dilation=8)
    alike = 'trace = "random"\ninput_tokens = 16\noutput_tokens = 20\nwarmup_requests = 2'
    path.write_text(path.read_text().replace("warmup_requests = 2", alike))
    refused.write_text("0")
    return load_profile(str(path))


@pytest.fixture
def search(profile, tmp_path):
    """Searches with the stand-in's BF16; returns the bracket."""

    def go(start=200, **options):
        run = open_run(tmp_path / "run", profile)
        with start_server(profile, "bf16", run=run) as server:
            return lab.find_max_rate(server, GENEROUS, run=run, start=start, seconds=1, **options)

    return go


def held(tmp_path) -> dict[str, bool]:
    return {level: s.valid for level, s in open_run(source=tmp_path / "run").summaries().items()}


def test_a_probe_that_was_disturbed_is_measured_again_in_the_same_search(search, refused, tmp_path):
    refused.write_text(str(PROBE // 2))
    search(max_probes=1)
    assert held(tmp_path) == {"bf16-200rps-r1": True}
    assert [path.name for path in (tmp_path / "run" / "set-aside").iterdir()] == ["bf16-200rps-r1-1"]


def test_an_invalid_probe_ends_its_search_and_the_next_one_begins_with_it(search, refused, tmp_path, capsys):
    refused.write_text(str(MANY))
    assert str(search(max_probes=1)) == "not known" and held(tmp_path) == {"bf16-200rps-r1": False}
    said = capsys.readouterr().err
    assert "bf16-200rps-r1: INVALID, so the search ends here: no request completed" in said and "search again" in said
    refused.write_text("0")
    search(max_probes=1)
    assert held(tmp_path) == {"bf16-200rps-r1": True}
    assert len(list((tmp_path / "run" / "set-aside").iterdir())) == 2


def stored(variant, rate, requests, ttft_s, late, repeat=1):
    """A level of constant gaps whose first tokens took `ttft_s`, but for `late` of them, which took a minute longer."""
    sent = [n / rate for n in range(requests)]
    first = [at + ttft_s + 61 * (n < late) for n, at in enumerate(sent)]
    records = make_records(sent, first, [at + 0.1 for at in first], [10] * requests)
    made = make_result(Level(variant=variant, rate=rate, requests=requests, repeat=repeat))
    summary = dataclasses.replace(made.summary, requests=requests)
    return dataclasses.replace(made, records=records, tokens=None, summary=summary)


def test_the_search_and_the_table_of_a_run_give_one_limit(search, profile, tmp_path):
    """The run holds a rate that is not shown to be met, one with two seeds that disagree, and one that is too short."""
    run = open_run(tmp_path / "run", profile)
    run.write(stored("bf16", 220, PROBE, 0.01, 0))
    run.write(stored("bf16", 250, PROBE * 2, 0.01, PROBE // 5))  # every tenth is late: too close to call
    run.write(stored("bf16", 300, PROBE, 0.01, 0))
    run.write(stored("bf16", 300, PROBE, 0.01, PROBE, repeat=2))
    run.write(stored("bf16", 230, 20, 0.01, 0))  # decides nothing
    assert lab.slo_table(run, [GENEROUS]).rows[0][1] == "220 to 250"
    found = search(max_probes=1)
    assert "bf16-235rps-r1" in held(tmp_path)  # between 220 and 250
    run = open_run(tmp_path / "run")
    assert lab.slo_table(run, [GENEROUS]).rows[0][1] == str(found)


def test_a_level_too_short_to_tell_is_kept_and_its_rate_measured_with_the_next_repeat(search, profile, tmp_path):
    run = open_run(tmp_path / "run", profile)
    run.write(stored("bf16", 200, 20, 0.01, 0))
    before = (run.path / "levels" / "bf16-200rps-r1" / "summary.json").read_bytes()
    search(max_probes=1)
    assert list(held(tmp_path)) == ["bf16-200rps-r1", "bf16-200rps-r2"]
    assert (run.path / "levels" / "bf16-200rps-r1" / "summary.json").read_bytes() == before


def test_a_level_that_the_profile_plans_shorter_keeps_its_name(search, tmp_path):
    """50 req/s is a level of 20 requests there: what the search measures must not stand in its way."""
    search(max_probes=1, start=50)
    assert list(held(tmp_path)) == ["bf16-50rps-r2"]
