"""What a stream says, against a slow reference that reads it by the table of `load.events`; and the streams that real servers
send, through a local one and the whole load path."""

import json
from bisect import bisect_right
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import slow_stream
from conftest import NIGHTLY, streaming_server
from fp8lab.config.trace import fixed_length
from fp8lab.load import events
from fp8lab.load.connection import Connection
from fp8lab.load.endpoint import Endpoint
from fp8lab.load.events import Outcome
from fp8lab.load.level import measure_level
from fp8lab.load.telemetry import Telemetry
from fp8lab.metrics.summary import MeasuredLevel, Summary
from fp8lab.results.files import write_json
from fp8lab.results.run_folder import LevelResult

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
    connection.send(b"", Outcome(0, asked, sent=0.0), stale=False)
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
    if slow.verdict == slow_stream.NO_STREAM and (outcome.error or "").startswith("the server "):
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
    name = draw(st.sampled_from(["cmpl-1", "cmpl-2", 'a"b', " time", ""]))
    named = {"id": name, "object": "chunk", "created": 1, "model": " time"}
    common = draw(st.sampled_from([{}, named, named, {"usage": None}]))
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


@pytest.mark.parametrize("indexed", [True, False])
def test_the_first_choice_of_a_later_stream_is_counted_too(monkeypatch, indexed):
    """What one stream proved of its chunks is taken for the next one's, whose choices are counted all the same."""
    monkeypatch.setattr(events.Reader, "_known", None)

    def of(index: int) -> dict:
        return {"id": "a", "choices": [({"index": index} if indexed or index else {}) | {"text": " time"}]}

    teaching = body_of(of(0), of(0), b"[DONE]")
    assert_alike(teaching, [at for at in range(len(teaching)) if teaching[:at].endswith(b"\n\n")])
    assert events.Reader._known
    two = body_of(of(0), of(1), b"[DONE]")
    ends = [at for at in range(len(two)) if two[:at].endswith(b"\n\n")]
    assert assert_alike(two, ends).choices == 1 + indexed


def body_of(*events, field=b"data: ", end=b"\n\n") -> bytes:
    return b"".join(field + (one if isinstance(one, bytes) else json.dumps(one).encode()) + end for one in events)


def said(text=" time", reason=None, **more) -> dict:
    return {"choices": [{"index": 0, "text": text, "finish_reason": reason} | more]}


def delta(reason=None, **fields) -> dict:
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": reason}]}


def counts(**counts) -> dict:
    return {"choices": [], "usage": {f"{name}_tokens": value for name, value in counts.items()}}


FOUR = [*[said()] * 3, said(reason="length")]
DONE = b"[DONE]"


@pytest.mark.parametrize(
    ("events", "chunks"),
    [
        ([delta(role="assistant"), *[delta(content="a")] * 4, delta("stop"), DONE], 4),
        ([delta(role="assistant", content=""), *[delta(content="a")] * 4, delta("stop", content=""), DONE], 4),
        ([*[delta(content="a", reasoning_content=None)] * 4, delta("stop"), DONE], 4),
        ([*[delta(role="assistant", content="a")] * 4, delta("stop"), DONE], 4),
        ([*[delta(refusal="a", content=None)] * 4, delta("stop"), DONE], 4),
        ([*[delta(tool_calls=TOOLS)] * 4, delta("tool_calls"), DONE], 4),
        ([*[delta(content=[{"type": "text", "text": "a"}])] * 4, delta("stop"), DONE], 4),
        ([delta(content=""), *[delta(content="a")] * 4, delta("stop"), counts(completion=4), DONE], 4),
        # A server that counts more than it writes: the text of a token may be half a character.
        ([delta(content="a"), delta(content=""), delta(content="a"), delta("stop"), counts(completion=4), DONE], 4),
        ([*[said("")] * 4, said("", "length"), counts(completion=4), DONE], 4),
        # Where chunks hold several tokens one without text is still a token, and a closing one without is none.
        ([said(""), said("a b"), said("", "length"), counts(completion=4), DONE], 2),
        ([said("a\nb"), said('"'), said("\\"), said("\ud83d", "length"), DONE], 4),
        ([{"choices": [], "prompt_filter_results": []}, *FOUR, DONE], 4),
        ([*FOUR, DONE, DONE], 4),
        ([*FOUR, DONE, said("late"), {"error": "late"}], 4),
        ([*FOUR[:3], said(reason="stop"), {"choices": []}], 4),
    ],
)  # fmt: skip
def test_what_counts_as_output(events, chunks):
    for field, end in [
        (b"data: ", b"\n\n"),
        (b"data:", b"\n\n"),
        (b"data: ", b"\r\n\r\n"),
        (b": ping\nid: 1\ndata: ", b"\n\n"),
    ]:
        body = body_of(*events, field=field, end=end)
        for cuts in [range(len(body)), (), [at + len(end) for at in range(len(body)) if body[at:].startswith(end)]]:
            seen = assert_alike(body, cuts, range(2 * len(body)) if cuts else ())
            assert (len(seen.chunks), seen.verdict) == (chunks, None)


