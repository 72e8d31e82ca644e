"""What to run: the model, the card, the variants (vLLM flags) and the levels of one experiment.

A profile is a TOML file, one of `data/profiles/` by name or any other by path. Its paths are relative to the file.
`extends = "NAME"` starts from another profile: tables are merged key by key, everything else is replaced. So a variant's
list of flags is replaced as a whole (its [variant_env] stays), and so is one protocol, while the others stay. Replaced as
a whole are [model.checkpoints] and the tables that `replaces` names: `replaces = ["protocols"]` means these protocols and
no others. A [gpu] with another name is another card and takes over nothing of the one before.
"""

import dataclasses
import functools
import json
import os
import re
import tomllib
import typing
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, NoReturn

from pydantic import ConfigDict, Field, Strict, TypeAdapter, ValidationError

from ..errors import BadInput
from ..paths import DATA, PLAIN_NAME, without_home
from . import flags as vllm_flags
from .dimensions import Dimensions, ModelShape, dimensions, model_shape
from .secrets import check_repeated, check_written

DEVICES = ("cuda", "emulated", "cpu")
WEIGHTS = ("random", "packaged", "checkpoint")
# What "auto" chooses from: the first whose card is the machine's.
_OF_A_CARD = ("h200-80gb", "h100-80gb")
_TRACE_FILES = (".csv", ".json")
# How far the memory that NVML reports may be from the datasheet's.
_SAME_MEMORY = 0.05
# Words of a card's name that make it another card: they must be in both names or in none.
_OTHER_CARD = {"pcie", "nvl", "mig", "3e", "max", "super", "ti", "ada"}

Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(strict=True, gt=0, le=1)]
Cost = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(strict=True, ge=1)]
CountOrNone = Annotated[int, Field(strict=True, ge=0)]


class _Table:
    """A table of a profile's file: pydantic reads it, and refuses keys that it does not have."""

    __pydantic_config__ = ConfigDict(extra="forbid")


@dataclass(frozen=True, kw_only=True)
class Level(_Table):
    """One variant at one offered rate, once. `rate` is in requests/s; `inf` sends all at once.

    With `cross_check` the same load is sent a second time by `vllm bench serve`, kept beside the result. A `start` above 0
    asks for a server of its own: levels of that number share one start a variant (see `_Protocol`).
    """

    variant: str
    rate: Annotated[float, Field(strict=True, gt=0)]
    requests: Count
    repeat: Count = 1
    cross_check: Annotated[bool, Strict()] = field(default=False, compare=False)
    start: CountOrNone = field(default=0, compare=False)

    def __post_init__(self):
        object.__setattr__(self, "rate", float(self.rate))
        if not self.rate > 0:
            raise BadInput(f"rate {self.rate!r} is not above 0 (requests/s; inf sends all at once)")
        if self.requests < 1 or self.repeat < 1 or self.start < 0:
            raise BadInput(f"a level needs at least 1 request, repeat 1 or later and start 0 or later, not {self}")

    @property
    def id(self) -> str:
        return f"{self.variant}-{self.rate:g}rps-r{self.repeat}"


@dataclass(frozen=True, kw_only=True)
class Card(_Table):
    """A GPU's datasheet: memory in GiB, bandwidth in bytes/s, dense peaks in FLOP/s, the most power in W.

    `nvml` holds the names that NVML (`nvidia-smi -L`) gives it; without them NVML's is compared with `name`, word by word.
    """

    name: str
    memory_gib: Positive
    hbm_bytes_per_s: Positive
    bf16_flops: Positive
    fp8_flops: Positive
    power_w: Positive | None = None
    nvml: tuple[str, ...] = ()

    def fits(self, name: str, memory_gib: float | None = None) -> bool:
        """Whether a GPU that NVML calls `name` and that has so much memory (None: not known) is this card."""
        if memory_gib is not None and abs(memory_gib / self.memory_gib - 1) > _SAME_MEMORY:
            return False
        if self.nvml:
            return name in self.nvml
        mine, theirs = _words(self.name), _words(name)
        return bool(mine) and mine <= theirs and not (mine ^ theirs) & _OTHER_CARD


