"""Any endpoint: what is sent to it, byte by byte, what its refusals come to, goodput, and the search for its limit.

The server here is real and local; it keeps what it was sent and answers as it is told.
"""

import contextlib
import json
import math
import ssl
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from conftest import make_records
from fp8lab.config.trace import fixed_length
from fp8lab.errors import BadInput, LevelFailed
from fp8lab.load.endpoint import Endpoint, remedy, words
from fp8lab.load.level import measure_level, warm_up
from fp8lab.metrics.slo import SLO, goodput, required_requests
from warm_cli import fp8lab

TRACE = fixed_length(3, input_tokens=5, output_tokens=4)
SHORT = ["--trace", "random", "--input-tokens", "5", "--output-tokens", "4", "--requests", "3", "--model", "m"]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True  # a token leaves when it is written

    def do_GET(self):
        self.server.seen.append((self.path, dict(self.headers), None))
        self.reply(200, json.dumps({"data": [{"id": "right-name"}, {"id": "other"}]}).encode())

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, dict(self.headers), body))
        self.server.behave(self, body)

    def reply(self, status, body, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def log_message(self, *_):
        pass


def stream(handler, body, tokens=None):
    """A whole answer of as many tokens as were asked for, one after the other: what comes in one piece is not timed."""
    tokens = tokens or body.get("max_tokens") or body["max_completion_tokens"]
    chat = "messages" in body
    token = {"delta": {"content": " a"}} if chat else {"text": " a"}
    ends = [None] * (tokens - 1) + ["length"]
    events = [{"choices": [{"index": 0, **token, "finish_reason": end}]} for end in ends]
    events.append({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": tokens}})
    lines = [f"data: {json.dumps(event, separators=(',', ':'))}\n\n" for event in events]
    lines.append("data: [DONE]\n\n")
    handler.send_response(200)
    handler.send_header("Content-Type", "text/event-stream")
    handler.send_header("Content-Length", str(sum(map(len, lines))))
    handler.end_headers()
    for line in lines:
        handler.wfile.write(line.encode())
        handler.wfile.flush()
        time.sleep(0.002)


def refuse(status, body, **headers):
    return lambda handler, _body: handler.reply(
        status, body if isinstance(body, bytes) else json.dumps(body).encode(), **headers
    )


@contextlib.contextmanager
def recording(behave=stream, certificate=None):
    """A server in a thread; yields it with `.url` and `.seen`: (path, headers, body) of each request."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.seen, server.behave = True, [], behave
    server.url = f"http{'s' * bool(certificate)}://127.0.0.1:{server.server_port}"
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def load_test(server, out, *more, base="", common=SHORT):
    """Its exit code is 3 where other tests make it late: what completed says what was done. When it is 0 test_cli.py tells."""
    return fp8lab("load-test", "--base-url", server.url + base, *common, "--out", str(out), *more)


# Where.


@pytest.mark.parametrize(
    ("base", "more", "asked"),
    [
        ("", {}, "/v1/completions"),
        ("/", {"chat": True}, "/v1/chat/completions"),
        ("/v1", {}, "/v1/completions"),
        ("/v1/", {"chat": True}, "/v1/chat/completions"),
        ("/api/v3", {"chat": True}, "/api/v3/chat/completions"),
        ("/api/v3/", {}, "/api/v3/completions"),
        ("/v1beta/openai", {"chat": True}, "/v1beta/openai/chat/completions"),
        ("/openai/deployments/x?api-version=2024-10-21", {"chat": True}, "/openai/deployments/x/chat/completions?api-version=2024-10-21"),
        ("?api-version=1&x=%20y", {}, "/v1/completions?api-version=1&x=%20y"),
        ("/v1/chat/completions", {}, "/v1/chat/completions"),
        ("/v1/chat/completions/", {"chat": True}, "/v1/chat/completions"),
        ("/openai/deployments/x/chat/completions?api-version=1", {}, "/openai/deployments/x/chat/completions?api-version=1"),
        ("/v1/completions", {}, "/v1/completions"),
        ("", {"endpoint": "/generate"}, "/generate"),
        ("", {"endpoint": "chat/completions"}, "/chat/completions"),
        ("/api", {"endpoint": "/v2/chat/completions"}, "/api/v2/chat/completions"),
        ("/v1", {"endpoint": "/v1/chat/completions"}, "/v1/chat/completions"),
        ("?a=1", {"endpoint": "/x/completions?b=2"}, "/x/completions?a=1&b=2"),
    ],
)  # fmt: skip
def test_the_path_that_is_asked(base, more, asked):
    endpoint = Endpoint(f"http://h:1{base}", "m", **more)
    assert endpoint.path == asked and endpoint.chat == ("/chat/" in asked)
    assert endpoint.url == f"http://h:1{asked.partition('?')[0]}" and endpoint.origin == "http://h:1"
    head, body = endpoint.head, endpoint.body(" hi", 3)
    assert head.startswith(f"POST {asked} HTTP/1.1\r\nHost: h:1\r\n".encode())
    assert ("messages" in json.loads(body)) == endpoint.chat


@pytest.mark.parametrize(
    ("base", "more", "said"),
    [
        ("http://h/v1/completions", {"chat": True}, "no chat"),
        ("http://h/v1/chat/completions", {"endpoint": "/x"}, "a whole endpoint already"),
        ("http://h", {"endpoint": "https://h/v1"}, "is not a path"),
        ("http://h", {"endpoint": "/a b"}, "is not a path"),
        ("http://h/a b", {}, "is not http"),
        ("http://h/\r\nX: 1", {}, "is not http"),
        ("h:8000", {}, "is not http"),
        ("http://h/ü", {}, "is not http"),
    ],
)
def test_an_address_that_cannot_be_asked_is_refused(base, more, said):
    with pytest.raises(BadInput, match=said):
        Endpoint(base, "m", **more)


def test_a_deployment_with_its_query_key_header_and_field_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.setenv("MINE", "azure-secret-value")
    more = ["--header-env", "api-key=MINE", "--header", "X-Team: blue", "--chat", "--natural-stop"]
    more += ["--max-tokens-field", "max_completion_tokens"]
    more += ["--extra-body", '{"temperature": null, "chat_template_kwargs": {"enable_thinking": false}}']
    with recording() as server:
        done = load_test(server, tmp_path, *more, base="/openai/deployments/x?api-version=2024-10-21")
    assert json.loads(done.stdout)["completed"] == 3, done.stderr
    path, headers, body = server.seen[0]
    assert len(server.seen) == 3 and path == "/openai/deployments/x/chat/completions?api-version=2024-10-21"
    assert headers["api-key"] == "azure-secret-value" and headers["X-Team"] == "blue" and "Authorization" not in headers
    assert headers["Host"] == server.url.removeprefix("http://")
    assert body == {
        "model": "m",
        "messages": body["messages"],
        "max_completion_tokens": 4,
        "stream": True,
        "stream_options": {"include_usage": True},
        "chat_template_kwargs": {"enable_thinking": False},
    }


# What is sent.


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        ([("X-Evil", "sk-hidden\r\nHost: other")], "X-Evil: its value holds a character"),
        ([("X Evil", "sk-hidden")], "header 1 is not 'Name: value'"),
        ([("", "sk-hidden")], "header 1 is not"),
        ([("X-Evil\r\n", "sk-hidden")], "header 1 is not"),
        ([("host", "sk-hidden")], "host: it goes out with every request already"),
        ([("Content-Length", "5")], "Content-Length: it goes out"),
        ([("Transfer-Encoding", "chunked")], "goes out with every request"),
        ([("Accept-Encoding", "gzip")], "goes out with every request"),
        ([("X-A", "sk-hidden"), ("x-a", "sk-hidden")], "is given twice"),
        ([("authorization", "Bearer sk-hidden")], "is given twice"),
        ([("X-A", "schlüssel-sk-hidden")], "holds a character"),
    ],
)
def test_a_header_that_would_garble_the_request_is_refused_unsaid(headers, said):
    with pytest.raises(BadInput, match=said) as refused:
        Endpoint("http://h:1", "m", "key", headers=tuple(headers))
    assert "sk-hidden" not in str(refused.value)


@pytest.mark.parametrize("header", ["Authorization Bearer sk-hidden", "=sk-hidden"])
def test_a_header_without_a_colon_is_refused_unsaid(header, tmp_path):
    done = fp8lab("load-test", "--base-url", "http://127.0.0.1:9", *SHORT, "--header", header, "--out", str(tmp_path))
    assert done.returncode == 2 and "--header number 1 is not 'Name: value'" in done.stderr
    assert "sk-hidden" not in done.stderr


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ("[1]", "is not a JSON object"),
        ("1", "is not a JSON object"),
        ("{x}", "--extra-body is not JSON"),
        ('{"a": NaN}', "--extra-body is not JSON"),
        ('{"stream": false}', "'stream', which the kit sets: only streams can be timed"),
        ('{"model": "x"}', "--model names it"),
        ('{"messages": []}', "the trace has the prompts"),
        ('{"max_tokens": 5}', "the trace has the lengths"),
        ('{"ignore_eos": false}', "--natural-stop leaves it out"),
        ('{"n": 2}', "one answer"),
    ],
)
def test_an_extra_body_that_cannot_be_merged_is_refused(extra, said, tmp_path):
    done = fp8lab(
        "load-test", "--base-url", "http://127.0.0.1:9", *SHORT, "--extra-body", extra, "--out", str(tmp_path)
    )
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("field", ["", "stream", "model", "a b", "prompt"])
def test_a_field_that_is_no_length_is_refused(field):
    with pytest.raises(BadInput, match="--max-tokens-field"):
        Endpoint("http://h", "m", max_tokens_field=field)


def test_the_extra_body_replaces_and_leaves_out():
    extra = {"temperature": 0.7, "stream_options": None, "guided": None, "top_k": 1}
    body = json.loads(Endpoint("http://h", "m", extra_body=extra).body(" hi", 3))
    assert body == {"model": "m", "prompt": " hi", "max_tokens": 3, "temperature": 0.7, "ignore_eos": True, "stream": True,
                    "guided": None, "top_k": 1}  # fmt: skip


@pytest.mark.parametrize("options", [{"base_url": "me:hunter2@h:80"}, {"endpoint": "https://me:hunter2@h/v1"}])
def test_no_password_is_in_a_refusal(options):
    with pytest.raises(BadInput) as refused:
        Endpoint(**{"base_url": "http://h", "model": "m"} | options)
    assert "hunter2" not in str(refused.value)


def test_a_model_name_that_is_no_text_is_refused():
    with pytest.raises(BadInput, match="holds bytes that are no text"):
        Endpoint("http://h", "m\udcff")


def test_no_secret_reaches_a_file_or_a_message(tmp_path):
    """The server repeats everything that it was sent."""
    secrets = ["sk-one-secret", "session-two-secret", "three-secret", "four-secret", "five-secret"]

    def echo(handler, body):
        said = f"refused: {handler.headers} {handler.path} {json.dumps(body)}"
        handler.reply(401, json.dumps({"error": {"message": said}}).encode())

    more = ["--header", f"Authorization: Bearer {secrets[0]}", "--header", f"Cookie: a={secrets[1]}; b=1"]
    more += ["--header", f"x-api-key: {secrets[2]}", "--extra-body", json.dumps({"deep": [{"api_key": secrets[3]}]})]
    with recording(echo) as server:
        done = load_test(server, tmp_path / "level", *more, base=f"?key={secrets[4]}")
        search = ["--slo", "ttft=1000,p50", "--find-max-rate", "--requests", "7"]
        warm = load_test(server, tmp_path / "search", *more, *search, base=f"?key={secrets[4]}")
    path, headers, _ = server.seen[0]
    assert path.endswith(secrets[4]) and headers["x-api-key"] == secrets[2]  # they were sent
    assert done.returncode == 3 and "HTTP 401: refused" in done.stdout and warm.returncode == 1
    told = done.stdout + done.stderr + warm.stdout + warm.stderr
    stored = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    for secret in secrets:
        assert secret not in told and secret.encode() not in stored
    assert "[Authorization]" in told and "[key]" in told and "[api_key]" in told
    unnamed = Endpoint("http://h/openai?code=FUNCTION42&api-version=1", "m")
    assert unnamed.without_secrets("POST /openai?code=FUNCTION42") == "POST /openai?code=[code]"
    endpoint = Endpoint("http://h?key=five%2Fsecret", "m", headers=(("x-api-key", 'three"secret'),))
    assert "secret" not in repr(endpoint)
    for said in ("five%2Fsecret", "five/secret", 'three"secret', 'three\\"secret', 'cut within three"sec'):
        assert "sec" not in endpoint.without_secrets(said)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A self-signed certificate for 127.0.0.1, with its key."""
    path = tmp_path_factory.mktemp("tls") / "server.pem"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "2",
    ]
    command += [
        "-subj",
        "/CN=127.0.0.1",
        "-addext",
        "subjectAltName=IP:127.0.0.1",
        "-keyout",
        path,
        "-out",
        f"{path}.crt",
    ]
    subprocess.run(command, check=True, capture_output=True)
    path.write_text(path.read_text() + path.with_name("server.pem.crt").read_text())
    return path


def test_a_self_signed_certificate_is_refused_with_the_remedy_and_taken_with_insecure(certificate, tmp_path):
    with recording(certificate=certificate) as server:
        refused = load_test(server, tmp_path / "refused")
        taken = load_test(server, tmp_path / "taken", "--insecure")
    assert refused.returncode == 3 and "--insecure" in json.loads(refused.stdout)["invalid_reason"]
    assert json.loads(taken.stdout)["completed"] == 3, taken.stderr


# Refusals.


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"error": {"message": "The model `x` does not exist.", "type": "NotFoundError", "code": 404}}, "The model `x` does not exist."),
        ({"error": "Input validation error", "error_type": "validation"}, "Input validation error"),
        ({"detail": "Not Found"}, "Not Found"),
        ({"detail": [{"loc": ["body", "max_tokens"], "msg": "Input should be a valid integer", "input": "x"}]}, "body.max_tokens: Input should be a valid integer"),
        ({"object": "error", "message": "too long", "type": "BadRequestError"}, "too long"),
        ({"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}, "Overloaded"),
        ([{"error": {"code": 400, "message": "API key not valid."}}], "API key not valid."),
        ({"Message": "Forbidden"}, "Forbidden"),
        ({"statusCode": 401, "message": "missing subscription key"}, "missing subscription key"),
        ({"errors": [{"message": "one"}, {"message": "two"}]}, "one; two"),
        ({"fault": {"faultstring": "Quota", "detail": {"errorcode": "x"}}}, "Quota"),
        ({"title": "Not Found", "status": 404, "detail": "no such route"}, "no such route"),
        ({"error": {"code": 7}}, '{"error":{"code":7}}'),
        (b"Service Unavailable", "Service Unavailable"),
        (b"", ""),
        (b"<!DOCTYPE html><html><head><title>502 Bad\nGateway</title></head></html>", "a web page: 502 Bad Gateway"),
        (b"<html><body><h1>Nope</h1></body></html>", "a web page: Nope"),
        (b"[" * 900 + b"]" * 900, "[" * 900 + "]" * 900),
        (b'{"error": null, "message": "yes"}', "yes"),
    ],
)  # fmt: skip
def test_a_refusal_is_shortened_to_its_sentence(body, said):
    body = body if isinstance(body, bytes) else json.dumps(body, separators=(",", ":")).encode()
    assert words(body) == said


