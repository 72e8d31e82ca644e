import dataclasses
import json
import math
import re
import shutil
from types import SimpleNamespace

import pandas as pd
import pytest

import fp8lab as lab
from conftest import make_records, recorded
from fp8lab import commands
from fp8lab.config.profile import Level, Variant
from fp8lab.config.profile_file import read_profile
from fp8lab.config.trace import fixed_length, sharegpt_like
from fp8lab.errors import BadInput, NotWritten, RunDamaged, RunMismatch
from fp8lab.experiment.max_rate import find_max_rate
from fp8lab.experiment.speed import load_test, measure, missing_work, plan_table, trace_for
from fp8lab.metrics.performance import summarize
from fp8lab.metrics.summary import MeasuredLevel, Summary
from fp8lab.paths import DATA
from fp8lab.report import notebooks
from fp8lab.report.levels import flags_table, validity_table
from fp8lab.results import provenance, run_folder
from fp8lab.results.run_folder import LevelResult, open_run, record

LEVEL = Level(variant="bf16", rate=50, requests=3)


def make_result(level=LEVEL, requests=3) -> LevelResult:
    records = make_records([0, 1, 2], [0.1, 1.2, 2.3], [1.1, 3.2, 2.3], [11, 21, 1])
    records = pd.concat([records] * math.ceil(requests / 3), ignore_index=True)[:requests]
    records["request"] = range(len(records))
    tokens = records[["request"]].assign(at_s=records["first_token_s"])
    measured = MeasuredLevel(**dataclasses.asdict(level))
    summary = Summary(**summarize(records, tokens), valid=True, emulated=True, level=measured)
    return LevelResult(summary, records, tokens)


@pytest.fixture
def profile():
    return read_profile("emulated-h100")


@pytest.fixture
def run(tmp_path, profile):
    return open_run(tmp_path / "run", profile)


def test_a_level_comes_back_as_it_was_written(run):
    result = make_result()
    assert not run.has(LEVEL)
    run.write(result)
    back = run.read(LEVEL)
    assert back.records.equals(result.records)
    assert back.summary.mean_ttft_ms == pytest.approx(200)
    assert list(run.summaries()) == ["bf16-50rps-r1"]


def test_a_half_written_level_is_not_complete_and_is_replaced(run):
    folder = run.path / "levels" / LEVEL.id
    folder.mkdir(parents=True)
    (folder / "records.parquet").write_bytes(b"PAR1 half")
    assert not run.has(LEVEL) and run.summaries() == {}
    run.write(make_result())
    assert run.has(LEVEL) and len(run.read(LEVEL).records) == 3


def test_a_run_resumes_with_its_own_profile(run, profile):
    again = open_run(run.path)
    assert again.profile == profile and again.manifest == run.manifest


def test_a_run_of_another_profile_is_refused_and_untouched(run):
    before = (run.path / "run.json").read_bytes()
    with pytest.raises(RunMismatch, match="made with profile 'emulated-h100', not with this 'tiny-cpu'"):
        open_run(run.path, read_profile("tiny-cpu"))
    assert (run.path / "run.json").read_bytes() == before


def test_a_variant_that_has_levels_does_not_change_in_two_steps(run, profile):
    run.write(make_result())
    without = dataclasses.replace(profile, variants={"fp8": profile.variants["fp8"]})
    open_run(run.path, without)
    changed = dataclasses.replace(
        profile, variants={**profile.variants, "bf16": Variant(flags=("--max-num-seqs", "7"))}
    )
    with pytest.raises(RunMismatch, match="variants"):
        open_run(run.path, changed)
    assert open_run(run.path).profile.variants["bf16"] == profile.variants["bf16"]


