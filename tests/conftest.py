"""Shared fixtures: a streaming server with known times, a short emulated profile, a stand-in for vLLM that fails
as it is told, a run made of whole cloth."""

import contextlib
import functools
import gc
import inspect
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest

from fp8lab.models.checkpoints import model_folder
from fp8lab.paths import PROJECT
from fp8lab.results.run_folder import open_run
from fp8lab.server import processes
from fp8lab.system import gpu

HERE = Path(__file__).parent

# A shell's background job (and many a CI) starts with Ctrl-C ignored, nohup with SIGHUP, and children inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Once torch and vLLM are imported every full collection walks millions of objects that never go.
gc.set_threshold(100_000, 50, 1000)

# Some hundred Pythons are started, each of which would compile the library anew where a host keeps no compiled files.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# Rare events are looked for at length, and more real servers started, by `make nightly` alone.
NIGHTLY = bool(os.environ.get("FP8LAB_NIGHTLY"))
# Whatever takes two users: nobody else may become another one, or see what it started.
AS_ROOT = pytest.mark.skipif(os.getuid() != 0, reason="only root may act as another user")


# What starts a server for its tests, and what times itself against a streaming server.
_STARTERS = {"fake_vllm", "tiny", "crowded", "measured", "search"}
_TIMED = {"test_load", "test_connections", "test_telemetry", "test_clocks", "test_live"}
# The files that take longest, here or there in the phases of `make test`: what is begun last ends last. Beside the front
# notebook, whose levels may not be late, come the light ones of them.
_LONG = [
    "test_notebooks", "test_server_faults", "test_run_faults", "test_quality", "test_server", "test_browser", "test_connections",
    "test_predict", "test_load", "test_readme", "test_endpoint", "test_quantize", "test_ray", "test_batch", "test_anatomy",
    "test_owner_faults", "test_streams", "test_hosts", "test_telemetry", "test_hostile", "test_limit_search",
]  # fmt: skip
_now_running = []


def pytest_collection_modifyitems(config, items):
    """Marks what starts a server, and what times itself: beside another test its times would be wrong. (What is marked
    `servers` by hand is no such test, unless it is marked so too.) Tests marked `nightly` are run there alone. Long files come
    first."""
    if not NIGHTLY:
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("nightly")])
        items[:] = [item for item in items if not item.get_closest_marker("nightly")]
    items.sort(key=lambda item: [*_LONG, item.module.__name__].index(item.module.__name__))
    for item in items:
        by_hand = item.get_closest_marker("servers")
        if _STARTERS & set(item.fixturenames):
            item.add_marker(pytest.mark.servers)
        times = item.module.__name__ in _TIMED or "sse_url" in item.fixturenames
        if not by_hand and (times or "streaming_server" in inspect.getsource(item.function)):
            item.add_marker(pytest.mark.timing)


def pytest_runtest_setup(item):
    _now_running[:] = [item]


@pytest.fixture(autouse=True, scope="session")
def _marked_truly():
    """What starts a server or executes a notebook is marked `servers`: `make quick` leaves it out."""
    from fp8lab.report import notebooks
    from fp8lab.server.launch import Server

    def checked(work):
        def check(*arguments, **options):
            if not _now_running[0].get_closest_marker("servers"):
                pytest.fail("this test starts a server or executes a notebook: mark it `servers`", pytrace=False)
            return work(*arguments, **options)

        return check

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Server, "_launch", checked(Server._launch))
        patch.setattr(notebooks, "execute", checked(notebooks.execute))
        yield


@pytest.fixture(scope="session")
def torch():
    """torch, imported by the tests that take it: it is 2 s of CPU, which every collection would pay."""
    import torch

    return torch


@functools.cache
def recorded(name: str):
    """A recorded run, opened once a process: what is read and concluded of it is kept with it."""
    return open_run(source=name)


