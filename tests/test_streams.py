"""What a stream says, against a slow reference that reads it by the table of `load.stream`; and the streams that real servers
send, through a local one and the whole load path."""

import json
from bisect import bisect_right
from itertools import pairwise

import httptools
import pytest
from hypothesis import event, example, given, settings
from hypothesis import strategies as st

import slow_stream
from conftest import NIGHTLY
from fp8lab.load.stream import Connection, Outcome

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
ASKED = 4


class Transport:
    """What a Connection writes goes nowhere."""

    closing = False

    def write(self, data):
        pass

    def is_closing(self):
        return self.closing

    def close(self):
        self.closing = True


def received(wire: bytes, packets, times, *, asked=ASKED, closed=False) -> Outcome:
    """What comes of an answer whose bytes `wire[a:b]` for each `a, b` of `packets` are received at each of `times`."""
    ended, clock = [], iter([0.0, *times])
    connection = Connection(lambda _connection, outcome, _retry: ended.append(outcome), "http://h", lambda: next(clock))
    connection.connection_made(Transport())
    connection.send(b"", Outcome(0, asked, sent=0.0))
    for begin, end in packets:
        connection.data_received(wire[begin:end])
    if closed:
        connection.connection_lost(None)
    (outcome,) = ended
    return outcome


def fast_and_slow(body: bytes, chunk_cuts, packet_cuts):
    """(what the Connection makes of a chunked `body`, what the slow reference does); the body is cut into HTTP chunks at
    `chunk_cuts`, and what goes over the wire into packets at `packet_cuts`."""
    wire, offsets = HEAD, []
    for begin, end in pairwise(sorted({0, len(body), *(cut for cut in chunk_cuts if 0 < cut < len(body))})):
        head = b"%x\r\n" % (end - begin)
        offsets += range(len(wire) + len(head), len(wire) + len(head) + end - begin)
        wire += head + body[begin:end] + b"\r\n"
    wire += b"0\r\n\r\n"
    bounds = sorted({0, len(wire), *(cut for cut in packet_cuts if 0 < cut < len(wire))})
    times = [float(number) for number in range(1, len(bounds))]
    arrived = [times[bisect_right(bounds, offset) - 1] for offset in offsets]
    return received(wire, pairwise(bounds), times), slow_stream.read(body, arrived, ASKED)


def assert_alike(body: bytes, chunk_cuts=(), packet_cuts=()):
    outcome, slow = fast_and_slow(body, chunk_cuts, packet_cuts)
    outcome.error = outcome.verdict(exact_tokens=True)
    if slow.verdict == slow_stream.NO_STREAM and outcome.error.startswith("the server "):
        outcome.error = slow_stream.NO_STREAM
    fast = slow_stream.Seen(
        list(outcome.chunks), outcome.first_answer, outcome.prompt_tokens, outcome.output_tokens, outcome.choices,
        outcome.finish_reason, outcome.done_seen, outcome.error,
    )  # fmt: skip
    assert fast == slow, body
    return fast


PLAIN = st.sampled_from([" time", "a", "fp8", "data: ", "é", "時", "🙂", "cmpl-1", " "])
TEXT = (
    PLAIN
    | st.text(st.characters(), max_size=4)
    | st.sampled_from(['"', "\\", "\n", "\ud83d", '"finish_reason":null', "x\u2028"])
)
REASONS = (
    "stop",
    "length",
    "tool_calls",
    "content_filter",
    "abort",
    "error",
    "cancelled",
    "network_error",
    "",
    5,
    {"a": 1},
)
COUNTS = st.sampled_from(
    [None, 0, 3, ASKED, ASKED, float(ASKED), 2.5, -1, True, "4", 10**30, float("nan"), float("inf"), [4]]
)
USAGE = st.dictionaries(
    st.sampled_from(["prompt_tokens", "completion_tokens", "total_tokens", "x"]), COUNTS
) | st.sampled_from([None, [], 3, {}])
ODD = st.sampled_from(
    [
        {"error": "no"}, {"error": {"message": "out of luck", "code": 500}}, {"error": None}, {"error": {"code": 3}},
        {"object": "error", "message": "gone"}, {"detail": [{"msg": "too long"}]}, {"message": "busy"}, {"message": ""},
        {"choices": None}, {"choices": {}}, {"choices": [None, 5]}, {"choices": []}, [], 5, None, "text", {}, {"type": "ping"},
        {"choices": [{"delta": None}]}, {"choices": [{"delta": {}, "text": "a"}]}, {"choices": [{"text": 5}]},
    ]
)  # fmt: skip
TOOLS = [{"index": 0, "function": {"name": "f", "arguments": "{"}}]


