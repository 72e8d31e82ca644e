"""The scripts of env/: the air-gapped bundle's, on a bundle of a few files, and the one that builds an environment."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

BUNDLE = Path(__file__).parents[1] / "env" / "bundle"
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


def write_package(folder: Path, name: str, version: str, requires: tuple[str, ...] = ()) -> None:
    """A distribution of one module, as its wheel leaves it in a site folder."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / "__init__.py").write_text("")
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    needs = "".join(f"Requires-Dist: {line}\n" for line in requires)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}")


@pytest.fixture
def parts(tmp_path) -> Path:
    """A good bundle in three parts or more, with an installer for the Python that runs the tests."""
    site, out = tmp_path / "site", tmp_path / "out"
    write_package(site, "vllm", "0.26.0")
    (site / "vllm" / "weights.bin").write_bytes(os.urandom(5000))
    pack(site, out)
    installer = (out / "install.sh").read_text()
    assert "python_needed=3.12\n" in installer
    (out / "install.sh").write_text(installer.replace("python_needed=3.12\n", f"python_needed={PYTHON}\n"))
    assert len(list(out.glob("bundle.part-*"))) >= 3
    return out


def pack(site: Path, out: Path, *cache: Path) -> None:
    command = ["bash", BUNDLE / "pack.sh", site, out, *cache]
    subprocess.run(command, env=os.environ | {"PART_BYTES": "2000"}, check=True, capture_output=True, text=True)


def write_torch(folder: Path, version: str = "2.11.0+cu130", cuda: str = "13.0") -> Path:
    (folder / "torch").mkdir(parents=True)
    (folder / "torch" / "__init__.py").write_text("raise ImportError('only the version is read')")
    (folder / "torch" / "version.py").write_text(f"__version__ = {version!r}\ncuda = {cuda!r}\n")
    return folder


@pytest.fixture
def host(tmp_path) -> Path:
    """A PYTHONPATH folder with the torch that the bundle is for."""
    return write_torch(tmp_path / "host")


def install(parts: Path, target: Path, host: Path | None = None, **variables: str) -> subprocess.CompletedProcess:
    # -S keeps the tests' own torch out of sight.
    python = parts / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    python.chmod(0o755)
    environment = os.environ | {"PYTHON": str(python), "PYTHONPATH": str(host or "")} | variables
    command = ["bash", str(parts / "install.sh"), str(target)]
    return subprocess.run(command, check=False, env=environment, capture_output=True, text=True)


def assert_refused(result: subprocess.CompletedProcess, target: Path, *words: str) -> None:
    """One line of error, and nothing of the target, whole or half."""
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith("install.sh: ")
    assert all(word in result.stderr for word in words), result.stderr
    assert not list(target.parent.glob(target.name + "*"))


def test_a_good_bundle_installs_and_says_what_to_export(parts, host, tmp_path):
    target = tmp_path / "new folder" / "vllm"
    result = install(parts, target, host)
    assert (result.returncode, result.stderr) == (0, "")
    assert "vllm 0.26.0 is in" in result.stdout and (target / "env.sh").read_text() in result.stdout
    assert (target / "vllm" / "weights.bin").stat().st_size == 5000
    script = '. "$1/env.sh"; "$2" -c "import vllm; print(vllm.__file__)"; echo "${VLLM_CACHE_ROOT:-no cache}"'
    command = ["bash", "-c", script, "-", target, sys.executable]
    shell = subprocess.run(command, check=True, capture_output=True, text=True)
    assert shell.stdout.splitlines() == [str(target / "vllm" / "__init__.py"), "no cache"]


@pytest.mark.parametrize("form", ["folder", "tarball"])
def test_a_compile_cache_is_packed_and_restored(parts, host, tmp_path, form):
    compiled = tmp_path / "home" / "vllm" / "torch_compile_cache"
    compiled.mkdir(parents=True)
    (compiled / "graph").write_text("compiled")
    cache = compiled.parent if form == "folder" else tmp_path / "cache.tar.gz"
    if form == "tarball":
        with tarfile.open(cache, "w:gz") as archive:
            archive.add(tmp_path / "home", "home")
    installer = (parts / "install.sh").read_text()
    pack(tmp_path / "site", parts, cache)
    (parts / "install.sh").write_text(installer)
    target = tmp_path / "vllm"
    assert f"export VLLM_CACHE_ROOT={target}/vllm-cache" in install(parts, target, host).stdout
    assert (target / "vllm-cache" / "torch_compile_cache" / "graph").read_text() == "compiled"


def test_what_is_no_compile_cache_is_refused(parts, tmp_path):
    with pytest.raises(subprocess.CalledProcessError) as refused:
        pack(tmp_path / "site", parts, parts)
    assert "not a vLLM cache" in refused.value.stderr


def test_an_earlier_bundle_is_replaced_and_another_folder_is_not(parts, host, tmp_path):
    target = tmp_path / "vllm"
    assert install(parts, target, host).returncode == 0
    (target / "stale.py").touch()
    assert install(parts, target, host).returncode == 0
    assert not (target / "stale.py").exists()
    result = install(parts, host, host)
    assert result.returncode == 1 and "holds something else" in result.stderr
    assert (host / "torch").is_dir()


