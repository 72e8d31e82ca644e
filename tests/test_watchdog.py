"""The watchdog, with small scripts in the place of a server."""

import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import psutil
import pytest

from conftest import running
from fp8lab.config import flags
from fp8lab.server import processes, watchdog

SCRIPT = Path(watchdog.__file__)
# A server that forks a grandchild in a session of its own, and says both pids.
FAMILY = """
import os, signal, subprocess, sys, time
{ignore}
child = subprocess.Popen([sys.executable, "-c", "import time; {ignore}\\ntime.sleep(600)"], start_new_session=True)
print(os.getpid(), child.pid, flush=True)
{end}
"""
IGNORE = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)"


def start(tmp_path, end="time.sleep(600)", ignore="", grace=1.0):
    log = tmp_path / "server.log"
    server = FAMILY.format(end=end, ignore=ignore)
    command = [
        sys.executable,
        str(SCRIPT),
        "--log",
        str(log),
        "--grace",
        str(grace),
        "--",
        sys.executable,
        "-c",
        server,
    ]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout.readline().startswith("started ")
    deadline = time.monotonic() + 10
    while not log.read_text().strip():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process, [int(pid) for pid in log.read_text().split()[:2]]


def gone(pids, within=10.0) -> bool:
    deadline = time.monotonic() + within
    while any(map(running, pids)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.parametrize("ignore", ["", IGNORE], ids=["polite", "ignores SIGTERM"])
def test_closing_the_pipe_ends_server_and_grandchild(tmp_path, ignore):
    process, pids = start(tmp_path, ignore=ignore)
    process.stdin.close()
    assert process.wait(10) == 0 and gone(pids)


def test_a_server_that_dies_takes_its_orphans_along(tmp_path):
    process, pids = start(tmp_path, end="os._exit(7)", ignore=IGNORE)
    assert "exited 7" in process.communicate(timeout=10)[0]
    assert gone(pids)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGHUP])
def test_a_closed_terminal_does_not_end_the_watchdog(tmp_path, signum):
    process, pids = start(tmp_path)
    os.kill(process.pid, signum)
    time.sleep(0.5)
    assert process.poll() is None and all(map(psutil.pid_exists, pids))
    process.stdin.close()
    assert process.wait(10) == 0 and gone(pids)


def test_a_killed_owner_ends_everything(tmp_path):
    """The owner is killed outright: nothing of it runs, the pipe closes all the same."""
    log = tmp_path / "server.log"
    server = FAMILY.format(end="time.sleep(600)", ignore="")
    owner = f"""
import subprocess, sys, time
command = [sys.executable, {str(SCRIPT)!r}, "--log", {str(log)!r}, "--", sys.executable, "-c", {server!r}]
watchdog = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
print(watchdog.pid, flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", owner], stdout=subprocess.PIPE, text=True) as process:
        pids = [int(process.stdout.readline())]
        while not log.exists() or not log.read_text().strip():
            time.sleep(0.02)
        pids += [int(pid) for pid in log.read_text().split()[:2]]
        process.kill()
    assert gone(pids, within=20)


def test_descendants_survive_odd_process_names(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        assert child.pid in watchdog.descendants(os.getpid())
        assert child.pid in watchdog.descendants(os.getpid(), direct=True)
    finally:
        child.kill()
        child.wait()


@pytest.mark.parametrize(("seconds", "warned"), [(0.3, False), (60, True)])
def test_a_server_without_a_watchdog_is_told_of_once_it_stays(seconds, warned):
    """One that another process is just starting has none yet for an instant."""
    value = processes.mark(id=f"settles-{seconds}", variant="bf16", profile="none", port=1)
    process = subprocess.Popen(["sleep", str(seconds)], env=os.environ | {processes.MARK: value})
    try:
        while processes.find(f"settles-{seconds}") is None:
            time.sleep(0.01)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            processes.warn_of_leftovers()
        assert any(f"pids {process.pid}," in str(one.message) for one in said) == warned
    finally:
        process.kill()
        process.wait()


def test_secrets_are_blotted_out_whole(tmp_path):
    log = tmp_path / "log"
    words = "hf_abcdefgh hf_abcdefghSUPERSECRET http://alice:pa55word99@proxy"
    secrets = {"A_TOKEN": "hf_abcdefgh", "B_KEY": "hf_abcdefghSUPERSECRET", "PROXY": "http://alice:pa55word99@proxy:80"}
    command = [sys.executable, "-c", f"print({words!r})"]
    with watchdog.popen(command, os.environ | secrets, log, grace_s=1) as guard:
        guard.wait(20)
    assert log.read_text() == f"{'*' * 11} {'*' * 22} http://alice:{'*' * 10}@proxy\n"
    assert flags.secret_texts(secrets) == [*secrets.values(), "pa55word99"]


@pytest.mark.parametrize("name", ["GHTOKEN", "OPENAIKEY", "SSHPASS", "HF_TOKEN", "MY_PAT"])
def test_what_ends_as_a_secret_does_is_one(name):
    assert flags.is_secret(name) and not flags.is_secret(f"{name}_FILE") and not flags.is_secret("SPAT")
