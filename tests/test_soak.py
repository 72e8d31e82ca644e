"""The soak says when it does not show what it is for."""

import json
import sys

import pytest

from bench import soak
from fp8lab.config.profile_file import read_profile

ROUND = {"descriptors": 9, "threads": 2, "children": 0, "server_processes": 0, "temporary_files": 0}
ROUND |= {"memory_mib": 200.0, "start_s": 1.0, "load_s": 1.0, "stop_s": 1.0, "failed": 0}


@pytest.fixture
def soaked(monkeypatch, capsys):
    """Runs the soak on made-up rounds: (exit code, its JSON)."""

    def run(rounds: list[dict], *arguments: str):
        each = iter(rounds)
        monkeypatch.setattr(soak, "one_round", lambda *_: next(each))
        monkeypatch.setattr(soak, "counts", lambda _folder: {})
        monkeypatch.setattr(soak.lab, "load_profile", read_profile)
        monkeypatch.setattr(sys, "argv", ["soak.py", "--starts", str(len(rounds)), *arguments])
        monkeypatch.setenv("TMPDIR", "")
        code = soak.main()
        return code, json.loads(capsys.readouterr().out)

    return run


def test_enough_quiet_rounds_pass(soaked):
    code, said = soaked([ROUND] * soak.ENOUGH)
    assert code == 0 and said["problems"] == [] and said["starts"] == 9


@pytest.mark.parametrize("starts", [0, 1, 8])
def test_too_few_rounds_do_not_pass(soaked, starts):
    code, said = soaked([ROUND] * starts)
    assert code == 1 and said["problems"] == [
        f"only {starts} rounds, at least 9 are needed: more --starts or --minutes"
    ]


def test_no_time_for_a_round_does_not_pass(soaked):
    code, said = soaked([ROUND] * 9, "--minutes", "0")
    assert code == 1 and said["starts"] == 0


def test_a_failed_request_does_not_pass(soaked):
    code, said = soaked([ROUND] * 9 + [ROUND | {"failed": 2}])
    assert code == 1 and said["problems"] == ["2 requests failed"] and said["failed_requests"] == 2


def test_what_grows_does_not_pass(soaked):
    code, said = soaked([ROUND | {"threads": number} for number in range(9)])
    assert code == 1 and said["problems"] == ["grew: threads"]
