"""Runs notebooks headless through papermill, strictly, and turns them into single-file pages; a run for others: its pages and
one archive that `--source` opens again."""

import ast
import contextlib
import os
import re
import sys
import tempfile
import threading
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..errors import BadInput, Fp8labError
from ..paths import PROJECT, RUNS_VARIABLE, made, nameless, repository_relative, with_home, with_library, writing
from ..results.run_folder import Run
from ..system.locks import Scratch
from ..ui import PROGRESS_FILE_VARIABLE, StatusLine

FRONT = PROJECT / "project_reproduce.ipynb"
STEPS = PROJECT / "notebooks"
# Run by their names only: they need a trained model, the shapes of a large one, or another card; the planner needs nothing.
_APART = ("07_quality", "08_unseal", "09_recipes", "10_more_cards", "11_planner", "appendix_number_formats")
# nbconvert's page without its scripts: neither formulas nor diagrams are used.
_PAGE = """{%- extends "index.html.j2" -%}
{%- block html_head_js -%}{%- endblock -%}
{%- block html_head_js_mathjax -%}{%- endblock -%}
{%- block html_head_js_mermaidjs -%}{%- endblock -%}
{%- block html_head_css -%}<style>STYLE</style>{%- endblock -%}
"""
# A table's caption stands before the box in which a wide one scrolls, and may be wider than a narrow one. The box has its name.
_CAPTION = re.compile(r'(<div [^>]*role="group"[^>]*><table>)<caption[^>]*>(.*?)</caption>', re.DOTALL)
# Read on a phone, printed, and by people who tell colours badly apart.
_STYLE = """
:root { --jp-mirror-editor-comment-color: #2f6060; --jp-mirror-editor-number-color: #060; --jp-mirror-editor-operator-color: #8000d0; }
main { max-width: 75rem; margin: 0 auto; }
main a { text-decoration: underline; }
figure img { max-width: 100%; height: auto; }
.caption { margin: 0.5em 0; font-size: var(--jp-ui-font-size1); }
.highlight pre, .jp-RenderedText pre { white-space: pre-wrap; overflow-wrap: anywhere; }
@media (max-width: 40rem) {
  body.jp-Notebook { padding: 0.5rem; }
  figure { margin: 1em 0; }
  .jp-OutputArea-output :is(td, th) { vertical-align: top; }
  th[style*="min-width"] { min-width: 22em !important; }
}
@page { size: A4; margin: 14mm; }
@media print {
  * { overflow: visible !important; }
  .jp-Cell, .jp-Cell-inputWrapper, .jp-InputArea, .jp-OutputArea, .jp-OutputArea-child, .jp-OutputArea-output {
    display: block !important;
  }
  :root { --jp-content-font-size1: 10.5pt; --jp-code-font-size: 8.5pt; }
  figure img { max-height: 75mm; }
  figure, img, tr, pre, .caption { break-inside: avoid; }
  h1, h2, h3, .caption, .jp-MarkdownCell, .jp-CodeCell .jp-Cell-inputWrapper { break-after: avoid; }
  .jp-OutputArea-output table { font-size: 6.5pt; }
  .jp-OutputArea-output :is(td, th) { padding: 0.3em; min-width: 0 !important; }
}
"""


class NotebookFailed(Fp8labError):
    """A cell raised an error."""


def find(name: str) -> list[Path]:
    """The notebooks that `name` means: "front", "steps" (those on speed, in order), a step's name, or a path."""
    steps = sorted(STEPS.glob("*.ipynb"))
    if name == "front":
        return [FRONT]
    if name == "steps":
        return [path for path in steps if path.stem not in _APART]
    named = [path for path in steps if name in (path.stem, path.stem.partition("_")[0])]
    if not named and not Path(name).is_file():
        known = ", ".join(["front", "steps", *(path.stem for path in steps)])
        raise BadInput(f"no notebook {name!r} (there are: {known}; or give a path)")
    return named or [Path(name)]


def declared(notebook: Path) -> dict:
    """The parameters that a notebook declares, with their defaults. Raises BadInput for a file that is no notebook."""
    import nbformat

    try:
        cells = nbformat.read(notebook, as_version=4).cells
        return assigned(next((cell.source for cell in cells if "parameters" in cell.metadata.get("tags", ())), ""))
    except Exception as error:  # whatever the readers of JSON, notebooks and Python make of another file
        said = str(error).partition("\n")[0][:200]  # the library quotes the whole file
        raise BadInput(f"{notebook} is no notebook ({said}); expected a Jupyter notebook (.ipynb)") from None


