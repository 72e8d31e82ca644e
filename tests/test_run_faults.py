"""A run folder under faults: killed at any instant, a full disk, a read-only folder, damage, two writers."""

import dataclasses
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

import pandas as pd
import psutil
import pyarrow
import pytest
from pyarrow import parquet

import fp8lab as lab
from conftest import NIGHTLY, marked, wait_for
from fp8lab.config.profile import Level
from fp8lab.config.profile_file import read_profile
from fp8lab.errors import BadInput, InUse, NotWritten, RunDamaged, ServerFailed
from fp8lab.metrics.summary import MeasuredLevel
from fp8lab.paths import DATA
from fp8lab.results.run_folder import open_run
from fp8lab.system import locks as folders
from test_runs import LEVEL, make_result
from warm_cli import fp8lab

KILLS = 50 if NIGHTLY else 8
PROTOCOLS = ["as published", "equal load"]
# Imports everything, then forks one measurement for each line it reads: no start pays for pandas again.
NURSERY = """
import os, sys, tempfile, warnings
import pandas, pyarrow, pyarrow.parquet, httpx
import fp8lab as lab
from fp8lab.experiment import speed
from fp8lab.load import level
from fp8lab.metrics import performance, resources
from fp8lab.results import run_folder
warnings.simplefilter("ignore")
tempfile.gettempdir()  # Python tries the folder out with a file, once: killed in that instant it would leave it
profile = lab.load_profile(sys.argv[1])
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            {work}
            code = 0
        finally:
            os._exit(code)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""
MEASURE = "lab.measure(lab.open_run(line.strip(), profile), profile, {protocols!r})"
# What must be the same in any two runs; times and what follows from them differ.
SAME_COLUMNS = ["request", "prompt_tokens", "output_tokens_asked", "output_tokens", "chunks", "scheduled_s"]
SAME_COLUMNS += ["finish_reason", "error"]
SAME_KEYS = ["requests", "completed", "failed", "prompt_tokens", "output_tokens", "emulated", "time_dilation"]


class Nursery:
    """Runs `work` in forked children that can be killed."""

    def __init__(self, work: str, profile):
        command = [sys.executable, "-c", NURSERY.format(work=work), str(profile)]
        options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        self.process = subprocess.Popen(command, **options)

    def run(self, argument, kill_after: float | None = None) -> bool:
        """Whether the work was done; with `kill_after` it is killed that many seconds after its fork."""
        self.process.stdin.write(f"{argument}\n")
        self.process.stdin.flush()
        child = int(self.process.stdout.readline())
        if kill_after is not None:
            timer = threading.Timer(kill_after, quietly_kill, (child,))
            timer.start()
        done = int(self.process.stdout.readline()) == 0
        if kill_after is not None:
            timer.cancel()
        return done

    def __enter__(self):
        return self

    def __exit__(self, *_exc):
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()


def quietly_kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def what_must_be_same(run) -> dict:
    return {
        level_id: (
            {key: getattr(summary, key) for key in SAME_KEYS},
            summary.level,
            run.read(summary.level).records[SAME_COLUMNS].to_dict("list"),
        )
        for level_id, summary in run.summaries().items()
    }


def complete(run) -> dict[str, bytes]:
    """What the files of the complete levels hold."""
    return {str(path.relative_to(run.path)): path.read_bytes() for path in run.path.glob("levels/*/*")}


def test_a_run_killed_at_any_instant_goes_on_and_ends_the_same(fake_vllm, tmp_path, monkeypatch):
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    profile, instants = fake_vllm(requests=6), random.Random(20260124)
    opened, number = 0, 0
    with Nursery(MEASURE.format(protocols=PROTOCOLS), profile) as nursery:
        assert nursery.run(tmp_path / "undisturbed")
        expected = what_must_be_same(open_run(tmp_path / "undisturbed"))
        assert len(expected) == 4
        for _ in range(KILLS):
            run_dir = tmp_path / f"run-{number}"
            held = complete(open_run(run_dir)) if (run_dir / "run.json").exists() else {}
            done = nursery.run(run_dir, kill_after=instants.uniform(0.0, 1.0))
            if run_dir.exists():
                run = open_run(run_dir, str(profile))  # it opens, whatever happened
                opened += 1
                assert held.items() <= complete(run).items()  # what was complete is as it was
                assert all(what == expected[level] for level, what in what_must_be_same(run).items())
            number += done  # a run that came to its end makes room for another one
        assert nursery.run(run_dir)
        assert what_must_be_same(open_run(run_dir)) == expected
    assert opened > KILLS / 2
    wait_for(lambda: not marked(profile), 20, "the end of all servers")
    # What the killed ones left there is swept away at a start; a folder of the last minute may still be coming to life.
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    monkeypatch.setattr(folders, "_YOUNG_S", 0)
    folders.sweep()
    assert not list(scratch.iterdir())


@pytest.mark.servers
def test_a_level_killed_while_it_is_written_is_whole_or_absent(tmp_path):
    """The same level over and over, so that nearly every kill falls into its writing."""
    (tmp_path / "nursed.toml").write_text('extends = "emulated-h100"')
    work = f"sys.path.insert(0, {os.path.dirname(__file__)!r}); import test_runs; "
    work += f"run = lab.open_run({str(tmp_path / 'run')!r}, profile); run.write(test_runs.make_result())\n            "
    work += "while line.strip(): run.write(test_runs.make_result())"
    instants = random.Random(7)
    with Nursery(work, tmp_path / "nursed.toml") as nursery:
        for _ in range(2):  # the first of them imports
            began = time.monotonic()
            assert nursery.run("")
            seconds = time.monotonic() - began
        for _ in range(KILLS):
            nursery.run("over and over", kill_after=instants.uniform(0.0, 2 * seconds))
            run = open_run(tmp_path / "run")
            if run.has(LEVEL):
                assert len(run.read(LEVEL).records) == 3
            replaced = list((tmp_path / "run").glob("set-aside/*"))
            for folder in replaced:
                assert (folder / "summary.json").is_file()  # what was replaced was whole, and is kept
    assert len(replaced) > 1  # so many writes there were beside those that were left to end


@pytest.mark.parametrize("left", [".run.json.123", ".lock"])
def test_a_run_killed_while_it_was_made_opens_again(tmp_path, left):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / left).write_text("{half")
    assert open_run(tmp_path / "run", read_profile("emulated-h100")).summaries() == {}


# A full disk, a read-only folder.

WRITE = """
import os, resource, signal, sys
from fp8lab.results.run_folder import open_run
from fp8lab.config.profile import Level
import test_runs
sys.path.insert(0, {tests!r})
run = open_run({run!r})
test_runs.make_result()
{limit}
try:
    run.write(test_runs.make_result(Level(variant="fp8", rate=50, requests=3)))
