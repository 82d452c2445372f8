"""What every notebook must have and do. A new notebook is found by itself; it adds its smaller parameters and its mutations."""

import ast
import re
import tomllib
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT

from companion import devices, runner, scoreboard

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SMALLER = tomllib.loads((ROOT / "tests" / "parameters.toml").read_text())
ADDRESS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
CHECKED, PROOF = "nbval-check-output", "proof"
MUST_RUN = {"01_tpu": ("xla",)}  # without these a notebook shows stored results, which nothing can break
ASIDE = "aside"  # a cell that proofs can do without; mutated notebooks leave it out

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
    "01_tpu": {
        "on XLA, labels belong to other images": """
            data.Batches.__iter__ = (lambda plain: lambda self: ((x, y.roll(1)) for x, y in plain(self)))(data.Batches.__iter__)
        """,
        "no step is ever marked": """
            import contextlib, torch_xla
            torch_xla.step = contextlib.nullcontext
        """,
        "the mesh learns from other batches": """
            spmd = tpu.spmd
            tpu.spmd = lambda count, function, weights, model, batches: spmd(count, function, weights, model, batches[::-1])
        """,
    },
    "02_data_parallel": {
        "only the first replica learns": """
            right = data_parallel.replicate
            def replicate(module, places):
                return [module] + [copy.deepcopy(module) for _ in places[1:]]
            data_parallel.replicate = replicate
        """,
        "replicas' outputs come in another order": """
            right = data_parallel.gather
            data_parallel.gather = lambda outputs, place: right(outputs[::-1], place)
        """,
    },
    "03_ddp": {
        "nothing is averaged": """
            class DDP(nn.Module):
                def __init__(self, module, **options):
                    super().__init__()
                    self.module = module
                def forward(self, *inputs):
                    return self.module(*inputs)
        """,
        "gradients are added up, not averaged": """
            right = DDP
            def DDP(module, **options):
                wrapped = right(module, **options)
                def add(state, bucket):
                    return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda done: done.value()[0])
                wrapped.register_comm_hook(None, add)
                return wrapped
        """,
    },
    "04_model_parallel": {
        "the last micro-batch is dropped, the first comes twice": """
            class Pipeline(model_parallel.Pipeline):
                def step(self, images, labels):
                    piece = len(images) // self.micro_batches
                    twice = (torch.cat([part[:piece], part[:-piece]]) for part in (images, labels))
                    return super().step(*twice)
        """,
        "micro-batches are added up, not averaged": """
            class Pipeline(model_parallel.Pipeline):
                def __init__(self, stages, schedule, micro_batches):
                    loss = lambda output, labels: micro_batches * F.cross_entropy(output, labels)
                    super().__init__(stages, schedule, micro_batches, loss)
        """,
    },
}


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tagged(notebook: nbformat.NotebookNode, tag: str) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]


def texts(cell: nbformat.NotebookNode) -> list[str]:
    """The cell's outputs that hold text."""
    found = []
    for output in cell.outputs:
        found += [output.get("text", "")] + [v for kind, v in output.get("data", {}).items() if not kind.startswith("image/")]
    return found


