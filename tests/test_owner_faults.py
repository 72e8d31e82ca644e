"""However the owner of a server ends, nothing of the server is left within 20 s. Kernels, JupyterLab, papermill and
terminals are real; the server is a stand-in with descendants in sessions of their own."""

import os
import pty
import signal
import subprocess
import sys
import time
import urllib.request
import warnings

import nbformat
import psutil
import pytest
from jupyter_client import BlockingKernelClient, KernelManager

import fp8lab as lab
from conftest import AS_ROOT, marked, nothing_left, wait_for
from fp8lab.server import processes

START = "import fp8lab as lab; server = lab.start_server(lab.load_profile({profile!r}), 'bf16', log_path={log!r})"
FAMILY = 5  # watchdog, API server, EngineCore, child, grandchild


def whole_family(profile) -> list[int]:
    return wait_for(lambda: len(pids := marked(profile)) >= FAMILY and pids, what="a server with its family")


def started(profile, tmp_path) -> str:
    return START.format(profile=str(profile), log=str(tmp_path / "server.log"))


@pytest.fixture
def kernel(fake_vllm):
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(extra_arguments=["--log-level=CRITICAL"])
    yield manager
    manager.shutdown_kernel(now=True)


def execute(client, code) -> None:
    client.start_channels()
    client.wait_for_ready(60)
    client.execute(code)


