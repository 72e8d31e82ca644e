"""vLLM's flags: one reading of a list of them, as vLLM's own parser reads it (vllm/utils/argparse_utils.py); and which flags
and variables hold secrets, by their names and by what they hold.

A flag may be written `--flag value`, `--flag=value`, with several values, by its short name, with underscores for
dashes, cut short, or switched off (`--no-flag`); `--flag.key value` sets one key of a flag that takes JSON. Of a flag that
is given twice the last counts.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# Other names of a flag, and the whole one.
ALIASES = {
    "--device-memory-utilization": "--gpu-memory-utilization", "-O": "--optimization-level",
    "-ac": "--attention-config", "-asc": "--api-server-count", "-cc": "--compilation-config",
    "-dc": "--diffusion-config", "-dcp": "--decode-context-parallel-size", "-dp": "--data-parallel-size",
    "-dpa": "--data-parallel-address", "-dpb": "--data-parallel-backend", "-dpe": "--data-parallel-external-lb",
    "-dph": "--data-parallel-hybrid-lb", "-dpl": "--data-parallel-size-local",
    "-dpm": "--data-parallel-multi-port-external-lb", "-dpn": "--data-parallel-rank",
    "-dpp": "--data-parallel-rpc-port", "-dpr": "--data-parallel-start-rank", "-ep": "--enable-expert-parallel",
    "-n": "--nnodes", "-pcp": "--prefill-context-parallel-size", "-pp": "--pipeline-parallel-size",
    "-q": "--quantization", "-r": "--node-rank", "-sc": "--speculative-config", "-tp": "--tensor-parallel-size",
}  # fmt: skip
# What this kit reads or sets itself. vLLM takes each cut short, too, as far as no other flag begins so.
_KNOWN = (
    "--api-key", "--api-server-count", "--compilation-config", "--config", "--cudagraph-capture-sizes", "--data-parallel-size",
    "--distributed-executor-backend", "--dtype", "--enforce-eager", "--gpu-memory-utilization", "--hf-token", "--host",
    "--kv-cache-dtype", "--load-format", "--max-cudagraph-capture-size", "--max-model-len", "--max-num-batched-tokens",
    "--max-num-seqs", "--model", "--pipeline-parallel-size", "--port", "--prefill-context-parallel-size", "--quantization",
    "--scheduler-cls", "--served-model-name", "--tensor-parallel-size", "--uds",
)  # fmt: skip
# Each of these adds to the ones before it.
_ADDING = {"--middleware"}
_NUMBER = re.compile(r"-\d+|-\d*\.\d+")
_TWO_IN_ONE = re.compile(r"(--?[A-Za-z][\w.-]*)\s")
# A personal access token (PAT) and the like, with or without what it is for.
_SECRET = re.compile(r"(TOKEN|KEY|PASS|(^|_)(PAT|CREDENTIALS?)|SECRET|PASSWORD|PASSWD|PASSPHRASE)$", re.IGNORECASE)
# As in HTTPS_PROXY or DATABASE_URL: scheme://user:password@host.
PASSWORD = re.compile(r"[a-z][a-z0-9+.-]*://[^\s/?#@:]*:(?P<password>[^\s/?#@]+)@", re.IGNORECASE)
# What is shorter is a word, which a log holds anyway.
SECRET_LENGTH = 8


@dataclass(frozen=True)
class Flag:
    """One flag by its whole `name`; `key` is the path within a flag that takes JSON (".a.b", ".a+"), else ""."""

    name: str
    key: str = ""
    values: tuple[str, ...] = ()
    off: bool = False

    @property
    def words(self) -> list[str]:
        """The flag as it is written in a command."""
        spelled = (f"--no-{self.name[2:]}" if self.off else self.name) + self.key
        # A value that begins as a flag does is one only behind "=".
        if len(self.values) == 1 and self.values[0].startswith("-"):
            return [f"{spelled}={self.values[0]}"]
        return [spelled, *self.values]

    @property
    def brief(self) -> str:
        """The flag in a table: a long list of values by their number."""
        return " ".join(self.words) if len(self.values) < 4 else f"{self.name} ({len(self.values)} values)"

    def replaces(self, before: "Flag") -> bool:
        """Whether nothing is left of `before` where this flag comes after it."""
        if self.name != before.name or self.name in _ADDING:
            return False
        same = not self.key.endswith("+") and self.key == before.key.removesuffix("+")
        return same or not self.key or not before.key


def parse(words: Sequence[str]) -> list[Flag]:
    """The flags of a list or a whole command, in order; words before the first one are left out."""
    found: list[Flag] = []
    awaits = False
    for word in words:
        if awaits or not _is_flag(word):
            if found:
                found[-1] = Flag(found[-1].name, found[-1].key, (*found[-1].values, word), found[-1].off)
            awaits = False
            continue
        head, equals, value = word.partition("=")
        if not word.startswith("--") and head not in ALIASES and head[:2] in ALIASES and "." not in head:
            head, equals, value = head[:2], "=", word[2:]  # -O3, -qfp8
        name, dot, key = head.partition(".")
        name, off = _whole(name)
        found.append(Flag(name, dot + key, (value,) if equals else (), off))
        awaits = bool(dot and not equals)
    return found


def flag_of(command: Sequence[str], name: str) -> str:
    """The value that counts of a command's flag; "auto" where it is not given or has no value."""
    given = [flag.values[0] for flag in parse(command) if flag.name == name and not flag.key and flag.values]
    return given[-1] if given else "auto"


