"""The command line as a user types it."""

import json
import subprocess
import sys
import time

import pytest

from fp8lab import cli, load_test_command
from fp8lab.config.profile_file import read_profile
from fp8lab.results import run_folder
from fp8lab.results.run_folder import open_run
from fp8lab.system.locks import Lock
from warm_cli import fp8lab


@pytest.mark.parametrize("command", [[], *([name] for name in cli.NAMES)])
def test_help_teaches_by_example(command):
    done = fp8lab(*command, "--help")
    assert done.returncode == 0 and "examples:" in done.stdout and f"fp8lab {' '.join(command)}".strip() in done.stdout


def test_it_says_which_version_it_is():
    done = fp8lab("--version")
    assert done.returncode == 0 and done.stdout.startswith("fp8lab ")
    assert subprocess.check_output([sys.executable, "-m", "fp8lab", "--version"], text=True) == done.stdout


def test_importing_is_quick():
    """And what reads no run does not wait for what does."""
    for imported, heavy in (
        ("fp8lab, fp8lab.cli", ("pandas", "numpy", "httpx", "matplotlib")),
        ("fp8lab.commands", ("pandas", "httpx", "matplotlib")),
        (
            "fp8lab; [getattr(fp8lab, name) for name in fp8lab.__all__]",
            ("torch", "transformers", "matplotlib", "ray", "vllm"),
        ),
    ):
        code = f"import sys, {imported}; print([m for m in {heavy!r} if m in sys.modules])"
        assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


LOAD_TEST = ["load-test", "--model", "m", "--out", "{tmp}/o", "--base-url"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["reproduce", "--profile", "h101"], "no profile 'h101'"),
        (["reproduce", "--notebook", "05_dreams"], "no notebook '05_dreams'"),
        (["reproduce", "-p", "speed", "fast"], "no parameter speed"),
        (["reproduce", "--source", "nowhere"], "no run folder at"),
        (["reproduce", "--profile", "emulated-h100", "--model", "/no/such/model"], "no model at '/no/such/model'"),
        (["serve", "fp4", "--profile", "emulated-h100"], "no variant 'fp4'"),
        (["serve", "fp4", "--print-command"], "no variant 'fp4'"),
        (["claims", "nowhere"], "no run folder at"),
        (
            ["reproduce", "--notebook", "02_bf16_baseline", "-p", "rate", "0", "--run", "{tmp}/run"],
            "rate 0.0 is not above 0",
        ),
        ([*LOAD_TEST, "http://127.0.0.1:9", "--rate", "0"], "rate 0.0 is not above 0"),
        ([*LOAD_TEST, "ftp://h"], "base URL 'ftp://h'"),
        ([*LOAD_TEST, "http://h:x"], "base URL 'http://h:x'"),
        ([*LOAD_TEST, "http://h:99999"], "base URL 'http://h:99999'"),
        ([*LOAD_TEST, "http://no.such.host.invalid"], "no host"),
        ([*LOAD_TEST, "http://127.0.0.1:9", "--requests", "0"], "empty"),
        ([*LOAD_TEST, "http://127.0.0.1:9", "--trace", "no.csv"], "no trace file"),
        ([*LOAD_TEST, "http://127.0.0.1:9", "--api-key-env", "NO_SUCH"], "NO_SUCH"),
        ([*LOAD_TEST, "http://127.0.0.1:9", "--workers", "0"], "workers 0"),
        (["record", "nowhere", "x"], "no run folder at"),
        (
            ["measure", "--profile", "emulated-h100", "--again", "bf16-50rps-r1"],
            "a new run holds no level; name one that does",
        ),
        (
            ["measure", "--profile", "emulated-h100", "--run", "{tmp}/run", "--again", "x"],
            "--again x: {tmp}/run holds no level; name one that does (--run)",
        ),
        (["profiles", "h101"], "no profile 'h101'"),
        (["reproduce", "--source", "h200-80gb", "--profile", "h100-80gb"], "leave out --profile"),
        (["quality", "--source", "smollm2-h200", "--variant", "nope"], "leave out --variant"),
        (["quality", "--source", "h200-80gb"], "holds no quality measurement"),
        (["anatomy", "--source", "h100-80gb", "--variant", "nope"], "run h100-80gb holds no steps of nope; `fp8lab"),
        (
            ["anatomy", "--source", "h100-80gb", "--variant", "fp8-api4"],
            "holds no steps of fp8-api4; `fp8lab anatomy` takes",
        ),
        (["anatomy", "--source", "h200-80gb"], "holds no steps of any variant; `fp8lab anatomy` takes"),
        (["quantize", "llama-3-8b", "--recipe", "int8", "--text", "mine.txt"], "is not calibrated and reads no text"),
        (["reproduce", "--source", ""], "argument --source: '' is empty, expected a value"),
        (["reproduce", "-p", "protocols", "", "--source", "nowhere"], "no run folder at"),
        (["claims", ""], "argument RUN: '' is empty"),
        (["claims", "h200-80gb", ""], "argument RUN: '' is empty"),
        (["plan", "--run="], "argument --run: '' is empty"),
        (["plan", "--variant", ""], "argument --variant: '' is empty"),
        (["predict", "h100-80gb-unsealed", "--slo", ""], "argument --slo: '' is empty"),
        (["load-test", "--base-url", ""], "argument --base-url: '' is empty"),
    ],
)
def test_bad_input_is_one_clear_error_and_exit_code_2(arguments, said, tmp_path):
    done = fp8lab(*(argument.format(tmp=tmp_path) for argument in arguments))
    assert done.returncode == 2, done.stderr
    assert said.format(tmp=tmp_path) in done.stderr and "Traceback" not in done.stderr


