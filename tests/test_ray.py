"""A batch on the hosts of a Ray cluster: two raylets on this machine, each with a folder and a (made-up) card of its own."""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from conftest import marked, nothing_left, own_cache, wait_for
from fp8lab import hosts
from fp8lab.batch import _Queue, _work, load_matrix, run_batch
from fp8lab.errors import BadInput
from fp8lab.hosts import Job, Lost, Place
from fp8lab.results.files import write_json
from fp8lab.results.run_folder import open_run
from test_batch import ThisHost, short  # noqa: F401 - a fixture

# Looked for and not imported: that takes 1 s of CPU, which every collection of the tests would pay.
pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the gpu environment does without")


@pytest.fixture
def cluster(fake_vllm, tmp_path, monkeypatch):
    """A cluster whose two hosts start the stand-in for vLLM; `cluster(0)` and `cluster(1)` are their raylets' pids."""
    import ray
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = []
    for number in range(2):
        own = {"XDG_CACHE_HOME": own_cache(tmp_path / f"host-{number}")}
        nodes.append(made.add_node(num_cpus=1, num_gpus=1, object_store_memory=80 << 20, env_vars=own))

    def raylet(number: int) -> int:
        return nodes[number].all_processes["raylet"][0].process.pid

    raylet.address = made.address
    try:
        yield raylet
    finally:
        ray.shutdown()
        with contextlib.suppress(Exception):
            made.shutdown()


@pytest.fixture
def matrix(tmp_path, fake_vllm, short):  # noqa: F811
    """Four jobs of a level each."""
    profile = fake_vllm(requests=30, dilation=4)
    loads = "".join(f"[workloads.w{n}]\nseed = {n}\n" for n in range(4))
    text = f'profiles = ["{profile}"]\nvariants = ["bf16"]\nprotocols = ["as published"]\nnotebook = "{short}"\n{loads}'
    (tmp_path / "matrix.toml").write_text(text)
    return tmp_path / "matrix.toml"


def states(out: Path) -> dict[str, dict]:
    with contextlib.suppress(OSError, ValueError):
        return json.loads((out / "queue.json").read_text())["jobs"]
    return {}


def start(matrix: Path, address: str) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "fp8lab.cli",
        "batch",
        str(matrix),
        "--out",
        str(matrix.parent / "out"),
        "--ray",
        address,
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def assert_all_measured_once(out: Path) -> None:
    for name, job in states(out).items():
        assert job["state"] == "done", (name, job, (out / name / "log.txt").read_text()[-2000:])
        run = open_run(source=out / name / "run")
        assert list(run.summaries()) == ["bf16-50rps-r1"] and run.summaries()["bf16-50rps-r1"].completed == 30


@pytest.mark.servers
def test_a_lost_hosts_jobs_run_again_elsewhere_and_nothing_is_left(cluster, matrix):
    out = matrix.parent / "out"
    batch = start(matrix, cluster.address)
    try:
        running = lambda: [job for job in states(out).values() if job["state"] == "running"]  # noqa: E731
        wait_for(lambda: len(running()) == 2 and len(marked("profile")) >= 2, 120, "both hosts run a job")
        assert {job["host"] for job in running()} == {"host 1", "host 2"}
        pids = marked("profile")
        os.kill(cluster(1), signal.SIGKILL)
        _, said = batch.communicate(timeout=240)
    finally:
        batch.kill()
    assert batch.returncode in (0, 3), said  # 3: a level was late, where other tests filled the machine
    assert (
        "was lost" in said and "it runs again on another host" in said and "its runs lie in the shared folder" in said
    )
    assert_all_measured_once(out)
    assert "host 1" in (out / "index.html").read_text() and "host 2" in (out / "index.html").read_text()
    nothing_left("profile", pids)


@pytest.mark.nightly  # each test starts a cluster of its own
@pytest.mark.servers
def test_hosts_that_share_no_folder_send_runs_back_and_those_with_other_software_are_refused(
    cluster, matrix, monkeypatch
):
    matrix.write_text(matrix.read_text().partition("[workloads.w1]")[0])
    answers = iter([{"fp8lab": "mine", "vllm": "0.32"}])  # the first to be asked is this machine
    with (
        monkeypatch.context() as patch,
        pytest.raises(BadInput, match="host 1 has other software: fp8lab mine here, theirs there"),
    ):
        patch.setattr(hosts, "_software", lambda: next(answers, {"fp8lab": "theirs", "vllm": "0.32"}))
        hosts.ray_hosts(cluster.address, matrix.parent)
    shared = hosts.ray_hosts

    def apart(address: str, folder: Path):
        found = shared(address, folder)
        for host in found:
            host.shared = False
        return found

    monkeypatch.setattr(hosts, "ray_hosts", apart)
    out = matrix.parent / "out"
    assert run_batch(load_matrix(matrix), out, ray=cluster.address) == 0
    assert_all_measured_once(out)
    assert all((out / name / "log.txt").stat().st_size for name in states(out))
    assert not list(matrix.parent.glob("host-*/fp8lab/batches/*/*"))  # nothing is kept there of what came back


