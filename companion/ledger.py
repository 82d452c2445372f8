"""What a run is to do and has done: files that a kill at any moment leaves whole, so that a run can go on."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from companion import jobs
from companion.jobs import Job

PLAN, DONE, REPORT = "plan.json", "outcomes.jsonl", "index.html"


@dataclass(frozen=True)
class Outcome:
    """How a job ended: the error in a line if it failed, and the number of the cell where it did; seconds it
    took, CPU-seconds of the kernel and all its children; what the notebook was when it ran; the most memory
    that they took.
    """

    job: Job
    error: str | None
    seconds: float
    cpu_seconds: float
    cell: int | None = None
    of: str = ""
    memory_bytes: int = 0


def replaced(path: Path, text: str) -> None:
    """Writes a file in one move: there is the old one, or the new one, and no half of either."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def begin(folder: Path, wanted: list[Job]) -> None:
    """Notes what a run is to do."""
    replaced(folder / PLAN, json.dumps([_row(job) for job in wanted], indent=1) + "\n")


def planned(folder: Path) -> list[Job]:
    """What a run was to do. Raises ValueError for a folder in which none has begun, or whose notebooks have
    changed their parameters since.
    """
    path = folder / PLAN
    if not path.is_file():
        raise ValueError(f"no run has begun in {folder}: there is no {PLAN}")
    return [_job(row) for row in json.loads(path.read_text(encoding="utf-8"))]


def add(folder: Path, outcome: Outcome) -> None:
    """Adds a line, in one write, and waits until it is on the disk."""
    row = _row(outcome.job) | {
        "error": outcome.error,
        "seconds": round(outcome.seconds, 2),
        "cpu_seconds": round(outcome.cpu_seconds, 2),
        "cell": outcome.cell,
        "of": outcome.of,
        "memory_bytes": outcome.memory_bytes,
    }
    descriptor = os.open(folder / DONE, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, json.dumps(row).encode() + b"\n")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(folder: Path) -> list[Outcome]:
    """The last outcome of each job, in the order in which they ended. A line that a kill has cut off does not
    count.
    """
    found: dict[str, Outcome] = {}
    path = folder / DONE
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        took = {name: row[name] for name in ("error", "seconds", "cpu_seconds", "cell", "of", "memory_bytes")}
        found.pop(row["name"], None)
        found[row["name"]] = Outcome(job=Job(Path(row["notebook"]), row["parameters"], row["name"]), **took)
    return list(found.values())


def left(folder: Path, wanted: list[Job], of: dict[Path, str]) -> list[Job]:
    """The jobs that have not passed yet, or not with the notebook, the package and the versions that `of`
    names now.
    """
    passed = {
        (outcome.job.name, outcome.of) for outcome in read(folder) if outcome.error is None and outcome.of
    }
    return [job for job in wanted if (job.name, of.get(job.notebook, "")) not in passed]


def _row(job: Job) -> dict[str, object]:
    texts = {name: value if isinstance(value, str) else repr(value) for name, value in job.parameters.items()}
    return {"name": job.name, "notebook": str(job.notebook), "parameters": texts}


def _job(row: dict) -> Job:
    notebook = Path(row["notebook"])
    return Job(notebook, jobs.check(notebook, row["parameters"]) if row["parameters"] else {}, row["name"])
