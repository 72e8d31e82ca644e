"""The load generator beside other clients, against one server whose chunk times are known.

    python tests/bench/bench_client.py [--repeats 5] [--quick]

Every round runs each client on each load, in turn, so that a machine whose speed drifts does not favour one.
Medians are printed with their ratios to this project's. Loads: a burst of 256 requests, and 200 requests/s.
CPU counts the client's processes while they measure, imports left out. The time to the first request counts
from the command, imports included.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

HERE = Path(__file__).resolve().parent
CLIENTS = ("fp8lab", "aiohttp", "httpx", "vllm")
NAMES = {
    "fp8lab": "fp8lab load-test",
    "aiohttp": "aiohttp by hand",
    "httpx": "httpx by hand",
    "vllm": "vllm bench serve",
}
TTFT_MS = 20


class Server:
    """tests/sse_server.py; `truth()` after its end is what it saw."""

    def __init__(self, itl_ms: float):
        self._file = tempfile.NamedTemporaryFile(suffix=".jsonl")  # noqa: SIM115 - lives as long as the server
        command = [sys.executable, str(HERE.parent / "sse_server.py"), "--truth", self._file.name]
        command += ["--ttft-ms", str(TTFT_MS), "--itl-ms", str(itl_ms)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.url = f"http://127.0.0.1:{int(self._process.stdout.readline())}"

    def truth(self) -> list[dict]:
        self._process.terminate()
        self._process.wait(30)
        return [json.loads(line) for line in Path(self._file.name).read_text().splitlines()]


def run_client(client: str, requests: int, rate: str, output_tokens: int, itl_ms: float = 5) -> dict:
    """One client on one load; its figures beside the server's truth."""
    server = Server(itl_ms)
    common = [
        "--base-url",
        server.url,
        "--requests",
        str(requests),
        "--rate",
        rate,
        "--output-tokens",
        str(output_tokens),
    ]
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as out:
        if client == "fp8lab":
            command = [sys.executable, "-m", "fp8lab.cli", "load-test", *common, "--model", "ok", "--out", f"{out}/o"]
            command += ["--trace", "random", "--input-tokens", "5", "--workers", "1"]
        else:
            command = [sys.executable, str(HERE / "clients.py"), client, *common]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        watcher = PeakMemory(process.pid)
        output = process.communicate(timeout=600)[0]
        memory = watcher.stop()
    truth = server.truth()
    said = json.loads(output.splitlines()[-1])
    if client == "fp8lab":
        chunks = said["output_tokens"]
        said = {
            "cpu_s": said["client_cpu_us_per_chunk"] * chunks / 1e6,
            "chunks": chunks,
            "mean_ttft_ms": said["mean_ttft_ms"],
        }
    server_ttft = 1e3 * statistics.mean(t["first"] - t["received"] for t in truth)
    return {
        "cpu_us_per_chunk": 1e6 * said["cpu_s"] / said["chunks"],
        "chunks_per_core_s": said["chunks"] / said["cpu_s"],
        "ttft_error_ms": said["mean_ttft_ms"] - server_ttft,
        "first_request_s": min(t["received"] for t in truth) - began,
        "peak_mb": memory / 1e6,
        "chunks": said["chunks"],
    }


class PeakMemory:
    """The largest sum of resident memory over a process and its children, looked at 20 times a second."""

    def __init__(self, pid: int):
        self._process, self._peak, self._stop = psutil.Process(pid), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def stop(self) -> int:
        self._stop.set()
        self._thread.join()
        return self._peak

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            total = 0
            try:
                for process in (self._process, *self._process.children(recursive=True)):
                    total += process.memory_info().rss
            except psutil.NoSuchProcess:
                continue
            self._peak = max(self._peak, total)


def table(rows: dict[str, dict[str, list[float]]], title: str, columns: dict[str, str]) -> None:
    print(f"\n{title}")
    print(f"{'':<18}" + "".join(f"{label:>26}" for label in columns.values()))
    for client in CLIENTS:
        cells = []
        for key in columns:
            value, ours = statistics.median(rows[client][key]), statistics.median(rows["fp8lab"][key])
            ratio = f"({value / ours:.1f}x)" if ours > 0 and value > 0 and key != "ttft_error_ms" else ""
            cells.append(f"{value:>16,.1f} {ratio:>9}")
        print(f"{NAMES[client]:<18}" + "".join(cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one round of small loads, to see that it works")
    args = parser.parse_args()
    repeats = 1 if args.quick else args.repeats
    loads = {"burst of 256": (256, "inf", 20), "200 requests/s": (100 if args.quick else 800, "200", 20)}
    results = {load: {client: {} for client in CLIENTS} for load in loads}
    for number in range(repeats):
        for load, (requests, rate, tokens) in loads.items():
            for client in CLIENTS:
                print(f"round {number + 1}/{repeats}: {load}, {NAMES[client]}", file=sys.stderr, flush=True)
                for key, value in run_client(client, requests, rate, tokens).items():
                    results[load][client].setdefault(key, []).append(value)
    columns = {
        "cpu_us_per_chunk": "CPU us/chunk",
        "chunks_per_core_s": "chunks/s a core",
        "ttft_error_ms": "mean TTFT error, ms",
        "first_request_s": "first request, s",
        "peak_mb": "peak memory, MB",
    }
    print(f"\nmedians of {repeats}; in parentheses the ratio to fp8lab's; server's TTFT {TTFT_MS} ms")
    for load in loads:
        table(results[load], load, columns)
    many = run_client("fp8lab", 200 if args.quick else 2000, "inf", 50 if args.quick else 500, itl_ms=100)
    print(f"\n{'200' if args.quick else '2,000'} concurrent streams: {many['chunks']:,} chunks, "
          f"{many['cpu_us_per_chunk']:.1f} us CPU a chunk, peak memory {many['peak_mb']:.0f} MB")  # fmt: skip


if __name__ == "__main__":
    main()
