"""Runs notebooks through papermill: one or many, with checked parameters, into a folder with a report."""

import math
import os
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue

import nbformat

from companion import checks, executed, host, jobs, kernels, ledger
from companion.jobs import Job
from companion.jobs import check as check
from companion.jobs import find as find
from companion.jobs import plan as plan
from companion.ledger import Outcome as Outcome

# What a lesson's first cell tells: minutes, and GiB of memory.
NEEDS = re.compile(r"\*\*Needs\*\* about ([\d.]+) minutes and ([\d.]+) GiB on a 2-core CPU")
SAVE_SECONDS = 5.0  # at least, between two copies on disk of a notebook that runs
_NO_KERNEL = ("Kernel didn't respond", "Kernel died before replying")  # said of one that never came up


def run(
    wanted: list[Job],
    folder: Path,
    workers: int = 1,
    cell_seconds: int = 1800,
    progress: bool = True,
    time_limit: float | None = None,
) -> Iterator[Outcome]:
    """Runs the jobs that are wanted, `workers` at once, and gives each outcome as it comes; a notebook that
    fails, hangs for longer than `time_limit` seconds or dies stops no other, nor does one that cannot be read
    or whose results cannot be written.

    Executed notebooks and their HTML, the scoreboard, the table of results and the report, renewed after each
    job, go to `folder`; a kill at any moment leaves all that had ended. Each kernel gets its part of the
    usable cores as OMP_NUM_THREADS, unless that is set.

    Raises ValueError before anything starts for a folder that cannot be written to, and OSError after all
    have ended if the report could not be written.
    """
    from companion.host import usable_cores

    folder = folder.absolute()
    checks.folder("output", folder)
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, usable_cores() // workers)))
    slots: SimpleQueue[int] = SimpleQueue()
    for slot in range(workers):
        slots.put(slot)

    def work(job: Job) -> Outcome:
        slot = slots.get()
        try:
            bar = {"desc": job.name, "position": slot, "leave": False} if progress else False
            variables, also = {"OMP_NUM_THREADS": threads}, {"results_dir": "."}
            return execute(job, folder, cell_seconds, bar, variables, also, time_limit)
        finally:
            slots.put(slot)

    pool = ThreadPoolExecutor(workers)
    try:
        for wave in waves(wanted, longest_first=workers > 1):
            yield from kept((pool.submit(work, job) for job in wave), folder)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # after Ctrl-C nothing further starts


def waves(wanted: list[Job], longest_first: bool) -> list[list[Job]]:
    """The jobs, those apart that read what others record, and so run after them.

    Where several run at once the longest are to begin first, by the minutes that their first cells tell: then
    none runs on alone for long at the end. Those that tell none begin before them.
    """
    if longest_first:
        takes = {notebook: needs(notebook)[0] for notebook in {job.notebook for job in wanted}}
        wanted = sorted(wanted, key=lambda job: -takes[job.notebook])
    last = {notebook for notebook in {job.notebook for job in wanted} if jobs.is_last(notebook)}
    return [[job for job in wanted if (job.notebook in last) == late] for late in (False, True)]


def needs(notebook: Path) -> tuple[float, float]:
    """The minutes and GiB that its first cell tells; (infinite, 0) where that tells nothing, or cannot be
    read.
    """
    try:
        told = NEEDS.search(jobs.read(notebook).cells[0].source)
    except (ValueError, IndexError):
        told = None
    return (float(told[1]), float(told[2])) if told else (math.inf, 0.0)


def short_of_memory(notebook: Path) -> str | None:
    """What is said of a notebook whose first cell tells of more memory than may be used here, or None."""
    wanted, there = needs(notebook)[1], host.usable_memory_bytes() / 2**30
    if not 0 < there < wanted:
        return None
    return f"took {wanted:g} GiB at its defaults, {there:.1f} are here: its kernel may be killed"


def kept(futures: Iterator, folder: Path) -> Iterator[Outcome]:
    """Notes each outcome as it comes, renews the report, and gives it."""
    from companion.report import write

    unwritten = None
    for future in as_completed(list(futures)):  # all are begun before the first is waited for
        outcome = future.result()
        try:
            ledger.add(folder, outcome)
            write(folder)
            unwritten = None
        except OSError as error:  # a full disk: the outcome is told all the same
            unwritten = error
        yield outcome
    if unwritten:
        raise OSError(unwritten.errno, f"the report could not be written: {unwritten.strerror}")


