"""What the bundle holds: `contents.py select` | `prune SITE` | `check SITE` (called by build.sh).

select  prints the locked requirements less exclude.txt
prune   deletes the files of prune.txt from the unpacked site folder
check   reports requirements of the shipped packages that are neither shipped (in a fitting version) nor excluded
"""

import fnmatch
import importlib.metadata
import os
import re
import shutil
import sys
from pathlib import Path

try:
    from packaging.requirements import Requirement
except ModuleNotFoundError:  # every pip carries a copy
    from pip._vendor.packaging.requirements import Requirement

HERE = Path(__file__).resolve().parent
LOCKS = (HERE.parent / "gpu.txt", HERE.parent / "extra.txt")
HOST = {
    "implementation_name": "cpython",
    "os_name": "posix",
    "platform_machine": "x86_64",
    "platform_python_implementation": "CPython",
    "platform_system": "Linux",
    "python_full_version": "3.12.0",
    "python_version": "3.12",
    "sys_platform": "linux",
}
# Without one of these the server starts late, slowly or not at all; a new vLLM may have moved them.
MUST_HOLD = (
    "vllm/vllm-rs",
    "vllm/_C_stable_libtorch.abi3.so",
    "vllm/_moe_C_stable_libtorch.abi3.so",
    "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so",
    "vllm/third_party/deep_gemm/_C.cpython-312-x86_64-linux-gnu.so",
    "xgrammar/libxgrammar_bindings.so",
    "llama_models/llama3/tokenizer.model",
    "share/jupyter/nbconvert/templates",
)


def lines(path: Path) -> list[str]:
    """The lines of a list, less comments and empty ones."""
    stripped = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
    return [line for line in stripped if line]


def normal(name: str) -> str:
    """A distribution's name as the package index compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def select(locked: list[str], excluded: list[str]) -> list[str]:
    """The `name==version` lines that match no pattern. Raises ValueError for patterns that match nothing."""
    names = [normal(line.partition("==")[0]) for line in locked]
    if stale := [pattern for pattern in excluded if not fnmatch.filter(names, pattern)]:
        raise ValueError(f"exclude.txt names what the locks do not hold: {', '.join(stale)}")
    return [line for line, name in zip(locked, names, strict=True) if not is_excluded(name, excluded)]


def is_excluded(name: str, excluded: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(normal(name), pattern) for pattern in excluded)


def prune(site: Path, globs: list[str]) -> None:
    """Deletes what the globs match.

    Raises ValueError, before deleting, for globs that match nothing, and after it when a library that is gone is
    still named by a shipped one of its package: that one would no longer load.
    """
    found = {glob: list(site.glob(glob)) for glob in globs}
    if stale := [glob for glob, paths in found.items() if not paths]:
        raise ValueError(f"prune.txt names what the packages do not hold: {', '.join(stale)}")
    for path in (path for paths in found.values() for path in paths):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    for gone in (path for paths in found.values() for path in paths if ".so" in path.name):
        for library in gone.parent.glob("*.so*"):
            if gone.name.encode() in library.read_bytes():
                raise ValueError(f"prune.txt takes away {gone.name}, which {library.relative_to(site)} links")


def unmet(site: Path, excluded: list[str]) -> list[str]:
    """Requirements of the distributions in `site`, with the extras they ask of each other, that nothing meets."""
    shipped = {normal(found.name): found for found in importlib.metadata.distributions(path=[str(site)])}
    problems, seen = set(), set()
    todo = [(name, "") for name in shipped]
    while todo:
        name, extra = todo.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        for requirement in map(Requirement, shipped[name].requires or []):
            if requirement.marker and not requirement.marker.evaluate(HOST | {"extra": extra}):
                continue
            needed = normal(requirement.name)
            if needed in shipped:
                version = shipped[needed].version
                if not requirement.specifier.contains(version, prereleases=True):
                    problems.add(f"{name} needs {requirement}, shipped is {version}")
                todo += [(needed, wanted) for wanted in requirement.extras]
            elif not is_excluded(needed, excluded):
                problems.add(f"{name} needs {requirement}, which is neither shipped nor excluded")
    return sorted(problems)


def check(site: Path, excluded: list[str]) -> list[str]:
    """Everything wrong with the site folder, in words."""
    problems = [f"{path} is missing" for path in MUST_HOLD if not (site / path).exists()]
    if (site / MUST_HOLD[0]).exists() and not os.access(site / MUST_HOLD[0], os.X_OK):
        problems.append(f"{MUST_HOLD[0]} is not executable")
    return problems + unmet(site, excluded)


def main(command: str, *arguments: str) -> str | None:
    excluded = lines(HERE / "exclude.txt")
    try:
        if command == "select":
            print(*select([line for lock in LOCKS for line in lines(lock)], excluded), sep="\n")
        elif command == "prune":
            prune(Path(arguments[0]), lines(HERE / "prune.txt"))
        elif command == "check":
            return "\n".join(check(Path(arguments[0]), excluded)) or None
        else:
            return __doc__
    except ValueError as error:
        return str(error)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) if len(sys.argv) > 1 else __doc__)
