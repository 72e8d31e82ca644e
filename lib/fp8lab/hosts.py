"""Where a batch's jobs run: on this machine's GPUs, or on the hosts of a Ray cluster. A job is the same process on both."""

import abc
import contextlib
import io
import os
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from .errors import BadInput
from .paths import cache_dir
from .results.files import put_in_place
from .results.provenance import digest, versions
from .system.gpu import visible

# Set for a job's process: its standard input is a pipe that ends with the batch.
TIED = "FP8LAB_TIED_TO_STDIN"
_LOOK_S, _END_S, _CONNECT_S = 0.5, 60.0, 5.0
_RUN, _LOG, _PROFILE = "run", "log.txt", "profile.toml"


@dataclass(frozen=True)
class Job:
    """One run of a batch: its `name`, its `folder`, the arguments of `fp8lab` after those that say where, and how many
    `cards` of a host it takes (1 where it needs none: a host without a GPU runs one job at a time)."""

    name: str
    folder: Path
    arguments: tuple[str, ...]
    cards: int = 1


class Lost(Exception):
    """The host of a job is gone, or its process there: the job is to be run again."""


class Place(abc.ABC):
    """A host: `name` for people, `cards` that it has (1 without a GPU)."""

    def __init__(self, name: str, cards: int):
        self.name, self.cards, self.alive = name, cards, True
        self.free = list(range(cards))  # the queue's to take and give back

    @abc.abstractmethod
    def run(self, job: Job, cards: Sequence[int], closed: Callable[[], bool]) -> int:
        """Runs a job on these cards to its end and returns its exit code; asks it to end once `closed()`. Raises Lost."""


class ThisMachine(Place):
    """The GPUs that are visible here."""

    def __init__(self):
        self._gpus = visible()
        super().__init__("", max(1, len(self._gpus)))

    def run(self, job: Job, cards: Sequence[int], closed: Callable[[], bool]) -> int:
        environment = dict(os.environ)
        if len(self._gpus) > 1:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(self._gpus[card] for card in cards)
        return run_job(job.folder, job.arguments, environment, closed, shown=self.cards == 1)


def run_job(
    folder: Path, arguments: Sequence[str], environment: Mapping[str, str], closed: Callable[[], bool], *, shown: bool = False
) -> int:  # fmt: skip
    """Runs `fp8lab ARGUMENTS` on the profile in `folder`, into its run folder and log, and with `shown` to this terminal too;
    returns its exit code."""
    command = [sys.executable, "-m", "fp8lab.cli", *arguments]
    command += ["--profile", str(folder / _PROFILE), "--run", str(folder / _RUN)]
    return _run(command, folder / _LOG, environment, closed, shown=shown)


def _run(
    command: Sequence[str], log: Path, environment: Mapping[str, str], closed: Callable[[], bool], *, shown: bool
) -> int:  # fmt: skip
    """Runs a command whose output goes into `log`. The process holds the end of a pipe from this one and ends when that does,
    however it does."""
    # Read back from the file: a pipe would stay open for as long as anything that the job leaves behind.
    with open(log, "ab") as output, open(log, encoding="utf-8", errors="replace") as said:
        said.seek(0, os.SEEK_END)
        tied = {**environment, TIED: "1"}
        process, asked = subprocess.Popen(command, env=tied, stdin=subprocess.PIPE, stdout=output, stderr=output), False
        try:
            with process.stdin:
                while (exit_code := process.poll()) is None:
                    if closed() and not asked:  # once: a second signal would end what it does to end well
                        asked = True
                        process.terminate()
                    time.sleep(_LOOK_S)
                    _show(said, shown)
        finally:
            # An interruption closed the pipe, and with it the job ends by itself, its servers first.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_END_S)
        _show(said, shown)
    return exit_code


def _show(said: TextIO, shown: bool) -> None:
    if shown:
        print(said.read(), end="", file=sys.stderr, flush=True)


def end_with_owner() -> None:
    """Lets this process end, as by SIGTERM, when the batch that started it is gone; does nothing in any other."""
    if os.environ.pop(TIED, None):
        threading.Thread(target=_wait_for_the_owners_end, daemon=True).start()


def _wait_for_the_owners_end() -> None:
    with contextlib.suppress(OSError):
        while os.read(0, 1):
            pass
    os.kill(os.getpid(), signal.SIGTERM)


