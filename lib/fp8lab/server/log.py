"""What a vLLM server's log says: how far its start is, what it reports, why it failed."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

_MAX_BYTES = 1 << 20
_MAX_LINE = 500

# In the order in which vLLM writes them (0.26 to 0.33). That torch.compile is disabled is told earlier, and is no phase.
_PHASES = (
    (r"non-default args|Resolved architecture", "reading the model's configuration"),
    (r"Using max model len", "starting the EngineCore"),
    (r"Initializing a V1 LLM engine", "starting the worker"),
    (r"Starting to load model|Loading model|Loading safetensors", "loading weights"),
    (r"Model loading took", "measuring memory"),
    (r"Starting torch\.compile|vLLM's torch\.compile|Dynamo bytecode|Compiling a graph", "compiling (torch.compile)"),
    (r"KV cache size", "reserving the KV cache"),
    (r"Capturing CUDA graphs|Graph capturing", "capturing CUDA graphs"),
    (r"init engine", "starting the API server"),
    (r"Application startup complete", "waiting for the first completion"),
)

# What went wrong (in the log), and what to do about it.
_REMEDIES = (
    (r"address already in use", "another process listens on this port; choose another port or end that process"),
    (
        r"out of memory|No available memory for the cache|less than desired GPU memory|larger than the available KV",
        "the GPU has too little free memory; see `fp8lab status` and `nvidia-smi` for who holds it",
    ),
    (r"unrecognized arguments|invalid choice|expected one argument", "this vLLM version does not know that flag"),
    (
        r"gated repo|401 Client|Access to model",
        'the checkpoint is gated: set HF_TOKEN, or serve random weights (weights = "random" in [model])',
    ),
    (
        r"not a valid model identifier|is not a local folder|Repository Not Found|can't load the configuration",
        "no such model; check its name or path",
    ),
    (r"requires x86 with AVX-512", "this CPU cannot hold an FP8 KV cache; use the emulated profile"),
    (r"Illegal instruction|SIGILL", "this CPU lacks the instructions that vLLM's build needs"),
    (
        r"No module named 'flashinfer|Could not find nvcc|FLASHINFER is not valid",
        "FlashInfer compiles its kernels with CUDA's nvcc: install flashinfer-python and the CUDA toolkit, or take a variant "
        "without it",
    ),
    (r"No module named", "the environment is incomplete; prepare it with `make env`"),
)
# "Using … for …" is said of other things too: a kernel's or a linear layer's class is in the names.
_KERNEL = re.compile(r"\b(?:Using|Selected) (\w*Kernel\w*) for ([\w-]+(?: linear)?)")
_PREFIX = re.compile(r"^(\(\w+ pid=\d+\) )?((INFO|WARNING|ERROR|DEBUG|CRITICAL) [\d-]+ [\d:]+ \[[^\]]+\] )?")
_ERROR = re.compile(r"^(\w+\.)*\w*(Error|Exception|Interrupt)\b.*|^.*\berror: .*", re.IGNORECASE)
_SYMPTOM = re.compile(r"Engine core initialization failed|Engine core proc .* died|See root cause")


def read(path: Path, secrets: Iterable[str] = ()) -> str:
    """The log's text, undecodable bytes and `secrets` replaced; of a long one 1 MiB from either end."""
    try:
        with open(path, "rb") as file:
            text = file.read(_MAX_BYTES)
            if (size := os.fstat(file.fileno()).st_size) > 2 * _MAX_BYTES:
                file.seek(size - _MAX_BYTES)
                text += b"\n"
            text += file.read(_MAX_BYTES)
    except FileNotFoundError:
        return ""
    said = text.decode(errors="replace")
    for secret in sorted(secrets, key=len, reverse=True):  # one may begin another
        said = said.replace(secret, "[secret]")
    return said


def phase(text: str) -> str:
    """The last phase of the start that the log shows."""
    reached = [name for pattern, name in _PHASES if re.search(pattern, text)]
    return reached[-1] if reached else "importing vLLM"


def reported(text: str) -> dict:
    """The fields of `metrics.summary.ServerInfo` that vLLM reports of a start; None where it said nothing."""
    # Each EngineCore tells of its own.
    tokens = [int(one.replace(",", "")) for one in re.findall(r"KV cache size: ([\d,]+) tokens", text)]
    memory = re.search(r"Model loading took ([\d.]+) GiB(?:(?: memory)? and ([\d.]+) seconds)?", text)
    gib, seconds = (float(one) if one else None for one in memory.groups()) if memory else (None, None)
    kernels = [f"{kernel} for {layer}" for kernel, layer in _KERNEL.findall(text)]
    return {
        "kv_cache_tokens": sum(tokens) or None, "model_memory_gib": gib, "load_s": seconds,
        "kernels": tuple(dict.fromkeys(kernels)),
    }  # fmt: skip


def root_cause(text: str) -> tuple[list[str], str | None]:
    """The log's telling lines (the first error that is no mere symptom of another) and a remedy, if known."""
    lines = [_PREFIX.sub("", line[:_MAX_LINE]).rstrip() for line in text.splitlines()]
    errors = [line for line in lines if _ERROR.match(line) and not _SYMPTOM.search(line)]
    telling = list(dict.fromkeys(errors))[:3] or [line for line in lines if line][-5:]
    for pattern, remedy in _REMEDIES:
        if any(re.search(pattern, line, re.IGNORECASE) for line in (*telling, *lines[-40:])):
            return telling, remedy
    return telling, None