@st.composite
def documents(draw) -> list:
    """The JSON of a stream's events, in order: mostly one skeleton with changing texts, as servers send them."""
    chat = draw(st.booleans())
    common = draw(
        st.sampled_from([{}, {"id": "cmpl-1", "object": "chunk", "created": 1, "model": " time"}, {"usage": None}])
    )
    rest = draw(
        st.sampled_from([{}, {"logprobs": None, "finish_reason": None}, {"finish_reason": None, "x": {"text": "a"}}])
    )
    key = draw(st.sampled_from(["content", "reasoning_content", "reasoning", "refusal"])) if chat else "text"
    holds = draw(
        st.sampled_from([{}, {"role": None}, {"content": None}, {"reasoning_content": None, "tool_calls": None}])
    )

    def chunk(text, **changes):
        said = holds | {key: text} if chat else {"text": text}
        choice = {"index": 0} | ({"delta": said} if chat else said) | rest
        return common | {"choices": [choice | changes]}

    some = []
    if chat and draw(st.booleans()):
        some.append(
            common
            | {"choices": [{"index": 0, "delta": {"role": "assistant", "content": draw(st.sampled_from(["", None]))}}]}
        )
    for _ in range(draw(st.integers(0, 7))):
        what = draw(st.integers(0, 19))
        if what < 10:
            some.append(chunk(draw(PLAIN)))
        elif what < 13:
            some.append(chunk(draw(TEXT)))
        elif what == 13:
            key = draw(st.sampled_from(["content", "reasoning_content"])) if chat else "text"
        elif what == 14:
            some.append(chunk(draw(PLAIN), **draw(st.sampled_from([{"index": 1}, {"index": 0}, {"index": None}]))))
        elif what == 15:
            some.append(common | {"choices": [chunk(draw(TEXT), index=n)["choices"][0] for n in range(2)]})
        elif what == 16:
            some.append(chunk(draw(TEXT)) | {"usage": draw(USAGE)})
        elif what == 17 and chat:
            some.append(common | {"choices": [{"index": 0, "delta": {"tool_calls": TOOLS}, "finish_reason": None}]})
        elif what == 18:
            some.append(chunk(draw(PLAIN), finish_reason=draw(st.sampled_from(REASONS))))
        else:
            some.append(draw(ODD))
    if draw(st.booleans()):
        reason = {"finish_reason": draw(st.sampled_from(REASONS))}
        some.append(
            common | {"choices": [{"delta": {}} | reason]} if chat else chunk(draw(st.just("") | PLAIN), **reason)
        )
    if draw(st.booleans()):
        some.append(common | {"choices": [], "usage": draw(USAGE)})
    return some


@st.composite
def bodies(draw) -> tuple[bytes, list[int]]:
    """(a stream's body, where its events end)."""
    styles = [{"separators": (",", ":")}, {}, {"separators": (",", ":"), "ensure_ascii": False}, {"indent": 1}]
    style, line = draw(st.sampled_from(styles)), draw(st.sampled_from([b"\n", b"\n", b"\r\n", b"\r"]))
    field = draw(st.sampled_from([b"data: ", b"data: ", b"data:"]))
    texts = [json.dumps(one, **style).encode("utf-8", "surrogatepass") for one in draw(documents())]
    texts += [b"[DONE]"] * draw(st.sampled_from([0, 1, 1, 1, 2]))
    if draw(st.integers(0, 9)) == 0:
        texts.append(draw(st.sampled_from([b"{", b"ping", b'{"choices":[{"text":"late"}]}', b'{"error":"late"}', b""])))
    body, ends = draw(st.sampled_from([b"", b"", b"", b"\xef\xbb\xbf"])), []
    for text in texts:
        extra = draw(st.integers(0, 15))
        if extra < 4:
            more = [b": ping" + line, b": ping" + 2 * line, b"id: 7" + line, b"event: message" + line][extra]
            body += more
        elif extra == 4 and draw(st.booleans()):
            body += (
                draw(st.sampled_from([b"event: error", b"event: ping", b"event: ping" + line, b"retry: 3", b"odd"]))
                + line
            )
        body += b"".join(field + part + line for part in text.split(b"\n")) + line * draw(
            st.sampled_from([1, 1, 1, 1, 1, 1, 2, 0])
        )
        ends.append(len(body))
    body = body[: len(body) - draw(st.sampled_from([0, 0, 0, 1, 2, 3, 9]))]
    if body and draw(st.integers(0, 9)) == 0:
        at = draw(st.integers(0, len(body) - 1))
        body = body[:at] + bytes([draw(st.integers(0, 255))]) + body[at + 1 :]
    return body, ends


@st.composite
def cut_bodies(draw):
    body, ends = draw(bodies())
    if draw(st.booleans()):  # an HTTP chunk an event, a packet a chunk or a few
        return body, ends, [0] * draw(st.integers(0, 1))
    anywhere = st.lists(st.integers(1, 2 * len(body) + 300), max_size=12)
    return body, draw(anywhere), draw(anywhere | st.just(range(2 * len(body) + 300)))


@pytest.mark.timeout(3600)
@settings(max_examples=20_000 if NIGHTLY else 500, deadline=None)
@given(cut_bodies())
def test_the_fast_reader_and_the_slow_reference_agree(cut):
    assert_alike(*cut)
