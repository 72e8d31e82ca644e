"""Reading profiles: files that extend each other, or what a run folder holds; one clear error for what cannot be."""

import contextlib
import dataclasses
import functools
import json
import os
import re
import tomllib
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from pydantic import TypeAdapter, ValidationError

from ..errors import BadInput
from ..paths import DATA, PLAIN_NAME, with_homes
from . import flags as vllm_flags
from .dimensions import Dimensions, recipe
from .profile import RUST, TABLES, Count, Level, Profile, ProfileTable, Variant, is_hub_name
from .trace import is_file


@dataclass(frozen=True, kw_only=True)
class _Levels(Level):
    """Levels as a file gives them: with `repeats = N` it is N, repeats 1 to N, the first alone with a cross-check."""

    repeats: Count = 1

    def resolved(self) -> tuple[Level, ...]:
        same = {f.name: getattr(self, f.name) for f in dataclasses.fields(Level)}
        first = Level(**same)
        more = range(2, self.repeats + 1)
        return (first, *(Level(**same | {"repeat": n, "cross_check": False}) for n in more))


@dataclass(frozen=True, kw_only=True)
class _Protocol(ProfileTable):
    """A protocol as a file gives it. With `starts = N` each level is measured N times, as repeats 1 to N, each on a server
    of its own: what differs from start to start is then in the interval."""

    levels: tuple[_Levels, ...]
    starts: Count | None = None

    def resolved(self) -> tuple[Level, ...]:
        levels = [one for level in self.levels for one in level.resolved()]
        if self.starts is None:
            return tuple(levels)
        again = range(1, self.starts + 1)
        return tuple(dataclasses.replace(level, repeat=n, start=n) for n in again for level in levels)


@dataclass(frozen=True, kw_only=True)
class _File(Profile):
    """A profile as files give it, merged."""

    protocols: Mapping[str, _Protocol] = field(default_factory=dict)


class _Source:
    """The files that a profile was merged from, the extended ones first: which of them an error is in."""

    def __init__(self, tables: Sequence[tuple[str, dict]]):
        self.tables = tables

    @contextlib.contextmanager
    def at(self, *at: str | int) -> Iterator[None]:
        """Says of a BadInput that the block raises where it is."""
        try:
            yield
        except BadInput as error:
            self.refuse(at, str(error))

    def refuse(self, at: Sequence, said: str, *, seen_at: Sequence | None = None) -> NoReturn:
        """Raises BadInput that names the key path `at` and the last file that gives it, or gives `seen_at`."""
        place = at if seen_at is None else seen_at
        file = next((file for file, table in reversed(self.tables) if _holds(table, place)), self.tables[-1][0])
        raise BadInput(": ".join(filter(None, (file, _key_path(at), said))))


def _holds(table, at: Sequence) -> bool:
    for key in at:
        try:
            table = table[key]
        except (KeyError, IndexError, TypeError):
            return False
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
    """The names of the profiles in `data/profiles`."""
    return sorted(path.stem for path in (DATA / "profiles").glob("*.toml"))


def read_profile(name: str | Path) -> Profile:
    """The profile `name` as written, whether or not this machine can run it."""
    return _resolved(_read(str(name)), Path(name).stem)


def read_changed(name: str, over: dict, file: str | Path, where: str = "") -> Profile:
    """The profile `name` with what the table `over` out of `file` (at `where`) says otherwise; its paths are relative to
    that file."""
    table = with_paths(over, Path(file).absolute().parent)
    return _resolved([*_read(name), (f"{file}: {where}" if where else str(file), table)], Path(name).stem)


def from_dict(values: dict) -> Profile:
    """The profile that `Profile.as_dict` wrote down, for example in a run folder. It may be older than what is refused in
    a file today."""
    held = {key: value for key, value in values.items() if value is not None and key != "name"}
    table = with_paths(held, Path.cwd())
    protocols = {}
    for name, body in table.get("protocols", {}).items():
        # JSON has no infinity: the rate of all at once is a text there.
        protocols[name] = body | {"levels": [one | {"rate": float(one["rate"])} for one in body["levels"]]}
    return _parse(table | {"protocols": protocols}, values["name"], _Source([(f"profile {values['name']}", table)]))


