"""What a server's refusal says, in its own words, and what to do about it."""

import re
import time
from collections.abc import Mapping

import orjson

from .endpoint import Endpoint

# Where servers and gateways put their sentence, the most telling first: OpenAI's and vLLM's error.message, FastAPI's detail
# (a list with `msg` for a body that does not fit), TGI's and Ollama's error, RFC 9457's detail, OAuth's error_description.
KEYS = (
    "message",
    "msg",
    "detail",
    "error_description",
    "error",
    "errors",
    "error_msg",
    "title",
    "fault",
    "faultstring",
)
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
    told = _remedy(error, error.lower(), endpoint)
    return f"; {told}" if told else ""


def _remedy(error: str, lower: str, endpoint: Endpoint) -> str:
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