@pytest.mark.parametrize(
    ("given", "prompt", "output"),
    [
        ({"prompt": 7, "completion": 4}, 7, 4),
        ({"prompt": 7, "completion": None}, 7, -1),
        ({"prompt": 7}, 7, -1),
        ({"prompt": 7.0, "completion": 4.0}, 7, 4),
        ({"prompt": 7, "total": 11}, 7, 4),
        ({"total": 11}, -1, -1),
        ({"prompt": "7", "completion": True}, -1, -1),
        ({"prompt": 7, "completion": 10**30}, 7, -1),
        ({"prompt": 7, "completion": float("nan")}, 7, -1),
        ({"prompt": 0, "completion": 0}, 0, -1),
        ({"prompt": -7, "completion": 3.5}, -1, -1),
    ],
)
def test_a_count_is_what_the_server_gave_and_could_be_one(given, prompt, output):
    seen = assert_alike(body_of(*FOUR, counts(**given), DONE))
    assert (seen.prompt_tokens, seen.output_tokens, seen.verdict) == (prompt, output, None)


@pytest.mark.parametrize(
    ("reason", "verdict"),
    [
        *((reason, None) for reason in ("stop", "length", "tool_calls", "content_filter", "eos_token", "repetition")),
        *((reason, f'the server gave up with finish reason "{reason}" after 4 chunks')
          for reason in ("error", "abort", "cancelled", "network_error", "insufficient_system_resource", "timeout")),
    ],
)  # fmt: skip
def test_a_finish_reason_tells_whether_the_server_finished(reason, verdict):
    assert assert_alike(body_of(*FOUR[:3], said(reason=reason), DONE)).verdict == verdict


@pytest.mark.parametrize(
    ("event", "words"),
    [
        (b'data: {"error": "out of luck"}', "out of luck"),
        (b'data: {"error": {"message": "out of luck", "code": 500}}', "out of luck"),
        (b'data: {"error": {"code": 500}}', '{"error": {"code": 500}}'),
        (b'data: {"object": "error", "message": "out of luck"}', "out of luck"),
        (b'data: {"detail": "out of luck"}', "out of luck"),
        (b'data: {"detail": [{"loc": ["body"], "msg": "out of luck"}]}', "body: out of luck"),
        (b'data: {"message": "out of luck"}', "out of luck"),
        (b'data: {"choices": [], "error": {"message": "out of luck"}}', "out of luck"),
        (b'event: error\ndata: {"message": "out of luck"}', "out of luck"),
        (b"event: error\ndata: out of luck", "out of luck"),
        # Without words it is shown as it came: a number beyond 64 bits too.
        (b'event: error\ndata: {"code": 1' + b"0" * 30 + b"}", '{"code": 1' + "0" * 30 + "}"),
        (b'data: {"error": 7}', '{"error": 7}'),
        (b"event: error", "without a word"),
    ],
)
def test_an_error_is_told_in_the_servers_words(event, words):
    body = body_of(said()) + event + b"\n\n" + body_of(*FOUR[1:], DONE)
    assert assert_alike(body).verdict == f"error in the stream: {words}"