def joined(shared: Sequence[str], own: Sequence[str]) -> list[str]:
    """The `shared` flags that `own` leaves, then its `own`."""
    over = parse(own)
    kept = [flag for flag in parse(shared) if not any(flag_over.replaces(flag) for flag_over in over)]
    return [word for flag in (*kept, *over) for word in flag.words]


def problem(words: Sequence[str], taken: Mapping[str, str]) -> str | None:
    """Why `words` is no list of flags to start a server with; None when it is. `taken` says of flags that are not to be in
    it who sets them. No value is repeated: it may be a secret."""
    for word in words:
        if cut := _TWO_IN_ONE.match(word):
            return f'a flag and its value are one text ({cut[1]} ...); write them as two: ["{cut[1]}", "..."]'
    if words and not _is_flag(words[0]):
        return "it does not begin with a flag (--name)"
    seen: list[Flag] = []
    for flag in parse(words):
        if flag.name in taken:
            return f"{flag.name} is not the profile's to set: {taken[flag.name]}; leave it out"
        if any(flag.replaces(before) for before in seen):
            return f"{flag.name}{flag.key} is given twice in one list, and vLLM would take one of them in silence; keep one"
        seen.append(flag)
    return None


def _is_flag(word: str) -> bool:
    """As argparse tells a flag from a value."""
    looks_so = word.startswith("-") and word not in ("-", "--") and " " not in word.partition("=")[0]
    return looks_so and not _NUMBER.fullmatch(word)


@functools.lru_cache(maxsize=512)
def _whole(name: str) -> tuple[str, bool]:
    """A flag's whole name, and whether it is switched off."""
    name = name.replace("_", "-") if name.startswith("--") else name
    off = name.startswith("--no-")
    name = f"--{name[5:]}" if off else name
    if name in ALIASES:
        return ALIASES[name], off
    begun = [known for known in _KNOWN if known.startswith(name)] if name.startswith("--") else []
    return (begun[0] if len(begun) == 1 and name not in _KNOWN else name), off


def is_secret(name: str) -> bool:
    """Whether a variable (`HF_TOKEN`) or flag (`--api-key`) of this name holds a secret."""
    return bool(_SECRET.search(re.sub(r"[-.]", "_", name.lstrip("-"))))


def secrets_of(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of `environment` that hold secrets: by their names, or in a URL with a password."""
    return {
        name: value
        for name, value in environment.items()
        if (len(value) >= SECRET_LENGTH and is_secret(name)) or PASSWORD.search(value)
    }


def secret_texts(environment: Mapping[str, str]) -> list[str]:
    """What may stand in no file: the values of `secrets_of`, and the passwords of those that are URLs."""
    values = list(secrets_of(environment).values())
    passwords = (found["password"] for value in values for found in PASSWORD.finditer(value))
    return [*values, *(one for one in passwords if len(one) >= SECRET_LENGTH)]
