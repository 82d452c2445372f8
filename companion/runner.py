"""Runs notebooks through papermill: one or many, with checked parameters, into a folder with a report."""

import ast
import difflib
import functools
import hashlib
import html
import itertools
import os
import sysconfig
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import SimpleQueue

import nbformat

from companion import kernels

NOTEBOOKS = Path("notebooks")
REPORT = "index.html"


@dataclass(frozen=True)
class Job:
    """One notebook to run with these parameters; `name` is that of its files."""

    notebook: Path
    parameters: dict[str, object] = field(default_factory=dict)
    name: str = ""


@dataclass(frozen=True)
class Outcome:
    """How a job ended: the error in a line if it failed, seconds it took, CPU-seconds of the kernel and all its children."""

    job: Job
    error: str | None
    seconds: float
    cpu_seconds: float


def find(names: list[str], folder: Path = NOTEBOOKS) -> list[Path]:
    """The notebooks with these numbers or names ("03", "03_ddp"), all for no names. Raises ValueError for one not there."""
    notebooks = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    if not notebooks:
        raise ValueError(f"there are no notebooks in {folder}: call this in the project's folder, or name it with --notebooks")
    chosen = []
    for name in names:
        stem = Path(name).stem
        found = [notebook for notebook in notebooks if stem in (notebook.stem, notebook.stem[:2], notebook.stem[3:])]
        if not found:
            raise ValueError(f"there is no notebook {name!r}{_nearest(stem, [n.stem for n in notebooks])}")
        chosen += found
    return list(dict.fromkeys(chosen)) or notebooks


def parameters(notebook: Path) -> dict[str, dict]:
    """The notebook's parameters as papermill sees them: name -> default, inferred_type_name, help."""
    import papermill

    return papermill.inspect_notebook(str(notebook))


def check(notebook: Path, values: dict[str, str]) -> dict[str, object]:
    """The values, given as text, in the types of the notebook's parameters.

    Raises ValueError for a name that the notebook does not have (with the nearest it has) or a value of another type.
    """
    known, typed = parameters(notebook), {}
    for name, text in values.items():
        if name not in known:
            raise ValueError(f"{notebook.stem} has no parameter {name!r}{_nearest(name, list(known))}")
        default = ast.literal_eval(known[name]["default"])
        try:
            value = text if isinstance(default, str) else ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        value = float(value) if type(default) is float and type(value) is int else value
        if type(value) is not type(default):
            raise ValueError(
                f"{notebook.stem}: {name}={text} is not of type {type(default).__name__}, as its default {default!r} is"
            )
        typed[name] = value
    return typed


def plan(notebooks: list[Path], fixed: dict[str, str], sweeps: dict[str, list[str]]) -> list[Job]:
    """One job for each notebook and each combination of the sweeps' values, all checked before anything starts."""
    jobs = []
    for notebook in notebooks:
        for combination in itertools.product(*sweeps.values()):
            swept = dict(zip(sweeps, combination, strict=True))
            label = "-".join([notebook.stem, *(f"{name}={value}" for name, value in swept.items())])
            jobs.append(
                Job(
                    notebook,
                    check(notebook, fixed | swept),
                    "".join(c if c.isalnum() or c in "_-=.," else "_" for c in label),
                )
            )
    return jobs


