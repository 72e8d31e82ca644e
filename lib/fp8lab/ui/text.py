"""Foreign text made fit to be shown: a server's reply, a log's line or a file's name can hold anything."""

import unicodedata

# Control and format characters (escape sequences, direction marks), surrogates, line and paragraph separators.
_UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def visible(text: str, limit: int = 8000) -> str:
    """`text` with what cannot be seen written out (`\\x1b`), lines and tabs kept; beyond `limit` characters cut."""
    if len(text) > limit:
        text = f"{text[:limit]} ... ({len(text) - limit:,} characters more)"
    if text.isprintable():
        return text
    return "".join(_shown(character) for character in text)


def _shown(character: str) -> str:
    if character in "\n\t" or unicodedata.category(character) not in _UNSEEN:
        return character
    return character.encode("unicode_escape").decode()
