"""How connections are made: TLS, how many are opened ahead, addresses, the limit on open files, what servers do with HTTP,
proxies. Each server here is a real one on this machine."""

import asyncio
import contextlib
import json
import os
import resource
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from conftest import streaming_server, wait_for
from fp8lab.config.trace import arrival_times, fixed_length
from fp8lab.errors import BadInput, LevelFailed
from fp8lab.load import connection, vllm_bench
from fp8lab.load.answers import tokenize
from fp8lab.load.connection import find_address, opened_ahead
from fp8lab.load.endpoint import Endpoint
from fp8lab.load.generator import send_load
from fp8lab.load.level import measure_level
from fp8lab.models.checkpoints import model_folder
from sse_server import HEAD, LAST, TOKEN, http_chunk, usage

TRACE = fixed_length(4, input_tokens=5, output_tokens=3)
BODY = TOKEN + TOKEN + LAST + usage(5, 3) + b"data: [DONE]\n\n"
OK = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
SIZED = OK + b"content-length: %d\r\n" % len(BODY)


def send(url, trace=TRACE, due=None, **options):
    return send_load(Endpoint(url, "ok"), trace, np.zeros(len(trace)) if due is None else due, **options)


def measure(url, requests, rate=np.inf, endpoint=None, tokens=10, **options):
    """A level as `load-test` measures it."""
    trace = fixed_length(requests, input_tokens=5, output_tokens=tokens)
    endpoint = endpoint or Endpoint(url, "ok")
    return measure_level(endpoint, trace, arrival_times(requests, rate), name="level", **options).summary


class Raw:
    """A server whose connections are handled by `answer(reader, writer, request)`, called for each request that it has read
    whole, which says whether the connection goes on. `opened` holds the peers in the order in which they came, `served` the
    number of requests that each had sent."""

    def __init__(self, answer, host: str = "127.0.0.1"):
        self.answer, self.opened, self.served = answer, [], []
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        start = asyncio.start_server(self.handle, host, 0, backlog=4096)
        self.server = asyncio.run_coroutine_threadsafe(start, self.loop).result(10)
        self.port = self.server.sockets[0].getsockname()[1]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    async def handle(self, reader, writer):
        number = len(self.opened)
        self.opened.append(writer.get_extra_info("peername"))
        self.served.append(0)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r")[0] or 0)
                request = head + await reader.readexactly(length)
                self.served[number] += 1
                if not await self.answer(writer, request, self.served[number]):
                    break
        writer.close()

    def __enter__(self):
        return self

    def __exit__(self, *_exc):
        self.loop.call_soon_threadsafe(self.server.close)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)


def answering(*parts: bytes, close: bool = False, pause_s: float = 0.01):
    """An answer that is written in `parts` with a pause between them."""

    async def answer(writer, _request, _served):
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(pause_s)
        return not close

    return answer


# TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A self-signed certificate for this machine's loopback names, with its key, as two files: (both, certificate)."""
    if not shutil.which("openssl"):
        pytest.skip("openssl makes the certificate")
    folder = tmp_path_factory.mktemp("tls")
    key, cert, both = (folder / name for name in ("key.pem", "cert.pem", "both.pem"))
    names = "subjectAltName=DNS:localhost,IP:127.0.0.1,IP:::1"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
         "-addext", names, "-keyout", key, "-out", cert], check=True, capture_output=True,
    )  # fmt: skip
    both.write_bytes(key.read_bytes() + cert.read_bytes())
    return both, cert


# A slow first token: what a busy machine adds to a request's lateness then matters less.
SLOW = "--ttft-ms", "400", "--itl-ms", "2"


@pytest.fixture(scope="module")
def slow_url():
    with streaming_server(*SLOW) as url:
        yield url


@pytest.fixture(scope="module")
def https_url(certificate):
    with streaming_server(*SLOW, "--certificate", str(certificate[0])) as url:
        yield url.replace("http:", "https:")


@pytest.fixture
def trusted(certificate, tmp_path, monkeypatch):
    """The certificate is in a trust store of the usual size, which takes the time to load that it takes."""
    system, store = Path(ssl.get_default_verify_paths().openssl_cafile), tmp_path / "store.pem"
    store.write_bytes((system.read_bytes() if system.exists() else b"") + certificate[1].read_bytes())
    monkeypatch.setenv("SSL_CERT_FILE", str(store))