def check_parameters(notebook: Path, parameters: Mapping) -> None:
    """Raises BadInput for a parameter that the notebook does not declare, and for a value of another kind than its default;
    papermill itself only warns of the one and takes the other."""
    _refuse(notebook.name, declared(notebook), parameters)


def check_injected() -> None:
    """For a notebook's first cell: raises BadInput when papermill, run by hand, has put in parameters (as a cell of their
    own, right before) that the notebook does not declare, or of another kind than declared."""
    from IPython import get_ipython

    *_, own, injected, _current = ["", "", "", *(get_ipython().user_ns["In"] if get_ipython() else ())]
    if injected.startswith("# Parameters\n"):
        _refuse("this notebook", assigned(own), assigned(injected))


def assigned(source: str) -> dict:
    """What a cell of plain assignments sets: names and values."""
    values = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            with contextlib.suppress(ValueError):
                values[node.targets[0].id] = ast.literal_eval(node.value)
    return values


def _refuse(name: str, declared: Mapping, given: Mapping) -> None:
    if unknown := sorted(set(given) - set(declared)):
        raise BadInput(f"{name} has no parameter {', '.join(unknown)} (it declares: {', '.join(declared)})")
    for key, value in given.items():
        kind, number = type(declared[key]), isinstance(declared[key], (int, float))
        fits = isinstance(value, (int, float)) and not isinstance(value, bool) if number else isinstance(value, kind)
        if kind is bool or not fits:
            expected = {str: "a text", list: "a list"}.get(kind, "a number")
            raise BadInput(f"{name}: parameter {key} = {value!r}: expected {expected}, as {declared[key]!r}")


def execute(notebook: Path, output: Path, parameters: Mapping, *, kept: bool = True) -> Path:
    """Executes `notebook` into `output` (.ipynb) and a page beside it (.html); returns the page.

    The source is never written to; what cells and libraries write to standard error goes to this process's own.
    Raises BadInput, without leaving anything, for parameters that are undeclared or impossible or that a cell
    refuses; NotebookFailed, with the cell's error, when a cell fails: the executed part is then in `output`, and its
    page is made all the same. The error names it where it is to be `kept`.
    """
    import papermill

    check_parameters(notebook, parameters)
    made(output.parent, f"name another folder for all runs in the variable {RUNS_VARIABLE}")
    failure = None
    with _forwarded_progress(output.with_suffix(".progress")), Scratch() as own:
        try:
            papermill.execute_notebook(
                str(notebook), str(output), parameters=dict(parameters), kernel_name="python3",
                kernel_manager_class=_own_kernel(Path(own)), cwd=str(PROJECT), progress_bar=False, stderr_file=sys.stderr,
                # The kernel's own log goes to this terminal; what cells print and raise goes into the notebook.
                extra_arguments=["--log-level=CRITICAL"],
            )  # fmt: skip
        except papermill.PapermillExecutionError as error:
            failure = error
    if failure and failure.ename in ("BadInput", "RunMismatch", "InUse"):
        output.unlink()
        raise BadInput(f"{notebook.name}: {failure.evalue}") from failure
    _forget_the_machine(output)
    page = to_html(output)
    if failure:
        message = f"{notebook.name}, cell {failure.exec_count}: {failure.ename}: {failure.evalue}"
        raise NotebookFailed(message + f"\nexecuted so far: {output}" * kept) from failure
    return page


def _own_kernel(folder: Path) -> type:
    """A manager of kernels that are this interpreter with this library, whatever kernels the machine has, and without the
    user's start-up files; what it writes while it runs goes into `folder`."""
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    spec = KernelSpec(
        argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        env={**with_library(with_home(os.environ)), "IPYTHONDIR": str(folder)},
        language="python",
    )

    class OwnKernel(AsyncKernelManager):
        kernel_spec = spec

        def __init__(self, **options):
            super().__init__(**options, connection_file=str(folder / "kernel.json"))

    return OwnKernel


