"""Step models: how they are fitted, what they foretell, and how far off that is from levels that no fit has seen."""

import dataclasses
import math
import os
import re

import numpy as np
import pandas as pd
import pytest

import fp8lab as lab
from fp8lab import cli, experiment
from fp8lab.config.profile_file import read_profile
from fp8lab.config.trace import fixed_length, sharegpt_like
from fp8lab.errors import BadInput, NotWritten
from fp8lab.experiment.predict import drawing, highest_rate, predict, step_models
from fp8lab.experiment.step_fit import JUDGED, _graphs, _not_fitted, apart, fit, held_out, play_level, replay
from fp8lab.metrics.slo import SLO
from fp8lab.metrics.step_model import FITS, FITTED, StepModel, read_fits
from fp8lab.metrics.virtual import Step, play
from fp8lab.paths import write_text
from fp8lab.results.run_folder import open_run
from fp8lab.server.command import build_environment
from warm_cli import fp8lab

FIT = "h100-80gb-unsealed"
MODEL = StepModel(
    base_ms=3.0, weights_ms=2.0, token_us=15.0, request_us=2.0, context_ns=40.0, mixed_ms=1.0, mixed_context_ns=60.0,
    api_ms=4.0, requests=64, step_tokens=512, kv_tokens=64_000, card="h100-80gb", run="made-up", levels=("x",),
)  # fmt: skip


def test_a_step_takes_what_its_parts_take():
    idle = MODEL.seconds(Step(1, 0, 1, 100))
    assert idle == pytest.approx(1e-3 * (3.0 + 2.0 + 0.002 + 0.004), rel=1e-3)
    # Twice the tokens take twice as long once products take longer than reading the weights does.
    large, twice = (MODEL.seconds(Step(0, n, 0, 0)) - 1e-3 * (3.0 + 1.0) for n in (4096, 8192))
    assert twice == pytest.approx(2 * large, rel=1e-3)
    read, mixed = (MODEL.seconds(Step(64, p, 64, 10**6)) - MODEL.seconds(Step(64, p, 64, 0)) for p in (0, 1))
    assert (read, mixed) == (pytest.approx(0.04), pytest.approx(0.06))
    # A prompt's tokens attend to those before them.
    dear = dataclasses.replace(MODEL, pair_ns=0.5)
    assert dear.seconds(Step(0, 9, 1, 9, 2e6)) - MODEL.seconds(Step(0, 9, 1, 9)) == pytest.approx(1e-3)
    # Beyond the largest CUDA graph a step that only decodes costs more, at once.
    eager = dataclasses.replace(MODEL, graphs=32, eager_ms=7.0)
    more = [eager.seconds(Step(n, p, n, 0)) - MODEL.seconds(Step(n, p, n, 0)) for n, p in ((32, 0), (33, 0), (33, 1))]
    assert more == [0.0, pytest.approx(0.007), 0.0]


def test_another_card_reads_and_multiplies_as_its_datasheet_says():
    h100, h200 = (read_profile(name).gpu for name in ("h100-80gb", "h200-80gb"))
    here = {"card_name": h100.name, "hbm_bytes_per_s": h100.hbm_bytes_per_s, "bf16_flops": h100.bf16_flops}
    there = dataclasses.replace(MODEL, idle_w=100.0, **here).on(h200, "h200-80gb")
    assert there.context_ns == pytest.approx(40.0 * 3.35 / 4.8) and there.token_us == 15.0 and there.base_ms == 3.0
    assert there.idle_w == 0.0 and there.joules(play([10], [2], [0.0], there.limits, there.seconds), 1.0) is None
    with pytest.raises(BadInput, match="the fit of run made-up has no datasheet of its card"):
        MODEL.on(h200, "h200-80gb")
    assert (
        there.worst == {}
        and "not fitted there" in there.note
        and there.on(h100, "h100-80gb").context_ns == pytest.approx(40.0)
    )


def test_a_fit_beside_a_run_of_another_card_says_so():
    run = open_run(source="h200-80gb-x2-8b")
    here, there = (lab.foretold_table(run, step_models(FIT, card=card)).caption for card in ("", "h200-80gb"))
    assert here.startswith(
        "ANOTHER CARD: a fit of H100 SXM 80 GB, a run of H200 SXM 141 GB (--card P scales the fit). "
    )
    assert there.startswith("Measured in run h200-80gb-x2-8b, ")


