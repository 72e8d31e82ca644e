"""What to run: the model, the card, the variants (vLLM flags) and the levels of one experiment.

A profile is a TOML file, one of `data/profiles/` by name or any other by path. `extends = "NAME"`
starts from another profile: tables are merged, everything else is replaced.
"""

import dataclasses
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .errors import BadInput
from .paths import DATA, PLAIN_NAME
from .profile_secrets import check_repeated, check_written
from .provenance import without_home

DEVICES = ("cuda", "emulated", "cpu")
WEIGHTS = ("random", "packaged", "checkpoint")


@dataclass(frozen=True, kw_only=True)
class Level:
    """One variant at one offered rate, once. `rate` is in requests/s; `inf` sends all at once.

    With `cross_check` the same load is sent a second time by `vllm bench serve`, kept beside the result. A `start` above 0
    asks for a server of its own: levels of that number share one start a variant (see `_levels_of`).
    """

    variant: str
    rate: float
    requests: int
    repeat: int = 1
    cross_check: bool = dataclasses.field(default=False, compare=False)
    start: int = dataclasses.field(default=0, compare=False)

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
class Card:
    """A GPU's datasheet: memory in GiB, bandwidth in bytes/s, dense peaks in FLOP/s, the most power in W."""

    name: str
    memory_gib: float
    hbm_bytes_per_s: float
    bf16_flops: float
    fp8_flops: float
    power_w: float | None = None