def run(jobs: list[Job], folder: Path, workers: int = 1, cell_seconds: int = 1800, progress: bool = True) -> Iterator[Outcome]:
    """Runs the jobs, `workers` at once, and gives each outcome as it comes; a failing notebook stops no other.

    Executed notebooks and their HTML, the scoreboard, and the report `index.html`, renewed after each job, go to `folder`.
    Each kernel gets its part of the usable cores as OMP_NUM_THREADS, unless that is set.
    """
    from companion.devices import usable_cores

    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, usable_cores() // workers)))
    slots: SimpleQueue[int] = SimpleQueue()
    for slot in range(workers):
        slots.put(slot)

    def work(job: Job) -> Outcome:
        slot = slots.get()
        try:
            bar = {"desc": job.name, "position": slot, "leave": False} if progress else False
            here = {"results_dir": "."} if "results_dir" in parameters(job.notebook) else {}
            full = replace(job, parameters=here | job.parameters)
            return replace(execute(full, folder, cell_seconds, bar, {"OMP_NUM_THREADS": threads}), job=job)
        finally:
            slots.put(slot)

    outcomes: list[Outcome] = []
    pool = ThreadPoolExecutor(workers)
    try:
        for future in as_completed([pool.submit(work, job) for job in jobs]):
            outcomes.append(future.result())
            (folder / REPORT).write_text(report(outcomes, folder), encoding="utf-8")
            yield outcomes[-1]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # after Ctrl-C nothing further starts


def execute(
    job: Job,
    folder: Path,
    cell_seconds: int = 1800,
    bar: dict | bool = False,
    variables: dict[str, str] | None = None,
) -> Outcome:
    """Runs one job into `folder`, the working directory of its kernel too, which sees `variables` in its environment."""
    import papermill
    from nbconvert import HTMLExporter

    output, error, kernel = folder / f"{job.name or job.notebook.stem}.ipynb", None, kernels.Kernel(variables or {})
    before, start = fingerprint(nbformat.read(job.notebook, 4)), time.perf_counter()
    try:
        papermill.execute_notebook(
            str(job.notebook),
            str(output),
            job.parameters,
            resources={"metadata": {"path": str(folder)}},  # the kernel's folder; papermill's cwd would move all threads
            execution_timeout=cell_seconds,
            progress_bar=bar,
            extra_arguments=["--log-level=ERROR"],  # else each kernel warns on the terminal that 127.0.0.1 is not encrypted
            **kernel.options(),
        )
    except Exception as failure:  # whatever ends a notebook is its outcome; the others go on
        name, text = getattr(failure, "ename", type(failure).__name__), getattr(failure, "evalue", str(failure))
        error = f"{name}: {text.strip().splitlines()[0] if text.strip() else 'without a message'}"
    outcome = Outcome(job, error, time.perf_counter() - start, kernel.most_cpu_seconds)
    if output.exists():
        notebook = tidy(nbformat.read(output, 4))
        note(notebook, outcome, kernel.cells, before)
        nbformat.write(notebook, output)
        output.with_suffix(".html").write_text(HTMLExporter().from_notebook_node(notebook)[0], encoding="utf-8")
    return outcome


def note(notebook: nbformat.NotebookNode, outcome: Outcome, cells: dict[int, kernels.Spent], of: str) -> None:
    """Writes into an executed notebook's metadata what it and each of its cells took, and what it is an execution of."""
    changed = {name: value for name, value in outcome.job.parameters.items() if name != "results_dir"}
    about = {"of": of, "error": outcome.error, "parameters": changed}
    about |= {"seconds": round(outcome.seconds, 2), "cpu_seconds": round(outcome.cpu_seconds, 2)}
    notebook.metadata.setdefault("companion", {})["run"] = about
    for number, spent in cells.items():
        took = {"seconds": round(spent.seconds, 3), "cpu_seconds": round(spent.cpu_seconds, 3)}
        notebook.cells[number].metadata["companion"] = took


def fingerprint(notebook: nbformat.NotebookNode) -> str:
    """SHA-256 of all that an execution depends on: the code, this package, and the versions that are installed."""
    files = [path for path in sorted(Path(__file__).parent.rglob("*")) if path.suffix in (".py", ".json")]
    package = [path.read_text(encoding="utf-8") for path in files]
    return hashlib.sha256("\0".join([source_hash(notebook), *package, *_installed()]).encode()).hexdigest()


@functools.cache
def _installed() -> list[str]:
    from importlib.metadata import distributions

    folders = [sysconfig.get_path(kind) for kind in ("purelib", "platlib")]  # setuptools adds some of its own to sys.path
    return sorted({f"{found.name} {found.version}" for found in distributions(path=folders)})