@pytest.mark.parametrize("eager_ms", [0.0, 9.0])
def test_what_is_fitted_is_what_made_the_levels(tmp_path, monkeypatch, eager_ms):
    """Levels played with a known model, and sampled as a server's are, give the model back."""
    truth = _truth()
    if eager_ms:
        truth = dataclasses.replace(truth, graphs=512, eager_ms=eager_ms)
        monkeypatch.setattr("fp8lab.experiment.step_fit._graphs", lambda command, requests: 512)
    found = fit(_as_if_measured(monkeypatch, truth), "fp8-unsealed")
    assert ("eager_ms" in found.low) == bool(eager_ms)
    if eager_ms:
        beyond, within = (found.seconds(Step(n, 0, n, 300 * n)) for n in (513, 512))
        assert beyond - within == pytest.approx(1e-3 * eager_ms, rel=0.3)
    # Two levels do not tell every number from every other; how long steps like theirs take they do.
    for step in (Step(800, 0, 800, 300_000), Step(100, 0, 100, 30_000), Step(100, 400, 102, 30_000)):
        assert found.seconds(step) == pytest.approx(truth.seconds(step), rel=0.15)
    assert found.worst["output_token_throughput"] < 0.02 and found.worst["mean_tpot_ms"] < 0.05
    assert found.worst["joules_per_output_token"] < 0.05 and found.idle_w == pytest.approx(truth.idle_w, rel=0.3)
    assert set(found.levels) == {"fp8-unsealed-50rps-r1", "fp8-unsealed-infrps-r1"}
    assert (found.trace, found.context) == ("sharegpt-like", 8192)
    assert all(low <= getattr(found, name) <= found.high[name] for name, low in found.low.items())
    assert set(FITTED) - set(found.low) <= {"eager_ms"} and found.host and found.mhz_low <= found.mhz_high


def _truth() -> StepModel:
    return dataclasses.replace(read_fits(FIT)["fp8-unsealed"], base_ms=2.0, token_us=18.0, context_ns=25.0)


def _as_if_measured(monkeypatch, truth):
    """The recorded run, three levels of which are what `_truth` makes of their requests."""
    from fp8lab.results.run_folder import LevelResult, Run

    run = open_run(source=FIT)
    names = ("fp8-unsealed-50rps-r1", "fp8-unsealed-infrps-r1", "fp8-unsealed-infrps-r2")
    made = {}
    for name in names:
        level = run.read(run.summaries()[name].level)
        records = level.records
        due = records["scheduled_s"].to_numpy()
        prompts, answers = records["prompt_tokens"].to_numpy(), records["output_tokens"].to_numpy()
        played = play_level(truth, prompts, answers, due)
        telemetry = _sampled(truth, prompts, answers, due)
        summary = dataclasses.replace(level.summary, **played.found)
        made[name] = LevelResult(summary, records, None, telemetry)
    monkeypatch.setattr(Run, "summaries", lambda _run: {name: one.summary for name, one in made.items()})
    monkeypatch.setattr(Run, "read", lambda _run, level: made[level.id])
    steps = [Step(n, 0, n, 300 * n) for n in (64, 1024)]
    taken_apart = [(step, 1e3 * truth.seconds(step)) for step in steps]
    monkeypatch.setattr(experiment.step_fit, "_decoding", lambda _run, variant: taken_apart)
    return run


def _sampled(truth, prompts, answers, due):
    """What a server's metrics say five times a second, of each step by itself: no idle moment lies between these."""
    steps, held = [], []

    def seconds(step):
        steps.append((truth.seconds(step), step))
        return steps[-1][0]

    play(
        prompts,
        answers,
        due,
        truth.limits,
        seconds,
        watch=lambda _step, seats, blocks: held.append((len(seats), blocks)),
    )
    ends = np.cumsum([took for took, _ in steps])
    at = np.arange(0.0, ends[-1], 0.2)
    step = np.minimum(np.searchsorted(ends, at), len(ends) - 1)
    read, came = (np.cumsum([getattr(one, name) for _, one in steps]) for name in ("prompt", "emitted"))
    joules = np.cumsum([
        (truth.idle_w + truth.busy_w) * took + 1e-3 * truth.token_mj * (one.decoding + one.prompt) + 1e-6 * truth.context_uj * one.context
        for took, one in steps
    ])  # fmt: skip
    before = np.maximum(at - 1.0, 0.0)  # NVML's mean over a second
    power = (np.interp(at, ends, joules) - np.interp(before, ends, joules)) / np.maximum(at - before, 0.05)
    return pd.DataFrame({
        "at_s": at, "running": np.array([seats for seats, _ in held], float)[step],
        "kv_cache_usage": np.array([blocks for _, blocks in held])[step] / truth.limits.blocks,
        "prompt_tokens": read[step].astype(float), "generation_tokens": np.interp(at, ends, came),
        "gpu_power_w": np.where(at > 0, power, truth.idle_w),
    })  # fmt: skip