def _words(card: str) -> set[str]:
    """The words of a card's name that tell it from others: without its maker, its memory and its socket."""
    plain = re.sub(r"\bnvidia\b|\bsxm\d*\b|\bhbm\w*|\b\d+\s*gi?b\b", " ", card.lower())
    return set(re.findall(r"[a-z0-9]+", plain))


@dataclass(frozen=True, kw_only=True)
class Emulation(_Table):
    """The emulated card: achieved fractions of the datasheet, fixed costs, and time dilation."""

    hbm_fraction: Share
    flops_fraction: Share
    step_overhead_us: Cost
    frontend_us_per_token: Cost
    reserved_gib: Cost
    time_dilation: Annotated[float, Field(strict=True, ge=1, allow_inf_nan=False)] = 1.0


@dataclass(frozen=True, kw_only=True)
class Model(_Table):
    """Which model is served: local shapes with random weights or those that a package ships, or named checkpoints (a
    folder, or a hub name ORG/NAME) by variant. `dimensions` is filled in from the folders, under the same names: a run
    knows its model's sizes wherever it is read."""

    shapes: str = ""
    weights: str = "random"
    checkpoints: Mapping[str, str] = field(default_factory=dict)
    dimensions: Mapping[str, Dimensions] = field(default_factory=dict)

    def __post_init__(self):
        if self.weights not in WEIGHTS:
            raise BadInput(f"weights {self.weights!r} is unknown; choose one of {', '.join(WEIGHTS)}")

    def checkpoint(self, variant: str) -> str:
        """The checkpoint's hub name or path for `variant`; a path must exist."""
        name = self.checkpoints.get(self._key(variant))
        if not name:
            raise BadInput(f"no checkpoint is named for variant {variant!r} in [model.checkpoints]")
        if _is_hub_name(name):
            return name
        path = Path(name).expanduser()
        if not (path / "config.json").is_file():
            raise BadInput(f"no model at {name!r}: expected a folder with a config.json, or a hub name ORG/NAME")
        return str(path)

    def served(self, variant: str) -> str:
        """What tells the model that `variant` serves from that of another: its checkpoint, or the shapes' name."""
        return self.checkpoints.get(self._key(variant), "") if self.weights == "checkpoint" else self.shapes

    def shape(self, variant: str) -> ModelShape | None:
        """The sizes of the model that `variant` serves; None where they are not known: a checkpoint of a hub, a folder that
        was not there, a model that is not Llama's kin."""
        if self.weights != "checkpoint":
            return model_shape(self.shapes)
        known = self.dimensions.get(self._key(variant))
        return ModelShape(known) if known else None

    def measured(self) -> "Model":
        """This model with the dimensions of every checkpoint whose folder is there."""
        if self.weights != "checkpoint":
            return self
        found = {key: _dimensions_at(Path(name)) for key, name in self.checkpoints.items() if not _is_hub_name(name)}
        known = {key: one for key, one in found.items() if one}
        return dataclasses.replace(self, dimensions={**self.dimensions, **known})

    def _key(self, variant: str) -> str:
        return variant if self.checkpoints.get(variant) else "default"


def _dimensions_at(folder: Path) -> Dimensions | None:
    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        config, apart = json.loads(path.read_text()), folder / "hf_quant_config.json"
        if apart.is_file() and not config.get(
            "quantization_config"
        ):  # ModelOpt writes it beside, and vLLM reads it there
            config["quantization_config"] = json.loads(apart.read_text()).get("quantization")
        return dimensions(config)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise BadInput(f"{path} is not a model's configuration: {error}") from None


@dataclass(frozen=True, kw_only=True)
class ServerOptions(_Table):
    """Flags and environment that all variants share; the time a start may take, in seconds."""

    flags: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    start_timeout_s: Positive = 600


@dataclass(frozen=True, kw_only=True)
class Workload(_Table):
    """The trace ("sharegpt-like", "random", or a .csv or .json file), its seed, and how many requests warm a fresh
    server up, unmeasured. The lengths are those of "random"; `tokenizer` counts a ShareGPT file's tokens (default: the
    model's own)."""

    trace: str = "sharegpt-like"
    seed: CountOrNone = 0
    warmup_requests: CountOrNone = 32
    input_tokens: Count = 1024
    output_tokens: Count = 128
    tokenizer: str = ""


