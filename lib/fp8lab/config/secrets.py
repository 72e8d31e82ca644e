"""Which variables and flags hold secrets, by their names and by what they hold."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence

from ..errors import BadInput
from .flags import parse

# A personal access token (PAT) and the like, with or without what it is for.
_NAME = re.compile(r"((^|_)(TOKEN|KEY|PASS|PAT|CREDENTIALS?)|APIKEY|SECRET|PASSWORD|PASSWD|PASSPHRASE)$", re.IGNORECASE)
# As in HTTPS_PROXY or DATABASE_URL: scheme://user:password@host.
_URL = re.compile(r"[a-z][a-z0-9+.-]*://[^\s/?#@:]*:(?P<password>[^\s/?#@]+)@", re.IGNORECASE)
# What is shorter is a word, which a log holds anyway.
_MIN_LENGTH = 8


def is_secret(name: str) -> bool:
    """Whether a variable (`HF_TOKEN`) or flag (`--api-key`) of this name holds a secret."""
    return bool(_NAME.search(re.sub(r"[-.]", "_", name.lstrip("-"))))


def has_password(text: str) -> bool:
    """Whether `text` holds a URL with a user's password."""
    return bool(_URL.search(text))


def secrets_of(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of `environment` that hold secrets."""
    long = {key for key, value in environment.items() if len(value) >= _MIN_LENGTH}
    return {k: value for k, value in environment.items() if (k in long and is_secret(k)) or has_password(value)}


def check_written(profile: str, flags: Sequence[str], variables: Sequence[tuple[str, str]]) -> None:
    """Raises BadInput for a flag or variable of the profile of this name that carries a secret."""
    named = [flag.name + flag.key for flag in parse(flags)] + [name for name, _ in variables]
    found = [name for name in named if is_secret(name)]
    found += [f"variable {name} (a URL with a password)" for name, value in variables if has_password(value)]
    found += ["a flag (a URL with a password)" for flag in flags if has_password(flag)]
    if found:
        raise BadInput(
            f"profile {profile}: {found[0]} holds a secret, which would be stored with the run; "
            "leave it out and set it in the environment (HF_TOKEN; the server's key is made anew at each start)"
        )


def check_repeated(profile: str, texts: Iterable[str]) -> None:
    """Raises BadInput when a text of the profile of this name holds a secret of this process's environment (a variable's, or
    the password in a variable's URL), under whatever name."""
    texts = list(texts)
    for name, value in secrets_of(os.environ).items():
        values = [value, *(found["password"] for found in _URL.finditer(value))]
        if any(len(secret) >= _MIN_LENGTH and secret in text for secret in values for text in texts):
            raise BadInput(
                f"profile {profile}: a flag, variable or checkpoint holds the value of {name}, which would be stored "
                f"with the run; leave it out: the server has {name} from the environment"
            )
