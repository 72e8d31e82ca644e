"""A server with vLLM's command line, paths, key, counters, log and processes, whose FAKE_VLLM variable says how it fails.

The API server answers streams of its own; its EngineCore is a process beside it that lives as vLLM's does, also on when
the API server is killed, and computes nothing.

(empty)         it does not: streams of a token every half millisecond, slowed down as the emulated GPU is
family          starts a child in a session of its own, which starts another; all ignore SIGTERM
polite-family   the same, and they do not
bad-model, port-taken, out-of-memory
                logs what vLLM logs and exits
never-ready     logs a start that stays where it loads weights
no-completion   healthy, knows its model, and never completes anything
wrong-name      serves another model than it was asked to
die             is gone at the 10th streamed request
hang            accepts and answers nothing from the 10th on, /health neither
engine-dies     the same, but /health answers 503
drip-head, drip-body
                the same, but /health answers a byte at a time, and never ends
drip-always     /health answers so from the start
freeze          stops itself (SIGSTOP) at the 10th for 5 s
refuse:PATH     answers 500 to as many streamed requests as the number in that file says, and counts it down
long-line       logs a line of 64 MiB, then starts
blurt-out       exits with an error that quotes the variable HF_TOKEN
tell-secrets    logs its whole environment and its arguments, then starts
"""

import argparse
import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import uvloop

from sse_server import Session

FAULT = os.environ.get("FAKE_VLLM", "")
AFTER = 10
ENDS = {
    "bad-model": "OSError: /no/such is not a local folder and is not a valid model identifier listed on the hub",
    "port-taken": "OSError: [Errno 98] error while attempting to bind on address: address already in use",
    "out-of-memory": "(EngineCore pid=7) ERROR 01-01 00:00:00 [core.py:900] torch.OutOfMemoryError: CUDA out of memory.\n"
    "(APIServer pid=6) RuntimeError: Engine core initialization failed. See root cause above.",
}
# What vLLM finds room for on the emulated card, by the type of its KV cache.
KV_CACHE_TOKENS = {"auto": 431_568, "fp8": 969_648}


