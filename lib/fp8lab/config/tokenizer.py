"""How many tokens a text has, by a model's tokenizer: in a folder, or of a hub."""

import functools
from collections.abc import Callable
from pathlib import Path

from ..errors import BadInput


@functools.lru_cache(maxsize=2)  # every level asks for the same one
def token_counter(tokenizer: str) -> Callable[..., int]:
    """What counts a text's tokens; `special=False` leaves out those that the tokenizer adds. `tokenizer` is a model's folder
    or hub name. Raises BadInput when it is not there, cannot be fetched, or cannot be read."""
    folder = Path(tokenizer).expanduser()
    if not tokenizer or (not folder.is_dir() and (tokenizer.startswith((".", "/", "~")) or tokenizer.count("/") > 1)):
        raise BadInput(f"no tokenizer at {tokenizer!r}: expected a model's folder, or a hub name ORG/NAME")
    try:
        file = folder / "tokenizer.json" if folder.is_dir() else _of_hub(tokenizer)
        if file and file.is_file():
            return _read(file)
        from transformers import AutoTokenizer  # seconds and half a GB: for tokenizers of another kind alone

        encode = AutoTokenizer.from_pretrained(str(folder) if folder.is_dir() else tokenizer).encode
    except Exception as error:  # a hub's, a network's, a file's, a missing package's: they have no base of their own
        why = (str(error).strip().partition("\n")[0] or type(error).__name__)[:300].rstrip(".")
        raise BadInput(
            f"the tokenizer {tokenizer!r} cannot be loaded: {why}. Name the folder of a model on this machine, or fetch it "
            "first where its hub can be reached (hf download ORG/NAME)"
        ) from None
    return lambda text, special=True: len(encode(text, add_special_tokens=special))


def _of_hub(name: str) -> Path | None:
    """The file of a hub's tokenizer, fetched unless it was; None where the hub has it in another form."""
    from huggingface_hub import hf_hub_download, model_info
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(name, "tokenizer.json", local_files_only=True))
    except EntryNotFoundError:
        # One question, answered at once: a download that cannot reach its hub tries for half a minute and logs every time.
        model_info(name, timeout=10)
    try:
        return Path(hf_hub_download(name, "tokenizer.json"))
    except EntryNotFoundError:
        return None


def _read(file: Path) -> Callable[..., int]:
    from tokenizers import Tokenizer

    read = Tokenizer.from_file(str(file))
    read.no_truncation()
    read.no_padding()
    return lambda text, special=True: len(read.encode(text, add_special_tokens=special).ids)