def test_over_tls_requests_leave_in_time(https_url, trusted):
    summary = measure(https_url, 90, rate=30)
    assert summary.valid, summary.invalid_reason
    assert summary.completed == 90 and summary.mean_ttft_ms < 450


def test_a_burst_over_tls_waits_for_no_handshake(https_url, trusted, slow_url):
    """All connections are open, their handshakes done, before the first request is sent."""
    tls, plain = measure(https_url, 200), measure(slow_url, 200)
    assert tls.completed == plain.completed == 200
    assert tls.mean_ttft_ms < plain.mean_ttft_ms + 200


def test_one_tls_context_serves_all_connections_of_a_worker(https_url, trusted, monkeypatch):
    made = []
    monkeypatch.setattr(
        connection, "tls_context", lambda insecure: made.append(insecure) or ssl.create_default_context()
    )
    connector = connection.Connector(Endpoint(https_url, "ok"), find_address(Endpoint(https_url, "ok")), print)

    async def open_three():
        for opened in [await connector.connect(5.0) for _ in range(3)]:
            assert opened.usable
            opened.close()

    asyncio.run(open_three())
    assert made == [False]


def test_connections_that_are_opened_when_needed_over_tls(https_url, trusted):
    summary = measure(https_url, 20, rate=20, connections_ahead=0)
    assert (summary.completed, summary.failed) == (20, 0)


def test_an_untrusted_certificate_is_refused_unless_any_is_taken(https_url, certificate):
    refused = send(https_url)
    assert all("certificate verify failed" in outcome.error for outcome in refused.outcomes)
    taken = measure(https_url, 4, endpoint=Endpoint(https_url, "ok", insecure=True))
    assert taken.completed == 4


def test_a_certificate_for_another_name_is_refused(https_url, trusted):
    sent = send(https_url.replace("127.0.0.1", "127.0.0.2"))
    assert all(outcome.error.startswith("no connection: ") for outcome in sent.outcomes)


def test_http_and_https_mistaken_for_each_other_fail_in_words(https_url, sse_url, trusted):
    for url in (https_url.replace("https:", "http:"), sse_url.replace("http:", "https:")):
        sent = send(url, idle_timeout_s=5.0)
        assert all(outcome.error for outcome in sent.outcomes), url


# How many are opened ahead


LIMITED = """
import asyncio, sys, uvicorn
from sse_server import LAST, TOKEN, usage
async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
    for part in (TOKEN,) * 9 + (LAST, usage(5, 10), b"data: [DONE]\\n\\n"):
        await asyncio.sleep(0.03)
        await send({"type": "http.response.body", "body": part, "more_body": True})
    await send({"type": "http.response.body", "body": b""})
config = uvicorn.Config(app, port=int(sys.argv[1]), limit_concurrency=16, log_level="error", http=sys.argv[2])
uvicorn.Server(config).run()
"""