except Exception as error:
    print(type(error).__name__, error)
"""


def write_under(limit: str, run, wrap=()) -> str:
    tests = os.path.dirname(__file__)
    code = WRITE.format(tests=tests, run=str(run), limit=limit)
    environment = os.environ | {"PYTHONPATH": f"{tests}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    return subprocess.run(
        [*wrap, sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    ).stdout


@pytest.mark.parametrize("size", [0, 1000, 2000])
def test_a_file_that_cannot_grow_is_a_clear_error_and_harms_nothing(tmp_path, size):
    """The limit on a file's size fails a write in its middle, as a full disk does."""
    run = open_run(tmp_path / "run", read_profile("emulated-h100"))
    run.write(make_result())
    before = complete(run)
    said = write_under(f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))", run.path)
    assert said.startswith("NotWritten ") and "cannot be written" in said and "run the same command again" in said
    again = open_run(tmp_path / "run")
    assert complete(again) == before and list(again.summaries()) == [LEVEL.id]
    assert not (run.path / "unfinished").exists()


def test_a_full_disk_is_a_clear_error_and_the_run_goes_on_when_there_is_room(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", disk]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root; the test before this one stands for it")
    try:
        run = open_run(disk / "run", read_profile("emulated-h100"))
        run.write(make_result())
        before = complete(run)
        ballast = disk / "ballast"
        with pytest.raises(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 1024)
        with pytest.raises(NotWritten, match="No space left on device"):
            run.write(make_result(Level(variant="fp8", rate=50, requests=3)))
        assert complete(open_run(run.path)) == before
        ballast.unlink()
        run.write(make_result(Level(variant="fp8", rate=50, requests=3)))
        assert len(open_run(run.path).summaries()) == 2
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_read_only_run_folder_is_a_clear_error_and_can_be_read(tmp_path):
    run = open_run(tmp_path / "run", read_profile("emulated-h100"))
    run.write(make_result())
    # Root may write anywhere: the write is another user's.
    for path in [tmp_path, *tmp_path.parents]:
        if path.owner() == "root" and not path.stat().st_mode & 0o001:
            path.chmod(path.stat().st_mode | 0o011)
    for path in [run.path, *run.path.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    drop = "os.setuid(65534)" if os.getuid() == 0 else ""
    said = write_under(drop, run.path)
    assert said.startswith("NotWritten ") and "Permission denied" in said
    assert open_run(source=run.path).read(LEVEL).summary.completed == 3


# Damage.


@pytest.mark.parametrize("name", ["records.parquet", "tokens.parquet", "summary.json"])
@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"\0" * 500])
def test_damage_is_named_before_anything_starts_and_measured_again_on_request(fake_vllm, tmp_path, name, damage):
    profile = lab.load_profile(str(fake_vllm()))
    run = open_run(tmp_path / "run", profile)
    for level in (level for protocol in PROTOCOLS for level in profile.levels(protocol)):
        run.write(whole(level))
    before = complete(run)
    damaged = run.path / "levels" / "fp8-50rps-r1" / name
    damaged.write_bytes(damage(damaged.read_bytes()))
    with pytest.raises(RunDamaged, match=rf"{name} .*fp8lab measure --run .* --again fp8-50rps-r1"):
        lab.measure(run, profile, PROTOCOLS)
    results = lab.measure(run, profile, PROTOCOLS, again=["fp8-50rps-r1"])
    assert [len(result.records) for result in results] == [20] * 4
    assert (run.path / "set-aside" / "fp8-50rps-r1-1" / name).read_bytes() == damage(
        before[f"levels/fp8-50rps-r1/{name}"]
    )
    others = {path: data for path, data in before.items() if "fp8-50rps-r1" not in path}
    assert others.items() <= complete(run).items()