@dataclass(frozen=True, kw_only=True)
class Profile(_Table):
    """One experiment, resolved. `device` is cuda, emulated or cpu; a variant's flags come after the shared ones and win;
    `variant_env` holds the environment variables that a variant needs beside its flags. Paths are absolute."""

    name: str
    title: str
    device: str
    model: Model
    server: ServerOptions
    variants: Mapping[str, tuple[str, ...]]
    workload: Workload
    protocols: Mapping[str, tuple[Level, ...]]
    variant_env: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    gpu: Card | None = None
    emulation: Emulation | None = None

    @property
    def time_dilation(self) -> float:
        """How many wall seconds one second of model time takes; 1 unless the GPU is emulated."""
        return self.emulation.time_dilation if self.emulation else 1.0

    @property
    def emulated(self) -> bool:
        return self.device == "emulated"

    def variant_flags(self, variant: str) -> tuple[str, ...]:
        if variant not in self.variants:
            raise BadInput(f"no variant {variant!r} in profile {self.name} (there are: {', '.join(self.variants)})")
        return self.variants[variant]

    def shape(self, variant: str) -> ModelShape | None:
        """The sizes of the model that `variant` serves; None where they are not known (see `Model.shape`)."""
        return self.model.shape(variant)

    def levels(self, protocol: str) -> tuple[Level, ...]:
        if protocol not in self.protocols:
            known = ", ".join(self.protocols)
            raise BadInput(f"no protocol {protocol!r} in profile {self.name} (there are: {known})")
        return self.protocols[protocol]

    def as_dict(self) -> dict:
        """The resolved profile as plain values in the shape of its file; `from_dict` reads it back. Paths below the home
        folder begin with ~: it may be shared."""
        values = dataclasses.asdict(self)
        checkpoints, workload = values["model"]["checkpoints"], values["workload"]
        values["model"]["checkpoints"] = {variant: without_home(name) for variant, name in checkpoints.items()}
        workload |= {key: without_home(workload[key]) for key in ("trace", "tokenizer")}
        values["protocols"] = {name: {"levels": list(levels)} for name, levels in values["protocols"].items()}
        return values

    def identity(self) -> dict:
        """`as_dict` without what is only looked up: older runs do not have it, and measured the same."""
        values = self.as_dict()
        del values["model"]["dimensions"]
        if values["gpu"]:
            values["gpu"] = {key: one for key, one in values["gpu"].items() if key not in ("nvml", "power_w")}
        return values


@dataclass(frozen=True, kw_only=True)
class _Protocol(_Table):
    """A protocol as a file gives it. With `starts = N` each level is measured N times, as repeats 1 to N, each on a server
    of its own: what differs from start to start is then in the interval."""

    levels: tuple[Level, ...]
    starts: Count | None = None

    def resolved(self) -> tuple[Level, ...]:
        if self.starts is None:
            return self.levels
        again = range(1, self.starts + 1)
        return tuple(dataclasses.replace(level, repeat=n, start=n) for n in again for level in self.levels)


@dataclass(frozen=True, kw_only=True)
class _File(Profile):
    """A profile as files give it, merged."""

    protocols: Mapping[str, _Protocol] = field(default_factory=dict)


class _Source:
    """The files that a profile was merged from, the extended ones first: which of them an error is in."""

    def __init__(self, tables: Sequence[tuple[str, dict]]):
        self.tables = tables

    def refuse(self, at: Sequence, said: str, *, seen_at: Sequence | None = None) -> NoReturn:
        """Raises BadInput that names the key path `at` and the last file that gives it, or gives `seen_at`."""
        place = at if seen_at is None else seen_at
        file = next((file for file, table in reversed(self.tables) if _holds(table, place)), self.tables[-1][0])
        raise BadInput(": ".join(filter(None, (file, _key_path(at), said))))


