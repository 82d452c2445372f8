"""What tests and notebooks took: a plugin of pytest that notes it, and a program that shows the slowest.

`python -m tests.times --start` forgets what was noted and looks for room on the disk; `python -m tests.times`
shows.
"""

import json
import os
import shutil
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
NOTED = ROOT / "results" / "test-times.jsonl"
ENOUGH_BYTES = 15 * 10**9
NOISE = 3.0  # what a slower or busy machine is allowed, against the one that the budgets were taken on


def add(kind: str, name: str, seconds: float, cpu_seconds: float | None = None) -> None:
    """Notes what a "test" or a "notebook" took; several processes may note at once."""
    NOTED.parent.mkdir(exist_ok=True)
    line = json.dumps({"kind": kind, "name": name, "seconds": seconds, "cpu_seconds": cpu_seconds})
    with NOTED.open("a") as file:
        file.write(line + "\n")


def within_budget(notebook: str, kind: str, cpu_seconds: float) -> None:
    """Fails if a run of a notebook took more CPU-seconds than parameters.toml allows its kind, noise
    included.
    """
    budgets = tomllib.loads((ROOT / "tests" / "parameters.toml").read_text())["cpu_seconds"]
    allowed = NOISE * budgets.get(notebook, {}).get(kind, budgets[kind])
    assert cpu_seconds <= allowed, (
        f"{notebook}, {kind}: {cpu_seconds:.0f} CPU-seconds, of {allowed:.0f} allowed"
    )


def pytest_runtest_logreport(report) -> None:
    # Once, where all reports come together.
    if report.when == "call" and "PYTEST_XDIST_WORKER" not in os.environ:
        add("test", report.nodeid, report.duration)


def start() -> None:
    NOTED.unlink(missing_ok=True)
    folder = tempfile.gettempdir()
    free = min(shutil.disk_usage(place).free for place in (ROOT, folder))
    if free < ENOUGH_BYTES:
        print(
            f"note: only {free / 1e9:.0f} GB are free in {ROOT.name} or the temporary folder; 15 GB are "
            f"comfortable"
        )


def show(count: int = 10) -> None:
    """Prints the slowest tests and notebooks."""
    rows = [json.loads(line) for line in NOTED.read_text().splitlines()] if NOTED.exists() else []
    for kind in ("test", "notebook"):
        slowest = sorted((row for row in rows if row["kind"] == kind), key=lambda row: -row["seconds"])[
            :count
        ]
        if slowest:
            print(f"the slowest {kind}s, of {sum(row['kind'] == kind for row in rows)}:")
        for row in slowest:
            used = f"{row['cpu_seconds']:6.0f} CPU-s" if row["cpu_seconds"] is not None else " " * 12
            print(f"{row['seconds']:6.1f} s {used}  {row['name']}")


if __name__ == "__main__":
    start() if "--start" in sys.argv else show()
