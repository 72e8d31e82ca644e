"""Where a load goes and what is written there; what a refusal says, and what to do about it."""

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from urllib.parse import parse_qsl, urlsplit

import orjson

from ..config.flags import is_secret
from ..errors import BadInput
from ..ui import storable

_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_SECRET_HEADER = re.compile(r"auth|cookie|session|signature|credential", re.IGNORECASE)
# Written with every request, or about how it and its answer are encoded: a second one would garble them.
_OWN_HEADERS = {
    "host", "content-length", "content-type", "transfer-encoding", "accept-encoding", "connection", "expect", "upgrade",
}  # fmt: skip
# What the kit says in a body, and who says it there. The rest may be replaced, and left out with null.
_OWN_KEYS = {
    "model": "--model names it",
    "prompt": "the trace has the prompts",
    "messages": "the trace has the prompts",
    "stream": "only streams can be timed",
    "ignore_eos": "--natural-stop leaves it out",
    "max_tokens": "the trace has the lengths",
    "max_completion_tokens": "the trace has the lengths; --max-tokens-field says how they are sent",
    "n": "a request has one answer here",
    "best_of": "a request has one answer here",
}
# A shorter piece of a header that names no secret is a word, which an error holds anyway.
_MIN_SECRET, _MIN_WORD = 4, 8
# How a fleet's next endpoint is chosen: each in its turn, or the one with the fewest requests in flight of a load worker's.
BALANCES = ("round-robin", "least-in-flight")
# Where servers and gateways put their sentence, the most telling first: OpenAI's and vLLM's error.message, FastAPI's detail
# (a list with `msg` for a body that does not fit), TGI's and Ollama's error, RFC 9457's detail, OAuth's error_description.
KEYS = (
    "message", "msg", "detail", "error_description", "error", "errors", "error_msg", "title", "fault", "faultstring",
)  # fmt: skip
_MOST, _DEEPEST = 3, 8  # of a list of complaints
_EXCERPT = 80
_NO_MODEL = re.compile(
    r"\b(model|deployment)\b.*\b(exist|found|unknown|invalid|available)|\b(unknown|invalid|no such) (model|deployment)\b"
)
_MODELS_BYTES, _MODELS_S, _MODELS_SHOWN = 1 << 20, 5.0, 8

_KEY_ASKED = "the endpoint wants a key: --api-key-env VAR, or --header-env api-key=VAR where it goes by another name"
_KEY_REFUSED = "check the key that --api-key-env, --header or --header-env gave, and what it may do"
_BUSY = "lower --rate, or cap what is in flight with --max-concurrency"
# By status; asked after what the words themselves point to.
_BY_STATUS = {
    413: "the requests are too long for it: shorter ones, with --trace",
    429: f"it limits how much is sent: {_BUSY}",
    500: "its own log says more",
    502: "a gateway stands before it and does not reach it",
    503: f"it is overloaded, still starts, or limits connections: {_BUSY} or --connections-ahead",
    504: f"a gateway stands before it and gave up waiting: {_BUSY}",
    529: f"it is overloaded: {_BUSY}",
} | dict.fromkeys((301, 302, 303, 307, 308), "it has moved: give the address that it moved to as --base-url")
_SHAPE = "--natural-stop leaves ignore_eos out, --max-tokens-field and --extra-body change the rest of a request"
# What a 400 or 422 is about, by a word in it.
_BY_WORD = (
    ("ignore_eos", "it does not know ignore_eos: --natural-stop leaves it out"),
    ("max_completion_tokens", "--max-tokens-field max_completion_tokens"),
    ("stream_options", """it does not know stream_options: --extra-body '{"stream_options": null}' leaves it out"""),
    ("temperature", """--extra-body '{"temperature": null}' leaves the temperature to it"""),
    ("chat template", "the model has no chat: leave --chat out"),
    ("chat_template", "the model has no chat: leave --chat out"),
    ("context", "the requests are longer than its model's context: shorter ones, with --trace"),
    ("api-version", "the query says it: --base-url 'URL?api-version=…'"),
    ("api version", "the query says it: --base-url 'URL?api-version=…'"),
)


