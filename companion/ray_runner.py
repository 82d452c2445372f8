"""Runs notebooks as tasks of Ray, so that a cluster runs many at once.

A task gets the notebook's text and gives back its files: machines need no common folder, but each needs this
package and what the notebooks use.
"""

import tempfile
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from threading import Thread

from companion import checks, ray_session, runner, scoreboard
from companion.jobs import Job
from companion.ledger import Outcome

LOCAL = "local"


def run(
    wanted: list[Job],
    folder: Path,
    address: str = LOCAL,
    cell_seconds: int = 1800,
    time_limit: float | None = None,
    cores: int | None = None,
) -> Iterator[Outcome]:
    """Runs the jobs as tasks of the Ray cluster at `address`, or of one on this machine for "local", as many
    at once as have `cores` each (one, unless given); otherwise as `runner.run` does. A notebook that reads
    what others record finds nothing of theirs, since each task has a folder of its own.

    Raises ValueError before anything starts for a folder that cannot be written to, ImportError where Ray is
    not installed, ConnectionError where no cluster answers.
    """
    folder = folder.absolute()
    checks.folder("output", folder)
    there, each = ray_session.start() if address == LOCAL else ray_session.join(address), cores or 1
    try:
        if each > there.get("CPU", 0):
            raise ValueError(f"cores={each}: the cluster has {there.get('CPU', 0):g} in all")
        for wave in runner.waves(wanted, longest_first=True):
            yield from runner.kept(_futures(wave, folder, cell_seconds, time_limit, each), folder)
    finally:
        ray_session.stop()


def _futures(
    wanted: list[Job], folder: Path, cell_seconds: int, time_limit: float | None, cores: int
) -> Iterator[Future]:
    """A future for each job, whose files are in the folder when it is done."""
    ray = ray_session.imported()
    task = ray.remote(num_cpus=cores, max_retries=0)(_task)
    for job in wanted:
        content = job.notebook.read_bytes() if job.notebook.is_file() else b""
        reference = task.remote(
            content, job.notebook.name, job.parameters, job.name, cell_seconds, time_limit, cores
        )
        future: Future = Future()
        Thread(target=_wait, args=(future, reference, job, folder), daemon=True).start()
        yield future


def _wait(future: Future, reference: object, job: Job, folder: Path) -> None:
    ray = ray_session.imported()
    try:
        told, files = ray.get(reference)
        for name, content in files.items():
            with (folder / name).open("ab" if name == scoreboard.FILE else "wb") as file:
                file.write(content)
        outcome = Outcome(job, *told)
    except Exception as error:  # the machine or the task has died, or the disk is full: a row like any other
        reason = next((line for line in str(error).splitlines() if line.strip()), "")
        outcome = Outcome(job, f"{type(error).__name__}: {reason}", 0.0, 0.0)
    future.set_result(outcome)


def _task(
    content: bytes,
    notebook: str,
    parameters: dict[str, object],
    name: str,
    cell_seconds: int,
    time_limit: float | None,
    cores: int,
) -> tuple[tuple, dict[str, bytes]]:
    """In a machine of the cluster: runs the notebook in a folder of its own; what there is to tell, and the
    files.
    """
    with tempfile.TemporaryDirectory() as place:
        given, folder = Path(place, notebook), Path(place, "out")
        given.write_bytes(content)
        folder.mkdir()
        variables = {"OMP_NUM_THREADS": str(cores)}
        also = {"results_dir": "."}
        job = Job(given, parameters, name)
        ended = runner.execute(job, folder, cell_seconds, False, variables, also, time_limit)
        told = (ended.error, ended.seconds, ended.cpu_seconds, ended.cell, ended.of, ended.memory_bytes)
        return told, {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
