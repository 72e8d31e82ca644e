"""Servers that fail: at their start, under load, or by not being what they should. Each fault is committed for real,
by a stand-in for vLLM where vLLM itself would be slow; the GPU's answers are constructed (tests/fake_nvml)."""

import contextlib
import dataclasses
import itertools
import json
import os
import pkgutil
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import fp8lab as lab
from conftest import AS_ROOT, marked, nothing_left, wait_for
from fp8lab.config.profile import Variant
from fp8lab.config.profile_file import read_profile
from fp8lab.errors import BadInput, InUse, NotWritten, ServerFailed, Stopped
from fp8lab.load.level import Watch
from fp8lab.metrics.performance import completed
from fp8lab.results.run_folder import open_run
from fp8lab.server import command, launch, processes
from fp8lab.server.launch import Server, ask
from fp8lab.system import gpu
from fp8lab.system.locks import Lock, Scratch, machine_lock, sweep


def start_fails(profile, tmp_path, variant="bf16", error=ServerFailed) -> tuple[str, float]:
    """(message, seconds) of a start that must fail and leave nothing."""
    began = time.monotonic()
    with pytest.raises(error) as failed:
        lab.start_server(profile, variant, log_path=tmp_path / "server.log")
    assert marked(profile.name) == []
    return str(failed.value), time.monotonic() - began


@pytest.mark.parametrize(
    ("fault", "cause", "remedy"),
    [
        ("bad-model", "is not a local folder", "no such model"),
        ("port-taken", "address already in use", "another process listens on this port"),
        ("out-of-memory", "torch.OutOfMemoryError: CUDA out of memory.", "too little free memory"),
    ],
)
def test_a_start_that_dies_gives_one_error_with_cause_and_remedy(fake_vllm, tmp_path, fault, cause, remedy):
    said, seconds = start_fails(lab.load_profile(str(fake_vllm(fault))), tmp_path)
    assert cause in said and f"what to do: {remedy}" in said.replace("the GPU has ", "")
    assert "exit code 1" in said and str(tmp_path / "server.log") in said and "Engine core init" not in said
    assert seconds < 5


def test_a_flag_that_vllm_does_not_know(fake_vllm, tmp_path):
    profile = lab.load_profile(str(fake_vllm()))
    profile = dataclasses.replace(profile, variants={"bf16": Variant(flags=("--no-such-flag",))})
    said, seconds = start_fails(profile, tmp_path)
    assert "unrecognized arguments: --no-such-flag" in said and "does not know that flag" in said and seconds < 5


@pytest.mark.parametrize(
    ("fault", "phase"),
    [
        ("never-ready", "loading weights"),
        ("no-completion", "waiting for the first completion"),
        ("drip-always", "waiting for the first completion"),
    ],
)
def test_a_server_that_never_gets_ready_ends_at_its_deadline(fake_vllm, tmp_path, fault, phase):
    said, seconds = start_fails(lab.load_profile(str(fake_vllm(fault, timeout=2))), tmp_path)
    assert f"was not ready within 2 s (last phase: {phase})" in said and seconds < 6


