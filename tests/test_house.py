"""The library's folders stand on each other in one order, nothing imports upward or in a circle, and the API is what it says."""

import ast
import graphlib
import importlib
import importlib.metadata
import re
import sys
from pathlib import Path

import fp8lab
from fp8lab.paths import PROJECT

LIB = PROJECT / "lib" / "fp8lab"
# From the ground up: data flows this way.
FLOORS = [
    {"ui", "errors", "paths"}, {"system"}, {"config"}, {"models"}, {"metrics"}, {"results"}, {"server"}, {"load"},
    {"experiment"}, {"report"}, {"__main__", "cli", "commands", "load_test_command", "batch", "hosts"},
]  # fmt: skip
MODULES = {".".join(path.relative_to(LIB).with_suffix("").parts): path for path in LIB.rglob("*.py")}


def imported(module: str, path: Path) -> set[str]:
    """The library's modules that `module` imports, wherever in it, by their names below fp8lab."""
    package, found = module.split(".")[:-1], set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) - node.level + 1], *(node.module.split(".") if node.module else [])]
            for name in node.names:
                parts = [*base, name.name]
                found.add(".".join(parts if ".".join(parts) in MODULES else base))
    return found & MODULES.keys()


GRAPH = {module: imported(module, path) for module, path in MODULES.items() if not module.endswith("__init__")}


def floor_of(module: str) -> int:
    return next(number for number, names in enumerate(FLOORS) if module.split(".")[0] in names)


def test_nothing_imports_upward():
    upward = [(one, other) for one, others in GRAPH.items() for other in others if floor_of(other) > floor_of(one)]
    assert not upward and sum(map(len, GRAPH.values())) > 150


def test_there_is_no_circle():
    assert list(graphlib.TopologicalSorter(GRAPH).static_order())


def test_every_folder_says_what_it_is_for():
    for folder in (path for path in LIB.rglob("*") if path.is_dir() and any(path.glob("*.py"))):
        assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text())), folder


def test_what_is_imported_is_asked_for_by_name():
    """A package that another one happens to bring may be gone with its next version."""
    asked = " ".join(
        (PROJECT / "env" / name).read_text() for name in ("common.in", "cpu.in", "extra.txt", "calibrator.txt")
    )
    named = {name.lower().replace("_", "-") for name in re.findall(r"^([A-Za-z][\w.-]*)", asked, re.MULTILINE)}
    homes = importlib.metadata.packages_distributions()
    files = [*LIB.rglob("*.py"), *(PROJECT / "tests").rglob("*.py")]
    own = {path.stem for path in files} | {"fp8lab", "bench", "contents"}
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for top in {name.partition(".")[0] for name in names} - sys.stdlib_module_names - own:
                wanted = {one.lower().replace("_", "-") for one in homes.get(top, [top])}
                assert wanted & named, f"{path.name} imports {top}, which env/*.in does not name"


def test_contributing_names_every_file():
    tree = (PROJECT / "CONTRIBUTING.md").read_text()
    named = re.findall(r"^    +(\w+\.py) ", tree, re.MULTILINE)
    assert sorted(named) == sorted(path.name for path in LIB.rglob("*.py") if path.name != "__init__.py")


def test_the_api_is_what_it_says():
    """Each public name is found where it is said to be, has a docstring, and stands in the list once."""
    assert len(fp8lab.__all__) == len(set(fp8lab.__all__)) > 70 and dir(fp8lab) == sorted(fp8lab.__all__)
    for home, names in fp8lab._HOMES.items():
        held = importlib.import_module(f"fp8lab.{home}")
        for name in names:
            assert getattr(fp8lab, name) is getattr(held, name)
            assert getattr(held, name).__doc__ or name.isupper(), name
