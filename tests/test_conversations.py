"""Files of conversations as they are found, and the tokenizers that count them."""

import gzip
import json
import logging

import pytest

import fp8lab as lab
from fp8lab.config.conversations import token_counter
from fp8lab.errors import BadInput
from fp8lab.models.checkpoints import model_folder

ASKED, ANSWER = "What is the time in the city of the king?", "It is late in the evening of the last day."


@pytest.fixture(scope="module")
def tokenizer():
    return str(model_folder("tiny-llama"))


def sharegpt(*said, people=("human", "gpt"), key="conversations"):
    return {"id": "x", key: [{"from": people[i % 2], "value": text} for i, text in enumerate(said)]}


def openai(*said):
    return {"messages": [{"role": role, "content": text} for role, text in said]}


PARTS = [{"type": "text", "text": ASKED}, {"type": "image_url", "image_url": {"url": "data:"}}]


@pytest.mark.parametrize(
    "entry",
    [
        sharegpt(ASKED, ANSWER),
        sharegpt(ASKED, ANSWER, key="conversation"),
        sharegpt(ASKED, ANSWER, key="Conversations"),
        sharegpt(ASKED, ANSWER, people=("user", "assistant")),
        {"conversations": [{"value": ASKED}, {"value": ANSWER}]},
        {"conversations": [{"from": "system", "value": "Be kind."}, *sharegpt(ASKED, ANSWER)["conversations"]]},
        {"conversations": [{"from": "gpt", "value": "... going on."}, *sharegpt(ASKED, ANSWER)["conversations"]]},
        sharegpt(ASKED, ANSWER, None, None),
        {"conversation": [{"role": "user", "content": ASKED}, {"role": "assistant", "content": ANSWER}]},
        openai(("user", ASKED), ("assistant", ANSWER)),
        openai(("developer", "Be kind."), ("user", ASKED), ("assistant", ANSWER), ("user", "And now?")),
        openai(("user", PARTS), ("assistant", [{"type": "text", "text": ANSWER}])),
    ],
)
def test_the_first_question_and_its_answer_are_read(tmp_path, tokenizer, entry):
    count = token_counter(tokenizer)
    held = (
        json.dumps([entry, entry]),
        f"{json.dumps(entry)}\n{json.dumps(entry)}\n",
        json.dumps([entry, entry], indent=2),
    )
    for i, text in enumerate(held):
        for packed in (text.encode(), gzip.compress(text.encode()), text.encode("utf-16")):
            (tmp_path / f"{i}.data").write_bytes(packed)
            trace = lab.from_file(tmp_path / f"{i}.data", tokenizer=tokenizer)
            assert trace.prompts == (ASKED,) * 2 and trace.notes == () and trace.arrival_s is None
            assert trace.prompt_tokens == (count(ASKED),) * 2
            assert trace.output_tokens == (count(ANSWER, special=False),) * 2


def test_what_has_no_question_with_an_answer_is_counted_with_its_keys(tmp_path, tokenizer):
    odd = [
        sharegpt(ASKED, None), sharegpt(None, ANSWER), sharegpt(ASKED), sharegpt(), {"conversations": None}, {"prompt": ASKED},
        sharegpt(ASKED, "More.", people=("human", "human")), None, 5, sharegpt(ASKED, 7), openai(("user", [{"type": "image"}])),
    ]  # fmt: skip
    outside = [sharegpt("?", ANSWER), sharegpt("time " * 3000, ANSWER), sharegpt(ASKED, "time " * 2100)]
    (tmp_path / "a.json").write_text(json.dumps([*odd, *outside, sharegpt(ASKED, ANSWER)]))
    trace = lab.from_file(tmp_path / "a.json", tokenizer=tokenizer)
    assert trace.prompts == (ASKED,)
    skipped, left = trace.notes
    assert skipped.startswith(
        "11 of 15 entries were skipped: they have no question with its answer (keys found in them: 'con"
    )
    assert "'prompt'" in skipped and "'messages'" in skipped and "(no object but int)" in skipped
    assert left.startswith("3 of the 4 conversations whose tokens were counted were left out: outside vLLM's limits")
    with pytest.raises(BadInput, match="'a.json' has 1 requests, 2 were asked for; 11 of 15 entries were skipped"):
        lab.from_file(tmp_path / "a.json", tokenizer=tokenizer, requests=2)
    assert len(lab.from_file(tmp_path / "a.json", tokenizer=tokenizer, requests=2, fewer=True)) == 1
    with pytest.raises(BadInput, match="is empty.*4 of the 4 conversations .* and 9 of the context"):
        lab.from_file(tmp_path / "a.json", tokenizer=tokenizer, max_context=9)
    (tmp_path / "a.json").write_text(json.dumps(odd))
    with pytest.raises(
        BadInput,
        match=r"a.json: no entry in it has a question with its answer .keys found: 'conversations'.*known: fp8lab's",
    ):
        lab.from_file(tmp_path / "a.json", tokenizer=tokenizer)


