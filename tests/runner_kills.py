"""Kills the runner at random moments, and lets it go on: what had ended must be there, and all ends at last.

    python tests/runner_kills.py --times 10 --seed 0

The tests do it twice; as a program it prints what it saw, and ends with 1 if anything was lost.
"""

import argparse
import csv
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_notebook

from companion import ledger, scoreboard

PARAMETERS = 'number: int = 0  # of the run\nresults_dir: str = "results"  # where rows go'
WORK = """import time
from companion import scoreboard
time.sleep(0.3)
scoreboard.record(results_dir, "00_short", f"run {number}", {"number": (float(number), "")});
"""


def notebooks(folder: Path) -> Path:
    """A folder with a notebook that works for a moment and records a row."""
    cells = [new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}), new_code_cell(WORK)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    folder.mkdir(parents=True)
    nbformat.write(new_notebook(cells=cells, metadata=kernel), folder / "00_short.ipynb")
    return folder


def started(words: list[str], given: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "companion", "run", "--notebooks", str(given), "--jobs", "2", *words]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def lost(out: Path, before: list[str]) -> list[str]:
    """What is missing of the jobs that had ended: outcome, executed notebook, row, report."""
    passed = [outcome.job.name for outcome in ledger.read(out) if outcome.error is None]
    missing = [f"the outcome of {name}" for name in before if name not in passed]
    rows = {row["job"] for row in scoreboard.read(out)}
    for name in passed:
        if name not in rows:
            missing.append(f"the row of {name}")
        if nbformat.read(out / f"{name}.ipynb", 4).cells[-1].execution_count is None:
            missing.append(f"the executed {name}")
    return missing


def killed_and_resumed(place: Path, kills: int, generator: random.Random) -> list[str]:
    """Kills so many runs of six jobs, each in a moment of its life, and lets the last one end."""
    given, out, runs = notebooks(place / "given"), place / "out", 6
    sweep = ["--sweep", "number=" + ",".join(map(str, range(runs))), "--output", str(out)]
    missing: list[str] = []
    for kill in range(kills + 1):
        begun = (out / ledger.PLAN).exists()
        before = [outcome.job.name for outcome in ledger.read(out)] if begun else []
        runner = started(["--resume", str(out)] if begun else sweep, given)
        if kill < kills:
            time.sleep(generator.uniform(0.5, 8.0))
            runner.send_signal(signal.SIGKILL)
            runner.wait()
        elif runner.wait(timeout=300):
            missing.append(f"the last run ended with {runner.returncode}")
        if out.exists():
            missing += lost(out, before)
    names = {outcome.job.name for outcome in ledger.read(out)}
    if len(names) != runs:
        missing.append(f"{runs - len(names)} jobs")
    with (out / "results.csv").open() as file:
        listed = {line["job"] for line in csv.DictReader(file)}
    if listed != names:
        missing.append(f"lines of the table: {names - listed}")
    return missing


def main() -> int:
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--times", type=int, default=10, help="kills (10)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as place:
        missing = killed_and_resumed(Path(place), arguments.times, random.Random(arguments.seed))
    print(f"{arguments.times} kills; lost: {', '.join(missing) or 'nothing'}")
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main())
