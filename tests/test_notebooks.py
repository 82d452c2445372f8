"""What every notebook must have and do.

A new notebook is found by itself; it adds its smaller parameters and its mutations.
"""

import ast
import re
import tomllib
from pathlib import Path

import cells
import mutating
import nbformat
import pytest
import times
import warm
from cells import CHECKED, NOTEBOOKS, PARAMETERS, ROOT, SETTINGS, code, proofs, tagged

from companion import devices, executed, jobs, runner, scoreboard

ADDRESS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
MUST_RUN = {"01_tpu": ("xla",)}  # without these a notebook shows stored results, which nothing can break


def texts(cell: nbformat.NotebookNode) -> list[str]:
    """The cell's outputs that hold text."""
    found = []
    for output in cell.outputs:
        found += [output.get("text", "")] + [
            v for kind, v in output.get("data", {}).items() if not kind.startswith("image/")
        ]
    return found


def problems(path: Path) -> list[str]:
    """What a notebook lacks of what every one must have, as stored, without running it."""
    notebook = nbformat.read(path, 4)
    listed, found = code(notebook), []
    source = "\n".join(cell.source for cell in listed)
    if not re.search(r"^\s*(from|import) companion\b", source, re.MULTILINE):
        found.append("does not import companion")

    parameters = tagged(notebook, PARAMETERS)
    if len(parameters) != 1:
        found.append(f"has {len(parameters)} parameters cells")
    for line in [line for cell in parameters for line in cell.source.splitlines()]:
        if not re.fullmatch(r"\w+: (int|float|str|bool) = .+  # .+", line):
            found.append(f"untyped or uncommented parameter: {line}")

    proved, checked = proofs(notebook), tagged(notebook, CHECKED)
    if not [cell for cell in proved.values() if CHECKED in cell.metadata.tags]:
        found.append("has no compared proof")
    for cell in proved.values():
        if not any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(cell.source))):
            found.append("a proof asserts nothing")
    if len(checked) < 5:
        found.append(f"compares {len(checked)} cells, not five")
    if not all(cell.outputs for cell in checked):
        found.append("a compared cell has no stored output")

    stamp = notebook.metadata.get("companion", {})
    if stamp.get("source_sha256") != executed.source_hash(notebook) or not stamp.get("environment", {}).get(
        "versions"
    ):
        found.append("stored outputs are not of the stored code: run make store")
    if not all(cell.execution_count for cell in listed if cell.source.strip()):
        found.append("a cell was not run")
    for output in [output for cell in listed for output in cell.outputs]:
        if output.output_type == "error":
            found.append(f"an output is an error: {output.evalue}")
        if output.get("name") == "stderr":
            found.append(f"an output is a warning: {output.text}")
    for text in [text for cell in listed for text in texts(cell)]:
        if re.search(r"(?<![\w.:/<])(/(?!bin/|dev/|proc/|sys/)\w[\w.-]*){2,}|[A-Z]:\\\w", text):
            found.append(f"a path of a machine in an output: {text}")

    known, flow = set(), [cells.names(cell.source) for cell in listed]
    ever = set().union(*(bound for bound, _ in flow))
    for bound, read in flow:
        late = ever & read - known
        found += [f"{name} is read by a cell above the one that binds it" for name in sorted(late)]
        known |= bound

    if path.stat().st_size >= 2**20:
        found.append("is larger than 1 MiB")
    if sum("image/png" in output.get("data", {}) for cell in listed for output in cell.outputs) < 3:
        found.append("has fewer than three figures")
    project = ADDRESS.removeprefix("https://github.com/")
    for link in (
        f"colab.research.google.com/github/{project}/blob/main/notebooks/{path.name}",
        f"mybinder.org/v2/gh/{project}/main?labpath=notebooks/{path.name}",
    ):
        if link not in notebook.cells[0].source:
            found.append(f"its first cell does not link to {link}")
    if f"git+{ADDRESS}" not in source:
        found.append("does not install companion from the project's address in Colab")
    return found


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request) -> Path:
    return request.param