@dataclass(frozen=True)
class Endpoint:
    """Where requests go: an OpenAI-compatible completions (or chat) endpoint, and what it wants to be sent.

    `base_url` without a path of its own stands for its `/v1`; one with a path (`/api/v3`) is kept, its query too, and the
    name of the endpoint is put behind it; one that ends in `/completions` is the whole endpoint and says whether it is a
    chat. `endpoint` is a path to be put behind the base URL instead. With `ignore_eos` (an extension of vLLM and its kin)
    answers have exactly the length asked for, which is sent as `max_tokens_field`. `extra_body` is merged into each
    request's body; null leaves out what the kit would send. `insecure` takes any certificate. Raises BadInput for what
    cannot be sent; no error, repr or refusal holds a key, a header's value or a query.
    """

    base_url: str
    model: str
    api_key: str | None = field(default=None, repr=False)
    chat: bool = False
    ignore_eos: bool = True
    endpoint: str = ""
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    extra_body: Mapping = field(default_factory=dict, repr=False)
    max_tokens_field: str = "max_tokens"
    insecure: bool = False
    query: str = field(default="", init=False, repr=False)

    def __post_init__(self):
        try:
            url, asked = urlsplit(self.base_url), urlsplit(self.endpoint)
            good = url.scheme in ("http", "https") and url.hostname and url.port != 0 and _sendable(self.base_url)
        except ValueError:  # a port that is none, half an IPv6 address
            good = False
        if not good:
            shown = _without_user(self.base_url)
            raise BadInput(f"base URL {shown!r} is not http(s)://HOST[:PORT][/PATH] in ASCII and without spaces")
        if url.username or url.password:
            raise BadInput("the base URL holds a user name or password; give a key with --api-key-env instead")
        if self.model != storable(self.model):
            raise BadInput("the model's name holds bytes that are no text")
        if self.api_key and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise BadInput("the API key holds a character that no key has (a line break at its end, perhaps)")
        if asked.scheme or asked.netloc or not _sendable(self.endpoint):
            raise BadInput(f"--endpoint {_without_user(self.endpoint)!r} is not a path, such as /v1/chat/completions")
        # The query may hold a key: apart from the URL, no message shows it.
        object.__setattr__(self, "base_url", f"{url.scheme}://{url.netloc}{url.path.rstrip('/')}")
        object.__setattr__(self, "query", "&".join(filter(None, (url.query, asked.query))))
        object.__setattr__(self, "chat", self._is_chat())
        self._check_headers()
        self._check_body()

    @property
    def origin(self) -> str:
        """The base URL without its path."""
        url = urlsplit(self.base_url)
        return f"{url.scheme}://{url.netloc}"

    @cached_property
    def bare_path(self) -> str:
        """What is asked for, without the query."""
        base = urlsplit(self.base_url).path
        if self.endpoint:
            path = "/" + urlsplit(self.endpoint).path.lstrip("/")
            return path if path.startswith(f"{base}/") else base + path
        if base.endswith("/completions"):
            return base
        return (base or "/v1") + ("/chat/completions" if self.chat else "/completions")

    @cached_property
    def path(self) -> str:
        """What is asked for, with the query."""
        return f"{self.bare_path}?{self.query}" if self.query else self.bare_path

    @property
    def url(self) -> str:
        """The whole endpoint as it may be shown: without its query."""
        return self.origin + self.bare_path

    def _is_chat(self) -> bool:
        if self.endpoint and urlsplit(self.base_url).path.endswith("/completions"):
            raise BadInput(f"base URL {self.base_url!r} is a whole endpoint already; leave it or --endpoint out")
        if not self.bare_path.endswith("/completions"):
            return self.chat
        chat = self.bare_path.endswith("/chat/completions")
        if self.chat and not chat:
            raise BadInput(f"{self.url} is no chat; leave --chat out, or name its …/chat/completions")
        return chat

    def _check_headers(self) -> None:
        names = [name.lower() for name, _ in self.headers] + ["authorization"] * bool(self.api_key)
        for number, (name, value) in enumerate(self.headers, 1):
            if not _HEADER_NAME.fullmatch(name):
                raise BadInput(f"header {number} is not 'Name: value'; its name is in letters, digits and dashes")
            if not (value.isascii() and value.isprintable()):
                raise BadInput(f"header {name}: its value holds a character that no header has (a line break, perhaps)")
            if name.lower() in _OWN_HEADERS:
                raise BadInput(f"header {name}: it goes out with every request already; leave it out")
            if names.count(name.lower()) > 1:
                raise BadInput(f"header {name}: it is given twice (--api-key-env is the header Authorization)")

    def _check_body(self) -> None:
        if not isinstance(self.extra_body, Mapping):
            raise BadInput('the extra body is not a JSON object, such as {"top_k": 1}')
        others = _OWN_KEYS.keys() - {"max_tokens", "max_completion_tokens"}
        if not re.fullmatch(r"\w+", self.max_tokens_field) or self.max_tokens_field in others:
            raise BadInput(
                f"--max-tokens-field {self.max_tokens_field!r} is no field for a length; max_tokens is usual"
            )
        for key in self.extra_body:
            if why := _OWN_KEYS.get(key, "the trace has the lengths" if key == self.max_tokens_field else ""):
                raise BadInput(f"the extra body holds {key!r}, which the kit sets: {why}")
        try:
            orjson.dumps(self.extra_body)
        except orjson.JSONEncodeError as error:
            raise BadInput(f"the extra body cannot be sent as JSON: {error}") from None

    @property
    def host(self) -> str:
        """For the header Host: without an IPv6 scope, which is this machine's own name for a link (RFC 6874)."""
        return re.sub("%.*]", "]", urlsplit(self.base_url).netloc)

    @cached_property
    def head(self) -> bytes:
        """What an HTTP request begins with, but for the length of its body, an empty line and that body."""
        headers = "".join(f"{name}: {value}\r\n" for name, value in self.all_headers())
        return (
            f"POST {self.path} HTTP/1.1\r\nHost: {self.host}\r\n{headers}"
            "Content-Type: application/json\r\nContent-Length: "
        ).encode()

    def body(self, prompt: str, output_tokens: int) -> bytes:
        """What a request asks; sampling is greedy unless the extra body says otherwise."""
        content = {"messages": [{"role": "user", "content": prompt}]} if self.chat else {"prompt": prompt}
        ours = (
            {"model": self.model, **content, self.max_tokens_field: output_tokens, "temperature": 0.0}
            | ({"ignore_eos": True} if self.ignore_eos else {})
            | {"stream": True, "stream_options": {"include_usage": True}}
        )
        merged = ours | self.extra_body
        return orjson.dumps({key: value for key, value in merged.items() if value is not None or key not in ours})

    def all_headers(self) -> list[tuple[str, str]]:
        """What is asked to be sent with each request, the key among it."""
        return [("Authorization", f"Bearer {self.api_key}")] * bool(self.api_key) + list(self.headers)

    def without_secrets(self, text: str) -> str:
        """`text`, which a server said, without what it may repeat of the key, the headers, the query and the body."""
        for secret, name in self._secrets:
            text = text.replace(secret, f"[{name}]")
            # What was said may have been cut within it.
            ends = (n for n in range(len(secret) - 1, _MIN_WORD - 1, -1) if text.endswith(secret[:n]))
            if cut := next(ends, 0):
                text = f"{text[:-cut]}[{name}]"
        return text

    @cached_property
    def _secrets(self) -> list[tuple[str, str]]:
        """(secret, what to say in its place), the longest first."""
        found = {self.api_key: "key"} if self.api_key else {}
        for name, value in self.headers:
            shortest = _MIN_SECRET if is_secret(name) or _SECRET_HEADER.search(name) else _MIN_WORD
            found |= {part: name for part in (value, *re.split(r"[\s;,=]+", value)) if len(part) >= shortest}
        named = [pair for pair in _leaves(self.extra_body) if is_secret(pair[0])]
        # Of a query no name says what is secret (`code`, `sig`).
        named += [*parse_qsl(self.query), *(part.partition("=")[::2] for part in self.query.split("&"))]
        for name, value in named:
            if len(value) >= _MIN_SECRET:
                found.setdefault(value, name)
        found |= {orjson.dumps(secret).decode()[1:-1]: name for secret, name in found.items()}
        return sorted(found.items(), key=lambda pair: -len(pair[0]))


