"""vLLM's own client, `vllm bench serve`, on the same server with the same trace: an independent cross-check."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from ..errors import LevelFailed
from ..traces import Trace
from .stream import Endpoint

# By module, not by command: the CPU build's distribution has another name, which breaks the command.
_RUN = "import argparse; from vllm.benchmarks.serve import add_cli_args, main; p = argparse.ArgumentParser(); add_cli_args(p); main(p.parse_args())"
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
) -> dict:
    """Offers `trace` at `rate` requests/s with vLLM's client; its result in this project's names, in model time.

    Its arrival times come from its own random numbers; a `burstiness` of inf makes them the same as ours.

    Keys: completed, failed, duration_s, request_throughput, output_token_throughput, output_tokens,
    mean/p99 of ttft, tpot and itl in ms, peak_concurrent_requests_vllm, and client_busiest_core (the largest share of a
    core over a second) with client_cpu_s. Raises LevelFailed when the client fails.
    """
    with tempfile.TemporaryDirectory(prefix="fp8lab-bench-") as folder:
        dataset, result = Path(folder, "trace.json"), Path(folder, "result.json")
        dataset.write_text(json.dumps(trace.to_sharegpt(begin_tokens=1)))
        command = [
            sys.executable, "-c", _RUN, "--backend", "openai", "--base-url", endpoint.base_url,
            "--endpoint", endpoint.path, "--model", endpoint.model, "--tokenizer", tokenizer,
            "--dataset-name", "sharegpt", "--dataset-path", str(dataset), "--disable-shuffle",
            "--num-prompts", str(len(trace)), "--request-rate", str(rate / time_dilation), "--seed", str(seed), "--burstiness", str(burstiness),
            "--ignore-eos", "--disable-tqdm", "--percentile-metrics", "ttft,tpot,itl,e2el",
            "--save-result", "--result-dir", folder, "--result-filename", "result.json",
        ]  # fmt: skip
        environment = os.environ | {"OPENAI_API_KEY": endpoint.api_key or ""}
        with open(Path(folder, "log"), "w+") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
            try:
                marks = _cpu_marks(process)
            finally:
                process.kill()
                process.wait()
            if not result.is_file():
                log.seek(0)
                raise LevelFailed(f"vllm bench serve failed: {log.read()[-800:]}")
        said = json.loads(result.read_text())
    return _in_our_names(said, marks, time_dilation)


def _cpu_marks(process: subprocess.Popen) -> list[tuple[float, float]]:
    """(time, CPU seconds) of the client, five times a second until it ends."""
    watched, marks = psutil.Process(process.pid), []
    while process.poll() is None:
        try:
            times = watched.cpu_times()
        except psutil.NoSuchProcess:
            break
        marks.append((time.monotonic(), times.user + times.system))
        time.sleep(0.2)
    return marks


def _in_our_names(said: dict, marks: list[tuple[float, float]], dilation: float) -> dict:
    from .team import busiest_second

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
