"""What this machine can run: the profile of its GPU, and whether a profile's device, workload and environment fit here."""

import dataclasses
import os
import warnings
from pathlib import Path

from ..errors import BadInput
from ..system import gpu
from .flags import secret_texts, secrets_of
from .profile import Profile, is_hub_name
from .profile_file import flags_and_variables, located, read_profile
from .trace import check_file, is_file, named_trace

# What "auto" chooses from: the first whose card is the machine's.
_OF_A_CARD = ("h200-80gb", "h100-80gb")


def load_profile(name: str | Path = "auto", *, weights: str | None = None, model: str | None = None) -> Profile:
    """The profile `name`, to be measured: one of `profile_names()`, a path to a TOML file, or "auto", the machine's:
    h200-80gb or h100-80gb where the GPU is that card, emulated-h100 without a GPU. `weights` (one of WEIGHTS) overrides the
    profile's; `model` serves that checkpoint (hub name or path) for every variant. Raises BadInput, also for a GPU profile
    without a GPU, a trace or a model that cannot be read, and for a profile that repeats a secret of the environment. Warns
    when the GPU is not the one that the profile names."""
    profile = read_profile(profile_name(name))
    check_device(profile)
    overrides = {"weights": weights} if weights else {}
    if model:
        # Another model has other shapes than the profile's.
        named = {"default": located(model, Path.cwd())}
        overrides = {"weights": "checkpoint", "checkpoints": named, "shapes": "", "dimensions": {}}
    changed = dataclasses.replace(profile.model, **overrides).measured()
    profile = dataclasses.replace(profile, model=changed)
    if profile.model.weights == "checkpoint":
        for variant in profile.variants:
            profile.checkpoint(variant)
    check_workload(profile)
    check_environment(profile)
    _warn_of_another_card(profile)
    return profile


def profile_name(name: str | Path) -> str:
    """`name`; for "auto" the profile of this machine's GPU. Raises BadInput, with a recipe, for a card that none is for."""
    if str(name) != "auto":
        return str(name)
    if said := gpu.refusal():
        raise BadInput(said)
    names, memory_gib = gpu.gpu_names(), gpu.memory_gib()
    if not names:
        if os.environ.get("CUDA_VISIBLE_DEVICES", "").strip() not in ("", "-1") and (said := gpu.hidden()):
            raise BadInput(f"no GPU is visible here{said}; name one of them, or choose --profile emulated-h100")
        return "emulated-h100"
    cards = {name: read_profile(name).gpu for name in _OF_A_CARD}
    for name, card in cards.items():
        if card.fits(names[0], memory_gib):
            return name
    has = f" with {memory_gib:.1f} GiB" if memory_gib else ""
    raise BadInput(
        f"the GPU here is {names[0]!r}{has}, and the profiles are for other cards "
        f"({', '.join(f'{name}: {card.name}' for name, card in cards.items())}): their datasheets say nothing of it. "
        "Write its own into a file mine.toml and choose it with --profile mine.toml:\n\n"
        'extends = "h100-80gb"\n'
        f'title = "Llama-3-8B on one {names[0].removeprefix("NVIDIA ")}"\n'
        f'[gpu]\nname = "{names[0].removeprefix("NVIDIA ")}"\nnvml = ["{names[0]}"]\n'
        f"memory_gib = {memory_gib or 0:.1f}\n"
        "hbm_bytes_per_s = 0.0    # memory bandwidth, bytes/s, as 3.35e12\n"
        "bf16_flops = 0.0         # dense BF16 FLOP/s, without sparsity, as 989e12\n"
        "fp8_flops = 0.0          # dense FP8 FLOP/s; a card without FP8 units: those of BF16\n"
    )


def check_device(profile: Profile) -> None:
    """Raises BadInput when `profile` needs a GPU and this machine shows none, or one that cannot be measured."""
    if profile.device != "cuda":
        return
    if said := gpu.refusal():
        raise BadInput(said)
    if not gpu.gpu_names():
        missing = f"profile {profile.name!r} needs an NVIDIA GPU and none is visible here{gpu.hidden()}"
        raise BadInput(f"{missing}; use --profile emulated-h100 to run without one")


def check_environment(profile: Profile) -> None:
    """Raises BadInput when a flag, variable or checkpoint of `profile` repeats a secret of this process's environment (a
    variable's, or the password in a variable's URL), under whatever name: it would be stored with the run."""
    flags, variables = flags_and_variables(profile)
    texts = [*flags, *(value for _, value in variables), *profile.model.checkpoints.values()]
    for name, value in secrets_of(os.environ).items():
        if any(secret in text for secret in secret_texts({name: value}) for text in texts):
            raise BadInput(
                f"profile {profile.name}: a flag, variable or checkpoint holds the value of {name}, which would be stored "
                f"with the run; leave it out: the server has {name} from the environment"
            )


def check_workload(profile: Profile) -> None:
    """Raises BadInput unless the trace file and the tokenizer's folder can be read: before anything is started."""
    workload = profile.workload
    if is_file(workload.trace):
        check_file(workload.trace)
    else:
        named_trace(workload.trace, 1, seed=0, input_tokens=1, output_tokens=1)
    tokenizer = workload.tokenizer
    if tokenizer and not is_hub_name(tokenizer) and not Path(tokenizer).is_dir():
        raise BadInput(f"no tokenizer at {tokenizer!r}: expected a model's folder, or a hub name ORG/NAME")


def _warn_of_another_card(profile: Profile) -> None:
    if profile.device == "cuda" and profile.gpu and not profile.gpu.fits(name := gpu.gpu_names()[0]):
        warnings.warn(
            f"the GPU here is {name!r}, profile {profile.name} is for {profile.gpu.name}: every caption of a run of it will "
            "say so, and it gives no verdicts; name the card in the profile's [gpu]",
            stacklevel=3,
        )