@pytest.fixture(params=["h11", "httptools"])
def limited_url(request):
    """uvicorn that answers 503 beyond 16 connections; 360 ms a request."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": os.path.dirname(__file__)}
    with subprocess.Popen([sys.executable, "-c", LIMITED, str(port), request.param], env=environment) as process:
        try:
            wait_for(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0, what="uvicorn")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def test_a_server_that_limits_connections_is_not_filled_by_idle_ones(limited_url):
    summary = measure(limited_url, 40, rate=10)
    assert (summary.completed, summary.failed) == (40, 0) and summary.peak_concurrent_requests < 12
    none_ahead = measure(limited_url, 40, rate=10, connections_ahead=0)
    assert none_ahead.completed == 40 and none_ahead.mean_ttft_ms == pytest.approx(summary.mean_ttft_ms, abs=50)
    burst = measure(limited_url, 40, max_concurrency=8)
    assert burst.completed == 40


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"rate": np.inf}, 30),
        ({"rate": 10}, 10),
        ({"rate": 10, "workers": 2}, 10),
        ({"rate": np.inf, "max_concurrency": 3}, 3),
        ({"rate": np.inf, "max_concurrency": 3, "connections_ahead": 20}, 3),
        ({"rate": np.inf, "connections_ahead": 7, "workers": 2}, 7),
        ({"rate": 10, "connections_ahead": 0}, 0),
        ({"rate": 10, "connections_ahead": 500}, 30),
    ],
)
def test_as_many_are_opened_ahead_as_the_first_second_needs(options, expected):
    """The server keeps the first request waiting, so that what is open by then was opened ahead (or for another request)."""
    before = []

    async def answer(writer, _request, _served):
        before.append(len(raw.opened) if not before else before[0])
        return await answering(SIZED + b"\r\n" + BODY)(writer, _request, _served)

    options = dict(options)
    due = np.arange(30) / options.pop("rate")
    trace = fixed_length(30, input_tokens=5, output_tokens=3)
    with Raw(answer) as raw:
        sent = send(raw.url, trace, due=due, **options)
        assert not any(outcome.error for outcome in sent.outcomes)
        assert before[0] == max(expected, 1)
        if options.get("max_concurrency"):
            assert len(raw.opened) == 3


def test_connections_ahead_below_zero_are_refused(sse_url):
    with pytest.raises(BadInput, match="connections_ahead -1 is below 0"):
        send(sse_url, connections_ahead=-1)


def test_the_wait_for_a_connection_that_was_not_opened_ahead_counts():
    """A full queue of the kernel's: the server accepts nobody for half a second."""
    with Raw(answering(SIZED + b"\r\n" + BODY)) as raw:
        raw.loop.call_soon_threadsafe(time.sleep, 0.5)
        slow = measure(raw.url, 4, tokens=3, connections_ahead=0)
    assert slow.completed == 4


# Addresses


@pytest.fixture
def two_addresses(monkeypatch):
    """Gives the host `two.test` both loopback addresses, in an order of choice, as /etc/hosts would. The connections are real."""
    real = socket.getaddrinfo

    def name(*hosts):
        def look_up(host, *rest, **options):
            return [e for one in (hosts if host == "two.test" else (host,)) for e in real(one, *rest, **options)]

        monkeypatch.setattr(socket, "getaddrinfo", look_up)

    return name


@pytest.mark.parametrize("order", [("127.0.0.1", "::1"), ("::1", "127.0.0.1")])
@pytest.mark.parametrize("listens", ["127.0.0.1", "::1"])
def test_the_addresses_of_a_host_are_tried_in_order_and_the_one_taken_is_told(two_addresses, capsys, order, listens):
    two_addresses(*order)
    with Raw(answering(SIZED + b"\r\n" + BODY), host=listens) as raw:
        summary = measure(f"http://two.test:{raw.port}", 4, tokens=3)
    assert summary.completed == 4 and summary.address == listens
    assert f"all to {listens}" in capsys.readouterr().err


def test_the_first_of_two_addresses_that_accept_is_taken(two_addresses):
    two_addresses("127.0.0.2", "127.0.0.1")
    with Raw(answering(SIZED + b"\r\n" + BODY), host="0.0.0.0") as raw:
        assert find_address(Endpoint(f"http://two.test:{raw.port}", "m")) == ("127.0.0.2", raw.port, 2)


def test_where_no_address_accepts_the_requests_fail_in_words(two_addresses):
    two_addresses("::1", "127.0.0.1")
    sent = send("http://two.test:9")
    assert [outcome.error for outcome in sent.outcomes] == ["no connection: Connection refused"] * 4


def test_one_address_is_not_asked_first_and_not_told(sse_url):
    with Raw(answering(SIZED + b"\r\n" + BODY)) as raw:
        summary = measure(raw.url, 1, tokens=3)
        assert summary.address is None and len(raw.opened) == 1


def test_localhost_is_reached():
    with Raw(answering(SIZED + b"\r\n" + BODY)) as raw:
        assert measure(f"http://localhost:{raw.port}", 2, tokens=3).completed == 2


def test_an_ipv6_literal():
    with Raw(answering(SIZED + b"\r\n" + BODY), host="::1") as raw:
        assert raw.url.startswith("http://[::1]:") and measure(raw.url, 2, tokens=3).completed == 2