def report(outcomes: list[Outcome], folder: Path) -> str:
    """A page that lists the outcomes, with links to the executed notebooks, and the scoreboard of this run."""
    from companion import scoreboard

    lines = []
    for outcome in sorted(outcomes, key=lambda outcome: outcome.job.name):
        name = html.escape(outcome.job.name)
        values = ", ".join(f"{key}={value}" for key, value in outcome.job.parameters.items()) or "defaults"
        status = f"<b class='failed'>failed: {html.escape(outcome.error)}</b>" if outcome.error else "passed"
        links = f"<a href='{name}.html'>{name}</a> (<a href='{name}.ipynb'>ipynb</a>)"
        took = f"{outcome.seconds:.0f} s<td>{outcome.cpu_seconds:.0f} s<td>{_slowest(folder / f'{outcome.job.name}.ipynb')}"
        lines.append(f"<tr><td>{links}<td>{html.escape(values)}<td>{took}<td>{status}\n")
    failed = sum(outcome.error is not None for outcome in outcomes)
    measured = scoreboard.Table(scoreboard.read(folder))._repr_html_()
    return f"""<!doctype html><meta charset="utf-8"><title>Notebooks</title>
<style>body{{font:15px sans-serif;margin:2em}} td,th{{padding:.2em .8em;text-align:left}} .failed{{color:#b00}}</style>
<h1>{len(outcomes)} notebooks run, {failed} failed</h1>
<table><tr><th>notebook<th>parameters<th>time<th>CPU time<th>slowest cells<th>outcome
{"".join(lines)}</table>
<h2>Measured</h2>
{measured}
"""


def _slowest(executed: Path, count: int = 3) -> str:
    """The executed notebook's slowest cells: their numbers in it, and their seconds."""
    if not executed.exists():
        return ""
    cells = nbformat.read(executed, 4).cells
    seconds = {cell.get("execution_count"): cell.metadata.get("companion", {}).get("seconds", 0) for cell in cells}
    longest = sorted((name for name in seconds if name), key=seconds.get, reverse=True)[:count]
    return ", ".join(f"[{number}] {seconds[number]:.0f} s" for number in longest)


def source_hash(notebook: nbformat.NotebookNode) -> str:
    """SHA-256 of the notebook's code cells; kept in its metadata, it tells whether the stored outputs belong to this code."""
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\0".join(cells).encode()).hexdigest()


def tidy(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Takes out what is of no use once a run is over: progress bars, and the tools' notes with times and paths."""
    for name in ("widgets", "papermill"):
        notebook.metadata.pop(name, None)
    for cell in notebook.cells:
        for name in ("papermill", "execution"):
            cell.metadata.pop(name, None)
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if "application/vnd.jupyter.widget-view+json" not in o.get("data", {})]
    return notebook


def store(notebook: Path, folder: Path) -> str | None:
    """Runs a notebook at its defaults and keeps the outputs in it, stamped with its source's hash and the environment.

    Gives the error in a line, and leaves the notebook as it was, if it fails.
    """
    from companion import stored
    from companion.measure import environment

    folder.mkdir(parents=True, exist_ok=True)
    outcome = execute(Job(notebook), folder, variables={stored.KEEP: "1"})
    if outcome.error:
        return outcome.error
    before, after = nbformat.read(notebook, 4), nbformat.read(folder / notebook.name, 4)
    for cell, run_cell in zip(before.cells, after.cells, strict=True):
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = run_cell.outputs, run_cell.execution_count
    before.metadata.setdefault("companion", {}).update({"source_sha256": source_hash(before), "environment": environment()})
    partial = notebook.with_suffix(".partial")
    nbformat.write(tidy(before), partial)
    os.replace(partial, notebook)
    return None


def _nearest(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, 1, cutoff=0.4)
    return f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(names)}"
