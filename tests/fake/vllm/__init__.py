"""Stands in for vLLM where PYTHONPATH puts this folder first: starts in a moment and fails as it is told."""
