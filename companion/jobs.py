"""What is to be run: notebooks, their parameters, and a sweep's combinations, checked before work starts."""

import ast
import difflib
import hashlib
import io
import itertools
import operator
import tokenize
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import nbformat

NOTEBOOKS = Path("notebooks")
_NAME_BYTES = 120  # of a file's name at most; a file system allows some 255, with what is appended
_ARITHMETIC: dict[type, Callable] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Pow: operator.pow,
}
_EXPECTED = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    list: "a list such as [1, 2]",
    tuple: "a tuple such as (1, 2)",
    dict: "a dictionary such as {'a': 1}",
    set: "a set such as {1, 2}",
}


@dataclass(frozen=True)
class Job:
    """One notebook to run with these parameters; `name` is that of its files."""

    notebook: Path
    parameters: dict[str, object] = field(default_factory=dict)
    name: str = ""


@dataclass(frozen=True)
class Parameter:
    """A parameter of a notebook: its default as code, its type as annotated or inferred, and its comment."""

    name: str
    default: str
    kind: str
    help: str
    value: object = None
    literal: bool = True  # whether the default is a value, not an expression that must be run


def find(names: list[str], folder: Path = NOTEBOOKS) -> list[Path]:
    """The notebooks with these numbers or names ("03", "03_ddp"), all for no names.

    Raises ValueError for one not there.
    """
    notebooks = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    if not notebooks:
        raise ValueError(
            f"there are no notebooks in {folder}: call this in the project's folder, or name it with "
            f"--notebooks"
        )
    chosen = []
    for name in names:
        stem = Path(name).stem
        found = [
            notebook
            for notebook in notebooks
            if stem in (notebook.stem, notebook.stem[:2], notebook.stem[3:])
        ]
        if not found:
            raise ValueError(f"there is no notebook {name!r}{_nearest(stem, [n.stem for n in notebooks])}")
        chosen += found
    return list(dict.fromkeys(chosen)) or notebooks


def read(notebook: Path) -> "nbformat.NotebookNode":
    """The notebook. Raises ValueError, naming it, for a file that is none, as after a merge conflict."""
    import nbformat  # records, which notebooks write, do without it

    try:
        return nbformat.read(notebook, 4)
    except Exception as error:  # whatever JSON, the format's check, or the disk says
        said = next((line for line in str(error).splitlines() if line.strip()), "")
        raise ValueError(f"{notebook.name} cannot be read: {type(error).__name__}: {said[:150]}") from error


def is_last(notebook: Path) -> bool:
    """Whether a notebook reads what others record, as its metadata says, and so is to run after them."""
    try:
        return bool(read(notebook).metadata.get("companion", {}).get("last"))
    except ValueError:
        return False


def parameters(notebook: Path) -> dict[str, Parameter]:
    """The parameters of a notebook by name: those that its cell tagged `parameters` sets.

    Raises ValueError, naming it, for a notebook that cannot be read.
    """
    cells = [cell for cell in read(notebook).cells if "parameters" in cell.metadata.get("tags", [])]
    found: dict[str, Parameter] = {}
    for cell in cells[:1]:
        try:
            tree = ast.parse(cell.source)
        except SyntaxError as error:
            raise ValueError(f"{notebook.name}: its parameters are no Python: {error}") from error
        comments = _comments(cell.source)
        for node in tree.body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            if len(targets) == 1 and isinstance(targets[0], ast.Name) and getattr(node, "value", None):
                found[targets[0].id] = _parameter(node, targets[0].id, cell.source, comments)
    return found


def _parameter(node: ast.Assign | ast.AnnAssign, name: str, source: str, comments: dict) -> Parameter:
    code = ast.get_source_segment(source, node.value)
    try:
        value, literal = _literal(node.value), True
    except ValueError:
        value, literal = None, False
    annotated = ast.unparse(node.annotation) if isinstance(node, ast.AnnAssign) else type(value).__name__
    return Parameter(name, code, annotated, comments.get(node.end_lineno, ""), value, literal)