def whole(level: Level):
    """A made-up result of `level` with as many requests as it has."""
    result = make_result(level)
    records = pd.concat([result.records] * 10).head(level.requests).reset_index(drop=True)
    summary = dataclasses.replace(result.summary, requests=level.requests, failures={})
    return dataclasses.replace(result, records=records, summary=summary)


@pytest.fixture
def level_folder(tmp_path):
    """The folder of the only level of a run."""
    run = open_run(tmp_path / "run", read_profile("emulated-h100"))
    run.write(make_result())
    return run.path / "levels" / LEVEL.id


def read_again(level_folder):
    return open_run(source=level_folder.parents[1]).read(LEVEL)


@pytest.mark.parametrize("name", ["records", "tokens"])
def test_a_flipped_bit_in_any_column_is_found(level_folder, name):
    path = level_folder / f"{name}.parquet"
    whole_file = path.read_bytes()
    group = parquet.ParquetFile(path).metadata.row_group(0)
    for column in (group.column(number) for number in range(group.num_columns)):
        damaged = bytearray(whole_file)
        first = column.dictionary_page_offset or column.data_page_offset
        damaged[first + column.total_compressed_size - 1] ^= 4
        path.write_bytes(damaged)
        with pytest.raises(RunDamaged, match=rf"{name}\.parquet cannot be read .*--again {LEVEL.id}"):
            read_again(level_folder)