def flags_and_variables(profile: Profile) -> tuple[list[str], list[tuple[str, str]]]:
    """All vLLM flags of a profile, and all (name, value) of its variables: its own and its variants'."""
    every = (profile.server, *profile.variants.values())
    return [flag for one in every for flag in one.flags], [item for one in every for item in one.env.items()]


def _resolved(tables: list[tuple[str, dict]], name: str) -> Profile:
    source, table = _Source(tables), {}
    for file, over in tables:
        table = _extended(table, over, file)
    profile = _parse(table, name, source)
    _check_written(profile, source)
    return dataclasses.replace(profile, model=profile.model.measured())


def _read(name: str, seen: tuple[str, ...] = ()) -> list[tuple[str, dict]]:
    """The files of a profile, each as (path, table), those that it extends first."""
    path = Path(name).absolute() if name.endswith(".toml") else DATA / "profiles" / f"{name}.toml"
    if str(path) in seen:
        raise BadInput(f"profiles extend each other in a circle: {' -> '.join((*seen, str(path)))}")
    if not path.is_file():
        by = f" (which {seen[-1]} extends)" if seen else ""
        raise BadInput(f"no profile {name!r}{by} (there are: {', '.join(profile_names())}; or give a .toml file)")
    try:
        table = tomllib.loads(path.read_text("utf-8-sig"))
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
    """`table` with its paths absolute; they are relative to `folder`, but for those of flags and variables, where ~ alone is
    read. What is no path stays as it is, but that a variant which is a list of flags becomes a table."""
    table = table | {key: with_homes(table[key]) for key in ("server", "variants", "variant_env") if key in table}
    if str(table.get("extends")).endswith(".toml"):
        table["extends"] = located(table["extends"], folder)
    if isinstance(workload := table.get("workload"), dict):
        table["workload"] = workload = dict(workload)
        if isinstance(tokenizer := workload.get("tokenizer"), str) and tokenizer:
            workload["tokenizer"] = located(tokenizer, folder)
        if isinstance(trace := workload.get("trace"), str) and is_file(trace):
            workload["trace"] = _absolute(trace, folder)
    if isinstance(variants := table.get("variants"), dict):
        table["variants"] = {name: _variant(one, folder) for name, one in variants.items()}
    model = table.get("model")
    if isinstance(model, dict) and isinstance(checkpoints := model.get("checkpoints"), dict):
        absolute = {k: located(v, folder) if isinstance(v, str) and v else v for k, v in checkpoints.items()}
        table["model"] = model | {"checkpoints": absolute}
    return table


def located(name: str, folder: Path) -> str:
    """A path, relative to `folder`, made absolute; a hub name as it is. (A .toml, .csv or .json is never a hub's.)"""
    if is_hub_name(name) and not name.endswith((".toml", ".csv", ".json")) and not (folder / name).is_dir():
        return name
    return _absolute(name, folder)


def _absolute(path: str, folder: Path) -> str:
    return os.path.abspath(folder / os.path.expanduser(path))


def _variant(one: object, folder: Path) -> object:
    if isinstance(one, list):
        return {"flags": one}
    if isinstance(one, dict) and isinstance(python := one.get("python"), str) and python:
        return one | {"python": _absolute(python, folder)}
    return one


def _with_older_variables(table: dict, source: "_Source") -> dict:
    """`table` with each variant's `env`, which older profiles have in a table [variant_env] of its own."""
    older, variants = table.get("variant_env"), table.get("variants")
    if not (isinstance(older, dict) and isinstance(variants, dict)):
        return table
    for name in older:
        if name not in variants:
            source.refuse(["variant_env", name], f"no variant {name!r} (there are: {', '.join(variants)})")
    changed = {k: {"env": older[k]} | one for k, one in variants.items() if k in older and isinstance(one, dict)}
    return {key: value for key, value in table.items() if key != "variant_env"} | {"variants": variants | changed}