def test_the_same_files_give_the_same_parts(parts, tmp_path):
    for file in (tmp_path / "site").rglob("*"):
        os.utime(file, (1, 1))
    pack(tmp_path / "site", tmp_path / "again")
    assert (tmp_path / "again" / "SHA256SUMS").read_text() == (parts / "SHA256SUMS").read_text()


def test_a_damaged_part_is_named(parts, host, tmp_path):
    part = parts / "bundle.part-01"
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    assert_refused(install(parts, tmp_path / "vllm", host), tmp_path / "vllm", "bundle.part-01", "send it again")


def test_missing_parts_are_named(parts, host, tmp_path):
    (parts / "bundle.part-00").unlink()
    (parts / "bundle.part-02").unlink()
    result = install(parts, tmp_path / "vllm", host)
    assert_refused(result, tmp_path / "vllm", "missing", "bundle.part-00 bundle.part-02")


def test_missing_checksums_are_named(parts, host, tmp_path):
    (parts / "SHA256SUMS").unlink()
    assert_refused(install(parts, tmp_path / "vllm", host), tmp_path / "vllm", "SHA256SUMS is missing")


def test_parts_that_hold_no_vllm_leave_nothing(tmp_path, parts, host):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_bytes(os.urandom(100))
    installer = (parts / "install.sh").read_text()
    pack(tmp_path / "other", parts)
    (parts / "install.sh").write_text(installer)
    assert_refused(install(parts, tmp_path / "vllm", host), tmp_path / "vllm", "no vllm")


def test_another_python_is_refused(parts, host, tmp_path):
    installer = parts / "install.sh"
    installer.write_text(installer.read_text().replace(f"python_needed={PYTHON}", "python_needed=3.99"))
    result = install(parts, tmp_path / "vllm", host)
    assert_refused(result, tmp_path / "vllm", f"Python {PYTHON}", "set PYTHON=python3.99")


def test_a_missing_torch_is_refused_and_can_be_overruled(parts, tmp_path):
    target = tmp_path / "vllm"
    assert_refused(install(parts, target), target, "torch is missing", "FP8LAB_BUNDLE_SKIP_TORCH_CHECK=1")
    result = install(parts, target, FP8LAB_BUNDLE_SKIP_TORCH_CHECK="1")
    assert result.returncode == 0 and "warning: torch is missing" in result.stderr


@pytest.mark.parametrize(
    ("version", "cuda"), [("2.13.0+cu130", "13.0"), ("2.11.0+cu128", "12.8"), ("2.11.0+cpu", None)]
)
def test_another_torch_is_refused(parts, tmp_path, version, cuda):
    other = write_torch(tmp_path / "other", version, cuda)
    assert_refused(install(parts, tmp_path / "vllm", other), tmp_path / "vllm", version)


@pytest.fixture
def contents(monkeypatch):
    monkeypatch.syspath_prepend(str(BUNDLE))
    import contents

    return contents


def test_the_lists_are_in_step_with_the_locks(contents):
    locked = [line for lock in contents.LOCKS for line in contents.lines(lock)]
    shipped = contents.select(locked, contents.lines(BUNDLE / "exclude.txt"))
    names = {line.partition("==")[0] for line in shipped}
    needed = {"vllm", "xgrammar", "llama-models", "nvidia-ml-py", "papermill", "nbconvert", "ipykernel", "pyarrow"}
    assert needed <= names and not names & {"torch", "triton", "flashinfer-python", "jupyterlab"}


def test_a_stale_exclusion_is_an_error(contents):
    with pytest.raises(ValueError, match="do not hold: gone-\\*"):
        contents.select(["numpy==2.3.5"], ["gone-*"])


def test_unmet_requirements_are_reported(contents, tmp_path):
    needs = ("b>=2", "absent", "torch==2.11.0", "windows; sys_platform == 'win32'", "c[fast]", "unasked; extra == 'x'")
    write_package(tmp_path, "a", "1", needs)
    write_package(tmp_path, "b", "1.5")
    write_package(tmp_path, "c", "1", ("turbo; extra == 'fast'",))
    assert contents.unmet(tmp_path, ["torch"]) == [
        "a needs absent, which is neither shipped nor excluded",
        "a needs b>=2, shipped is 1.5",
        'c needs turbo; extra == "fast", which is neither shipped nor excluded',
    ]


def test_pruning_refuses_what_matches_nothing_or_is_linked(contents, tmp_path):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "libx.so.1").write_bytes(b"ELF")
    (tmp_path / "p" / "core.so").write_bytes(b"..libx.so.1..")
    with pytest.raises(ValueError, match="do not hold: p/tests"):
        contents.prune(tmp_path, ["p/*.so", "p/tests"])
    assert (tmp_path / "p" / "core.so").exists()
    with pytest.raises(ValueError, match=r"libx.so.1, which p/core.so links"):
        contents.prune(tmp_path, ["p/libx*"])
    contents.prune(tmp_path, ["p"])
    assert not (tmp_path / "p").exists()


def test_an_environment_is_not_built_through_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "kept").write_text("mine")
    (link := tmp_path / "link").symlink_to("real")
    for venv in (str(link), f"{link}/"):
        command, env = ["bash", str(BUNDLE.parent / "setup.sh"), "cpu", venv], os.environ | {"PYTHON": sys.executable}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == f"{venv} is a link to real: remove the link, or build there\n"
    assert (tmp_path / "real" / "kept").read_text() == "mine"
