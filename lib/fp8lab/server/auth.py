"""A middleware for vLLM's API server that wants this start's key on every path. vLLM imports it; fp8lab only names it.

    --middleware fp8lab.server.auth.KeyGuard

vLLM's own check of its key (VLLM_API_KEY) leaves out all paths but /v1 and a few: /invocations completes prompts
without it. Open stay `OPEN`: /health, which tells nothing, and /metrics, which `vllm bench serve` and Prometheus read
without a key. Plain ASGI, so that a stream passes untouched, and the standard library only.

vLLM's Rust front end (VLLM_USE_RUST_FRONTEND) loads no Python: there vLLM's own check is all there is.
"""

import os
import secrets

OPEN = ("/health", "/metrics")
_REFUSED = b'{"error":"Unauthorized"}'


class KeyGuard:
    """Answers 401 to what comes without the key in the environment variable VLLM_API_KEY."""

    def __init__(self, app):
        self._app = app
        self._expected = f"Bearer {os.environ['VLLM_API_KEY']}".encode()

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "lifespan" or scope["path"] in OPEN or self._knows_the_key(scope["headers"]):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(_REFUSED)).encode())]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": _REFUSED})

    def _knows_the_key(self, headers) -> bool:
        given = next((value for name, value in headers if name == b"authorization"), b"")
        return secrets.compare_digest(given, self._expected)
