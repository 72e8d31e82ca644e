"""`vllm serve`, the entry point where vLLM's distribution is called vllm."""

from vllm.entrypoints.openai.api_server import main

if __name__ == "__main__":
    main()