class RayHost(Place):
    """A node of a Ray cluster. Its jobs write into the batch's folder where the node sees that, or into a folder of its own
    there, to which the run travels, and from which it comes back whole when the job ends."""

    def __init__(self, ray, node: Mapping, number: int):
        self._ray, self._node = ray, node["NodeID"]
        self._gpus = int(node["Resources"].get("GPU", 0))
        self.shared = False
        super().__init__(f"host {number}", max(1, self._gpus))

    def ask(self, function, *arguments, gpus: int = 0):
        """A call of `function` on this node, not waited for."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(self._node, soft=False)
        options = {"num_cpus": 0, "num_gpus": gpus, "max_retries": 0, "scheduling_strategy": here}
        return self._ray.remote(**options)(function).remote(*arguments)

    def run(self, job: Job, cards: Sequence[int], closed: Callable[[], bool]) -> int:
        ray, asked = self._ray, len(cards) if self._gpus else 0
        profile = (job.folder / _PROFILE).read_text()
        folder = str(job.folder) if self.shared else ""
        held = None if self.shared else _packed(job.folder / _RUN)
        running = self.ask(
            _on_a_node, job.name, profile, job.arguments, folder, held, "OMP_NUM_THREADS" in os.environ, gpus=asked
        )
        cancelled = False
        try:
            while not ray.wait([running], timeout=_LOOK_S)[0]:
                if closed() and not cancelled:
                    ray.cancel(running, force=False)
                    cancelled = True
            exit_code, log, packed = ray.get(running)
        except (ray.exceptions.TaskCancelledError, KeyboardInterrupt):
            return 128 + signal.SIGINT
        except ray.exceptions.RayTaskError as error:
            raise BadInput(f"{job.name} could not be run on {self.name}: {error.cause or error}") from None
        except ray.exceptions.RayError as error:  # the node or its worker died, or cannot be reached any more
            self.alive = self._node in {node["NodeID"] for node in ray.nodes() if node["Alive"]}
            raise Lost(f"{self.name} was lost ({type(error).__name__})") from None
        if packed is not None:
            with open(job.folder / _LOG, "ab") as file:
                file.write(log)
            _unpack(packed, job.folder / _RUN)
        return exit_code


def _on_a_node(
    name: str, profile: str, arguments: Sequence[str], folder: str, held: bytes | None, threads: bool
) -> tuple[int, bytes, bytes | None]:
    """What Ray runs on a node: the job, in `folder`, which the driver sees too, or ("") in one of this node's own, which begins
    as the driver's run folder, `held`; then also the log and the packed run folder. Nothing of that stays here. `threads`:
    OMP_NUM_THREADS is the driver's wish."""
    environment = dict(os.environ)
    if not threads:
        environment.pop("OMP_NUM_THREADS", None)  # Ray's, for a task without CPUs of its own
    if folder:
        return run_job(Path(folder), arguments, environment, lambda: False), b"", None
    (cache_dir() / "batches").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=cache_dir() / "batches") as scratch:
        own = Path(scratch)
        (own / _PROFILE).write_text(profile)
        _unpack(held, own / _RUN)
        exit_code = 128 + signal.SIGINT
        with contextlib.suppress(KeyboardInterrupt):  # cancelled: what it has measured goes back all the same
            exit_code = run_job(own, arguments, environment, lambda: False)
        return exit_code, (own / _LOG).read_bytes(), _packed(own / _RUN)


def _packed(folder: Path) -> bytes:
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w:xz") as archive:
        if folder.is_dir():
            archive.add(folder, ".")
    return held.getvalue()


def _unpack(packed: bytes, target: Path) -> None:
    """Puts a packed run folder, if it holds one, in the place of what is there, whole or not at all."""
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
            archive.extractall(f"{scratch}/run", filter="data")
        if not os.path.isdir(f"{scratch}/run"):
            return  # there was none
        put_in_place(Path(scratch, "run"), target)


def _software() -> dict[str, str]:
    """What a host measures with: a digest of this library, and the packages that matter."""
    return {"fp8lab": digest(), **versions()}


def ray_hosts(address: str, folder: Path) -> list[Place]:
    """The hosts of the Ray cluster at `address`. Raises BadInput when Ray is not installed or not reached, or when a host has
    other software than this one."""
    try:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray
    except ImportError:
        raise BadInput(
            "Ray is not installed here: `pip install ray` in the environment of every host, then `ray start`"
        ) from None
    remedy = "`ray start --head` there prints its address"
    host, colon, port = address.rpartition(":")
    if colon and "/" not in address:
        # Ray itself would try for five minutes, and then end this process.
        try:
            socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S).close()
        except (OSError, ValueError) as error:
            raise BadInput(f"no Ray cluster at {address!r}: {error}; {remedy}") from None
    try:
        ray.init(address=address, log_to_driver=False, configure_logging=False, ignore_reinit_error=True)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadInput(f"no Ray cluster at {address!r}: {first[:200]}; {remedy}") from None
    able = [n for n in ray.nodes() if n["Alive"] and (n["Resources"].get("CPU") or n["Resources"].get("GPU"))]
    in_order = sorted(able, key=lambda node: node["NodeID"])
    hosts = [RayHost(ray, node, number) for number, node in enumerate(in_order, start=1)]
    if not hosts:
        raise BadInput(f"no host of the Ray cluster at {address!r} takes work: none has a CPU or a GPU to give")
    token = folder / f".seen-{os.getpid()}"
    token.write_text(digest())
    try:
        mine = _software()
        for host in hosts:
            theirs, host.shared = ray.get([host.ask(_software), host.ask(_sees, str(token))], timeout=_END_S)
            if differing := sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key)):
                each = (f"{key} {mine.get(key, 'none')} here, {theirs.get(key, 'none')} there" for key in differing)
                raise BadInput(f"{host.name} has other software: {'; '.join(each)}; install the same on every host")
            where = "its runs lie in the shared folder" if host.shared else "its runs come back when they end"
            gpus = f"{host.cards} GPU{'s' * (host.cards > 1)}" if host._gpus else "no GPU"
            print(f"{host.name}: {gpus}; {where}", file=sys.stderr, flush=True)
    except ray.exceptions.RayError as error:
        raise BadInput(
            f"a host of the cluster does not answer ({type(error).__name__}); is fp8lab installed there?"
        ) from None
    finally:
        token.unlink(missing_ok=True)
    return hosts


def _sees(path: str) -> bool:
    with contextlib.suppress(OSError):
        return Path(path).read_text() == digest()
    return False
