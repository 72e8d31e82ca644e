"""The kit in a real browser: JupyterLab driven as its user would, on a stand-in for vLLM, and the pages that are shared.

Screenshots of what was seen are kept in runs/test-artefacts/browser. Needs a Chromium on the path and Playwright (in
the cpu environment); without them these tests are skipped.
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from conftest import SHORT, fake_path, marked, wait_for
from fp8lab import batch
from fp8lab.paths import DATA, PROJECT, RUNS
from fp8lab.report import notebooks
from fp8lab.report.notebooks import share
from fp8lab.results.files import write_json
from fp8lab.results.run_folder import open_run
from fp8lab.server import processes

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is in the cpu environment only")
axe = pytest.importorskip("axe_playwright_python.sync_playwright")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the path (Debian: apt-get install chromium)"),
    pytest.mark.servers,
]

DESK, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
RECORDED = "h200-80gb"
# One level lasts long enough to be stopped in its middle.
PROFILE = SHORT.replace('"fp8", rate = 100, requests = 40', '"fp8", rate = 100, requests = 150')


@pytest.fixture(scope="module")
def artefacts(request) -> Path:
    folder = RUNS / "test-artefacts" / "browser"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    request.config.pluginmanager.getplugin("terminalreporter").write_line(f"screenshots: {folder}")
    return folder


@pytest.fixture(scope="module")
def browser():
    # Chromium's sandbox refuses to work for root.
    flags = ["--disable-gpu", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield chromium
        chromium.close()


class Lab:
    """JupyterLab in the browser, with the notebook in front."""

    def __init__(self, page, folder: Path, first: str):
        self.page, self.folder = page, folder
        self.notebook = page.locator(".jp-NotebookPanel:not(.lm-mod-hidden)")
        self.elsewhere: list[str] = []
        page.on(
            "request",
            lambda request: (
                re.match(r"(https?://127.0.0.1:|file:|data:|blob:)", request.url) or self.elsewhere.append(request.url)
            ),
        )
        self.kernel = self.notebook.locator(".jp-KernelName")
        self._goto(first)

    def open(self, name: str) -> None:
        """Opens another notebook, and it alone."""
        self._goto(re.sub(r"/tree/.*", f"/tree/{name}?reset", self.page.url))

    def _goto(self, url: str) -> None:
        self.page.goto(url)
        self.notebook.locator(".jp-CodeCell").first.wait_for(timeout=60_000)
        playwright.expect(self.kernel).to_contain_text("Python 3", timeout=30_000)
        self.idle()

    def cell(self, code: str):
        return self.notebook.locator(".jp-CodeCell").filter(has_text=code).first

    def idle(self) -> None:
        self.notebook.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").wait_for(timeout=60_000)

    def run(self, item: str) -> None:
        """Chooses `item` of the menu Run."""
        self.idle()
        self.page.get_by_role("menuitem", name="Run", exact=True).click()
        self.page.get_by_role("menuitem", name=item, exact=True).click()
        self.notebook.get_by_text("[*]:").first.wait_for(timeout=20_000)

    def interrupt(self) -> None:
        self.notebook.locator("[data-command='notebook:interrupt-kernel']").first.click()

    def finish(self, within: float) -> None:
        """Waits until no cell is running or waiting."""
        wait_for(lambda: self.notebook.get_by_text("[*]:").count() == 0, within, "the end of the cells")

    def errors(self) -> list[str]:
        """What cells raised or wrote to standard error, which JupyterLab shows alike; without the warning of a server that
        another test, beside this one, has just bereft of its owner."""
        said = self.notebook.locator("[data-mime-type='application/vnd.jupyter.stderr']").all_inner_texts()
        return [text for text in said if "a server of an earlier start is still there" not in text]


@pytest.fixture(scope="module")
def lab(browser, tmp_path_factory):
    """JupyterLab as `make lab` starts it, with a folder, settings and a port of its own; the front notebook is open."""
    folder = tmp_path_factory.mktemp("lab")
    (folder / "opened.toml").write_text(PROFILE)
    set_parameters(folder / notebooks.FRONT.name, profile_name=str(folder / "opened.toml"), run_dir=str(folder / "run"))
    settings = folder / ".settings" / "@jupyterlab" / "notebook-extension"
    settings.mkdir(parents=True)
    # Every cell stays in the page, also those that are not in sight.
    (settings / "tracker.jupyterlab-settings").write_text('{"windowingMode": "none"}')
    own = {f"JUPYTER_{name}_DIR": str(folder / f".{name.lower()}") for name in ("CONFIG", "DATA", "RUNTIME")}
    own |= {
        "PYTHONPATH": fake_path(),
        "JUPYTERLAB_SETTINGS_DIR": str(folder / ".settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / ".spaces"),
    }
    command = [sys.executable, "-m", "jupyter", *recipe()[1:], "--ip=127.0.0.1", f"--port={processes.free_port()}"]
    command += ["--ServerApp.browser=echo opens %s"]
    log = folder / "lab.log"
    with log.open("w") as output:
        server = subprocess.Popen(command, cwd=folder, env=os.environ | own, stdout=output, stderr=output)
    context = browser.new_context(viewport=DESK)
    try:
        opens = wait_for(lambda: re.search(r"^opens (\S+)", log.read_text(), re.MULTILINE), 60, "JupyterLab")
        yield Lab(context.new_page(), folder, opens[1])
    finally:
        context.close()
        server.terminate()
        server.wait(30)


def recipe() -> list[str]:
    """The command of `make lab`."""
    # `make test` hands its own ARGS to every make below it.
    command = ["make", "--no-print-directory", "--dry-run", "lab", "ENV=cpu", "ARGS="]
    said = subprocess.run(command, cwd=PROJECT, check=True, capture_output=True, text=True)
    return said.stdout.splitlines()[-1].split()


def set_parameters(target: Path, **values) -> None:
    """A copy of the front notebook without outputs, with other parameters."""
    notebook = nbformat.read(notebooks.FRONT, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in code:
        cell.outputs = []
    for name, value in values.items():
        code[0].source = re.sub(rf"^{name} = .*", f"{name} = {value!r}", code[0].source, flags=re.MULTILINE)
    nbformat.write(notebook, target)


def measured(folder: Path) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in (folder / "run").glob("levels/*/summary.json")}


def test_make_lab_opens_the_front_notebook_with_its_kernel(lab, artefacts):
    assert lab.page.url.endswith(f"/lab/tree/{notebooks.FRONT.name}")
    lab.page.screenshot(path=artefacts / "lab-opened.png")
    assert lab.page.locator(".jp-Dialog").count() == 0 and "Python 3" in lab.kernel.inner_text()


def test_an_interrupted_front_notebook_goes_on_where_it_stopped(lab, artefacts):
    page = lab.page
    measuring = lab.cell("lab.measure(")
    lab.run("Run All Cells")
    lab.notebook.locator("img[alt^='fp8-100rps-r1']").wait_for(timeout=180_000)
    page.wait_for_timeout(2000)
    measuring.screenshot(path=artefacts / "level-running.png")
    lab.interrupt()
    lab.finish(60)
    measuring.screenshot(path=artefacts / "level-stopped.png")
    (error,) = lab.errors()
    assert error.strip().startswith("Stopped: fp8-100rps-r1") and "\n" not in error.strip()
    before = measured(lab.folder)
    assert sorted(before) == ["bf16-100rps-r1", "bf16-50rps-r1"]
    wait_for(lambda: not marked(lab.folder / "opened.toml"), 30, "the end of the servers")

    lab.run("Run All Cells")
    lab.finish(240)
    assert lab.errors() == []
    after = measured(lab.folder)
    assert len(after) == 4 and before.items() <= after.items()
    measuring.screenshot(path=artefacts / "levels-measured.png")
    verdicts = lab.cell("lab.claims_table(run, brief=True)").locator("table")
    assert verdicts.get_by_role("cell", name="not run").count() >= 4 and "EMULATED" in verdicts.inner_text()
    figures = lab.notebook.locator("figure img")
    assert figures.count() >= 4
    assert all(figures.nth(i).get_attribute("alt") for i in range(figures.count()))
    assert all(figures.nth(i).evaluate("image => image.naturalWidth > 0") for i in range(figures.count()))
    text = lab.notebook.inner_text().lower()
    assert "model not found" not in text and "error displaying" not in text
    assert lab.notebook.locator(".jupyter-widgets, [data-mime-type*='widget']").count() == 0
    assert page.locator(".Toastify__toast").count() == 0 and lab.elsewhere == []
    for cell, name in (("lab.claims_table(run, brief=True)", "verdicts"), ("lab.throughput_figure(", "figure")):
        lab.cell(cell).screenshot(path=artefacts / f"lab-{name}.png")
    page.set_viewport_size(PHONE)
    page.keyboard.press("Control+b")  # without the list of files
    lab.cell("lab.claims_table(run, brief=True)").scroll_into_view_if_needed()
    page.screenshot(path=artefacts / "lab-phone.png")
    page.set_viewport_size(DESK)


def test_an_interrupted_level_keeps_the_server_of_another_cell(lab, artefacts):
    profile, name = lab.folder / "opened.toml", "server.ipynb"
    log = lab.folder / "server.log"
    cells = [
        f"import fp8lab as lab\nserver = lab.start_server(lab.load_profile({str(profile)!r}), 'bf16', log_path={str(log)!r})",
        "lab.load_test(server, rate=50, requests=300)",
        "print('alive:', server.alive)\nprint(lab.load_test(server, rate=100, requests=20))",
        "server.stop()\nprint('alive:', server.alive)",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
    notebook.metadata = nbformat.read(notebooks.FRONT, as_version=4).metadata
    nbformat.write(notebook, lab.folder / name)
    lab.open(name)
    lab.run("Run All Cells")
    lab.notebook.locator("img[alt^='bf16-50rps-r1']").wait_for(timeout=90_000)
    lab.page.wait_for_timeout(1000)
    lab.interrupt()
    lab.finish(30)
    assert len(lab.errors()) == 1 and len(marked(profile)) > 1
    again = lab.cell("requests=20")
    again.locator(".cm-content").click()
    lab.run("Run Selected Cell and All Below")
    lab.finish(90)
    assert "alive: True" in again.inner_text() and "20 of 20" in again.inner_text()
    assert "alive: False" in lab.cell("server.stop()").inner_text() and len(lab.errors()) == 1
    lab.page.screenshot(path=artefacts / "server-kept.png")
    assert marked(profile) == []


def test_the_first_figure_of_the_recorded_run_comes_at_once(lab, artefacts):
    name = "recorded.ipynb"
    set_parameters(lab.folder / name, source=RECORDED)
    lab.open(name)
    began = time.monotonic()
    lab.run("Run All Cells")
    lab.notebook.locator("figure img").first.wait_for(timeout=60_000)
    seconds = time.monotonic() - began
    lab.finish(60)
    write_json(artefacts / "first-figure.json", {"seconds_to_first_figure": seconds, "all": time.monotonic() - began})
    assert lab.errors() == []


@contextlib.contextmanager
def offline(browser, page_path: Path, viewport: dict):
    """The page opened from its file with the network off; fails when it asks for anything, or complains."""
    context = browser.new_context(viewport=viewport, offline=True)
    said = []
    context.route(re.compile("^(?!file:|data:)"), lambda route: (said.append(route.request.url), route.abort()))
    page = context.new_page()
    page.on("requestfailed", lambda request: said.append(f"failed: {request.url[:200]}"))
    page.on("console", lambda message: said.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: said.append(f"error: {error}"))
    page.goto(page_path.as_uri())
    yield page
    assert said == []
    context.close()


def serious(page) -> list[str]:
    """What axe-core finds serious or critical, a line each."""
    found = axe.Axe().run(page).response["violations"]
    return [
        f"{violation['id']}: {node['html'][:200]}"
        for violation in found
        if violation["impact"] in ("serious", "critical")
        for node in violation["nodes"]
    ]


def stays_in_its_width(page) -> bool:
    return page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> list[Path]:
    chosen = [path for name in ("front", "01", "05") for path in notebooks.find(name)]
    return share(open_run(source=RECORDED), tmp_path_factory.mktemp("shared"), notebooks=chosen)[0]


@pytest.mark.parametrize("viewport", [DESK, PHONE], ids=["desk", "phone"])
def test_shared_pages_need_no_network_and_exclude_nobody(browser, shared, artefacts, viewport):
    for path in shared:
        with offline(browser, path, viewport) as page:
            assert page.title() == page.locator("h1").inner_text() and page.locator("script").count() == 0
            assert stays_in_its_width(page)
            page.screenshot(path=artefacts / f"{path.stem}-{viewport['width']}.png", full_page=True)
            assert serious(page) == []


def test_wide_tables_scroll_in_their_own_box_on_a_phone(browser, shared):
    with offline(browser, shared[0], PHONE) as page:
        verdicts = page.get_by_role("group", name="The published claims against").first
        assert verdicts.evaluate("box => box.scrollWidth > box.clientWidth")
        assert verdicts.evaluate("box => (box.focus(), document.activeElement === box)")
        for seen, least in (("figure img", 4), (".caption", 4)):  # whole, beside what scrolls
            found = page.locator(seen)
            assert found.count() >= least
            for i in range(found.count()):
                assert found.nth(i).evaluate("one => one.getBoundingClientRect().right <= innerWidth")


def test_a_shared_page_prints(browser, shared, artefacts):
    with offline(browser, shared[0], DESK) as page:
        page.emulate_media(media="print")
        wide = "[...document.querySelectorAll('table')].filter(t => t.scrollWidth > 1.01 * 182 * 96 / 25.4).length"
        page.set_viewport_size({"width": int(182 * 96 / 25.4), "height": 1000})  # what A4 has between its margins
        assert page.evaluate(wide) == 0
        page.pdf(path=artefacts / "shared.pdf", prefer_css_page_size=True)
    pages = len(re.findall(rb"/Type\s*/Page\b", (artefacts / "shared.pdf").read_bytes()))
    assert 4 < pages < 24


def test_the_pages_of_a_batch_exclude_nobody(browser, tmp_path, artefacts):
    jobs = {RECORDED: {"state": "done"}, "emulated-h100": {"state": "done"}, "another": {"state": "failed"}}
    write_json(tmp_path / "queue.json", {"jobs": jobs})
    for name in (RECORDED, "emulated-h100"):
        shutil.copytree(DATA / "recorded" / name, tmp_path / name / "run")
        (tmp_path / name / "run" / "rendered").mkdir()
        (tmp_path / name / "run" / "rendered" / "project_reproduce.html").touch()
    batch.write_pages(tmp_path)
    for name in ("index", "comparison"):
        for viewport in (DESK, PHONE):
            with offline(browser, tmp_path / f"{name}.html", viewport) as page:
                page.screenshot(path=artefacts / f"batch-{name}-{viewport['width']}.png", full_page=True)
                assert stays_in_its_width(page) and serious(page) == []