@pytest.mark.nightly
@pytest.mark.servers
def test_an_interrupted_batch_leaves_no_server_on_any_host(cluster, matrix):
    batch = start(matrix, cluster.address)
    pids = wait_for(lambda: len(found := marked("profile")) >= 4 and found, 120, "servers on both hosts")
    batch.send_signal(signal.SIGINT)
    batch.communicate(timeout=120)
    assert batch.returncode == 130
    nothing_left("profile", pids, within=60)


def test_no_cluster_and_no_ray_are_clear_errors(tmp_path, monkeypatch):
    for address in ("127.0.0.1:1", "127.0.0.1:port"):
        with pytest.raises(BadInput, match=f"no Ray cluster at '{address}': .*`ray start --head` there"):
            hosts.ray_hosts(address, tmp_path)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BadInput, match="Ray is not installed here"):
        hosts.ray_hosts("auto", tmp_path)


def job(tmp_path, name: str, cards: int) -> Job:
    return Job(name, tmp_path / name, (), cards)


def test_cards_are_taken_at_once_and_in_order(tmp_path):
    place = ThisHost("host 1", 2)
    queue = _Queue(tmp_path, [job(tmp_path, *one) for one in (("a", 1), ("large", 2), ("b", 1))], [place])
    first = queue.take(place)
    assert first[0].name == "a" and len(first[2]) == 1
    assert queue.take(place) is None  # `b` does not overtake what waits for both
    queue.finish("a", 0, place, first[2])
    assert queue.take(place)[0].name == "large" and not place.free


class Trouble(Place):
    """A host that is lost, or fails, at every job."""

    def __init__(self, name: str, cards: int, error: Exception, *, dies: bool):
        super().__init__(name, cards)
        self.error, self.dies, self.asked = error, dies, 0

    def run(self, job, cards, closed):
        self.asked, self.alive = self.asked + 1, not self.dies
        raise self.error


@pytest.mark.parametrize("error, dies, asked, states", [
    (Lost("host 1 was lost"), True, 1, ["waiting", "waiting"]),  # no host is left
    (Lost("its worker died"), False, 6, ["failed", "failed"]),  # the host lives: not for ever
    (OSError(28, "No space left on device"), False, 2, ["failed", "failed"]),
])  # fmt: skip
def test_a_batch_ends_whatever_becomes_of_its_hosts(tmp_path, capsys, error, dies, asked, states):
    place = Trouble("host 1", 1, error, dies=dies)
    queue = _Queue(tmp_path, [job(tmp_path, "a", 1), job(tmp_path, "b", 1)], [place])
    worker = threading.Thread(target=_work, args=(queue, place), daemon=True)
    worker.start()
    worker.join(20)
    assert not worker.is_alive() and place.asked == asked
    assert [one["state"] for one in queue.jobs.values()] == states and queue.exit_code() == 1
    assert error.args[-1] in capsys.readouterr().err


def test_a_job_for_more_cards_than_any_host_has_is_refused(tmp_path):
    (tmp_path / "m.toml").write_text(
        'profiles = ["h100-x2-8b"]\nvariants = ["fp8-dp2"]\nprotocols = ["the same load a card"]\n'
    )
    with pytest.raises(BadInput, match="job h100-x2-8b takes 2 GPUs on one host, and none has more than 1"):
        run_batch(load_matrix(tmp_path / "m.toml"), tmp_path / "out")


def test_a_run_that_comes_back_replaces_what_was_there_whole(tmp_path):
    for name in ("there", "here"):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / f"{name}.json", {})
    hosts._unpack(hosts._packed(tmp_path / "there"), tmp_path / "here")
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["there.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "there"]
    hosts._unpack(hosts._packed(tmp_path / "none"), tmp_path / "here")  # a job that had no run yet
    assert (tmp_path / "here" / "there.json").exists()