def test_no_damage_of_a_table_is_another_error(level_folder):
    """Bits flipped anywhere, the description at the file's end included: the table or RunDamaged, nothing else."""
    chance, found = random.Random(20260124), 0
    for name in ("records", "tokens"):
        path = level_folder / f"{name}.parquet"
        whole_file = path.read_bytes()
        for _ in range(300):
            damaged = bytearray(whole_file)
            damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
            path.write_bytes(damaged)
            try:
                assert len(read_again(level_folder).records) == 3
            except RunDamaged:
                found += 1
        path.write_bytes(whole_file)
    assert found > 300


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("records", lambda t: t.drop(columns="chunks"), "it lacks chunks"),
        ("records", lambda t: t.assign(chunks="many"), "holds chunks that are no numbers"),
        ("records", lambda t: t.assign(chunks=float("inf")), "holds chunks that are no numbers"),
        ("tokens", lambda t: t.rename(columns={"at_s": "at"}), "it lacks at_s"),
        ("tokens", lambda t: t.assign(at_s=[{"a": 1}] * len(t)).drop(columns="request"), "it lacks request"),
    ],
)
def test_a_table_with_other_columns_is_damage(level_folder, name, change, reason):
    path = level_folder / f"{name}.parquet"
    change(pd.read_parquet(path)).to_parquet(path)
    with pytest.raises(RunDamaged, match=f"{reason}.*--again {LEVEL.id}"):
        read_again(level_folder)


@pytest.mark.parametrize("name", ["records", "tokens", "telemetry"])
def test_a_small_file_that_holds_gigabytes_is_refused_unread(level_folder, name):
    path = level_folder / f"{name}.parquet"
    columns = [*pd.read_parquet(level_folder / "records.parquet"), "at_s"]
    million = pyarrow.table(dict.fromkeys(columns, pyarrow.nulls(1_000_000, pyarrow.int64())))
    with parquet.ParquetWriter(path, million.schema, compression="zstd") as file:
        for _ in range(20):
            file.write_table(million)
    assert path.stat().st_size < 1 << 20
    before = psutil.Process().memory_info().rss
    with pytest.raises(RunDamaged, match="it holds 20,000,000 rows, .*: more than there can be"):
        read_again(level_folder)
    assert psutil.Process().memory_info().rss - before < 64 << 20


@pytest.mark.parametrize("text", ["{", "[]", '"x"', "[" * 100_000, '{"schema": 1}', '{"level": 3}'])
def test_json_that_says_something_else_is_damage(tmp_path, text):
    run = open_run(tmp_path / "run", read_profile("emulated-h100"))
    run.write(make_result())
    (run.path / "levels" / LEVEL.id / "summary.json").write_text(text)
    for look in (run.summaries, lambda: run.has(LEVEL), lambda: run.read(LEVEL)):
        with pytest.raises(RunDamaged, match=r"summary\.json .*--again bf16-50rps-r1"):
            look()
    (run.path / "run.json").write_text(text)
    with pytest.raises(RunDamaged, match=r"run\.json .*(restore it|choose another)"):
        open_run(run.path)


def test_the_command_line_measures_a_variant_the_rest_and_again(fake_vllm, tmp_path):
    path = fake_vllm(requests=8, dilation=8)
    command = ["measure", "--run", str(tmp_path / "run")]
    assert fp8lab(*command, "--profile", str(path), "--variant", "fp8").returncode == 0
    assert {one.partition("-")[0] for one in open_run(source=tmp_path / "run").summaries()} == {"fp8"}
    assert fp8lab(*command, "--profile", str(path)).returncode == 0
    summary = tmp_path / "run" / "levels" / "bf16-50rps-r1" / "summary.json"
    summary.write_text("{half")
    refused = fp8lab(*command)
    assert refused.returncode == 1 and "--again bf16-50rps-r1" in refused.stderr and "Traceback" not in refused.stderr
    again = fp8lab(*command, "--again", "bf16-50rps-r1")
    assert again.returncode == 0, again.stderr
    assert json.loads(summary.read_text())["failed"] == 0


# Measuring again what no protocol names, and what is INVALID.


def again(run, profile, *ids, protocols=()):
    return lab.measure(run, profile, protocols, again=ids)