def _derived(profile: Profile, source: "_Source") -> Profile:
    """`profile` with each variant whole: its flags and variables after those of its base, and what follows from them."""
    whole: dict[str, Variant] = {}

    def resolve(name: str, on: tuple[str, ...] = ()) -> Variant:
        if name in whole:
            return whole[name]
        one = profile.variants[name]
        if name in on:
            circle = " -> ".join((*on, name))
            source.refuse(["variants", name, "base"], f"variants derive from each other in a circle: {circle}")
        if one.base:
            with source.at("variants", name, "base"):
                profile.variant(one.base)
            if said := vllm_flags.problem(one.flags, {}):
                source.refuse(["variants", name, "flags"], said)
            base = resolve(one.base, (*on, name))
            api_server = one.api_server or ("" if RUST in one.env else base.api_server)
            one = dataclasses.replace(one.on(base), base=base.base or one.base, api_server=api_server)
        rust = one.api_server == "rust" or (not one.api_server and one.env.get(RUST, "0") != "0")
        env = {key: value for key, value in one.env.items() if key != RUST or rust}
        env |= {RUST: "1"} if one.api_server == "rust" else {}
        whole[name] = dataclasses.replace(one, env=env, api_server="rust" if rust else "python")
        return whole[name]

    first: dict[tuple, str] = {}
    for name in profile.variants:
        one = resolve(name)
        served = (profile.served(name), *one.formats) if profile.model.weights == "checkpoint" else one.formats
        before = first.setdefault(served, name)
        if not one.base and before != name:
            whole[name] = dataclasses.replace(one, base=before)
    return dataclasses.replace(profile, variants={name: whole[name] for name in profile.variants})


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
    table = _with_older_variables(table, source)
    try:
        file = _adapter().validate_python(table | {"name": name})
    except ValidationError as error:
        _refuse_first(error, source)
    for protocol, body in table.get("protocols", {}).items():
        for n, level in enumerate(body["levels"]):
            beside = {"repeat", "start", "repeats"} & level.keys()
            if beside and "starts" in body:
                said = f"{min(beside)} stands beside starts, which numbers the repeats itself; leave one of them out"
                source.refuse(["protocols", protocol, "levels", n], said)
            if {"repeat", "repeats"} <= level.keys():
                said = "repeat stands beside repeats, which numbers them from 1; leave one of them out"
                source.refuse(["protocols", protocol, "levels", n], said)
    built = {f.name: getattr(file, f.name) for f in dataclasses.fields(Profile)}
    built["protocols"] = {protocol: body.resolved() for protocol, body in file.protocols.items()}
    profile = Profile(**built)
    if profile.emulated and not (profile.emulation and profile.gpu):
        source.refuse(["device"], "an emulated device needs the tables [gpu] and [emulation]")
    if not profile.variants:
        source.refuse(["variants"], "expected at least one variant: NAME = [flags]")
    for variant in profile.variants:
        if not PLAIN_NAME.fullmatch(variant):
            said = f"variant {variant!r} is no name: letters, digits, '.', '_' and '-', at most 64"
            source.refuse(["variants", variant], said)
    kept = next((file for file, over in source.tables if [*over.get("replaces", ())] == ["variants"]), "")
    told = kept and f'; {kept} replaces variants alone: give protocols too, with replaces = ["variants", "protocols"]'
    for protocol, body in file.protocols.items():
        for n, level in enumerate(body.levels):
            try:
                profile.variant(level.variant)
            except BadInput as error:
                source.refuse(["protocols", protocol, "levels", n, "variant"], f"{error}{told}")
    for variant, one in profile.variants.items():
        with source.at("variants", variant, "recipe"):
            one.recipe and recipe(one.recipe)
    return _derived(profile, source)


# Wider than any card; a number that is out of it is in another unit.
_UNITS = {
    ("gpu", "memory_gib"): (1, 2000, "GiB, such as 79.6"), ("gpu", "power_w"): (1, 1e5, "W, such as 700"),
    ("gpu", "hbm_bytes_per_s"): (1e10, 1e14, "bytes/s, such as 3.35e12"),
    ("gpu", "bf16_flops"): (1e12, 1e17, "FLOP/s, such as 989e12"),
    ("gpu", "fp8_flops"): (1e12, 1e17, "FLOP/s, such as 1979e12"),
    ("emulation", "link_bytes_per_s"): (1e8, 1e14, "bytes/s, such as 450e9"),
}  # fmt: skip


