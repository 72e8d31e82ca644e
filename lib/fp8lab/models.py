"""Builds a model folder (config and tokenizer, no weights) for a model that is gated or has none.

Speed depends on a model's shapes, not on its values: vLLM's `--load-format dummy` fills the true
shapes with random weights. What remains is the public configuration (`data/models/NAME/config.json`)
and the Llama 3 tokenizer, which the package `llama-models` ships as a tiktoken file.
"""

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

from .errors import BadInput
from .paths import DATA, cache_dir

# The 256 special tokens of Llama 3, in order, follow the 128,000 ordinary ones.
_NAMED = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    9: "<|eot_id|>",
}
# How Llama 3 splits text before byte-pair encoding (llama_models/llama3/tokenizer.py).
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CHECK = ("Hello world", [128000, 9906, 1917])


def model_folder(name: str) -> Path:
    """The folder of the model `name` from `data/models/`, built on first use (about 3 s).

    Raises BadInput when there is no such model or the tokenizer's package is missing.
    """
    config = DATA / "models" / name / "config.json"
    if not config.is_file():
        known = ", ".join(sorted(p.name for p in (DATA / "models").iterdir()))
        raise BadInput(f"no model {name!r} in data/models (there are: {known})")
    target = cache_dir() / "models" / name
    if not (target / "tokenizer.json").is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        # Built beside and renamed, so that a second process never sees half a folder.
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            build = Path(scratch) / name
            _llama3_tokenizer().save_pretrained(build)
            try:
                os.rename(build, target)
            except OSError:
                if not (target / "tokenizer.json").is_file():
                    raise
    shutil.copyfile(config, target / "config.json")
    return target


def _llama3_tokenizer():
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    spec = importlib.util.find_spec("llama_models")
    if spec is None:
        raise BadInput("the package llama-models is missing; prepare the environment with `make env`")
    vocabulary = Path(spec.submodule_search_locations[0]) / "llama3" / "tokenizer.model"
    reserved = iter(range(256))
    special = [_NAMED.get(i) or f"<|reserved_special_token_{next(reserved)}|>" for i in range(256)]
    converted = TikTokenConverter(vocab_file=str(vocabulary), pattern=_SPLIT, extra_special_tokens=special).converted()
    begin = _NAMED[0]
    converted.post_processor = TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=[(begin, 128000)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=converted, bos_token=begin, eos_token=_NAMED[9], model_max_length=8192
    )
    if tokenizer.encode(_CHECK[0]) != _CHECK[1]:
        raise RuntimeError(f"the converted tokenizer maps {_CHECK[0]!r} to other ids than {_CHECK[1]}")
    return tokenizer
