"""Text that means harm, and secrets: what a server, a file or a name says is shown as text, takes bounded memory and
ends in one clear error; what is secret is nowhere to be found in a run."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest

import fp8lab as lab
from conftest import streaming_server
from fp8lab.config.profile_file import read_profile
from fp8lab.config.this_machine import load_profile
from fp8lab.config.trace import from_file
from fp8lab.errors import BadInput, Fp8labError
from fp8lab.load.endpoint import Endpoint
from fp8lab.load.level import measure_level
from fp8lab.load.telemetry import parse_metrics
from fp8lab.models.checkpoints import model_folder
from fp8lab.report import notebooks
from fp8lab.results.files import write_json, write_tables
from fp8lab.results.run_folder import open_run
from fp8lab.ui import Table, visible

NASTY = "<script>alert(1)</script>\x1b]0;owned\x07\x1b[31m\u202egnp.exe\x00$\\frac{"


def test_control_characters_are_written_out():
    assert visible("a\tb\nc d\u00a0é") == "a\tb\nc d\u00a0é"
    assert visible("\x1b[31m\u202e\x00") == "\\x1b[31m\\u202e\\x00"
    assert len(visible("x" * 10**6)) < 9000
    assert "\x1b" not in str(Fp8labError(NASTY)) and "\\x1b[31m" in str(BadInput(NASTY))


def test_a_table_shows_text_as_text():
    table = Table(NASTY, ("a", "b"), [(NASTY, "1")])
    for shown in (repr(table), table._repr_html_(), table.to_markdown()):
        assert "\x1b" not in shown and "\u202e" not in shown
    assert "<script>" not in table._repr_html_()


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("html", "the server answered with a web page: '<html>"),
        ("endless", "more than 10020 chunks; the stream does not end"),
        ("huge", "an event of more than 1 MiB"),
        ("escapes", "error in the stream: <b>\x1b[31mred"),
    ],
)
def test_a_hostile_reply_is_a_failed_record_that_can_be_stored_and_shown(sse_url, tmp_path, capsys, fault, reason):
    trace = lab.fixed_length(4, input_tokens=5, output_tokens=10)
    result = measure_level(Endpoint(sse_url, fault), trace, [0.0] * 4, name=fault)
    assert result.records["error"].str.startswith(reason).all(), result.records["error"].tolist()
    assert not result.summary.valid and "\x1b" not in capsys.readouterr().err
    write_tables(tmp_path, records=result.records, tokens=result.tokens)
    write_json(tmp_path / "summary.json", result.summary)


@pytest.mark.parametrize("fault", ["nan", "huge-count"])
def test_a_count_that_is_none_is_told_and_costs_nothing(sse_url, fault):
    trace = lab.fixed_length(4, input_tokens=5, output_tokens=10)
    summary = measure_level(Endpoint(sse_url, fault), trace, [0.0] * 4, name=fault).summary
    assert (summary.completed, summary.output_tokens) == (4, 40) and "no count of tokens" in summary.notes[0]


def test_an_odd_finish_reason_is_kept_as_text(sse_url, tmp_path):
    trace = lab.fixed_length(4, input_tokens=5, output_tokens=10)
    result = measure_level(Endpoint(sse_url, "odd-finish"), trace, [0.0] * 4, name="odd")
    assert result.summary.completed == 4 and result.records["finish_reason"].str.contains("<b>").all()
    write_tables(tmp_path, records=result.records)


def test_a_key_that_the_server_quotes_is_not_kept(sse_url):
    endpoint = Endpoint(sse_url, "echo-key", "sk-very-secret-value")
    result = measure_level(endpoint, lab.fixed_length(3), [0.0] * 3, name="refused")
    assert (result.records["error"] == "HTTP 401: Incorrect key: Bearer [key]").all()
    assert "sk-very-secret-value" not in repr(result.summary)


def test_metrics_that_are_no_numbers_are_left_out():
    assert parse_metrics("vllm:num_requests_running{} 1\nvllm:num_requests_running{} oops\nvllm:x\n") == {
        "running": 1.0
    }


@pytest.mark.parametrize("fault", ["endless", "huge"])
def test_the_workers_memory_is_bounded(fault):
    """A server that streams without end, or sends one endless event. Measured in a process of its own: the largest
    child that a process ever had includes those of other tests."""
    measured = (
        "import resource, sys; import fp8lab as lab; from fp8lab.load.level import measure_level; "
        "from fp8lab.load.endpoint import Endpoint; trace = lab.fixed_length(8, input_tokens=5, output_tokens=10); "
        "measure_level(Endpoint(*sys.argv[1:]), trace, [0.0] * 8, name=sys.argv[2]); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    with streaming_server("--itl-ms", "1") as url:
        done = subprocess.run([sys.executable, "-c", measured, url, fault], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 200 << 10  # KiB


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "prompt_tokens,output_tokens\nnan,5\n"),
        ("a.csv", "prompt_tokens,output_tokens\n" + "9" * 30 + ",5\n"),
        ("a.csv", "prompt_tokens,output_tokens\n2000000,5\n"),
        ("a.csv", "prompt_tokens,output_tokens\n" + "1000000,5\n" * 200),
        ("a.csv", "prompt_tokens,output_tokens\n" + "1" * 200_000 + ",5\n"),
        ("a.csv", "prompt_tokens,output_tokens,arrival_s\n5,5,nan\n"),
        ("a.csv", NASTY),
        ("a.json", "[" * 100_000),
        ("a.json", '[{"conversations": [{"value": NaN}, {"value": 1}]}]'),
        ("\x1b[31m<b>.csv", "x\n1\n"),
    ],
)
def test_a_hostile_trace_file_is_one_clear_error(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(BadInput) as refused:
        from_file(tmp_path / name, tokenizer=str(model_folder("tiny-llama")))
    assert len(str(refused.value)) < 1000 and "\x1b" not in str(refused.value)


def test_a_gigabyte_in_one_line_is_refused_unread(tmp_path):
    with (tmp_path / "big.csv").open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(BadInput, match=r"'big.csv' is no text"):
        from_file(tmp_path / "big.csv")
    for begin, said in ((b"", "line 1: no end within"), (b'[{"a": "', "line 1: not JSON, or cut off")):
        with (tmp_path / "big.csv").open("r+b") as file:
            file.write(begin + b"x" * (64 << 20))
        with pytest.raises(BadInput, match=said):
            from_file(tmp_path / "big.csv")


@pytest.mark.parametrize("variant", ["../../etc", "a/b", "<b>", "", "x" * 65, "\x1b[31m"])
def test_a_variant_that_is_no_file_name_is_refused(tmp_path, variant):
    path = tmp_path / "odd.toml"
    path.write_text(f'extends = "tiny-cpu"\n[variants]\n{json.dumps(variant)} = []\n')
    with pytest.raises(BadInput, match="is no name"):
        read_profile(str(path))


@pytest.mark.parametrize("key", ["sk-abc\n", "sk\r\nX-Evil: 1", "schlüssel"])
def test_a_key_that_would_break_the_request_is_refused_unsaid(key):
    with pytest.raises(BadInput, match="the API key holds a character") as refused:
        Endpoint("http://h:1", "m", key)
    assert "sk" not in str(refused.value)


def test_a_url_with_a_password_is_refused_unsaid():
    with pytest.raises(BadInput, match="holds a user name or password") as refused:
        Endpoint("http://me:hunter22@h:1", "m")
    assert "hunter22" not in str(refused.value)


# A page that is made, and secrets.

PLANTED = {
    "HF_TOKEN": "hf_planted0123456789",
    "OPENAI_API_KEY": "sk-planted-0123456789",
    "AWS_SECRET_ACCESS_KEY": "aws/planted+0123456789",
    "MY_PASSWORD": "planted pass word",
}


def test_a_hostile_title_is_text_in_a_rendered_page_and_planted_secrets_are_in_no_file_of_its_run(
    fake_vllm, tmp_path, monkeypatch
):
    """The stand-in logs its whole environment; the front notebook, its page and all that the run stores are searched."""
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    profile = lab.load_profile(str(fake_vllm("tell-secrets", "tell-secrets")))
    run = open_run(tmp_path / "run", dataclasses.replace(profile, title=NASTY))
    output = run.path / "rendered" / notebooks.FRONT.name
    page = notebooks.execute(notebooks.FRONT, output, {"run_dir": str(run.path)})
    text = page.read_text()
    assert "<script>alert(1)" not in text and "&lt;script&gt;alert(1)" in text
    assert not any(character in text for character in "\x1b\x00\u202e")
    log = (run.path / "logs" / "bf16.log").read_text()
    assert "'HF_TOKEN': '****" in log and "'VLLM_API_KEY': '****" in log
    files = [path for path in run.path.rglob("*") if path.is_file()]
    assert page in files and len(files) > 15
    for path in files:
        data = path.read_bytes()
        assert not [name for name, value in PLANTED.items() if value.encode() in data], path


def test_a_killed_watchdog_leaves_no_secret_in_the_log(fake_vllm, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", PLANTED["HF_TOKEN"])
    log, profile = tmp_path / "x.log", lab.load_profile(str(fake_vllm("tell-secrets")))
    server = lab.start_server(profile, "bf16", log_path=log)
    server._watchdog.kill()
    server._watchdog.wait()
    server.stop()
    assert "'HF_TOKEN': '****" in log.read_text() and PLANTED["HF_TOKEN"] not in log.read_text()


def test_a_failed_start_quotes_no_secret(fake_vllm, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", PLANTED["HF_TOKEN"])
    with pytest.raises(lab.ServerFailed, match="RuntimeError: no access with [*[]") as failed:
        lab.start_server(lab.load_profile(str(fake_vllm("blurt-out"))), "bf16", log_path=tmp_path / "x.log")
    assert PLANTED["HF_TOKEN"] not in (tmp_path / "x.log").read_text()
    assert PLANTED["HF_TOKEN"] not in str(failed.value)


@pytest.mark.parametrize(
    "text",
    [
        '[server]\nflags = ["--api-key", "sk-planted"]',
        '[server]\nflags = ["--api-key=sk-planted"]',
        '[variants]\nbf16 = ["--hf-token", "hf_planted"]',
        '[server.env]\nHF_TOKEN = "hf_planted"',
        '[variant_env.bf16]\nMY_SECRET = "planted"',
        '[server.env]\nOPENAI_APIKEY = "planted"',
        '[server.env]\nGITHUB_PAT = "planted"',
        '[server.env]\nPGPASSWORD = "planted"',
        '[server]\nflags = ["--kv-transfer-config.api-key", "planted"]',
        '[server]\nflags = ["--otlp-traces-endpoint", "http://me:planted@host:4317"]',
        '[server.env]\nHTTPS_PROXY = "http://me:planted@proxy:3128"',
        '[server.env]\nSTORE = "postgresql+psycopg://me:planted@host/base"',
    ],
)
def test_a_secret_in_a_profile_is_refused_unsaid(tmp_path, text):
    (tmp_path / "mine.toml").write_text(f'extends = "tiny-cpu"\n{text}')
    with pytest.raises(BadInput, match="holds a secret, which would be stored") as refused:
        read_profile(str(tmp_path / "mine.toml"))
    assert "planted" not in str(refused.value)


def test_a_proxy_without_a_password_and_a_plain_name_pass(tmp_path):
    text = 'HTTPS_PROXY = "http://proxy:3128"\nMY_PATH = "a@b:c"\nCOMPAT = "1"'
    (tmp_path / "mine.toml").write_text(f'extends = "tiny-cpu"\n[server.env]\n{text}')
    assert read_profile(str(tmp_path / "mine.toml")).server.env["COMPAT"] == "1"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HF_TOKEN", "planted-one"),
        ("OPENAI_APIKEY", "planted-one"),
        ("GITHUB_PAT", "planted-one"),
        ("DATABASE_URL", "postgresql://me:planted-one@host/base"),
        ("HTTPS_PROXY", "http://me:planted-one@proxy:3128"),
    ],
    ids=["HF_TOKEN", "APIKEY", "PAT", "DATABASE_URL", "PROXY"],  # pytest puts the test's name into the environment
)
@pytest.mark.parametrize(
    "text",
    [
        '[server]\nflags = ["--note", "see planted-one"]',
        '[variants]\nbf16 = ["--note=planted-one"]',
        '[server.env]\nNOTE = "planted-one"',
        '[variant_env.bf16]\nNOTE = "planted-one"',
        '[model.checkpoints]\nbf16 = "planted-one/model"',
    ],
    ids=["flag", "variant", "env", "variant_env", "checkpoint"],
)
def test_a_secrets_value_under_an_innocent_name_is_refused_unsaid(tmp_path, monkeypatch, name, value, text):
    (tmp_path / "mine.toml").write_text(f'extends = "tiny-cpu"\n{text}')
    profile = load_profile(str(tmp_path / "mine.toml"))
    monkeypatch.setenv(name, value)
    for start in (lambda: load_profile(str(tmp_path / "mine.toml")), lambda: lab.start_server(profile, "bf16")):
        with pytest.raises(BadInput, match=f"holds the value of {name}") as refused:
            start()
        assert "planted" not in str(refused.value)


def test_every_profile_of_the_house_passes():
    for name in lab.profile_names():
        read_profile(name)


# What a shell shows.


def test_the_command_line_shows_no_escape_sequences(tmp_path):
    command = [
        sys.executable,
        "-m",
        "fp8lab.cli",
        "load-test",
        "--base-url",
        "http://127.0.0.1:9",
        "--model",
        NASTY[:-9],
    ]
    command += ["--trace", f"{tmp_path}/\x1b[31mno.csv", "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [part.replace("\x00", "") for part in command], capture_output=True, text=True, check=False, env=os.environ
    )
    assert done.returncode == 2 and "\x1b" not in done.stderr and "no trace file" in done.stderr