def _check_written(profile: Profile, source: _Source) -> None:
    """Raises BadInput for what a file may not say, though a run that was made with it can be read."""
    flags, variables = flags_and_variables(profile)
    named = [flag.name + flag.key for flag in vllm_flags.parse(flags)] + [name for name, _ in variables]
    found = [name for name in named if vllm_flags.is_secret(name)]
    with_password = vllm_flags.PASSWORD.search
    found += [f"variable {name} (a URL with a password)" for name, value in variables if with_password(value)]
    found += ["a flag (a URL with a password)" for flag in flags if with_password(flag)]
    if found:
        raise BadInput(
            f"profile {profile.name}: {found[0]} holds a secret, which would be stored with the run; "
            "leave it out and set it in the environment (HF_TOKEN; the server's key is made anew at each start)"
        )
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
    for at, one in {("server",): profile.server, **{("variants", k): v for k, v in profile.variants.items()}}.items():
        if said := vllm_flags.problem(one.flags, set_by_kit):
            source.refuse([*at, "flags"], said)
        for name in one.env.keys() & {"CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"}:
            said = "the server would take another GPU than is watched; set it in the environment of fp8lab itself"
            source.refuse([*at, "env", name], said)
        if odd := [name for name in one.env if not name or "=" in name or "\0" in name]:
            said = f'{odd[0]!r} is no name of a variable; write NAME = "value", the name without "="'
            source.refuse([*at, "env"], said, seen_at=[*at, "env", odd[0]])
        for key, texts in {"flags": one.flags, "env": one.env.values(), "python": [getattr(one, "python", "")]}.items():
            if any("\0" in text for text in texts):
                source.refuse([*at, key], "a text holds the character \0, which no process can be given; leave it out")
    if RUST in profile.server.env:
        said = 'each variant says which API server it has; leave this out and give those api_server = "rust"'
        source.refuse(["server", "env", RUST], said)
    for key in profile.model.checkpoints.keys() - profile.variants.keys() - {"default"}:
        known = ", ".join(["default", *profile.variants])
        said = f"no variant {key!r} in profile {profile.name} (there are: {known})"
        source.refuse(["model", "checkpoints", key], said)
    for (table, key), (low, high, unit) in _UNITS.items():
        value = getattr(getattr(profile, table), key, None)
        if value is not None and not low <= value <= high:
            source.refuse([table, key], f"{value:g} is in another unit: expected {low:g} to {high:g} {unit}")
    asked: dict[str, tuple[str, Level]] = {}
    for protocol, level in ((name, level) for name, levels in profile.protocols.items() for level in levels):
        other, before = asked.setdefault(level.id, (protocol, level))
        if before.requests != level.requests:
            said = f"level {level.id} has {level.requests} requests, in protocol {other!r} {before.requests}, and a run holds "
            said += 'it once: give both the same, or leave the inherited protocols out with replaces = ["protocols"]'
            source.refuse(["protocols", protocol], said)


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
        said = "is missing; give it, or extend a profile that does"
        if at[0] == "gpu" and any(_holds(table, at) for _, table in source.tables):
            said = "is missing: a new name is another card, and replaces the whole table [gpu] of the extended profile; give it"
        source.refuse(at, said, seen_at=at[:-1])
    if kind == "value_error":
        source.refuse(at, str(context["error"]))
    expected = _EXPECTED.get(kind, first["msg"]).format(**context)
    if kind == "dataclass_type" and at[0] == "variants":
        expected = "a list of flags or a table"
    source.refuse(at, f"expected {expected}, not {_shown(first['input'], at)}")


_EXPECTED = {
    "float_type": "a number", "int_type": "a whole number", "int_from_float": "a whole number",
    "bool_type": "true or false", "string_type": "a text in quotes", "tuple_type": "a list", "dict_type": "a table",
    "mapping_type": "a table", "dataclass_type": "a table", "finite_number": "a finite number",
    "literal_error": "{expected}", "greater_than": "a number above {gt}", "greater_than_equal": "{ge} or more", "less_than_equal": "at most {le}",
}  # fmt: skip


def _table_at(at: Sequence) -> type:
    """The class of the table at a key path."""
    if not at:
        return Profile
    if at[0] == "protocols":
        return _Levels if len(at) > 2 else _Protocol
    return Dimensions if at[0] == "model" and len(at) > 1 else TABLES[at[0]]


def _shown(value, at: Sequence) -> str:
    """A value as an error may show it: what stands among flags, variables and checkpoints may be a secret."""
    if isinstance(value, bool):
        return str(value).lower()
    harmless = at[0] in ("device", "gpu", "emulation", "workload", "protocols") or at[-1] == "api_server"
    if isinstance(value, (int, float)) or (isinstance(value, str) and harmless):
        return repr(value)[:80]
    return {str: "a text", list: "a list", dict: "a table"}.get(type(value), type(value).__name__)