def test_a_long_line_in_the_log_costs_no_memory(fake_vllm, tmp_path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with lab.serve(lab.load_profile(str(fake_vllm("long-line"))), "bf16", log_path=tmp_path / "server.log") as server:
        assert server.info.kv_cache_tokens == 431_568
    assert (tmp_path / "server.log").stat().st_size > 64 << 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 48 << 10  # KiB


def test_it_listens_here_only_and_wants_the_key_of_this_start(fake_vllm, tmp_path):
    """The same as of real servers in test_server.py; here beside a second start, whose key is another."""
    profile = lab.load_profile(str(fake_vllm()))
    with (
        lab.serve(profile, "bf16", log_path=tmp_path / "a.log") as a,
        lab.serve(profile, "fp8", log_path=tmp_path / "b.log") as b,
    ):
        assert a.api_key != b.api_key and a.model != b.model
        assert ask(a.port, "GET", "/v1/models", key=a.api_key, within=4)[0] == 200
        assert ask(a.port, "GET", "/v1/models", key=b.api_key, within=4)[0] == 401


def test_a_taken_port_names_who_holds_it(fake_vllm):
    with socket.socket() as stale:
        stale.bind(("127.0.0.1", 0))
        stale.listen()
        port = stale.getsockname()[1]
        with pytest.raises(InUse, match=rf"port {port} is taken .* by pid {os.getpid()} \(.*, user \w+, \d\.\d GiB\)"):
            lab.start_server(lab.load_profile(str(fake_vllm())), "bf16", port=port)


def test_a_stale_server_that_slips_in_is_never_measured(fake_vllm, tmp_path):
    said, _ = start_fails(lab.load_profile(str(fake_vllm("wrong-name"))), tmp_path)
    assert "is held by pid" in said and "answers models ['another'], not this start's 'bf16-" in said


@pytest.mark.parametrize(
    ("where", "name"),
    [
        ("fp8lab.server.launch.subprocess", "Popen"),
        ("fp8lab.server.launch.log", "reported"),
        ("fp8lab.server.launch.StatusLine", "done"),
    ],
    ids=["as the watchdog starts", "when it is ready", "at the last line"],
)
def test_ctrl_c_anywhere_in_a_start_leaves_nothing(fake_vllm, tmp_path, monkeypatch, where, name):
    real = pkgutil.resolve_name(f"{where}.{name}")
    interrupted = []

    def interrupting(*args, **options):
        value = real(*args, **options)
        if not interrupted:
            interrupted.append(True)
            signal.raise_signal(signal.SIGINT)
        return value

    monkeypatch.setattr(f"{where}.{name}", interrupting)
    said, _ = start_fails(lab.load_profile(str(fake_vllm("polite-family"))), tmp_path, error=Stopped)
    assert interrupted and "nothing of it is left" in said


def test_a_helper_that_ends_during_the_start_is_no_fault(fake_vllm, tmp_path, monkeypatch):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    pids = Server.pids
    monkeypatch.setattr(Server, "pids", lambda server: (*pids(server), ended.pid))
    with lab.serve(lab.load_profile(str(fake_vllm())), "bf16", log_path=tmp_path / "server.log") as server:
        assert server.problem() is None and len(server._processes) == len(pids(server))


def test_an_interrupted_stop_is_taken_up_again(card, tmp_path, monkeypatch):
    _, path = card
    profile = lab.load_profile(str(path))
    server = lab.start_server(profile, "bf16", log_path=tmp_path / "server.log")
    pids, wait = marked(profile.name), server._watchdog.wait
    monkeypatch.setattr(server._watchdog, "wait", lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        server.stop()
    assert not server.alive and server.problem() == "the server was stopped"
    monkeypatch.setattr(server._watchdog, "wait", wait)
    server.stop()
    nothing_left(profile.name, pids, within=1)
    lab.start_server(profile, "bf16", log_path=tmp_path / "server.log").stop()  # the GPU's lock is free


def test_a_stop_waits_until_the_gpus_memory_is_free(card, tmp_path):
    says, path = card
    server = lab.start_server(lab.load_profile(str(path)), "bf16", log_path=tmp_path / "server.log")
    says(40.0)
    began, timer = time.monotonic(), threading.Timer(3.0, says)
    timer.start()
    server.stop()
    assert not timer.is_alive() and 3 <= time.monotonic() - began < 6


def test_memory_that_stays_in_use_is_told(card, tmp_path, monkeypatch):
    says, path = card
    monkeypatch.setattr("fp8lab.server.launch._MEMORY_WAIT_S", 0.5)
    server = lab.start_server(lab.load_profile(str(path)), "bf16", log_path=tmp_path / "server.log")
    says(40.0)
    with pytest.warns(UserWarning, match="39.5 GiB of GPU memory are still in use"):
        server.stop()
    says()
    lab.start_server(lab.load_profile(str(path)), "bf16", log_path=tmp_path / "server.log").stop()


# The folder for a server's sockets.


@pytest.fixture
def scratch(monkeypatch):
    """A function that lists the folders there are; they lie in a place of this test's own, whose path is short enough for
    sockets."""
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        monkeypatch.setattr(tempfile, "tempdir", short)
        yield lambda: list(Path(short).glob("fp8lab-*"))


def test_a_start_that_is_refused_leaves_no_folder(card, scratch, tmp_path):
    says, path = card
    profile = lab.load_profile(str(path))
    says(40.0)
    start_fails(profile, tmp_path, error=InUse)
    says()
    (tmp_path / "file").touch()
    with pytest.raises(NotWritten):
        lab.start_server(profile, "bf16", log_path=tmp_path / "file" / "server.log")
    assert scratch() == []


def test_a_killed_watchdogs_folder_goes_with_the_stop_or_the_next_start(fake_vllm, scratch, tmp_path):
    profile = lab.load_profile(str(fake_vllm()))
    server = lab.start_server(profile, "bf16", log_path=tmp_path / "server.log")
    (folder,) = scratch()
    os.utime(folder, (0, 0))
    sweep()
    assert scratch() == [folder]  # in use
    server._watchdog.kill()
    server._watchdog.wait()
    sweep()
    assert scratch() == [folder]  # its owner still is there
    server.stop()
    assert scratch() == []
    abandoned = Scratch()
    os.close(abandoned.fd)
    sweep()
    assert scratch() == [Path(abandoned.path)]  # perhaps it is being made
    os.utime(abandoned.path, (0, 0))
    lab.start_server(profile, "bf16", log_path=tmp_path / "server.log").stop()
    assert scratch() == []


# Under load.


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("die", "the server died; its log: bf16.log"),
        ("engine-dies", "the server's EngineCore failed: /health answers 503"),
        ("freeze", r"the server's process \d+ was suspended (SIGSTOP)"),
    ],
)
def test_a_server_that_fails_under_load_costs_its_level_and_no_other_variant(fake_vllm, tmp_path, fault, cause):
    profile = lab.load_profile(str(fake_vllm(fault, requests=400)))  # 8 s of arrivals at 50 req/s
    short = {"as published": [("bf16", 50, 400), ("fp8", 100, 20)], "equal load": [("bf16", 100, 20)]}
    levels = {n: tuple(lab.Level(variant=v, rate=r, requests=q) for v, r, q in of) for n, of in short.items()}
    profile = dataclasses.replace(profile, protocols=levels)
    run = open_run(tmp_path / "run", profile)
    began = time.monotonic()
    with (
        pytest.warns(UserWarning, match="level bf16-50rps-r1 is INVALID"),
        pytest.raises(ServerFailed, match="the bf16 server did not last: .*; not measured: bf16-100rps-r1"),
    ):
        lab.measure(run, profile, list(levels))
    assert time.monotonic() - began < 20
    result = run.read(levels["as published"][0])
    pattern = cause.replace(r"\d+", "").split()
    assert not result.valid and all(word in result.summary.invalid_reason for word in pattern)
    # Noticed within 5 s of the tenth request: later ones were never sent, earlier ones are kept as they were.
    assert len(result.records) == 400 and len(completed(result.records)) >= 8
    assert result.records["sent_s"].max() < result.records["scheduled_s"][10] + 5
    assert sorted(run.summaries()) == ["bf16-50rps-r1", "fp8-100rps-r1"]
    assert run.summaries()["fp8-100rps-r1"].failed == 0
    assert marked(profile.name) == []


