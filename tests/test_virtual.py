"""Virtual time: what it foretells of vLLM's scheduling is what vLLM's own scheduler does."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import NIGHTLY
from fp8lab import cli
from fp8lab.errors import BadInput
from fp8lab.experiment.predict import play_with_vllm
from fp8lab.metrics.virtual import Course, Limits, play
from warm_cli import fp8lab

BLOCK, SEATS, TOKENS = 4, 12, 48


def seconds(step):
    """Whole numbers of a power of two, so that sums are exact in any order."""
    return 1.0 + (step.decoding + step.prompt) / 64 + step.context / 4096


LOADS = st.lists(
    st.tuples(st.integers(1, 70), st.integers(1, 40), st.integers(0, 40)), min_size=1, max_size=40
)  # fmt: skip


@settings(max_examples=2000 if NIGHTLY else 150, deadline=None)
@given(
    load=LOADS, blocks=st.integers(33, 159), depth=st.sampled_from([1, 2]), api=st.sampled_from([0.0, 1 / 16, 1 / 4])
)
def test_it_does_what_vllms_scheduler_does(load, blocks, depth, api):
    prompts, answers, due = zip(*sorted(load, key=lambda one: one[2]), strict=True)
    limits = Limits(requests=SEATS, step_tokens=TOKENS, blocks=blocks, block=BLOCK, depth=depth, api_s=api)
    steps, vllms = [], []
    mine = play(prompts, answers, due, limits, seconds, watch=lambda *step: steps.append(step))
    real = play_with_vllm(prompts, answers, due, limits, seconds, watch=lambda *step: vllms.append(step))
    assert steps == vllms
    assert mine.first_s.tolist() == real.first_s.tolist() and mine.last_s.tolist() == real.last_s.tolist()
    for name in ("steps", "busy_s", "tokens", "context", "running_max", "blocks_max", "preemptions"):
        assert getattr(mine, name) == getattr(real, name), name
    # Steps that are alike taken together: the same, but for rounding.
    fast = play(prompts, answers, due, limits, seconds)
    for name in ("steps", "tokens", "context", "preemptions"):
        assert getattr(fast, name) == getattr(mine, name), name
    assert np.allclose(fast.first_s, mine.first_s, rtol=0, atol=1e-6) and np.allclose(
        fast.last_s, mine.last_s, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("by", [play, play_with_vllm])
def test_a_prompt_is_as_many_pairs_in_chunks_as_at_once(by):
    prompts, pairs = [5, 70, 33], []
    by(prompts, [3, 3, 3], [0.0] * 3, Limits(8, 16, 64, BLOCK), lambda step: pairs.append(step.pairs) or 1.0)
    assert sum(pairs) == sum(n * (n + 1) / 2 for n in prompts)


def test_a_prediction_by_vllms_scheduler_is_the_same(capsys):
    few = ["predict", "h100-80gb-unsealed", "--variant", "fp8-unsealed", "--requests", "40", "--scheduler"]
    said = []
    for scheduler in ("virtual", "vllm"):
        assert cli.main([*few, scheduler]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and "fp8-unsealed" in said[0]
    # Of a server vLLM has nothing to tell.
    assert fp8lab(*few, "vllm").stderr.splitlines() == ["fp8-unsealed: level 1", "levels played: 1"]


def test_an_api_server_that_is_full_is_the_limit():
    """Sixty-four requests all at once, whose steps take far less than their tokens keep the API server busy."""
    load = [16] * 64, [32] * 64, [0.0] * 64
    free, full = (play(*load, Limits(64, 2048, 1024, api_s=api), lambda step: 2**-10) for api in (0.0, 2**-8))
    assert free.last_s.max() == 32 * 2**-10 and free.busy_s == full.busy_s
    # Every token takes its time, one after the other, from the end of the first step on.
    assert full.last_s.max() == 2**-10 + 64 * 32 * 2**-8 and full.first_s.max() == 2**-10 + 64 * 2**-8


@given(
    steps=st.lists(st.integers(1, 50), min_size=1, max_size=30), more=st.integers(0, 5), work=st.integers(0, 60),
    given_s=st.integers(0, 3000), begins=st.integers(0, 2000),
)  # fmt: skip
def test_steps_that_are_alike_are_handed_out_as_one_by_one(steps, more, work, given_s, begins):
    """Steps each of which takes `more` longer than the one before it, from an API server that may have something to do still."""
    took, ends, handed = steps[0], [], float(given_s)
    for number in range(len(steps)):
        ends.append((ends[-1] if ends else begins) + took + more * number)
        handed = max(handed, ends[-1]) + work
    course = Course(np.empty(0), np.empty(0), given_s=given_s)
    assert course.hand_out(work, len(ends), ends[0], ends[-1]) == course.given_s == handed
    assert course.behind_s == handed - ends[-1]


def test_what_can_never_run_is_refused():
    limits = Limits(requests=4, step_tokens=64, blocks=6, block=16)
    with pytest.raises(BadInput, match=r"request 1 of 98 \+ 2 tokens does not fit in a KV cache of 96"):
        play([10, 98], [2, 2], [0.0, 0.0], limits, seconds)
    with pytest.raises(BadInput, match="a server of 0 requests"):
        play([10], [2], [0.0], Limits(0, 64, 6), seconds)
