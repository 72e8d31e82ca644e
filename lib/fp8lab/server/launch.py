"""One vLLM server as a subprocess: its command, its start, its readiness, its end."""

import atexit
import contextlib
import dataclasses
import importlib.metadata
import json
import os
import secrets
import shlex
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path

import httpx

from .. import gpu
from ..errors import BadInput, ServerFailed
from ..models import model_folder, packaged_model
from ..paths import cache_dir
from ..profiles import Profile, check_device
from ..progress import StatusLine
from ..provenance import portable
from ..tables import Table
from . import leftovers, log

HOST = "127.0.0.1"
EXECUTOR = "fp8lab.server.emulated_gpu.EmulatedGpuExecutor"
SETTINGS_VARIABLE = "FP8LAB_EMULATED_GPU"
_STOP_GRACE_S = 10.0
_MEMORY_TOLERANCE_GIB = 1.0


@dataclasses.dataclass(frozen=True)
class ServerInfo:
    """What a start came to: the exact command, what vLLM reports of memory, and the seconds it took."""

    variant: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    startup_s: float
    kv_cache_tokens: int | None
    model_memory_gib: float | None
    emulated: bool

    def rows(self) -> list[tuple[str, str]]:
        """For a table: what the start came to."""
        return [
            ("KV cache", f"{self.kv_cache_tokens:,} tokens" if self.kv_cache_tokens else "not reported"),
            ("model memory", f"{self.model_memory_gib:.2f} GiB" if self.model_memory_gib else "not reported"),
            ("start-up", f"{self.startup_s:.0f} s"),
        ]


def served_model(profile: Profile, variant: str) -> str:
    """The folder or hub name that vLLM loads: built here, converted from a package, or the profile's checkpoint."""
    if profile.model.weights == "checkpoint":
        return profile.model.checkpoint(variant)
    folder = model_folder if profile.model.weights == "random" else packaged_model
    return str(folder(profile.model.shapes))


def build_command(profile: Profile, variant: str, *, port: int = 8000, served_name: str | None = None) -> list[str]:
    """The vLLM command line of `variant`. Emulated, it is the GPU's command plus one executor flag."""
    flags = profile.variant_flags(variant)
    model = served_model(profile, variant)
    load = ["--load-format", "dummy"] if profile.model.weights == "random" else []
    executor = ["--distributed-executor-backend", EXECUTOR] if profile.emulated else []
    name = ["--served-model-name", served_name] if served_name else []
    address = ["--host", HOST, "--port", str(port)]
    command = [sys.executable, "-m", *_entry_point(), "--model", model, *load, *flags]
    return [*command, *profile.server.flags, *address, *name, *executor]


def build_environment(profile: Profile, variant: str) -> dict[str, str]:
    """The variables that the server needs beyond this process's own; no secret among them."""
    environment = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", **profile.server.env}
    environment |= profile.variant_env.get(variant, {})
    if profile.model.weights != "checkpoint":
        environment["HF_HUB_OFFLINE"] = "1"
    if profile.emulated:
        settings = dataclasses.asdict(profile.gpu) | dataclasses.asdict(profile.emulation)
        environment[SETTINGS_VARIABLE] = json.dumps(settings)
    return environment


def printable_command(profile: Profile, variant: str, port: int = 8000) -> str:
    """The command with its environment, to be pasted into a shell."""
    environment = [f"{key}={shlex.quote(value)}" for key, value in build_environment(profile, variant).items()]
    return " ".join([*environment, shlex.join(build_command(profile, variant, port=port))])