def test_conversations_are_drawn_by_the_seed_and_no_more_is_counted_than_is_drawn(tmp_path, tokenizer, monkeypatch):
    counted = []

    def counting(name):
        count = token_counter(name)

        def noted(text, special=True):
            counted.append(text)
            return count(text, special)

        return noted

    monkeypatch.setattr("fp8lab.config.conversations.token_counter", counting)
    # Three in four are outside the limits: more are drawn than were thought to do.
    entries = [sharegpt(f"{ASKED} {i}" if i % 4 == 0 else "?", ANSWER) for i in range(4000)]
    (tmp_path / "a.json").write_text(json.dumps(entries))
    drawn = [
        lab.from_file(tmp_path / "a.json", tokenizer=tokenizer, requests=n, seed=seed)
        for n, seed in ((100, 0), (100, 1), (20, 0))
    ]
    assert len(set(drawn[0].prompts)) == 100 and drawn[0].prompts != drawn[1].prompts
    assert drawn[0].prompts[:20] == drawn[2].prompts
    assert len(counted) < 3000


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[{"conversations": [{"from": "human"', "line 1: not JSON, or cut off"),
        ('[{"conversations": []},\n{"conversations": x}]', "line 2: not JSON, or cut off: Expecting value"),
        (b'[{"a": "\xe9"}]', "not text in UTF-8: .*; save it as UTF-8"),
        ("[]", "keys found: none"),
        ("[" * 100_000, "nested too deeply"),
        ('"a conversation"', "it has the columns 'a conversation'"),
    ],
)
def test_what_is_wrong_with_json_is_told_with_its_line(tmp_path, text, said):
    (tmp_path / "a.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(BadInput, match=said):
        lab.from_file(tmp_path / "a.json", tokenizer="no/matter")


def test_a_tokenizer_is_asked_for(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([sharegpt(ASKED, ANSWER)]))
    with pytest.raises(BadInput, match=r"a.json: conversations need a tokenizer .a model's folder or hub name."):
        lab.from_file(tmp_path / "a.json")
    (tmp_path / "b.json").write_text('{"a": 1}')  # which holds none to count the tokens of
    with pytest.raises(BadInput, match=r"b.json: no entry in it has a question .*keys found: 'a'"):
        lab.from_file(tmp_path / "b.json")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "no tokenizer at ''"),
        ("./gone", "no tokenizer at './gone': expected a model's folder, or a hub name ORG/NAME"),
        ("/a/b/c", "no tokenizer at '/a/b/c'"),
        pytest.param("{tmp}", "the tokenizer '.*' cannot be loaded: .* Name the folder", marks=pytest.mark.servers),
        ("{tmp}/broken", "the tokenizer '.*broken' cannot be loaded"),
        (
            "no-such-organisation/no-such-model",
            "'no-such-organisation/no-such-model' cannot be loaded: .*hf download ORG/NAME",
        ),
    ],
)
def test_a_tokenizer_that_cannot_be_loaded_is_one_error(tmp_path, name, said, monkeypatch, caplog):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{}")
    with pytest.raises(BadInput, match=said) as refused:
        token_counter(name.format(tmp=tmp_path))
    assert "\n" not in str(refused.value)
    assert refused.value.__suppress_context__ or refused.value.__context__ is None
    assert not [one for one in caplog.records if one.levelno >= logging.WARNING]


@pytest.mark.servers
@pytest.mark.parametrize("name", ["tiny-llama", "llama-3-8b"])
def test_tokens_are_counted_as_transformers_counts_them(name):
    from transformers import AutoTokenizer

    folder = str(model_folder(name))
    encode, count = AutoTokenizer.from_pretrained(folder).encode, token_counter(folder)
    for text in (ASKED, "", "naïve façade 😀\n\n\t x", "time " * 5000):
        assert count(text) == len(encode(text))
        assert count(text, special=False) == len(encode(text, add_special_tokens=False))