def test_any_level_that_a_run_holds_is_measured_again_as_it_was(fake_vllm, tmp_path):
    """A probe, a custom rate, a seed, a burst, one of a protocol that is gone: none of them is in the profile."""
    profile = lab.load_profile(str(fake_vllm()))
    run = open_run(tmp_path / "run", profile)
    levels = [
        Level(variant="bf16", rate=63.7, requests=30),
        Level(variant="bf16", rate=math.inf, requests=25, repeat=3),
        Level(variant="fp8", rate=50, requests=33),  # the profile has it with 20 requests
    ]
    for level in levels:
        run.write(whole(level))
    results = again(run, profile, *(level.id for level in levels))
    assert [result.level for result in results] == levels
    assert [len(run.read(level).records) for level in levels] == [30, 25, 33]
    assert all(run.read(level).summary.started for level in levels)  # what was made up has no such thing
    assert len(list((run.path / "logs").iterdir())) == 2  # one server a variant
    assert {path.name for path in (run.path / "set-aside").iterdir()} == {f"{level.id}-1" for level in levels}
    # Asked for with its protocol it is what the profile says now.
    results = again(run, profile, "fp8-50rps-r1", protocols=["equal load"])
    assert {result.level.id: len(result.records) for result in results} == {"bf16-100rps-r1": 20, "fp8-50rps-r1": 20}


def test_ids_that_a_run_does_not_hold_are_one_error_and_nothing_is_set_aside(tmp_path):
    run = open_run(tmp_path / "run", read_profile("emulated-h100"))
    run.write(make_result())
    before = complete(run)
    for unknown in (["fp8-9rps-r1", "x"], ["../levels/bf16-50rps-r1"], [""], ["."]):
        with pytest.raises(BadInput, match=r"holds no level .* to measure again \(it holds: bf16-50rps-r1\)") as caught:
            again(run, run.profile, LEVEL.id, *unknown)
        assert all(name in str(caught.value) for name in unknown)
        assert complete(run) == before and not (run.path / "set-aside").exists()
    with pytest.raises(BadInput, match="read-only"):
        again(open_run(source=run.path), run.profile, LEVEL.id)


def test_a_level_of_damaged_summary_is_known_by_its_name_and_its_records(fake_vllm, tmp_path):
    profile = lab.load_profile(str(fake_vllm()))
    run = open_run(tmp_path / "run", profile)
    mine, planned = Level(variant="bf16", rate=63.7, requests=30), Level(variant="fp8", rate=100, requests=20)
    for level in (mine, planned):
        run.write(whole(level))
        (run.path / "levels" / level.id / "summary.json").write_text("{half")
    (run.path / "levels" / planned.id / "records.parquet").write_bytes(b"PAR1")  # its protocol says how many it has
    assert [result.level for result in again(run, profile, mine.id, planned.id)] == [mine, planned]
    assert len(run.read(mine).records) == 30
    folder = run.path / "levels" / mine.id
    for name in ("summary.json", "records.parquet"):
        (folder / name).write_bytes(b"")
    with pytest.raises(RunDamaged, match="how many requests it had is not known; to measure it again"):
        again(run, profile, mine.id)
    assert folder.is_dir()


def test_a_level_that_was_set_aside_and_not_measured_is_measured_by_the_same_call(fake_vllm, tmp_path):
    profile = lab.load_profile(str(fake_vllm(bf16="bad-model")))
    run = open_run(tmp_path / "run", profile)
    level = Level(variant="bf16", rate=63.7, requests=30)
    run.write(whole(level))
    (run.path / "set-aside" / f"{level.id}-copy").mkdir(parents=True)  # somebody's own
    for _ in range(2):
        with pytest.raises(ServerFailed, match="not measured: bf16-63.7rps-r1"):
            again(run, profile, level.id)
    assert {path.name for path in (run.path / "set-aside").iterdir()} == {f"{level.id}-1", f"{level.id}-copy"}


def test_requests_of_ones_own_are_not_replaced_by_the_profiles(tmp_path):
    run = open_run(tmp_path / "run", read_profile("emulated-h100"))
    level = Level(variant="bf16", rate=63.7, requests=30)
    made = whole(level)
    run.write(
        dataclasses.replace(
            made,
            summary=dataclasses.replace(
                made.summary, level=MeasuredLevel(**dataclasses.asdict(level), trace="mine.csv")
            ),
        )
    )
    with pytest.raises(BadInput, match=r"requests of your own \(mine.csv\).*load_test with them"):
        again(run, run.profile, level.id)
    assert run.has(level)
    # Nor is a variant that the profile does not have.
    run.write(whole(Level(variant="fp4", rate=50, requests=3)))
    with pytest.raises(BadInput, match="no variant 'fp4'"):
        again(run, run.profile, "fp4-50rps-r1")
    assert not (run.path / "set-aside").exists()


