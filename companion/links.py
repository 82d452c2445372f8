"""The project's address: kept in one place, pyproject.toml, and rewritten everywhere at once."""

import re
import tomllib
from pathlib import Path

import nbformat

from companion import executed, ledger

FILES = ("pyproject.toml", "README.md", "CITATION.cff", "CONTRIBUTING.md", "notebooks/*.ipynb", "binder/*")
_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,38}/[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def current(root: Path) -> str:
    """The project's repository as "owner/name", by pyproject.toml."""
    address = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
    return address["Repository"].removeprefix("https://github.com/")


def rewrite(root: Path, repository: str) -> list[Path]:
    """Writes another repository, "owner/name", wherever the current one stands, and gives the files that have
    changed. Stored outputs of notebooks stay those of their code: nothing but the address is another.

    Raises ValueError for what is no "owner/name".
    """
    before, changed = current(root), []
    if repository == before:
        return []
    if not _REPOSITORY.fullmatch(repository):
        raise ValueError(f"{repository!r} is no repository: write owner/name")
    for path in [path for pattern in FILES for path in sorted(root.glob(pattern))]:
        text = path.read_text(encoding="utf-8")
        if before not in text:
            continue
        if path.suffix == ".ipynb":
            _rewrite_notebook(path, before, repository)
        else:
            ledger.replaced(path, text.replace(before, repository))
        changed.append(path)
    return changed


def _rewrite_notebook(path: Path, before: str, after: str) -> None:
    notebook = nbformat.read(path, 4)
    stamp = notebook.metadata.get("companion", {})
    fresh = stamp.get("source_sha256") == executed.source_hash(notebook)
    for cell in notebook.cells:
        cell.source = cell.source.replace(before, after)
    if fresh:
        stamp["source_sha256"] = executed.source_hash(notebook)
    ledger.replaced(path, nbformat.writes(notebook) + "\n")