@pytest.mark.parametrize(
    ("status", "body", "said", "todo"),
    [
        (401, {"error": {"message": "Unauthorized"}}, "HTTP 401: Unauthorized", "--api-key-env VAR"),
        (403, {"detail": "no access"}, "HTTP 403: no access", "--api-key-env VAR"),
        (404, {"detail": "Not Found"}, "HTTP 404: Not Found", "{url}/v1/completions was asked: --base-url with its path and query, or --endpoint"),
        (404, {"error": {"message": "The model `m` does not exist."}}, "HTTP 404: The model `m` does not exist.", "--model names it (it serves: right-name, other)"),
        (404, {"error": {"message": "Invalid model name passed in model=m"}}, "Invalid model name", "it serves: right-name"),
        (405, {"detail": "Method Not Allowed"}, "HTTP 405", "--endpoint PATH"),
        (422, {"detail": "Unexpected fields in the request: {'ignore_eos'}"}, "HTTP 422: Unexpected fields", "--natural-stop"),
        (400, {"error": {"message": "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."}}, "HTTP 400", "--max-tokens-field max_completion_tokens"),
        (400, {"error": {"message": "Unknown parameter: 'stream_options'."}}, "HTTP 400", '--extra-body \'{{"stream_options": null}}\''),
        (400, {"error": {"message": "'temperature' does not support 0.0"}}, "HTTP 400", '{{"temperature": null}}'),
        (400, {"message": "no"}, "HTTP 400: no", "--extra-body"),
        (429, {"error": {"message": "Rate limit reached"}}, "HTTP 429: Rate limit reached", "lower --rate"),
        (503, b"Service Unavailable", "HTTP 503: Service Unavailable", "--max-concurrency"),
        (308, b"", "HTTP 308", "--base-url"),
        (502, b"<html><title>502 Bad Gateway</title></html>", "HTTP 502: a web page: 502 Bad Gateway", "gateway"),
    ],
)  # fmt: skip
def test_a_refusal_is_told_in_the_servers_words_with_a_remedy(status, body, said, todo, capsys):
    with recording(refuse(status, body, Location="/elsewhere")) as server:
        with pytest.raises(LevelFailed) as refused:
            warm_up(Endpoint(server.url, "m"), TRACE)
        result = measure_level(Endpoint(server.url, "m"), TRACE, [0.0] * 3, name="refused")
    for told in (str(refused.value), result.summary.invalid_reason):
        assert said in told and todo.format(url=server.url) in told
    assert "(3 of 3 requests), so nothing was measured" in str(refused.value)
    assert result.records["error"].str.startswith(f"HTTP {status}").all()