def test_the_recorded_fits_never_saw_what_they_are_judged_by():
    for path in (path for path in FITS.glob("*.toml") if path.stem != "held_out"):
        for variant, model in read_fits(path.stem).items():
            run = open_run(source=model.run)
            unseen = set(held_out(run))
            assert not unseen & set(model.levels) and len(model.levels) >= 2
            off = [
                apart(replay(model, level_of), level_of.summary)
                for level, s in run.summaries().items()
                if level in unseen and s.level.variant == variant
                for level_of in [run.read(s.level)]
            ]
            for name in JUDGED if off else ():
                each = [abs(one[name]) for one in off]
                assert np.median(each) == pytest.approx(model.median[name], abs=2e-3), (variant, name)
                assert max(each) == pytest.approx(model.worst[name], abs=2e-3), (variant, name)


def test_what_levels_do_not_tell_is_not_fitted():
    floors, known, ends = _not_fitted(open_run(source=FIT), "fp8-unsealed")
    # A pair: four FLOPs for each of 32 layers' 4,096 values, at the H100's 989 TFLOP/s.
    assert known["pair_ns"] == pytest.approx(1e9 * 4 * 32 * 4096 / 989e12, rel=1e-4)
    # A token of an FP8 cache: 64 KiB, read at most at 3.35 TB/s; by attention's kernels at 0.82 of that.
    assert math.exp(floors["context_ns"]) == pytest.approx(65536 / 3350, rel=1e-4)
    assert known["context_ns"] == pytest.approx(math.exp(floors["context_ns"]) / 0.82, rel=0.01)
    assert ends["low"]["context_ns"] <= known["context_ns"] <= ends["high"]["context_ns"]
    assert read_fits(FIT)["fp8-unsealed"].context_ns == known["context_ns"]
    # Two batch sizes do not tell a token from a request.
    assert _not_fitted(open_run(source="h200-80gb-recipes"), "fp8-online")[1].keys() == {"pair_ns"}


def test_a_load_in_virtual_time_costs_what_its_steps_do():
    trace = fixed_length(10, input_tokens=100, output_tokens=20)
    level = predict("x", MODEL, trace, math.inf)
    course, records = level.played.course, level.played.records
    # All are read in two steps of 512 tokens at most; then 19 tokens each, one step a token.
    assert course.steps == 21 and course.running_max == 10 and course.preemptions == 0
    assert records["first_token_s"].min() == pytest.approx(4e-3 + MODEL.seconds(Step(0, 512, 5, 512)), rel=0.01)
    assert course.busy_s == pytest.approx(records["last_token_s"].max() - 4e-3)
    assert level.played.found["output_token_throughput"] == pytest.approx(200 / records["last_token_s"].max())


def test_energy_is_what_steps_tokens_and_contexts_take():
    model = dataclasses.replace(MODEL, idle_w=100.0, busy_w=50.0, token_mj=2.0, context_uj=3.0)
    played = predict("x", model, fixed_length(10, input_tokens=100, output_tokens=20), math.inf).played
    # 1,000 tokens of prompts and 190 of answers are computed; contexts: 1,112 on average in the 19 steps that only decode.
    course, span = played.course, played.records["last_token_s"].max()
    assert course.tokens == 1190 and course.context == pytest.approx(19 * 10 * 110.5 + 1000, rel=0.02)
    joules = 100 * span + 50 * course.busy_s + 2e-3 * 1190 + 3e-6 * course.context
    assert played.found["joules_per_output_token"] == pytest.approx(joules / 200)
    limited = predict(
        "x", dataclasses.replace(model, limit_w=150.0), fixed_length(10, input_tokens=100, output_tokens=20), math.inf
    )
    assert limited.played.found["joules_per_output_token"] == pytest.approx(150 * span / 200)
    assert "joules_per_output_token" not in predict("x", MODEL, fixed_length(1), 1.0).played.found


def test_the_highest_rate_is_where_the_objective_is_lost(monkeypatch):
    monkeypatch.setattr(experiment.predict, "_SEARCHED_S", 60.0)
    draw = lab.drawing()
    limit = highest_rate("x", MODEL, draw, SLO.parse("tpot=20,ttft=500,p90"))
    assert 0 < limit.low < limit.high < limit.low * 1.2  # of three seeds
    none = highest_rate("x", MODEL, draw, SLO.parse("tpot=1"))
    assert none == (0, 0) and str(none) == "none: one request alone misses it"
    better = dataclasses.replace(MODEL, base_ms=1.5)
    assert highest_rate("x", better, draw, SLO.parse("tpot=20,ttft=500,p90")).low > limit.high