@pytest.mark.parametrize(
    ("body", "verdict"),
    [
        (body_of(*FOUR, DONE)[:-1], None),
        (body_of(*FOUR, DONE)[:-2], None),
        (body_of(*FOUR), None),
        (body_of(*FOUR)[:-2], None),
        (body_of(*FOUR)[:-9], "the stream ended inside an event: "),
        (body_of(*FOUR[:3]), "the stream ended without a finish reason or [DONE] after 3 chunks"),
        (body_of(*FOUR[:3], DONE), None),
        (body_of(*[said()] * 4, counts(completion=4)), None),
        (body_of(*[said()] * 3, counts(completion=3)), "the stream ended without a finish reason or [DONE] after 3 chunks"),
        (body_of(DONE), "the response ended without a token"),
        (b"", "the response ended without a token"),
        (b": ping\n\n", "the response ended without a token"),
        (body_of(*FOUR, b"oops", DONE), "malformed chunk: 'oops'"),
        (body_of(*FOUR, [1], DONE), "malformed chunk: '[1]'"),
        (b"event: ping\ndata: now\n\n" + body_of(*FOUR, DONE), None),
        (body_of(*FOUR, DONE).replace(b"\n\n", b"\n"), None),
        (body_of(*FOUR, counts(completion=5), DONE), "5 output tokens instead of the 4 asked for"),
    ],
)  # fmt: skip
def test_what_ends_a_stream(body, verdict):
    for cuts in [(), range(len(body))]:
        found = assert_alike(body, cuts, range(2 * len(body)) if cuts else ()).verdict
        assert found == verdict or ((verdict or "-").endswith(": ") and found.startswith(verdict))


def test_the_end_of_the_connection_ends_a_body_without_a_length_and_cuts_one_with():
    bare, sized = HEAD.replace(b"transfer-encoding: chunked\r\n", b""), b"content-length: 9999\r\n\r\n"
    for head, closed, verdict in [
        (bare, body_of(*FOUR, DONE), None),
        (bare, body_of(*FOUR), None),
        (bare, body_of(*FOUR[:3]), "the stream ended without a finish reason or [DONE] after 3 chunks"),
        (bare[:-2] + sized, body_of(*FOUR), "connection closed by the server after 4 chunks"),
        (bare[:-2] + sized, body_of(*FOUR, DONE), None),
    ]:  # fmt: skip
        wire = head + closed
        outcome = received(wire, [(0, len(wire))], [1.0], closed=True)
        assert outcome.verdict(exact_tokens=True) == verdict


def test_a_plain_chunk_is_not_decoded_and_any_other_is(monkeypatch):
    """Most chunks of any stream pass undecoded: of a server whose field order, spaces, line ends or names are its own too."""

    decoded = []
    monkeypatch.setattr(events, "_json", lambda data, read=events._json: decoded.append(data) or read(data))
    for event in [
        said(),
        delta(content=" time"),
        delta(reasoning_content=" time"),
        {"object": "x", **said(), "created": 1},
    ]:
        for end in (b"\n\n", b"\r\n\r\n"):
            decoded.clear()
            text = json.dumps(event).encode()
            words = [b" time", "時".encode(), b"data", b"a\\n", b'\\"}', b"", b" x", b"y", b" z"]
            body = body_of(*(text.replace(b" time", word) for word in words), DONE, end=end)
            ends = [at + len(end) for at in range(len(body)) if body[at:].startswith(end)]
            outcome, slow = fast_and_slow(body, ends, [])
            assert list(outcome.chunks) == slow.chunks and len(slow.chunks) == 8
            assert sum(data in decoded for data in (text.replace(b" time", word) for word in words)) < 6
            assert text.replace(b" time", b" z") not in decoded


# All takes so much longer than is written here, so that a busy machine's lateness counts for less.
SLOWER = 4


@pytest.fixture(scope="module")
def streams_url():
    with streaming_server("--ttft-ms", str(30 * SLOWER), "--itl-ms", str(10 * SLOWER)) as url:
        yield url