def whole_run_mhz(seen, level_id: str) -> float:
    """The mean SM clock from the first request to the last token."""
    level = seen.level(level_id)
    span = level.records["sent_s"].min(), level.records["last_token_s"].max()
    return level.telemetry.loc[level.telemetry["at_s"].between(*span), "gpu_sm_mhz"].mean()


@pytest.fixture(autouse=True)
def own_environment():
    """What the command line settles for its process (PYTHONPATH, HOME) does not outlive the test that calls it in this one."""
    before = dict(os.environ)
    yield
    if os.environ != before:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(autouse=True)
def _no_thread_serves_on():
    """A test's HTTP server is shut down with it: once its socket is closed, a thread that still serves it spins, and takes
    its time from every test after this one."""
    before = set(threading.enumerate())
    yield
    left = [one for one in set(threading.enumerate()) - before if "serve_forever" in one.name and one.is_alive()]
    for one in left:
        one.join(2)  # it was told to end a moment ago
    if any(one.is_alive() for one in left):
        pytest.fail("this test leaves a thread behind that serves: shut its server down", pytrace=False)


SHORT = """
extends = "emulated-h100"
# By a slow clock a busy machine's lateness counts for little; short answers end soon all the same.
title = "A short emulated run for tests"

[emulation]
time_dilation = 8

[workload]
trace = "random"
input_tokens = 32
output_tokens = 32
warmup_requests = 4

[protocols."as published"]
levels = [
  { variant = "bf16", rate = 50, requests = 20 },
  { variant = "fp8", rate = 100, requests = 40 },
]

[protocols."equal load"]
levels = [
  { variant = "bf16", rate = 100, requests = 40 },
  { variant = "fp8", rate = 50, requests = 20 },
]
"""


