"""The published claims, and the levels that they rest on."""

import tomllib

from ..paths import DATA


def published() -> dict:
    """`data/published.toml` as it is."""
    return tomllib.loads((DATA / "published.toml").read_text())


def claim_of(id: str) -> dict:
    """The published claim `id`, as it stands in `data/published.toml`."""
    return next(claim for claim in published()["claims"] if claim["id"] == id)


def level_id(variant: str, rate: float, repeat: int = 1) -> str:
    """The id of a level, as claims and figures refer to it."""
    return f"{variant}-{rate:g}rps-r{repeat}"