def _holds(table, at: Sequence) -> bool:
    for key in at:
        if not (isinstance(table, dict) and key in table) and not (
            isinstance(table, list) and isinstance(key, int) and key < len(table)
        ):
            return False
        table = table[key]
    return True


def _key_path(at: Sequence) -> str:
    """A key as TOML writes it: protocols."as published".levels[0].rate."""
    text = ""
    for key in at:
        if isinstance(key, int):
            text += f"[{key}]"
        else:
            text += f".{key if re.fullmatch(r'[A-Za-z0-9_-]+', key) else json.dumps(key, ensure_ascii=False)}"
    return text.removeprefix(".")


def profile_names() -> list[str]:
    return sorted(path.stem for path in (DATA / "profiles").glob("*.toml"))


def load_profile(name: str | Path = "auto", *, weights: str | None = None, model: str | None = None) -> Profile:
    """The profile `name`, to be measured: one of `profile_names()`, a path to a TOML file, or "auto".

    "auto" is the machine's: h200-80gb or h100-80gb where the GPU is that card, emulated-h100 without a GPU.
    `weights` (one of WEIGHTS) overrides the profile's; `model` serves that checkpoint (hub name or path) for every variant.
    Raises BadInput, also for a GPU profile without a GPU, a trace or a model that cannot be read, and for a profile that
    repeats a secret of the environment. Warns when the GPU is not the one that the profile names.
    """
    profile = read_profile(name)
    check_device(profile)
    overrides = {"weights": weights} if weights else {}
    if model:
        # Another model has other shapes than the profile's.
        named = {"default": _located(model, Path.cwd())}
        overrides = {"weights": "checkpoint", "checkpoints": named, "shapes": "", "dimensions": {}}
    changed = dataclasses.replace(profile.model, **overrides).measured()
    profile = dataclasses.replace(profile, model=changed)
    if profile.model.weights == "checkpoint":
        for variant in profile.variants:
            profile.model.checkpoint(variant)
    check_workload(profile)
    check_environment(profile)
    _warn_of_another_card(profile)
    return profile


def read_profile(name: str | Path) -> Profile:
    """The profile `name` as written, whether or not this machine can run it."""
    name = _of_this_machine() if str(name) == "auto" else str(name)
    return _resolved(_read(name), Path(name).stem)


def read_changed(name: str, over: dict, file: str | Path, where: str = "") -> Profile:
    """The profile `name` with what the table `over` out of `file` (at `where`) says otherwise; its paths are relative to
    that file."""
    table = with_paths(over, Path(file).absolute().parent)
    return _resolved([*_read(name), (f"{file}: {where}" if where else str(file), table)], Path(name).stem)


def from_dict(values: dict) -> Profile:
    """The profile that `Profile.as_dict` wrote down, for example in a run folder. It may be older than what is refused in
    a file today."""
    table = with_paths({key: value for key, value in values.items() if value is not None and key != "name"}, Path.cwd())
    protocols = {}
    for name, body in table.get("protocols", {}).items():
        # JSON has no infinity: the rate of all at once is a text there.
        levels = [level | {"rate": float(level["rate"])} for level in body["levels"]]
        protocols[name] = body | {"levels": levels}
    return _parse(table | {"protocols": protocols}, values["name"], _Source([(f"profile {values['name']}", table)]))


def check_device(profile: Profile) -> None:
    """Raises BadInput when `profile` needs a GPU and this machine shows none, or one that cannot be measured."""
    from ..system import gpu

    if profile.device != "cuda":
        return
    if said := gpu.refusal():
        raise BadInput(said)
    if not gpu.gpu_names():
        raise BadInput(
            f"profile {profile.name!r} needs an NVIDIA GPU and none is visible here{gpu.hidden()}; "
            "use --profile emulated-h100 to run without one"
        )


def check_environment(profile: Profile) -> None:
    """Raises BadInput when a flag, variable or checkpoint of `profile` repeats a secret of this process's environment,
    under whatever name: it would be stored with the run."""
    flags, variables = _flags_and_variables(profile)
    check_repeated(profile.name, [*flags, *(value for _, value in variables), *profile.model.checkpoints.values()])


