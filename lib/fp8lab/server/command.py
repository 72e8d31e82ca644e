"""The vLLM command line of a variant and the environment that it needs."""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import shlex
import subprocess
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path

from ..config.dimensions import BF16, cards, weight_format
from ..config.flags import flag_of
from ..config.profile import Profile, is_hub_name
from ..errors import BadInput
from ..metrics.step_model import read_fits
from ..models.checkpoints import model_folder, packaged_model
from ..paths import cache_dir, with_home, with_library
from ..results.provenance import software_of
from ..system import gpu
from ..ui import StatusLine

HOST = "127.0.0.1"
EXECUTOR = "fp8lab.server.emulated_gpu.EmulatedGpuExecutor"
GUARD = "fp8lab.server.auth.KeyGuard"
SETTINGS_VARIABLE = "FP8LAB_EMULATED_GPU"
# vLLM's variables that say where things are and what the host is, or that this kit sets for every server.
_OF_THE_HOST = {
    "VLLM_ASSETS_CACHE", "VLLM_CACHE_ROOT", "VLLM_CONFIG_ROOT", "VLLM_CPU_OMP_THREADS_BIND", "VLLM_CUDART_SO_PATH",
    "VLLM_CUDA_COMPATIBILITY_PATH", "VLLM_HOST_IP", "VLLM_LOOPBACK_IP", "VLLM_NCCL_SO_PATH", "VLLM_USE_MODELSCOPE",
    "VLLM_API_KEY", "VLLM_DO_NOT_TRACK", "VLLM_NO_USAGE_STATS", "VLLM_RPC_BASE_PATH",
}  # fmt: skip
_STRICTER = ("PYTHONWARNINGS", "PYTHONOPTIMIZE", "FORCE_COLOR")


def source_model(profile: Profile, variant: str) -> str:
    """Folder or hub name of a variant's model: built here, converted from a package, or the profile's checkpoint."""
    if profile.model.weights == "checkpoint":
        return profile.checkpoint(variant)
    folder = model_folder if profile.model.weights == "random" else packaged_model
    return str(folder(profile.model.shapes))


def served_model(profile: Profile, variant: str) -> str:
    """What vLLM loads: the variant's model or, where it has a recipe, the checkpoint that is made of it (`make_checkpoint`).
    An emulated card reads no weights. Raises BadInput for one that vLLM would refuse."""
    profile.check_quantization(variant)
    recipe = profile.variant(variant).recipe
    if not recipe or profile.emulated:
        return source_model(profile, variant)
    name = profile.model.shapes
    if profile.model.weights == "checkpoint":
        path = Path(profile.checkpoint(variant))
        # Another model at the same path is another checkpoint.
        files = sorted(path.glob("*.safetensors"))
        held = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        name = f"{path.name}-{hashlib.sha256(repr((str(path), held)).encode()).hexdigest()[:8]}"
    return str(cache_dir() / "models" / f"{name}-{recipe}")


def make_checkpoint(profile: Profile, variant: str) -> None:
    """Makes the checkpoint of a variant that has a recipe, unless it is there, in a process of its own, which leaves
    nothing on the GPU. Raises BadInput when it cannot."""
    folder, one = served_model(profile, variant), profile.variant(variant)
    if not one.recipe or profile.emulated or os.path.isfile(os.path.join(folder, "config.json")):
        return
    source = source_model(profile, variant) if profile.model.weights == "checkpoint" else profile.model.shapes
    if is_hub_name(source):
        raise BadInput(
            f"recipe {one.recipe} of variant {variant}: {source} is a hub's name; download it, and name its folder"
        )
    status = StatusLine()
    status.update(f"{variant}: making its checkpoint (once)")
    command = [sys.executable, "-m", "fp8lab.cli", "quantize", source, "--recipe", one.recipe, "--out", folder]
    environment = with_library(os.environ) | (gpu.server_environment() if profile.device == "cuda" else {})
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()][-1:] or [f"exit code {done.returncode}"]
        raise BadInput(f"the checkpoint of variant {variant} cannot be made: {said[0].removeprefix('fp8lab: ')}")
    status.done(f"{variant}: its checkpoint is made")