class Server(Session):
    """A Session that knows vLLM's other paths. `state` is shared by all connections."""

    def __init__(self, options, state):
        super().__init__(options, None)
        self.state = state

    def on_url(self, url):
        self.url, self.authorization = url.decode(), b""

    def on_message_complete(self):
        if self.state.hanging and not (FAULT == "engine-dies" and self.url == "/health"):
            return
        if self.url.startswith("/v1") and self.authorization.decode() != f"Bearer {os.environ['VLLM_API_KEY']}":
            self.reply(401, '{"error":"Unauthorized"}')
        elif self.url == "/health" and (self.state.dripping or FAULT == "drip-always"):
            self.transport.write(
                b"HTTP/1.1 200 OK\r\n" + (b"content-length: 99999\r\n\r\n" if FAULT == "drip-body" else b"x: ")
            )
            self.drip()
        elif self.url == "/health":
            self.reply(503 if self.state.hanging else 200, "")
        elif self.url == "/metrics":
            self.reply(200, self.state.metrics())
        elif self.url == "/v1/models":
            name = "another" if FAULT == "wrong-name" else self.options.served_model_name
            self.reply(200, json.dumps({"data": [{"id": name}]}))
        elif FAULT != "no-completion":
            request = json.loads(b"".join(self.body))
            self.count(request)
            if refuses(request):
                self.reply(500, '{"error":"refused"}')
            elif FAULT == "no-batches" and isinstance(request.get("prompt"), list):
                self.reply(400, '{"error":"one prompt a request"}')
            else:
                prompt = request.get("prompt", "")
                self.prompt_tokens = 1 + len(prompt.split() if isinstance(prompt, str) else prompt)
                super().on_message_complete()
        self.body = []

    def count(self, request):
        """Commits the faults of a load: the warm-up and the first completion do not count."""
        self.state.streams += request.get("stream", False) and request["max_tokens"] > 16
        if self.state.streams < AFTER:
            return
        if FAULT == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        elif FAULT == "freeze" and self.state.streams == AFTER:
            wake = f"import os, time; time.sleep(5); os.kill({os.getpid()}, {int(signal.SIGCONT)})"
            subprocess.Popen([sys.executable, "-c", wake])
            os.kill(os.getpid(), signal.SIGSTOP)
        elif FAULT in ("hang", "engine-dies"):
            self.state.hanging = True
        elif FAULT.startswith("drip"):
            self.state.dripping = True

    def drip(self):
        if not self.transport.is_closing():
            self.transport.write(b"x")
            asyncio.get_running_loop().call_later(0.5, self.drip)

    def begin(self):
        if self.state.hanging or not super().begin():
            return False
        self.state.running.add(self)
        self.state.prompt_tokens += self.prompt_tokens
        return True

    def step(self):
        if self.state.hanging:
            return
        before = self.sent
        super().step()
        if self in self.state.running:
            self.state.generation_tokens += self.sent - before
            if self.sent == self.tokens:
                self.state.running.discard(self)

    def connection_lost(self, _error):
        self.state.running.discard(self)

    def reply(self, status, text):
        body = text.encode()
        self.transport.write(b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n%s" % (status, len(body), body))


class State:
    streams, hanging, dripping = 0, False, False

    def __init__(self, kv_cache_tokens):
        self.kv_cache_tokens = kv_cache_tokens
        self.running: set[Server] = set()
        self.prompt_tokens = self.generation_tokens = 0

    def metrics(self) -> str:
        """vLLM's counters and gauges, in Prometheus' text format."""
        held = sum(stream.prompt_tokens + stream.sent for stream in self.running)
        values = {
            "num_requests_running": len(self.running),
            "num_requests_waiting": 0,
            "kv_cache_usage_perc": held / self.kv_cache_tokens,
            "num_preemptions_total": 0,
            "prompt_tokens_total": self.prompt_tokens,
            "generation_tokens_total": self.generation_tokens,
        }
        return "".join(f'vllm:{name}{{engine="0"}} {float(value)}\n' for name, value in values.items())


def start_engine_core() -> None:
    """A process beside this one, with the title of vLLM's, which this one's end does not end."""
    subprocess.Popen(["VLLM::EngineCore", "infinity"], executable=shutil.which("sleep"))


def start_family(generations: int = 2) -> None:
    """A child in a session of its own that starts another, each ignoring SIGTERM unless polite."""
    ignore = "" if FAULT == "polite-family" else "signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    code = f"import signal, subprocess, sys, time; {ignore}generations = int(sys.argv[1])\n"
    code += "if generations: subprocess.Popen([sys.executable, '-c', sys.argv[2], str(generations - 1), sys.argv[2]], start_new_session=True)\n"
    code += "time.sleep(600)"
    subprocess.Popen([sys.executable, "-c", code, str(generations - 1), code], start_new_session=True)
    if ignore:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def refuses(request) -> bool:
    if not FAULT.startswith("refuse:") or not request.get("stream") or request["max_tokens"] <= 16:
        return False
    left = Path(FAULT.removeprefix("refuse:"))
    if number := int(left.read_text()):
        left.write_text(str(number - 1))
    return number > 0


async def serve(options, kv_cache_tokens) -> None:
    state = State(kv_cache_tokens)
    loop = asyncio.get_running_loop()
    await loop.create_server(lambda: Server(options, state), options.host, options.port, backlog=4096)
    print("INFO 01-01 00:00:00 [launcher.py:1] Application startup complete.", flush=True)
    await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("command", nargs="*")
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    parser.add_argument("--served-model-name")
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--known", nargs="*", help="stands for all that vLLM knows")
    options, others = parser.parse_known_args()
    if "--no-such-flag" in others:
        parser.error("unrecognized arguments: --no-such-flag")
    slower = json.loads(os.environ.get("FP8LAB_EMULATED_GPU", "{}")).get("time_dilation", 1)
    options.ttft_ms, options.itl_ms = 10 * slower, 0.5 * slower
    print("INFO 01-01 00:00:00 [utils.py:1] non-default args", " ".join(others), flush=True)
    if FAULT == "blurt-out":
        sys.exit(f"RuntimeError: no access with {os.environ['HF_TOKEN']}")
    if FAULT in ENDS:
        sys.exit(ENDS[FAULT])
    print("INFO 01-01 00:00:00 [core.py:1] Initializing a V1 LLM engine", flush=True)
    start_engine_core()
    if FAULT.endswith("family"):
        start_family()
    if FAULT == "long-line":
        sys.stdout.write("x" * (64 << 20))
    if FAULT == "tell-secrets":
        print(os.environ, sys.argv, flush=True)
    print("INFO 01-01 00:00:00 [model.py:1] Starting to load model", flush=True)
    if FAULT == "never-ready":
        time.sleep(600)
    print("INFO 01-01 00:00:00 [model.py:2] Model loading took 0.02 GiB memory", flush=True)
    tokens = KV_CACHE_TOKENS[options.kv_cache_dtype]
    print(f"INFO 01-01 00:00:00 [kv.py:1] GPU KV cache size: {tokens:,} tokens, Maximum concurrency 52x", flush=True)
    uvloop.run(serve(options, tokens))


if __name__ == "__main__":
    main()
