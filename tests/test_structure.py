"""The package on this stack: what it is made of, who may import whom, and what importing it costs."""

import ast
import subprocess
from importlib.metadata import version
from pathlib import Path

import cells
import nbformat
import pytest
from conftest import ROOT
from test_project import PROJECT, pinned

from companion import stacks

# Each room, and the rooms that it may import: the ground floor from the bottom, techniques, the roof.
# Techniques may use all of the ground floor; TECHNIQUES has what they may use besides.
GROUND = {
    "stacks": (),
    "host": (),
    "scratch": (),
    "tables": (),
    "models": (),
    "parity": (),
    "modules": (),
    "dispatch": (),
    "memory": ("dispatch",),
    "checkpoint": (),
    "randomness": (),
    "datasets": (),
    "checks": ("datasets", "host"),
    "schedules": (),
    "timetables": ("schedules",),
    "devices": ("host", "stacks"),
    "data": ("datasets",),
    "machine": ("devices", "host", "tables"),
    "measure": ("devices", "host", "modules", "dispatch"),
    "launch": ("devices", "host", "scratch"),
    "stored": ("machine",),
    "tracing": ("modules", "randomness"),
    "stages": ("modules", "tracing"),
    "splitting": ("measure", "modules", "stages", "tracing"),
    "collectives": ("launch", "measure"),
    "sharded_checkpoint": (),
    "recipe": ("data",),
    "training": ("checkpoint", "data", "devices", "modules", "randomness", "recipe"),
    "figures": ("measure",),
    "pictures": ("datasets", "figures"),
    "plots": ("figures", "measure", "tables", "training"),
    "traces": (),
    "tradeoffs": ("figures", "measure"),
    "diagrams": ("figures",),
    "search_figures": ("figures", "tables"),
}
TECHNIQUES = {
    "xla_counts": (),
    "xla_diagnosis": ("xla_counts",),
    "tpu": ("xla_counts", "xla_diagnosis"),
    "data_parallel": (),
    "ddp": (),
    "pipeline": (),
    "model_parallel": ("pipeline",),
    "clusters": (),
    "layouts": ("clusters",),
    "hybrid": ("ddp", "layouts", "model_parallel", "pipeline"),
    "hybrid_steps": ("hybrid", "layouts"),
    "hybrid_plan": ("clusters", "hybrid_steps", "layouts"),
    "hybrid_machine": ("clusters", "hybrid_plan", "hybrid_steps", "layouts"),
    "hybrid_figures": ("layouts",),
    "multi_machine": ("ddp",),
    "network": (),
    "machines": ("network",),
    "recoveries": ("machines", "multi_machine", "network"),
    "cluster_scripts": (),
    "ray_session": (),
    "ray_trials": (),
    "ray_results": (),
    "ray_callbacks": ("ray_results",),
    "ray_tune": ("ray_callbacks", "ray_results", "ray_session", "ray_trials"),
    "compiler": (),
    "attention": (),
    "fusing": (),
    "low_bits": (),
    "quantized": (),
    "quantization": ("attention", "fusing", "quantized"),
    "quantization_pt2e": ("attention", "quantization"),
    "quantization_errors": ("quantization",),
    "quantization_peers": ("quantization",),
    "quantization_compare": ("quantization", "quantization_peers", "quantization_pt2e"),
    "pruning": (),
    "pruning_channels": ("pruning",),
    "packing": (),
    "preflight_chips": (),
    "preflight_compiler": (),
    "preflight_key": (),
    "preflight_words": ("preflight_chips", "tpu"),
    "preflight_figures": ("preflight_words",),
    "preflight": ("preflight_chips", "preflight_compiler", "preflight_key", "preflight_words", "tpu"),
    "preflight_child": (),
    "artefacts": ("quantization_peers", "quantization_pt2e"),
    "variants": ("artefacts", "quantization", "quantization_compare", "quantization_pt2e"),
    "fastest_rounds": ("artefacts",),
    "fastest_making": ("fastest_rounds", "pruning_channels", "variants"),
    "fastest_found": ("artefacts",),
    "fastest": ("fastest_found", "fastest_making", "fastest_rounds", "variants"),
}
ROOF = {
    "kernels": ("host",),
    "executed": ("kernels",),
    "jobs": (),
    "ledger": ("jobs",),
    "scoreboard": ("host", "kernels", "ledger", "machine", "measure", "tables"),
    "summary": ("measure", "scoreboard", "tables"),
    "summary_figures": ("figures", "measure", "summary"),
    "advice": ("devices", "host", "measure", "memory", "summary", "tables", "training"),
    "batches": ("jobs",),
    "report": ("ledger", "scoreboard", "tables"),
    "links": ("executed", "ledger"),
    "given": (),
    "fastest_command": ("fastest", "given"),
    "preflight_command": ("given", "preflight"),
    "runner": (
        "checks",
        "executed",
        "host",
        "jobs",
        "kernels",
        "ledger",
        "machine",
        "report",
        "scoreboard",
        "stored",
    ),
    "ray_runner": ("checks", "jobs", "ledger", "ray_session", "runner", "scoreboard"),
    "__main__": (
        "batches",
        "checks",
        "devices",
        "executed",
        "fastest_command",
        "jobs",
        "ledger",
        "links",
        "machine",
        "preflight_command",
        "ray_runner",
        "runner",
        "summary",
    ),
}
LINES = 300


