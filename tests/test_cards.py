"""Several cards in one server: which it takes, what is read of them, what the claims about them come to, and what fits."""

import dataclasses
import json
import math
import os
from types import SimpleNamespace

import pytest

import fp8lab as lab
from conftest import wait_for
from fp8lab import cli
from fp8lab.config.dimensions import cards, fp8_kv, memory_share, model_shape, replicas, weight_format
from fp8lab.config.profile_file import read_profile
from fp8lab.errors import BadInput, InUse
from fp8lab.experiment import speed
from fp8lab.load.telemetry import Telemetry, parse_metrics
from fp8lab.metrics.bottleneck import Limit
from fp8lab.metrics.resources import fit
from fp8lab.models.checkpoints import model_folder
from fp8lab.paths import DATA
from fp8lab.report import claims
from fp8lab.results.evidence import Evidence, evidence
from fp8lab.results.files import write_json
from fp8lab.results.run_folder import open_run
from fp8lab.server import processes
from fp8lab.server.command import build_environment
from fp8lab.system import gpu

H100 = "NVIDIA H100 80GB HBM3"


def two(tmp_path, **second) -> list[dict]:
    """Two cards of one kind; the second with what is said of it alone."""
    uuids = [f"GPU-{tmp_path.name}-{n}" for n in (0, 1)]
    each = [{"name": H100, "uuid": uuid, "memory_gib": 79.65} for uuid in uuids]
    return [each[0], each[1] | second]


def with_two(path, *, parallel="--tensor-parallel-size"):
    """The profile at `path` with a variant for two cards."""
    path.write_text(path.read_text() + f'[variants]\ntwo = {{ base = "bf16", flags = ["{parallel}", "2"] }}\n')
    return lab.load_profile(str(path))


@pytest.mark.parametrize("flags, expected", [
    ([], (1, 1)), (["-tp", "2"], (2, 1)), (["--data-parallel-size=2"], (2, 2)),
    (["--tensor-parallel-size", "2", "-dp", "2", "-pp", "2"], (8, 2)),
])  # fmt: skip
def test_the_parallel_sizes_say_how_many_cards(flags, expected):
    assert (cards(flags), replicas(flags)) == expected


def test_a_server_takes_locks_and_releases_its_cards(card, tmp_path):
    says, path = card
    says(cards=two(tmp_path))
    profile = with_two(path)
    with lab.serve(profile, "two", log_path=tmp_path / "a.log") as server:
        assert server.info.cards == 2 and server.info.replicas == 1 and ("cards", "2") in server.info.rows()
        # The second card is taken too: a start that sees nothing else may not have it.
        os.environ["CUDA_VISIBLE_DEVICES"] = "1"
        try:
            with pytest.raises(InUse, match="the GPU .* is in use by pid"):
                processes.take_gpus("another")
        finally:
            del os.environ["CUDA_VISIBLE_DEVICES"]
    for lock in processes.take_gpus("afterwards", 2):
        lock.release()


def test_a_server_of_one_card_leaves_the_others_alone(card, tmp_path):
    says, path = card
    says(cards=two(tmp_path, used_gib=70.0, processes=[[os.getpid(), 70.0]]))
    with lab.serve(lab.load_profile(str(path)), "bf16", log_path=tmp_path / "a.log") as server:
        assert server.info.environment["CUDA_VISIBLE_DEVICES"] == "0" and not server.problem()
    assert build_environment(with_two(path), "two").get("CUDA_VISIBLE_DEVICES") is None  # all that there are


@pytest.mark.parametrize("second, said, error", [
    ({"used_gib": 40.0, "processes": [[1, 40.0]]}, "the GPU is in use by pid 1", InUse),
    ({"lost": True}, "one of the 2 GPUs cannot be read: the card or its driver is lost", BadInput),
    ({"name": "NVIDIA L40S"}, "of different kinds .NVIDIA H100 80GB HBM3, NVIDIA L40S.: the slowest would set the pace", BadInput),
])  # fmt: skip
def test_two_cards_of_which_one_cannot_be_had(card, tmp_path, second, said, error):
    says, path = card
    says(cards=two(tmp_path, **second))
    with pytest.raises(error, match=said):
        lab.start_server(with_two(path), "two", log_path=tmp_path / "a.log")


def test_more_cards_than_there_are(card, tmp_path):
    says, path = card
    says()
    with pytest.raises(
        BadInput, match=r"two of profile .* takes 2 GPUs \(its parallel sizes multiplied\), and 1 is visible"
    ):
        lab.start_server(with_two(path, parallel="--data-parallel-size"), "two", log_path=tmp_path / "a.log")


def test_a_card_that_a_stranger_takes_or_that_is_lost_in_a_run(card, tmp_path):
    says, path = card
    says(cards=two(tmp_path))
    with lab.serve(with_two(path), "two", log_path=tmp_path / "a.log") as server:
        says(cards=two(tmp_path, used_gib=30.0, processes=[[1, 30.0]]))
        assert "another job came onto the GPU" in server.problem()
        says(cards=two(tmp_path, lost=True))
        assert "the GPU cannot be read any more" in server.problem()
        says(cards=two(tmp_path))


