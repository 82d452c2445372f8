"""What an executed notebook says of itself: what it and its cells took, and of what it is an execution."""

import functools
import hashlib
import sysconfig
from pathlib import Path

import nbformat

from companion import kernels


def note(notebook: nbformat.NotebookNode, about: dict[str, object], cells: dict[int, kernels.Spent]) -> None:
    """Writes into an executed notebook's metadata what it and each of its cells took, and what it is an
    execution of.
    """
    notebook.metadata.setdefault("companion", {})["run"] = about
    for number, spent in cells.items():
        took = {"seconds": round(spent.seconds, 3), "cpu_seconds": round(spent.cpu_seconds, 3)}
        notebook.cells[number].metadata["companion"] = took


def fingerprint(notebook: nbformat.NotebookNode) -> str:
    """SHA-256 of all that an execution depends on: the code, this package, and the versions that are
    installed.
    """
    files = [path for path in sorted(Path(__file__).parent.rglob("*")) if path.suffix in (".py", ".json")]
    package = [path.read_text(encoding="utf-8") for path in files]
    return hashlib.sha256("\0".join([source_hash(notebook), *package, *_installed()]).encode()).hexdigest()


@functools.cache
def _installed() -> list[str]:
    from importlib.metadata import distributions

    # Not what is on sys.path: setuptools adds packages of its own to it.
    folders = [sysconfig.get_path(kind) for kind in ("purelib", "platlib")]
    return sorted({f"{found.name} {found.version}" for found in distributions(path=folders)})


def source_hash(notebook: nbformat.NotebookNode) -> str:
    """SHA-256 of the notebook's code cells; kept in its metadata, it tells whether the stored outputs belong
    to this code.
    """
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\0".join(cells).encode()).hexdigest()


def tidy(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Takes out what is of no use once a run is over: progress bars, and the tools' notes with times and
    paths.
    """
    for name in ("widgets", "papermill"):
        notebook.metadata.pop(name, None)
    for cell in notebook.cells:
        for name in ("papermill", "execution"):
            cell.metadata.pop(name, None)
        if cell.cell_type == "code":
            cell.outputs = [
                o for o in cell.outputs if "application/vnd.jupyter.widget-view+json" not in o.get("data", {})
            ]
    return notebook