@pytest.mark.parametrize("sign", ["%", "%25"])
def test_a_link_local_address_keeps_its_scope(sign):
    with open("/proc/net/if_inet6") as table:
        links = [line.split() for line in table if line.startswith("fe80")]
    if not links:
        pytest.skip("no network interface here has a link-local address")
    digits, name = links[0][0], links[0][-1]
    address = ":".join(digits[i : i + 4] for i in range(0, 32, 4))
    hosts = []

    async def answer(writer, request, served):
        hosts.append(request.partition(b"Host: ")[2].partition(b"\r")[0].decode())
        return await answering(SIZED + b"\r\n" + BODY)(writer, request, served)

    with Raw(answer, host=f"{address}%{name}") as raw:
        summary = measure(f"http://[{address}{sign}{name}]:{raw.port}", 2, tokens=3)
        # The scope is this machine's own name for the link: it leaves no trace in what is sent.
        assert summary.completed == 2 and set(hosts) == {f"[{address}]:{raw.port}"}


@pytest.mark.parametrize("host", ["no-such-host.invalid", "a" * 70 + ".test", "a..b"])
def test_an_unknown_host_is_one_error(host):
    with pytest.raises(BadInput, match="no host .*from base URL"):
        send(f"http://{host}:1")


# Open files


def test_the_soft_limit_on_open_files_is_raised(sse_url):
    """300 at once where this process may open 128 files: its workers may open as many as the hard limit says."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (128, hard))
        summary = measure(sse_url, 300)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (128, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (summary.completed, summary.failed) == (300, 0) and summary.peak_concurrent_requests > 250


def load_test(url, out, *options, limit: int, **environment):
    """`fp8lab load-test` in a shell whose hard limit on open files is `limit`."""
    command = [sys.executable, "-m", "fp8lab.cli", "load-test", "--base-url", url, "--model", "ok", "--out", str(out)]
    command += ["--trace", "random", "--input-tokens", "5", "--output-tokens", "10", *options]
    shell = ["bash", "-c", f'ulimit -n {limit} && exec "$@"', "bash", *command]
    return subprocess.run(shell, capture_output=True, text=True, check=False, env=os.environ | environment, timeout=120)


def test_a_hard_limit_that_is_too_low_is_told_before_the_start(sse_url, tmp_path):
    said = load_test(sse_url, tmp_path / "a", "--requests", "600", "--workers", "1", limit=256)
    assert said.returncode == 2 and said.stdout == "" and said.stderr.count("\n") == 1
    for word in ("600 connections at once", "256 open files", "`ulimit -n`", "--max-concurrency", "--workers"):
        assert word in said.stderr
    # Each remedy works.
    for number, remedy in enumerate((["--workers", "3"], ["--workers", "1", "--max-concurrency", "200"])):
        said = load_test(sse_url, tmp_path / str(number), "--requests", "600", *remedy, limit=256)
        assert said.returncode in (0, 3) and json.loads(said.stdout)["completed"] == 600, said.stderr


def test_a_low_limit_is_no_matter_where_few_are_at_once(sse_url, tmp_path):
    """300 requests/s of 40 ms: more arrive in a second than may be open, and far fewer are."""
    options = ["--requests", "600", "--rate", "300", "--workers", "1"]
    said = load_test(sse_url, tmp_path / "a", *options, limit=128)
    assert json.loads(said.stdout)["completed"] == 600, said.stderr
    said = load_test(sse_url, tmp_path / "b", *options, "--connections-ahead", "300", limit=128)
    assert said.returncode == 2 and "300 connections at once" in said.stderr


def test_running_out_of_files_in_a_level_names_the_remedy(tmp_path):
    """Arrivals at a finite rate pile up on a server that does not answer."""
    with streaming_server("--ttft-ms", "60000") as url:
        options = ["--requests", "400", "--rate", "400", "--workers", "1", "--drain-timeout", "1"]
        said = load_test(url, tmp_path / "a", *options, limit=128)
    failures = json.loads(said.stdout)["failures"]
    assert any("Too many open files; raise the limit on open files (`ulimit -n`)" in why for why in failures), failures


def test_what_is_due_at_one_time_is_at_once():
    assert opened_ahead([0.0] * 9, 0.0, None, None) == 9 and opened_ahead([0.0] * 9, 0.0, 4, None) == 4
    assert opened_ahead([2.0, 2.5, 2.99, 3.0], 2.0, None, None) == 3
    assert opened_ahead([1.5, 1.6], 0.0, None, None) == 0


# What servers do with HTTP


@pytest.mark.parametrize(
    ("parts", "close"),
    [
        ([OK.replace(b"1.1", b"1.0") + b"\r\n", TOKEN + TOKEN, LAST + usage(5, 3), b"data: [DONE]\n\n"], True),
        (
            [OK.replace(b"1.1", b"1.0") + b"connection: keep-alive\r\ncontent-length: %d\r\n\r\n" % len(BODY), BODY],
            False,
        ),
        ([OK + b"connection: close\r\n\r\n", TOKEN, TOKEN, LAST, usage(5, 3) + b"data: [DONE]\n\n"], True),
        ([OK + b"\r\n" + BODY], True),
        ([OK + b"transfer-encoding: identity\r\n\r\n" + BODY], True),
        ([SIZED + b"connection: close\r\n\r\n", BODY], True),
        ([SIZED + b"connection: close\r\n\r\n", BODY], False),
        ([HEAD.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"), http_chunk(BODY), b"0\r\n\r\n"], True),
        ([b"HTTP/1.1 100 Continue\r\n\r\n", SIZED + b"\r\n" + BODY], False),
        ([b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\nContent-Length: 7\r\n\r\n" + SIZED + b"\r\n" + BODY], False),
        ([b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n", OK + b"\r\n" + BODY], True),
        ([SIZED[:20], SIZED[20:] + b"\r\n" + BODY[:30], BODY[30:]], False),
        ([HEAD + http_chunk(BODY) + b"0\r\nserver-timing: x\r\n\r\n"], False),
        ([SIZED.replace(b"content-length", b"CoNtEnT-lEnGtH") + b"\r\n" + BODY], False),
    ],
)
def test_answers_of_every_framing_are_read(parts, close):
    trace = fixed_length(6, input_tokens=5, output_tokens=3)
    with Raw(answering(*parts, close=close)) as raw:
        sent = send(raw.url, trace, due=np.arange(6) * 0.15, workers=1, connections_ahead=1)
        errors, kept = [outcome.error for outcome in sent.outcomes], max(raw.served)
    assert errors == [None] * 6 and [len(outcome.chunks) for outcome in sent.outcomes] == [3] * 6
    assert kept == (1 if close or b"connection: close" in parts[0] else 6)


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ([SIZED + b"\r\n" + TOKEN], "connection closed by the server after 1 chunks"),
        ([HEAD + http_chunk(TOKEN)], "connection closed by the server after 1 chunks"),
        ([b"HTTP/1.0 500 Oops\r\n\r\nout of luck"], "HTTP 500: out of luck"),
        ([b"HTTP/1.1 100 Continue\r\n\r\n"], "connection closed by the server after no token"),
        (
            [OK + b"Transfer-Encoding: identity\r\nTransfer-Encoding: chunked\r\n\r\n" + http_chunk(TOKEN)],
            "connection closed by",
        ),
        (
            [OK + b"Content-Encoding: identity\r\nContent-Encoding: gzip\r\n\r\n" + BODY],
            "the answer is compressed (identity, gzip)",
        ),
        (
            [b"\r\n\r\nHTTP/1.1 302 Found\r\nLocation: http://login.test/in\r\n\r\n"],
            "HTTP 302: the server redirects to http://login.test/in",
        ),
        (
            [b"HTTP/1.1 100 Continue\r\n\r\n\r\n\r\nHTTP/1.1 302 Found\r\nLocation: http://login.test/in\r\n\r\n"],
            "HTTP 302: the server redirects",
        ),
        ([b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n"], "HTTP 101"),
        ([b"\x00\x00\x12\x04\x00\x00\x00\x00\x00"], "not HTTP"),
        ([b"HTTP/1.1 204 No Content\r\n\r\n"], "HTTP 204"),
        ([OK.replace(b"1.1", b"1.0") + b"\r\n"], "the response ended without a token"),
    ],
)
def test_answers_that_end_early_or_are_none_fail_in_words(parts, reason):
    with Raw(answering(*parts, close=True)) as raw:
        sent = send(raw.url, connections_ahead=0)
    assert all(outcome.error.startswith(reason) for outcome in sent.outcomes), sent.outcomes[0].error


def test_a_body_without_length_that_is_cut_by_a_reset_is_no_whole_one():
    async def answer(writer, _request, _served):
        writer.write(OK + b"\r\n" + TOKEN)
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.transport.abort()

    with Raw(answer) as raw:
        # A reset, not an end: linger of zero.
        sent = send(raw.url, connections_ahead=0)
    assert all(outcome.error and len(outcome.chunks) == 1 for outcome in sent.outcomes)


def test_a_server_that_takes_one_request_a_connection_and_says_nothing_of_it():
    """It closes when a connection has been idle for 50 ms, at times just as it is used again."""

    async def answer(writer, request, served):
        await answering(SIZED + b"\r\n" + BODY)(writer, request, served)
        asyncio.get_running_loop().call_later(0.05, writer.close)
        return True

    trace = fixed_length(60, input_tokens=5, output_tokens=3)
    with Raw(answer) as raw:
        sent = send(raw.url, trace, due=arrival_times(60, 30), workers=1)
    assert [outcome.error for outcome in sent.outcomes if outcome.error] == []


def test_a_request_on_a_connection_that_closes_as_it_is_used_is_sent_once_more_and_no_more():
    """The server answers the first request of a connection and hangs up on the second."""

    async def answer(writer, request, served):
        return served == 1 and await answering(SIZED + b"\r\n" + BODY)(writer, request, served)

    with Raw(answer) as raw:
        sent = send(raw.url, due=np.arange(4) * 0.2, workers=1, connections_ahead=1)
        assert not any(outcome.error for outcome in sent.outcomes)
        assert raw.served == [2, 2, 2, 1]

    async def hang_up(_writer, _request, _served):
        return False

    with Raw(hang_up) as raw:
        sent = send(raw.url, workers=1)
        assert all(outcome.error == "connection closed by the server after no token" for outcome in sent.outcomes)
        assert sum(raw.served) == 8


def test_a_request_that_a_server_began_to_answer_is_not_sent_again():
    async def interim(writer, _request, served):
        if served == 1:
            writer.write(SIZED + b"\r\n" + BODY)
            await writer.drain()
            return True
        writer.write(b"HTTP/1.1 102 Processing\r\n\r\n")
        await writer.drain()
        return False

    with Raw(interim) as raw:
        trace = fixed_length(2, input_tokens=5, output_tokens=3)
        sent = send(raw.url, trace, due=np.arange(2) * 0.2, workers=1, connections_ahead=1)
        assert [outcome.error for outcome in sent.outcomes] == [None, "connection closed by the server after no token"]
        assert len(raw.opened) == 1


@pytest.mark.parametrize(
    ("header", "gap_s", "connections"),
    [
        (b"Keep-Alive: timeout=1\r\n", 0.9, 3),
        (b"Keep-Alive: timeout=1, max=100\r\n", 0.3, 1),
        (b"keep-alive: max=5, timeout = 1\r\n", 0.9, 3),
        (b"Keep-Alive: max=9\r\nKeep-Alive: timeout=1\r\n", 0.9, 3),
        (b"Keep-Alive: timeout=0\r\n", 0.1, 3),
        (b"Keep-Alive: timeout=75\r\n", 0.9, 1),
        (b"Keep-Alive: nonsense\r\n", 0.3, 1),
    ],
)
def test_a_connection_is_not_used_beyond_the_time_that_its_server_gives_it(header, gap_s, connections):
    with Raw(answering(SIZED + header + b"\r\n" + BODY)) as raw:
        trace = fixed_length(3, input_tokens=5, output_tokens=3)
        sent = send(raw.url, trace, due=np.arange(3) * gap_s, workers=1, connections_ahead=1)
        assert not any(outcome.error for outcome in sent.outcomes)
        assert len(raw.opened) == connections


@pytest.mark.parametrize(
    ("status", "location", "told"),
    [
        (b"308 Permanent Redirect", b"https://api.test/v1/completions", "https://api.test/v1/completions"),
        (b"301 Moved", b"https://user:pw@api.test/v1?key=sk-secret#x", "https://api.test/v1"),
        (b"307 Temporary Redirect", b"/v1/completions/?token=sk-secret", "http://127.0.0.1:{port}/v1/completions/"),
        (b"302 Found", b"//login.test/in", "http://login.test/in"),
        (b"303 See Other", b"http://[half", "what is no URL"),
        (b"308 Permanent Redirect", b"https://api.test/\xff", "https://api.test/\ufffd"),
    ],
)
def test_a_redirect_tells_where_to_and_no_secret(status, location, told):
    head = b"HTTP/1.1 " + status + b"\r\nLocation: " + location + b"\r\nContent-Length: 5\r\n\r\nmoved"
    with Raw(answering(head)) as raw:
        sent = send(raw.url)
        reason = (
            f"HTTP {status[:3].decode()}: the server redirects to {told.format(port=raw.port)}; give that as --base-url"
        )
    assert [outcome.error for outcome in sent.outcomes] == [reason] * 4


def test_a_redirect_without_a_location_is_told_as_any_refusal():
    with Raw(answering(b"HTTP/1.1 304 Not Modified\r\n\r\n")) as raw:
        assert [outcome.error for outcome in send(raw.url).outcomes] == ["HTTP 304: "] * 4


# Proxies


PROXIES = ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")


@pytest.fixture(params=[None, "", "example.test"])
def proxied(request, monkeypatch):
    """The environment names a proxy that does not exist, for everything but what `no_proxy` says."""
    for name in PROXIES:
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        if request.param is not None:
            monkeypatch.setenv(name, request.param)


def test_this_client_asks_no_proxy(proxied, sse_url):
    assert measure(sse_url, 4).completed == 4


def test_what_a_model_says_is_asked_for_without_a_proxy(proxied):
    said = json.dumps({"tokens": [1, 2]}).encode()
    reply = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(said), said)
    with Raw(answering(reply)) as raw:
        assert tokenize(Endpoint(raw.url, "m"), "hi") == ([1, 2], [])


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_the_environment_of_the_cross_check_leads_past_the_proxy(proxied, monkeypatch, host):
    """As aiohttp, which vLLM's client uses, and httpx read it."""
    from urllib.request import getproxies, proxy_bypass

    assert getproxies()["http"] == "http://127.0.0.1:9" and not proxy_bypass(host.strip("[]"))
    for name, value in vllm_bench._unproxied(Endpoint(f"http://{host}:1", "m")).items():
        monkeypatch.setenv(name, value)
    assert proxy_bypass(host.strip("[]")) and not proxy_bypass("elsewhere.test")
    monkeypatch.setenv("no_proxy", "*")
    assert vllm_bench._unproxied(Endpoint(f"http://{host}:1", "m"))["no_proxy"] == "*"


