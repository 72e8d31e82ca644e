"""No secret in a profile: its flags and variables are logged, and stored with every run."""

import os
from collections.abc import Iterable, Sequence

from .errors import BadInput
from .flags import parse
from .private import has_password, is_secret, secret_in


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
    """Raises BadInput when a text of the profile of this name holds a secret of this process's environment, under
    whatever name."""
    for text in texts:
        if name := secret_in(text, os.environ):
            raise BadInput(
                f"profile {profile}: a flag, variable or checkpoint holds the value of {name}, which would be stored "
                f"with the run; leave it out: the server has {name} from the environment"
            )