def test_a_request_that_cannot_fit_is_refused():
    with pytest.raises(BadInput, match="does not fit in a KV cache of 64,000"):
        predict("x", MODEL, fixed_length(3, input_tokens=70_000, output_tokens=2), 1.0)


def test_a_file_of_few_requests_is_begun_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment.predict, "_SEARCHED_S", 60.0)
    few = tmp_path / "few.csv"
    few.write_text("prompt_tokens,output_tokens\n" + "200,300\n" * 30)
    assert len(lab.drawing(str(few))(700)) == 700
    limit = highest_rate("x", MODEL, lab.drawing(str(few)), SLO.parse("tpot=20,ttft=500,p90"))
    assert 0 < limit.low < limit.high < math.inf


def test_a_level_that_ends_in_its_ramp_says_nothing_of_the_limit():
    for requests, rate in ((30, 30.0), (3, 50.0), (3, math.inf)):
        assert predict("x", MODEL, sharegpt_like(requests, 1), rate).played.limit.startswith("not known: too short")
    assert predict("x", MODEL, sharegpt_like(2000, 1), math.inf).played.limit == "GPU"


def test_an_overload_is_named_whatever_the_number_of_requests():
    """Of 16 requests/s each takes longer than all arrivals, so that none of the backlog shows as growth beyond a ramp."""
    draw, roomy = lab.drawing("random", input_tokens=1000, output_tokens=200), {"requests": 64, "kv_tokens": 10**6}
    for requests in (100, 1000, 4000):
        named = [
            predict("x", dataclasses.replace(MODEL, **changed), draw(requests), 500.0).played.limit
            for changed in ({"requests": 1024}, roomy)
        ]
        assert named == ["KV capacity", "GPU"]


def test_only_what_it_is_a_model_of_is_fitted():
    with pytest.raises(BadInput, match="is EMULATED: a fit of it would foretell the emulation"):
        fit(open_run(source="emulated-h100"), "fp8")
    with pytest.raises(BadInput, match="ran 2 replicas, each with a scheduler of its own"):
        fit(open_run(source="h200-80gb-x2-8b"), "fp8-dp2")


@pytest.mark.parametrize(("flags", "most"), [
    ("", 512), ("--max-cudagraph-capture-size 1024", 1024), ("--cudagraph-capture-sizes 1 8 64 --port 1", 64),
    ("--enforce-eager", 2048), ("--max-cudagraph-capture-size=0", 2048),
])  # fmt: skip
def test_where_cuda_graphs_end_is_read_off_the_command(flags, most):
    assert _graphs(["vllm", "serve", *flags.split()], 2048) == most
    with pytest.raises(BadInput, match="may end CUDA graphs anywhere"):
        _graphs(["vllm", "serve", "--compilation-config", "{}", *flags.split()], 2048)


def test_one_python_api_server_is_not_modelled():
    with pytest.raises(BadInput, match="a Python process is its API server"):
        fit(open_run(source="h100-80gb"), "fp8")
    with pytest.raises(BadInput, match="two at least are needed"):
        fit(open_run(source="h100-80gb-unseal"), "bf16-unsealed")


