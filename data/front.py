"""Draws anew what is committed with results in it (`make front`): README's figure, the front notebook's outputs, and README's
picture of the page that these make, for which it needs Chromium and Playwright."""

import io
import math
import os
import shutil
from pathlib import Path

import nbformat
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import fp8lab as lab
from fp8lab import cli
from fp8lab.paths import DATA, RUNS
from fp8lab.report.drawing import Figure
from fp8lab.report.notebooks import FRONT

FIGURE = DATA / "recorded" / "h100-80gb" / "figures" / "worth.svg"
PAGE = DATA / "recorded" / "h200-80gb" / "figures" / "page.png"
GRAPHS = "Rust, max-cudagraph-capture-size 1024"
ROWS = {
    ("h100-80gb", 50.0, "one Python process"): "both at the published 50 req/s",
    ("h100-80gb-starts", math.inf, GRAPHS): "the published requests all at once,\nAPI server out of the way",
    ("h100-80gb-long-prompts", math.inf, "one Python process"): "300 long prompts all at once",
}


def readme_figure() -> Figure:
    """The figure of README: three loads on an H100, from three recorded runs."""
    return lab.worth_figure(*(lab.open_run(source=name) for name, _, _ in ROWS), rows=ROWS)


def verdicts() -> str:
    """What README's picture of the page shows, as text: it is kept in the picture, so that a test can tell how old that is."""
    return lab.claims_table(lab.open_run(source="h200-80gb"), brief=True).to_markdown()


def picture_page(page: Path) -> None:
    """Pictures the part of a rendered front notebook that has the verdicts."""
    from playwright.sync_api import sync_playwright  # in the cpu environment only

    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    # Chromium's sandbox refuses to work for root.
    flags = ["--disable-gpu", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=flags)
        shown = browser.new_page(viewport={"width": 1200, "height": 900}, device_scale_factor=0.75)
        shown.goto(page.as_uri())
        heading = shown.locator("h2", has_text="The answer").first.bounding_box()
        table = shown.get_by_role("group", name="The published claims against").first.bounding_box()
        top, bottom = heading["y"] - 12, table["y"] + table["height"] + 12
        area = {"x": 0, "y": top, "width": 1200, "height": bottom - top}
        picture = Image.open(io.BytesIO(shown.screenshot(full_page=True, clip=area)))
        browser.close()
    note = PngInfo()
    note.add_itxt("Description", verdicts())
    picture.convert("RGB").quantize(64).save(PAGE, optimize=True, pnginfo=note)


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
    redrawn = RUNS / "redrawn-h200-80gb" / FRONT.name
    keep_outputs(redrawn)
    picture_page(redrawn.with_suffix(".html"))