def imported(source: str) -> set[str]:
    """The rooms of the package that some code imports, wherever it does."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("companion.")}
        elif isinstance(node, ast.ImportFrom) and node.module == "companion":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("companion."):
            found.add(node.module.split(".")[1])
        assert not (isinstance(node, ast.ImportFrom) and node.level), "relative imports are not used here"
    return found


def allowed(room: str) -> set[str]:
    if room in TECHNIQUES:
        return {*GROUND, *TECHNIQUES[room]}
    return set({**GROUND, **ROOF}[room])


def rooms() -> dict[str, list[Path]]:
    """The files of each room: a module, or a folder of them."""
    found: dict[str, list[Path]] = {}
    for path in sorted((ROOT / "companion").rglob("*.py")):
        name = path.relative_to(ROOT / "companion").parts[0].removesuffix(".py")
        if name != "__init__":
            found.setdefault(name, []).append(path)
    return found


@pytest.mark.parametrize("room", sorted(rooms()))
def test_imports_run_downward_only(room):
    source = "\n".join(path.read_text() for path in rooms()[room])
    above = imported(source) - allowed(room) - {room}
    assert not above, f"{room} may not import {', '.join(above)}: see the tables in this file"


def test_the_tables_have_no_circle():
    below: set[str] = set()
    for room, uses in {**GROUND, **TECHNIQUES, **ROOF}.items():
        assert set(uses) <= below | set(TECHNIQUES), f"{room} uses a room that stands above it"
        below.add(room)
    for room, uses in TECHNIQUES.items():
        assert not [other for other in uses if room in TECHNIQUES[other]]


@pytest.mark.parametrize("path", cells.NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_imports_the_ground_its_own_technique_and_what_that_may_use(path):
    number, technique = path.stem.split("_", 1)
    own = {technique, *TECHNIQUES.get(technique, ())} | {room for room in TECHNIQUES if technique in room}
    # Threads are compared with processes; weights of few bits belong to 08, and 09 packs them.
    compares = {"05": {"clusters"}, "06": {"cluster_scripts", "machines", "network", "recoveries"}}
    compares |= {
        "01": {"preflight", "preflight_figures"},
        "02": {"ddp"},
        "04": {"ddp"},
        "10": {"fastest", "quantization"},
    }
    compares |= {"08": {"artefacts", "fastest", "low_bits"}}
    compares |= {"09": {"fastest", "low_bits", "packing", "quantization"}}
    source = "\n".join(cells.plain(cell.source) for cell in cells.code(nbformat.read(path, 4)))
    beyond = imported(source) - {*GROUND, *ROOF} - own - compares.get(number, set())
    assert not beyond, f"it uses other techniques: {', '.join(beyond)}"


def test_an_import_in_any_form_is_found():
    forms = ("import companion.ddp", "from companion import data, ddp as d", "from companion.ddp import wrap")
    assert all("ddp" in imported(f"def f():\n    {form}") for form in forms)


def test_no_module_is_long():
    paths = [path for files in rooms().values() for path in files]
    assert not [path.name for path in paths if len(path.read_text().splitlines()) > LINES]


def test_what_is_installed_is_one_of_the_stacks():
    for name in ("torch", "torchvision", "numpy", "jupyterlab", "papermill", "nbval"):
        assert version(name).split("+")[0] == pinned(name, stacks.current())


def test_importing_the_companion_imports_nothing_heavy(python, root):
    code = (
        "import sys; before = set(sys.modules); import companion; new = set(sys.modules) - before;"
        "assert not {'torch', 'numpy', 'matplotlib'} & new; assert len(new) < 10, new"
    )
    subprocess.run([*python, "-c", code], check=True, cwd=root)


def test_the_companion_gives_its_modules_and_version():
    import companion

    assert companion.__version__ == PROJECT["version"]
    assert set(companion.MODULES) == set(rooms()) - {"__main__"}
    assert set(companion.MODULES) <= set(dir(companion))
    assert all(getattr(companion, name).__name__ == f"companion.{name}" for name in companion.MODULES)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        companion.nonsense  # noqa: B018


def test_what_notebooks_use_needs_no_package_that_runs_them(python, root):
    built = set(rooms())
    rooms_of_notebooks = [
        *GROUND,
        *(room for room in TECHNIQUES if room in built),
        "scoreboard",
        "summary",
        "summary_figures",
        "advice",
    ]
    runners = ("nbformat", "nbclient", "papermill", "nbconvert", "yaml", "jupyter_client")
    code = f"import sys; sys.modules |= dict.fromkeys({runners})\nimport companion\n"
    code += f"for name in {rooms_of_notebooks}: getattr(companion, name)"
    subprocess.run([*python, "-W", "ignore", "-c", code], check=True, cwd=root)
