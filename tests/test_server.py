"""Real vLLM servers: the tiny model computed on the CPU, and the emulated GPU under vLLM's scheduler."""

import asyncio
import math
import os
import socket
import subprocess
import sys
import threading
import time

import httpx
import psutil
import pytest

import fp8lab as lab
from conftest import marked, nothing_left, wait_for
from fp8lab.config.profile_file import read_profile
from fp8lab.config.trace import fixed_length
from fp8lab.errors import BadInput
from fp8lab.load.telemetry import _by_role
from fp8lab.server import auth, command, log, processes


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    profile = lab.load_profile("tiny-cpu")
    path = tmp_path_factory.mktemp("tiny") / "bf16.log"
    with lab.serve(profile, "bf16", log_path=path) as server:
        yield server


def test_it_streams_real_tokens(tiny):
    result = lab.load_test(tiny, lab.sharegpt_like(8), rate=8)
    assert result.summary.completed == 8 and result.summary.failed == 0
    assert result.summary.output_tokens == sum(lab.sharegpt_like(8).output_tokens)
    assert result.summary.mean_tpot_ms > 0
    assert "8 of 8" in repr(result) and "<table>" in result._repr_html_()


def test_its_metrics_are_vllms_own(tiny):
    assert f'vllm:generation_tokens_total{{engine="0",model_name="{tiny.model}"}}' in tiny.metrics()


def test_it_reports_what_vllm_reports(tiny):
    assert tiny.info.kv_cache_tokens > 100_000 and tiny.info.startup_s > 1
    assert tiny.info.command[0] == "python3" and not any(
        str(os.path.expanduser("~")) in part for part in tiny.info.command
    )
    assert "running" in repr(tiny)


def answers_without_and_with_key(server, path: str, **body) -> tuple[int, int]:
    key = {"Authorization": f"Bearer {server.api_key}"}
    return tuple(
        httpx.request("POST" if body else "GET", server.base_url + path, headers=headers, json=body or None).status_code
        for headers in ({}, key)
    )


def test_a_request_without_the_key_is_refused(tiny):
    completion = {"model": tiny.model, "prompt": "a", "max_tokens": 1}
    for path in ("/v1/completions", "/invocations", "/tokenize"):
        assert answers_without_and_with_key(tiny, path, **completion) == (401, 200), path
    for path in ("/v1/models", "/version"):
        assert answers_without_and_with_key(tiny, path) == (401, 200), path
    assert httpx.get(f"{tiny.base_url}/tokenize", headers={"Authorization": "Bearer wrong"}).status_code == 401
    for path in ("/health", "/metrics"):
        assert answers_without_and_with_key(tiny, path) == (200, 200), path


def test_telemetry_knows_its_processes(tiny):
    from fp8lab.load.telemetry import Telemetry

    with Telemetry(tiny.pids(), tiny.metrics) as telemetry:
        start = time.monotonic()
        time.sleep(2.5)
    table = telemetry.table(start)
    for column in ("frontend_cpu", "engine_cpu", "running", "generation_tokens"):
        assert table[column].notna().any(), column
    assert telemetry.cpu_share < 0.2  # what it costs is measured by the benchmark; this catches a runaway


def test_it_listens_on_this_machine_only(tiny):
    listening = {
        c.laddr.ip for pid in tiny.pids() for c in psutil.Process(pid).net_connections() if c.status == "LISTEN"
    }
    assert listening == {"127.0.0.1"}


def test_the_key_is_nowhere_to_be_read(tiny):
    assert tiny.api_key not in tiny.log_path.read_text()
    assert tiny.api_key not in repr(tiny) + repr(tiny.info) + tiny._repr_html_()
    assert not any(tiny.api_key in part for pid in tiny.pids() for part in psutil.Process(pid).cmdline())


def test_status_sees_it_and_a_taken_port_is_refused(tiny):
    (mine,) = [server for server in processes.servers() if server.id == tiny.model]
    assert mine.owned and mine.owner_pid == os.getpid() and len(mine.pids) >= 3
    with pytest.raises(BadInput, match=f"port {mine.port} is taken"):
        lab.start_server(tiny.profile, "bf16", port=mine.port)


