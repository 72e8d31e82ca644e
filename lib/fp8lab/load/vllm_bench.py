"""vLLM's own client, `vllm bench serve`, on the same server with the same trace: an independent cross-check."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from ..config.trace import Trace
from ..errors import LevelFailed
from ..server import watchdog
from ..system.locks import Scratch
from .endpoint import Endpoint
from .generator import busiest_second
from .worker import unwritable

# By module, not by command: the CPU build's distribution has another name, which breaks the command. Its limit on open
# files is raised, as this kit's own client's is.
_RUN = """
import argparse
from fp8lab.load.connection import raise_open_files
from vllm.benchmarks.serve import add_cli_args, main
raise_open_files()
parser = argparse.ArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
_TIMES = ("ttft_ms", "tpot_ms", "itl_ms")


def run(
    endpoint: Endpoint,
    trace: Trace,
    rate: float,
    *,
    tokenizer: str,
    seed: int = 0,
    burstiness: float = 1.0,
    time_dilation: float = 1.0,
    timeout_s: float = 3600.0,
) -> dict:
    """Offers `trace` at `rate` requests/s with vLLM's client; its result in this project's names, in model time. Its
    arrival times come from its own random numbers; a `burstiness` of inf makes them the same as ours.

    Keys: completed, failed, duration_s, request_throughput, output_token_throughput, output_tokens, mean/p99 of ttft,
    tpot and itl in ms, peak_concurrent_requests_vllm, and client_busiest_core (the largest share of a core over a
    second) with client_cpu_s. The client ends with this process, and goes to the endpoint directly, whatever proxy the
    environment names. Raises LevelFailed when it fails, completes nothing or takes over `timeout_s` wall seconds, and where
    the trace holds requests that it would leave out, repeating others in their place.
    """
    lengths = list(zip(trace.prompt_tokens, trace.output_tokens, strict=True))
    if odd := sum(not (4 <= p + 1 <= 1024 and o >= 4 and p + 1 + o <= 2048) for p, o in lengths):  # a BOS token more
        raise LevelFailed(
            f"vllm bench serve takes prompts of 4 to 1,024 tokens and 2,048 with the answer: {odd:,} of {len(lengths):,} "
            "requests are none, and it would repeat others for them"
        )
    with Scratch() as folder:
        dataset, result, log = (Path(folder, name) for name in ("trace.json", "result.json", "log"))
        try:
            dataset.write_text(json.dumps(trace.to_sharegpt(begin_tokens=1)))
            log.touch()
        except OSError as error:
            raise LevelFailed(f"vllm bench serve was not run: {unwritable(folder, error)}") from None
        command = [
            sys.executable, "-c", _RUN, "--backend", "openai", "--base-url", endpoint.origin,
            "--endpoint", endpoint.path, "--model", endpoint.model, "--tokenizer", tokenizer,
            "--dataset-name", "sharegpt", "--dataset-path", str(dataset), "--disable-shuffle",
            "--num-prompts", str(len(trace)), "--request-rate", str(rate / time_dilation), "--seed", str(seed), "--burstiness", str(burstiness),
            "--ignore-eos", "--disable-tqdm", "--percentile-metrics", "ttft,tpot,itl,e2el",
            "--save-result", "--result-dir", folder, "--result-filename", "result.json",
        ]  # fmt: skip
        environment = os.environ | {"OPENAI_API_KEY": endpoint.api_key or ""} | _unproxied(endpoint)
        deadline = time.monotonic() + timeout_s

        def result_of(*more: str) -> tuple[dict, list[tuple[float, float]]]:
            marks = _cpu_marks([*command, *more], environment, log, deadline)
            try:
                return json.loads(result.read_text()), marks
            except (OSError, ValueError):
                how = f"did not end within {timeout_s:.0f} s" if time.monotonic() > deadline else "failed"
                raise LevelFailed(f"vllm bench serve {how}: {log.read_text(errors='replace')[-800:]}") from None

        said, marks = result_of()
        if not said["completed"]:
            # Its reasons are in a detailed result alone, which takes it so long to write that its CPU time would not be true.
            one, _ = result_of("--num-prompts", "1", "--save-detailed")
            reasons = [error.strip() for error in one.get("errors", ()) if error] or ["no reason given"]
            reason = endpoint.without_secrets(reasons[0].splitlines()[-1])[:300]
            raise LevelFailed(f"vllm bench serve completed none of {len(trace)} requests: {reason}")
    return _in_our_names(said, marks, time_dilation)


def _unproxied(endpoint: Endpoint) -> dict[str, str]:
    """The variables by which aiohttp, and what else reads the environment, reaches the endpoint's host directly."""
    named = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    # A star means all hosts only where it stands alone.
    hosts = named if named == "*" else f"{named},{urlsplit(endpoint.base_url).hostname}".lstrip(",")
    return {"no_proxy": hosts, "NO_PROXY": hosts}


def _cpu_marks(
    command: Sequence[str], environment: Mapping[str, str], log: Path, deadline: float
) -> list[tuple[float, float]]:
    """Runs the client under a watchdog until its end or the deadline; (time, CPU seconds) five times a second."""
    marks = []
    # A client that could not even be started has no pid. Closing the guard's input ends one that still runs.
    with (
        watchdog.popen(command, environment, log, grace_s=2) as guard,
        contextlib.closing(guard.stdin),
        contextlib.suppress(psutil.NoSuchProcess, IndexError),
    ):
        client = psutil.Process(int(guard.stdout.readline().split()[1]))
        while guard.poll() is None and time.monotonic() < deadline:
            times = client.cpu_times()
            marks.append((time.monotonic(), times.user + times.system))
            time.sleep(0.2)
    return marks


def _in_our_names(said: dict, marks: list[tuple[float, float]], dilation: float) -> dict:
    # What ran before the load (imports, tokenizing) is not the client at work.
    ended = marks[-1][0] if marks else 0.0
    loaded = [mark for mark in marks if mark[0] >= ended - said["duration"]]
    named = {f"{kind}_{name}": said[f"{kind}_{name}"] / dilation for name in _TIMES for kind in ("mean", "p99")}
    return named | {
        "completed": said["completed"],
        "failed": said["num_prompts"] - said["completed"],
        "duration_s": said["duration"] / dilation,
        "request_throughput": said["request_throughput"] * dilation,
        "output_token_throughput": said["output_throughput"] * dilation,
        "output_tokens": said["total_output_tokens"],
        "peak_concurrent_requests_vllm": said.get("max_concurrent_requests"),
        "client_busiest_core": busiest_second(loaded),
        "client_cpu_s": loaded[-1][1] - loaded[0][1] if loaded else None,
    }
