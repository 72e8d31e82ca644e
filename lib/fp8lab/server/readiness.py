"""When a server that was started is ready: healthy, serving this start's name, able to complete."""

import json
import math
import shlex
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import ServerFailed
from ..progress import StatusLine
from . import log, place
from .ask import PROBE_S

if TYPE_CHECKING:
    from .launch import Server


def wait(server: "Server", command: Sequence[str], started: float, status: StatusLine) -> None:
    """Returns when `server`, started with `command` at `started` (monotonic), is ready, showing its phase meanwhile.

    Raises ServerFailed, with the log's root cause, when it has died or its profile's time for a start is over.
    """
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
        if server.ask("GET", "/health", within=patience(PROBE_S))[0] != 200:
            return False
        status, text = server.ask("GET", "/v1/models", within=patience(PROBE_S))
        served = _served_names(text) if status == 200 else None
        if served != [server.model]:
            said = f"models {served}" if served is not None else f"HTTP {status}: {text[:300]}"
            who = place.listener(server.port)
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
