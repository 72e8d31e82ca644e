import csv
import dataclasses
import json
import re

import numpy as np
import pytest

import fp8lab as lab
from conftest import marked
from fp8lab.config.trace import arrival_times, fixed_length, from_file, sharegpt_like
from fp8lab.errors import BadInput
from fp8lab.experiment import speed
from fp8lab.experiment.speed import plan_table
from fp8lab.models.checkpoints import model_folder
from fp8lab.results.run_folder import open_run


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
    from transformers import AutoTokenizer

    encode = AutoTokenizer.from_pretrained(model_folder("llama-3-8b")).encode
    trace = sharegpt_like(200)
    begin_of_text = 1
    assert [len(encode(p)) - begin_of_text for p in trace.prompts] == list(trace.prompt_tokens)


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