def test_behind_a_full_api_server_a_card_delivers_what_that_hands_out():
    model, trace = read_fits(FIT)["fp8-unsealed"], lab.drawing()(600)
    free, full = (experiment.predict.predict("x", one, trace, math.inf).played for one in (model, model.behind(200)))
    assert free.limit == "GPU" and full.limit == "API server"
    assert full.found["output_token_throughput"] == pytest.approx(5000, rel=0.1)
    # One that takes next to nothing changes nothing; one that takes a little less than the steps is not called the limit.
    idle, nearly, above = (
        experiment.predict.predict("x", model.behind(us), trace, math.inf).played for us in (1e-3, 30, 70)
    )
    assert idle.found["output_token_throughput"] == pytest.approx(free.found["output_token_throughput"], rel=1e-3)
    assert nearly.limit == "GPU" and above.limit == "API server"
    # Of latencies behind a full one nothing is said.
    (row,) = lab.predicted_table(
        lab.predict_rates({"x": model.behind(200)}, lab.drawing(), [math.inf]), {"x": model.behind(200)}
    ).rows
    assert row[5:9] == ("–",) * 4 and row[4] != "–"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "no fit 'nowhere' (there are: h100-80gb-recipes"),
        (["held_out"], "no fit 'held_out' (there are: h100-80gb-recipes"),
        ([FIT, "--variant", "fp4"], "the fit holds no variant fp4 (it holds: bf16-unsealed, fp8-unsealed)"),
        ([FIT, "--rate", "0"], "rate 0: expected 0.001 to 1e+06 requests/s, or inf"),
        ([FIT, "--rate", "1e300"], "rate 1e+300: expected 0.001 to 1e+06 requests/s"),
        ([FIT, "--seed", "-1"], "seed -1 is below 0"),
        ([FIT, "--api-us", "0"], "0 µs a token: an API server takes more than 0"),
        ([FIT, "--api-us", "nan"], "nan µs a token: an API server takes more than 0"),
        ([FIT, "--api-us", "90", "--slo", "tpot=50"], "leave out one"),
        ([FIT, "--card", "tiny-cpu"], "has no datasheet"),
        ([FIT, "--trace", "random", "--requests", "1000000"], "at most 134,217,728 are sent"),
        (
            [FIT, "--trace", "random", "--input-tokens", "20000"],
            "more together than the 8,191 that the context takes; ask for shorter",
        ),
        (
            [FIT, "--input-tokens", "4096"],
            "--input-tokens 4096 says nothing of --trace 'sharegpt-like', only of --trace random: name that",
        ),
        ([FIT, "--trace", "azure-conv", "--tokenizer", "x"], "--tokenizer 'x' says nothing of --trace 'azure-conv'"),
        (
            [FIT, "--max-context", "1000"],
            "--max-context 1000 says nothing of --trace 'sharegpt-like', only of a recorded trace or a file",
        ),
        ([FIT, "--against", "h100-80gb", "--requests", "5", "--trace", "random"], "leave out --requests, --trace"),
        ([FIT, "--against", "h100-80gb", "--rate", "5"], "leave out --rate"),
        (
            [FIT, "--against", "h100-80gb"],
            "fp8-rust-graphs); where it calls them otherwise, say which is which: --variant FITTED=MEASURED",
        ),
        ([FIT, "--slo", "tpot=50", "--scheduler", "vllm"], "too many for vLLM's own scheduler"),
        ([FIT, "--trace", "no.csv"], "no.csv"),
    ],
)
def test_bad_input_is_one_clear_error(arguments, said):
    done = fp8lab("predict", *arguments)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def test_from_the_command_line(monkeypatch, capsys):
    monkeypatch.setattr(experiment.predict, "_SEARCHED_S", 60.0)

    def said(*arguments):
        assert cli.main(["predict", FIT, *arguments]) == 0
        return capsys.readouterr().out

    found = said("--variant", "fp8-unsealed", "--rate", "50", "--requests", "500", "--slo", "ttft=500,tpot=20,p90")
    assert found.startswith("PREDICTED, nothing was measured.")
    assert re.search(r"fp8-unsealed +50 req/s +500 ", found)
    assert re.search(r"the highest rate that meets TTFT ≤ 500 ms .*: [\d.]+ to [\d.]+ req/s", found)
    beside = said("--against", "h100-80gb-azure-conv")
    assert "fp8-unsealed-16rps-r1" in beside and "held out" in beside
    renamed = ("--variant", "bf16-unsealed=bf16", "--card", "h200-80gb", "--against", "h200-80gb-recipes")
    assert "bf16-50rps-r1" in said(*renamed)
    assert cli.main(["predict", FIT, "--against", "h200-80gb-recipes"]) == 2
    assert "holds no valid level of bf16-unsealed, fp8-unsealed (it measured: bf16," in capsys.readouterr().err


def test_a_file_is_played_as_load_test_sends_it(tmp_path, capsys):
    """All of it, at its own times unless a rate is given; what the model does not take is left out and counted."""
    mine = tmp_path / "mine.csv"
    mine.write_text("prompt_tokens,output_tokens,arrival_s\n100,50,0\n20000,60,1\n200,60,30\n")
    for options, offered in (((), "replay"), (("--rate", "5"), "5 req/s"), (("--rate", "inf"), "all at once")):
        assert cli.main(["predict", FIT, "--variant", "fp8-unsealed", "--trace", str(mine), *options]) == 0
        told = capsys.readouterr().out
        assert re.search(rf"fp8-unsealed +{offered} +2 ", told) and "mine.csv: 1 of 3 requests left out" in told
    trace = lab.drawing("azure-conv", models=lab.step_models(FIT))(20_000)
    assert max(map(sum, zip(trace.prompt_tokens, trace.output_tokens, strict=True))) < 8192
    assert trace.notes == lab.drawing("azure-conv", max_context=8191)(3).notes != ()
    with pytest.raises(BadInput, match="holds no arrival times to be replayed: name a rate"):
        predict("x", MODEL, fixed_length(3), None)


