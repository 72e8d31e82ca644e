"""One vLLM server as a subprocess: its start, its readiness, its health, its end."""

import atexit
import contextlib
import http.client
import json
import math
import secrets
import shlex
import socket
import subprocess
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from ..config.dimensions import cards, pipeline_stages, replicas, weight_format
from ..config.flags import flag_of, secret_texts
from ..config.profile import Profile, interpreter
from ..config.this_machine import check_device, check_environment
from ..errors import InUse, ServerFailed, Stopped
from ..metrics.summary import ServerInfo
from ..paths import cache_dir, nameless, portable, writing
from ..results.provenance import software_of
from ..system import gpu
from ..system.locks import Lock, Scratch
from ..ui import Shown, StatusLine, Table
from . import log, processes, watchdog
from .command import HOST, build_command, build_environment, make_checkpoint, surroundings

_STOP_GRACE_S = 10.0
_MEMORY_TOLERANCE_GIB = 1.0
_MEMORY_WAIT_S = 30.0
# Weights take what their format says, and a little for padding and tables beside them.
_MORE_WEIGHTS, _MORE_WHEN_READ, _TABLES_GIB = 1.03, 1.1, 0.05
# A busy API server answers a probe late; one that is silent for so long hangs.
_PROBE_S, _HANG_S = 4.0, 60.0
_MAX_REPLY_BYTES = 4 << 20


class Served(Shown):
    """A server in a cell and in a `with` block: subclasses say what `_table()` it is and how it is to `stop()`."""

    def __enter__(self):
        return self

    def __exit__(self, *_exc) -> None:
        self.stop()