def build_command(profile: Profile, variant: str, *, port: int = 8000, served_name: str | None = None) -> list[str]:
    """The vLLM command line of `variant`: what all variants share, the variant's own flags, which win, and what this
    kit sets. Emulated, it is the GPU's command plus one executor flag. A server of one start has a `served_name` of its
    own and wants a key (VLLM_API_KEY) on every path. Raises BadInput for made-up weights of a quantised checkpoint."""
    flags, shape = profile.flags(variant), profile.shape(variant)
    if flag_of(flags, "--load-format") == "dummy" and shape and shape.weights is not BF16:
        raise BadInput(
            f"variant {variant}: --load-format dummy makes up zeros, or nothing, for {shape.weights.name} weights, and zeros "
            "draw less power and run faster than any model; leave it out (`fp8lab quantize` draws real ones)"
        )
    model = served_model(profile, variant)
    made = profile.variant(variant).recipe and not profile.emulated
    load = ["--load-format", "dummy"] if profile.model.weights == "random" and not made else []
    executor = ["--distributed-executor-backend", EXECUTOR] if profile.emulated else []
    own = ["--served-model-name", served_name, *_guard(profile, variant)] if served_name else []
    address = ["--host", HOST, "--port", str(port)]
    python = profile.variant(variant).python
    entry = _entry_point(python)
    # vLLM's own CLI takes the model by its place.
    start = [python or sys.executable, "-m", *entry, *([] if entry[-1] == "serve" else ["--model"])]
    return [*start, model, *flags, *load, *address, *own, *executor]


def build_environment(profile: Profile, variant: str) -> dict[str, str]:
    """The variables that the server needs beyond this process's own; no secret among them."""
    environment = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", **profile.server.env}
    environment |= profile.variant(variant).env
    if profile.model.weights != "checkpoint":
        environment["HF_HUB_OFFLINE"] = "1"
    if profile.device == "cuda":
        environment |= gpu.server_environment(cards(profile.flags(variant)))
    if profile.emulated:
        settings = dataclasses.asdict(profile.gpu) | dataclasses.asdict(profile.emulation)
        settings["weights"] = weight_format(profile.flags(variant), profile.shape(variant)).name
        if profile.emulation.fit:
            fits = read_fits(profile.emulation.fit)
            if variant not in fits:
                raise BadInput(
                    f"variant {variant}: fit {profile.emulation.fit} has no step model of that name ({', '.join(fits)})"
                )
            settings["step_model"] = dataclasses.asdict(fits[variant])
        environment[SETTINGS_VARIABLE] = json.dumps(settings)
    return environment


def surroundings(given: Mapping[str, str], python: str = "") -> dict[str, str]:
    """This process's variables as a server may see them that is `given` its own: with a home folder to write to and this
    library, of which vLLM imports parts (the guard, the emulated GPU), in UTF-8, its log in plain text. What would make it
    another server than its variant says is left out, and told. Another environment's `python` finds no package of this one."""
    environment = with_home(os.environ)
    for name in ("PYTHONPATH", "PYTHONHOME") if python else ():
        environment.pop(name, None)
    environment = with_library(environment)
    odd = [name for name in environment if name.startswith("VLLM_") and name not in _OF_THE_HOST]
    for name in (*odd, *_STRICTER):
        environment.pop(name, None)
    if told := sorted(set(odd) - given.keys()):
        warnings.warn(
            f"the server does not get {', '.join(told)} from the environment: its profile says what it is; to set a variable, "
            "write it into [server.env] of a profile, or into a variant's env",
            stacklevel=2,
        )
    return environment | {"PYTHONUTF8": "1", "PYTHONIOENCODING": "utf-8", "NO_COLOR": "1"}


def printable_command(profile: Profile, variant: str, port: int = 8000, *, weights: str = "") -> str:
    """The command with its environment, to be pasted into a shell; a GPU's profile needs nothing but vLLM there, and the
    model's folder. With `weights` "checkpoint" it serves the profile's checkpoint, whatever the profile itself serves."""
    if weights:
        profile = dataclasses.replace(profile, model=dataclasses.replace(profile.model, weights=weights))
    environment = [f"{key}={shlex.quote(value)}" for key, value in build_environment(profile, variant).items()]
    command = build_command(profile, variant, port=port)
    if profile.device == "cuda" and not profile.variant(variant).python:
        command = ["vllm", "serve", *command[command.index(served_model(profile, variant)) :]]
    return " ".join([*environment, shlex.join(command)])


def _guard(profile: Profile, variant: str) -> list[str]:
    """The flag that guards every path; none for the Rust API server, which loads no Python."""
    environment = build_environment(profile, variant)
    return ["--middleware", GUARD] if environment.get("VLLM_USE_RUST_FRONTEND", "0") == "0" else []


def _entry_point(python: str) -> list[str]:
    """The module to run. The CPU build's distribution has another name, which breaks vLLM's own CLI. Raises BadInput for a
    `python` without vLLM."""
    named = "vllm" in software_of(python) if python else any(importlib.metadata.distributions(name="vllm"))
    return ["vllm.entrypoints.cli.main", "serve"] if named else ["vllm.entrypoints.openai.api_server"]