def test_a_file_that_is_no_fit_is_one_clear_error(tmp_path):
    broken, whole = tmp_path / "broken.toml", read_fits(FIT)["fp8-unsealed"].as_toml("a.b")
    for text, said in (
        ("[fp8]\nbase_ms = 1\n", "is no fit of step models: expected a table for each variant, with base_ms"),
        ("every = [1]\n", "expected a table for each variant"), ("", "it holds no variant"),
        (whole.replace("base_ms = ", 'base_ms = "x" #', 1), "base_ms is 'x', expected a number"),
        (whole.replace("base_ms = ", "base_ms = 0.0 #", 1), "base_ms is 0.0, expected a number from 0.0001"),
        (whole.replace("weights_ms = ", "weights_ms = 1e100 #", 1), "weights_ms is 1e+100, expected a number from 0 to 10000"),
        (whole.replace("median = {", 'median = { tea = "x",', 1), "{'tea': 'x'} is none of output_token_throughput"),
        (whole.replace("worst = { output_token_throughput = ", "worst = { output_token_throughput = inf #", 1), "is no fit of step models"),
        (re.sub(r"low = .*", "low = 3", whole), "is no fit of step models"),
        (re.sub(r"limit_w = .*", "limit_w = -5", whole), "limit_w is -5, expected a number from 1"),
        (re.sub(r"hbm_bytes_per_s = .*", 'hbm_bytes_per_s = "x"', whole), "hbm_bytes_per_s is 'x', expected a number"),
        (re.sub(r"\nrun = .*", "\nrun = 5", whole), "run is 5, expected a name"),
        (re.sub(r"(worst = .*mean_tpot_ms = )[^,]*", r"\1inf", whole), "{'mean_tpot_ms': inf} is none of"),
    ):  # fmt: skip
        broken.write_text(text)
        with pytest.raises(BadInput, match=re.escape(said)):
            read_fits(str(broken))


def test_a_models_numbers_are_told_with_how_well_they_are_known():
    rows = {row[0]: row[2:] for row in lab.models_table(lab.step_models(FIT)).rows}
    assert all(re.fullmatch(r"[\d.]+ \((at its bound|[\d.]+ to [\d.]+)\)", cell) for cell in rows["weights_ms"])
    assert all(float(cell) > 0 for cell in rows["busy_w"])
    there = {row[0]: row[2:] for row in lab.models_table(lab.step_models(FIT, card="h200-80gb")).rows}
    assert "busy_w" not in there  # energy is on no datasheet


def test_a_minute_at_each_rate():
    models = lab.step_models(FIT, ["fp8-unsealed=mine"])
    levels = lab.predict_rates(models, lab.drawing(), [0.01, 2, 1000])
    assert [(one.variant, len(one.played.records)) for one in levels] == [("mine", 10), ("mine", 120), ("mine", 10_000)]
    with pytest.raises(BadInput, match="rate 0: expected 0.001 to 1e"):
        lab.predict_rates(models, lab.drawing(), [0])


def test_a_fit_of_one_variant_leaves_the_others_in_the_file(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(read_fits(FIT)["bf16-unsealed"].as_toml("mine"))
    done = fp8lab("fit-model", "h200-80gb-x4-70b", "--variant", "fp8-tp2", "--out", str(tmp_path / "mine"))
    assert done.returncode == 0 and set(read_fits(str(path))) == {"mine", "fp8-tp2"}, done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["smollm2-h200"], "run smollm2-h200 holds no level to fit; name a run of"),
        ([FIT, "--variant", "fp8-unsealed", "--variant", "zz"], "holds no variant zz (it holds: bf16-unsealed, fp8-unsealed)"),
        ([FIT, "--out", "."], "--out . is a folder; name a file in it, such as mine.toml"),
        ([FIT, "--out", "/proc/nodir/f.toml"], "/proc/nodir cannot be written to (No such file or directory); choose another --out"),
    ],
)  # fmt: skip
def test_a_fit_that_cannot_be_is_refused_before_it_is_made(monkeypatch, capsys, arguments, said):
    monkeypatch.setattr(experiment.step_fit, "fit", lambda *_: pytest.fail("it was made"))
    assert cli.main(["fit-model", *arguments]) == 2 and said in capsys.readouterr().err


