"""Hosts as they are: a checkout or a home that cannot be written to, odd terminals, foreign kernels, a user's own settings."""

import errno
import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import uuid

import nbformat
import pytest

from conftest import AS_ROOT
from fp8lab.errors import BadInput, InUse
from fp8lab.paths import PROJECT, cache_dir, nameless, with_home
from fp8lab.report import notebooks
from fp8lab.results.run_folder import open_run
from fp8lab.server.command import surroundings
from fp8lab.system.locks import Lock, Scratch

# Root writes to read-only folders too, unless it gives up the right to.
UNPRIVILEGED = ["setpriv", "--bounding-set=-dac_override,-dac_read_search,-fowner", "--inh-caps=-all"]
UNPRIVILEGED = UNPRIVILEGED if os.getuid() == 0 else []
PYTHON = [sys.executable, "-m", "fp8lab.cli"]
MACHINE = {str(PROJECT), os.path.expanduser("~"), sys.prefix, sys.base_prefix, "/tmp/", "site-packages/"}


def run(command, *, cwd=None, **variables) -> subprocess.CompletedProcess:
    """`command` with `variables` beside the environment's; None leaves one out."""
    library = os.pathsep.join(filter(None, (str(PROJECT / "lib"), os.environ.get("PYTHONPATH"))))
    merged = os.environ | {"PYTHONPATH": library} | variables
    environment = {name: str(value) for name, value in merged.items() if value is not None}
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, timeout=550, check=False)


def one_error(done: subprocess.CompletedProcess, code: int = 2) -> str:
    """The one line that a command ended with."""
    said = done.stderr.decode()
    assert done.returncode == code and len(said.splitlines()) == 1 and said.startswith("fp8lab: "), said
    return said