@pytest.mark.parametrize("port", [0.5, -1, 70000])
def test_a_port_must_be_one(port):
    with pytest.raises((BadInput, TypeError)):
        lab.start_server(read_profile("tiny-cpu"), "bf16", port=port)


def test_an_unknown_variant_is_refused_before_anything_starts():
    with pytest.raises(BadInput, match="no variant 'fp4'"):
        lab.start_server(read_profile("tiny-cpu"), "fp4")


def test_stop_may_happen_twice_and_frees_the_port(tiny):
    """The last of the tests of this server."""
    pids = tiny.pids()
    tiny.stop()
    tiny.stop()
    assert pids and not tiny.alive and not any(psutil.pid_exists(pid) for pid in pids)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", tiny.port))
    assert "stopped" in repr(tiny)


def engine_cores(profile) -> list[int]:
    return [pid for pid in marked(profile) if "EngineCore" in " ".join(psutil.Process(pid).cmdline())]


@pytest.mark.servers
@pytest.mark.nightly
def test_an_owner_killed_in_the_middle_of_vllms_start_leaves_nothing(tmp_path):
    """The API server and its EngineCore are there, neither is ready. Ready servers and other ends: test_owner_faults."""
    path = tmp_path / "midway.toml"
    path.write_text('extends = "tiny-cpu"')
    code = f"import fp8lab as lab; lab.start_server(lab.load_profile({str(path)!r}), 'bf16', log_path={str(tmp_path / 'x.log')!r})"
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL) as owner:
        try:
            wait_for(lambda: engine_cores(path), 240, "vLLM's EngineCore")
            pids = marked(path)
        finally:
            owner.kill()
    nothing_left(path, pids)


def test_emulated_is_the_gpus_command_plus_one_flag():
    real = command.build_command(read_profile("h100-80gb"), "fp8", port=1)
    emulated = command.build_command(read_profile("emulated-h100"), "fp8", port=1)
    assert emulated == [*real, "--distributed-executor-backend", command.EXECUTOR]


def test_every_start_is_guarded_except_behind_the_rust_front_end():
    profile = read_profile("h100-80gb")
    for variant in profile.variants:
        started = command.build_command(profile, variant, served_name="x")
        assert ("--middleware" in started) == ("-rust" not in variant), variant
        assert "--middleware" not in command.build_command(profile, variant)


def test_the_guard_closes_a_websocket_and_lets_a_lifespan_pass(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "right")
    passed, sent = [], []

    async def app(scope, _receive, _send):
        passed.append(scope["type"])

    async def send(event):
        sent.append(event["type"])

    def ask(kind, **scope):
        asyncio.run(auth.KeyGuard(app)({"type": kind, **scope}, None, send))

    key = [(b"authorization", b"Bearer right")]
    ask("lifespan")
    ask("websocket", path="/v1/realtime", headers=[])
    ask("websocket", path="/v1/realtime", headers=key)
    ask("http", path="/health/../invocations", headers=[])
    assert passed == ["lifespan", "websocket"]
    assert sent == ["websocket.close", "http.response.start", "http.response.body"]