class Server(Served):
    """A running vLLM server. Stop it with `stop()` or by leaving its `with` block; either may happen twice."""

    def __init__(self, profile: Profile, variant: str, port: int, log_path: Path):
        self.profile, self.variant, self.port, self.log_path = profile, variant, port, log_path
        self.base_url = f"http://{HOST}:{port}"
        self.model = f"{variant}{profile.emulated_mark}-{secrets.token_hex(4)}"
        self.api_key = secrets.token_urlsafe(32)
        self.info: ServerInfo | None = None
        self._watchdog: subprocess.Popen | None = None
        self._gpu_locks: list[Lock] = []
        self.cards = cards(profile.flags(variant))
        self._gpu_pids: set[int] = set()
        self._idle_pids: set[int] = set()
        self._processes: list[psutil.Process] = []
        self._memory_before: float | None = None
        self._secrets: list[str] = []
        self._scratch: Scratch | None = None
        self._heard_at = 0.0
        self._stopping = self._ended = False

    def metrics(self) -> str:
        """vLLM's own counters, in Prometheus' text format. Raises OSError when the server does not answer."""
        try:
            status, text = self.ask("GET", "/metrics")
        except OSError as error:
            raise OSError(f"no metrics from {self.base_url}: {error}") from error
        if status != 200:
            raise OSError(f"no metrics from {self.base_url}: HTTP {status}")
        return text

    def ask(self, method: str, path: str, *, within: float = _PROBE_S, **options) -> tuple[int, str]:
        """(status, text) of a request with this start's key; for `options` and errors see `ask`."""
        return ask(self.port, method, path, key=self.api_key, within=within, **options)

    @property
    def alive(self) -> bool:
        return self._watchdog is not None and not self._stopping and self._watchdog.poll() is None

    def problem(self) -> str | None:
        """Why this server cannot be measured any more, in words; None while it can. Takes up to 4 s, and may be
        called beside a running load: a busy server is no problem, one that stays silent for a minute is."""
        if self._watchdog is None or self._stopping:
            return "the server was stopped"
        if code := self._watchdog.poll():
            return f"the server's watchdog was killed or failed (exit code {code}); stop the server and start it again"
        if code == 0:
            return f"the server died; its log: {self.log_path.name}"
        for process in self._processes:
            with contextlib.suppress(psutil.Error):
                if process.status() == psutil.STATUS_STOPPED:
                    return f"the server's process {process.pid} was suspended (SIGSTOP)"
        if said := self._gpu_problem():
            return said
        try:
            status, text = self.ask("GET", "/health")
        except ConnectionRefusedError:
            # One that has died refuses them before its watchdog has told.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._watchdog.wait(_PROBE_S / 2)
                return self.problem()
            return "the server refuses connections"
        except OSError as error:
            silent = time.monotonic() - self._heard_at
            return f"the server did not answer for {silent:.0f} s ({error})" if silent > _HANG_S else None
        self._heard_at = time.monotonic()
        said = f"the server's EngineCore failed: /health answers {status} {text[:200]}"
        return None if status == 200 else said.strip()

    def exit_code(self) -> str:
        """The exit code of a server that has died, as its watchdog tells it, or "unknown". It tells once."""
        return self._watchdog.stdout.read().decode().rpartition("exited ")[2].strip() or "unknown"

    def log(self) -> str:
        """What the server wrote so far, without the secrets that it was given."""
        return log.read(self.log_path, self._secrets)

    def _gpu_problem(self) -> str | None:
        if not self._gpu_locks:
            return None
        if self._memory_before is not None and gpu.memory_used_gib(self.cards) is None:
            return "the GPU cannot be read any more: the card or its driver is lost; see `nvidia-smi` and `dmesg`"
        others, _, _ = processes.others_on_gpu(self._gpu_pids, self._idle_pids, self._memory_before, cards=self.cards)
        return f"another job came onto the GPU: {'; '.join(others)}" if others else None

    def pids(self) -> tuple[int, ...]:
        """Every process of this server, the watchdog excluded."""
        watchdog = self._watchdog.pid if self._watchdog else None
        found = processes.find(self.model)
        return tuple(pid for pid in found.pids if pid != watchdog) if found else ()

    def stop(self) -> None:
        """Ends the server and everything that it started; waits until the GPU's memory is free again. After an
        interruption another call goes on where it was; the server itself ends without one."""
        if self._ended:
            return
        self._stopping = True
        try:
            self._end_processes()
            self._wait_for_memory()
            self._ended = True
            atexit.unregister(self.stop)
        finally:
            # Until the server has ended, its watchdog holds the GPU's lock too.
            for lock in self._gpu_locks:
                lock.release()

    def _end_processes(self) -> None:
        if guard := self._watchdog:
            guard.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                guard.wait(_STOP_GRACE_S + 5)
        # Nothing is left unless the watchdog was killed, or interrupted while it was started; then this finds it.
        if left := processes.find(self.model):
            processes.stop(left)
        if guard:
            guard.kill()
            guard.wait()
            guard.stdout.close()
            if guard.returncode:  # killed, before it did this
                watchdog.blot_out(str(self.log_path), self._secrets)
        if self._scratch:
            self._scratch.remove()

    def _table(self) -> Table:
        rows = [("state", "running" if self.alive else "stopped"), ("address", self.base_url)]
        rows += self.info.rows() if self.info else []
        emulated = " (EMULATED GPU)" if self.profile.emulated else ""
        caption = f"vLLM server, variant {self.variant}, profile {self.profile.name}{emulated}"
        return Table(caption, ("", "as vLLM reports it"), rows)

    def _start(self, status: StatusLine) -> None:
        """Returns when the server is ready; however else it ends, nothing of the server is left."""
        atexit.register(self.stop)
        try:
            if self.profile.device == "cuda":
                what = f"{self.variant} of profile {self.profile.name}"
                processes.check_cards(what, self.cards)
                self._gpu_locks = processes.take_gpus(what, self.cards)
            make_checkpoint(self.profile, self.variant)
            command = build_command(self.profile, self.variant, port=self.port, served_name=self.model)
            extra = build_environment(self.profile, self.variant)
            started = time.monotonic()
            self._launch(command, extra)
            _wait_until_ready(self, command, started, status)
            self._take_stock(command, extra, time.monotonic() - started)
            kv = f"{self.info.kv_cache_tokens:,} tokens of KV cache" if self.info.kv_cache_tokens else "ready"
            status.done(f"{self.variant} ready after {self.info.startup_s:.0f} s, {kv}")
        except BaseException:
            self.stop()
            raise

    def _launch(self, command: list[str], extra: Mapping[str, str]) -> None:
        mark = processes.mark(id=self.model, variant=self.variant, profile=self.profile.name, port=self.port)
        # The key travels in the environment: vLLM prints its arguments into the log.
        # setproctitle, which vLLM uses, would otherwise overwrite the environment that carries the mark.
        environment = {
            **surroundings(extra, self.profile.variant(self.variant).python),
            **extra,
            "VLLM_API_KEY": self.api_key,
            processes.MARK: mark,
            "SPT_NOENV": "1",
        }
        self._secrets = secret_texts(environment)
        with writing(self.log_path):
            self.log_path.parent.mkdir(parents=True, exist_ok=True)
            self.log_path.write_bytes(b"")
        if self._gpu_locks:
            self._memory_before = gpu.memory_used_gib(self.cards)
            self._idle_pids = set(gpu.occupants(self.cards))
        # vLLM leaves its sockets behind, three at each start; here they go with their folder.
        self._scratch = Scratch(for_sockets=True)
        environment["VLLM_RPC_BASE_PATH"] = self._scratch.path
        # Should this process die, the GPU stays locked until the server has ended.
        held = [lock.fd for lock in (self._scratch, *self._gpu_locks)]
        self._watchdog = watchdog.popen(
            command, environment, self.log_path,
            grace_s=_STOP_GRACE_S, options=("--scratch", self._scratch.path), held=held,
        )  # fmt: skip

    def _take_stock(self, command: list[str], extra: Mapping[str, str], seconds: float) -> None:
        """What the ready server is: its processes, those on the GPU, what it says of memory. Raises InUse when another
        job came onto the GPU meanwhile."""
        for pid in self.pids():
            with contextlib.suppress(psutil.NoSuchProcess):  # a helper that has ended since
                self._processes.append(psutil.Process(pid))
        doubt = self._take_stock_of_gpu() if self._gpu_locks else ""
        self._heard_at = time.monotonic()
        said = log.reported(self.log())
        python = self.profile.variant(self.variant).python
        self.info = ServerInfo(
            variant=self.variant, command=(interpreter(python), *map(portable, command[1:])),
            environment={name: nameless(value) for name, value in extra.items()},
            software=software_of(python) if python else {}, startup_s=seconds,
            **said, weights_doubt=self._weights_doubt(said["model_memory_gib"]),
            emulated=self.profile.emulated, gpu_doubt=doubt, cards=self.cards, replicas=replicas(command),
        )  # fmt: skip

    def _weights_doubt(self, gib: float | None) -> str:
        """Why weights that take so much of the card are not in the variant's format, or "": vLLM serves a checkpoint whose
        quantisation it does not apply in BF16, and says nothing."""
        shape = self.profile.shape(self.variant)
        if self.profile.device != "cuda" or gib is None or shape is None:
            return ""
        flags = self.profile.flags(self.variant)
        asked = weight_format(flags, shape)
        # A card of several stages (pipeline parallel) has its layers, and the first or the last one the whole vocabulary.
        shared, stages = cards(flags) // replicas(flags), pipeline_stages(flags)
        vocabulary = (shape.weight_bytes(asked) - shape.layer_parameters * asked.weight_bytes) / (shared // stages)
        expected = (shape.layer_parameters * asked.weight_bytes / shared + vocabulary) / 2**30
        # Weights that are quantised while they are read leave a layer's BF16 ones behind, for which memory stays taken.
        more = _MORE_WHEN_READ if flag_of(flags, "--quantization") != "auto" else _MORE_WEIGHTS
        if gib <= more * expected + _TABLES_GIB:
            return ""
        return f"its weights take {gib:.2f} GiB, {asked.name} ones {expected:.2f}: vLLM serves another format than was asked for"

    def _take_stock_of_gpu(self) -> str:
        """Notes which of the GPU's processes are this server's; returns why that is not certain, or ""."""
        mine = {process.pid for process in processes.with_descendants(self.pids())}
        before, opened = (self._idle_pids, self._memory_before), processes.cuda_processes(mine)
        others, self._gpu_pids, doubt = processes.others_on_gpu(mine, *before, opened, self.cards)
        if others:
            self._memory_before = None  # what stays in use is theirs
            raise InUse(
                f"another job came onto the GPU while the {self.variant} server started: {'; '.join(others)}; wait until "
                "it has ended, or choose another card (CUDA_VISIBLE_DEVICES)"
            )
        return doubt

    def _wait_for_memory(self) -> None:
        if self._memory_before is None:
            return
        deadline = time.monotonic() + _MEMORY_WAIT_S
        allowed = self._memory_before + self.cards * _MEMORY_TOLERANCE_GIB
        while (used := gpu.memory_used_gib(self.cards)) is not None and used > allowed:
            if time.monotonic() > deadline:
                left = used - self._memory_before
                warnings.warn(f"{left:.1f} GiB of GPU memory are still in use after the server ended", stacklevel=3)
                return
            time.sleep(0.25)
        if used is None:
            warnings.warn("the GPU cannot be read: whether its memory is free again is unknown", stacklevel=3)


def start_server(
    profile: Profile, variant: str, *, port: int | None = None, log_path: str | Path | None = None
) -> Server:
    """Starts a server of `variant` and returns when it has completed its first request.

    The checkpoint of a variant that has a recipe is made first; it takes as many GPUs as its parallel sizes say, the first
    ones. `port` is chosen if not given; `log_path` takes vLLM's output (default: the user's cache folder). The server ends with
    `stop()`, with its `with` block, and with this process, however that ends. Raises BadInput for an unknown variant or a
    secret among its flags, InUse for a taken port or GPU, ServerFailed when the start fails, Stopped when it is interrupted.
    """
    profile.variant(variant)
    check_device(profile)
    check_environment(profile)
    if port is not None:
        processes.check_port(port)
    processes.warn_of_leftovers()
    port = port or processes.free_port()
    log_path = Path(log_path or cache_dir() / "logs" / f"{profile.name}-{variant}-{port}.log")
    server = Server(profile, variant, port, log_path)
    status = StatusLine()
    try:
        server._start(status)
        return server
    except KeyboardInterrupt:
        server.stop()  # the first stop may have been interrupted too
        status.done(f"{variant}: stopped while it started")
        raise Stopped(f"the {variant} server had not started, nothing of it is left; run the same again") from None


def _wait_until_ready(server: "Server", command: Sequence[str], started: float, status: StatusLine) -> None:
    """Returns when `server`, started with `command` at `started` (monotonic), is ready, showing its phase meanwhile.
    Raises ServerFailed, with the log's root cause, when it has died or its profile's time for a start is over."""
    within = server.profile.server.start_timeout_s
    while not _answers(server, started + within):
        seconds = time.monotonic() - started
        reached = log.phase(log.read(server.log_path))
        status.update(f"{server.variant}: {reached}", f"{seconds:.0f} s")
        if not server.alive:
            raise ServerFailed(_failure(server, command, f"ended with exit code {server.exit_code()}", seconds))
        if seconds > within:
            how = f"was not ready within {within:.0f} s (last phase: {reached})"
            raise ServerFailed(_failure(server, command, how, seconds))
        time.sleep(0.25)


def _answers(server: "Server", deadline: float) -> bool:
    """Whether this very server is ready."""

    def patience(at_most: float = math.inf) -> float:
        return min(at_most, max(1.0, deadline - time.monotonic()))

    try:
        if server.ask("GET", "/health", within=patience(_PROBE_S))[0] != 200:
            return False
        status, text = server.ask("GET", "/v1/models", within=patience(_PROBE_S))
        served = _served_names(text) if status == 200 else None
        if served != [server.model]:
            said = f"models {served}" if served is not None else f"HTTP {status}: {text[:300]}"
            who = processes.listener(server.port)
            raise ServerFailed(
                f"port {server.port} is held by {who} and answers {said}, not this start's {server.model!r}; "
                f"end that process, or choose another port (log: {server.log_path})"
            )
        body = {"model": server.model, "prompt": " time", "max_tokens": 2, "ignore_eos": True}
        status, text = server.ask("POST", "/v1/completions", body=body, within=patience())
    except OSError:
        return False
    if status != 200:
        raise ServerFailed(f"the first completion was refused: HTTP {status} {text[:300]}; log: {server.log_path}")
    return True


def _served_names(text: str) -> list[str] | None:
    """The model names in a reply of /v1/models; None when it is no such reply."""
    try:
        return [model["id"] for model in json.loads(text)["data"]]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _failure(server: "Server", command: Sequence[str], how: str, seconds: float) -> str:
    telling, remedy = log.root_cause(server.log())
    lines = [f"the {server.variant} server {how}, {seconds:.0f} s after its start", *(f"    {t}" for t in telling)]
    lines += [f"what to do: {remedy}"] if remedy else []
    return "\n".join([*lines, f"log: {server.log_path}", f"command: {shlex.join(command)}"])


def ask(port: int, method: str, path: str, *, key: str, within: float, body: dict | None = None) -> tuple[int, str]:
    """(status, text) of a server's reply on this machine; a text beyond 4 MiB is cut there. Raises
    ConnectionRefusedError where nobody listens, another OSError for what is no HTTP reply within `within` seconds."""
    connection, begun = http.client.HTTPConnection(HOST, port, timeout=within), time.monotonic()
    connection.connect()
    # The timeout is that of each read: a reply that drips would go on as long as it likes.
    late = threading.Timer(within, _shut, [connection.sock])
    late.start()
    try:
        content = None if body is None else json.dumps(body)
        headers = {"Authorization": f"Bearer {key}", "Connection": "close", "Content-Type": "application/json"}
        connection.request(method, path, content, headers)
        reply = connection.getresponse()
        text = reply.read(_MAX_REPLY_BYTES)
    except http.client.HTTPException as error:
        raise OSError(f"no HTTP reply: {error!r}") from None
    finally:
        late.cancel()
        connection.close()
        if time.monotonic() - begun >= within:
            raise TimeoutError("timed out")
    return reply.status, text.decode(errors="replace")


def _shut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it has ended meanwhile
        connection.shutdown(socket.SHUT_RDWR)