def execute(
    job: Job,
    folder: Path,
    cell_seconds: int = 1800,
    bar: dict | bool = False,
    variables: dict[str, str] | None = None,
    also: dict[str, object] | None = None,
    time_limit: float | None = None,
) -> Outcome:
    """Runs one job into `folder`, the working directory of its kernel too, which sees `variables` in its
    environment. `also` are parameters that are set where the notebook has them and the job does not. What the
    kernel's process writes by itself goes to a file beside, `NAME.log`.
    """
    output = folder / f"{job.name or job.notebook.stem}.ipynb"
    named = {kernels.JOB: output.stem} | (variables or {})
    kernel, start = kernels.Kernel(named, output.with_suffix(".log")), time.perf_counter()
    error = before = None
    try:
        source = jobs.read(job.notebook)
        known, before = jobs.parameters(job.notebook), executed.fingerprint(source)
        extra = {name: value for name, value in (also or {}).items() if name in known}
        with kernel.limited(time_limit), kernel.weighed():
            error = _through_papermill(job, extra, output, cell_seconds, bar, kernel)
    except (ValueError, OSError) as failure:
        error = _line(failure)
    if kernel.overdue:
        error = f"TimeoutError: the notebook took longer than {time_limit:g} s"
    elif (error or "").startswith("DeadKernelError") and (death := kernel.death()):
        error = f"{error}: {death}"
    cell = kernel.running if error else None
    took = time.perf_counter() - start, kernel.most_cpu_seconds
    outcome = Outcome(job, error, *took, None if cell is None else cell + 1, before or "", kernel.most_bytes)
    with suppress(OSError):
        if not kernel.log.stat().st_size:
            kernel.log.unlink()
    try:
        if before and output.exists():
            _finish(outcome, output, before, kernel)
    except Exception as failure:  # as a full disk
        outcome = replace(outcome, error=error or f"its results could not be written: {_line(failure)}")
    return outcome


def _through_papermill(job: Job, extra: dict, output: Path, cell_seconds: int, bar, kernel) -> str | None:
    """Executes the notebook; the error in a line."""
    import papermill

    papermill.translators.papermill_translators.register("python", _translator())
    papermill.engines.papermill_engines.register("companion", _engine())
    place = {"metadata": {"path": str(output.parent)}}  # the kernel's; papermill's cwd would move all threads
    options = {"resources": place, "execution_timeout": cell_seconds, "progress_bar": bar}
    options["engine_name"] = "companion"
    options["extra_arguments"] = ["--log-level=ERROR"]  # or each kernel warns that it does not encrypt

    def once() -> str | None:
        try:
            values = extra | job.parameters
            papermill.execute_notebook(str(job.notebook), str(output), values, **options, **kernel.options())
        except Exception as failure:  # whatever ends a notebook is its outcome; the others go on
            return _line(failure)
        return None

    error = once()
    return once() if never_came_up(error) else error


def never_came_up(error: str | None) -> bool:
    """Whether this error says that a kernel did not start: another process may have taken one of its ports
    between their choice and its start, so it is worth a second try.
    """
    return error is not None and any(said in error for said in _NO_KERNEL)


def _translator() -> type:
    """Papermill's, which would write a tuple or a set as a text into the notebook."""
    from papermill.translators import PythonTranslator

    class Translator(PythonTranslator):
        @classmethod
        def translate(cls, value):
            if isinstance(value, (tuple, set)):
                return f"{type(value).__name__}([{', '.join(map(cls.translate, value))}])"
            return super().translate(value)

    return Translator


def _engine() -> type:
    """Papermill's writes the whole notebook twice for each cell; this one each SAVE_SECONDS, and at the end,
    however that comes.
    """
    from papermill.engines import NBClientEngine

    class Engine(NBClientEngine):
        @classmethod
        def execute_managed_notebook(cls, nb_man, kernel_name, **options):
            save, saved = nb_man.save, time.monotonic()

            def now_and_then(**given) -> None:
                nonlocal saved
                if time.monotonic() - saved >= SAVE_SECONDS:
                    save(**given)
                    saved = time.monotonic()

            nb_man.save = now_and_then
            try:
                return super().execute_managed_notebook(nb_man, kernel_name, **options)
            finally:
                nb_man.save = save

    return Engine


def _line(failure: Exception) -> str:
    """What went wrong, in a line: in a notebook's cell, or before it came to that."""
    name, text = getattr(failure, "ename", type(failure).__name__), getattr(failure, "evalue", str(failure))
    return f"{name}: {next((line for line in text.splitlines() if line.strip()), 'without a message')}"


def _finish(outcome: Outcome, output: Path, before: str, kernel: kernels.Kernel) -> None:
    """Notes in the executed notebook what it took, and writes it as a page too."""
    from nbconvert import HTMLExporter

    notebook = executed.tidy(nbformat.read(output, 4))
    changed = {name: value for name, value in outcome.job.parameters.items() if name != "results_dir"}
    about = {"of": before, "error": outcome.error, "parameters": changed}
    about |= {"seconds": round(outcome.seconds, 2), "cpu_seconds": round(outcome.cpu_seconds, 2)}
    about["memory_bytes"] = outcome.memory_bytes
    executed.note(notebook, about, kernel.cells)
    nbformat.write(notebook, output)
    output.with_suffix(".html").write_text(HTMLExporter().from_notebook_node(notebook)[0], encoding="utf-8")


def store(notebook: Path, folder: Path) -> str | None:
    """Runs a notebook at its defaults and keeps the outputs in it, stamped with its source's hash and the
    environment; what it recorded goes into the scoreboard that comes with the package.

    Gives the error in a line, and leaves the notebook as it was, if it fails.
    """
    from companion import scoreboard, stored
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
    ledger.replaced(notebook, nbformat.writes(executed.tidy(before)) + "\n")
    recorded = [row for row in scoreboard.read(folder / "results") if row["notebook"] == notebook.stem]
    if recorded:
        scoreboard.keep(notebook.stem, recorded)
    return None