def test_a_refusal_that_repeats_a_long_prompt_is_still_its_sentence(capsys):
    body = {"detail": [{"input": "x" * 50_000, "loc": ["body"], "msg": "Field required"}]}
    with recording(refuse(422, body)) as server:
        result = measure_level(Endpoint(server.url, "m"), TRACE, [0.0] * 3, name="refused")
    assert (result.records["error"] == "HTTP 422: body: Field required").all()


def test_an_endpoint_that_stops_where_it_likes_has_its_remedy(capsys):
    with recording(lambda handler, body: stream(handler, body, tokens=2)) as server:
        with pytest.raises(LevelFailed, match="2 output tokens instead of the 4 asked for; .*--natural-stop"):
            warm_up(Endpoint(server.url, "m"), TRACE)
        warm_up(Endpoint(server.url, "m", ignore_eos=False), TRACE, exact_tokens=False)


def test_nobody_there_has_its_remedy():
    assert (
        remedy("no connection: Connection refused", Endpoint("http://h:9/v1", "m"))
        == "; is a server listening at http://h:9?"
    )


# The warm-up and the goodput.


def test_a_warm_up_is_sent_before_and_not_counted(tmp_path):
    with recording() as server:
        done = load_test(server, tmp_path, "--warmup", "5", "--slo", "ttft=5000,e2el=9000")
    said = json.loads(done.stdout)
    assert said["completed"] == 3 and len(server.seen) == 8, done.stderr
    prompts = [body["prompt"] for _, _, body in server.seen]
    assert not set(prompts[:5]) & set(prompts[5:])  # a prefix cache that was warmed does not know the level's
    assert said["request_goodput"] == said["request_throughput"] and said["slo_share"] == 1
    assert said["slo"] == "TTFT ≤ 5,000 ms and E2EL ≤ 9,000 ms for 99% of requests (ttft=5000,e2el=9000)"
    assert "warm-up: 5 requests, not counted" in done.stderr and "(100.0% met the objective)" in done.stderr
    assert said["objective"] == "undecided" and said["reason"] in done.stderr
    assert said["reason"] == "0 of 3 requests were outside its limits: too few to tell, it takes 459 requests"


