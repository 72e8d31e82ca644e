"""Which variables and flags hold secrets, by their names."""

import re
from collections.abc import Mapping

_NAME = re.compile(r"(^|_)(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.IGNORECASE)
# What is shorter is a word, which a log holds anyway.
_MIN_LENGTH = 8


def is_secret(name: str) -> bool:
    """Whether a variable (`HF_TOKEN`) or flag (`--api-key`) of this name holds a secret."""
    return bool(_NAME.search(name.lstrip("-").replace("-", "_")))


def secrets_of(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of `environment` that hold secrets."""
    return {key: value for key, value in environment.items() if is_secret(key) and len(value) >= _MIN_LENGTH}
