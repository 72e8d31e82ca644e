"""Shared fixtures: a streaming server with known times, a short emulated profile, a run made of whole cloth."""

import contextlib
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

HERE = Path(__file__).parent

# A shell's background job (and many a CI) starts with Ctrl-C ignored, and children inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

SHORT = """
extends = "emulated-h100"
title = "A short emulated run for tests"

[workload]
warmup_requests = 4

[protocols."as published"]
levels = [
  { variant = "bf16", rate = 50, requests = 40 },
  { variant = "fp8", rate = 100, requests = 80 },
]

[protocols."equal load"]
levels = [
  { variant = "bf16", rate = 100, requests = 80 },
  { variant = "fp8", rate = 50, requests = 40 },
]
"""


@contextlib.contextmanager
def streaming_server(*arguments: str):
    """tests/sse_server.py as a subprocess; yields its base URL."""
    command = [sys.executable, str(HERE / "sse_server.py"), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def sse_url():
    with streaming_server("--ttft-ms", "20", "--itl-ms", "2") as url:
        yield url


@pytest.fixture
def short_profile(tmp_path) -> Path:
    """The path of a profile that measures the four levels in seconds."""
    path = tmp_path / "short.toml"
    path.write_text(SHORT)
    return path


def make_records(sent, first, last, tokens, *, scheduled=None, errors=None) -> pd.DataFrame:
    """Records from columns; what is not given is as if all went well."""
    count = len(sent)
    return pd.DataFrame(
        {
            "request": np.arange(count),
            "prompt_tokens": 10,
            "output_tokens_asked": tokens,
            "output_tokens": tokens,
            "chunks": tokens,
            "scheduled_s": sent if scheduled is None else scheduled,
            "sent_s": np.asarray(sent, dtype=float),
            "first_token_s": np.asarray(first, dtype=float),
            "last_token_s": np.asarray(last, dtype=float),
            "finish_reason": "length",
            "error": pd.Series(errors or [None] * count, dtype="object"),
        }
    )
