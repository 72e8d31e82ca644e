"""Folders that vLLM can load: shapes with a tokenizer, trained weights out of packages."""
