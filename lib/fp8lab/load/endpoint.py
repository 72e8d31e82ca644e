"""Where a load goes and what is written there: the URL, the path, the bytes of a request."""

import socket
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import orjson

from ..errors import BadInput


@dataclass(frozen=True)
class Endpoint:
    """Where requests go: an OpenAI-compatible completions (or chat) endpoint.

    With `ignore_eos` (an extension of vLLM and its kin) answers have exactly the length asked for.
    """

    base_url: str
    model: str
    api_key: str | None = field(default=None, repr=False)
    chat: bool = False
    ignore_eos: bool = True

    def __post_init__(self):
        try:
            url = urlsplit(self.base_url)
            good = url.scheme in ("http", "https") and url.hostname and url.port != 0
        except ValueError:  # a port that is none, half an IPv6 address
            good = False
        if not good:
            raise BadInput(f"base URL {self.base_url!r} is not http(s)://HOST[:PORT]")
        if url.username or url.password:
            raise BadInput("the base URL holds a user name or password; give a key with --api-key-env instead")
        if self.api_key and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise BadInput("the API key holds a character that no key has (a line break at its end, perhaps)")

    @property
    def path(self) -> str:
        prefix = urlsplit(self.base_url).path.rstrip("/")
        prefix = prefix if prefix.endswith("/v1") else f"{prefix}/v1"
        return prefix + ("/chat/completions" if self.chat else "/completions")

    def resolve(self) -> tuple[str, int]:
        """(address, port) of the host, looked up once for a level. Raises BadInput for an unknown host."""
        url = urlsplit(self.base_url)
        port = url.port or (443 if url.scheme == "https" else 80)
        try:
            return socket.getaddrinfo(url.hostname, port, type=socket.SOCK_STREAM)[0][4][:2]
        except OSError as error:
            raise BadInput(f"no host {url.hostname!r} (from base URL {self.base_url!r}): {error.strerror}") from None

    def request_bytes(self, prompt: str, output_tokens: int) -> bytes:
        """The whole HTTP request; sampling is greedy."""
        content = {"messages": [{"role": "user", "content": prompt}]} if self.chat else {"prompt": prompt}
        body = orjson.dumps(
            {"model": self.model, **content, "max_tokens": output_tokens, "temperature": 0.0}
            | ({"ignore_eos": True} if self.ignore_eos else {})
            | {"stream": True, "stream_options": {"include_usage": True}}
        )
        key = f"Authorization: Bearer {self.api_key}\r\n" if self.api_key else ""
        head = (
            f"POST {self.path} HTTP/1.1\r\nHost: {urlsplit(self.base_url).netloc}\r\n{key}"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body