def _comments(source: str) -> dict[int, str]:
    """The comment of each line that has one."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0]: t.string.lstrip("# ").rstrip() for t in tokens if t.type == tokenize.COMMENT}


def _literal(node: ast.expr) -> object:
    """The value of a literal, or of arithmetic with numbers such as 2**10; ValueError for other code."""
    if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        left, right = _literal(node.left), _literal(node.right)
        small = all(isinstance(side, (int, float)) and abs(side) < 2**31 for side in (left, right))
        if small and not (isinstance(node.op, ast.Pow) and abs(right) > 1024):
            try:
                return _ARITHMETIC[type(node.op)](left, right)
            except (ArithmeticError, TypeError) as error:
                raise ValueError(str(error)) from error
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        inner = _literal(node.operand)
        if isinstance(inner, (int, float)):
            return -inner
    return ast.literal_eval(node)


def check(notebook: Path, values: dict[str, str]) -> dict[str, object]:
    """The values, given as text, in the types of the notebook's parameters.

    Raises ValueError for a notebook that cannot be read, a name that it does not have (with the nearest it
    has), or a value of another type, saying what is expected.
    """
    known, typed = parameters(notebook), {}
    for name, text in values.items():
        if name not in known:
            raise ValueError(f"{notebook.stem} has no parameter {name!r}{_nearest(name, list(known))}")
        if not known[name].literal:
            raise ValueError(
                f"{notebook.stem}: {name} cannot be set: its default {known[name].default} is code, no value"
            )
        typed[name] = _typed(notebook, known[name], text)
    return typed


def _typed(notebook: Path, parameter: Parameter, text: str) -> object:
    default = parameter.value
    if isinstance(default, str):
        return text
    try:
        value = _literal(ast.parse(text.strip(), mode="eval").body)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = text
    if default is None:
        return value
    kind = type(default)
    if kind is bool and text.strip().lower() in ("true", "false"):
        return text.strip().lower() == "true"
    if kind is float and text.strip().lower().lstrip("+-") in ("inf", "nan", "infinity"):
        return float(text)
    if kind is float and type(value) is int:
        return float(value)
    if {kind, type(value)} == {list, tuple}:
        return kind(value)
    if type(value) is not kind:
        raise ValueError(
            f"{notebook.stem}: {parameter.name}={text} is not {_EXPECTED.get(kind, kind.__name__)}, as its "
            f"default {parameter.default} is"
        )
    return value


def pairs(fixed: list[tuple[str, str]], sweeps: list[str]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Values of the command line, by name: those that are fixed, and those that are swept ("name=a,b").

    Raises ValueError for a name that is given twice, and for a sweep without a name, or with a value twice.
    """
    swept: dict[str, list[str]] = {}
    for item in sweeps:
        name, sign, text = item.partition("=")
        if not (name and sign):
            raise ValueError(f"--sweep {item} is not of the form name=first,second")
        if name in swept:
            raise ValueError(f"--sweep {name} is given twice: write --sweep {name}=first,second")
        swept[name] = _split(text)
        if twice := [value for value in swept[name] if swept[name].count(value) > 1]:
            raise ValueError(f"--sweep {item} has {twice[0]!r} twice")
    names = [name for name, _ in fixed]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"-p {name} is given twice")
        if name in swept:
            raise ValueError(f"{name} is fixed by -p and swept by --sweep: which of them?")
    return dict(fixed), swept


def _split(text: str) -> list[str]:
    """Values between commas, but for commas inside brackets or quotes."""
    values, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"" and (depth or not values[-1].strip()):
            quote = letter
        elif letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
        elif letter == "," and depth <= 0:
            values.append("")
            continue
        values[-1] += letter
    return [_unquoted(value) for value in values]


def _unquoted(value: str) -> str:
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    return value[1:-1] if quoted else value


def plan(
    notebooks: list[Path],
    fixed: dict[str, str],
    sweeps: dict[str, list[str]],
    taken: set[str] | None = None,
) -> list[Job]:
    """One job for each notebook and each combination of the sweeps' values, all checked before anything
    starts. A notebook that cannot be read is a job too, which will fail: the others are to run. `taken` are
    names that others have; the new ones are added.
    """
    jobs, taken = [], set() if taken is None else taken
    for notebook in notebooks:
        try:
            parameters(notebook)
        except ValueError:
            jobs.append(Job(notebook, {}, _file_name(notebook.stem, taken)))
            continue
        for combination in itertools.product(*sweeps.values()):
            swept = dict(zip(sweeps, combination, strict=True))
            label = "-".join([notebook.stem, *(f"{name}={value}" for name, value in swept.items())])
            jobs.append(Job(notebook, check(notebook, fixed | swept), _file_name(label, taken)))
    return jobs


def _file_name(label: str, taken: set[str]) -> str:
    """A name that no other job's is, also where large and small letters are the same; short enough."""
    name = "".join(c if c.isalnum() or c in "_-=.," else "_" for c in label)
    if len(name.encode()) > _NAME_BYTES:
        cut = name.encode()[:_NAME_BYTES].decode(errors="ignore")
        name = f"{cut}-{hashlib.sha256(label.encode()).hexdigest()[:8]}"
    free, number = name, 1
    while free.casefold() in taken:
        free, number = f"{name}-{number + 1}", number + 1
    taken.add(free.casefold())
    return free


def _nearest(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, 1, cutoff=0.4)
    return f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(names)}"
