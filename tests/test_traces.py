import csv
import json

import numpy as np
import pytest

import fp8lab as lab
from fp8lab.errors import BadInput
from fp8lab.models import model_folder
from fp8lab.traces import arrival_times, fixed_length, from_file, sharegpt_like


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
