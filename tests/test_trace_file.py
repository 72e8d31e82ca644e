"""Files of lengths as they are found: the public traces, and what spreadsheets and hands make of a CSV."""

import gzip
import json
import subprocess
import sys

import numpy as np
import pytest

import fp8lab as lab
from fp8lab.config.trace_file import FORMATS, json_entries
from fp8lab.errors import BadInput

OWN = "prompt_tokens,output_tokens,arrival_s\n"
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
BURST = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"


def read(tmp_path, text, name="mine.csv", **options):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return lab.from_file(tmp_path / name, **options)


def lengths(trace):
    return list(zip(trace.prompt_tokens, trace.output_tokens, strict=True))


def jsonl(*rows):
    return "\n".join(map(json.dumps, rows))


@pytest.mark.parametrize(
    "text",
    [
        OWN + "5,7,0\n6,8,0.5\n",
        OWN + "5.0, 7 ,0\n\n6.0 ,8.0, .5\n,,\n",
        "\ufeff" + OWN + "5,7,0\n6,8,0.5\n",
        ("\ufeff" + OWN + "5,7,0\n6,8,0.5\n").encode("utf-16-le"),
        (OWN + "5,7,0\n6,8,0.5\n").encode("utf-16"),
        (OWN + "5,7,0\n6,8,0.5\n").replace("\n", "\r").encode(),
        (OWN + "5,7,0\n6,8,0.5").replace("\n", "\r\n"),
        OWN.replace(",", ";") + "5,0;7;0\n6;8;0,5\n",
        OWN.replace(",", "\t") + "5\t7\t0\n6\t8\t0.5\n",
        " \n\n Prompt_Tokens , OUTPUT_TOKENS,Arrival_S,\n5,7,0,\n6,8,0.5,\n",
        OWN + '"5","7\n","0"\n6,8,0.5\n',
        gzip.compress((OWN + "5,7,0\n6,8,0.5\n").encode(), mtime=0),
        OWN + "5,7,1700000000\n6,8,1700000000.5\n",
        OWN + "5,7,1700000000000\n6,8,1700000000500\n",
        OWN + "5,7,2023-11-16 18:17:03.9799600\n6,8,2023-11-16 18:17:04.4799600\n",
        OWN + "5,7,2023-11-16T18:17:03Z\n6,8,2023-11-16T19:17:03.5+01:00\n",
        OWN + "6,8,10.5\n5,7,10\n",
        jsonl(*({"prompt_tokens": n, "output_tokens": n + 2, "arrival_s": (n - 5) / 2} for n in (5, 6))),
        AZURE + "2023-11-16 18:17:03.9799600,5,7\n2023-11-16 18:17:04.4799600,6,8\n",
        AZURE + "2024-05-10 00:00:00.009930+00:00,5,7\n2024-05-10 00:00:00.509930+00:00,6,8\n",
        AZURE + "2024-05-10 00:00:00+00:00,5,7\n2024-05-10 00:00:00.500000+00:00,6,8\n",
        BURST + "5,ChatGPT,5,7,12,Conversation log\n5,GPT-4,9,0,9,API log\n5.5,GPT-4,6,8,14,API log\n",
        jsonl(*({"timestamp": 500 * n, "input_length": 5 + n, "output_length": 7 + n, "hash_ids": [n]} for n in (0, 1))),
        json.dumps([{"Input_Length": 5 + n, "output_length": str(7 + n), "timestamp": 500 * n} for n in (0, 1)], indent=1),
    ],
)  # fmt: skip
def test_lengths_and_times_are_read_whoever_wrote_them(tmp_path, text):
    for name in ("mine.csv", "mine.json", "mine"):
        trace = read(tmp_path, text, name)
        assert lengths(trace) == [(5, 7), (6, 8)] and trace.arrival_s == pytest.approx((0, 0.5))
        assert [len(prompt.split()) for prompt in trace.prompts] == [5, 6]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (OWN + "5,7,0\n6,x,1\n", "mine.csv, line 3, column 'output_tokens': found 'x', expected a whole number of tokens"),
        (OWN + "5,7,0\n\n5.5,7,1\n", "line 4, column 'prompt_tokens': found '5.5', expected a whole number of tokens from 1"),
        (OWN + "5,7,0\n0,7,1\n", "line 3, column 'prompt_tokens': found '0'"),
        (OWN + "5,7,0\n-6,7,1\n", "line 3, column 'prompt_tokens': found '-6'"),
        (OWN + "nan,7,0\n", "line 2, column 'prompt_tokens': found 'nan'"),
        (OWN + "5,1e400,0\n", "line 2, column 'output_tokens': found '1e400'"),
        (OWN + "5,1048577,0\n", "line 2, column 'output_tokens': found '1048577', expected .* to 1,048,576"),
        (OWN + "5,7,nan\n", "line 2, column 'arrival_s': found 'nan', expected a number of seconds, or a date and time"),
        (OWN + "5,7,0\n5,7\n", "line 3: 2 values for 3 columns"),
        (OWN + "5,7,0\n5,7,\n", "line 3, column 'arrival_s': found nothing"),
        (BURST + '5,"GPT-4,9,0,9,API log\n6,m,9,9,18,l\n', "line 2: 2 values for 6 columns"),
        (OWN + "5,7,0\n5,,1\n", "line 3, column 'output_tokens': found nothing"),
        (OWN + "5,7,0\n1,500,7,1\n", "line 3: 4 values for 3 columns"),
        (OWN + "5,7,0\n5,7,1700000000\n", "from the first to the last 'arrival_s' are 19,675.9 days, expected at most 366"),
        ("prompt_tokens;output_tokens\n2.000;1.000\n", "line 2: '2.000' may hold separators of thousands; write it without"),
        ('prompt_tokens,output_tokens\n"2,000",1\n', "line 2: '2,000' may hold separators of thousands"),
        (OWN, "'mine.csv' is empty: it has a header and no rows"),
        ("prompt_tokens,output_tokens,output_tokens\n5,7,7\n", "the column 'output_tokens' is there 2 times"),
        ("prompt_tokens,output_tokens,id\n5,7,7\n", "unknown columns 'id'; known: arrival_s, output_tokens, prompt_tokens"),
        ("in,out\n5,7\n", "it has the columns 'in', 'out'; known: fp8lab's own .*; Azure .*; BurstGPT .*; Mooncake .*ShareGPT"),
        ("", "is empty; expected one of: fp8lab's own"),
        ("\ufeff \n", "is empty; expected one of"),
        (b"\xff\xfe", "is empty"),
        (b"PK\x03\x04\x00\x00", "is no text: expected a table or JSON, in UTF-8, plain or gzipped"),
        (OWN.encode("utf-16-le"), "is no text"),
        (gzip.compress((OWN + "5,7,0\n" * 9999).encode(), mtime=0)[:-20], "damaged gzip file: .*; fetch or pack it again"),
        (b"\x1f\x8bnothing", "damaged gzip file"),
        (BURST + "5,GPT-4,9,0,9,API log\n", "all its rows are without tokens"),
        (BURST + "5,GPT-4,9,-1,9,API log\n", "line 2, column 'response tokens': found '-1', expected .* from 0 to"),
        (AZURE + "2023-11-16 18:17:03,5,7\nyesterday,5,7\n", "line 3, column 'timestamp': found 'yesterday'"),
        (jsonl({"timestamp": 0, "input_length": 5, "output_length": 7}, 8), "line 2: found '8', expected an object"),
        (jsonl({"input_length": 5, "output_length": True}), "line 1, column 'output_length': found True"),
        ('{"input_length": 5, "output_length": 7}\n{"input_length": 5,', "line 2: not JSON, or cut off"),
        ('[{"input_length": 5, "output_length": 7},\n', "line 2: its list has no end: the file is cut off"),
        ('[{"input_length": 5, "output_length": 7}]\n[1]', "line 2: something follows the end of the list"),
        ('{"output_length": 7, "input_length": 1' + "0" * 5000 + "}", "line 1: JSON nested too deeply, or with numbers too long"),
        ("x" * 100_000, "line 1: no end within 65,536 characters"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_with_its_line_and_column(tmp_path, text, said):
    with pytest.raises(BadInput, match=said) as refused:
        read(tmp_path, text, tokenizer="none")
    assert len(str(refused.value)) < 700 and str(tmp_path) not in str(refused.value)


def test_a_spreadsheets_own_first_line_is_passed_over(tmp_path):
    assert lengths(read(tmp_path, "sep=;\nprompt_tokens;output_tokens\n5;7\n")) == [(5, 7)]


def test_a_folder_and_a_file_that_is_not_there_are_told(tmp_path):
    with pytest.raises(BadInput, match="is no file but a folder"):
        lab.from_file(tmp_path)
    for name in ("gone.csv", "x" * 300, "a\0b"):
        with pytest.raises(BadInput, match="no trace file '"):
            lab.from_file(tmp_path / name)


def test_what_was_left_out_or_changed_is_counted(tmp_path):
    trace = read(
        tmp_path, BURST + "5,m,9,0,9,l\n6,m,5,7,12,l\n5,m,,7,7,l\n4,m,5,8,13,l\n9,m,600,8,608,l\n", max_context=100
    )
    assert trace.arrival_s == (0, 2) and lengths(trace) == [(5, 8), (5, 7)]
    assert trace.notes == (
        "2 of 5 rows were skipped: they have no tokens in or out",
        "1 of 3 rows are earlier than the row before: they were sorted by time",
        "1 of 3 requests left out: more than the 100 tokens in and out together that the context takes",
    )
    assert all(note in repr(trace) for note in trace.notes)
    with pytest.raises(BadInput, match="'mine.csv' has 2 requests, 3 were asked for; 2 of 5 rows were skipped"):
        lab.from_file(tmp_path / "mine.csv", requests=3, max_context=100)
    with pytest.raises(BadInput, match="'mine.csv' is empty.*; 3 of 3 requests left out: more than the 2 tokens"):
        lab.from_file(tmp_path / "mine.csv", max_context=2)
    with pytest.raises(BadInput, match="a context of 1 tokens takes no request"):
        lab.from_file(tmp_path / "mine.csv", max_context=1)


def test_a_context_takes_what_fills_it(tmp_path):
    assert lengths(read(tmp_path, "prompt_tokens,output_tokens\n5,7\n5,8\n", max_context=12)) == [(5, 7)]


@pytest.mark.parametrize("last", ["", ",,\n"])
def test_both_ways_of_reading_a_table_read_the_same(tmp_path, last):
    """A table with a peculiarity (here blanks in its last row) is read row by row, another by a faster reader in blocks."""
    rows = [f"{1 + i % 7},{1 + i % 50},{i / 8}\n" for i in range(40_000)]
    trace = read(tmp_path, OWN + "".join(rows) + last)
    assert lengths(trace) == [(1 + i % 7, 1 + i % 50) for i in range(40_000)]
    assert trace.arrival_s == tuple(i / 8 for i in range(40_000))


def test_requests_are_drawn_by_the_seed_and_a_shorter_trace_is_a_prefix(tmp_path):
    text = "prompt_tokens,output_tokens\n" + "".join(f"{i},7\n" for i in range(1, 201))
    drawn = [read(tmp_path, text, requests=n, seed=seed) for n, seed in ((30, 0), (30, 0), (30, 1), (90, 0))]
    assert drawn[0] == drawn[1] == drawn[3].head(30) and drawn[0].prompt_tokens != drawn[2].prompt_tokens
    assert len(set(drawn[3].prompt_tokens)) == 90 and np.mean(drawn[3].prompt_tokens) == pytest.approx(100, rel=0.2)
    for whole in (None, 200):
        assert read(tmp_path, text, requests=whole, seed=5).prompt_tokens == tuple(range(1, 201))


def test_requests_that_keep_their_times_are_a_stretch(tmp_path):
    text = OWN + "".join(f"{i},7,{100 + i * i}\n" for i in range(1, 1001))
    begins = set()
    for seed in range(5):
        trace = read(tmp_path, text, requests=30, seed=seed)
        first = trace.prompt_tokens[0]
        assert trace.prompt_tokens == tuple(range(first, first + 30))
        assert trace.arrival_s == tuple(float(i * i - first * first) for i in trace.prompt_tokens)
        begins.add(first)
    assert len(begins) > 1
    without = read(tmp_path, text, requests=30, times="dropped")
    assert without.arrival_s is None and np.ptp(without.prompt_tokens) > 100


def test_times_that_are_not_asked_for_may_be_anything(tmp_path):
    text = AZURE + "16.11.2023 18:17,5,7\n,6,8\n"
    assert lengths(read(tmp_path, text, times="dropped")) == [(5, 7), (6, 8)]
    with pytest.raises(BadInput, match="line 2, column 'timestamp': found '16.11.2023 18:17'"):
        read(tmp_path, text)


def test_a_trace_of_too_many_tokens_is_refused_before_its_prompts_are_made(tmp_path):
    text = "prompt_tokens,output_tokens\n" + "1000000,5\n" * 200
    with pytest.raises(BadInput, match="200 requests of together 200,001,000 tokens.*ask for fewer"):
        read(tmp_path, text)


def test_json_entries_come_with_their_lines_wherever_a_read_ends(tmp_path, monkeypatch):
    monkeypatch.setattr("fp8lab.config.trace_file._CHUNK", 7)
    held = [{"a": "ü" * n, "b": [n, {"c": "]"}]} for n in range(12)]
    path = tmp_path / "mine"
    for text, lines in ((json.dumps(held), [1] * 12), (jsonl(*held), list(range(1, 13)))):
        path.write_text(text)
        assert list(json_entries(path)) == list(zip(lines, held, strict=True))
    path.write_text(json.dumps(held, indent=2))
    assert [entry for _, entry in json_entries(path)] == held
    assert [line for line, _ in json_entries(path)] == list(range(2, 2 + 12 * 9, 9))


def test_the_formats_do_not_look_like_each_other():
    for one in FORMATS:
        assert [other for other in FORMATS if other.of([one.prompt, one.output, one.time])] == [one]


MEASURED = """
import resource, sys
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
from fp8lab.config.trace import from_file
trace = from_file(sys.argv[1], requests=20, seed=3, tokenizer=sys.argv[2])
print(len(trace), trace.notes, "MiB", peak() - before)
"""


def measured(path, tokenizer=""):
    """What a process of its own says of 20 requests out of `path`, and the MiB that it came to take."""
    done = subprocess.run([sys.executable, "-c", MEASURED, path, tokenizer], capture_output=True, text=True, check=True)
    said, _, mib = done.stdout.partition("MiB")
    return said, float(mib)


@pytest.mark.timing
def test_twenty_requests_of_a_table_of_1_4_million_rows_take_little_memory(tmp_path):
    path = tmp_path / "burst.csv"
    rng, rows = np.random.default_rng(0), 1_400_000
    columns = np.cumsum(rng.integers(0, 9, rows)), rng.integers(1, 3000, rows), rng.integers(0, 1000, rows)
    with path.open("w") as file:
        file.write(BURST)
        file.writelines(
            f"{t},ChatGPT,{n},{m},{n + m},Conversation log\n"
            for t, n, m in zip(*map(np.ndarray.tolist, columns), strict=True)
        )
    said, mib = measured(path)
    empty = int((columns[2] == 0).sum())
    assert said.startswith("20 ") and f"{empty:,} of 1,400,000 rows were skipped" in said
    assert mib < 200


@pytest.mark.timing
def test_twenty_conversations_of_300_000_take_little_memory(tmp_path):
    from fp8lab.models.checkpoints import model_folder

    path = tmp_path / "sharegpt.json"
    said_by = [("human", 60), ("gpt", 100)] * 2
    entry = json.dumps({"conversations": [{"from": who, "value": "time and again " * words} for who, words in said_by]})
    with path.open("w") as file:
        file.write("[" + ",\n".join([entry]))
        for _ in range(299):
            file.write(f",\n{entry}" * 1000)
        file.write(f",\n{entry}" * 998 + ',\n{"conversations": null}]')
    said, mib = measured(path, str(model_folder("tiny-llama")))
    assert said.startswith("20 ") and "1 of 300,000 entries were skipped" in said
    assert mib < 400
