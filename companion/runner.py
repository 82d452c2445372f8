"""Runs notebooks through papermill: one or many, with checked parameters, into a folder with a report."""

import ast
import difflib
import itertools
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import SimpleQueue

import nbformat

from companion import executed, kernels

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
    """How a job ended: the error in a line if it failed, seconds it took, CPU-seconds of the kernel and all
    its children.
    """

    job: Job
    error: str | None
    seconds: float
    cpu_seconds: float


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


def parameters(notebook: Path) -> dict[str, dict]:
    """The notebook's parameters as papermill sees them: name -> default, inferred_type_name, help."""
    import papermill

    return papermill.inspect_notebook(str(notebook))


def check(notebook: Path, values: dict[str, str]) -> dict[str, object]:
    """The values, given as text, in the types of the notebook's parameters.

    Raises ValueError for a name that the notebook does not have (with the nearest it has) or a value of
    another type.
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
                f"{notebook.stem}: {name}={text} is not of type {type(default).__name__}, as its default "
                f"{default!r} is"
            )
        typed[name] = value
    return typed


def plan(notebooks: list[Path], fixed: dict[str, str], sweeps: dict[str, list[str]]) -> list[Job]:
    """One job for each notebook and each combination of the sweeps' values, all checked before anything
    starts.
    """
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


def run(
    jobs: list[Job], folder: Path, workers: int = 1, cell_seconds: int = 1800, progress: bool = True
) -> Iterator[Outcome]:
    """Runs the jobs, `workers` at once, and gives each outcome as it comes; a failing notebook stops no
    other.

    Executed notebooks and their HTML, the scoreboard, and the report `index.html`, renewed after each job, go
    to `folder`. Each kernel gets its part of the usable cores as OMP_NUM_THREADS, unless that is set.
    """
    from companion.host import usable_cores
    from companion.report import page

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
            (folder / REPORT).write_text(page(outcomes, folder), encoding="utf-8")
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
    """Runs one job into `folder`, the working directory of its kernel too, which sees `variables` in its
    environment.
    """
    import papermill
    from nbconvert import HTMLExporter

    output, error = folder / f"{job.name or job.notebook.stem}.ipynb", None
    kernel = kernels.Kernel(variables or {})
    before, start = executed.fingerprint(nbformat.read(job.notebook, 4)), time.perf_counter()
    place = {"metadata": {"path": str(folder)}}  # the kernel's folder; papermill's cwd would move all threads
    quiet = ["--log-level=ERROR"]  # else each kernel warns on the terminal that 127.0.0.1 is not encrypted
    try:
        papermill.execute_notebook(
            str(job.notebook),
            str(output),
            job.parameters,
            resources=place,
            execution_timeout=cell_seconds,
            progress_bar=bar,
            extra_arguments=quiet,
            **kernel.options(),
        )
    except Exception as failure:  # whatever ends a notebook is its outcome; the others go on
        name = getattr(failure, "ename", type(failure).__name__)
        text = getattr(failure, "evalue", str(failure))
        error = f"{name}: {text.strip().splitlines()[0] if text.strip() else 'without a message'}"
    outcome = Outcome(job, error, time.perf_counter() - start, kernel.most_cpu_seconds)
    if output.exists():
        notebook = executed.tidy(nbformat.read(output, 4))
        changed = {name: value for name, value in job.parameters.items() if name != "results_dir"}
        about = {"of": before, "error": error, "parameters": changed, "seconds": round(outcome.seconds, 2)}
        about["cpu_seconds"] = round(outcome.cpu_seconds, 2)
        executed.note(notebook, about, kernel.cells)
        nbformat.write(notebook, output)
        output.with_suffix(".html").write_text(
            HTMLExporter().from_notebook_node(notebook)[0], encoding="utf-8"
        )
    return outcome


def store(notebook: Path, folder: Path) -> str | None:
    """Runs a notebook at its defaults and keeps the outputs in it, stamped with its source's hash and the
    environment.

    Gives the error in a line, and leaves the notebook as it was, if it fails.
    """
    from companion import stored
    from companion.machine import environment

    folder.mkdir(parents=True, exist_ok=True)
    outcome = execute(Job(notebook), folder, variables={stored.KEEP: "1"})
    if outcome.error:
        return outcome.error
    before, after = nbformat.read(notebook, 4), nbformat.read(folder / notebook.name, 4)
    for cell, run_cell in zip(before.cells, after.cells, strict=True):
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = run_cell.outputs, run_cell.execution_count
    before.metadata.setdefault("companion", {}).update(
        {"source_sha256": executed.source_hash(before), "environment": environment()}
    )
    partial = notebook.with_suffix(".partial")
    nbformat.write(executed.tidy(before), partial)
    os.replace(partial, notebook)
    return None


def _nearest(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, 1, cutoff=0.4)
    return f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(names)}"