@contextlib.contextmanager
def streaming_server(*arguments: str):
    """tests/sse_server.py as a subprocess; yields its base URL."""
    command = [sys.executable, str(HERE / "sse_server.py"), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def sse_url():
    with streaming_server("--ttft-ms", "20", "--itl-ms", "2") as url:
        yield url


FAKE = """
extends = "emulated-h100"
title = "A stand-in for vLLM"

[model]
shapes = "tiny-llama"

[server]
start_timeout_s = {timeout}

[emulation]
time_dilation = {dilation}

[workload]
warmup_requests = 2

[variant_env.bf16]
FAKE_VLLM = "{bf16}"

[variant_env.fp8]
FAKE_VLLM = "{fp8}"

[protocols."as published"]
levels = [
  {{ variant = "bf16", rate = 50, requests = {requests} }},
  {{ variant = "fp8", rate = 100, requests = {requests} }},
]

[protocols."equal load"]
levels = [
  {{ variant = "bf16", rate = 100, requests = {requests} }},
  {{ variant = "fp8", rate = 50, requests = {requests} }},
]
"""


def fake_path() -> str:
    """The PYTHONPATH under which every server started is tests/fake."""
    folders = [HERE / "fake", HERE, PROJECT / "lib", os.environ.get("PYTHONPATH", "")]
    return os.pathsep.join(map(str, filter(None, folders)))


@pytest.fixture
def fake_vllm(monkeypatch, tmp_path):
    """Servers started from here on are tests/fake; call it for the path of a profile whose variants fail so. By a slower
    clock (`dilation`) a busy machine's lateness counts for less: for tests that need valid levels."""
    monkeypatch.setenv("PYTHONPATH", fake_path())

    def profile(bf16: str = "", fp8: str = "", *, requests: int = 20, timeout: float = 30, dilation: float = 1) -> Path:
        path = tmp_path / f"{tmp_path.name}.toml"  # its name is the profile's: no other test's servers have it
        path.write_text(FAKE.format(bf16=bf16, fp8=fp8, requests=requests, timeout=timeout, dilation=dilation))
        return path

    return profile


def own_cache(folder: Path) -> str:
    """`folder` as a cache of a test's own (XDG_CACHE_HOME), with the models in it that were built before: to build the
    tokenizer anew takes 3 s of CPU."""
    models = model_folder("tiny-llama").parent
    (folder / "fp8lab").mkdir(parents=True)
    (folder / "fp8lab" / "models").symlink_to(models)
    return str(folder)


@pytest.fixture
def card(fake_vllm, tmp_path, monkeypatch):
    """A function that sets what the GPU says, and a cuda profile on it."""
    monkeypatch.setenv("PYTHONPATH", f"{HERE / 'fake_nvml'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("XDG_CACHE_HOME", own_cache(tmp_path / "cache"))
    monkeypatch.setenv("FAKE_NVML", str(tmp_path / "nvml.json"))
    monkeypatch.syspath_prepend(str(HERE / "fake_nvml"))
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)

    def says(used_gib=0.5, processes=(), lost=False, handles=True, cards=()):
        said = {"used_gib": used_gib, "processes": list(processes), "lost": lost, "handles": handles}
        said["cards"] = list(cards)
        (tmp_path / "new.json").write_text(json.dumps(said))
        (tmp_path / "new.json").replace(tmp_path / "nvml.json")  # whole: it is read meanwhile

    says()
    fake_vllm()  # the environment of the stand-in
    path = tmp_path / f"{tmp_path.name}.toml"
    path.write_text('extends = "h100-80gb"\n[model]\nshapes = "tiny-llama"\n[workload]\nwarmup_requests = 0\n')
    yield says, path
    uuids = gpu.gpu_uuids(8)
    sys.modules.pop("pynvml", None)
    for uuid in uuids:
        Path("/run/lock", f"fp8lab-{uuid}.lock").unlink(missing_ok=True)


def marked(profile: str | Path) -> list[int]:
    """Pids of all servers of the profile, grandchildren and watchdogs included."""
    return [pid for server in processes.servers() if server.profile == Path(profile).stem for pid in server.pids]


def wait_for(condition, within: float = 30.0, what: str = "it"):
    """What `condition` returns once that is true; fails after `within` seconds."""
    deadline = time.monotonic() + within
    while not (result := condition()):
        assert time.monotonic() < deadline, f"{what} did not come about within {within:g} s"
        time.sleep(0.05)
    return result


def running(pid: int) -> bool:
    """Whether the process still runs; one that has ended but whom init has not collected yet does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def nothing_left(profile: str | Path, pids, within: float = 20.0) -> None:
    """Fails unless, in time, no process of the profile's servers is left, neither by pid nor by mark."""
    assert pids
    wait_for(
        lambda: not any(map(running, pids)) and not marked(profile), within, f"the end of {pids}, and of their servers"
    )


def make_records(sent, first, last, tokens, *, scheduled=None, errors=None) -> pd.DataFrame:
    """Records from columns; what is not given is as if all went well."""
    count = len(sent)
    return pd.DataFrame(
        {
            "request": np.arange(count),
            "prompt_tokens": 10,
            "output_tokens_asked": tokens,
            "output_tokens": tokens,
            "chunks": tokens,
            "scheduled_s": sent if scheduled is None else scheduled,
            "sent_s": np.asarray(sent, dtype=float),
            "first_token_s": np.asarray(first, dtype=float),
            "last_token_s": np.asarray(last, dtype=float),
            "finish_reason": "length",
            "error": pd.Series(errors or [None] * count, dtype="object"),
        }
    )


def make_tokens(records: pd.DataFrame) -> pd.DataFrame:
    """The token timestamps of `make_records`, each request's spread evenly from its first to its last."""
    each = [
        (row.request, np.linspace(row.first_token_s, row.last_token_s, row.output_tokens))
        for row in records.itertuples()
    ]
    return pd.DataFrame(
        {
            "request": np.repeat([request for request, _ in each], [len(at) for _, at in each]),
            "at_s": np.concatenate([at for _, at in each]),
        }
    )
