import csv
import dataclasses
import json
import re

import numpy as np
import pandas as pd
import pytest

import fp8lab as lab
from conftest import marked, streaming_server
from fp8lab.config.conversations import token_counter
from fp8lab.config.trace import NAMES, arrival_times, fixed_length, from_file, named_trace, rescaled, sharegpt_like
from fp8lab.config.trace_file import read_lengths
from fp8lab.errors import BadInput
from fp8lab.experiment import speed
from fp8lab.experiment.speed import plan_table
from fp8lab.models.checkpoints import model_folder
from fp8lab.paths import DATA
from fp8lab.results.run_folder import open_run
from warm_cli import fp8lab


def test_lengths_have_the_published_shape():
    trace = sharegpt_like(20_000)
    assert np.mean(trace.prompt_tokens) == pytest.approx(200, rel=0.05)
    assert np.mean(trace.output_tokens) == pytest.approx(183, rel=0.05)
    assert min(trace.output_tokens) >= 4 and max(trace.prompt_tokens) <= 1024


def test_a_seed_repeats_and_a_shorter_trace_is_a_prefix():
    assert sharegpt_like(50, seed=3) == sharegpt_like(50, seed=3)
    assert sharegpt_like(50, seed=3).prompts != sharegpt_like(50, seed=4).prompts
    assert sharegpt_like(200).head(50) == sharegpt_like(50)


def test_prompts_have_exactly_their_length_in_tokens():
    count = token_counter(str(model_folder("llama-3-8b")))
    trace = sharegpt_like(200)
    begin_of_text = 1
    assert [count(p) - begin_of_text for p in trace.prompts] == list(trace.prompt_tokens)


def test_arrivals_are_poisson_and_end_where_vllm_ends_them():
    times = arrival_times(20_000, 50, seed=1)
    gaps = np.diff(times)
    assert times[-1] == pytest.approx(20_000 / 50)
    assert gaps.std() / gaps.mean() == pytest.approx(1, rel=0.05)
    assert (arrival_times(100, 50, seed=1) != arrival_times(100, 50, seed=2)).any()


def test_other_arrival_processes():
    assert (arrival_times(10, np.inf) == 0).all()
    assert np.diff(arrival_times(10, 5, burstiness=np.inf)) == pytest.approx(np.full(9, 0.2))
    bursty = np.diff(arrival_times(20_000, 50, burstiness=0.25, seed=1))
    assert bursty.std() / bursty.mean() == pytest.approx(2, rel=0.1)
    free = arrival_times(1000, 50, normalised=False, seed=1)
    assert free[-1] != pytest.approx(20, rel=1e-6)


@pytest.mark.parametrize("rate", [0, -1, float("nan")])
def test_a_rate_must_be_positive(rate):
    with pytest.raises(BadInput, match="above 0"):
        arrival_times(10, rate)


@pytest.mark.parametrize("requests", [0, -5])
def test_an_empty_trace_is_refused(requests):
    with pytest.raises(BadInput, match="empty"):
        lab.sharegpt_like(requests)
    with pytest.raises(BadInput, match="empty"):
        fixed_length(requests)


def test_a_trace_cannot_be_longer_than_it_is():
    with pytest.raises(BadInput, match="has 10 requests, 11"):
        sharegpt_like(10).head(11)


def test_lengths_and_times_from_a_csv(tmp_path):
    path = tmp_path / "mine.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["prompt_tokens", "output_tokens", "arrival_s"], [5, 7, 0], [6, 8, 0.5]])
    trace = from_file(path)
    assert trace.prompt_tokens == (5, 6) and trace.output_tokens == (7, 8) and trace.arrival_s == (0, 0.5)
    assert len(trace.prompts[0].split()) == 5


def with_workload(path, **workload):
    """The profile at `path` with another workload."""
    profile = lab.load_profile(str(path))
    return dataclasses.replace(profile, workload=dataclasses.replace(profile.workload, **workload))


