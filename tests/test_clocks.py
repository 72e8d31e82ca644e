"""Clocks that jump and machines that stand still: such a level is invalid, in words."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

import fp8lab as lab
from conftest import streaming_server, wait_for
from fp8lab.load.level import Clocks, clock_problems

# Every reading of one clock is shifted once FILE exists. Setting the machine's own clock would hit everyone on it.
SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>
int clock_gettime(clockid_t clock, struct timespec *now) {
  static int (*real)(clockid_t, struct timespec *);
  if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
  int failed = real(clock, now);
  if (clock == atoi(getenv("SHIM_CLOCK")) && !access(getenv("SHIM_FILE"), F_OK)) now->tv_sec += atoi(getenv("SHIM_S"));
  return failed;
}
"""


def test_what_counts_as_a_step():
    begin = Clocks(monotonic=100.0, boot=200.0, wall=1e9)

    def after(seconds, boot=0.0, wall=0.0):
        return clock_problems(begin, Clocks(100 + seconds, 200 + seconds + boot, 1e9 + seconds + wall))

    assert after(60) == [] and after(600, wall=0.3) == []  # what NTP slews
    assert after(60, wall=3600) == ["the clock was set 3600.0 s ahead during the level"]
    assert after(60, wall=-5) == ["the clock was set 5.0 s back during the level"]
    # A suspended machine's wall clock has moved on too: that is one fault, not two.
    assert after(60, boot=5, wall=5) == ["the machine was suspended for 5.0 s during the level"]


def load_test(url, out, requests, rate, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "fp8lab.cli", "load-test", "--base-url", url, "--model", "ok", "--out", str(out)]
    command += ["--trace", "random", "--input-tokens", "5", "--output-tokens", "10", "--workers", "1"]
    command += ["--requests", str(requests), "--rate", str(rate)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.parametrize(
    ("clock", "seconds", "said"),
    [
        (time.CLOCK_REALTIME, 3600, "the clock was set 3600.0 s ahead"),
        (time.CLOCK_REALTIME, -30, "the clock was set 30.0 s back"),
        (time.CLOCK_BOOTTIME, 7, "the machine was suspended for 7.0 s"),
    ],
)
def test_a_clock_that_jumps_makes_the_level_invalid(sse_url, tmp_path, clock, seconds, said):
    compiler = shutil.which("cc") or pytest.skip("no C compiler to make a clock that jumps")
    (tmp_path / "shim.c").write_text(SHIM)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", "shim.so", "shim.c", "-ldl"], cwd=tmp_path, check=True)
    environment = os.environ | {"LD_PRELOAD": str(tmp_path / "shim.so"), "SHIM_FILE": str(tmp_path / "now")}
    environment |= {"SHIM_CLOCK": str(int(clock)), "SHIM_S": str(seconds)}
    with load_test(sse_url, tmp_path / "out", 60, 30, env=environment) as process:
        wait_for(lambda: "sent" in process.stderr.readline(), what="the level's first requests")
        (tmp_path / "now").touch()
        summary = json.loads(process.communicate(timeout=60)[0])
    assert process.returncode == 3 and said in summary["invalid_reason"]


@pytest.mark.parametrize("phase", ["while sending", "while draining"])
def test_a_client_suspended_for_5_s_makes_the_level_invalid(tmp_path, phase):
    """Ctrl-Z, in effect: client and workers stop, the server does not."""
    with streaming_server("--itl-ms", "5" if phase == "while sending" else "500") as url:
        requests, rate = (200, 50) if phase == "while sending" else (4, 1000)
        with load_test(url, tmp_path / "out", requests, rate, start_new_session=True) as process:
            wait_for(lambda: "sent" in process.stderr.readline(), what="the level's first requests")
            os.killpg(process.pid, signal.SIGSTOP)
            time.sleep(5)
            os.killpg(process.pid, signal.SIGCONT)
            summary = json.loads(process.communicate(timeout=60)[0])
    assert process.returncode == 3 and "stood still for" in summary["invalid_reason"]
    assert summary["completed"] == requests  # the records are kept all the same


def test_a_server_suspended_for_5_s_makes_the_level_invalid(fake_vllm, tmp_path):
    """From outside, all its processes, as a debugger or a job control would."""
    profile = lab.load_profile(str(fake_vllm()))
    with lab.serve(profile, "bf16", log_path=tmp_path / "server.log") as server:
        pids = [process.pid for process in server._processes]
        timers = [
            threading.Timer(after, lambda sent=sent: [os.kill(pid, sent) for pid in pids])
            for after, sent in ((1.0, signal.SIGSTOP), (6.0, signal.SIGCONT))
        ]
        for timer in timers:
            timer.start()
        with pytest.warns(UserWarning, match="INVALID"):
            result = lab.load_test(server, rate=20, requests=100)
        for timer in timers:
            timer.join()
    assert "was suspended (SIGSTOP)" in result.summary.invalid_reason