def test_the_failed_level_is_measured_again_on_request(fake_vllm, tmp_path, monkeypatch):
    run_dir, protocols = tmp_path / "run", ["as published", "equal load"]
    path = fake_vllm("die", requests=60)
    broken = lab.load_profile(str(path))
    with pytest.warns(UserWarning, match="INVALID"), pytest.raises(ServerFailed):
        lab.measure(open_run(run_dir, broken), broken, protocols)
    # The server is mended; the profile must stay the same, so the mending comes from outside.
    (tmp_path / "mended").mkdir()
    (tmp_path / "mended" / "sitecustomize.py").write_text("import os; os.environ.pop('FAKE_VLLM', None)")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'mended'}{os.pathsep}{os.environ['PYTHONPATH']}")
    run = open_run(run_dir)
    results = lab.measure(run, run.profile, protocols, again=["bf16-50rps-r1"])
    assert [result.summary.failed for result in results] == [0, 0, 0, 0]
    assert json.loads((run_dir / "set-aside" / "bf16-50rps-r1-1" / "summary.json").read_text())["valid"] is False
    with pytest.raises(BadInput, match="no level bf16-1rps-r1"):
        lab.measure(run, run.profile, protocols, again=["bf16-1rps-r1"])


def test_a_server_that_hangs_ends_the_level_by_its_deadline(fake_vllm, tmp_path):
    """Nothing answers any more, /health neither; streams are given up one idle time after their last byte."""
    from fp8lab.experiment.speed import _endpoint
    from fp8lab.load.level import measure_level

    profile = lab.load_profile(str(fake_vllm("hang")))
    with lab.serve(profile, "bf16", log_path=tmp_path / "server.log") as server:
        trace = lab.fixed_length(40, input_tokens=5, output_tokens=40)
        began = time.monotonic()
        result = measure_level(
            _endpoint(server), trace, lab.arrival_times(40, 40), name="hang", idle_timeout_s=2.0,
            server_problem=server.problem,
        )  # fmt: skip
    assert time.monotonic() - began < 15
    assert not result.summary.valid and 8 <= result.summary.completed < 40 == len(result.records)
    assert "requests failed, above 1%; most often with: no bytes for 2 s" in result.summary.invalid_reason


