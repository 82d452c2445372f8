"""One line of JSON for each measurement, so that what was gained here can be compared across notebooks and
machines.
"""

import json
import math
import os
import time
from pathlib import Path

import torch

from companion import host, kernels, ledger, machine, tables
from companion.measure import Spread

FILE = "scoreboard.jsonl"
STORED = Path(__file__).parent / "stored-results" / FILE  # of the runs whose outputs the notebooks hold
_watch = host.Watch()  # of what other processes take, from one record to the next


def record(
    results_dir: str | Path,
    notebook: str,
    technique: str,
    metrics: dict[str, tuple[float | Spread, str]] | None = None,
    *,
    device: torch.device | str = "cpu",
    skipped: str | None = None,
    **settings: object,
) -> dict:
    """Appends one measurement to `results_dir`'s scoreboard and gives it.

    `metrics` maps a name to (value, unit): `{"speed": (9100.0, "samples/s")}`; a `measure.Spread` keeps its
    range. What could not run here has `skipped`, the reason, instead. `settings` are whatever else tells this
    row from others. If the machine was busy since the last record, the row says so. Several processes may
    record at once.

    Raises ValueError when there are neither metrics nor a reason, or a value is not finite.
    """
    if bool(metrics) == bool(skipped):
        raise ValueError(f"record {technique!r} with either metrics or the reason why it was skipped")
    for name, (value, _) in (metrics or {}).items():
        if not all(map(math.isfinite, _numbers(value).values())):
            raise ValueError(f"{name} of {technique!r} is not finite: {value}")
    row = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "notebook": notebook,
        "technique": technique,
        "status": f"skipped: {skipped}" if skipped else "measured",
        "metrics": {
            name: {**_numbers(value), "unit": unit} for name, (value, unit) in (metrics or {}).items()
        },
        "settings": settings,
        "job": os.environ.get(kernels.JOB, ""),
        "device": str(device),
        "busy": _watch.busy(again=True),
        "environment": machine.environment(),
    }
    line = json.dumps(row, allow_nan=False).encode() + b"\n"
    path = Path(results_dir, FILE)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        written = os.write(descriptor, line)  # one write in append mode: lines of several processes never mix
    finally:
        os.close(descriptor)
    if written != len(line):
        raise OSError(f"only {written} of {len(line)} bytes fitted into {path}: the disk is full")
    return row


def read(results_dir: str | Path, name: str = FILE) -> list[dict]:
    """All rows recorded in `results_dir`, oldest first; an empty list where nothing was.

    Raises ValueError for a damaged line.
    """
    path, rows = Path(results_dir, name), []
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is damaged: {error}; delete that line") from error
    return rows


def keep(notebook: str, rows: list[dict]) -> None:
    """Puts a notebook's rows into the scoreboard that comes with the package, in place of its former ones."""
    others = [row for row in read(STORED.parent) if row["notebook"] != notebook]
    kept = sorted([*others, *rows], key=lambda row: row["notebook"])
    ledger.replaced(STORED, "".join(json.dumps(row | {"job": ""}) + "\n" for row in kept))


def _numbers(value: float | Spread) -> dict[str, float]:
    if isinstance(value, Spread):
        return {"value": float(value.median), "low": float(value.low), "high": float(value.high)}
    return {"value": float(value)}


def table(rows: list[dict]) -> tables.Table:
    """Rows of a scoreboard, for a notebook or a terminal; rows of a busy machine say that they are not to be
    trusted.
    """
    head, lines = ("notebook", "technique", "result", "device", "threads"), []
    for row in rows:
        threads = row["settings"].get("threads", row["environment"]["threads"])
        result = (
            ", ".join(f"{name} {_result(entry)}" for name, entry in row["metrics"].items()) or row["status"]
        )
        lines.append((row["notebook"], row["technique"], result, row["device"], str(threads)))
    if any(row.get("busy") for row in rows):
        head += ("doubt",)
        lines = [(*line, _doubt(row)) for line, row in zip(lines, rows, strict=True)]
    return tables.Table(head, lines)


def _result(entry: dict) -> str:
    spread = f" ({tables.short(entry['low'])}-{tables.short(entry['high'])})" if "low" in entry else ""
    return f"{tables.short(entry['value'])}{spread} {entry['unit']}"


def _doubt(row: dict) -> str:
    return f"this machine was busy, not to be trusted: {row['busy']}" if row.get("busy") else ""