def problems(path: Path) -> list[str]:
    """What a notebook lacks of what every one must have, as stored, without running it."""
    notebook = nbformat.read(path, 4)
    cells, found = code_cells(notebook), []
    source = "\n".join(cell.source for cell in cells)
    if not re.search(r"^\s*(from|import) companion\b", source, re.MULTILINE):
        found.append("does not import companion")

    parameters = tagged(notebook, "parameters")
    if len(parameters) != 1:
        found.append(f"has {len(parameters)} parameters cells")
    for line in [line for cell in parameters for line in cell.source.splitlines()]:
        if not re.fullmatch(r"\w+: (int|float|str|bool) = .+  # .+", line):
            found.append(f"untyped or uncommented parameter: {line}")

    proofs, checked = tagged(notebook, PROOF), tagged(notebook, CHECKED)
    if not [cell for cell in proofs if CHECKED in cell.metadata.tags]:
        found.append("has no compared proof")
    for cell in proofs:
        if not any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(cell.source))):
            found.append("a proof asserts nothing")
    if len(checked) < 5:
        found.append(f"compares {len(checked)} cells, not five")
    if not all(cell.outputs for cell in checked):
        found.append("a compared cell has no stored output")

    stamp = notebook.metadata.get("companion", {})
    if stamp.get("source_sha256") != runner.source_hash(notebook) or not stamp.get("environment", {}).get("versions"):
        found.append("stored outputs are not of the stored code: run make store")
    if not all(cell.execution_count for cell in cells if cell.source.strip()):
        found.append("a cell was not run")
    for output in [output for cell in cells for output in cell.outputs]:
        if output.output_type == "error":
            found.append(f"an output is an error: {output.evalue}")
        if output.get("name") == "stderr":
            found.append(f"an output is a warning: {output.text}")
    for text in [text for cell in cells for text in texts(cell)]:
        if re.search(r"(?<![\w.:/<])(/(?!dev/|proc/|sys/)\w[\w.-]*){2,}|[A-Z]:\\\w", text):
            found.append(f"a path of a machine in an output: {text}")

    if path.stat().st_size >= 2**20:
        found.append("is larger than 1 MiB")
    if sum("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs) < 3:
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


def _retag(notebook, tag, new):
    for cell in tagged(notebook, tag):
        cell.metadata.tags = [new if name == tag else name for name in cell.metadata.tags]


def _output(notebook, output):
    code_cells(notebook)[-1].outputs.append(nbformat.from_dict(output))


DAMAGES = {
    "does not import companion": lambda nb: [cell.update(source=cell.source.replace("companion", "other")) for cell in nb.cells],
    "has 0 parameters cells": lambda nb: _retag(nb, "parameters", "x"),
    "untyped or uncommented parameter": lambda nb: tagged(nb, "parameters")[0].update(source="epochs = 3"),
    "has no compared proof": lambda nb: _retag(nb, PROOF, "x"),
    "a proof asserts nothing": lambda nb: tagged(nb, PROOF)[0].update(source="print('proved')"),
    "compares 0 cells, not five": lambda nb: _retag(nb, CHECKED, "x"),
    "a compared cell has no stored output": lambda nb: tagged(nb, CHECKED)[0].update(outputs=[]),
    "stored outputs are not of the stored code": lambda nb: tagged(nb, PROOF)[0].update(source="assert True"),
    "a cell was not run": lambda nb: code_cells(nb)[-1].update(execution_count=None),
    "an output is an error": lambda nb: _output(
        nb, {"output_type": "error", "ename": "ValueError", "evalue": "wrong", "traceback": []}
    ),
    "an output is a warning": lambda nb: _output(nb, {"output_type": "stream", "name": "stderr", "text": "careful"}),
    "a path of a machine": lambda nb: _output(nb, {"output_type": "stream", "name": "stdout", "text": "in /home/me/x.py"}),
    "is larger than 1 MiB": lambda nb: _output(nb, {"output_type": "stream", "name": "stdout", "text": "x" * 2**20}),
    "has fewer than three figures": lambda nb: [cell.update(outputs=[]) for cell in code_cells(nb)],
    "its first cell does not link to": lambda nb: nb.cells[0].update(source="# A question?"),
}


@pytest.mark.parametrize("problem", DAMAGES)
def test_what_a_notebook_lacks_is_found(problem, tmp_path):
    notebook = nbformat.read(NOTEBOOKS[0], 4)
    DAMAGES[problem](notebook)
    nbformat.write(notebook, tmp_path / NOTEBOOKS[0].name)
    assert [found for found in problems(tmp_path / NOTEBOOKS[0].name) if found.startswith(problem)]


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
    if "xla" in MUST_RUN.get(name, ()) and (reason := devices.why_not("xla")):
        pytest.skip(f"only stored results are shown: {reason}")
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4)
    lines = MUTATIONS[name][mutation].strip("\n").splitlines()
    indent = len(lines[0]) - len(lines[0].lstrip())
    notebook.cells = [cell for cell in notebook.cells if ASIDE not in cell.metadata.get("tags", [])]
    proof = notebook.cells.index(tagged(notebook, PROOF)[0])
    notebook.cells.insert(proof, nbformat.v4.new_code_cell("\n".join(line[indent:] for line in lines)))
    nbformat.write(notebook, tmp_path / "mutated.ipynb")
    error = runner.execute(runner.Job(tmp_path / "mutated.ipynb", SMALLER[name], "out"), tmp_path)
    executed = nbformat.read(tmp_path / "out.ipynb", 4)
    failed = [cell for cell in code_cells(executed) if any(output.output_type == "error" for output in cell.outputs)]
    assert error is not None, "the proof passes although the technique is broken"
    assert error.startswith("AssertionError")
    assert all(PROOF in cell.metadata.get("tags", []) for cell in failed)
