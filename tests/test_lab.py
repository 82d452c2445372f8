"""JupyterLab as a reader uses it: a real browser opens notebooks, runs all cells, and interrupts a training.

Needs a Chromium or Chrome. Here one notebook is run; with COMPANION_LAB=all every one (`make test-lab`).
"""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import psutil
import pytest
from cells import NOTEBOOKS, code
from conftest import ROOT
from nbformat.v4 import new_code_cell, new_notebook

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
QUICK = ["10_scoreboard"]
SHOWN = [path.stem for path in NOTEBOOKS if os.environ.get("COMPANION_LAB") == "all" or path.stem in QUICK]
MINUTES = 10
# Whether the open notebook has run to its end, or to an error. A kernel's state does not tell: it is called
# idle when a progress bar's message was answered, in mid-cell.
ENDED = """() => {
    const cells = [...jupyterapp.shell.currentWidget.content.model.cells].filter(cell => cell.type === 'code')
    const outputs = cells.flatMap(cell => cell.outputs.toJSON())
    const failed = outputs.some(output => output.output_type === 'error')
    return failed || cells.every(cell => cell.executionCount !== null)
}"""
pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(BROWSER is None, reason="needs chromium or google-chrome (apt-get install chromium)"),
    pytest.mark.filterwarnings("default"),  # what the browser's driver leaves open
]


class Lab:
    """A running JupyterLab on copies of the notebooks."""

    def __init__(self, folder: Path):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.folder, self.token, self.address = folder, secrets.token_hex(16), f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}"]
        command += ["--ServerApp.port_retries=0", f"--notebook-dir={folder}", "--allow-root"]
        command += ["--LabApp.expose_app_in_browser=True"]
        self.process = subprocess.Popen(
            command,
            env=os.environ | {"JUPYTER_TOKEN": self.token},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.wait(lambda: self.ask("status"), 60, "the server does not answer")

    def ask(self, what: str):
        request = urllib.request.Request(f"{self.address}/api/{what}")
        request.add_header("Authorization", f"token {self.token}")
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return json.load(answer)
        except OSError:
            return None

    def wait(self, ready, seconds: float, what: str):
        give_up = time.monotonic() + seconds
        while not (found := ready()):
            assert time.monotonic() < give_up, what
            assert self.process.poll() is None, "the server has ended"
            time.sleep(0.5)
        return found

    def idle(self) -> bool:
        """Whether the only kernel is idle, and stays so for a moment."""
        for _ in range(4):
            kernels = self.ask("kernels")
            if not kernels or kernels[0]["execution_state"] != "idle":
                return False
            time.sleep(0.5)
        return True

    def ranks(self) -> list[psutil.Process]:
        """The processes that were forked by a kernel's server of ranks."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if "forkserver" in " ".join(process.parent().cmdline()):
                    found.append(process)
            except (psutil.Error, AttributeError):  # it has ended since
                continue
        return found

    def end(self) -> None:
        family = psutil.Process(self.process.pid).children(recursive=True)
        self.process.terminate()
        self.process.wait(30)
        for process in psutil.wait_procs(family, 10)[1]:
            process.kill()


@pytest.fixture
def lab(tmp_path):
    shutil.copytree(
        ROOT / "notebooks", tmp_path / "notebooks", ignore=shutil.ignore_patterns("results", "data")
    )
    lab = Lab(tmp_path / "notebooks")
    yield lab
    lab.end()


@pytest.fixture
def page():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.faults = []
        page.on("pageerror", lambda error: page.faults.append(str(error)))
        yield page
        browser.close()


def opened(page, lab: Lab, name: str) -> None:
    page.goto(f"{lab.address}/lab/tree/{name}?token={lab.token}&reset", timeout=60_000)
    page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=60_000)
    lab.wait(lambda: lab.ask("kernels"), 60, "no kernel was started")
    lab.wait(lab.idle, 60, "the kernel is not ready")


def run_all(page) -> None:
    page.locator(".lm-MenuBar-itemLabel", has_text="Run").first.click()
    page.get_by_text("Run All Cells", exact=True).click()


def saved(page, lab: Lab, name: str) -> nbformat.NotebookNode:
    before = (lab.folder / name).stat().st_mtime_ns
    page.keyboard.press("Control+s")
    lab.wait(lambda: (lab.folder / name).stat().st_mtime_ns > before, 60, "it was not saved")
    time.sleep(0.5)
    return nbformat.read(lab.folder / name, 4)


@pytest.mark.parametrize("stem", SHOWN)
def test_all_cells_run_and_the_figures_are_there(stem, page, lab):
    name = f"{stem}.ipynb"
    opened(page, lab, name)
    run_all(page)
    lab.wait(lambda: not page.evaluate(ENDED), 30, "nothing runs")
    lab.wait(lambda: page.evaluate(ENDED), 60 * MINUTES, f"{stem} runs for more than {MINUTES} minutes")
    if folder := os.environ.get("COMPANION_SCREENSHOTS"):
        page.screenshot(path=Path(folder, f"{stem}.png"))
    ran, stored = saved(page, lab, name), nbformat.read(ROOT / "notebooks" / name, 4)
    for cell, before in zip(code(ran), code(stored), strict=True):
        errors = [f"{one.ename}: {one.evalue}" for one in cell.outputs if one.output_type == "error"]
        assert not errors, f"{errors} in {cell.source}"
        assert cell.execution_count, f"not run: {cell.source}"
        kinds = {kind for output in before.outputs for kind in output.get("data", {})}
        now = {kind for output in cell.outputs for kind in output.get("data", {})}
        assert ("image/png" in kinds) <= ("image/png" in now), f"no figure: {cell.source}"
    assert page.locator(".jp-Dialog").count() == 0, "a dialog is open"
    assert not page.faults, page.faults


TRAINING = """
import torch.distributed as dist
import torch
from torch import nn
from companion import launch

def forever():
    model = nn.parallel.DistributedDataParallel(nn.Linear(10, 10))
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    while True:
        optimizer.zero_grad()
        model(torch.randn(8, 10)).sum().backward()
        optimizer.step()
"""


def test_an_interrupt_in_mid_training_leaves_no_worker(page, lab):
    cells = [new_code_cell(TRAINING.strip()), new_code_cell("launch.run(forever, 2)")]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(new_notebook(cells=cells, metadata=kernel), lab.folder / "training.ipynb")
    opened(page, lab, "training.ipynb")
    run_all(page)
    lab.wait(lambda: len(lab.ranks()) == 2, 60, "no ranks were started")
    time.sleep(3)  # in the middle
    page.locator(".lm-MenuBar-itemLabel", has_text="Kernel").first.click()
    page.get_by_text("Interrupt Kernel", exact=True).click()
    lab.wait(lambda: page.evaluate(ENDED), 60, "the kernel was not interrupted")
    lab.wait(lambda: not lab.ranks(), 15, "ranks are left")
    (error,) = code(saved(page, lab, "training.ipynb"))[1].outputs[-1:]
    assert error.output_type == "error"
    assert error.ename == "KeyboardInterrupt"
