"""What to run: the model, the card, the variants (vLLM flags) and the levels of one experiment.

A profile is a TOML file, one of `data/profiles/` by name or any other by path. Its paths are relative to the file.
`extends = "NAME"` starts from another profile: tables are merged key by key, everything else is replaced, also a list of
flags, a protocol, [model.checkpoints], and the tables that `replaces` names: `replaces = ["protocols"]` means these
protocols and no others. A [gpu] with another name is another card and takes over nothing of the one before.
"""

import contextlib
import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, Strict

from ..errors import BadInput
from ..paths import without_home
from .dimensions import FORMATS, Dimensions, ModelShape, context, dimensions, model_shape, quantisation, recipe
from .flags import flag_of, joined, parse

FORMAT_FLAGS = ("--dtype", "--quantization", "--kv-cache-dtype")
API_SERVERS, RUST = "--api-server-count", "VLLM_USE_RUST_FRONTEND"
WEIGHTS = ("random", "packaged", "checkpoint")
# How far the memory that NVML reports may be from the datasheet's.
_SAME_MEMORY = 0.05
# Words of a card's name that make it another card: they must be in both names or in none.
_OTHER_CARD = {"pcie", "nvl", "mig", "3e", "max", "super", "ti", "ada"}

Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(strict=True, gt=0, le=1)]
Cost = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(strict=True, ge=1)]
CountOrNone = Annotated[int, Field(strict=True, ge=0)]


class ProfileTable:
    """A table of a profile's file: pydantic reads it, and refuses keys that it does not have."""

    __pydantic_config__ = ConfigDict(extra="forbid")


def names_of(given: str | Sequence[str]) -> list[str]:
    """The names of a list; a text is one."""
    return [given] if isinstance(given, str) else list(given)


@dataclass(frozen=True, kw_only=True)
class Level(ProfileTable):
    """One variant at one offered rate (requests/s; `inf` sends all at once), once. With `cross_check` the same load is sent a
    second time by `vllm bench serve`, kept beside the result. A `start` above 0 asks for a server of its own: levels of that
    number share one start a variant (a protocol's `starts` sets it)."""

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
        return level_id(self.variant, self.rate, self.repeat)


def level_id(variant: str, rate: float, repeat: int = 1) -> str:
    """The id of a level: its folder in a run, and its name in claims and figures."""
    return f"{variant}-{rate:g}rps-r{repeat}"


def dilation_of(served_name: str) -> float | None:
    """The time dilation of the emulated GPU that serves a model of this name; None for any other server."""
    found = re.search(r"-EMULATED-x([\d.]+)-", served_name)
    return float(found[1]) if found else None


def rate_name(rate: float) -> str:
    """An offered rate as text: "50 req/s", "all at once"."""
    return "all at once" if math.isinf(rate) else f"{rate:g} req/s"


@dataclass(frozen=True, kw_only=True)
class Card(ProfileTable):
    """A GPU's datasheet: memory in GiB, bandwidth in bytes/s, dense peaks in FLOP/s, the most power in W. `nvml` holds
    the names that NVML (`nvidia-smi -L`) gives it; without them NVML's is compared with `name`, word by word."""

    name: str
    memory_gib: Positive
    hbm_bytes_per_s: Positive
    bf16_flops: Positive
    fp8_flops: Positive
    power_w: Positive | None = None
    nvml: tuple[str, ...] = ()

    def flops(self, eight_bit: bool) -> float:
        """The peak of products in 8 bits (FP8 or INT8) or in BF16."""
        return self.fp8_flops if eight_bit else self.bf16_flops

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
class Emulation(ProfileTable):
    """The emulated card: achieved fractions of the datasheet, fixed costs, the link between cards, and time dilation. With `fit`,
    a file of `data/fits`, steps take what the step model of the variant's name says, and the KV cache is as large as there."""

    hbm_fraction: Share
    flops_fraction: Share
    step_overhead_us: Cost
    frontend_us_per_token: Cost
    reserved_gib: Cost
    # NVLink of an H100, one way (datasheet), and what an all-reduce costs however small it is (assumed).
    link_bytes_per_s: Positive = 450e9
    all_reduce_us: Cost = 10.0
    fit: str = ""
    time_dilation: Annotated[float, Field(strict=True, ge=1, allow_inf_nan=False)] = 1.0


