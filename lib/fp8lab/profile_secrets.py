"""No secret in a profile: its flags and variables are logged, and stored with every run."""

import os
from typing import TYPE_CHECKING

from .errors import BadInput
from .private import has_password, is_secret, secret_in

if TYPE_CHECKING:
    from .profiles import Profile


def _flags(profile: "Profile") -> list[str]:
    return [str(flag) for flags in (profile.server.flags, *profile.variants.values()) for flag in flags]


def _variables(profile: "Profile") -> list[tuple[str, str]]:
    environments = (profile.server.env, *profile.variant_env.values())
    return [(name, str(value)) for environment in environments for name, value in environment.items()]


def check_written(profile: "Profile") -> None:
    """Raises BadInput for a flag or variable that carries a secret: flags and profile are logged and stored."""
    flags, variables = _flags(profile), _variables(profile)
    named = [flag.partition("=")[0] for flag in flags if flag.startswith("--")] + [name for name, _ in variables]
    found = [name for name in named if is_secret(name)]
    found += [f"variable {name} (a URL with a password)" for name, value in variables if has_password(value)]
    found += ["a flag (a URL with a password)" for flag in flags if has_password(flag)]
    if found:
        raise BadInput(
            f"profile {profile.name}: {found[0]} holds a secret, which would be stored with the run; "
            "leave it out and set it in the environment (HF_TOKEN; the server's key is made anew at each start)"
        )


def check_environment(profile: "Profile") -> None:
    """Raises BadInput when a flag, variable or checkpoint of `profile` repeats a secret of this process's environment,
    under whatever name: it would be stored with the run."""
    texts = [*_flags(profile), *(value for _, value in _variables(profile)), *profile.model.checkpoints.values()]
    for text in texts:
        if name := secret_in(text, os.environ):
            raise BadInput(
                f"profile {profile.name}: a flag, variable or checkpoint holds the value of {name}, which would be stored with the "
                f"run; leave it out: the server has {name} from the environment"
            )