def measured(url: str, shape: str, *, chat=False, requests=6, **options) -> LevelResult:
    """`requests` of 16 tokens, 10 ms apart: the first token is there after 30 ms, then one every 10 ms. Once more where this
    machine was too busy to send them in time."""
    trace, due = fixed_length(requests, input_tokens=5, output_tokens=16), [n / 100 for n in range(requests)]
    for _ in range(4):
        result = measure_level(Endpoint(url, shape, chat=chat), trace, due, name=shape, time_dilation=SLOWER, **options)
        if "fell behind its schedule" not in (result.summary.invalid_reason or ""):
            break
    return result


# TTFT, time to the first answer token and TPOT in ms, and output tokens.
TRUE = (30, None, 10, 16)


@pytest.mark.parametrize(
    ("shape", "truth", "told"),
    [
        ("chat", TRUE, ""),
        ("reasoning", (30, 150, 10, 16), ""),
        ("reasoning-short", (30, 150, 10, 16), ""),
        ("reasoning-apart", (30, 150, 10, 16), ""),
        ("usage-a-chunk", TRUE, "all streams gave no count of tokens (usage): chunks were counted as tokens"),
        ("one-choice-numbered-1", TRUE, ""),
        ("only-reasoning", TRUE, "all streams held reasoning alone, no answer"),
        ("four-a-chunk", (60, None, 8, 16), ""),  # 40 ms apart, over 16 - 1 tokens, as `vllm bench serve` has it
        ("four-a-chunk-no-usage", (60, None, 40, 4), "all streams gave no count of tokens (usage): chunks were counted as tokens"),
        ("ends-without-done", TRUE, "all streams ended without [DONE]"),
        ("transformers-serve", TRUE, "all streams ended without [DONE]"),
        ("done-unfinished", TRUE, ""),
        ("no-finish-reason", TRUE, ""),
        ("null-usage", TRUE, "all streams gave no count of tokens (usage): chunks were counted as tokens"),
        ("null-delta", TRUE, ""),
        ("close-delimited", TRUE, ""),
        ("continuous-usage", TRUE, ""),
        ("comments", TRUE, ""),
        ("two-choices", (30, None, 4.8, 32), "all streams held several choices: TPOT and ITL are those of all together"),
    ],
)  # fmt: skip
def test_a_stream_is_measured_as_it_is(streams_url, capsys, shape, truth, told):
    ttft, first_answer, tpot, tokens = truth
    chat = "reason" in shape or shape in ("chat", "null-delta", "transformers-serve")
    result = measured(streams_url, shape, chat=chat, exact_tokens=shape != "usage-a-chunk")
    s, line = result.summary, capsys.readouterr().err
    assert s.valid and s.completed == 6, s.invalid_reason
    assert s.output_tokens == 6 * tokens and (result.records["output_tokens"] == tokens).all()
    assert ttft - 2 < s.p50_ttft_ms < ttft + 15
    assert s.p50_tpot_ms == pytest.approx(tpot, rel=0.15)
    if first_answer is None:
        assert s.mean_ttfo_ms is None and "first answer" not in line
    else:
        assert (
            first_answer - 2 < s.p50_ttfo_ms < first_answer + 25
            and f"first answer token {s.mean_ttfo_ms:.0f} ms" in line
        )
    # Where all fit into a second, the fullest second holds them all.
    assert s.peak_output_tokens_per_s <= s.output_tokens and s.peak_output_tokens_per_s > 0.7 * s.output_tokens
    assert s.notes == ([told] if told else []) and line.rstrip().endswith(f"VALID{'; ' if told else ''}{told}")


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ("abort", 'the server gave up with finish reason "abort" after 8 chunks'),
        ("own-error", "error in the stream: out of KV cache"),
        ("half-a-character", "error in the stream: bad ? here"),
        (
            "ended-by-itself",
            "4 chunks without a count instead of the 16 tokens asked for, ended by the model itself",
        ),
        (
            "redirect",
            "HTTP 308: the server redirects to https://elsewhere.example/v1/completions; give that as --base-url",
        ),
        ("json", 'the server sent the whole completion as one JSON document, not as a stream (\'{\\n "id": "cmpl-1"'),
        ("json-error", "the server answered with an error instead of a stream: the model sleeps"),
        (
            "page",
            "the server answered with a web page: Welcome; is this the API's address?",
        ),
        ("empty", "the response ended without a token"),
        (
            "gzip",
            "the answer is compressed (gzip), though that was not asked for, and compressed streams are not timed; switch",
        ),
    ],
)
def test_a_stream_that_does_not_complete_fails_with_its_reason(streams_url, shape, reason):
    summary = measured(streams_url, shape).summary
    assert (summary.failed, summary.valid) == (6, False)
    ((told, count),) = summary.failures.items()
    assert told.startswith(reason) and count == 6 and len(told) < 400 and "secret" not in told