@dataclass(frozen=True, kw_only=True)
class Model(ProfileTable):
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

    def measured(self) -> "Model":
        """This model with the dimensions of every checkpoint whose folder is there."""
        if self.weights != "checkpoint":
            return self
        found = {key: dimensions_at(Path(name)) for key, name in self.checkpoints.items() if not is_hub_name(name)}
        known = {key: one for key, one in found.items() if one}
        return dataclasses.replace(self, dimensions={**self.dimensions, **known})


def dimensions_at(folder: Path) -> Dimensions | None:
    """The dimensions of the checkpoint in a folder; None where there is none, or it is none of which they are known. Raises
    BadInput for a configuration that cannot be read."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        config, apart = json.loads(path.read_text()), folder / "hf_quant_config.json"
        # ModelOpt writes it beside, and vLLM reads it there.
        if apart.is_file() and not config.get("quantization_config"):
            config["quantization_config"] = json.loads(apart.read_text()).get("quantization")
        return dimensions(config)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise BadInput(f"{path} is not a model's configuration: {error}") from None


@dataclass(frozen=True, kw_only=True)
class ServerOptions(ProfileTable):
    """Flags and environment that all variants share; the time a start may take, in seconds."""

    flags: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    start_timeout_s: Positive = 600


@dataclass(frozen=True, kw_only=True)
class Workload(ProfileTable):
    """The trace ("sharegpt-like", "random", "azure-conv", "azure-code", or a file, see `trace.from_file`), its seed, and how
    many requests warm a fresh server up, unmeasured. The lengths are those of "random"; `tokenizer` counts the tokens of a
    file of conversations (default: the model's own)."""

    trace: str = "sharegpt-like"
    seed: CountOrNone = 0
    warmup_requests: CountOrNone = 32
    input_tokens: Count = 1024
    output_tokens: Count = 128
    tokenizer: str = ""


@dataclass(frozen=True, kw_only=True)
class Variant(ProfileTable):
    """One server configuration: `flags` beside those that all share, which they win over, and the variables `env`; both
    after those of its `base`, the variant that it derives from. Where a file names none, that is the first variant that serves
    the same number formats ("": it is itself the first). `NAME = [flags]` is short for flags alone. `api_server` is vLLM's HTTP
    process. `python` starts it: the interpreter of another environment that holds vLLM (empty: this one's), so that a version of vLLM
    is a variant like any other. It serves a checkpoint made by a `recipe` (`dimensions.RECIPES`) out of the profile's model, with
    weights that are read from disk ("": the profile's model itself)."""

    flags: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    base: str = ""
    api_server: Literal["", "python", "rust"] = ""
    python: str = ""
    recipe: str = ""

    @property
    def formats(self) -> tuple[str, ...]:
        """The number formats that it serves: of its checkpoint, and what it asks vLLM for."""
        return (self.recipe, *(flag_of(self.flags, name) for name in FORMAT_FLAGS))

    def on(self, base: "Variant") -> "Variant":
        """This one with what `base` has and it leaves: flags, variables, Python, recipe."""
        return dataclasses.replace(
            self, flags=tuple(joined(base.flags, self.flags)), env={**base.env, **self.env},
            python=self.python or base.python, recipe=self.recipe or base.recipe,
        )  # fmt: skip


# The tables of a profile's file; those of [variants.NAME] are all alike.
TABLES = {"model": Model, "server": ServerOptions, "workload": Workload, "gpu": Card, "emulation": Emulation}
TABLES["variants"] = Variant


@dataclass(frozen=True, kw_only=True)
class Profile(ProfileTable):
    """One experiment, resolved; paths are absolute."""

    name: str
    title: str
    device: Literal["cuda", "emulated", "cpu"]
    model: Model
    server: ServerOptions
    variants: Mapping[str, Variant]
    workload: Workload
    protocols: Mapping[str, tuple[Level, ...]]
    gpu: Card | None = None
    emulation: Emulation | None = None

    @property
    def time_dilation(self) -> float:
        """How many wall seconds one second of model time takes; 1 unless the GPU is emulated."""
        return self.emulation.time_dilation if self.emulation else 1.0

    @property
    def emulated(self) -> bool:
        return self.device == "emulated"

    @property
    def emulated_mark(self) -> str:
        """What a served model's name says of an emulated GPU, for clients that know no profile (`dilation_of`)."""
        return f"-EMULATED-x{self.time_dilation:g}" if self.emulated else ""

    def variant(self, name: str) -> Variant:
        """Raises BadInput for a name that no variant has."""
        if name not in self.variants:
            raise BadInput(f"no variant {name!r} in profile {self.name} (there are: {', '.join(self.variants)})")
        return self.variants[name]

    def flags(self, variant: str) -> list[str]:
        """All flags of a variant's server: those that all share, then its own, which win."""
        return joined(self.server.flags, self.variant(variant).flags)

    def base(self, name: str) -> str:
        """The variant that `name` derives from, or itself; also for a variant that the profile no longer names."""
        return (self.variants[name].base if name in self.variants else "") or name

    def setup(self, name: str) -> str:
        """What a variant changes beside its base, in words: variants of the same setup differ in their bases alone."""
        if name not in self.variants:
            return name
        return ", ".join([self._api_server(name), *self._beside(name, self.base(name))])

    def changes(self, name: str, before: str) -> str:
        """What a variant changes beside another one, in the same words; empty for nothing."""
        server = self._api_server(name)
        other = [] if server == self._api_server(before) else [f"API server: {server}"]
        return ", ".join([*other, *self._beside(name, before)])

    def changed(self, name: str) -> set[str]:
        """The names of the flags, variables and fields that a variant changes beside its base."""
        one, other = self.variants[name], self.variants.get(self.base(name), Variant())
        held = parse(other.flags)
        found = {flag.name for flag in parse(one.flags) if flag not in held}
        found |= {key for key in one.env.keys() | other.env.keys() if one.env.get(key) != other.env.get(key)}
        return found | {field for field in ("python", "recipe") if getattr(one, field) != getattr(other, field)}

    def _api_server(self, name: str) -> str:
        one = self.variants[name]
        if one.api_server == "rust":
            return "Rust"
        servers = flag_of(one.flags, API_SERVERS)
        return "one Python process" if servers == "auto" else f"{servers} Python processes"

    def _beside(self, name: str, before: str) -> list[str]:
        """The flags and variables that `before` lacks, less those of the API server."""
        one, other = self.variants[name], self.variants[before]
        held = parse(other.flags)
        words = [flag.brief.lstrip("-") for flag in parse(one.flags) if flag not in held and flag.name != API_SERVERS]
        words += [f"python {interpreter(one.python)}"] if one.python != other.python else []
        words += [f"recipe {one.recipe or 'none'}"] if one.recipe != other.recipe else []
        return words + [
            f"{key}={value}" for key, value in one.env.items() if key != RUST and other.env.get(key) != value
        ]

    def _key(self, variant: str) -> str:
        """Under which name the checkpoint of `variant` stands: its own, its base's, or the default."""
        named = self.model.checkpoints
        return next((key for key in (variant, self.base(variant)) if named.get(key)), "default")

    def checkpoint(self, variant: str) -> str:
        """The hub name or path of the checkpoint that `variant` serves; a path must exist."""
        name = self.model.checkpoints.get(self._key(variant))
        if not name:
            raise BadInput(f"no checkpoint is named for variant {variant!r} in [model.checkpoints]")
        if is_hub_name(name):
            return name
        path = Path(name).expanduser()
        if not (path / "config.json").is_file():
            raise BadInput(f"no model at {name!r}: expected a folder with a config.json, or a hub name ORG/NAME")
        return str(path)

    def served(self, variant: str) -> str:
        """What tells the model that `variant` serves from that of another: its checkpoint, or the shapes' name."""
        model = self.model
        return model.checkpoints.get(self._key(variant), "") if model.weights == "checkpoint" else model.shapes

    def check_quantization(self, variant: str) -> None:
        """Raises BadInput for a --quantization that vLLM refuses beside what the checkpoint of `variant` says of itself
        (`_verify_quantization` in vllm/config/model.py). Of one that a hub holds nothing is known here."""
        asked, name, held = flag_of(self.flags(variant), "--quantization").lower(), self.served(variant), ""
        if (made := self.variant(variant).recipe) and not self.emulated:
            name, held = f"recipe {made}", recipe(made).method.replace("none", "")
        elif self.model.weights == "checkpoint" and name and not is_hub_name(name):
            with contextlib.suppress(OSError, ValueError, AttributeError):  # what cannot be read is refused elsewhere
                config = json.loads((Path(name).expanduser() / "config.json").read_text())
                held = str(quantisation(config).get("quant_method") or "").lower().replace("compressed_", "compressed-")
        also = (f"{held}_marlin", f"auto_{held}", "marlin", "moe_wna16") if held in ("gptq", "awq") else ()
        settled = ("modelopt", "auto-round", "mxfp4", "gpt_oss")  # by vLLM, whatever the flag says
        if held and not held.startswith(settled) and asked not in ("auto", "humming", "deepseek_v4_fp8", held, *also):
            raise BadInput(
                f"variant {variant}: --quantization {asked} beside {name}, which says that it is quantised by {held}: "
                "vLLM refuses that; leave --quantization out, the checkpoint says enough"
            )

    def shape(self, variant: str) -> ModelShape | None:
        """The sizes of the model that `variant` serves; None where they are not known: a checkpoint of a hub, a folder that
        was not there, a model that is not Llama's kin."""
        made = self.variants[variant].recipe if variant in self.variants else ""
        weights = FORMATS[recipe(made).weights] if made else None
        if self.model.weights != "checkpoint":
            return model_shape(self.model.shapes, weights)
        known = self.model.dimensions.get(self._key(variant))
        return known and ModelShape(known, weights)

    def context(self) -> int | None:
        """The most tokens, in and out together, that every variant takes in a request; None where none is known."""
        known = [context(self.flags(name), self.shape(name)) for name in self.variants]
        return min(filter(None, known), default=None)

    def levels(self, protocol: str) -> tuple[Level, ...]:
        if protocol not in self.protocols:
            known = ", ".join(map(repr, self.protocols))
            raise BadInput(f"no protocol {protocol!r} in profile {self.name} (there are: {known})")
        return self.protocols[protocol]

    def as_dict(self) -> dict:
        """The resolved profile as plain values in the shape of its file; `from_dict` reads it back. Paths below the home
        folder begin with ~: it may be shared."""
        values = dataclasses.asdict(self)
        values |= {key: without_home(values[key]) for key in ("server", "variants", "workload")}
        values["model"]["checkpoints"] = without_home(values["model"]["checkpoints"])
        for name, one in self.variants.items():
            # One that only has the base's formats is given it when it is read back; named, it would get that one's flags too.
            whole = one.on(self.variants[one.base]) if one.base else one
            if dataclasses.replace(whole, env={k: v for k, v in whole.env.items() if k != RUST or k in one.env}) != one:
                values["variants"][name]["base"] = ""
        values["protocols"] = {name: {"levels": list(levels)} for name, levels in values["protocols"].items()}
        return values

    def identity(self) -> dict:
        """`as_dict` without what is only looked up or follows from the rest: older runs do not have it, and measured the
        same."""
        values = self.as_dict()
        del values["model"]["dimensions"]
        for variant in values["variants"].values():
            del variant["base"], variant["api_server"]
        if values["gpu"]:
            values["gpu"] = {key: one for key, one in values["gpu"].items() if key not in ("nvml", "power_w")}
        return values


def interpreter(python: str) -> str:
    """A variant's Python without this machine's paths: the environment's folder and what is in it. ("": this one's.)"""
    return "/".join(Path(python).parts[-3:]) if python else "python3"


def is_hub_name(name: str) -> bool:
    """Whether a model's or tokenizer's name is one of a hub (ORG/NAME) and no path."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))