def check_fleet(endpoints: Sequence[Endpoint], balance: str) -> None:
    """Raises BadInput for endpoints that cannot be asked the same, and a `balance` that is none of `BALANCES`."""
    urls = [one.url for one in endpoints]
    if twice := next((url for url in urls if urls.count(url) > 1), None):
        raise BadInput(f"the endpoint {twice} is named twice; name each of a fleet once")
    if len({one.chat for one in endpoints}) > 1:
        raise BadInput(
            f"of a fleet some endpoints are chats and some are not ({', '.join(urls)}): they are asked the same"
        )
    if balance not in BALANCES:
        raise BadInput(f"balance {balance!r} is none of {', '.join(BALANCES)}")


def _without_user(url: str) -> str:
    """A URL as it may be shown: without user, password and query."""
    return re.sub("^(.*//)?.*@", r"\1", url.partition("?")[0])


def _sendable(url: str) -> bool:
    """Whether a URL, or its path, can stand in a request's first line as it is."""
    return url.isascii() and url.isprintable() and " " not in url


def _leaves(value, name: str = "") -> Iterator[tuple[str, str]]:
    """(key, text) of every text in a JSON value."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, key)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item, name)
    elif isinstance(value, str):
        yield name, value


def words(body: bytes) -> str:
    """The sentence in the body of a refusal: JSON of any usual shape, an HTML page's title, or the text as it is."""
    text = body.decode(errors="replace").strip()
    try:
        return sentence(orjson.loads(body)) or text
    except orjson.JSONDecodeError:
        pass
    if re.match(r"<(!doctype|html|head|body)\b", text, re.IGNORECASE):
        title = re.search(r"<(title|h1)\b[^>]*>(.*?)</\1", text, re.IGNORECASE | re.DOTALL)
        return f"a web page: {' '.join(title[2].split()) if title else repr(text[:_EXCERPT])}"
    return text


