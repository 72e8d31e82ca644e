"""Draws anew what is committed with results in it (`make front`): README's figure and the front notebook's outputs."""

import math

import fp8lab as lab
from fp8lab import cli
from fp8lab.paths import DATA, RUNS
from fp8lab.report import notebooks
from fp8lab.report.drawing import Figure

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


if __name__ == "__main__":
    readme_figure().save(FIGURE)
    cli.main(["reproduce", "--source", "h200-80gb"])
    notebooks.keep_outputs(RUNS / "redrawn-h200-80gb" / notebooks.FRONT.name)