def _forget_the_machine(executed: Path) -> None:
    """Takes out of an executed notebook what is of this machine alone: standard error, which the terminal got, and paths; and
    what is said of the outputs that the committed file has (cells with the tag "as committed")."""
    import nbformat

    notebook = nbformat.read(executed, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if "as committed" not in cell.metadata.get("tags", ())]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]
    notebook.metadata.pop("papermill", None)
    nbformat.write(notebook, executed)


def to_html(executed: Path) -> Path:
    """A page in one file beside the executed notebook: no script, no request to any other host."""
    import nbformat
    from nbconvert import HTMLExporter

    notebook = nbformat.read(executed, as_version=4)
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    heading = re.search(r"^# (.+)$", text, re.MULTILINE)
    title = heading[1] if heading else executed.stem.replace("_", " ")
    exporter = HTMLExporter(
        raw_template=_PAGE.replace("STYLE", _STYLE), exclude_input_prompt=True, exclude_output_prompt=True
    )
    body, _ = exporter.from_notebook_node(
        notebook, resources={"metadata": {"name": title, "path": str(executed.parent)}}
    )
    page = executed.with_suffix(".html")
    # The page travels alone: other notebooks are not where its links would look for them.
    body = re.sub(r'<a href="[^":]+\.ipynb">(.*?)</a>', r"\1", body)
    page.write_text(nameless(_CAPTION.sub(r'<p class="caption">\2</p>\1', body)))
    return page


def share(run: Run, target: Path, *, notebooks: list[Path], tokens: bool = False) -> tuple[list[Path], Path]:
    """Writes the pages and the archive of `run` into the folder `target`; (pages, archive).

    The notebooks are executed on the run as it is: nothing is measured. The archive holds provenance, records
    and telemetry of every complete level, what was measured of quality, no logs, and token timestamps only with
    `tokens` (they are large). Raises BadInput for a run that holds neither levels nor answers, and for a notebook of no
    run; NotebookFailed when a cell fails.
    """
    if not run.summaries() and not run.read_parts("quality"):
        raise BadInput(f"{run.path.name} holds no complete level and no answers yet: there is nothing to share")
    if alone := [one for one in notebooks if "source" not in declared(one)]:
        draws = f"leave it out; `fp8lab reproduce --notebook {alone[0].stem}` draws it"
        raise BadInput(f"{alone[0].name} is of no run, and no part of one that is shared: {draws}")
    made(target, "choose another --out folder")
    where = {"source": repository_relative(run.path)}
    pages, name, status = [], run.path.resolve().name, StatusLine()
    # Written beside and renamed: what was shared before stays until this is whole.
    with writing(target), tempfile.TemporaryDirectory(prefix=".sharing-", dir=target) as scratch:
        for notebook in notebooks:
            status.update(f"{name}: drawing {notebook.stem}")
            page = execute(notebook, Path(scratch) / notebook.name, where, kept=False)
            pages.append(target / f"{name if len(notebooks) == 1 else f'{name}-{notebook.stem}'}.html")
            page.rename(pages[-1])
        status.update(f"{name}: packing the archive")
        whole, archive = Path(scratch) / "whole.zip", target / f"{name}.zip"
        with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as file:
            for path in run.files(list(run.summaries()) if tokens else ()):
                file.write(path, Path(name) / path.relative_to(run.path))
        whole.rename(archive)
    status.done(f"{name}: {len(pages)} page{'s' * (len(pages) > 1)} and an archive")
    return pages, archive


@contextlib.contextmanager
def _forwarded_progress(path: Path) -> Iterator[None]:
    """Shows in this terminal what the notebook's kernel, whose output goes into cells, says of its progress."""
    path.write_text("")
    os.environ[PROGRESS_FILE_VARIABLE] = str(path)
    ended = threading.Event()
    thread = threading.Thread(target=_follow, args=(path, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        del os.environ[PROGRESS_FILE_VARIABLE]
        ended.set()
        thread.join()
        path.unlink(missing_ok=True)


def _follow(path: Path, ended: threading.Event) -> None:
    status, last = StatusLine(), False
    with path.open() as lines:
        while not last:
            last = ended.wait(0.2)
            for line in lines:
                kind, _, text = line.rstrip("\n").partition(" ")
                if kind == "done":
                    status.done(text)
                else:
                    phase, _, detail = text.partition(": ")
                    status.update(phase, detail)