def test_arrival_times_in_a_profiles_trace_are_refused_before_anything_starts(fake_vllm, tmp_path):
    path = tmp_path / "mine.csv"
    rows = [f"5,{7 + i},{i / 10}" for i in range(20)]
    path.write_text("\n".join(["prompt_tokens,output_tokens,arrival_s", *rows]))
    profile = with_workload(fake_vllm(), trace=str(path))
    run = open_run(tmp_path / "run", profile)
    told = "the trace 'mine.csv' holds arrival times .*leave that column out .*fp8lab load-test --trace FILE"
    for refused in (lambda: lab.measure(run, profile), lambda: plan_table(profile, ["as published"])):
        with pytest.raises(BadInput, match=told):
            refused()
    assert not (run.path / "logs").exists() and marked(profile.name) == []
    # Without its times the file is used; what is measured already needs it no more.
    path.write_text(re.sub(r",[^,\n]*$", "", path.read_text(), flags=re.M))
    results = lab.measure(run, profile)
    assert [result.records["output_tokens_asked"].tolist() for result in results] == [list(range(7, 27))] * 2
    path.unlink()
    assert len(lab.measure(run, profile)) == 2
    with pytest.raises(BadInput, match="no trace file"):
        lab.measure(run, profile, again=["bf16-50rps-r1"])
    assert len(run.summaries()) == 2  # none was set aside
    with (
        lab.serve(profile, "bf16", log_path=tmp_path / "x.log") as server,
        pytest.raises(BadInput, match="holds arrival times"),
    ):
        lab.load_test(server, dataclasses.replace(lab.fixed_length(2), arrival_s=(0.0, 1.0)), rate=5)


@pytest.mark.parametrize(
    ("workload", "warmup", "lengths"),
    [
        ({"trace": "random", "input_tokens": 300, "output_tokens": 9}, 3, [(300, 9)] * 3),
        ({"trace": "random", "input_tokens": 300, "output_tokens": 90}, 3, [(300, 16)] * 3),
        ({"trace": "{tmp}/mine.csv"}, 2, [(700, 8), (800, 16)]),
        ({"trace": "{tmp}/mine.csv"}, 9, [(700, 8), (800, 16), (900, 16)]),
    ],
)
def test_the_warm_up_has_the_workloads_own_shape(fake_vllm, tmp_path, monkeypatch, workload, warmup, lengths):
    (tmp_path / "mine.csv").write_text("prompt_tokens,output_tokens\n700,8\n800,30\n900,40\n")
    workload |= {"trace": workload["trace"].format(tmp=tmp_path), "warmup_requests": warmup}
    profile = with_workload(fake_vllm(), **workload)
    sent, send = [], speed.send_load

    def noted(endpoint, trace, *arguments, **options):
        sent.append((trace, send(endpoint, trace, *arguments, **options)))

    monkeypatch.setattr(speed, "send_load", noted)
    with lab.serve(profile, "bf16", log_path=tmp_path / "server.log") as server:
        speed.warm_up(server)
    ((trace, outcome),) = sent
    assert list(zip(trace.prompt_tokens, trace.output_tokens, strict=True)) == lengths
    assert not any(one.error for one in outcome.outcomes)
    measured = speed.trace_for(profile, lab.Level(variant="bf16", rate=1, requests=min(warmup, 3)))
    assert not set(trace.prompts) & set(measured.prompts)


@pytest.mark.parametrize(
    "content", ["prompt_tokens,output_tokens\n0,5\n", "a,b\n1,2\n", "prompt_tokens,output_tokens\nx,1\n", ""]
)
def test_a_bad_csv_is_one_clear_error(tmp_path, content):
    path = tmp_path / "bad.csv"
    path.write_text(content)
    with pytest.raises(BadInput):
        from_file(path)


def test_sharegpt_form_goes_there_and_back(tmp_path):
    trace = sharegpt_like(20)
    path = tmp_path / "sharegpt.json"
    path.write_text(json.dumps(trace.to_sharegpt()))
    back = from_file(path, tokenizer=str(model_folder("llama-3-8b")))
    assert back.prompts == trace.prompts
    assert back.output_tokens == trace.output_tokens


@pytest.mark.parametrize("content", ["not json", "[1, 2]", '{"a": 1}'])
def test_a_bad_sharegpt_file_is_one_clear_error(tmp_path, content):
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(BadInput):
        from_file(path, tokenizer=str(model_folder("llama-3-8b")))


@pytest.mark.parametrize("header", ["prompt_tokens,output_tokens, arrival_s", "Prompt_Tokens,output_tokens,Arrival_s"])
def test_a_columns_name_is_read_as_it_is_meant(tmp_path, header):
    path = tmp_path / "mine.csv"
    path.write_text(f"{header}\n5,7,0.0\n5,8,1.5\n")
    assert lab.from_file(path).arrival_s == (0.0, 1.5)


@pytest.mark.parametrize("text, said", [
    ("prompt_tokens,output_tokens,arrival\n5,7,0\n", "unknown columns 'arrival'; known: arrival_s"),
    ("prompt_tokens,output_tokens,arrival_s\n5,7\n5,8,1\n", "mine.csv"),
    ("prompt_tokens,output_tokens,arrival_s\n5,7,0\n5,8\n", "mine.csv"),
])  # fmt: skip
def test_arrival_times_are_never_dropped_in_silence(tmp_path, text, said):
    (tmp_path / "mine.csv").write_text(text)
    with pytest.raises(BadInput, match=said):
        lab.from_file(tmp_path / "mine.csv")