def test_a_plan_with_nothing_left_says_so():
    done = fp8lab("plan", "--run", "emulated-h100")
    assert done.returncode == 0 and done.stdout.endswith("nothing is left to measure\n")


def test_a_run_folder_of_another_profile_is_refused(tmp_path):
    run = open_run(tmp_path / "run", read_profile("tiny-cpu"))
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    done = fp8lab("reproduce", "--profile", "emulated-h100", "--run", str(run.path))
    assert done.returncode == 2 and "made with profile 'tiny-cpu'" in done.stderr
    assert before == {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}


def test_a_taken_port_is_refused():
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = fp8lab("serve", "bf16", "--profile", "tiny-cpu", "--port", str(port))
    assert done.returncode == 2 and f"port {port} is taken" in done.stderr


def test_a_result_that_came_while_waiting_is_kept(tmp_path, monkeypatch, capsys):
    def made(out, _remedy):
        out.mkdir()
        (out / "summary.json").write_text('{"completed": 5}')  # by a command that took the folder and ended meanwhile
        return out

    monkeypatch.setattr(load_test_command, "made", made)
    common = ["load-test", "--base-url", "http://127.0.0.1:9", "--model", "m", "--requests", "3"]
    assert cli.main([*common, "--out", str(tmp_path / "one")]) == 2
    assert "one already holds a result" in capsys.readouterr().err
    assert (
        cli.main(
            [*common, "--find-max-rate", "--slo", "ttft=200,p50", "--requests", "100", "--out", str(tmp_path / "two")]
        )
        == 2
    )
    assert "two already holds a level" in capsys.readouterr().err
    assert (tmp_path / "one" / "summary.json").read_text() == '{"completed": 5}'


def test_load_test_ends_with_one_json_line_and_says_when_it_is_invalid(tmp_path):
    from conftest import streaming_server

    common = ["--model", "ok", "--trace", "random", "--input-tokens", "5", "--output-tokens", "10", "--requests", "50"]
    with streaming_server() as url:
        done = fp8lab("load-test", "--base-url", url, *common, "--rate", "100", "--out", str(tmp_path / "good"))
        again = fp8lab("load-test", "--base-url", url, *common, "--out", str(tmp_path / "good"))
        broken = fp8lab("load-test", "--base-url", url, "--model", "cut", *common[2:], "--out", str(tmp_path / "bad"))
        lock = Lock(tmp_path / "good" / ".lock", "another level")
        held = (tmp_path / "good" / "summary.json").rename(tmp_path / "held.json")
        beside = fp8lab("load-test", "--base-url", url, *common, "--out", str(tmp_path / "good"))
        held.rename(tmp_path / "good" / "summary.json")
        lock.release()
        (tmp_path / "full" / "records.parquet").mkdir(parents=True)
        full = fp8lab("load-test", "--base-url", url, *common, "--out", str(tmp_path / "full"))
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said.keys() >= SAID and said["completed"] == 50 and said["valid"] and said["invalid_reason"] is None
    assert {"records.parquet", "summary.json"} <= {path.name for path in (tmp_path / "good").iterdir()}
    assert again.returncode == 2 and "already holds a result" in again.stderr
    assert beside.returncode == 2 and f"--out folder {tmp_path}/good is in use by pid" in beside.stderr
    assert full.returncode == 1 and "records.parquet cannot be written" in full.stderr
    assert json.loads(full.stdout)["completed"] == 50
    assert broken.returncode == 3 and "no request completed" in json.loads(broken.stdout)["invalid_reason"]


def test_a_result_without_a_completed_request_may_be_replaced(tmp_path):
    test = [
        "load-test",
        "--base-url",
        "http://127.0.0.1:9",
        "--model",
        "m",
        "--trace",
        "random",
        "--requests",
        "3",
        "--out",
    ]
    for _ in range(2):
        done = fp8lab(*test, str(tmp_path / "out"))
        assert done.returncode == 3 and done.stderr.count("no request completed") == 1, done.stderr
    (tmp_path / "out" / "summary.json").write_text("{")
    assert fp8lab(*test, str(tmp_path / "out")).returncode == 1


