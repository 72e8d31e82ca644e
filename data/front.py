"""Draws anew what is committed with results in it (`make front`): README's figure and the front notebook's outputs."""

import math
from pathlib import Path

import nbformat

import fp8lab as lab
from fp8lab import cli
from fp8lab.paths import DATA, RUNS
from fp8lab.report.drawing import Figure
from fp8lab.report.notebooks import FRONT

FIGURE = DATA / "recorded" / "h100-80gb" / "figures" / "worth.svg"
GRAPHS = "Rust, max-cudagraph-capture-size 1024"
ROWS = {
    ("h100-80gb", 50.0, "one Python process"): "both at the published 50 req/s",
    ("h100-80gb-starts", math.inf, GRAPHS): "the published requests all at once,\nAPI server out of the way",
    ("h100-80gb-long-prompts", math.inf, "one Python process"): "300 long prompts all at once",
}


def readme_figure() -> Figure:
    """The figure of README: three loads on an H100, from three recorded runs."""
    return lab.worth_figure(*(lab.open_run(source=name) for name, _, _ in ROWS), rows=ROWS)


def keep_outputs(executed: Path) -> None:
    """Writes the outputs of an executed copy into the front notebook itself, which is to be committed with them."""
    fresh = {cell.id: cell for cell in nbformat.read(executed, as_version=4).cells}
    notebook = nbformat.read(FRONT, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [nbformat.from_dict({**out, "metadata": {}}) for out in fresh[cell.id].outputs]
            for out in cell.outputs:
                if out.output_type == "execute_result":
                    out.execution_count = None
    nbformat.write(notebook, FRONT)


if __name__ == "__main__":
    readme_figure().save(FIGURE)
    cli.main(["reproduce", "--source", "h200-80gb"])
    keep_outputs(RUNS / "redrawn-h200-80gb" / FRONT.name)