@dataclass(frozen=True, kw_only=True)
class Emulation:
    """The emulated card: achieved fractions of the datasheet, fixed costs, and time dilation."""

    hbm_fraction: float
    flops_fraction: float
    step_overhead_us: float
    frontend_us_per_token: float
    reserved_gib: float
    time_dilation: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Model:
    """Which model is served: local shapes with random weights or those that a package ships, or named checkpoints."""

    shapes: str = ""
    weights: str = "random"
    checkpoints: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self):
        if self.weights not in WEIGHTS:
            raise BadInput(f"weights {self.weights!r} is unknown; choose one of {', '.join(WEIGHTS)}")

    def checkpoint(self, variant: str) -> str:
        """The checkpoint's hub name or path for `variant`; a path must exist."""
        name = self.checkpoints.get(variant) or self.checkpoints.get("default")
        if not name:
            raise BadInput(f"no checkpoint is named for variant {variant!r} in [model.checkpoints]")
        looks_local = name.startswith((".", "/", "~")) or name.count("/") != 1
        path = Path(name).expanduser()
        if looks_local and not (path / "config.json").is_file():
            raise BadInput(f"no model at {name!r}: expected a folder with a config.json, or a hub name ORG/NAME")
        return str(path) if looks_local else name


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Flags and environment that all variants share; the time a start may take, in seconds."""

    flags: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    start_timeout_s: float = 600


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The trace ("sharegpt-like", "random", or a .csv or .json file), its seed, and how many requests warm a fresh
    server up, unmeasured. The lengths are those of "random"; `tokenizer` counts a ShareGPT file's tokens (default: the
    model's own)."""

    trace: str = "sharegpt-like"
    seed: int = 0
    warmup_requests: int = 32
    input_tokens: int = 1024
    output_tokens: int = 128
    tokenizer: str = ""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One experiment, resolved. `device` is cuda, emulated or cpu; `variant_env` holds the environment
    variables that a variant needs beside its flags."""

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

    def levels(self, protocol: str) -> tuple[Level, ...]:
        if protocol not in self.protocols:
            known = ", ".join(self.protocols)
            raise BadInput(f"no protocol {protocol!r} in profile {self.name} (there are: {known})")
        return self.protocols[protocol]

    def as_dict(self) -> dict:
        """The resolved profile as plain values in the shape of its file; `from_dict` reads it back. Checkpoints
        below the home folder begin with ~: it may be shared."""
        values = dataclasses.asdict(self)
        checkpoints = values["model"]["checkpoints"]
        values["model"]["checkpoints"] = {variant: without_home(name) for variant, name in checkpoints.items()}
        values["protocols"] = {name: {"levels": list(levels)} for name, levels in values["protocols"].items()}
        return values


def profile_names() -> list[str]:
    return sorted(path.stem for path in (DATA / "profiles").glob("*.toml"))


def load_profile(name: str = "auto", *, weights: str | None = None, model: str | None = None) -> Profile:
    """The profile `name`: one of `profile_names()`, a path to a TOML file, or "auto".

    "auto" is the machine's: h200-80gb or h100-80gb with a GPU, emulated-h100 without.
    `weights` (one of WEIGHTS) overrides the profile's; `model` serves that checkpoint
    (hub name or path) for every variant. Raises BadInput, also for a GPU profile without a GPU and for one that
    repeats a secret of the environment.
    """
    profile = read_profile(name)
    check_device(profile)
    overrides = {"weights": weights} if weights else {}
    if model:
        # Another model has other shapes than the profile's.
        overrides = {"weights": "checkpoint", "checkpoints": {"default": model}, "shapes": ""}
    profile = dataclasses.replace(profile, model=dataclasses.replace(profile.model, **overrides))
    if profile.model.weights == "checkpoint":
        for variant in profile.variants:
            profile.model.checkpoint(variant)
    check_environment(profile)
    return profile


def read_profile(name: str) -> Profile:
    """The profile `name` as written, whether or not this machine can run it."""
    if name == "auto":
        from .gpu import gpu_names

        gpus = gpu_names()
        name = ("h200-80gb" if "H200" in gpus[0] else "h100-80gb") if gpus else "emulated-h100"
    return _parse(_read(name), Path(name).stem)


def from_dict(values: dict) -> Profile:
    """The profile that `Profile.as_dict` wrote down, for example in a run folder."""
    kept = {key: value for key, value in values.items() if value is not None and key != "name"}
    return _parse(kept, values["name"])


def check_device(profile: Profile) -> None:
    """Raises BadInput when `profile` needs a GPU and this machine shows none."""
    from .gpu import gpu_names

    if profile.device == "cuda" and not gpu_names():
        raise BadInput(
            f"profile {profile.name!r} needs an NVIDIA GPU and none is visible here; "
            "use --profile emulated-h100 to run without one"
        )


def check_environment(profile: Profile) -> None:
    """Raises BadInput when a flag, variable or checkpoint of `profile` repeats a secret of this process's environment,
    under whatever name: it would be stored with the run."""
    flags, variables = _flags_and_variables(profile)
    check_repeated(profile.name, [*flags, *(value for _, value in variables), *profile.model.checkpoints.values()])


def _flags_and_variables(profile: Profile) -> tuple[list[str], list[tuple[str, str]]]:
    flags = [str(flag) for flags in (profile.server.flags, *profile.variants.values()) for flag in flags]
    environments = (profile.server.env, *profile.variant_env.values())
    return flags, [(name, str(value)) for environment in environments for name, value in environment.items()]


def _read(name: str, seen: tuple[str, ...] = ()) -> dict:
    path = Path(name) if str(name).endswith(".toml") else DATA / "profiles" / f"{name}.toml"
    if name in seen:
        raise BadInput(f"profiles extend each other in a circle: {' -> '.join((*seen, name))}")
    if not path.is_file():
        raise BadInput(f"no profile {name!r} (there are: {', '.join(profile_names())}; or give a .toml file)")
    try:
        table = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise BadInput(f"{path}: not valid TOML: {error}") from None
    base = table.pop("extends", None)
    return _merge(_read(base, (*seen, name)), table) if base else table


def _levels_of(levels: tuple[Level, ...], body: Mapping) -> tuple[Level, ...]:
    """A protocol's levels. With `starts = N` each is measured N times, as repeats 1 to N, each on a server of its own:
    what differs from start to start is then in the interval."""
    starts = body.get("starts", 0)
    return (
        tuple(dataclasses.replace(level, repeat=n, start=n) for n in range(1, starts + 1) for level in levels) or levels
    )


def _merge(base: dict, over: dict) -> dict:
    merged = dict(base)
    for key, value in over.items():
        both_tables = isinstance(value, dict) and isinstance(base.get(key), dict)
        # Protocols are lists of levels: a profile that names one means exactly those levels.
        merged[key] = _merge(base[key], value) if both_tables and key != "protocols" else value
    return merged


def _parse(table: dict, name: str) -> Profile:
    def build(cls, value, where):
        known = {f.name for f in dataclasses.fields(cls)}
        if not isinstance(value, dict) or (unknown := set(value) - known):
            raise BadInput(f"profile {name}: {where}: unknown keys {sorted(unknown)}; known: {sorted(known)}")
        try:
            return cls(**value)
        except TypeError as error:
            raise BadInput(f"profile {name}: {where}: {error}") from None

    protocols = {
        protocol: _levels_of(tuple(build(Level, level, f"protocols.{protocol}") for level in body["levels"]), body)
        for protocol, body in table.get("protocols", {}).items()
    }
    parts = {"model": Model, "server": ServerOptions, "workload": Workload, "gpu": Card, "emulation": Emulation}
    built = {key: build(cls, table[key], key) for key, cls in parts.items() if key in table}
    if "server" in built:
        built["server"] = dataclasses.replace(built["server"], flags=tuple(built["server"].flags))
    variants = {key: tuple(flags) for key, flags in table.get("variants", {}).items()}
    profile = build(Profile, table | {"name": name, "variants": variants, "protocols": protocols} | built, "top level")
    if profile.device not in DEVICES:
        raise BadInput(f"profile {name}: device {profile.device!r} is none of {', '.join(DEVICES)}")
    if profile.emulated and not (profile.emulation and profile.gpu):
        raise BadInput(f"profile {name}: an emulated device needs the tables [gpu] and [emulation]")
    if profile.emulation and not (profile.time_dilation >= 1 and math.isfinite(profile.time_dilation)):
        raise BadInput(f"profile {name}: time_dilation {profile.time_dilation} must be a number from 1 up")
    for variant in profile.variant_env:
        profile.variant_flags(variant)
    for level in (level for levels in protocols.values() for level in levels):
        profile.variant_flags(level.variant)
    for variant in variants:
        if not PLAIN_NAME.fullmatch(variant):
            raise BadInput(
                f"profile {name}: variant {variant!r} is no name: letters, digits, '.', '_' and '-', at most 64"
            )
    check_written(name, *_flags_and_variables(profile))
    return profile
