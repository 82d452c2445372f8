"""The cells of a notebook: by kind, by tag, and those that a cell needs."""

import ast
import builtins
import symtable
import tomllib
from pathlib import Path

import nbformat
from IPython.core.inputtransformer2 import TransformerManager

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SETTINGS = tomllib.loads((ROOT / "tests" / "parameters.toml").read_text())
PARAMETERS, CHECKED, PROOF = "parameters", "nbval-check-output", "proof:"


def code(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tags(cell: nbformat.NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def tagged(notebook: nbformat.NotebookNode, tag: str) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if tag in tags(cell)]


def proofs(notebook: nbformat.NotebookNode) -> dict[str, nbformat.NotebookNode]:
    """The cells tagged `proof:NAME`, by name."""
    return {
        tag.removeprefix(PROOF): cell
        for cell in notebook.cells
        for tag in tags(cell)
        if tag.startswith(PROOF)
    }


def plain(source: str) -> str:
    """A cell's code as Python, its magics turned into calls."""
    return TransformerManager().transform_cell(source)


def names(source: str) -> tuple[set[str], set[str]]:
    """The names that a cell's code binds for later cells, and those that it reads from earlier ones."""
    bound, read = set(), set()
    for statement in ast.parse(plain(source)).body:
        table = symtable.symtable(ast.unparse(statement), "cell", "exec")
        binds = {
            symbol.get_name()
            for symbol in table.get_symbols()
            if symbol.is_assigned() or symbol.is_imported()
        }
        reads = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_referenced()}
        reads |= {name for inner in table.get_children() for name in _globals_of(inner)}
        if isinstance(statement, ast.AugAssign):
            reads |= binds
        elif not isinstance(statement, ast.Assign | ast.Expr):
            reads -= binds  # a loop's own variables, a function's own name
        read |= reads - bound
        bound |= binds
    return bound, read - set(dir(builtins))


def _globals_of(table: symtable.SymbolTable) -> set[str]:
    found = {
        symbol.get_name() for symbol in table.get_symbols() if symbol.is_global() and symbol.is_referenced()
    }
    return found.union(*(_globals_of(inner) for inner in table.get_children()))


def needed(notebook: nbformat.NotebookNode, *wanted: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """The wanted cells with the earlier ones that bind what they read, and those that these need, in their
    order.

    What a cell changes without binding a name is not seen. So a slice must be run as it is, and pass, to be
    believed.
    """
    cells, keep, missing = code(notebook), [], set()
    for cell in reversed(cells):
        bound, read = names(cell.source)
        if any(cell is one for one in wanted) or bound & missing:
            missing = missing - bound | read
            keep.append(cell)
    return keep[::-1]


def set_parameters(notebook: nbformat.NotebookNode, values: dict[str, object]) -> None:
    """Writes the values into the lines of the parameters cell, where they are assigned."""
    (cell,) = tagged(notebook, PARAMETERS)
    lines = cell.source.splitlines()
    for name, value in values.items():
        (number,) = [i for i, line in enumerate(lines) if line.startswith(f"{name}: ")]
        kind, comment = lines[number].split(" = ")[0], lines[number].split("  # ", 1)[1]
        lines[number] = f"{kind} = {value!r}  # {comment}"
    cell.source = "\n".join(lines)