# Folders.


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the checkout that cannot be written to, at a long path with spaces and umlauts."""
    root = tmp_path_factory.mktemp("ein Ordner mit Ümläuten") / ("y" * 100)
    for name in ("lib", "notebooks"):
        shutil.copytree(PROJECT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "data").symlink_to(PROJECT / "data")
    shutil.copy(notebooks.FRONT, root)
    for folder in (root, root / "notebooks"):
        folder.chmod(0o555)
    yield root
    root.chmod(0o755)


@pytest.mark.parametrize(
    ("command", "remedy"),
    [
        ("reproduce --source h100-80gb", "FP8LAB_RUNS"),
        ("reproduce --profile emulated-h100", "FP8LAB_RUNS"),
        ("measure --profile emulated-h100", "--run"),
        ("measure --profile emulated-h100 --run there", "--run"),
        ("share h100-80gb", "--out"),
        ("batch data/batches/two-workloads.toml", "--out"),
        ("load-test --base-url http://127.0.0.1:9 --model m --out there", "--out"),
    ],
)
def test_a_read_only_checkout_names_another_folder(checkout, command, remedy):
    done = run([*UNPRIVILEGED, *PYTHON, *command.split()], cwd=checkout, PYTHONPATH=checkout / "lib")
    said = one_error(done)
    assert "cannot be written to (Permission denied)" in said and remedy in said


@pytest.mark.servers
def test_a_read_only_checkout_draws_into_the_folder_named(checkout, tmp_path):
    command = [*UNPRIVILEGED, *PYTHON, "reproduce", "--source", "h100-80gb", "--notebook", "01_environment"]
    done = run(command, cwd=checkout, PYTHONPATH=checkout / "lib", FP8LAB_RUNS=tmp_path / "runs")
    assert done.returncode == 0, done.stderr.decode()
    page = (tmp_path / "runs" / "redrawn-h100-80gb" / "01_environment.html").read_text()
    assert "<table" in page and "Ümläuten" not in page and str(tmp_path) not in page


def test_a_read_only_run_is_told_to_be_read(tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(PROJECT / "data" / "recorded" / "emulated-h100", folder)
    folder.chmod(0o555)
    assert "--source" in one_error(run([*UNPRIVILEGED, *PYTHON, "measure", "--run", folder]))


HOMES = "import os; from fp8lab.paths import *; print(cache_dir(), with_home(os.environ)['HOME'])"


@pytest.mark.parametrize("home", ["", "relative", "/proc/none", "/dev/null", "{tmp}/owned-by-root"])
def test_a_home_that_cannot_be_written_to_is_replaced(tmp_path, home):
    (tmp_path / "owned-by-root").mkdir()
    (tmp_path / "owned-by-root" / ".cache").write_text("not a folder")
    home = home.format(tmp=tmp_path)
    done = run([sys.executable, "-c", HOMES], cwd=tmp_path, HOME=home, XDG_CACHE_HOME=None, TMPDIR=tmp_path)
    own = tmp_path / f"fp8lab-home-{os.getuid()}"
    assert done.stdout.decode().split() == [f"{own}/.cache/fp8lab", str(own)], done.stderr
    assert own.stat().st_mode & 0o777 == 0o700


@AS_ROOT
def test_a_user_without_a_name_has_a_home():
    code = f"import os, tempfile, pwd; from fp8lab import paths; tempfile.gettempdir(); os.setuid(54321); {HOMES}"
    done = run([sys.executable, "-c", code], cwd="/", HOME=None, XDG_CACHE_HOME=None, TMPDIR="/tmp")
    shutil.rmtree("/tmp/fp8lab-home-54321", ignore_errors=True)
    assert done.stdout.decode().split()[1] == "/tmp/fp8lab-home-54321", done.stderr


def test_what_xdg_names_in_vain_is_left_out(tmp_path):
    (tmp_path / "file").touch()
    given = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "file"), "XDG_DATA_HOME": str(tmp_path / "data")}
    assert with_home(given) == {"HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path / "data")}


def test_no_home_and_no_temporary_folder_is_one_error(monkeypatch, tmp_path):
    other = tmp_path / f"fp8lab-home-{os.getuid()}"
    other.symlink_to(tmp_path / "elsewhere")  # as another user may have put there
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(BadInput, match="another user's; name a folder in HOME"):
        with_home({"HOME": "/proc/none"})
    monkeypatch.setattr("tempfile.tempdir", "/proc")
    with pytest.raises(BadInput, match="name folders in HOME and TMPDIR"):
        with_home({"HOME": "/proc/none"})


@pytest.mark.parametrize("length", [59, 200])
def test_sockets_fit_below_a_long_temporary_folder(monkeypatch, tmp_path, length):
    long = tmp_path / ("x" * length)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    with Scratch(for_sockets=True) as folder, socket.socket(socket.AF_UNIX) as one:
        one.bind(f"{folder}/{uuid.uuid4()}")  # as vLLM names its sockets
    assert not os.path.exists(folder) and not list(long.iterdir())


def test_a_file_system_without_locks_is_guarded_on_this_machine(monkeypatch, tmp_path):
    """Emulated: flock fails as NFS without a lock daemon, or Lustre without its option, makes it."""
    real = fcntl.flock

    def flock(fd, how):
        if str(tmp_path) in os.readlink(f"/proc/self/fd/{fd}"):
            raise OSError(errno.ENOLCK, "No locks available")
        real(fd, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    held = Lock(tmp_path / ".lock", "this run")
    with pytest.raises(InUse, match=f"this run is in use by pid {os.getpid()}"):
        Lock(tmp_path / ".lock", "this run")
    Lock(tmp_path / "other" / ".lock", "another run").release()
    held.release()
    Lock(tmp_path / ".lock", "this run").release()


# Terminals.


@pytest.mark.parametrize("command", ["profiles", "--help", "claims nowhere"])
def test_output_into_head_ends_quietly(command):
    script = f"{{ sleep 0.2; {' '.join(PYTHON)} {command} 2>&3; echo $? >&3; }} 3>&2 | true"
    done = run(["bash", "-c", script])
    *said, code = done.stderr.decode().splitlines()
    # argparse passes over what cannot be written.
    assert code == "2" if "nowhere" in command else code == "141" or (command, code) == ("--help", "0")
    assert len(said) == (1 if "nowhere" in command else 0)


@pytest.mark.parametrize(
    "terminal",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "TERM": "dumb", "COLUMNS": "1", "NO_COLOR": "1"},
    ],
    ids=["ascii", "C", "dumb"],
)
@pytest.mark.parametrize("command", ["claims emulated-h100", "claims Ümläut"])
def test_a_terminal_that_knows_ascii_alone(terminal, command):
    done = run([*PYTHON, *command.split()], **terminal)
    assert done.returncode == (2 if "Ü" in command else 0) and b"Traceback" not in done.stderr
    assert (done.stdout + done.stderr).isascii()
    assert "2.00x" in done.stdout.decode() or "claims emulated" not in command


def test_odd_starts_of_python(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("print('hello', file=__import__('sys').stderr)\n")
    (tmp_path / "pandas.py").write_text("raise SystemExit('a foreign pandas')\n")
    library = f"{PROJECT / 'lib'}{os.pathsep}{tmp_path / 'none'}"
    strict = [sys.executable, "-W", "error", "-O", "-m", "fp8lab.cli", "claims", "h100-80gb", "--brief"]
    done = run(strict, PYTHONPATH=library, PYTHONWARNINGS="error", PYTHONOPTIMIZE="2")
    assert done.returncode == 0 and b"Traceback" not in done.stderr and b"PagedAttention" in done.stdout
    closed = run(["bash", "-c", f"{' '.join(PYTHON)} claims nowhere >&- 2>&- <&-"])
    assert closed.returncode == 2
    full = run(["bash", "-c", f"{' '.join(PYTHON)} profiles >/dev/full"])
    assert "No space left on device" in one_error(full, 1)


# Kernels and pages.


def noisy(folder, noise: str):
    """The environment's notebook with a first cell that writes `noise` to standard error in every way there is."""
    notebook = nbformat.read(notebooks.STEPS / "01_environment.ipynb", as_version=4)
    source = f"import os, sys, warnings\nwarnings.warn({noise!r})\nprint({noise!r}, file=sys.stderr)\nos.write(2, {noise.encode()!r})"
    notebook.cells.insert(2, nbformat.v4.new_code_cell(f"{source};"))
    path = folder / "noisy.ipynb"
    nbformat.write(notebook, path)
    return path