def named(trace, requests=None, seed=0, **options):
    return named_trace(trace, requests, seed=seed, input_tokens=300, output_tokens=9, **options)


def test_the_requests_of_recorded_runs_are_drawn_as_they_were():
    """Digests of levels in data/recorded, and of shorter traces from the same time."""
    assert (
        named("sharegpt-like").digest == "0f80d04cec83379b"
        and named("sharegpt-like", 50, 3).digest == "f687268c727f86e9"
    )
    assert named("random", 20, 2).digest == "aebf7019434a8a48"


@pytest.mark.parametrize(
    ("name", "requests", "mean_in", "mean_out", "hour_s"),
    [("azure-conv", 19_366, 1154.7, 211.1, 3501.7), ("azure-code", 8_819, 2047.8, 27.9, 3435.9)],
)
def test_recorded_hours_come_with_the_kit(name, requests, mean_in, mean_out, hour_s):
    (told,) = named(name, 10, max_context=4096, times="dropped").notes
    held = {"azure-conv": "1,612 of 19,366", "azure-code": "1,257 of 8,819"}
    assert (
        told == f"{held[name]} requests left out: more than the 4,096 tokens in and out together that the context takes"
    )
    with pytest.raises(BadInput, match=f"has {requests} requests, 20000 were asked for"):
        named(name, 20_000)
    file = read_lengths(DATA / "traces" / f"{name}.csv.gz", times=True)
    assert len(file.prompt) == requests and file.notes == ()
    assert (file.prompt.mean(), file.output.mean()) == pytest.approx((mean_in, mean_out), abs=0.1)
    assert file.arrival_s[-1] == pytest.approx(hour_s, abs=0.1)
    # Drawn, they are of the whole hour; with their times, one stretch of it.
    drawn, other = (named(name, 300, seed, times="dropped") for seed in (0, 1))
    assert drawn.name == f"{name} seed 0" and drawn.arrival_s is None and drawn.prompt_tokens != other.prompt_tokens
    assert named(name, 100, times="dropped") == drawn.head(100)
    stretch = named(name, 300)
    rows = range(requests - 299)
    assert any(
        tuple(file.prompt[i : i + 300]) == stretch.prompt_tokens
        for i in rows
        if file.prompt[i] == stretch.prompt_tokens[0]
    )
    assert stretch.arrival_s[0] == 0 and stretch.arrival_s[-1] < hour_s / 5


def test_a_trace_keeps_its_pattern_at_another_rate():
    assert rescaled([0, 1, 4], 6) == pytest.approx([0, 0.125, 0.5]) and not rescaled([0, 1, 4], np.inf).any()
    with pytest.raises(BadInput, match="all 2 requests of the trace arrive at once"):
        rescaled([0, 0], 6)
    with pytest.raises(BadInput, match="rate 0 is not above 0"):
        rescaled([0, 1], 0)


@pytest.mark.parametrize("name", ["sharegpt", "azure", "mine", ""])
def test_a_name_that_is_no_trace_lists_those_there_are(name):
    with pytest.raises(BadInput, match=f"no trace {name!r} .there are: {', '.join(NAMES)}, or a file of lengths"):
        named(name)


@pytest.mark.parametrize("name", ["mine.jsonl", "traces/mine.jsonl.gz", "traces/mine", "./mine.tsv", "../mine.csv"])
def test_a_profile_names_its_trace_relative_to_itself_whatever_its_ending(tmp_path, name):
    (tmp_path / "a" / "traces").mkdir(parents=True)
    (tmp_path / "a" / name).write_text('{"input_length": 5, "output_length": 7}\n' * 9)
    (tmp_path / "a" / "mine.toml").write_text(f'extends = "emulated-h100"\n[workload]\ntrace = "{name}"')
    assert lab.load_profile(tmp_path / "a" / "mine.toml").workload.trace == str((tmp_path / "a" / name).resolve())