def test_telemetry_holds_the_cards_together_and_each(card, tmp_path):
    says, _ = card
    own = {"power_mw": 300_000, "sm_mhz": 1900, "clock_reasons": 0, "power_limit_mw": 700_000}
    says(
        cards=[
            two(tmp_path)[0] | own,
            two(tmp_path)[1] | own | {"power_mw": 500_000, "sm_mhz": 1500, "clock_reasons": 4},
        ]
    )
    with Telemetry([], cards=2) as telemetry:
        wait_for(lambda: telemetry._rows, 10)
    row = telemetry.table(0.0).iloc[-1]
    assert (row["gpu_power_w"], row["gpu_sm_mhz"], row["gpu_clock_reasons"]) == (800, 1700, 4)
    assert (row["gpu_power_limit_w"], row["gpu_memory_gib"]) == (1400, 1.0)
    assert (row["gpu_power_w 0"], row["gpu_power_w 1"], row["gpu_sm_mhz 1"]) == (300, 500, 1500)
    assert gpu.memory_used_gib(2) == 1.0 and gpu.memory_used_gib(3) is None


def test_no_card_is_read_for_a_level_that_ran_on_none(monkeypatch):
    class Asked(Exception):
        pass

    def telemetry(pids, metrics, dilation, cards):
        raise Asked(cards)

    monkeypatch.setattr(speed, "Telemetry", telemetry)
    profile, asked = lab.load_profile("emulated-h100"), []
    for device in ("cuda", "emulated", "cpu"):
        server = SimpleNamespace(profile=dataclasses.replace(profile, device=device), pids=list, metrics=None, cards=2)
        with pytest.raises(Asked) as found:
            speed._measure_level(server, lab.Level(variant="bf16", rate=5.0, requests=3), lab.fixed_length(3), None)
        asked += found.value.args
    assert asked == [2, 0, 0]


def test_engines_are_summed_and_their_caches_averaged():
    text = "\n".join(
        f'vllm:{name}{{engine="{engine}"}} {value}'
        for engine, values in enumerate(((30, 0.5), (10, 0.3)))
        for name, value in zip(("num_requests_running", "kv_cache_usage_perc"), values, strict=True)
    )
    assert parse_metrics(text) == {"running": 40, "kv_cache_usage": 0.4}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """An empty run of a profile for two cards: made without a GPU, for the verdicts' logic alone."""
    monkeypatch.setattr(Evidence, "limit", lambda _seen, _level: Limit("GPU, nearer memory", "as the test has it"))
    return open_run(tmp_path / "run", read_profile("h100-x2-8b"))


def fill(run, tokens: dict[str, float], requests=None):
    for (variant, value), seed in ((item, seed) for item in tokens.items() for seed in (1, 2, 3)):
        held = cards(run.profile.variant(variant).flags)
        count = (requests or {}).get(variant, 2000 * held)
        folder = run.path / "levels" / f"{variant}-infrps-r{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        delivered = value * (0.98 + 0.01 * seed)
        summary = {
            "valid": True, "emulated": False, "requests": count, "completed": count, "failed": 0,
            "level": {"variant": variant, "rate": math.inf, "requests": count, "repeat": seed},
            "server": {"variant": variant, "command": ["vllm"], "cards": held}, "mean_tpot_ms": 50.0,
            "output_token_throughput": delivered, "steady_output_token_throughput": delivered,
        }  # fmt: skip
        write_json(folder / "summary.json", summary)
    return next(v for v in claims.judge(run) if v.id == "R5")


def test_two_cards_that_deliver_twice_as_much_scale(run):
    found = fill(run, {"fp8-unsealed": 17_800, "fp8-dp2": 35_000, "fp8-tp2": 28_000})
    assert found.verdict == "reproduced" and found.measured == pytest.approx(35_000 / 17_800)
    assert "fp8-dp2 1.97×" in found.reason and "fp8-tp2 1.57×" in found.reason
    assert fill(run, {"fp8-dp2": 26_000, "fp8-tp2": 25_000}).verdict == "not reproduced"


def test_another_load_a_card_says_nothing_of_scaling(run):
    found = fill(run, {"fp8-unsealed": 17_800, "fp8-dp2": 35_000}, requests={"fp8-dp2": 2000})
    assert found.verdict == "undecided" and "fp8-unsealed 2,000, fp8-dp2 1,000 requests" in found.reason
    assert fill(open_run(run.path), {}).verdict == "undecided"


def test_without_a_level_for_two_it_says_what_measures_one(run):
    found = fill(run, {"fp8-unsealed": 17_800})
    assert found.verdict == "not run" and found.reason.endswith('--protocol "the same load a card"')


def test_the_table_shows_what_each_card_brings_and_costs(run):
    fill(run, {"fp8-unsealed": 18_000, "fp8-dp2": 36_000})
    rows = {row[1]: row for row in lab.cards_table(run, price=3.6).rows}
    assert rows["fp8-dp2"][2:5] == ("2", "36,000", "18,000") and rows["fp8-dp2"][5].startswith("1.00×")
    assert rows["fp8-unsealed"][11] == f"{3.6 / (18_000 * 3600 / 1e6):.3f}"