class Server:
    """A running vLLM server. Stop it with `stop()` or by leaving its `with` block; either may happen twice."""

    def __init__(self, profile: Profile, variant: str, port: int, log_path: Path):
        self.profile, self.variant, self.log_path = profile, variant, log_path
        self.base_url = f"http://{HOST}:{port}"
        self.model = f"{variant}-{secrets.token_hex(4)}"
        self.api_key = secrets.token_urlsafe(32)
        self.info: ServerInfo | None = None
        self._port = port
        self._exit_code: int | None = None
        self._watchdog: subprocess.Popen | None = None
        self._memory_before = gpu.memory_used_gib() if profile.device == "cuda" else None
        self._http = httpx.Client(
            base_url=self.base_url, headers={"Authorization": f"Bearer {self.api_key}"}, timeout=30, trust_env=False
        )

    def metrics(self) -> str:
        """vLLM's own counters, in Prometheus' text format. Raises OSError when the server does not answer."""
        try:
            return self._http.get("/metrics").raise_for_status().text
        except httpx.HTTPError as error:
            raise OSError(f"no metrics from {self.base_url}: {error}") from error

    @property
    def alive(self) -> bool:
        return self._watchdog is not None and self._watchdog.poll() is None

    def pids(self) -> tuple[int, ...]:
        """Every process of this server, the watchdog excluded."""
        watchdog = self._watchdog.pid if self._watchdog else None
        return tuple(
            p for server in leftovers.servers() if server.id == self.model for p in server.pids if p != watchdog
        )

    def stop(self) -> None:
        """Ends the server and everything that it started; waits until the GPU's memory is free again."""
        if self._watchdog is None:
            return
        watchdog, self._watchdog = self._watchdog, None
        watchdog.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            watchdog.wait(_STOP_GRACE_S + 10)
        # Nothing is left unless the watchdog itself was killed; then this finds it.
        leftovers.stop_id(self.model)
        watchdog.kill()
        watchdog.wait()
        watchdog.stdout.close()
        self._http.close()
        atexit.unregister(self.stop)
        self._wait_for_memory()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_exc) -> None:
        self.stop()

    def _table(self) -> Table:
        rows = [("state", "running" if self.alive else "stopped"), ("address", self.base_url)]
        rows += self.info.rows() if self.info else []
        emulated = " (EMULATED GPU)" if self.profile.emulated else ""
        caption = f"vLLM server, variant {self.variant}, profile {self.profile.name}{emulated}"
        return Table(caption, ("", "as vLLM reports it"), rows)

    def __repr__(self) -> str:
        return repr(self._table())

    def _repr_html_(self) -> str:
        return self._table()._repr_html_()

    def _start(self, status: StatusLine) -> None:
        command = build_command(self.profile, self.variant, port=self._port, served_name=self.model)
        extra = build_environment(self.profile, self.variant)
        mark = leftovers.mark(id=self.model, variant=self.variant, profile=self.profile.name, port=self._port)
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        self.log_path.write_bytes(b"")
        started = time.monotonic()
        watchdog = Path(__file__).with_name("watchdog.py")
        self._watchdog = subprocess.Popen(
            [sys.executable, str(watchdog), "--log", str(self.log_path), "--grace", str(_STOP_GRACE_S), "--", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # The key travels in the environment: vLLM prints its arguments into the log.
            # setproctitle, which vLLM uses, would otherwise overwrite the environment that carries the mark.
            env={**os.environ, **extra, "VLLM_API_KEY": self.api_key, leftovers.MARK: mark, "SPT_NOENV": "1"},
            start_new_session=True,
        )
        atexit.register(self.stop)
        try:
            self._wait_until_ready(command, started, status)
        except BaseException:
            self.stop()
            raise
        seconds = time.monotonic() - started
        said = log.reported(log.read(self.log_path))
        self.info = ServerInfo(
            self.variant,
            tuple(portable(argument) for argument in command),
            extra,
            seconds,
            said.kv_cache_tokens,
            said.model_memory_gib,
            self.profile.emulated,
        )

    def _wait_until_ready(self, command: list[str], started: float, status: StatusLine) -> None:
        deadline = started + self.profile.server.start_timeout_s
        while not self._answers():
            seconds = time.monotonic() - started
            reached = log.phase(log.read(self.log_path))
            status.update(f"{self.variant}: {reached}", f"{seconds:.0f} s")
            if not self.alive:
                code = self._watchdog.stdout.read().decode().rpartition("exited ")[2].strip()
                raise ServerFailed(self._failure(command, f"ended with exit code {code or 'unknown'}", seconds))
            if time.monotonic() > deadline:
                how = f"was not ready within {self.profile.server.start_timeout_s:.0f} s (last phase: {reached})"
                raise ServerFailed(self._failure(command, how, seconds))
            time.sleep(0.25)

    def _answers(self) -> bool:
        """Whether this very server is ready: healthy, serving this start's name, able to complete."""
        try:
            if self._http.get("/health").status_code != 200:
                return False
            served = [model["id"] for model in self._http.get("/v1/models").raise_for_status().json()["data"]]
            if served != [self.model]:
                raise ServerFailed(f"port {self._port} answers for {served}, not for this start's {self.model!r}")
            body = {"model": self.model, "prompt": " time", "max_tokens": 2, "ignore_eos": True}
            return self._http.post("/v1/completions", json=body).raise_for_status().is_success
        except httpx.TransportError:
            return False
        except httpx.HTTPStatusError as error:
            message = f"port {self._port} refused this start's requests: {error.response.status_code}"
            raise ServerFailed(f"{message} {error.response.text[:300]}; see {self.log_path}") from None

    def _failure(self, command: list[str], how: str, seconds: float) -> str:
        telling, remedy = log.root_cause(log.read(self.log_path))
        lines = [f"the {self.variant} server {how}, {seconds:.0f} s after its start", *(f"    {t}" for t in telling)]
        lines += [f"what to do: {remedy}"] if remedy else []
        return "\n".join([*lines, f"log: {self.log_path}", f"command: {shlex.join(command)}"])

    def _wait_for_memory(self, timeout_s: float = 30.0) -> None:
        if self._memory_before is None:
            return
        deadline = time.monotonic() + timeout_s
        while (left := gpu.memory_used_gib() - self._memory_before) > _MEMORY_TOLERANCE_GIB:
            if time.monotonic() > deadline:
                warnings.warn(f"{left:.1f} GiB of GPU memory are still in use after the server ended", stacklevel=3)
                return
            time.sleep(0.25)


def start_server(
    profile: Profile, variant: str, *, port: int | None = None, log_path: str | Path | None = None
) -> Server:
    """Starts a server of `variant` and returns when it has completed its first request.

    `port` is chosen if not given; `log_path` takes vLLM's output (default: the user's cache folder).
    The server ends with `stop()`, with its `with` block, and with this process, however that ends.
    Raises BadInput for an unknown variant or a taken port, ServerFailed when the start fails.
    """
    profile.variant_flags(variant)
    check_device(profile)
    if port is not None and not _port_is_free(port):
        raise BadInput(f"port {port} is taken on {HOST}; choose another, or leave it out to have a free one chosen")
    for other in leftovers.servers():
        if not other.owned:
            warnings.warn(f"a server of an earlier run is still there ({other.variant}, pids {other.pids}); "
                          "end it with `fp8lab stop`", stacklevel=2)  # fmt: skip
    port = port or _free_port()
    log_path = Path(log_path or cache_dir() / "logs" / f"{profile.name}-{variant}-{port}.log")
    server = Server(profile, variant, port, log_path)
    status = StatusLine()
    server._start(status)
    kv = f"{server.info.kv_cache_tokens:,} tokens of KV cache" if server.info.kv_cache_tokens else "ready"
    status.done(f"{variant} ready after {server.info.startup_s:.0f} s, {kv}")
    return server


def _entry_point() -> list[str]:
    """The module to run. The CPU build's distribution has another name, which breaks vLLM's own CLI."""
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return ["vllm.entrypoints.openai.api_server"]
    return ["vllm.entrypoints.cli.main", "serve"]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def _port_is_free(port: int) -> bool:
    if not 0 < port < 65536:
        raise BadInput(f"port {port} is not between 1 and 65535")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True