def test_a_warm_up_that_fails_is_one_error_before_anything_is_measured(tmp_path):
    with recording(refuse(401, {"error": {"message": "bad key"}})) as server:
        done = load_test(server, tmp_path / "out", "--warmup", "2")
    assert done.returncode == 1 and "nothing was measured: HTTP 401: bad key; " in done.stderr and not done.stdout
    assert len(server.seen) == 2 and not list((tmp_path / "out").glob("[!.]*"))


def test_goodput_is_vllms():
    """Requests within all limits over the duration; a failed one is never good, one of a single token has no TPOT."""
    records = make_records([0, 0, 0, 0, 0], [0.1, 0.3, 0.1, 0.1, 0.1], [0.2, 0.4, 1.1, 0.1, 0.2], np.array([11, 11, 11, 1, 11]),
                           errors=[None, None, None, None, "HTTP 500"])  # fmt: skip
    # TTFT 100, 300, 100, 100 ms; TPOT 10, 10, 100 ms, none; E2EL 200, 400, 1100, 100 ms.
    for text, good in [
        ("ttft=100.1,tpot=50", 2),
        ("ttft=400,tpot=50", 3),
        ("e2el=500", 3),
        ("tpot=101ms", 4),
        ("ttft=1", 0),
    ]:
        found = goodput(records, SLO.parse(text), 2.0)
        assert found["request_goodput"] == good / 2 and found["slo_share"] == good / 5
    assert goodput(records, SLO.parse("ttft=1"), None)["request_goodput"] == 0


