"""The clients that the benchmark sets beside this project's: one process each, one JSON line at the end.

    python clients.py aiohttp|httpx|vllm|guidellm --base-url URL --requests N --rate R|inf --output-tokens N

`aiohttp` and `httpx` are what one writes by hand: a task for each request, a JSON document for each line.
`vllm` is `vllm bench serve`; its CPU is counted around its measuring part, imports left out. `guidellm` is GuideLLM, in
an environment of its own; the CPU of its processes is counted from its first request to its last. The line holds cpu_s,
chunks, mean_ttft_ms.
"""

import argparse
import asyncio
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import environments
import numpy as np
import psutil

PROMPT = " time year people way day"


def body(output_tokens: int) -> dict:
    options = {"ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
    return {"model": "ok", "prompt": PROMPT, "max_tokens": output_tokens, "temperature": 0.0, **options}


async def paced(args, one_request) -> list:
    """Calls `one_request` at Poisson arrivals, each in a task of its own."""
    gaps = random.Random(0)
    start, due, tasks = time.perf_counter(), 0.0, []
    for _ in range(args.requests):
        due += 0.0 if math.isinf(args.rate) else gaps.expovariate(args.rate)
        await asyncio.sleep(max(0.0, start + due - time.perf_counter()))
        tasks.append(asyncio.create_task(one_request()))
    return await asyncio.gather(*tasks)


async def read_lines(lines, sent: float) -> tuple[float, int]:
    """(TTFT in s, chunks) of one stream."""
    first, chunks = 0.0, 0
    async for line in lines:
        text = (line.decode() if isinstance(line, bytes) else line).strip()
        if text.startswith("data: ") and text != "data: [DONE]" and json.loads(text[6:])["choices"]:
            first = first or time.perf_counter() - sent
            chunks += 1
    return first, chunks


async def with_aiohttp(args) -> list:
    import aiohttp

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=600)) as session:

        async def one_request():
            sent = time.perf_counter()
            async with session.post(f"{args.base_url}/v1/completions", json=body(args.output_tokens)) as response:
                return await read_lines(response.content, sent)

        return await paced(args, one_request)


async def with_httpx(args) -> list:
    import httpx

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(limits=limits, timeout=600, trust_env=False) as client:

        async def one_request():
            sent = time.perf_counter()
            async with client.stream(
                "POST", f"{args.base_url}/v1/completions", json=body(args.output_tokens)
            ) as response:
                return await read_lines(response.aiter_lines(), sent)

        return await paced(args, one_request)


def with_vllm(args) -> dict:
    from vllm.benchmarks import serve

    from fp8lab.models.checkpoints import model_folder

    measured = {}
    original = serve.benchmark

    async def counted(*positional, **named):
        began = time.process_time()
        result = await original(*positional, **named)
        measured["cpu_s"] = time.process_time() - began
        return result

    serve.benchmark = counted
    parser = argparse.ArgumentParser()
    serve.add_cli_args(parser)
    with tempfile.TemporaryDirectory() as folder:
        serve.main(
            parser.parse_args([
                "--backend", "openai", "--base-url", args.base_url, "--endpoint", "/v1/completions",
                "--model", "ok", "--tokenizer", str(model_folder("llama-3-8b")), "--dataset-name", "random",
                "--random-input-len", "5", "--random-output-len", str(args.output_tokens), "--ignore-eos",
                "--num-prompts", str(args.requests), "--request-rate", str(args.rate), "--disable-tqdm",
                "--save-result", "--result-dir", folder, "--result-filename", "result.json",
            ])
        )  # fmt: skip
        result = json.loads(Path(folder, "result.json").read_text())
    return measured | {"chunks": result["total_output_tokens"], "mean_ttft_ms": result["mean_ttft_ms"]}


def with_guidellm(args) -> dict:
    from fp8lab.models.checkpoints import model_folder

    burst = math.isinf(args.rate)
    profile = f"kind=throughput,max_concurrency={args.requests}" if burst else f"kind=poisson,rate={args.rate}"
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        command = [
            environments.environment("guidellm", environments.GUIDELLM) / "guidellm", "run", "--disable-console",
            "--backend", f"kind=openai_http,target={args.base_url},model=ok,request_format=/v1/completions",
            "--profile", profile, "--constraint", f"kind=max_requests,count={args.requests}",
            "--tokenizer", f"kind=huggingface_auto,model={model_folder('llama-3-8b')}",
            "--data", f"kind=synthetic_text,prompt_tokens=5,output_tokens={args.output_tokens}",
            "--output", f"kind=json,path={report}",
        ]  # fmt: skip
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        when, cpu = [], []
        while process.poll() is None:
            when.append(time.time())
            cpu.append(cpu_seconds(process.pid))
            time.sleep(0.05)
        (result,) = json.loads(report.read_text())["benchmarks"]
    scheduler, metrics = result["scheduler_metrics"], result["metrics"]
    began, ended = np.interp([scheduler["request_start_time"], scheduler["request_end_time"]], when, cpu)
    return {
        "cpu_s": ended - began,
        "chunks": metrics["output_token_count"]["successful"]["total_sum"],
        "mean_ttft_ms": metrics["time_to_first_token_ms"]["successful"]["mean"],
    }


def cpu_seconds(pid: int) -> float:
    """CPU seconds of a process and its children so far; 0 when it is gone."""
    try:
        process = psutil.Process(pid)
        times = [each.cpu_times() for each in (process, *process.children(recursive=True))]
    except psutil.NoSuchProcess:
        return 0.0
    return sum(each.user + each.system for each in times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("client", choices=("aiohttp", "httpx", "vllm", "guidellm"))
    parser.add_argument("--base-url", required=True)
    parser.add_argument("--requests", type=int, required=True)
    parser.add_argument("--rate", type=float, required=True)
    parser.add_argument("--output-tokens", type=int, required=True)
    args = parser.parse_args()
    if args.client in ("vllm", "guidellm"):
        result = with_vllm(args) if args.client == "vllm" else with_guidellm(args)
    else:
        began = time.process_time()
        streams = asyncio.run(with_aiohttp(args) if args.client == "aiohttp" else with_httpx(args))
        result = {
            "cpu_s": time.process_time() - began,
            "chunks": sum(chunks for _, chunks in streams),
            "mean_ttft_ms": 1e3 * sum(first for first, _ in streams) / len(streams),
        }
    print(json.dumps(result))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