def _flags_and_variables(profile: Profile) -> tuple[list[str], list[tuple[str, str]]]:
    flags = [flag for flags in (profile.server.flags, *profile.variants.values()) for flag in flags]
    environments = (profile.server.env, *profile.variant_env.values())
    return flags, [(name, value) for environment in environments for name, value in environment.items()]


def _of_this_machine() -> str:
    """The name of the profile of this machine's GPU. Raises BadInput, with a recipe, for a card that none is for."""
    from ..system import gpu

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


def _resolved(tables: list[tuple[str, dict]], name: str) -> Profile:
    source, table = _Source(tables), {}
    for file, over in tables:
        table = _extended(table, over, file)
    profile = _parse(table, name, source)
    _check_written(profile, source)
    return dataclasses.replace(profile, model=profile.model.measured())


def _warn_of_another_card(profile: Profile) -> None:
    from ..system.gpu import gpu_names

    if profile.device == "cuda" and profile.gpu and not profile.gpu.fits(name := gpu_names()[0]):
        warnings.warn(
            f"the GPU here is {name!r}, profile {profile.name} is for {profile.gpu.name}: every caption of a run of it will "
            "say so, and it gives no verdicts; name the card in the profile's [gpu]",
            stacklevel=3,
        )


def check_workload(profile: Profile) -> None:
    """Raises BadInput unless the trace file and the tokenizer's folder can be read: before anything is started."""
    from .trace import check_file, is_file, named_trace

    workload = profile.workload
    if is_file(workload.trace):
        check_file(workload.trace)
    else:
        named_trace(workload.trace, 1, seed=0, input_tokens=1, output_tokens=1)
    tokenizer = workload.tokenizer
    if tokenizer and not _is_hub_name(tokenizer) and not Path(tokenizer).is_dir():
        raise BadInput(f"no tokenizer at {tokenizer!r}: expected a model's folder, or a hub name ORG/NAME")


def _read(name: str, seen: tuple[str, ...] = ()) -> list[tuple[str, dict]]:
    """The files of a profile, each as (path, table), those that it extends first."""
    path = Path(name).absolute() if name.endswith(".toml") else DATA / "profiles" / f"{name}.toml"
    if str(path) in seen:
        raise BadInput(f"profiles extend each other in a circle: {' -> '.join((*seen, str(path)))}")
    if not path.is_file():
        by = f" (which {seen[-1]} extends)" if seen else ""
        raise BadInput(f"no profile {name!r}{by} (there are: {', '.join(profile_names())}; or give a .toml file)")
    try:
        table = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise BadInput(f"{path}: not valid TOML: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} cannot be read: {error}; expected a TOML file in UTF-8") from None
    table = with_paths(table, path.parent)
    base = table.pop("extends", "")
    if not isinstance(base, str):
        raise BadInput(f"{path}: extends: expected the name of a profile, or a path to a .toml file, in quotes")
    return [*(_read(base, (*seen, str(path))) if base else []), (str(path), table)]


def with_paths(table: dict, folder: Path) -> dict:
    """`table` with its paths absolute; they are relative to `folder`. What is no path stays as it is."""
    table = dict(table)
    if str(table.get("extends")).endswith(".toml"):
        table["extends"] = _located(table["extends"], folder)
    if isinstance(workload := table.get("workload"), dict):
        table["workload"] = workload | {
            key: _located(value, folder)
            for key, value in workload.items()
            if isinstance(value, str)
            and value
            and (key == "tokenizer" or (key == "trace" and value.endswith(_TRACE_FILES)))
        }
    model = table.get("model")
    if isinstance(model, dict) and isinstance(checkpoints := model.get("checkpoints"), dict):
        located = {key: _located(name, folder) if isinstance(name, str) and name else name
                   for key, name in checkpoints.items()}  # fmt: skip
        table["model"] = model | {"checkpoints": located}
    return table


