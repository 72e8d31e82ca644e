"""Rounds a model's weights with llmcompressor, calibrated on a text, in the environment that `make calibrator` builds.

A program of its own, since that environment holds another transformers than vLLM's; `models.quantize` calls it. Its arguments
are the folders of source and target, the text's file, compressed-tensors' name of the format, for how many weights of a row
there is one scale (where the format has groups), and the method, gptq or awq.
"""

import sys
from pathlib import Path

import torch
from compressed_tensors.quantization import preset_name_to_scheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoModelForCausalLM, AutoTokenizer

# What llmcompressor's own examples take is 512 documents of 2,048 tokens, of a large model's; GPTQ's authors took 128.
DOCUMENTS, DOCUMENT_TOKENS = 128, 512


def main() -> None:
    source, target, text, name, group, method = sys.argv[1:]
    scheme = preset_name_to_scheme(name, ["Linear"])
    if scheme.weights.group_size:
        scheme.weights.group_size = int(group)
    how = {"config_groups": {"group_0": scheme}, "ignore": ["lm_head"]}
    steps = [GPTQModifier(**how)] if method == "gptq" else [AWQModifier(), QuantizationModifier(**how)]
    if not torch.cuda.is_available():
        # llmcompressor 0.14 pins memory for copies to a GPU, also where there is none.
        IntermediatesCache.pin_memory = lambda *_arguments: None
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    tokens = AutoTokenizer.from_pretrained(source)(Path(text).read_text()).input_ids
    begins = range(0, len(tokens) - DOCUMENT_TOKENS + 1, DOCUMENT_TOKENS)[:DOCUMENTS]
    if not begins:
        sys.exit(f"its text has {len(tokens)} tokens; at least {DOCUMENT_TOKENS} are needed")
    documents = [tokens[at : at + DOCUMENT_TOKENS] for at in begins]
    held = Dataset.from_dict({"input_ids": documents, "attention_mask": [[1] * DOCUMENT_TOKENS for _ in documents]})
    options = {"max_seq_length": DOCUMENT_TOKENS, "num_calibration_samples": len(documents), "batch_size": 8}
    oneshot(model=model, dataset=held, recipe=steps, **options)
    model.save_pretrained(target, save_compressed=True)


if __name__ == "__main__":
    main()