@pytest.mark.parametrize("fault", ["drip-head", "drip-body"])
def test_a_health_that_drips_does_not_hold_the_level(fake_vllm, tmp_path, fault):
    with lab.serve(lab.load_profile(str(fake_vllm(fault))), "bf16", log_path=tmp_path / "server.log") as server:
        began = time.monotonic()
        result = lab.load_test(server, rate=20, requests=40)  # 2 s of arrivals
        assert time.monotonic() - began < 2 + 4 + 4 + 3  # the look under way, the last one, and summing up
        with pytest.raises(TimeoutError):
            server.ask("GET", "/health", within=0.7)
    assert len(completed(result.records)) == 40 and "the server" not in (result.summary.invalid_reason or "")


def test_a_reply_that_is_none_is_an_oserror():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]

        def talk():
            connection, _ = listening.accept()
            connection.recv(4096)
            connection.sendall(b"\x00\x01 nonsense\r\n\r\n")
            connection.shutdown(socket.SHUT_WR)  # closed with bytes unread it would be reset
            with contextlib.suppress(ConnectionResetError):  # it had enough
                while connection.recv(4096):
                    pass
            connection.close()

        talker = threading.Thread(target=talk)
        talker.start()
        with pytest.raises(OSError, match="no HTTP reply: BadStatusLine"):
            ask(port, "GET", "/health", key="k", within=4)
        talker.join()
    with pytest.raises(OSError):  # refused; or another process has the port by now
        ask(port, "GET", "/health", key="k", within=4)


# The GPU: one start at a time, and nobody else beside it.


def test_another_job_on_the_gpu_is_named_and_nothing_starts(card, tmp_path):
    says, path = card
    profile = lab.load_profile(str(path))
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as other:
        says(40.0, [[other.pid, 39.5]])
        said, _ = start_fails(profile, tmp_path, error=InUse)
        other.kill()
    assert f"pid {other.pid} (python" in said and "user " in said and "39.5 GiB of GPU memory" in said
    says(40.0, [[2**22 + 1, None]])
    assert f"pid {2**22 + 1} (not visible from here)" in start_fails(profile, tmp_path, error=InUse)[0]
    says(40.0)
    assert "40.0 GiB of the GPU's memory are held" in start_fails(profile, tmp_path, error=InUse)[0]


def test_a_job_that_comes_onto_the_gpu_during_a_level_makes_it_invalid(card, tmp_path):
    says, path = card
    with lab.serve(lab.load_profile(str(path)), "bf16", log_path=tmp_path / "server.log") as server:
        timer = threading.Timer(1.5, says, (20.0, [[os.getpid(), 12.5]]))
        timer.start()
        with pytest.warns(UserWarning, match="another job came onto the GPU"):
            result = lab.load_test(server, rate=50, requests=500)
        says()
    assert not result.valid and "12.5 GiB of GPU memory" in result.summary.invalid_reason
    assert len(result.records) == 500 and result.records["sent_s"].max() < 8


