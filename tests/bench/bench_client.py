"""The load generator beside other clients, against one server whose chunk times are known.

    python tests/bench/bench_client.py [--repeats 5] [--quick] [--only fp8lab aiohttp]

Every round runs each client on each load, in turn, so that a machine whose speed drifts does not favour one.
Each figure is the median of the rounds, and in brackets their least. Loads: Poisson arrivals at 50 requests/s, and a
burst of 256. CPU counts the client's processes while they measure, imports left out. The TTFT error is the client's mean
less the server's own. The time to the first request counts from the command, imports included.
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

import environments
import psutil

HERE = Path(__file__).resolve().parent
NAMES = {
    "fp8lab": "fp8lab load-test",
    "fp8lab-https": "the same, HTTPS",
    "aiohttp": "aiohttp by hand",
    "httpx": "httpx by hand",
    "vllm": "vllm bench serve",
    "guidellm": "GuideLLM 0.8.1",
}
LOADS = {"50 req/s": (500, "50"), "burst of 256": (256, "inf")}
OUTPUT_TOKENS = 20
# What is printed of a load, and what of a client whatever the load: key, heading, digits.
OF_LOAD = (("cpu_us_per_chunk", "CPU us/chunk", 1), ("ttft_error_ms", "TTFT error ms", 2))
OF_CLIENT = (("first_request_s", "first request s", 2), ("peak_mb", "peak MB", 0))
TTFT_MS = 20


class Server:
    """tests/sse_server.py; `truth()` after its end is what it saw."""

    def __init__(self, itl_ms: float, certificate: Path | None = None):
        self._file = tempfile.NamedTemporaryFile(suffix=".jsonl")  # noqa: SIM115 - lives as long as the server
        command = [sys.executable, str(HERE.parent / "sse_server.py"), "--truth", self._file.name]
        command += ["--ttft-ms", str(TTFT_MS), "--itl-ms", str(itl_ms)]
        command += ["--certificate", str(certificate)] if certificate else []
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.url = f"http{'s' if certificate else ''}://127.0.0.1:{int(self._process.stdout.readline())}"

    def truth(self) -> list[dict]:
        self._process.terminate()
        self._process.wait(30)
        return [json.loads(line) for line in Path(self._file.name).read_text().splitlines()]


def certificate(folder: Path) -> Path:
    """A self-signed certificate and its key, in one file."""
    key, cert, both = (folder / name for name in ("key.pem", "cert.pem", "both.pem"))
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    subprocess.run([*command, "-keyout", key, "-out", cert], check=True, capture_output=True)
    both.write_bytes(key.read_bytes() + cert.read_bytes())
    return both


def run_client(client: str, requests: int, rate: str, output_tokens: int = OUTPUT_TOKENS, itl_ms: float = 5) -> dict:
    """One client on one load; its figures beside the server's truth."""
    with tempfile.TemporaryDirectory() as folder:
        secure = client == "fp8lab-https"
        server = Server(itl_ms, certificate(Path(folder)) if secure else None)
        return _run_client(client, server, requests, rate, output_tokens)


def _run_client(client: str, server: Server, requests: int, rate: str, output_tokens: int) -> dict:
    common = ["--base-url", server.url, "--requests", str(requests), "--rate", rate]
    common += ["--output-tokens", str(output_tokens)]
    ours = client.startswith("fp8lab")
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as out:
        if ours:
            command = [sys.executable, "-m", "fp8lab.cli", "load-test", *common, "--model", "ok", "--out", f"{out}/o"]
            command += ["--trace", "random", "--input-tokens", "5", "--workers", "1"]
            command += ["--insecure"] if client == "fp8lab-https" else []
        else:
            command = [sys.executable, str(HERE / "clients.py"), client, *common]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        watcher = PeakMemory(process.pid)
        output, told = process.communicate(timeout=1200)
        memory = watcher.stop()
    truth = server.truth()
    if not output.strip():
        sys.exit(f"{NAMES[client]} said nothing:\n{told[-2000:]}")
    said = json.loads(output.splitlines()[-1])
    if ours:
        chunks = said["output_tokens"]
        said = {
            "cpu_s": said["client_cpu_us_per_chunk"] * chunks / 1e6,
            "chunks": chunks,
            "mean_ttft_ms": said["mean_ttft_ms"],
        }
    server_ttft = 1e3 * statistics.mean(t["first"] - t["received"] for t in truth)
    return {
        "cpu_us_per_chunk": 1e6 * said["cpu_s"] / said["chunks"],
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


def cell(values: list[float], ours: list[float] | None, digits: int) -> str:
    """Median [least], and the ratio of the medians to ours."""
    middle = statistics.median(values)
    ratio = f" ({middle / statistics.median(ours):.1f}x)" if ours else ""
    return f"{middle:,.{digits}f} [{min(values):,.{digits}f}]{ratio}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one round of small loads, to see that it works")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES), help="these clients")
    args = parser.parse_args()
    repeats = 1 if args.quick else args.repeats
    if "guidellm" in args.only:
        environments.environment("guidellm", environments.GUIDELLM)
    results = {client: {load: {} for load in LOADS} for client in args.only}
    for number in range(repeats):
        for load, (requests, rate) in LOADS.items():
            for client in args.only:
                figures = run_client(client, requests // 5 if args.quick else requests, rate)
                for key, value in figures.items():
                    results[client][load].setdefault(key, []).append(value)
                print(f"round {number + 1}/{repeats}: {load}, {NAMES[client]}: "
                      + ", ".join(f"{head} {figures[key]:.2f}" for key, head, _ in (*OF_LOAD, *OF_CLIENT)),
                      file=sys.stderr, flush=True)  # fmt: skip
    show(results, repeats)
    many = run_client("fp8lab", 200 if args.quick else 2000, "inf", 50 if args.quick else 500, itl_ms=100)
    print(f"\n{'200' if args.quick else '2,000'} concurrent streams: {many['chunks']:,} chunks, "
          f"{many['cpu_us_per_chunk']:.1f} us CPU a chunk, peak memory {many['peak_mb']:.0f} MB")  # fmt: skip


def show(results: dict[str, dict[str, dict[str, list[float]]]], repeats: int) -> None:
    """The table: a row a client, its cells as `cell` writes them."""
    print(f"\nmedian [least] of {repeats} rounds, in parentheses the ratio to fp8lab's; server's TTFT {TTFT_MS} ms, "
          f"{OUTPUT_TOKENS} chunks a request")  # fmt: skip
    rows = [
        ["", *(f"{label}, {load}" for _, label, _ in OF_LOAD for load in LOADS), *(head for _, head, _ in OF_CLIENT)]
    ]
    for client, loads in results.items():
        row = [NAMES[client]]
        for key, _, digits in OF_LOAD:
            for load in LOADS:
                ours = results["fp8lab"][load][key] if key == "cpu_us_per_chunk" and "fp8lab" in results else None
                row.append(cell(loads[load][key], ours, digits))
        row += [cell([v for load in loads.values() for v in load[key]], None, digits) for key, _, digits in OF_CLIENT]
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)))


if __name__ == "__main__":
    main()