def test_an_invalid_level_is_exit_code_3_after_all_else_was_measured_and_its_remedy_works(fake_vllm, tmp_path):
    refused = tmp_path / "refused"
    refused.write_text("100000")
    path = fake_vllm(bf16=f"refuse:{refused}", requests=8, dilation=8)

    def done(*arguments):
        return fp8lab("measure", "--run", str(tmp_path / "run"), *arguments)

    first = done("--profile", str(path))
    assert first.returncode == 3, first.stderr
    run = open_run(source=tmp_path / "run")
    assert {level: s.valid for level, s in run.summaries().items()} == {
        "bf16-50rps-r1": False, "bf16-100rps-r1": False, "fp8-50rps-r1": True, "fp8-100rps-r1": True,
    }  # fmt: skip
    assert "what to do" in first.stdout and first.stdout.endswith(f"{tmp_path / 'run'}\n")
    assert done().returncode == 3  # nothing is left to measure, and still they do not count
    refused.write_text("0")
    remedy = re.search(r"fp8lab measure --run \S+ (--again \S+ --again \S+)", first.stdout)[1].split()
    assert done(*remedy).returncode == 0
    assert all(s.valid for s in open_run(source=tmp_path / "run").summaries().values())


def test_work_that_failed_wins_over_an_invalid_level(fake_vllm, tmp_path):
    path = fake_vllm(bf16="die", fp8="bad-model")
    done = fp8lab("measure", "--profile", str(path), "--run", str(tmp_path / "run"))
    held = open_run(source=tmp_path / "run").summaries()
    assert done.returncode == 1 and [s.valid for s in held.values()] == [False]


# Two writers.


def test_two_runs_on_one_folder_the_second_is_refused(fake_vllm, tmp_path):
    path = fake_vllm(requests=200)
    command = [sys.executable, "-m", "fp8lab.cli", "measure", "--profile", str(path), "--run", str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as first:
        wait_for(lambda: marked(path), what="the first run's server")
        run = open_run(tmp_path / "run")
        began = time.monotonic()
        for write in (
            lambda: lab.measure(run, run.profile),
            lambda: run.write(make_result()),
            lambda: run.set_aside("bf16-50rps-r1") if (run.path / "levels").exists() else run.write(make_result()),
        ):
            with pytest.raises((InUse, BadInput), match=f"is in use by pid {first.pid}|holds no level"):
                write()
        assert time.monotonic() - began < 5
        first.kill()
    wait_for(lambda: not marked(path), 20, "the end of the first run's server")
    run.write(make_result())  # the lock died with its holder


@pytest.mark.parametrize(
    ("file", "changed"),
    [
        ("run.json", {"profile": "x"}),
        ("anatomy/fp8.json", {"batches": None}),
        ("levels/fp8-50rps-r1/summary.json", {"level": "x"}),
        ("levels/fp8-50rps-r1/summary.json", {"server": [1]}),
        ("levels/fp8-50rps-r1/telemetry.parquet", lambda table: table.drop(columns="running")),
        ("levels/fp8-50rps-r1/records.parquet", lambda table: table.assign(sent_us="soon")),
    ],
)
def test_a_file_that_holds_something_else_is_one_clear_error(tmp_path, file, changed):
    shutil.copytree(DATA / "recorded" / "h100-80gb", tmp_path / "run")
    path = tmp_path / "run" / file
    if callable(changed):
        changed(pd.read_parquet(path)).to_parquet(path)
    else:
        path.parent.mkdir(exist_ok=True)
        held = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(held | changed))
    with pytest.raises(RunDamaged, match=re.escape(str(path))):
        lab.judge(open_run(source=tmp_path / "run"))