def test_there_are_notebooks():
    assert NOTEBOOKS


def test_it_has_what_every_notebook_must_have(path):
    assert problems(path) == []


def _retag(notebook, tag):
    for cell in notebook.cells:
        cell.metadata.tags = [name for name in cells.tags(cell) if not name.startswith(tag)]


def _output(notebook, output):
    code(notebook)[-1].outputs.append(nbformat.from_dict(output))


DAMAGES = {
    "does not import companion": lambda nb: [
        cell.update(source=cell.source.replace("companion", "other")) for cell in nb.cells
    ],
    "has 0 parameters cells": lambda nb: _retag(nb, PARAMETERS),
    "untyped or uncommented parameter": lambda nb: tagged(nb, PARAMETERS)[0].update(source="epochs = 3"),
    "has no compared proof": lambda nb: _retag(nb, cells.PROOF),
    "a proof asserts nothing": lambda nb: next(iter(proofs(nb).values())).update(source="print('proved')"),
    "compares 0 cells, not five": lambda nb: _retag(nb, CHECKED),
    "a compared cell has no stored output": lambda nb: tagged(nb, CHECKED)[0].update(outputs=[]),
    "stored outputs are not of the stored code": lambda nb: next(iter(proofs(nb).values())).update(
        source="assert True"
    ),
    "a cell was not run": lambda nb: code(nb)[-1].update(execution_count=None),
    "an output is an error": lambda nb: _output(
        nb, {"output_type": "error", "ename": "ValueError", "evalue": "wrong", "traceback": []}
    ),
    "an output is a warning": lambda nb: _output(
        nb, {"output_type": "stream", "name": "stderr", "text": "careful"}
    ),
    "a path of a machine": lambda nb: _output(
        nb, {"output_type": "stream", "name": "stdout", "text": "in /home/me/x.py"}
    ),
    "late_name is read by a cell above": lambda nb: (
        code(nb)[-2].update(source="def early():\n    return late_name"),
        code(nb)[-1].update(source="late_name = 1"),
    ),
    "is larger than 1 MiB": lambda nb: _output(
        nb, {"output_type": "stream", "name": "stdout", "text": "x" * 2**20}
    ),
    "has fewer than three figures": lambda nb: [cell.update(outputs=[]) for cell in code(nb)],
    "its first cell does not link to": lambda nb: nb.cells[0].update(source="# A question?"),
}


@pytest.mark.parametrize("problem", DAMAGES)
def test_what_a_notebook_lacks_is_found(problem, tmp_path):
    notebook = nbformat.read(NOTEBOOKS[0], 4)
    DAMAGES[problem](notebook)
    nbformat.write(notebook, tmp_path / NOTEBOOKS[0].name)
    assert [found for found in problems(tmp_path / NOTEBOOKS[0].name) if found.startswith(problem)]


@pytest.fixture(scope="module")
def server():
    server = warm.Server()
    yield server
    server.stop()


def measured(
    server: warm.Server, stem: str, kind: str, notebook: nbformat.NotebookNode, folder: Path
) -> warm.Run:
    """Runs cells of a notebook with the smaller parameters, and notes what they took."""
    cells.set_parameters(notebook, SETTINGS["smaller"].get(stem, {}) | {"results_dir": "."})
    run = server.run(notebook, folder)
    times.add("notebook", f"{stem}, {kind}", run.seconds, run.cpu_seconds)
    return run


