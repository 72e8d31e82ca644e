"""Text fit to be shown: foreign text made visible, and how numbers are written."""

import math
import unicodedata

# Control and format characters (escape sequences, direction marks), surrogates, line and paragraph separators.
_UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def visible(text: str, limit: int = 8000) -> str:
    """`text`, which a server's reply or a file may hold, with what cannot be seen written out (`\\x1b`), lines and tabs
    kept; beyond `limit` characters cut."""
    if len(text) > limit:
        text = f"{text[:limit]} ... ({len(text) - limit:,} characters more)"
    if text.isprintable():
        return text
    return "".join(_shown(character) for character in text)


def storable(text: str) -> str:
    """`text` with a question mark for each half of a character (a lone surrogate), which UTF-8 does not hold."""
    return text.encode(errors="replace").decode()


def _shown(character: str) -> str:
    if character in "\n\t" or unicodedata.category(character) not in _UNSEEN:
        return character
    return character.encode("unicode_escape").decode()


def shown(value: float | None, pattern: str = ",.0f", unit: str = "") -> str:
    """A number as tables and sentences show it, by a format specification; a dash for what is not known (None, nan)."""
    return "–" if value is None or (isinstance(value, float) and math.isnan(value)) else f"{value:{pattern}}{unit}"


def four_digits(value: float) -> str:
    """Four digits that count, and no exponent."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