@pytest.mark.parametrize(
    ("family", "end"),
    [
        ("family", lambda kernel: kernel.signal_kernel(signal.SIGKILL)),
        ("polite-family", lambda kernel: kernel.restart_kernel(now=False)),
        ("polite-family", lambda kernel: kernel.restart_kernel(now=True)),
        ("polite-family", lambda kernel: kernel.shutdown_kernel()),
    ],
    ids=["killed, server ignores SIGTERM", "restarted", "restarted at once", "shut down"],
)
def test_a_kernel_that_ends_takes_its_server_along(kernel, fake_vllm, tmp_path, family, end):
    profile = fake_vllm(family)
    execute(kernel.client(), started(profile, tmp_path))
    pids = whole_family(profile)
    end(kernel)
    nothing_left(profile, pids)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_jupyterlab_takes_the_servers_of_its_kernels_along(fake_vllm, tmp_path, monkeypatch, signum):
    profile = fake_vllm("polite-family")
    for kind in ("RUNTIME", "CONFIG", "DATA"):
        monkeypatch.setenv(f"JUPYTER_{kind}_DIR", str(tmp_path / kind))
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.port_retries=50"]
    command += [f"--ServerApp.root_dir={tmp_path}", "--IdentityProvider.token=test"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as jupyter:
        try:
            file = wait_for(lambda: next((tmp_path / "RUNTIME").glob("jpserver-*.json"), None), what="JupyterLab")
            url = wait_for(lambda: '"url"' in file.read_text() and file.read_text()).split('"url": "')[1].split('"')[0]
            request = urllib.request.Request(
                f"{url}api/kernels", data=b"{}", headers={"Authorization": "token test"}, method="POST"
            )
            wait_for(lambda: answered(request), what="JupyterLab's first kernel")
            connection = wait_for(lambda: next((tmp_path / "RUNTIME").glob("kernel-*.json"), None), what="the kernel")
            client = BlockingKernelClient(connection_file=str(connection))
            client.load_connection_file()
            execute(client, started(profile, tmp_path))
            pids = whole_family(profile)
            client.stop_channels()
            jupyter.send_signal(signum)
            nothing_left(profile, pids)
        finally:
            jupyter.kill()


def answered(request) -> bool:
    try:
        return urllib.request.urlopen(request, timeout=20).status == 201
    except OSError:
        return False


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL, signal.SIGHUP])
def test_a_papermill_that_ends_takes_the_server_along(fake_vllm, tmp_path, signum):
    profile = fake_vllm("polite-family")
    cells = [nbformat.v4.new_code_cell(started(profile, tmp_path) + "\nimport time; time.sleep(600)")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, tmp_path / "n.ipynb")
    command = [sys.executable, "-m", "papermill", str(tmp_path / "n.ipynb"), str(tmp_path / "out.ipynb")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as papermill:
        pids = whole_family(profile)
        papermill.send_signal(signum)
        nothing_left(profile, pids)


def fp8lab(*arguments, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "fp8lab.cli", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.parametrize("signum", [signal.SIGHUP, signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_a_command_that_ends_takes_the_server_along(fake_vllm, signum):
    profile = fake_vllm("polite-family")
    with fp8lab("serve", "bf16", "--profile", profile) as serving:
        pids = whole_family(profile)
        serving.send_signal(signum)
        nothing_left(profile, pids)
        said = serving.communicate(timeout=20)[1]
    assert serving.returncode == (-9 if signum == signal.SIGKILL else 130), said


def test_a_closed_terminal_takes_the_server_along(fake_vllm):
    """The terminal's master end is closed: the kernel sends SIGHUP to what runs in it."""
    profile = fake_vllm("polite-family")
    pid, terminal = pty.fork()
    if pid == 0:
        command = [sys.executable, "-m", "fp8lab.cli", "serve", "bf16", "--profile", str(profile)]
        os.execv(sys.executable, command)
    pids = whole_family(profile)
    os.close(terminal)
    nothing_left(profile, pids)
    os.waitpid(pid, 0)


def test_ctrl_c_during_a_start_ends_it(fake_vllm, tmp_path):
    profile = fake_vllm("never-ready")
    with fp8lab("measure", "--profile", profile, "--run", tmp_path / "run") as measuring:
        wait_for(lambda: "loading weights" in measuring.stderr.readline(), what="the start")
        pids = marked(profile)
        measuring.send_signal(signal.SIGINT)
        nothing_left(profile, pids)
        assert measuring.wait(20) == 130


def test_ctrl_c_during_a_level_ends_it_and_loses_nothing_complete(fake_vllm, tmp_path):
    profile = fake_vllm("polite-family", requests=100)
    with fp8lab("measure", "--profile", profile, "--run", tmp_path / "run") as measuring:
        wait_for((tmp_path / "run" / "levels" / "bf16-50rps-r1").exists, what="the first level")
        time.sleep(0.3)
        workers = [child.pid for child in psutil.Process(measuring.pid).children(recursive=True)]
        pids = marked(profile)
        measuring.send_signal(signal.SIGINT)
        nothing_left(profile, [*pids, *workers])
        assert measuring.wait(20) == 130
        assert "to go on where this stopped" in measuring.stderr.read()
    assert list(lab.open_run(tmp_path / "run").summaries()) == ["bf16-50rps-r1"]


def test_a_child_that_holds_the_pipe_does_not_keep_the_server_alive(fake_vllm, tmp_path):
    """A forked child inherits the pipe that tells the watchdog of its owner's end."""
    profile = fake_vllm("polite-family")
    code = f"{started(profile, tmp_path)}\nimport os, time\nif child := os.fork(): print(child, flush=True)\ntime.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as owner:
        child = int(owner.stdout.readline())
        pids = whole_family(profile)
        owner.kill()
        try:
            nothing_left(profile, pids)
        finally:
            os.kill(child, signal.SIGKILL)


@pytest.fixture
def orphaned(fake_vllm, tmp_path):
    """A server whose owner and watchdog were both killed, its run folder gone; (profile, its pids)."""
    profile = fake_vllm("polite-family")
    folder = tmp_path / "run" / "logs"
    code = f"{started(profile, folder)}\nprint(server._watchdog.pid, flush=True)\nimport time; time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as owner:
        watchdog = int(owner.stdout.readline())
        pids = whole_family(profile)
        os.kill(watchdog, signal.SIGKILL)
        owner.kill()
    for path in sorted((tmp_path / "run").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    return profile, [pid for pid in pids if pid != watchdog]


def test_stop_finds_what_has_no_owner_no_watchdog_and_no_run_folder(orphaned):
    profile, pids = orphaned
    assert all(map(psutil.pid_exists, pids))
    with pytest.warns(UserWarning, match="its owner is gone .* end it with `fp8lab stop`"):
        lab.start_server(lab.load_profile(str(profile)), "fp8").stop()
    with fp8lab("status") as status:
        assert "LEFT OVER" in status.stdout.read()
    with fp8lab("stop") as stop:
        assert f"ended bf16 ({profile.stem})" in stop.stdout.read()
    nothing_left(profile, pids, within=1)


def test_a_killed_watchdog_is_noticed_and_the_owners_stop_still_ends_all(fake_vllm, tmp_path):
    profile = lab.load_profile(str(fake_vllm("polite-family")))
    server = lab.start_server(profile, "bf16", log_path=tmp_path / "server.log")
    pids = whole_family(profile.name)
    assert server.problem() is None
    server._watchdog.kill()
    server._watchdog.wait()
    assert "watchdog was killed" in server.problem()
    with pytest.warns(UserWarning, match="its watchdog was killed .*pids .*fp8lab stop --all"):
        lab.start_server(profile, "fp8", log_path=tmp_path / "other.log").stop()
    server.stop()
    nothing_left(profile.name, pids, within=1)


def test_a_clock_that_is_set_makes_no_server_look_left_over(fake_vllm, tmp_path, monkeypatch):
    profile = lab.load_profile(str(fake_vllm()))
    with lab.serve(profile, "bf16", log_path=tmp_path / "server.log"):
        create_time = psutil.Process.create_time
        monkeypatch.setattr(psutil.Process, "create_time", lambda process: create_time(process) + 3600)
        (mine,) = [server for server in processes.servers() if server.profile == profile.name]
        assert mine.owned and mine.watched


def test_a_server_that_runs_as_it_should_is_no_leftover(fake_vllm, tmp_path):
    profile = lab.load_profile(str(fake_vllm()))
    with lab.serve(profile, "bf16", log_path=tmp_path / "server.log"), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        processes.warn_of_leftovers()
        assert not [one for one in said if f"({profile.name}" in str(one.message) or "bf16, pids" in str(one.message)]


@AS_ROOT
def test_another_users_server_is_none_of_roots():
    mark = processes.mark(id="other-1", variant="other", profile="other-users", port=1)
    command = ["/bin/sleep", "60"]
    with subprocess.Popen(command, env={processes.MARK: mark}, user=65534) as theirs:
        try:
            assert psutil.Process(theirs.pid).environ()[processes.MARK] == mark
            assert marked("other-users") == []
        finally:
            theirs.kill()
    with subprocess.Popen(command, env={processes.MARK: mark}) as ours:
        try:
            assert marked("other-users") == [ours.pid]
        finally:
            ours.kill()