@pytest.mark.parametrize("name", ["h100-80gb", "h100-80gb-unseal", "h100-80gb-long-prompts"])
def test_what_fits_is_what_vllm_made_of_the_card(name):
    """The arithmetic beside vLLM's own numbers, of every recorded start."""
    run, seen = open_run(source=name), {}
    for s in evidence(run).summaries.values():
        seen.setdefault(s.level.variant, s)
    for variant, s in seen.items():
        shape = run.profile.shape(variant)
        gib, tokens = fit(
            shape, weight_format(s.command, shape), 1 if fp8_kv(s.command, shape) else 2, run.profile.gpu,
            share=memory_share(s.command) or 0.9,
        )  # fmt: skip
        assert tokens == pytest.approx(s.kv_cache_tokens, rel=0.01), variant
        assert gib == pytest.approx(s.server.model_memory_gib, rel=0.01), variant


def test_cards_that_cannot_share_the_heads_out_are_left_out():
    table = lab.fit_table("x", model_shape("smollm2-135m-instruct"), read_profile("h100-80gb").gpu)
    assert {row[2] for row in table.rows} == {"1"}  # 9 heads


def test_what_fits_is_told_before_anything_starts(capsys, monkeypatch):
    assert cli.main(["fit", "llama-3-70b"]) == 0
    said = capsys.readouterr().out
    rows = [line.split() for line in said.splitlines() if line.startswith("BF16")]
    assert (
        "PREDICTED by arithmetic" in said and "does not fit" in said.splitlines()[3] and rows[2][2:4] == ["4", "32.9"]
    )
    assert cli.main(["fit", "no-model"]) == 2 and "no sizes are known of 'no-model'" in capsys.readouterr().err
    assert cli.main(["fit", "llama-3-8b", "--card", "tiny-cpu"]) == 2 and "has no [gpu]" in capsys.readouterr().err
    for tokens in ("0", "8193"):
        assert cli.main(["fit", "llama-3-8b", "--tokens", tokens]) == 2
        assert "tokens, in and out: llama-3-8b takes 1 to 8,192 (--tokens)" in capsys.readouterr().err
    assert cli.main(["fit", "llama-3-8b", "--tokens", "8192"]) == 0
    monkeypatch.chdir(DATA / "models" / "llama-3-8b")
    assert cli.main(["fit", "."]) == 0 and capsys.readouterr().out.count("arithmetic: llama-3-8b on") == 2


@pytest.mark.parametrize(
    "changed", [{"model_type": "mixtral"}, {"quantization_config": {"quant_method": "mxfp4"}}, None]
)
def test_a_folder_that_cannot_be_sized_is_refused_wherever_it_lies(tmp_path, capsys, monkeypatch, changed):
    """A model of `data/models` has a plain name: no path, however it is written, passes for one."""
    llama = json.loads((DATA / "models" / "llama-3-8b" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({} if changed is None else llama | changed))
    monkeypatch.chdir(tmp_path)
    for folder in (str(tmp_path), ".", f"{tmp_path}/"):
        assert cli.main(["fit", folder]) == 2
        assert f"no sizes are known of {folder!r}: expected the folder of a Llama-like" in capsys.readouterr().err
        assert model_shape(folder) is None
        with pytest.raises(BadInput, match="no model .* in data/models"):
            model_folder(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.nightly  # three starts, one of them with two EngineCores
@pytest.mark.servers
def test_emulated_cards_share_layers_and_copies(tmp_path):
    """Real vLLM with its parallel sizes; each card is modelled."""
    (tmp_path / "mine.toml").write_text(
        'extends = "emulated-cards"\nreplaces = ["protocols"]\n[protocols.one]\nlevels = ['
        + "".join(f'{{ variant = "{v}", rate = 20, requests = 20 }}, ' for v in ("fp8", "fp8-tp2", "fp8-dp2"))
        + "]\n"
    )
    run = open_run(tmp_path / "run", read_profile(str(tmp_path / "mine.toml")))
    lab.measure(run, run.profile, ["one"])
    held = {s.level.variant: s for s in run.summaries().values()}
    assert [(held[v].cards, held[v].replicas) for v in ("fp8", "fp8-tp2", "fp8-dp2")] == [(1, 1), (2, 1), (2, 2)]
    one, shared, copies = (held[v].server for v in ("fp8", "fp8-tp2", "fp8-dp2"))
    assert shared.model_memory_gib == pytest.approx(one.model_memory_gib / 2, rel=0.01)
    assert copies.kv_cache_tokens == 2 * one.kv_cache_tokens < shared.kv_cache_tokens
    assert held["fp8-tp2"].mean_tpot_ms < held["fp8"].mean_tpot_ms and all(s.completed == 20 for s in held.values())
    assert dataclasses.asdict(copies)["emulated"]