@pytest.mark.servers
def test_neither_the_machine_nor_a_librarys_warning_reaches_a_page(monkeypatch, tmp_path, capsys):
    """And neither another kernel called python3 nor what a user has set up for their own work."""
    home = tmp_path / "home"
    spec = home / ".local" / "share" / "jupyter" / "kernels" / "python3"
    spec.mkdir(parents=True)
    foreign = {"argv": ["/bin/false", "{connection_file}"], "display_name": "foreign", "language": "python"}
    (spec / "kernel.json").write_text(json.dumps(foreign))
    startup = home / ".ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "00.py").write_text("raise SystemExit('a start-up file of the user')")
    (home / ".config" / "matplotlib").mkdir(parents=True)
    (home / ".config" / "matplotlib" / "matplotlibrc").write_text("axes.facecolor: red\nfont.size: 30\n")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("JUPYTER_PATH", str(spec.parents[1]))
    monkeypatch.setenv("PYTHONPATH", str(home))
    (home / "fp8lab").mkdir()
    (home / "fp8lab" / "__init__.py").write_text("raise SystemExit('a foreign fp8lab')")
    shutil.copytree(PROJECT / "data" / "recorded" / "smollm2-h200", tmp_path / "answers")
    pages = {}
    for notebook, source in (
        (noisy(tmp_path, "a noisy library"), tmp_path / "answers"),
        (notebooks.STEPS / "04_final_comparison.ipynb", "h100-80gb"),
        (notebooks.STEPS / "07_quality.ipynb", tmp_path / "answers"),
    ):
        output = tmp_path / "out" / notebook.name
        pages[notebook.stem] = notebooks.execute(notebook, output, {"source": str(source)}).read_text()
        executed = nbformat.read(output, as_version=4)
        assert not any(out.get("name") == "stderr" for cell in executed.cells for out in cell.get("outputs", ()))
        assert str(tmp_path) not in json.dumps(executed.metadata)
    assert capsys.readouterr().err.count("a noisy library") >= 2
    for name, page in pages.items():
        assert "<table" in page and not [place for place in (*MACHINE, str(tmp_path), "Warning") if place in page], name
    clean = open_run(source="h100-80gb")
    from fp8lab.report.levels import throughput_figure

    assert throughput_figure(clean)._repr_html_().split('"')[1] in pages["04_final_comparison"]


def test_committed_notebooks_hold_nothing_of_a_machine():
    for path in (notebooks.FRONT, *notebooks.STEPS.glob("*.ipynb")):
        text = path.read_text()
        for place in (*MACHINE, "Warning", '"stderr"', "/home/"):
            assert place not in text, (path.name, place)


@pytest.mark.parametrize("cache", [None, "elsewhere"])
def test_paths_are_shown_without_the_machine(tmp_path, monkeypatch, cache):
    if cache:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / cache))
    text = f"at {PROJECT}/lib/x.py, {sys.prefix}/bin/python, {cache_dir()}/y, '{PROJECT}' but {PROJECT}-2/z and /a{PROJECT}/b"
    shown = nameless(text)
    assert shown.startswith("at ./lib/x.py, PYTHON/bin/python, ~/.cache/fp8lab/y, '.' but ")
    assert shown.endswith(f"{PROJECT.name}-2/z and /a{PROJECT}/b")


