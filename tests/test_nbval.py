"""nbval executes what is stale and compares what `make run` has executed; both find an output that is not the
stored one.
"""

import shutil
import subprocess

import cells
import nbformat
import nbval_copies
import pytest
import times
from conftest import ROOT
from test_runner import write

from companion import executed, runner

pytestmark = pytest.mark.once


@pytest.fixture
def project(tmp_path):
    """A project with one notebook, whose outputs are stored and which has been executed as `make run` does
    it.
    """
    (tmp_path / "notebooks").mkdir()
    path = tmp_path / "notebooks" / "00_works.ipynb"
    write(path.parent, path.stem, "print(epochs)", "open('executed', 'a').close()")
    notebook = nbformat.read(path, 4)
    notebook.cells[2].metadata.tags = [cells.CHECKED]
    needs = "# **Needs** about 1 minutes and 1.0 GiB on a 2-core CPU\n"
    notebook.cells[0].source = needs + notebook.cells[0].source
    nbformat.write(notebook, path)
    assert runner.store(path, tmp_path / "stored") is None
    (outcome,) = runner.run([runner.Job(path, {}, path.stem)], tmp_path / "results" / "first", progress=False)
    assert outcome.error is None
    (tmp_path / "results" / "first" / "executed").unlink()
    return tmp_path


def nbval(project, python) -> tuple[int, str, bool]:
    """The exit code, what was printed, and whether the notebook was executed."""
    folder = project / "results" / "nbval"
    folder.mkdir(exist_ok=True)
    shutil.copy(project / "notebooks" / "00_works.ipynb", folder)
    options = [
        "-p",
        "no:cacheprovider",
        "-p",
        "tests.nbval_copies",
        "--nbval-lax",
        "--nbval-current-env",
        str(folder),
    ]
    done = subprocess.run([*python, "-m", "pytest", *options], cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout, (folder / "executed").exists()


def change(project, number: int, **what):
    path = project / "notebooks" / "00_works.ipynb"
    notebook = nbformat.read(path, 4)
    notebook.cells[number].update(what)
    nbformat.write(notebook, path)


def test_what_has_been_executed_is_only_compared(project, python):
    code, printed, ran = nbval(project, python)
    assert code == 0, printed
    assert not ran
    change(project, 2, outputs=[nbformat.v4.new_output("stream", text="4\n")])
    code, printed, ran = nbval(project, python)
    assert code == 1
    assert "Cell outputs differ" in printed
    assert not ran


def test_what_is_stale_is_executed(project, python):
    change(project, 3, source="open('executed', 'a').close()  # changed")
    code, printed, ran = nbval(project, python)
    assert code == 0, printed
    assert ran
    change(project, 2, source="print(epochs + 1)")
    code, printed, ran = nbval(project, python)
    assert code == 1
    assert "Cell outputs differ" in printed


def test_only_an_execution_at_the_defaults_that_passed_counts(project, monkeypatch):
    path = project / "notebooks" / "00_works.ipynb"
    assert nbval_copies.executed(path)
    copy = project / "results" / "first" / "00_works.ipynb"
    for damage in ({"error": "it failed"}, {"parameters": {"epochs": 1}}, {"of": "another"}):
        notebook = nbformat.read(copy, 4)
        before = dict(notebook.metadata.companion.run)
        notebook.metadata.companion.run.update(damage)
        nbformat.write(notebook, copy)
        assert nbval_copies.executed(path) is None
        notebook.metadata.companion.run = before
        nbformat.write(notebook, copy)
    assert nbval_copies.executed(path)
    monkeypatch.setattr(executed, "_installed", lambda: ["torch 9.9"])
    assert nbval_copies.executed(path) is None


def test_budgets_are_held_with_room_for_noise():
    budget = cells.SETTINGS["cpu_seconds"]["smaller"]
    times.within_budget("02_data_parallel", "smaller", 0.95 * times.NOISE * budget)
    with pytest.raises(AssertionError, match="02_data_parallel, smaller: "):
        times.within_budget("02_data_parallel", "smaller", 1.05 * times.NOISE * budget)


def test_a_slice_has_what_a_cell_needs_and_nothing_else():
    sources = (
        "import math",
        "a = 1\nb = 2",
        "def f(x):\n    a = x\n    return a + b",
        "c = f(3)",
        "d = 4",
        "for a in [c]: print(a)",
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    needed = [cell.source for cell in cells.needed(notebook, notebook.cells[5])]
    assert needed == [sources[1], sources[2], sources[3], sources[5]]
    bound, read = cells.names("if True:\n    %pip install x\nx += y")
    assert bound == {"x"}
    assert {"x", "y"} <= read