def test_a_command_to_paste_takes_a_path_with_spaces(tmp_path, profile):
    run = open_run(tmp_path / "sp é" / "run 1", profile)
    result = make_result()
    run.write(dataclasses.replace(result, summary=dataclasses.replace(result.summary, valid=False)))
    given = f"fp8lab measure --run '{tmp_path}/sp é/run 1' --again {LEVEL.id}"
    assert given in str(validity_table(run)) and "what to do" in str(validity_table(run))
    (run.path / "levels" / LEVEL.id / "summary.json").write_text("torn {")
    with pytest.raises(RunDamaged) as told:
        open_run(run.path).read(LEVEL)
    assert f"`{given}`" in str(told.value)


def test_a_folder_that_is_no_run_is_refused(tmp_path, profile):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(BadInput, match=r"no run\.json"):
        open_run(tmp_path / "mine", profile)
    with pytest.raises(BadInput, match="no run folder"):
        open_run(source=tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_recorded_run_is_read_only(run):
    run.write(make_result())
    recorded = open_run(source=run.path)
    assert recorded.read(LEVEL).summary.completed == 3
    with pytest.raises(BadInput, match="read-only"):
        recorded.write(make_result())


def test_part_of_a_run_is_read_as_far_as_it_goes(run, profile, capsys):
    """A colleague's run that was stopped half-way can be looked at, or one of other levels; an empty one cannot."""
    with pytest.raises(BadInput, match="holds no complete level"):
        measure(open_run(source=run.path), profile, "as published")
    run.write(make_result(other := Level(variant="fp8", rate=7, requests=3), 3))
    for protocol in ("as published", "one that this profile does not have"):
        (held,) = measure(open_run(source=run.path), profile, protocol)
        assert held.level.id == other.id
        assert f"holds nothing of {protocol!r}: drawn is all that it holds" in capsys.readouterr().err
    level = profile.levels("as published")[0]
    run.write(make_result(level, 1000))
    (held,) = measure(open_run(source=run.path), profile, "as published")
    assert held.level == level and "lacks fp8-100rps-r1: drawn without" in capsys.readouterr().err


def test_what_is_left_of_a_run_is_planned_by_its_variants(run, profile):
    level = profile.levels("as published")[0]
    run.write(make_result(level, 1000))
    assert [
        [one for one, _ in missing_work(run, profile, ["as published"], variants=variants)]
        for variants in ((), ["bf16"])
    ] == [["fp8"], []]
    told = str(plan_table(profile, ["as published"], open_run(source=run.path)))
    assert "fp8" in told and "bf16" not in told
    recorded = open_run(source="h200-80gb")
    held = measure(recorded, recorded.profile, "equal load", variants=["fp8"])
    assert {one.level.variant for one in held} == {"fp8"}
    with pytest.raises(BadInput, match="no variant 'none' in profile"):
        missing_work(None, profile, ["as published"], variants=["none"])
    # Where no level was asked for, nothing is done yet.
    with pytest.raises(
        BadInput, match="protocols 'as published' of profile .* name no level of fp8-kv .these do: none"
    ):
        measure(run, profile, ["as published"], variants=["fp8-kv"])
    with pytest.raises(BadInput, match="name no level of fp8-api4 .these do: 'four API servers'."):
        plan_table(read_profile("h100-80gb"), ["as published"], variants=["fp8-api4"])


def test_damage_names_the_file_and_the_remedy(run):
    run.write(make_result())
    records = run.path / "levels" / LEVEL.id / "records.parquet"
    records.write_bytes(records.read_bytes()[:100])
    with pytest.raises(RunDamaged, match=r"records\.parquet.*--again bf16-50rps-r1"):
        run.read(LEVEL)
    (records.parent / "summary.json").write_text('{"half": ')
    for look in (run.summaries, lambda: run.has(LEVEL)):
        with pytest.raises(RunDamaged, match=r"summary\.json"):
            look()


def test_the_same_level_with_other_requests_is_refused(run):
    run.write(make_result())
    with pytest.raises(RunMismatch, match="with 3 requests, not 30"):
        run.has(dataclasses.replace(LEVEL, requests=30))


def test_a_missing_level_lists_what_there_is(run):
    run.write(make_result())
    with pytest.raises(BadInput, match="no complete level fp8-100rps-r1.*bf16-50rps-r1"):
        run.read(Level(variant="fp8", rate=100, requests=1))


def test_json_is_strict_and_whole(tmp_path):
    path = tmp_path / "x.json"
    run_folder.write_json(path, {"rate": math.inf, "value": math.nan, "level": LEVEL})
    back = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert back == {
        "rate": "inf",
        "value": None,
        "level": {"variant": "bf16", "rate": 50.0, "requests": 3, "repeat": 1, "cross_check": False, "start": 0},
    }
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_latest_points_at_the_newest_run(tmp_path, profile, monkeypatch):
    monkeypatch.setattr(run_folder, "RUNS", tmp_path)
    first, second = open_run(tmp_path / "a", profile), open_run(tmp_path / "b", profile)
    assert (tmp_path / "latest").resolve() == second.path
    for name in ("latest", tmp_path / "latest", f"{tmp_path}/a/../latest/"):
        assert open_run(name).path == second.path != first.path


def test_no_run_takes_the_place_of_the_link_to_the_last_one(tmp_path, profile, monkeypatch):
    monkeypatch.setattr(run_folder, "RUNS", tmp_path)
    first = open_run(tmp_path / "latest", profile)  # as the first command on a fresh clone may say
    assert first.path.name.startswith(profile.name) and (tmp_path / "latest").resolve() == first.path
    (tmp_path / "latest").unlink()
    shutil.copytree(first.path, tmp_path / "latest")  # as an earlier version made it
    for name in ("latest", tmp_path / "latest", tmp_path / "new", ""):
        with pytest.raises(BadInput, match="latest stands where the link to the last run belongs: rename it"):
            open_run(name, profile)
    assert open_run(first.path).path == first.path and not (tmp_path / "new").exists()


def test_a_run_that_goes_on_elsewhere_says_so(run, monkeypatch):
    run.write(make_result())
    assert "continued" not in run.manifest
    monkeypatch.setattr(
        run_folder,
        "collect",
        lambda: {"created": "later", "machine": {"gpus": ["other"]}, "software": {}, "source": {}},
    )
    again = open_run(run.path)
    again.write(make_result(Level(variant="fp8", rate=50, requests=3)))
    again.write(make_result(Level(variant="fp8", rate=100, requests=3)))
    assert [place["machine"]["gpus"] for place in open_run(run.path).manifest["continued"]] == [["other"]]


def test_what_measures_a_level_is_its_part_and_not_what_lies_beside_it(run, monkeypatch):
    """A notebook that JupyterLab saved changes git's status and nothing that is measured; a line of the library does."""
    run.write(make_result())
    monkeypatch.setattr(provenance, "_git_state", lambda: {"commit": "another", "modified": True})
    run.write(make_result(dataclasses.replace(LEVEL, repeat=2)))
    assert "continued" not in run.manifest
    monkeypatch.setattr(run_folder, "digest", lambda *more: "another library")
    run.write(make_result(dataclasses.replace(LEVEL, repeat=3)))
    assert len(run.manifest["continued"]) == 1
    assert [s.part for s in run.summaries().values()] == [1, 1, 2]
    assert open_run(run.path).manifest["continued"] == run.manifest["continued"]


def test_a_level_is_its_requests(run, profile):
    """A stored level is not returned for other requests of the same number, nor for another profile."""
    own = trace_for(profile, LEVEL)
    result = make_result()
    traced = MeasuredLevel(**dataclasses.asdict(LEVEL), trace=own.name, trace_digest=own.digest)
    result = dataclasses.replace(result, summary=dataclasses.replace(result.summary, level=traced))
    run.write(result)
    server = SimpleNamespace(variant="bf16", profile=profile)
    assert load_test(server, rate=50, requests=3, run=run).summary.level.trace_digest == own.digest
    assert load_test(server, sharegpt_like(5, seed=0), rate=50, requests=3, run=run).valid
    renamed = dataclasses.replace(fixed_length(3, input_tokens=8, output_tokens=8), name=own.name)
    for other in (sharegpt_like(3, seed=7), fixed_length(3, input_tokens=8, output_tokens=8), renamed):
        with pytest.raises(RunMismatch, match=f"not those of .*digest {other.digest}.*run.set_aside"):
            load_test(server, other, rate=50, run=run)
    changed = dataclasses.replace(profile, workload=dataclasses.replace(profile.workload, seed=7))
    with pytest.raises(RunMismatch, match="workload"):
        load_test(SimpleNamespace(variant="bf16", profile=changed), rate=50, requests=3, run=run)
    with pytest.raises(RunMismatch, match="workload"):
        find_max_rate(SimpleNamespace(variant="bf16", profile=changed), run=run)
    # A file may change under a profile that stays the same.
    summary = run.path / "levels" / LEVEL.id / "summary.json"
    summary.write_text(summary.read_text().replace(own.digest, "0" * 16))
    with pytest.raises(RunMismatch, match="digest 0000"):
        measure(run, dataclasses.replace(profile, protocols={"one": (LEVEL,)}), "one")


def test_repeats_of_their_own_starts_alternate_between_the_variants(profile):
    mine = dataclasses.replace(
        profile,
        protocols={
            "starts": tuple(
                Level(variant=variant, rate=math.inf, requests=3, repeat=n, start=n)
                for variant in ("fp8", "bf16")
                for n in (1, 2, 3)
            ),
            "one server": (Level(variant="fp8", rate=50, requests=3), Level(variant="fp8", rate=75, requests=3)),
        },
    )
    work = missing_work(None, mine, ["starts", "one server"])
    assert [(variant, [level.id for level in levels]) for variant, levels in work] == [
        ("fp8", ["fp8-50rps-r1", "fp8-75rps-r1"]),
        *((variant, [f"{variant}-infrps-r{n}"]) for n in (1, 2, 3) for variant in ("bf16", "fp8")),
    ]
    plan = [row[:2] for row in plan_table(mine, ["starts"]).rows]
    assert plan[:2] == [("bf16, start 1", "1"), ("fp8, start 1", "1")] and plan[-1] == ("together", "6")


def test_a_run_takes_in_more_protocols_but_no_other_levels(run, profile):
    more = dataclasses.replace(profile, protocols=dict(profile.protocols) | {"mine": (LEVEL,)})
    assert "mine" in open_run(run.path, more).profile.protocols
    assert "mine" in open_run(run.path).profile.protocols
    other = dataclasses.replace(
        profile, variants=dict(profile.variants) | {"bf16": Variant(flags=("--dtype", "float16"))}
    )
    with pytest.raises(RunMismatch, match="variants"):
        open_run(run.path, other)
    # Another variant beside them, or a key of a profile that did not exist when the run was made, changes no level.
    added = dataclasses.replace(
        profile, variants=dict(profile.variants) | {"new": Variant(flags=("--dtype", "float16"))}
    )
    assert "new" in open_run(run.path, added).profile.variants
    manifest = json.loads((run.path / "run.json").read_text())
    del manifest["profile"]["workload"]["tokenizer"]
    (run.path / "run.json").write_text(json.dumps(manifest))
    assert open_run(run.path, added).read_only is False


def record_below(monkeypatch, folder):
    monkeypatch.setattr(run_folder, "DATA", folder)


def test_recording_keeps_what_figures_need(run, monkeypatch, tmp_path):
    record_below(monkeypatch, tmp_path)
    run.write(make_result())
    run.write(make_result(Level(variant="fp8", rate=50, requests=3)))
    target = record(run, "kept", tokens=["fp8-50rps-r1"])
    assert open_run(source=target).read(LEVEL).tokens is None
    assert open_run(source="kept").read(Level(variant="fp8", rate=50, requests=3)).tokens is not None
    with pytest.raises(BadInput, match="no complete level x"):
        record(run, "kept", tokens=["x"])


@pytest.mark.parametrize("name", ["", ".", "..", "../kept", "a/b", "ABSOLUTE", ".hidden", "x" * 65])
def test_recording_under_what_is_no_name_is_refused_and_deletes_nothing(run, monkeypatch, tmp_path, name):
    record_below(monkeypatch, tmp_path / "data")
    thesis = tmp_path / "mine" / "thesis.txt"
    for file in (thesis, tmp_path / "data" / "claims.toml", tmp_path / "data" / "recorded" / "kept" / "run.json"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("years of work")
    run.write(make_result())
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(BadInput, match="is no name"):
        record(run, str(thesis.parent) if name == "ABSOLUTE" else name)
    assert sorted(tmp_path.rglob("*")) == before


def test_recording_a_recorded_run_onto_itself_is_refused_and_harmless(run, monkeypatch, tmp_path):
    record_below(monkeypatch, tmp_path)
    run.write(make_result())
    target = record(run, "kept")
    with pytest.raises(BadInput, match="'kept' is this recorded run itself"):
        record(open_run(source="kept"), "kept")
    assert open_run(source="kept").read(LEVEL).summary.completed == 3
    assert record(open_run(source="kept"), "other") != target


def test_recording_that_fails_midway_leaves_the_earlier_one(run, monkeypatch, tmp_path):
    record_below(monkeypatch, tmp_path / "data")
    run.write(make_result())
    record(run, "kept")
    before = sorted((tmp_path / "data").rglob("*"))

    def disk_full(*_paths):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder.shutil, "copyfile", disk_full)
    with pytest.raises(NotWritten, match="No space left on device"):
        record(run, "kept")
    assert sorted((tmp_path / "data").rglob("*")) == before
    assert open_run(source="kept").read(LEVEL).summary.completed == 3


def test_provenance_names_no_host_and_no_user(run):
    import getpass
    import socket

    text = (run.path / "run.json").read_text()
    assert {"machine", "software", "source", "profile", "created"} <= run.manifest.keys()
    assert not re.search(rf"\b{re.escape(socket.gethostname())}\b", text) and f'"{getpass.getuser()}"' not in text


def test_what_another_process_added_to_a_run_stays(run, profile, monkeypatch):
    here, there = open_run(run.path), open_run(run.path)
    more = dataclasses.replace(
        profile, variants={**profile.variants, "mine": Variant(flags=("--kv-cache-dtype", "fp8"))}
    )
    there.adopt(more)
    place = {"machine": {"cpu": "another"}, "software": {}, "created": "", "source": {}, "measured_with": "other"}
    monkeypatch.setattr(run_folder, "_place", lambda _profile: place)
    there.write(make_result())
    monkeypatch.setattr(run_folder, "_place", lambda _profile: place | {"measured_with": "ours"})
    here.write(make_result(dataclasses.replace(LEVEL, repeat=2)))
    held = open_run(run.path)
    assert [part.get("measured_with") for part in held.parts[1:]] == ["other", "ours"]
    assert "mine" in held.profile.variants
    assert [one.part for one in held.summaries().values()] == [2, 3]


def test_two_runs_of_one_second_are_two(profile, monkeypatch, tmp_path):
    monkeypatch.setattr(run_folder, "RUNS", tmp_path)
    assert len({open_run("", profile).path for _ in range(3)}) == 3


@pytest.mark.parametrize(
    ("variant", "rate"), [("fp8-2", "50"), ("vllm-0.33", "100"), ("fp8", "1e-05"), ("bf16", "inf"), ("bf16", "0.5")]
)
def test_a_level_is_known_by_its_name(variant, rate):
    assert run_folder._LEVEL_ID.fullmatch(f"{variant}-{rate}rps-r3").groups() == (variant, rate, "3")


def test_a_recording_that_is_interrupted_leaves_the_earlier_one(run, monkeypatch, tmp_path):
    record_below(monkeypatch, tmp_path / "data")
    run.write(make_result())
    record(run, "mine")
    earlier = sorted(path.name for path in (tmp_path / "data").rglob("*"))
    rename = type(tmp_path).rename

    def interrupted(path, target):
        if path.name == "whole":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(type(tmp_path), "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        record(run, "mine")
    assert sorted(path.name for path in (tmp_path / "data").rglob("*")) == earlier


def test_a_recorded_run_is_not_opened_to_be_measured_into():
    with pytest.raises(BadInput, match="h100-80gb is a recorded run: read it with --source"):
        open_run(run_folder.DATA / "recorded" / "h100-80gb")


@pytest.mark.parametrize("name", sorted(path.name for path in (DATA / "recorded").iterdir()))
def test_every_recorded_run_has_something_to_show(name):
    """Whatever its protocols are called: a notebook draws its levels, of one without levels step 7 the answers."""
    run = open_run(source=name)
    if (notebook := commands._default_notebook(run)) == "07_quality":
        assert run.read_parts("quality") and not run.summaries()
    else:
        protocols = notebooks.declared(*notebooks.find(notebook))["protocols"]
        assert measure(run, run.profile, protocols)
        assert plan_table(run.profile, protocols, run).rows and flags_table(run.profile, protocols).rows


def test_an_older_run_of_an_fp8_checkpoint_stays_one(tmp_path):
    """Its dimensions say `fp8_weights`, where newer ones name the format."""
    shutil.copytree(recorded("h100-80gb-starts").path, tmp_path / "run")
    kept = json.loads((tmp_path / "run" / "run.json").read_text())
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 100}  # fmt: skip
    kept["profile"]["model"]["dimensions"] = {"default": sizes, "fp8": sizes | {"fp8_weights": True}}
    (tmp_path / "run" / "run.json").write_text(json.dumps(kept))
    read = open_run(source=tmp_path / "run").profile.model.dimensions
    assert [read[name].weights for name in ("default", "fp8")] == ["bf16", "fp8"]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda run: lab.levels("h200-80gb"), "'h200-80gb' is no run"),
        (lambda run: lab.levels_table("h200-80gb"), "'h200-80gb' is no run"),
        (lambda run: lab.claims_table("h200-80gb"), "'h200-80gb' is no run"),
        (lambda run: lab.conclusion("h200-80gb", "C1"), "'h200-80gb' is no run"),
        (lambda run: lab.throughput_figure("h200-80gb"), "'h200-80gb' is no run"),
        (lambda run: lab.quality_table("h200-80gb"), "'h200-80gb' is no run"),
        (lambda run: lab.steps_table("h200-80gb"), "'h200-80gb' is no run"),
        (lambda run: lab.measure("h200-80gb", run.profile), "'h200-80gb' is no run"),
        (lambda run: lab.claims_across(run, "h100-80gb"), "'h100-80gb' is no run"),
        (lambda run: lab.load_test("http://127.0.0.1:9", rate=5), "'http://127.0.0.1:9' is no server"),
        (lambda run: lab.warm_up("http://127.0.0.1:9"), "'http://127.0.0.1:9' is no server"),
    ],
)
def test_what_is_no_run_or_server_is_named(call, said):
    with pytest.raises(BadInput, match=f"{said}, expected "):
        call(open_run(source="h200-80gb"))


def test_a_text_is_a_list_of_one_name():
    run = open_run(source="h200-80gb")
    plans = [
        str(lab.plan_table(run.profile, one, None, two))
        for one, two in (("equal load", "fp8"), (["equal load"], ["fp8"]))
    ]
    assert plans[0] == plans[1] and "'equal load'" in plans[0]
    assert str(lab.flags_table(run.profile, "equal load")) == str(lab.flags_table(run.profile, ["equal load"]))
    assert lab.measure(run, run.profile, variants="bf16")[0].summary.level.variant == "bf16"
    with pytest.raises(BadInput, match="the fit holds no variant bf17 "):
        lab.step_models("h100-80gb-unsealed", "bf17")