def test_a_profiles_trace_leaves_out_what_its_model_does_not_take(tmp_path):
    assert lab.load_profile("emulated-h100").context() == 8192  # the model's own
    toml = 'extends = "emulated-h100"\n[workload]\ntrace = "{}"\n[server]\nflags = ["--max-model-len", "{}"]\n'
    (tmp_path / "mine.csv").write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        + "2023-11-16 18:17:03.5,8,8\n" * 3000
        + "2023-11-16 19:00:00,2040,8"
    )
    for workload, name, told in (
        ("azure-conv", "azure-conv seed 0", "2,841 of 19,366"), ("mine.csv", "mine.csv", "1 of 3,001"),
    ):  # fmt: skip
        (tmp_path / "mine.toml").write_text(toml.format(workload, "2048"))
        profile = lab.load_profile(tmp_path / "mine.toml")
        said = f"{told} requests left out: more than the 2,047 tokens in and out together that the context takes"
        assert f"Of the trace {name}, {said}" in repr(plan_table(profile, ["as published"]))
        trace = speed.trace_for(profile, lab.Level(variant="bf16", rate=50, requests=1000))
        assert (
            trace.arrival_s is None and max(map(sum, zip(trace.prompt_tokens, trace.output_tokens, strict=True))) < 2048
        )
    (tmp_path / "mine.toml").write_text(toml.format("azure-conv", "2k"))
    assert lab.load_profile(tmp_path / "mine.toml").context() == 2000


def test_what_was_left_out_is_stored_with_the_level(fake_vllm, tmp_path):
    (tmp_path / "mine.csv").write_text("Timestamp,Request tokens,Response tokens\n" + "1,5,7\n" * 20 + "2,5,0\n")
    run = open_run(tmp_path / "run", profile := with_workload(fake_vllm(), trace=str(tmp_path / "mine.csv")))
    for result in lab.measure(run, profile):
        assert result.summary.level.trace_notes == "1 of 21 rows were skipped: they have no tokens in or out"
        assert result.records["output_tokens_asked"].tolist() == [7] * 20


def test_a_trace_is_replayed_rescaled_or_sent_at_once_from_the_command_line(tmp_path):
    (tmp_path / "mine.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(
        f"2024-05-10 00:00:{2 * i / 10:09.6f}+00:00,5,10\n2024-05-10 00:00:{2 * i / 10:09.6f}+00:00,{500 * i + 5},10\n"
        for i in range(6)
    ))  # fmt: skip
    cases = {
        "replay": [], "10 req/s, arrivals of the trace": ["--rate", "10", "--arrivals", "trace"], "10 req/s": ["--rate", "10"],
        "all at once": ["--rate", "inf"],
    }  # fmt: skip
    due = {}
    with streaming_server() as url:
        common = ["load-test", "--base-url", url, "--model", "ok"]
        for name, options in cases.items():
            out = tmp_path / name
            mine = ["--trace", str(tmp_path / "mine.csv"), "--max-context", "100"]
            done = fp8lab(*common, *mine, *options, "--out", str(out))
            assert done.returncode in (0, 3), done.stderr  # 3: on a busy machine the client may be late
            assert (
                done.stderr.count("trace mine.csv: 5 of 12 requests left out: more than the 100 tokens") == 1
                and name in done.stderr
            )
            due[name] = pd.read_parquet(out / "records.parquet")["scheduled_s"].to_numpy()
        none = fp8lab(*common, "--arrivals", "trace", "--out", str(tmp_path / "none"))
        deaf = fp8lab(*common, "--input-tokens", "4096", "--out", str(tmp_path / "none"))
    assert deaf.returncode == 2 and "--input-tokens 4096 says nothing of --trace 'sharegpt-like'" in deaf.stderr
    assert none.returncode == 2 and "the trace 'sharegpt-like' holds no arrival times" in none.stderr
    replay, scaled, drawn, burst = due.values()
    assert replay == pytest.approx([0, 0, 0.2, 0.4, 0.6, 0.8, 1.0]) and scaled == pytest.approx(replay * 0.7)
    assert not burst.any() and drawn[-1] == pytest.approx(0.7) and (np.diff(drawn) > 0).all()


@pytest.mark.parametrize(
    ("draw", "said"),
    [
        (lambda: arrival_times(10, 5.0, burstiness=1e-5), "burstiness 1e-05 gives no arrival times"),
        (lambda: arrival_times(10, 1e-310), "rate 1e-310 with burstiness 1.0 gives no arrival times"),
        (lambda: arrival_times(10, 5.0, seed=-1), "seed -1 is below 0"),
        (lambda: sharegpt_like(10, seed=-1), "seed -1 is below 0"),
        (lambda: sharegpt_like(10**20), "at most 134,217,728 are sent"),
        (lambda: fixed_length(10**15), "at most 134,217,728 are sent"),
        (lambda: fixed_length(1, input_tokens=10**21), "at most 134,217,728 are sent"),
        (
            lambda: named_trace("random", 5, seed=0, input_tokens=10, output_tokens=16, max_context=20),
            "requests of 10 tokens in and 16 out have more together than the 20 that the context takes",
        ),
    ],
)
def test_what_has_no_times_or_no_end_is_refused(draw, said):
    with pytest.raises(BadInput, match=said):
        draw()
