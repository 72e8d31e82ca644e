"""A streaming completions server whose chunk times are known, and which commits faults on request.

    python tests/sse_server.py --ttft-ms 20 --itl-ms 10 [--truth FILE] [--certificate FILE]

It prints its port. The model's name chooses what happens: "ok", a shape of `stream_shapes`, or one of the faults below. With --truth it
writes, for every request, when its headers and body were complete and when its first chunk was written
(CLOCK_MONOTONIC), as JSON lines, when it ends. With --certificate (certificate and key) it speaks TLS.
"""

import argparse
import asyncio
import json
import os
import signal
import ssl
from time import monotonic

import httptools
import uvloop

from stream_shapes import SHAPES

FAULTS = (
    "http-500",
    "refused-auth",
    "error-event",
    "cut",
    "silent",
    "malformed",
    "wrong-count",
    "unended",
    "huge",
    "die",
    "nan",
    "huge-count",
    "odd-finish",
    "html",
    "endless",
    "escapes",
    "echo-key",
)
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
TOKEN = (
    b'data: {"id":"cmpl-1","object":"text_completion","created":1,"model":"ok","choices":[{"index":0,"text":" time",'
    b'"logprobs":null,"finish_reason":null,"stop_reason":null,"prompt_token_ids":null,"token_ids":null}]}\n\n'
)
LAST = TOKEN.replace(b'"finish_reason":null', b'"finish_reason":"length"')
ODD = TOKEN.replace(b'"finish_reason":null', b'"finish_reason":{"<b>":[1,2]}')
PAGE = b"<html><script>alert(1)</script>\x1b[31m\x00" * 20


def http_chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def usage(prompt: int, completion: int) -> bytes:
    counts = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return f'data: {{"id":"cmpl-1","choices":[],"usage":{json.dumps(counts)}}}\n\n'.encode()


TOKEN_CHUNK, LAST_CHUNK, ODD_CHUNK = http_chunk(TOKEN), http_chunk(LAST), http_chunk(ODD)
COUNTS = {"wrong-count": -1, "nan": float("nan"), "huge-count": 10**30}
DONE_CHUNK, END = http_chunk(b"data: [DONE]\n\n"), b"0\r\n\r\n"