@pytest.fixture
def stranger():
    """The pid of a process that is no server's."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as other:
        yield other.pid
        other.kill()


# No process here has such pids, as none has the host's in a container.
HOSTS = 2**22 + 1, 2**22 + 2


@pytest.fixture
def when_ready(monkeypatch):
    """Call it with what is to happen, given the server, once that is ready and before stock is taken."""
    wait = launch._wait_until_ready

    def then(happens):
        monkeypatch.setattr(launch, "_wait_until_ready", lambda server, *args: (wait(server, *args), happens(server)))

    return then


@pytest.mark.parametrize(
    ("there", "told"),
    [
        (lambda server, stranger: [[server, 20.0], [stranger, 12.5]], "pid {stranger} (python"),
        (lambda _, stranger: [[stranger, 12.5]], "pid {stranger} (python"),
        (lambda _, stranger: [[stranger, None]], "pid {stranger} (python"),
        (lambda server, _: [[server, 20.0], [HOSTS[0], 12.5]], f"pid {HOSTS[0]} (not visible from here, 12.5 GiB"),
        # More of them than the server has processes.
        (lambda *_: [[HOSTS[0] + i, 12.5] for i in range(8)], f"pid {HOSTS[1]} (not visible from here, 12.5 GiB"),
        (lambda server, _: [[server, 20.0]], "processes that cannot be seen from here (12.5 GiB"),
    ],
    ids=["beside it", "without it", "unknown memory", "another container's", "many of the host's", "unseen"],
)
def test_a_job_that_comes_onto_the_gpu_during_a_start_is_not_the_servers(
    card, tmp_path, stranger, when_ready, there, told
):
    says, path = card
    mine = []

    def come(server):
        mine.extend(server.pids())
        says(33.0, there(mine[0], stranger))

    when_ready(come)
    said, seconds = start_fails(lab.load_profile(str(path)), tmp_path, error=InUse)
    assert "another job came onto the GPU while the bf16 server started: " in said and "choose another card" in said
    assert told.format(stranger=stranger) in said and f"pid {mine[0]} " not in said
    assert seconds < 15  # its memory is not waited for


def test_a_job_that_was_idle_before_the_start_may_not_grow_meanwhile(card, tmp_path, stranger, when_ready):
    says, path = card
    profile = lab.load_profile(str(path))
    says(1.5, [[stranger, 1.0]])
    when_ready(lambda server: says(21.5, [[stranger, 1.0], [server.pids()[0], 20.0]]))
    with lab.serve(profile, "bf16", log_path=tmp_path / "a.log") as server:
        assert server.problem() is None and server.info.gpu_doubt == ""
        says(33.0, [[stranger, 12.5], [server.pids()[0], 20.0]])
        assert f"another job came onto the GPU: pid {stranger} (python" in server.problem()
        says(33.0, [[stranger, 1.0], [server.pids()[0], 20.0]])
        assert "cannot be seen from here (11.5 GiB of GPU memory)" in server.problem()
        says(1.5, [[stranger, 1.0]])
    when_ready(lambda server: says(33.0, [[stranger, 12.5], [server.pids()[0], 20.0]]))
    assert f"pid {stranger} (python" in start_fails(profile, tmp_path, error=InUse)[0]


@pytest.mark.parametrize(
    ("there", "doubt"),
    [([], "NVML names no process of this server"), ([[HOSTS[0], 20.0]], "NVML names processes by pids of the host")],
    ids=["none", "the host's"],
)
def test_where_nobody_can_tell_the_server_says_so(card, tmp_path, when_ready, there, doubt):
    says, path = card
    when_ready(lambda _: says(20.5, there))
    with lab.serve(lab.load_profile(str(path)), "bf16", log_path=tmp_path / "server.log") as server:
        assert server.info.gpu_doubt == doubt and f"not certain: {doubt}" in repr(server)
        result = lab.load_test(server, rate=50, requests=20)
        # Of the GPU nothing speaks against it; a busy machine may make it late.
        assert result.summary.server.gpu_doubt == doubt and "GPU" not in (result.summary.invalid_reason or "")
        says(33.0, [*there, [HOSTS[1], 12.5]])
        assert f"another job came onto the GPU: pid {HOSTS[1]} (not visible" in server.problem()
        says()


@pytest.mark.parametrize("loss", [{"lost": True}, {"lost": True, "handles": False}], ids=["silent", "gone"])
def test_a_gpu_that_is_lost_during_a_level_makes_it_invalid(card, tmp_path, loss):
    says, path = card
    profile = lab.load_profile(str(path))
    server = lab.start_server(profile, "bf16", log_path=tmp_path / "server.log")
    timer = threading.Timer(2.5, lambda: says(**loss))
    timer.start()
    with pytest.warns(UserWarning, match="INVALID: the GPU cannot be read any more"):
        result = lab.load_test(server, rate=50, requests=500)
    assert len(result.records) == 500 and len(completed(result.records)) >= 50
    assert result.records["sent_s"].max() < 8
    # The rest of the telemetry went on.
    seen = result.telemetry
    assert seen["gpu_memory_gib"].notna().any() and seen["gpu_memory_gib"].isna().iloc[-1]
    assert seen["at_s"].max() > seen.loc[seen["gpu_memory_gib"].notna(), "at_s"].max() + 0.3
    assert seen["frontend_cpu"].iloc[-6:].notna().any()
    with pytest.warns(UserWarning, match="whether its memory is free again is unknown"):
        server.stop()
    assert marked(profile.name) == []
    with pytest.raises(BadInput, match="none is visible|cannot be read"):
        lab.start_server(profile, "bf16", log_path=tmp_path / "server.log")
    says()
    lab.start_server(profile, "bf16", log_path=tmp_path / "server.log").stop()


def test_a_watch_that_fails_is_a_problem_and_no_error():
    def fail():
        raise ValueError("no such thing")

    with Watch(fail) as watch:
        pass
    assert watch.problem() == "the server could not be watched any more: ValueError('no such thing')"


def test_two_starts_on_one_gpu_the_second_is_refused(card, tmp_path):
    _, path = card
    log = str(tmp_path / "first.log")
    code = f"import fp8lab as lab; s = lab.start_server(lab.load_profile({str(path)!r}), 'bf16', log_path={log!r}); print(s.model, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout.readline()
        pids = marked(path)
        profile = lab.load_profile(str(path))
        with pytest.raises(InUse, match=rf"the GPU .*is in use by pid {first.pid}; wait"):
            lab.start_server(profile, "fp8", log_path=tmp_path / "second.log")
        first.kill()
    nothing_left(path, pids)
    lab.start_server(profile, "fp8", log_path=tmp_path / "second.log").stop()


def test_the_card_is_the_one_that_cuda_would_take(card, monkeypatch):
    for chosen in ("0", "0,1", gpu.gpu_uuids()[0], gpu.gpu_uuids()[0][:-3]):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
        assert gpu.memory_used_gib() == 0.5
        assert gpu.visible() == [chosen.removesuffix(",1")]  # a batch gives each job one of these
    for chosen in ("7", "-1", "", "0,0", "GPU-0000"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
        assert gpu.memory_used_gib() is None and gpu.gpu_names() == gpu.visible() == []


UUIDS = {0: "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", 1: "GPU-89aa", 2: "GPU-5d1f"}
NAMES = st.one_of(
    st.integers(-1, 4).map(str),
    st.sampled_from([*UUIDS.values(), "GPU-8932f937", "GPU-89", "GPU-5", "GPU-", "x", "", "1x"]),
)


@given(st.lists(NAMES, max_size=4).map(",".join))
@example("GPU-8932f937,GPU-5d1f")
@example("GPU-8932f937,GPU-8932")
@example("0,2,-1,1")
def test_cuda_visible_devices_means_what_torch_says(torch, chosen):
    """torch asks the driver's question without a driver; this machine needs no GPU for that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", chosen)
        named = torch.cuda._parse_visible_devices()
    if named and isinstance(named[0], str):
        named = torch.cuda._transform_uuid_to_ordinals(named, list(UUIDS.values()))
    expected = list(itertools.takewhile(lambda index: index in UUIDS, named))
    assert list(gpu.visible_devices(chosen, list(UUIDS), UUIDS).values()) == expected


