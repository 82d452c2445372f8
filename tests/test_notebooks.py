"""What every notebook must have and do. A new notebook is found by itself; it adds its smaller parameters and its mutations."""

import ast
import re
import tomllib
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT

from companion import runner, scoreboard

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SMALLER = tomllib.loads((ROOT / "tests" / "parameters.toml").read_text())
CHECKED, PROOF = "nbval-check-output", "proof"

# Code that breaks a notebook's technique, run before its first proof; a proof must then fail.
MUTATIONS = {
    "00_baseline": {
        "a window starts one pixel too far in each further row": """
            crops = data.crops
            def wrong(images, augment):
                views, (image, row) = crops(images, augment)
                return views, (image, row + 1)
            data.crops = wrong
        """,
        "labels are one batch behind their images": """
            data.Batches.__iter__ = (lambda plain: lambda self: zip(
                [x for x, _ in plain(self)], [y.roll(1) for _, y in plain(self)]))(data.Batches.__iter__)
        """,
    },
}


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tagged(notebook: nbformat.NotebookNode, tag: str) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request) -> Path:
    return request.param


@pytest.fixture
def notebook(path) -> nbformat.NotebookNode:
    return nbformat.read(path, 4)


def texts(cell: nbformat.NotebookNode) -> list[str]:
    """The cell's outputs that hold text."""
    found = []
    for output in cell.outputs:
        found += [output.get("text", "")] + [v for kind, v in output.get("data", {}).items() if not kind.startswith("image/")]
    return found


def test_there_are_notebooks():
    assert NOTEBOOKS


def test_it_imports_the_companion_and_has_parameters_and_a_proof(notebook):
    source = "\n".join(cell.source for cell in code_cells(notebook))
    assert re.search(r"^\s*(from|import) companion\b", source, re.MULTILINE)
    (parameters,) = tagged(notebook, "parameters")
    for line in parameters.source.splitlines():
        assert re.fullmatch(r"\w+: (int|float|str|bool) = .+  # .+", line), f"untyped or uncommented parameter: {line}"
    assert tagged(notebook, PROOF)
    for cell in tagged(notebook, PROOF):
        assert any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(cell.source)))


def test_enough_cells_are_compared_and_each_has_a_stored_output(notebook):
    checked = tagged(notebook, CHECKED)
    assert len(checked) >= 5
    assert all(cell.outputs for cell in checked), "a compared cell has no stored output"
    assert all(CHECKED in cell.metadata.tags for cell in tagged(notebook, PROOF))


def test_stored_outputs_are_of_the_stored_code(notebook):
    assert notebook.metadata.companion.source_sha256 == runner.source_hash(notebook), "run: make store"
    assert {"cpu", "cores", "threads", "versions"} <= set(notebook.metadata.companion.environment)
    assert all(cell.execution_count for cell in code_cells(notebook) if cell.source.strip())


def test_stored_outputs_are_clean(notebook):
    for cell in code_cells(notebook):
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr", f"a reader would see: {output.text}"
        for text in texts(cell):
            assert not re.search(r"(?<![\w.:/<])(/(?!dev/|proc/|sys/)\w[\w.-]*){2,}|[A-Z]:\\\w", text), f"a path in: {text}"


def test_it_is_small_and_has_figures(path, notebook):
    assert path.stat().st_size < 2**20
    images = [
        kind for cell in code_cells(notebook) for o in cell.outputs for kind in o.get("data", {}) if kind.startswith("image/")
    ]
    assert len(images) >= 3


def test_it_has_badges_that_lead_to_it(path, notebook):
    address = re.search(r'Repository = "https://github.com/(.+)"', (ROOT / "pyproject.toml").read_text())[1]
    title = notebook.cells[0].source
    assert f"colab.research.google.com/github/{address}/blob/main/notebooks/{path.name}" in title
    assert f"mybinder.org/v2/gh/{address}/main?labpath=notebooks/{path.name}" in title
    assert f"git+https://github.com/{address}" in "\n".join(cell.source for cell in code_cells(notebook))


def test_it_runs_with_other_parameters(path, tmp_path):
    known = runner.parameters(path)
    assert set(SMALLER[path.stem]) <= set(known)
    changed = [name for name, value in SMALLER[path.stem].items() if value != ast.literal_eval(known[name]["default"])]
    assert len(changed) >= 3
    (outcome,) = runner.run([runner.Job(path, SMALLER[path.stem], path.stem)], tmp_path, progress=False)
    assert outcome.error is None
    rows = scoreboard.read(tmp_path)
    assert any(row["status"] == "measured" and row["notebook"] == path.stem for row in rows)
    readme = (ROOT / "README.md").read_text()
    for row in rows:
        if row["status"] != "measured":
            assert row["status"].removeprefix("skipped: ") in readme, f"README.md does not name the skip {row['status']!r}"
    executed = nbformat.read(tmp_path / path.name, 4)
    assert not [output for cell in code_cells(executed) for output in cell.outputs if output.get("name") == "stderr"]


@pytest.mark.parametrize(
    ("name", "mutation"), [(path.stem, mutation) for path in NOTEBOOKS for mutation in MUTATIONS.get(path.stem, [None])]
)
def test_a_broken_technique_fails_its_proof(name, mutation, tmp_path):
    assert mutation, f"MUTATIONS has none for {name}: break its technique on purpose"
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4)
    lines = MUTATIONS[name][mutation].strip("\n").splitlines()
    indent = len(lines[0]) - len(lines[0].lstrip())
    proof = notebook.cells.index(tagged(notebook, PROOF)[0])
    notebook.cells.insert(proof, nbformat.v4.new_code_cell("\n".join(line[indent:] for line in lines)))
    nbformat.write(notebook, tmp_path / "mutated.ipynb")
    error = runner.execute(runner.Job(tmp_path / "mutated.ipynb", SMALLER[name], "out"), tmp_path)
    executed = nbformat.read(tmp_path / "out.ipynb", 4)
    failed = [cell for cell in code_cells(executed) if any(output.output_type == "error" for output in cell.outputs)]
    assert error is not None, "the proof passes although the technique is broken"
    assert error.startswith("AssertionError")
    assert all(PROOF in cell.metadata.get("tags", []) for cell in failed)