def test_it_runs_with_other_parameters(path, tmp_path):
    smaller, known = SETTINGS["smaller"][path.stem], jobs.parameters(path)
    assert set(smaller) <= set(known)
    assert sum(value != known[name].value for name, value in smaller.items()) >= 3
    (outcome,) = runner.run([runner.Job(path, smaller, "out")], tmp_path, progress=False)
    times.add("notebook", f"{path.stem}, smaller", outcome.seconds, outcome.cpu_seconds)
    assert outcome.error is None
    rows = scoreboard.read(tmp_path)
    assert any(row["status"] == "measured" and row["notebook"] == path.stem for row in rows)
    readme = (ROOT / "README.md").read_text()
    for row in rows:
        if row["status"] != "measured":
            assert row["status"].removeprefix("skipped: ") in readme, (
                f"README.md does not name the skip {row['status']!r}"
            )
    found = nbformat.read(tmp_path / "out.ipynb", 4)
    assert not [output for cell in code(found) for output in cell.outputs if output.get("name") == "stderr"]
    times.within_budget(path.stem, "smaller", outcome.cpu_seconds)


def test_compared_cells_do_not_depend_on_the_number_of_repetitions(path):
    notebook, fewer = nbformat.read(path, 4), set(SETTINGS["fewer"].get(path.stem, {}))
    assert fewer <= set(jobs.parameters(path))
    without_effect = set(SETTINGS["no_effect"].get(path.stem, []))
    assert without_effect <= fewer
    fewer -= without_effect
    for checked in tagged(notebook, CHECKED):
        read = set().union(*(cells.names(cell.source)[1] for cell in cells.needed(notebook, checked)))
        assert not read & fewer, f"{checked.source[:60]!r} depends on {read & fewer}"


def slice_of(notebook: nbformat.NotebookNode, *wanted: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook with the parameters, the wanted cells, and those that they need."""
    keep = {id(cell) for cell in cells.needed(notebook, *tagged(notebook, PARAMETERS), *wanted)}
    notebook.cells = [cell for cell in notebook.cells if id(cell) in keep]
    return notebook


def must_run(name: str) -> None:
    for what in MUST_RUN.get(name, ()):
        if reason := devices.why_not(what):
            pytest.skip(f"only stored results are shown: {reason}")


def test_nothing_broken_passes_all_proofs(path, server, tmp_path):
    """The control of the mutations: the same slices of the notebook, unbroken."""
    notebook = nbformat.read(path, 4)
    whole = slice_of(notebook, *proofs(notebook).values())
    assert measured(server, path.stem, "all proofs", whole, tmp_path).error is None


MUTATIONS = {path.stem: mutating.mutations(path.stem) for path in NOTEBOOKS}
BROKEN = [
    (stem, name, proof) for stem, found in MUTATIONS.items() for name in found for proof in found[name].proofs
]
BROKEN = [pytest.param(*case, id=" ".join(case)) for case in BROKEN]


def test_each_proof_has_a_mutation_that_it_must_catch(path):
    caught = {proof for found in MUTATIONS[path.stem].values() for proof in found.proofs}
    assert caught == set(proofs(nbformat.read(path, 4))), (
        "break the technique for each proof in tests/mutations"
    )


@pytest.mark.parametrize(("stem", "name", "proof"), BROKEN)
def test_a_broken_technique_fails_its_proof(stem, name, proof, server, tmp_path):
    must_run(stem)
    mutation, original = MUTATIONS[stem][name], nbformat.read(ROOT / "notebooks" / f"{stem}.ipynb", 4)
    notebook = slice_of(original, proofs(original)[proof])
    places = [
        i for i, cell in enumerate(notebook.cells) if mutation.before and mutation.before in cell.source
    ]
    after_parameters = notebook.cells.index(tagged(notebook, PARAMETERS)[0]) + 1
    (place,) = places if mutation.before else [after_parameters]
    notebook.cells.insert(place, nbformat.v4.new_code_cell(mutating.cell(stem, name)))
    run = measured(server, stem, f"broken: {name}", notebook, tmp_path)
    assert run.error is not None, f"{proof} passes although: {mutation.__doc__}"
    assert run.error.startswith("AssertionError")
    assert cells.PROOF + proof in cells.tags(code(notebook)[run.failed]), "another cell failed"
    times.within_budget(stem, "mutated", run.cpu_seconds)