def test_an_objective_as_it_is_written():
    assert SLO.parse("ttft=200,tpot=50") == SLO("ttft=200,tpot=50", 200, 50)
    assert SLO.parse("TTFT=200ms, p95") == SLO("TTFT=200ms, p95", 200, math.inf, 0.95)
    assert str(SLO.parse("e2el=1500,p99.9")) == "E2EL ≤ 1,500 ms for 99.9% of requests (e2el=1500,p99.9)"


@pytest.mark.parametrize("text", ["", "p99", "ttft", "ttft=x", "ttft=0", "ttft=-1", "ttft=nan", "ttft=inf", "itl=5", "ttft=1,ttft=2", "ttft=1,p100", "ttft=1,p0", "ttft=1,p9,p8", "ttft=1,"])  # fmt: skip
def test_an_objective_that_is_none_is_refused(text):
    with pytest.raises(BadInput):
        SLO.parse(text)


# The search.


class Queue:
    """Answers one request after the other, each in `seconds`, and 0.4 s later than that: its capacity is 1 / seconds, and
    a client that a busy machine makes some milliseconds late is not late."""

    def __init__(self, seconds):
        self.seconds, self.free, self.lock = seconds, 0.0, threading.Lock()

    def __call__(self, handler, body):
        with self.lock:
            self.free = max(self.free, time.monotonic()) + self.seconds
            due = self.free
        time.sleep(max(0.0, due + 0.4 - time.monotonic()))
        stream(handler, body)