@pytest.mark.parametrize("shape", ["buffered", "buffered-chunk"])
def test_streams_that_come_in_one_piece_are_no_measurement(streams_url, shape, capsys):
    summary = measured(streams_url, shape).summary
    assert summary.completed == 6 and not summary.valid
    said = "6 of 6 answers of several tokens came in one piece: they are collected on the way"
    assert said in summary.invalid_reason
    assert "X-Accel-Buffering: no" in summary.invalid_reason and "INVALID" in capsys.readouterr().err


def test_streams_that_come_in_several_pieces_are_no_measurement(streams_url):
    summary = measured(streams_url, "in-pieces").summary
    assert summary.completed == 6 and not summary.valid
    assert (
        "of the chunks came at the instant of the one before: they are collected on the way" in summary.invalid_reason
    )


def test_a_late_client_is_named_before_a_proxy_and_alone_at_a_server_of_the_kits(streams_url, monkeypatch):
    monkeypatch.setattr("fp8lab.load.level.self_check", lambda *_: ["this client was late"])
    foreign, own = (measured(streams_url, "buffered", telemetry=one).summary for one in (None, Telemetry([])))
    assert "this client was late; 6 of 6 answers of several" in foreign.invalid_reason
    assert "this client was late" in own.invalid_reason and "collected" not in own.invalid_reason


def test_a_stream_that_has_ended_is_complete_though_its_body_goes_on(streams_url):
    summary = measured(streams_url, "never-ends", requests=2, idle_timeout_s=0.4).summary
    assert (summary.completed, summary.valid) == (2, True) and summary.p50_tpot_ms == pytest.approx(10, rel=0.15)


def test_a_level_shows_what_is_to_be_known_of_its_streams_and_is_read_back(streams_url, tmp_path):
    reasoned = measured(streams_url, "reasoning", chat=True)
    uncounted = measured(streams_url, "four-a-chunk-no-usage")
    level = MeasuredLevel(variant="bf16", rate=20.0, requests=6)
    shown = [repr(replace(one, summary=replace(one.summary, level=level))) for one in (reasoned, uncounted)]
    assert "first answer token mean / p99" in shown[0] and "first answer" not in shown[1]
    assert "chunks were counted as tokens" in shown[1] and "note" not in shown[0]
    write_json(tmp_path / "s.json", uncounted.summary)
    assert Summary.read(json.loads((tmp_path / "s.json").read_text())).notes == uncounted.summary.notes
    with pytest.raises(ValueError, match="notes is 5, no list of sentences"):
        Summary.read({**json.loads((tmp_path / "s.json").read_text()), "notes": 5})


def test_what_one_stream_proved_spares_the_next_its_first_chunk(monkeypatch):
    """Their ids differ, and a reasoning chunk stays one."""

    decoded = []
    monkeypatch.setattr(events, "_json", lambda data, read=events._json: decoded.append(data) or read(data))
    monkeypatch.setattr(events.Reader, "_known", None)
    for name in ("content", "reasoning_content"):
        for number in range(3):
            decoded.clear()
            chunks = [{"id": f"cmpl-{number}", **delta(**{name: word})} for word in (" time", "a", "b")]
            body = body_of(*chunks, DONE)
            ends = [at + 2 for at in range(len(body)) if body[at:].startswith(b"\n\n")]
            outcome, slow = fast_and_slow(body, ends, [])
            assert list(outcome.chunks) == slow.chunks and outcome.first_answer == slow.first_answer
            assert bool(outcome.first_answer) == (name == "content")
            assert (json.dumps(chunks[0]).encode() in decoded) == (number == 0) and json.dumps(
                chunks[2]
            ).encode() not in decoded
