"""What is run: profiles, vLLM flags, request traces, model sizes, secrets. Not whether it can be run."""