def ask_vllms_client(url: str, model: str) -> dict:
    trace, tokenizer = fixed_length(8, input_tokens=5, output_tokens=10), str(model_folder("tiny-llama"))
    return vllm_bench.run(Endpoint(url, model), trace, 50.0, tokenizer=tokenizer)


@pytest.mark.servers
def test_vllms_own_client_is_direct(sse_url, monkeypatch):
    for name in PROXIES:
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    result = ask_vllms_client(sse_url, "ok")
    assert (result["completed"], result["failed"]) == (8, 0) and result["mean_ttft_ms"] > 10


@pytest.mark.nightly  # it asks twice, and each takes half a core-minute to import
@pytest.mark.servers
def test_vllms_own_client_counts_only_if_something_completed(sse_url):
    with pytest.raises(LevelFailed, match="vllm bench serve completed none of 8 requests: .*Oops"):
        ask_vllms_client(sse_url, "http-500")


# Closed loop, patience


def test_a_closed_loop_burst_is_valid_and_never_above_its_cap(slow_url):
    summary = measure(slow_url, 60, max_concurrency=4)
    assert summary.valid, summary.invalid_reason
    assert summary.peak_concurrent_requests == 4 and summary.completed == 60


def test_a_first_token_beyond_the_idle_limit_in_a_burst_names_the_option():
    with streaming_server("--ttft-ms", "3000") as url:
        summary = measure(url, 20, idle_timeout_s=1.0)
    assert not summary.valid
    assert (
        "no bytes for 1 s, the request was still queued; to wait longer: load-test --idle-timeout"
        in summary.invalid_reason
    )
