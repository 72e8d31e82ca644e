"""The text that a model reads when its answers are judged: the shipped one, or the user's own file."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from .errors import BadInput
from .paths import DATA, repository_relative

SHIPPED = DATA / "texts" / "opticks-book-1.txt"


@dataclass(frozen=True)
class Text:
    """A text with its name for tables and its SHA-256, so that a run says what was read without holding it."""

    name: str
    content: str
    sha256: str

    def passages(self, count: int, words: int = 80) -> list[str]:
        """`count` passages of `words` words at even distances, white space made single; raises BadInput if too short."""
        every = self.content.split()
        if len(every) < count + words:
            raise BadInput(f"text {self.name}: {len(every)} words are too few for {count} passages of {words}; "
                           "take a longer text or fewer prompts")  # fmt: skip
        step = (len(every) - words) // max(count, 1)
        return [" ".join(every[i * step : i * step + words]) for i in range(count)]


def read_text(path: str | Path = "") -> Text:
    """The text at `path`, plain UTF-8; empty means Newton's Opticks, Book I (data/texts/README.md).

    Raises BadInput for a file that is missing, empty or no text.
    """
    source = Path(path).expanduser() if path else SHIPPED
    if not source.is_file():
        raise BadInput(f"no text file at {str(source)!r}; give a plain UTF-8 text, or none for the shipped one")
    content = source.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"text {source.name} is not UTF-8 (byte {error.start}); give a plain UTF-8 text") from None
    if "\0" in text:
        raise BadInput(f"text {source.name} is a binary file (it holds zero bytes); give a plain UTF-8 text")
    if not text.strip():
        raise BadInput(f"text {source.name} is empty; give a plain UTF-8 text of some thousand words")
    name = repository_relative(source) if source == SHIPPED else source.name
    return Text(name, text, hashlib.sha256(content).hexdigest())