def sentence(said, depth: int = 0) -> str:
    """The words in an error of any usual shape, as read from JSON; empty where it has none."""
    if isinstance(said, str):
        return said.strip()
    if depth == _DEEPEST or not isinstance(said, (list, Mapping)):
        return ""
    if isinstance(said, list):
        return "; ".join(filter(None, (sentence(one, depth + 1) for one in said[:_MOST])))
    lower = {key.lower(): value for key, value in said.items()}
    found = next(filter(None, (sentence(lower[key], depth + 1) for key in KEYS if key in lower)), "")
    where = lower.get("loc")
    return f"{'.'.join(map(str, where))}: {found}" if found and isinstance(where, list) else found


def remedy(error: str, endpoint: Endpoint) -> str:
    """What to do about the reason for which a request failed, as the end of a sentence; empty where that is not known."""
    told = _remedy(error, endpoint)
    return f"; {told}" if told else ""


def _remedy(error: str, endpoint: Endpoint) -> str:
    lower = error.lower()
    if "certificate verify failed" in lower or "certificate_verify_failed" in lower:
        return "--insecure takes a certificate of its own making; SSL_CERT_FILE=FILE.pem makes it a trusted one"
    if "wrong_version_number" in lower or "wrong version number" in lower:
        return "it does not speak TLS: http:// in --base-url"
    if re.match(r"\d+ (output tokens|chunks without a count) instead of", error):
        return "it does not keep to the lengths asked for: --natural-stop lets answers end by themselves"
    if re.match(r"HTTP 3\d\d: the server redirects to|no connection: [^;]*;", error):
        return ""  # it says what to do
    if error.startswith("connection closed by the server"):
        return "its log, or that of a proxy or balancer before it, says why"
    if error.startswith("no connection"):
        return f"is a server listening at {endpoint.origin}?"
    match = re.match(r"HTTP (\d+)", error)
    status = int(match[1]) if match else 0
    if status in (401, 403):
        return _KEY_REFUSED if endpoint.all_headers() else _KEY_ASKED
    if status in (400, 404, 422) and _NO_MODEL.search(lower):
        names = served_models(endpoint)
        return f"--model names it{f' (it serves: {names})' if names else ''}; {endpoint.url} was asked"
    if status in (404, 405):
        return f"{endpoint.url} was asked: --base-url with its path and query, or --endpoint PATH, where it is another"
    if status in (400, 422):
        return next((told for word, told in _BY_WORD if word in lower), _SHAPE)
    return _BY_STATUS.get(status, "")


def served_models(endpoint: Endpoint) -> str:
    """The names that the endpoint's list of models holds, in a line; empty when it gives none in a moment."""
    import httpx

    prefix = endpoint.bare_path.removesuffix("/completions").removesuffix("/chat")
    options = {"headers": dict(endpoint.all_headers()), "verify": not endpoint.insecure, "timeout": _MODELS_S}
    until = time.monotonic() + _MODELS_S
    try:
        with httpx.stream(
            "GET", f"{endpoint.origin}{prefix}/models?{endpoint.query}", trust_env=False, **options
        ) as reply:
            body = b""
            for part in reply.iter_bytes():
                body += part
                if len(body) > _MODELS_BYTES or time.monotonic() > until:
                    return ""
        names = [str(model["id"]) for model in orjson.loads(body)["data"]]
    except (httpx.HTTPError, orjson.JSONDecodeError, LookupError, TypeError):
        return ""
    more = f", and {len(names) - _MODELS_SHOWN} more" if len(names) > _MODELS_SHOWN else ""
    return endpoint.without_secrets(", ".join(names[:_MODELS_SHOWN]) + more)
