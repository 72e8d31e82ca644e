"""The command line in a process of its own that has its imports behind it: a fork of one that waits for work.

What a command does, says and returns is as in a shell, for a tenth of the CPU time; that it starts from nothing is shown by
the tests that start it so. What Python, the loader or the library reads at its start (PYTHONPATH, the locale) cannot be changed
in a fork: each such setting has a process of its own to fork. For a folder of all runs, which is a test's own, it is started
from nothing.
"""

import atexit
import gc
import json
import os
import select
import signal
import subprocess
import sys
import tempfile

_COMMAND = [sys.executable, "-m", "fp8lab.cli"]
_AT_START = ("PYTHON", "LC_", "LANG", "LD_")
_waiting: dict[tuple, subprocess.Popen] = {}


def fp8lab(*arguments: str, timeout: float = 120) -> subprocess.CompletedProcess:
    """`fp8lab ARGUMENTS`, with this process's variables and folder."""
    command = [*_COMMAND, *arguments]
    if "FP8LAB_RUNS" in os.environ:
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    setting = tuple(sorted(one for one in os.environ.items() if one[0].startswith(_AT_START)))
    if setting not in _waiting:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        _waiting[setting] = subprocess.Popen([sys.executable, __file__], text=True, **pipes)
        atexit.register(_waiting[setting].communicate)  # its pipe's end is its own
    one = _waiting[setting]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        files = [f"/proc/{os.getpid()}/fd/{file.fileno()}" for file in (out, err)]
        work = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd(), "files": files}
        one.stdin.write(json.dumps(work) + "\n")
        one.stdin.flush()
        pid = int(one.stdout.readline())
        if not select.select([one.stdout], [], [], timeout)[0]:
            os.kill(pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(int(one.stdout.readline()))
        said = [(file.seek(0), file.read())[1] for file in (out, err)]
    if code == -signal.SIGKILL:
        raise subprocess.TimeoutExpired(command, timeout, *said)
    return subprocess.CompletedProcess(command, code, *said)


def _wait_for_work() -> dict:
    """Returns in a child, with what is asked of it; ends with the pipe."""
    asked, told = os.fdopen(os.dup(0)), os.dup(1)
    for line in asked:
        if (pid := os.fork()) == 0:
            asked.close()
            os.close(told)
            return json.loads(line)
        os.write(told, f"{pid}\n".encode())
        os.write(told, f"{os.waitpid(pid, 0)[1]}\n".encode())
    sys.exit()


if __name__ == "__main__":
    if not sys.flags.safe_path:
        sys.path.pop(0)  # the tests' folder, which `-m` would not see
    import httpx  # noqa: F401
    import nbformat  # noqa: F401
    import numpy  # noqa: F401
    import pandas  # noqa: F401
    import pyarrow.parquet  # noqa: F401

    import fp8lab
    from fp8lab import batch, cli, commands, load_test_command  # noqa: F401

    for name in fp8lab.__all__:
        getattr(fp8lab, name)
    gc.collect()
    gc.freeze()  # a child that ends does not go through all that was imported
    work = _wait_for_work()
    os.environ.clear()
    os.environ.update(work["environment"])
    os.chdir(work["folder"])
    for descriptor, path, mode in (
        (0, os.devnull, os.O_RDONLY),
        *((i, f, os.O_RDWR) for i, f in enumerate(work["files"], 1)),
    ):
        opened = os.open(path, mode)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.argv = ["fp8lab", *work["arguments"]]
    sys.exit(cli.main())