def test_the_log_says_how_far_a_start_is_and_why_it_failed():
    text = "(EngineCore pid=1) INFO 11-23 22:52:39 [core.py:133] Initializing a V1 LLM engine (v0.32.0)\n"
    assert log.phase("") == "importing vLLM" and log.phase(text) == "starting the worker"
    for told, phase in (
        ("Using max model len 8192", "starting the EngineCore"),
        ("Enforce eager set, disabling torch.compile, CUDAGraphs, and JIT kernel warmup", "importing vLLM"),
        ("[backbone] Starting torch.compile", "compiling (torch.compile)"),
        ("Using cache directory: /x for vLLM's torch.compile", "compiling (torch.compile)"),
    ):
        assert log.phase(f"(APIServer pid=1) INFO 11-23 22:52:39 [x.py:1] {told}") == phase
    text += "(EngineCore pid=1) INFO 11-23 22:52:39 [x.py:1] GPU KV cache size: 431,568 tokens, Maximum\n"
    text += "(EngineCore pid=1) INFO 11-23 22:52:39 [x.py:1] Model loading took 14.96 GiB memory\n"
    assert log.reported(text) == {"kv_cache_tokens": 431568, "model_memory_gib": 14.96, "load_s": None, "kernels": ()}
    text += (
        "(EngineCore pid=1) ERROR 11-23 22:52:40 [core.py:900] EngineCore failed to start.\n"
        "(EngineCore pid=1) ERROR 11-23 22:52:40 [core.py:900] torch.OutOfMemoryError: CUDA out of memory.\n"
        "(APIServer pid=2) RuntimeError: Engine core initialization failed. See root cause above.\n"
    )
    telling, remedy = log.root_cause(text)
    assert telling == ["torch.OutOfMemoryError: CUDA out of memory."] and "fp8lab status" in remedy
    for said, word in (
        ("RuntimeError: Could not find nvcc and default cuda_home='/usr/local/cuda' doesn't exist", "nvcc"),
        ("ModuleNotFoundError: No module named 'flashinfer'", "nvcc"),
        ("ModuleNotFoundError: No module named 'zmq'", "make env"),
    ):
        assert word in log.root_cause(f"(Worker pid=3) ERROR 11-27 22:52:40 [core.py:900] {said}\n")[1]


CROWDED = """
extends = "emulated-h100"
title = "Prompts longer than a step, more requests than the KV cache holds"

[server]
flags = [
  "--max-num-seqs", "64", "--max-num-batched-tokens", "256", "--max-model-len", "1024",
  "--block-size", "16", "--num-gpu-blocks-override", "110",
]
"""


@pytest.fixture(scope="module")
def crowded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("crowded")
    (folder / "crowded.toml").write_text(CROWDED)
    with lab.serve(lab.load_profile(str(folder / "crowded.toml")), "bf16", log_path=folder / "bf16.log") as server:
        yield server


def test_the_emulated_gpu_takes_prompts_in_pieces_and_survives_preemption(crowded):
    result = lab.load_test(crowded, fixed_length(12, input_tokens=400, output_tokens=100), rate=math.inf)
    said = {line.partition("{")[0]: line for line in crowded.metrics().splitlines()}
    assert result.summary.completed == 12 and result.summary.output_tokens == 1200
    assert float(said["vllm:num_preemptions_total"].rpartition(" ")[2]) > 0


def test_the_emulated_gpus_engine_is_a_fork_of_the_api_server_and_known_by_its_title(crowded):
    """Nothing is imported twice: a spawned one would have a helper beside it, and a command line of Python's."""
    api_server, engine = sorted(map(psutil.Process, crowded.pids()), key=lambda one: one.create_time())
    assert engine.ppid() == api_server.pid and engine.cmdline()[0] == "VLLM::EngineCore"
    assert _by_role(crowded.pids()) == {"frontend": [api_server], "engine": [engine]}


def test_an_engine_that_dies_under_load_is_noticed_and_the_level_kept(crowded, monkeypatch):
    """The last of the tests of this server."""
    died, noticed = [], []

    def kill_engine():
        engine = next(p for p in crowded._processes if "EngineCore" in " ".join(p.cmdline()))
        engine.kill()
        died.append(time.monotonic())

    ask, pids = crowded.problem, crowded.pids()

    def problem():
        if said := ask():
            noticed.append(time.monotonic())
        return said

    monkeypatch.setattr(crowded, "problem", problem)
    timer = threading.Timer(4.0, kill_engine)
    timer.start()
    requests = fixed_length(500, input_tokens=100, output_tokens=20)
    with pytest.warns(UserWarning, match="is INVALID"):
        result = lab.load_test(crowded, requests, rate=25)  # 70 s of arrivals in dilated time
    assert noticed[0] - died[0] < 5
    assert time.monotonic() - died[0] < 5 + 5  # summing up takes a moment
    assert "the server" in result.summary.invalid_reason and len(result.records) == 500
    crowded.stop()
    nothing_left(crowded.profile.name, pids)