def test_what_an_emulated_gpu_serves_is_told_by_its_name(tmp_path):
    from conftest import streaming_server

    name = f"ok{read_profile('emulated-h100').emulated_mark}-1"
    with streaming_server("--ttft-ms", "350") as url:
        common = ["--trace", "random", "--input-tokens", "5", "--output-tokens", "4", "--requests", "9", "--rate", "50"]
        done = fp8lab("load-test", "--base-url", url, "--model", name, *common, "--out", str(tmp_path / "out"))
    said = json.loads(done.stdout)
    assert said["emulated"] and said["time_dilation"] == 3.5 and "50 req/s (EMULATED GPU): " in done.stderr
    assert 100 <= said["mean_ttft_ms"] < 150  # in model time


def test_a_closed_loop_from_the_command_line(tmp_path):
    from conftest import streaming_server

    common = ["--model", "ok", "--trace", "random", "--input-tokens", "5", "--output-tokens", "10", "--requests", "60"]
    with streaming_server("--ttft-ms", "150") as url:  # 240 ms a request: four at a time are 17/s
        common += ["--base-url", url, "--rate", "30", "--max-concurrency", "4"]
        done = fp8lab("load-test", *common, "--out", str(tmp_path / "good"))
        cut = fp8lab("load-test", *common, "--idle-timeout", "0.1", "--out", str(tmp_path / "cut"))
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["valid"] and said["peak_concurrent_requests"] == 4 and "peak 4 in flight" in done.stderr
    assert cut.returncode == 3 and "still queued; to wait longer: load-test --idle-timeout" in cut.stdout


SAID = {
    "completed", "failed", "duration_s", "request_throughput", "output_token_throughput",
    "steady_output_token_throughput", "mean_ttft_ms", "p50_ttft_ms", "p99_ttft_ms", "mean_tpot_ms", "p99_tpot_ms",
    "mean_itl_ms", "p99_itl_ms", "mean_e2el_ms", "peak_concurrent_requests", "peak_concurrent_requests_vllm",
    "tokens_per_chunk", "schedule_lag_p99_ms", "client_cpu_us_per_chunk", "workers", "valid", "invalid_reason",
}  # fmt: skip


def test_print_command_is_the_published_one():
    done = fp8lab("serve", "fp8", "--profile", "h100-80gb", "--print-command")
    assert done.returncode == 0
    assert "--quantization fp8 --kv-cache-dtype fp8" in done.stdout and "--host 127.0.0.1" in done.stdout
    assert "distributed-executor-backend" not in done.stdout
    assert (
        " vllm serve /" in done.stdout and "--model" not in done.stdout and sys.executable not in done.stdout
    )  # for any host, not for this one


@pytest.mark.timing
def test_serve_holds_a_server_until_interrupted(fake_vllm):
    """Nothing beside it: `status` shows all servers of the machine."""
    import signal

    profile = fake_vllm()
    command = [sys.executable, "-m", "fp8lab.cli", "serve", "bf16", "--profile", str(profile)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as serving:
        for line in serving.stdout:
            if "Ctrl-C stops" in line:
                break
        status = fp8lab("status").stdout
        assert f"bf16 ({profile.stem})" in status and f"in use by pid {serving.pid}" in status
        assert "LEFT OVER" not in status
        serving.send_signal(signal.SIGINT)
        try:
            assert serving.wait(30) == 130
        finally:
            serving.kill()
    assert f"pid {serving.pid}" not in fp8lab("status").stdout


def test_stop_ends_what_nobody_owns():
    """A stand-in server that carries the mark of an owner that is gone."""
    import os

    from fp8lab.server import processes

    mark = json.loads(processes.mark(id="lost-1", variant="fp8", profile="lost", port=1)) | {"owner_pid": 2**22 + 1}
    environment = os.environ | {processes.MARK: json.dumps(mark)}
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], env=environment) as lost:
        time.sleep(0.3)
        assert "LEFT OVER" in fp8lab("status").stdout
        assert "ended fp8 (lost), 1 processes" in fp8lab("stop").stdout
        assert lost.wait(5) != 0
    assert "nothing" in fp8lab("stop").stdout


@pytest.mark.parametrize(
    "arguments",
    ["measure --protocol nope", "measure --workers 0", "measure --variant nope", "measure --again bf16-50rps-r1",
     "anatomy --variant fp9", "anatomy --batch 0", "anatomy --batch 4096"],
)  # fmt: skip
def test_what_cannot_be_measured_makes_no_folder(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "RUNS", tmp_path)
    for where in ([], ["--run", f"{tmp_path}/mine"], ["--run", f"{tmp_path}/latest"], ["--run", "latest"]):
        assert cli.main([*arguments.split(), "--profile", "emulated-h100", *where]) == 2
        assert list(tmp_path.iterdir()) == []


def test_a_search_that_shows_nothing_leaves_no_result(tmp_path):
    search = ["load-test", "--base-url", "http://127.0.0.1:9", "--model", "m", "--find-max-rate", "--slo", "ttft=1,p50"]
    assert cli.main([*search, "--requests", "3", "--out", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()