class Session(asyncio.Protocol):
    """One connection. Chunk times are absolute, so that lateness does not add up."""

    prompt_tokens = 10

    def __init__(self, options, truth):
        self.options, self.truth = options, truth

    def connection_made(self, transport):
        self.transport = transport
        self.parser = httptools.HttpRequestParser(self)
        self.body = []
        self.authorization = b""

    def on_header(self, name, value):
        if name.lower() == b"authorization":
            self.authorization = value

    def data_received(self, data):
        self.parser.feed_data(data)

    def on_body(self, body):
        self.body.append(body)

    def on_message_complete(self):
        body, self.body = json.loads(b"".join(self.body) or b"{}"), []
        if self.parser.get_method() == b"GET" or "max_tokens" not in body:  # some clients look around first
            names = json.dumps({"object": "list", "data": [{"id": "ok", "object": "model"}]}).encode()
            self.transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(names), names))
            return
        self.received = monotonic()
        self.tokens, self.sent = body["max_tokens"], 0
        self.fault = body["model"]
        self.streaming = body.get("stream", False)
        self.due = self.received + self.options.ttft_ms / 1e3
        if self.fault in SHAPES:
            self.shape, self.steps = SHAPES[self.fault], list(reversed(SHAPES[self.fault].steps(self.tokens)))
            length = b"transfer-encoding: chunked\r\n" if self.shape.chunked else b""
            self.transport.write(self.shape.head + length + b"\r\n")
            self.play()
            return
        asyncio.get_running_loop().call_at(self.due, self.step)

    def play(self):
        """Sends what is due of a shape's steps, and ends the body with the last."""
        while self.steps and not self.transport.is_closing():
            when, what = self.steps[-1]
            at = self.due + when * self.options.itl_ms / 1e3
            if when >= 0 and at > monotonic():
                asyncio.get_running_loop().call_at(at, self.play)
                return
            self.steps.pop()
            self.transport.write(http_chunk(what) if self.shape.chunked else what)
        if not self.shape.chunked:
            self.transport.close()
        elif self.shape.ends:
            self.transport.write(END)

    def step(self):
        if self.transport.is_closing():
            return
        if self.sent == 0 and not self.begin():
            return
        self.sent += 1
        last = self.sent == self.tokens
        if self.sent == 2 and not self.commit_fault():
            return
        if not last:
            self.transport.write(TOKEN_CHUNK)
            self.due += self.options.itl_ms / 1e3
            asyncio.get_running_loop().call_at(self.due, self.step)
            return
        count = self.tokens + COUNTS.get(self.fault, 0)
        ending = ODD_CHUNK if self.fault == "odd-finish" else LAST_CHUNK
        ends = b"" if self.fault == "unended" else ending + http_chunk(usage(self.prompt_tokens, count)) + DONE_CHUNK
        self.transport.write(ends + END)

    def begin(self) -> bool:
        if self.fault in ("http-500", "refused-auth"):
            status, text = (
                (b"500 Oops", b'{"error":"out of <luck>"}') if self.fault == "http-500" else (b"401 No", b"bad key")
            )
            self.transport.write(b"HTTP/1.1 %s\r\ncontent-length: %d\r\n\r\n%s" % (status, len(text), text))
            return False
        if self.fault in ("html", "echo-key"):
            text = PAGE if self.fault == "html" else b"Incorrect key: " + self.authorization
            status = b"200 OK" if self.fault == "html" else b"401 No"
            self.transport.write(b"HTTP/1.1 %s\r\ncontent-length: %d\r\n\r\n%s" % (status, len(text), text))
            return False
        if not self.streaming:
            text = json.dumps({"choices": [{"text": " time"}], "usage": {"completion_tokens": self.tokens}}).encode()
            self.transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(text), text))
            return False
        self.transport.write(HEAD)
        if self.truth is not None:
            self.truth.append((self.received, monotonic()))
        return True

    def commit_fault(self) -> bool:
        """Commits the fault at the second chunk; whether the stream goes on."""
        if self.fault == "error-event":
            self.transport.write(
                http_chunk(b'data: {"error":{"message":"engine died","code":500}}\n\n') + DONE_CHUNK + END
            )
        elif self.fault == "escapes":
            self.transport.write(
                http_chunk(b'data: {"error":{"message":"<b>\\u001b[31mred\\u0000"}}\n\n') + DONE_CHUNK + END
            )
        elif self.fault == "endless":
            self.flood()
        elif self.fault == "cut":
            self.transport.abort()
        elif self.fault == "malformed":
            self.transport.write(http_chunk(b'data: {"choices":[{"text":\n\n') + DONE_CHUNK + END)
        elif self.fault == "huge":
            self.transport.write(http_chunk(b"data: " + b"x" * (3 << 20)))
        elif self.fault == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.fault != "silent":
            return True
        return False

    def flood(self):
        """Chunks until the client has had enough."""
        if not self.transport.is_closing():
            self.transport.write(TOKEN_CHUNK * 500)
            asyncio.get_running_loop().call_later(0.01, self.flood)


async def serve(options) -> None:
    loop = asyncio.get_running_loop()
    truth = [] if options.truth else None
    tls = None
    if options.certificate:
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls.load_cert_chain(options.certificate)
    server = await loop.create_server(lambda: Session(options, truth), "127.0.0.1", 0, backlog=4096, ssl=tls)
    print(server.sockets[0].getsockname()[1], flush=True)
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    await stop.wait()
    if options.truth:
        with open(options.truth, "w") as file:
            file.writelines(json.dumps({"received": r, "first": f}) + "\n" for r, f in truth)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ttft-ms", type=float, default=20)
    parser.add_argument("--itl-ms", type=float, default=10)
    parser.add_argument("--truth", help="file for the server's own times")
    parser.add_argument("--certificate", help="PEM file for TLS")
    uvloop.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