def _is_hub_name(name: str) -> bool:
    """Whether a model's or tokenizer's name is one of a hub (ORG/NAME) and no path."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def _located(name: str, folder: Path) -> str:
    """A path, relative to `folder`, made absolute; a hub name as it is. (A .toml, .csv or .json is never a hub's.)"""
    if _is_hub_name(name) and not name.endswith((".toml", ".csv", ".json")) and not (folder / name).is_dir():
        return name
    return os.path.abspath(folder / os.path.expanduser(name))


def _extended(base: dict, over: dict, file: str) -> dict:
    """`base` with what the table `over` of `file` says otherwise."""
    replaced = over.get("replaces", [])
    known = sorted(typing.get_type_hints(Profile).keys() - {"name", "title", "device"})
    if not isinstance(replaced, list) or not all(key in known for key in replaced):
        raise BadInput(f"{file}: replaces: expected a list of tables, of {', '.join(known)}")
    if absent := [key for key in replaced if key not in over]:
        raise BadInput(f"{file}: replaces: {', '.join(absent)} is not given here, so that nothing would be left of it")
    given = {key: value for key, value in over.items() if key != "replaces"}
    return _merge({key: value for key, value in base.items() if key not in replaced}, given)


def _merge(base: dict, over: dict, at: tuple[str, ...] = ()) -> dict:
    merged = dict(base)
    for key, value in over.items():
        here = (*at, key)
        before = base.get(key)
        whole = here == ("model", "checkpoints") or at == ("protocols",)
        if whole or not (isinstance(value, dict) and isinstance(before, dict)):
            merged[key] = value
            continue
        if here == ("gpu",) and value.get("name", before.get("name")) != before.get("name"):
            before = {}  # nothing that is said of one card holds for another
        merged[key] = _merge(before, value, here)
    return merged


@functools.cache
def _adapter() -> TypeAdapter:
    return TypeAdapter(_File)


def _parse(table: dict, name: str, source: _Source) -> Profile:
    if "name" in table:
        source.refuse(["name"], "a profile is called as its file is; leave it out")
    try:
        file = _adapter().validate_python(table | {"name": name})
    except ValidationError as error:
        _refuse_first(error, source)
    protocols = {protocol: body.resolved() for protocol, body in file.protocols.items()}
    for protocol, body in table.get("protocols", {}).items():
        beside = [n for n, level in enumerate(body["levels"]) if {"repeat", "start"} & level.keys()]
        if "starts" in body and beside:
            at = ["protocols", protocol, "levels", beside[0]]
            source.refuse(at, "repeat stands beside starts, which numbers the repeats itself; leave one of them out")
    built = {f.name: getattr(file, f.name) for f in dataclasses.fields(Profile)}
    profile = Profile(**built | {"protocols": protocols})
    if profile.device not in DEVICES:
        source.refuse(["device"], f"device {profile.device!r} is none of {', '.join(DEVICES)}")
    if profile.emulated and not (profile.emulation and profile.gpu):
        source.refuse(["device"], "an emulated device needs the tables [gpu] and [emulation]")
    if not profile.variants:
        source.refuse(["variants"], "expected at least one variant: NAME = [flags]")
    for variant in profile.variants:
        if not PLAIN_NAME.fullmatch(variant):
            source.refuse(
                ["variants", variant],
                f"variant {variant!r} is no name: letters, digits, '.', '_' and '-', at most 64",
            )
    known = f"(there are: {', '.join(profile.variants)})"
    for variant in profile.variant_env.keys() - profile.variants.keys():
        source.refuse(["variant_env", variant], f"no variant {variant!r} in profile {name} {known}")
    for protocol, levels in protocols.items():
        for n, level in enumerate(levels):
            if level.variant not in profile.variants:
                at = ["protocols", protocol, "levels", n % len(file.protocols[protocol].levels), "variant"]
                source.refuse(at, f"no variant {level.variant!r} in profile {name} {known}")
    return profile


def _check_written(profile: Profile, source: _Source) -> None:
    """Raises BadInput for what a file may not say, though a run that was made with it can be read."""
    check_written(profile.name, *_flags_and_variables(profile))
    set_by_kit = {
        "--model": "[model] says which", "--host": "servers listen on this machine alone",
        "--port": "each start has its own", "--uds": "servers listen on a port",
        "--served-model-name": "each start has its own",
        "--config": "the flags in that file would not be stored with the run; write them here",
    }  # fmt: skip
    if profile.model.weights == "random":
        set_by_kit["--load-format"] = 'weights = "random" makes them up'
    if profile.emulated:
        set_by_kit["--distributed-executor-backend"] = "the emulated GPU is an executor"
    lists = {("server", "flags"): profile.server.flags}
    lists |= {("variants", variant): flags for variant, flags in profile.variants.items()}
    for at, flags in lists.items():
        if said := vllm_flags.problem(flags, set_by_kit):
            source.refuse(at, said)
    environments = {("server", "env"): profile.server.env}
    environments |= {("variant_env", variant): env for variant, env in profile.variant_env.items()}
    for at, env in environments.items():
        for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
            if name in env:
                said = "the server would take another GPU than is watched; set it in the environment of fp8lab itself"
                source.refuse([*at, name], said)
    for key in profile.model.checkpoints.keys() - profile.variants.keys() - {"default"}:
        known = ", ".join(["default", *profile.variants])
        source.refuse(
            ["model", "checkpoints", key], f"no variant {key!r} in profile {profile.name} (there are: {known})"
        )
    asked: dict[str, tuple[str, Level]] = {}
    for protocol, levels in profile.protocols.items():
        for level in levels:
            other, before = asked.setdefault(level.id, (protocol, level))
            if before.requests != level.requests:
                source.refuse(
                    ["protocols", protocol],
                    f"level {level.id} has {level.requests} requests, in protocol {other!r} {before.requests}, and a run holds "
                    f'it once: give both the same, or leave the inherited protocols out with replaces = ["protocols"]',
                )


def _refuse_first(error: ValidationError, source: _Source) -> NoReturn:
    """Raises BadInput for the first of pydantic's findings, a key that is not known before all others."""
    found = sorted(error.errors(include_url=False), key=lambda one: one["type"] != "unexpected_keyword_argument")
    first = found[0]
    at, kind, context = list(first["loc"]), first["type"], first.get("ctx", {})
    if kind == "unexpected_keyword_argument":
        *table, _ = at
        unknown = sorted(one["loc"][-1] for one in found if one["type"] == kind and list(one["loc"][:-1]) == table)
        known = typing.get_type_hints(_table_at(table)).keys()
        known = sorted(known if table else known - {"name"} | {"extends", "replaces"})
        source.refuse(table, f"unknown keys {unknown}; known: {known}", seen_at=at)
    if kind == "missing":
        source.refuse(at, "is missing; give it, or extend a profile that does", seen_at=at[:-1])
    if kind == "value_error":
        source.refuse(at, str(context["error"]))
    expected = _EXPECTED.get(kind, first["msg"]).format(**context)
    source.refuse(at, f"expected {expected}, not {_shown(first['input'], at)}")


_EXPECTED = {
    "float_type": "a number", "int_type": "a whole number", "int_from_float": "a whole number",
    "bool_type": "true or false", "string_type": "a text in quotes", "tuple_type": "a list", "dict_type": "a table",
    "mapping_type": "a table", "dataclass_type": "a table", "finite_number": "a finite number",
    "greater_than": "a number above {gt}", "greater_than_equal": "{ge} or more", "less_than_equal": "at most {le}",
}  # fmt: skip


def _table_at(at: Sequence) -> type:
    """The class of the table at a key path."""
    if not at:
        return Profile
    if at[0] == "protocols":
        return Level if len(at) > 2 else _Protocol
    tables = {"model": Model, "server": ServerOptions, "workload": Workload, "gpu": Card, "emulation": Emulation}
    return Dimensions if len(at) > 1 else tables[at[0]]


def _shown(value, at: Sequence) -> str:
    """A value as an error may show it: what stands among flags, variables and checkpoints may be a secret."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)) or (
        isinstance(value, str) and at[0] in ("gpu", "emulation", "workload", "protocols")
    ):
        return repr(value)[:80]
    return {str: "a text", list: "a list", dict: "a table"}.get(type(value), type(value).__name__)