def test_a_fit_that_fails_leaves_no_folder(tmp_path, monkeypatch):
    def refuse(*_):
        raise BadInput("nothing to fit")

    monkeypatch.setattr(experiment.step_fit, "fit", refuse)
    assert cli.main(["fit-model", FIT, "--out", str(tmp_path / "new" / "dir" / "x.toml")]) == 2
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(experiment.step_fit, "fit", lambda *_: read_fits(FIT)["fp8-unsealed"])
    assert cli.main(["fit-model", FIT, "--out", str(tmp_path / "new" / "dir" / "x.toml")]) == 0
    assert (tmp_path / "new" / "dir" / "x.toml").is_file()


def test_a_fit_is_written_and_read_back(tmp_path):
    model = read_fits(FIT)["fp8-unsealed"]
    path = tmp_path / "again.toml"
    path.write_text(model.as_toml("fp8.1"))
    assert read_fits(str(path)) == {"fp8.1": model}
    assert "PREDICTED" in repr(lab.foretold_table(open_run(source="h100-80gb-128-128"), {"fp8-unsealed": model}))


def test_the_planner_says_predicted_and_what_a_load_takes(monkeypatch):
    monkeypatch.setattr(experiment.predict, "_SEARCHED_S", 60.0)
    models = lab.step_models(FIT, ["fp8-unsealed"])
    draw = lab.drawing("random", input_tokens=1000, output_tokens=200)
    plan = lab.cards_plan_table(models, draw, "ttft=500,p90", load=1000, price=2.5)
    (variant, bracket, cards, each, joules, cost) = plan.rows[0]
    low = float(bracket.split()[0])
    assert variant == "fp8-unsealed" and int(cards) == math.ceil(1000 / low) and float(cost) == 2.5 * int(cards)
    assert float(each) <= low and 0.02 < float(joules) < 0.2 and plan.caption.startswith("PREDICTED")
    # How far off it may be stands beside each number, where levels that the fit never saw say so.
    scaled = lab.step_models(FIT, ["fp8-unsealed"], card="h200-80gb")
    behind, alike = {"fp8-unsealed": models["fp8-unsealed"].behind(90)}, lab.drawing()
    for each, drawn, known in (
        (models, alike, True),
        (models, draw, False),
        (behind, alike, False),
        (scaled, alike, False),
    ):
        (row,) = lab.predicted_table(lab.predict_rates(each, drawn, [2]), each).rows
        assert all(bool(re.fullmatch(r"[\d.,]+ ± \d+%", cell)) == known for cell in row[4:9]), row
    # Latencies of a level that does not keep up are those of its length.
    over = lab.predicted_table(lab.predict_rates(models, alike, [150, math.inf]), models)
    (grows, once), told = over.rows, "GPU: does not keep up"
    assert "±" in grows[4] and not any("±" in cell for cell in grows[5:9]) and all("±" in cell for cell in once[4:9])
    assert (
        (grows[-1], once[-1]) == (told, "GPU")
        and float(grows[3]) < 120
        and "same host, same lengths (sharegpt-like)" in over.caption
    )
    # One that is too short to tell whether it keeps up is like no level of the fit.
    short = lab.predicted_table(
        [predict("fp8-unsealed", models["fp8-unsealed"], alike(3), rate) for rate in (50, math.inf)], models
    )
    assert all(row[-1].startswith("not known") and not any("±" in cell for cell in row) for row in short.rows)
    what = {row[1]: row for row in lab.what_if_table(models, draw(200)).rows}
    assert float(what["matrix products: half the time"][3].strip("×")) > 1.05
    assert float(what["prompts twice as long"][3].strip("×")) < 0.95
    assert float(what["one Python API server process, 105 µs a token"][3].strip("×")) < 0.95
    assert "fp8-unsealed" in lab.what_if_figure(models, draw(200)).alt
    many = {f"v{n}": models["fp8-unsealed"] for n in range(9)}
    for draws in (lambda: lab.what_if_figure(many, draw(200)), lambda: lab.predicted_figure(many, draw, [5])):
        with pytest.raises(BadInput, match="9 variants are more than 8 lines; draw without v8"):
            draws()
    figure = lab.predicted_figure(models, draw, [5, 10], requests=100)
    # Numbers of a logarithmic axis keep apart: 1, 2 and 5 of each decade.
    latencies = lab.predicted_figure(models, draw, [1, 40], requests=300).canvas.axes[1].yaxis
    told = {
        tick.label1.get_text().lstrip("1250,") for tick in [*latencies.get_major_ticks(), *latencies.get_minor_ticks()]
    }
    assert told == {""}
    assert figure.svg.count("PREDICTED") or "PREDICTED" in figure.alt
    assert not {"#0072B2", "#D55E00"} & set(re.findall(r"#[0-9A-Fa-f]{6}", figure.svg.upper()))
    with pytest.raises(BadInput, match="load 0 is no number of requests/s above 0"):
        lab.cards_plan_table(models, draw, "ttft=500", load=0)
    with pytest.raises(BadInput, match="the fit holds no variant fp4"):
        lab.step_models(FIT, ["fp4"])