L40S = {"name": "NVIDIA L40S", "uuid": "GPU-fake-aaaa1111", "memory_gib": 44.99}
H100 = {"name": "NVIDIA H100 80GB HBM3", "uuid": "GPU-fake-bbbb2222", "memory_gib": 79.65}


def test_the_server_sees_the_gpus_in_nvmls_order(card, monkeypatch):
    says, path = card
    profile = read_profile(str(path))
    says(cards=[L40S, H100])
    assert command.build_environment(profile, "bf16")["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert command.build_environment(profile, "bf16")["CUDA_VISIBLE_DEVICES"] == "0"  # its one card, and no other
    says(cards=[H100])
    assert "CUDA_VISIBLE_DEVICES" not in command.build_environment(profile, "bf16")
    says(cards=[L40S, H100])
    # vLLM itself takes neither a shortened UUID nor one that is not there.
    for chosen, seen in (("GPU-fake-bbbb", "1"), ("1,0", "1"), ("1,7", "1")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
        assert command.build_environment(profile, "bf16")["CUDA_VISIBLE_DEVICES"] == seen
        assert gpu.gpu_names()[0] == "NVIDIA H100 80GB HBM3"
    assert "CUDA_DEVICE_ORDER" not in command.build_environment(read_profile("emulated-h100"), "bf16")


def test_a_gpu_that_cannot_be_measured_is_refused_before_anything_starts(card, monkeypatch):
    says, path = card
    profile = lab.load_profile(str(path))
    says(cards=[L40S, H100])
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    for refused in (lambda: lab.load_profile(str(path)), lambda: lab.start_server(profile, "bf16"), lab.load_profile):
        with pytest.raises(BadInput, match=r"CUDA_DEVICE_ORDER=FASTEST_FIRST numbers the different GPUs.*PCI_BUS_ID"):
            refused()
    says(cards=[H100, H100 | {"uuid": "GPU-fake-cccc"}])  # equal cards have no order of speed
    assert lab.load_profile(str(path)).name == profile.name
    monkeypatch.delenv("CUDA_DEVICE_ORDER")
    says(cards=[H100 | {"mig": True}])
    with pytest.raises(BadInput, match="cut into MIG slices.*switch MIG off"):
        lab.load_profile(str(path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-GPU-8932f937-d72c-4106-c12f-20bd9faed9f6/1/2")
    with pytest.raises(BadInput, match="names a MIG slice.*name a card"):
        lab.load_profile()
    says()
    for chosen in ("3", "0,0"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
        for named in (str(path), "auto"):
            with pytest.raises(BadInput, match=f"is visible here .CUDA_VISIBLE_DEVICES='{chosen}' names none"):
                lab.load_profile(named)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")  # hidden on purpose: as without a GPU
    assert lab.load_profile().name == "emulated-h100"


@pytest.mark.parametrize("name, memory_gib, profile", [
    ("NVIDIA H100 80GB HBM3", 79.65, "h100-80gb"), ("NVIDIA H200", 140.4, "h200-80gb"), ("NVIDIA H200 NVL", 140.4, None),
    ("NVIDIA H100 PCIe", 79.65, None), ("NVIDIA H100 NVL", 93.6, None), ("NVIDIA H800", 79.65, None),
    ("NVIDIA GH200 480GB", 94.5, None), ("NVIDIA A100-SXM4-80GB", 79.2, None), ("NVIDIA L40S", 44.99, None),
    ("NVIDIA H100 80GB HBM3", 39.5, None), ("NVIDIA H20", 95.6, None),
])  # fmt: skip
def test_auto_takes_a_profile_for_its_own_card_only(card, tmp_path, name, memory_gib, profile):
    says, _ = card
    says(cards=[{"name": name, "uuid": "GPU-fake-dddd", "memory_gib": memory_gib}])
    if profile:
        assert lab.load_profile().name == profile
        return
    with pytest.raises(BadInput, match=f"the GPU here is '{name}'.*mine.toml") as refused:
        lab.load_profile()
    # The recipe works as it is told, once the datasheet is filled in.
    recipe = str(refused.value).partition("\n\n")[2].replace("= 0.0 ", "= 1e14 ")
    (tmp_path / "mine.toml").write_text(recipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mine = lab.load_profile(str(tmp_path / "mine.toml"))
    assert mine.gpu.fits(name, memory_gib) and mine.gpu.power_w is None


def test_a_profile_for_another_card_warns_when_it_is_loaded(card):
    says, path = card
    says(cards=[L40S])
    with pytest.warns(UserWarning, match="the GPU here is 'NVIDIA L40S'.*no verdicts"):
        lab.load_profile(str(path))


def test_a_listener_is_told_where_there_is_no_ipv6(monkeypatch):
    monkeypatch.setattr(processes.psutil, "net_connections", lambda _kind: [])
    monkeypatch.setattr(processes, "Path", lambda *_parts: Path("/nowhere"))
    assert processes.listener(1) == "another process"


def test_another_cache_folder_is_no_way_around_the_lock(card, tmp_path, monkeypatch):
    _, path = card
    profile = lab.load_profile(str(path))
    with lab.serve(profile, "bf16", log_path=tmp_path / "first.log"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
        with pytest.raises(InUse, match=rf"the GPU .*is in use by pid {os.getpid()}; wait"):
            lab.start_server(profile, "fp8", log_path=tmp_path / "second.log")


@pytest.fixture
def shared(tmp_path, monkeypatch):
    """A folder that all users may write to, in the place of /run/lock."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o1777)
    monkeypatch.setattr("fp8lab.system.locks._SHARED", (tmp_path / "missing", folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield folder
    shutil.rmtree(folder)


@AS_ROOT
def test_the_lock_is_the_same_for_all_users(shared):
    code = f"from pathlib import Path; from fp8lab.system import locks; locks._SHARED = (Path({str(shared)!r}),)\n"
    code += "try: lock = locks.machine_lock('x', 'x')\nexcept locks.InUse as error: print(error, flush=True)\n"
    code += "else: print('mine', flush=True); input()"

    def start(user: int) -> subprocess.Popen:
        # Root's own interpreter may lie where nobody else reads: become the user only then.
        become = f"import os, fp8lab.system.locks, fp8lab.errors; os.setuid({user}); os.umask(0o077)\n"
        command = [sys.executable, "-c", become + code]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    for first, second in ((65534, 65533), (0, 65534)):
        with start(first) as holder:
            assert holder.stdout.readline() == "mine\n"
            with start(second) as other:
                assert f"x is in use by pid {holder.pid}; wait" in other.communicate()[0]
            holder.kill()
        with start(second) as other:
            assert other.stdout.readline() == "mine\n"
            other.kill()
        next(shared.iterdir()).unlink()


def test_a_link_or_a_pipe_in_the_locks_place_is_not_followed(shared, tmp_path):
    precious, lock = tmp_path / "precious", shared / "fp8lab-x.lock"
    precious.write_text("precious")
    for lay in (lock.symlink_to, lock.hardlink_to):
        lay(precious)
        with pytest.raises(NotWritten, match="x cannot be locked"):
            machine_lock("x", "x")
        lock.unlink()
    os.mkfifo(lock)
    with pytest.raises(NotWritten, match="not a plain file"):
        machine_lock("x", "x")
    assert precious.read_text() == "precious"


def test_without_a_folder_for_all_the_lock_lies_in_the_cache(shared, tmp_path):
    shared.chmod(0o755)
    machine_lock("x", "x").release()
    assert (tmp_path / "cache" / "fp8lab" / "locks" / "x.lock").exists() and not list(shared.iterdir())


def test_a_lock_dies_with_its_holder(tmp_path):
    path = tmp_path / "x.lock"
    code = f"from fp8lab.system.locks import Lock; from pathlib import Path; l = Lock(Path({str(path)!r}), 'x'); print(1, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline()
        with pytest.raises(InUse, match=f"x is in use by pid {holder.pid}"):
            Lock(path, "x")
        holder.send_signal(signal.SIGKILL)
    lock = wait_for(lambda: Lock(path, "x"))
    lock.release()
    lock.release()