SEARCH = ["--slo", "ttft=650,p90", "--find-max-rate", "--rate", "12", "--burstiness", "inf"]
PROBE = ["--trace", "random", "--input-tokens", "5", "--output-tokens", "2", "--requests", "64", "--model", "m"]


@pytest.mark.timing
def test_the_search_finds_the_knee_is_kept_and_goes_on(tmp_path):
    assert required_requests(1, 0.9) <= 64
    with recording(Queue(0.04)) as server:  # 25 requests/s
        first = load_test(server, tmp_path, *SEARCH, "--max-probes", "2", common=PROBE)
        sent = len(server.seen)
        done = load_test(server, tmp_path, *SEARCH, "--max-probes", "5", common=PROBE)
        went_on = len(server.seen) - sent
        again = load_test(server, tmp_path, *SEARCH, "--max-probes", "5", common=PROBE)
        other = load_test(server, tmp_path, *SEARCH, common=[*PROBE[:-1], "other"])
    # Two probes met it; what they say is kept, although they bound nothing from above.
    assert first.returncode == 1 and "met the objective at every rate up to 24 req/s" in first.stderr, first.stderr
    assert "--max-probes 6 to go on above" in first.stderr and json.loads(first.stdout)["max_rate"] == "at least 24"
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert 24 <= said["highest_met"] < 30 and 25 < said["lowest_missed"] < 34 and said["valid"]
    assert [probe["rate"] for probe in said["probes"]][:2] == [12, 24] and len(said["probes"]) == 5
    assert went_on == 1 + 3 * 64 and "probe 3 of at most 5, 48 req/s" in done.stderr
    assert f"{said['highest_met']:g} to {said['lowest_missed']:g} req/s" in done.stderr
    assert again.returncode == 0 and json.loads(again.stdout) == said
    assert len(server.seen) == sent + went_on  # and nothing was sent for it
    for probe in said["probes"]:
        folder = tmp_path / f"{probe['rate']:g}rps"
        assert {path.name for path in folder.iterdir()} == {"records.parquet", "tokens.parquet", "summary.json"}
        assert json.loads((folder / "summary.json").read_text())["request_goodput"] == probe["request_goodput"]
    assert json.loads((tmp_path / "search.json").read_text())["max_rate"] == said["max_rate"]
    assert other.returncode == 2 and "holds a search with model 'm', not 'other'" in other.stderr


@pytest.mark.timing
def test_requests_that_the_endpoint_refuses_under_load_miss_the_objective(tmp_path):
    """It takes two at a time and answers the others 429: a load test calls such a level INVALID."""
    busy = threading.Semaphore(2)

    def behave(handler, body):
        if not busy.acquire(blocking=False):
            return handler.reply(429, b'{"error":{"message":"slow down"}}')
        with contextlib.closing(contextlib.ExitStack()) as held:
            held.callback(busy.release)
            time.sleep(0.15)
            stream(handler, body)

    with recording(behave) as server:
        done = load_test(server, tmp_path, *SEARCH, "--max-probes", "4", common=PROBE)
    said = json.loads(done.stdout)
    assert done.returncode == 0, done.stderr
    missed = [probe for probe in said["probes"] if probe["objective"] == "missed"]
    assert said["valid"] and said["highest_met"] >= 12 and missed and all(probe["failed"] for probe in missed)