@pytest.mark.servers
def test_the_planners_page(tmp_path, monkeypatch):
    """Headless, with a load of its own, and without a run."""
    monkeypatch.setenv("FP8LAB_RUNS", str(tmp_path))
    done = fp8lab(
        "reproduce", "--notebook", "11_planner", "-p", "trace", "random", "-p", "requests", "200", "-p", "objective", "ttft=500,p90",
        "-p", "card", "h200-80gb",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # Named by its parameters: the page of another load stays.
    (made,) = (tmp_path / "pages").glob("*.html")
    assert made.name == "11_planner,trace=random,requests=200,objective=ttft=500,p90,card=h200-80gb.html"
    page = made.read_text()
    assert "PREDICTED" in page and "by the datasheets, not fitted there" in page and "Traceback" not in page


@pytest.mark.nightly  # two minutes of virtual time beside as many of real
@pytest.mark.servers
@pytest.mark.timing
def test_an_emulated_card_steps_as_its_fit_says(tmp_path):
    """Real vLLM, whose steps wait as long as the model says: what it delivers is what virtual time foretells."""
    path = tmp_path / "stepping.toml"
    path.write_text(
        'extends = "emulated-h100-unsealed"\nreplaces = ["protocols"]\n[protocols.short]\n'
        'levels = [{ variant = "fp8-unsealed", rate = inf, requests = 120 }]\n'
    )
    profile = read_profile(str(path))
    run = open_run(tmp_path / "run", profile)
    (level,) = lab.measure(run, profile, "short")
    model = read_fits(FIT)["fp8-unsealed"]
    records, summary = level.records, level.summary
    # Emulated steps are put together one by one, and what the API server takes is real.
    limits = dataclasses.replace(model, kv_tokens=summary.kv_cache_tokens).limits
    foretold = play_level(
        model, records["prompt_tokens"].to_numpy(), records["output_tokens"].to_numpy(), records["sent_s"].to_numpy(),
        dataclasses.replace(limits, depth=1),
    ).found  # fmt: skip
    assert summary.valid and summary.emulated, summary.invalid_reason
    assert summary.kv_cache_tokens == pytest.approx(model.kv_tokens, rel=0.001)
    assert summary.output_token_throughput == pytest.approx(foretold["output_token_throughput"], rel=0.1)
    assert summary.mean_tpot_ms == pytest.approx(foretold["mean_tpot_ms"], rel=0.1)


def test_an_emulated_variant_that_the_fit_lacks_is_refused(tmp_path):
    path = tmp_path / "lacking.toml"
    path.write_text('extends = "emulated-h100-unsealed"\n[variants]\nint8 = { recipe = "int8" }\n')
    with pytest.raises(BadInput, match="variant int8: fit h100-80gb-unsealed has no step model of that name"):
        build_environment(read_profile(str(path)), "int8")


def test_a_draw_is_the_same_whatever_was_drawn_before(tmp_path):
    path = tmp_path / "few.csv"
    path.write_text("prompt_tokens,output_tokens\n" + "".join(f"{10 + i},{5 + i}\n" for i in range(50)))
    fresh, asked_before = (drawing(str(path), seed=3) for _ in range(2))
    asked_before(120)
    assert asked_before(40).output_tokens == fresh(40).output_tokens == asked_before(120).output_tokens[:40]
    with pytest.raises(BadInput, match="seed -1 is below 0"):
        drawing("azure-conv", seed=-1)(5)


def test_variants_of_one_name_are_refused():
    with pytest.raises(BadInput, match="called the same"):
        step_models("h100-80gb-unsealed", ["fp8-unsealed=x", "bf16-unsealed=x"])


def test_a_fit_that_cannot_be_written_leaves_the_file(tmp_path, monkeypatch):
    target = tmp_path / "mine.toml"
    target.write_text((FITS / "h100-80gb-unsealed.toml").read_text())
    before = target.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda _fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(NotWritten):
        write_text(target, "short")
    assert target.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["mine.toml"]