@pytest.mark.servers
@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["profil", "x"], "this notebook has no parameter profil (it declares: profile_name, run_dir, source)"),
        (["source", "5"], "this notebook: parameter source = 5: expected a text, as ''"),
    ],
)
def test_papermill_by_hand_with_a_wrong_parameter_is_refused(tmp_path, given, said):
    path = notebooks.STEPS / "01_environment.ipynb"
    done = run([sys.executable, "-m", "papermill", path, tmp_path / "out.ipynb", "-p", *given], cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.decode().rstrip().endswith(f"BadInput: {said}")
    cells = [cell for cell in nbformat.read(tmp_path / "out.ipynb", as_version=4).cells if cell.get("outputs")]
    assert len(cells) == 1 and cells[0].outputs[0].traceback == [f"BadInput: {said}"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"speed": 1}, "no parameter speed"),
        ({"rate": "fast"}, "parameter rate = 'fast': expected a number, as 50"),
        ({"requests": True}, "expected a number, as 1000"),
        ({"run_dir": 5}, "expected a text, as 'latest'"),
    ],
)
def test_a_parameter_of_another_kind_is_refused(given, said):
    with pytest.raises(BadInput, match=said):
        notebooks.check_parameters(notebooks.STEPS / "02_bf16_baseline.ipynb", given)


# Servers.


def test_a_server_is_what_its_variant_says(monkeypatch):
    odd = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_USE_RUST_FRONTEND": "1", "VLLM_CONFIGURE_LOGGING": "0"}
    for name, value in (odd | {"VLLM_CACHE_ROOT": "/c", "PYTHONWARNINGS": "error", "FORCE_COLOR": "1"}).items():
        monkeypatch.setenv(name, value)
    with pytest.warns(UserWarning, match="does not get VLLM_CONFIGURE_LOGGING, VLLM_LOGGING_LEVEL from the env"):
        kept = surroundings({"VLLM_USE_RUST_FRONTEND": "0"})
    assert not kept.keys() & (odd.keys() | {"PYTHONWARNINGS", "FORCE_COLOR"}) and kept["VLLM_CACHE_ROOT"] == "/c"


ODD_PROFILE = """
extends = "emulated-h100"
replaces = ["protocols"]
[workload]
warmup_requests = 2
[protocols."as published"]
levels = [{ variant = "bf16", rate = 50, requests = 20 }]
"""


@pytest.mark.nightly  # a whole run on real vLLM
@pytest.mark.servers
@pytest.mark.timing  # a warning, as of a server that a test beside it leaves without its owner, is an error here
def test_a_run_on_an_odd_host(tmp_path):
    """Real vLLM: no home, a long temporary folder, another log level, foreign modules in the folder it is called from."""
    long = tmp_path / ("x" * 200)
    long.mkdir()
    (tmp_path / "odd.toml").write_text(ODD_PROFILE)
    for name in ("torch", "numpy", "vllm"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a foreign module')")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("print('hello')")
    library = os.pathsep.join((str(PROJECT / "lib"), str(tmp_path / "site")))
    code = "import sys; from fp8lab.cli import main; sys.path.remove(''); sys.exit(main())"
    command = ["bash", "-c", 'umask 077; exec "$@"', "-", sys.executable, "-c", code]
    done = run(
        [*command, "measure", "--profile", tmp_path / "odd.toml", "--protocol", "as published", "--run", tmp_path / "run"],
        cwd=tmp_path, PYTHONPATH=library, HOME=None if os.getuid() else "/proc/none", XDG_CACHE_HOME=None, TMPDIR=long,
        VLLM_LOGGING_LEVEL="ERROR", VLLM_CONFIGURE_LOGGING="0", PYTHONWARNINGS="error",
    )  # fmt: skip
    said = done.stderr.decode()
    assert done.returncode in (0, 3) and "warning: the server does not get VLLM_CONFIGURE_LOGGING" in said, said
    (held,) = open_run(source=tmp_path / "run").summaries().values()
    assert held.completed == 20 and held.server.kv_cache_tokens == 431_568


@pytest.mark.servers
def test_a_missing_trace_is_told_before_a_level_is_set_aside(tmp_path, fake_vllm):
    """The trace is named relative to its profile; the command runs in another folder."""
    (tmp_path / "profiles").mkdir()
    trace = tmp_path / "profiles" / "mine.csv"
    trace.write_text("prompt_tokens,output_tokens\n" + "8,8\n" * 40)
    profile = tmp_path / "profiles" / "mine.toml"
    text = fake_vllm().read_text().replace("[workload]", '[workload]\ntrace = "mine.csv"')
    profile.write_text(text)
    measured = ["measure", "--run", str(tmp_path / "run"), "--protocol", "as published"]
    done = run([*PYTHON, *measured, "--profile", profile], cwd="/", PYTHONPATH=os.environ["PYTHONPATH"])
    assert done.returncode in (0, 3), done.stderr.decode()
    before = sorted(path.relative_to(tmp_path) for path in (tmp_path / "run").rglob("*"))
    trace.unlink()
    done = run([*PYTHON, "measure", "--run", tmp_path / "run", "--again", "bf16-50rps-r1"], cwd="/")
    assert done.returncode == 2 and f"no trace file '{trace}'" in done.stderr.decode()
    assert sorted(path.relative_to(tmp_path) for path in (tmp_path / "run").rglob("*")) == before