@pytest.mark.timing
def test_an_endpoint_that_never_meets_it_is_an_error_and_what_was_measured_is_kept(tmp_path):
    with recording(Queue(0.2)) as server:  # 5 requests/s
        done = load_test(server, tmp_path, *SEARCH, "--max-probes", "2", common=[*PROBE, "--requests", "44"])
    assert done.returncode == 1 and "missed the objective at every rate down to 6 req/s" in done.stderr
    assert json.loads(done.stdout)["max_rate"] == "below 6" and (tmp_path / "6rps" / "summary.json").exists()


def test_an_endpoint_that_fails_is_an_error_before_the_search(tmp_path):
    with recording(refuse(404, {"detail": "Not Found"})) as server:
        done = load_test(server, tmp_path, *SEARCH, common=PROBE)
    assert done.returncode == 1 and "HTTP 404: Not Found; " in done.stderr and "--endpoint PATH" in done.stderr
    assert len(server.seen) == 1 and "Traceback" not in done.stderr


def test_an_endpoint_that_fails_from_the_first_probe_on_is_told_in_its_words(tmp_path):
    """It answers the warm-up and nothing after it."""

    def behave(handler, body):
        return stream(handler, body) if len(handler.server.seen) == 1 else refuse(500, b"gone")(handler, body)

    with recording(behave) as server:
        done = load_test(server, tmp_path, *SEARCH, common=PROBE)
    assert done.returncode == 1 and "found no rate that" in done.stderr and "HTTP 500: gone" in done.stderr
    assert len(server.seen) == 65 and json.loads(done.stdout)["probes"][0]["objective"] == "INVALID"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--find-max-rate"], "name the objective with --slo"),
        (["--max-probes", "4"], "--max-probes counts the levels of a search"),
        ([*SEARCH, "--max-concurrency", "4"], "a closed loop"),
        ([*SEARCH, "--rate", "inf"], "above 0, and finite"),
        ([*SEARCH, "--rate", "0"], "above 0, and finite"),
        ([*SEARCH, "--max-probes", "0"], "above 0, and finite"),
        ([*SEARCH, "--trace", "no.csv"], "no trace file"),
        (["--slo", "fast"], "'fast' is none of"),
        (["--warmup", "-1"], "--warmup -1 is below 0"),
        (["--slo", ""], "argument --slo: '' is empty"),
        (["--out", ""], "argument --out: '' is empty"),
        (["--header-env", "api-key"], "is not NAME=VAR"),
        (["--header-env", "api-key=NO_SUCH"], "NO_SUCH: no such environment variable"),
    ],
)
def test_bad_arguments_are_refused(more, said, tmp_path):
    common = PROBE[-4:] if "--trace" in more else PROBE  # lengths of their own are random's
    done = fp8lab("load-test", "--base-url", "http://127.0.0.1:9", *common, "--out", str(tmp_path), *more)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def test_too_few_requests_for_a_percentile_are_refused_before_a_probe(tmp_path):
    with recording() as server:
        done = load_test(server, tmp_path, *SEARCH, common=SHORT)
    assert (
        done.returncode == 2 and "3 requests cannot show that 90% meet" in done.stderr and "at least 44" in done.stderr
    )


@pytest.mark.timing
def test_a_short_file_is_begun_anew_in_a_probe(tmp_path):
    (tmp_path / "mine.csv").write_text("prompt_tokens,output_tokens,arrival_s\n5,2,0\n7,3,1\n6,2,2\n")
    more = ["--trace", str(tmp_path / "mine.csv"), "--requests", "44", "--max-probes", "1"]
    with recording() as server:
        done = load_test(server, tmp_path / "out", *SEARCH, *more, common=PROBE[-2:])
    assert "at least 12" in done.stdout and len(server.seen) == 45
    prompts = [body["prompt"] for _, _, body in server.seen[1:]]
    assert [body["max_tokens"] for _, _, body in server.seen[1:]].count(3) in (14, 15) and len(set(prompts)) == 44
