"""One line of JSON for each measurement, so that what was gained here can be compared across notebooks and machines."""

import html
import json
import os
import time
from pathlib import Path

import torch

from companion import measure

FILE = "scoreboard.jsonl"


def record(
    results_dir: str | Path,
    notebook: str,
    technique: str,
    metrics: dict[str, tuple[float, str]] | None = None,
    *,
    device: torch.device | str = "cpu",
    skipped: str | None = None,
    **settings: object,
) -> dict:
    """Appends one measurement to `results_dir`'s scoreboard and gives it.

    `metrics` maps a name to (value, unit): `{"speed": (9100.0, "samples/s")}`. What could not run here has `skipped`, the
    reason, instead. `settings` are whatever else tells this row from others. Several processes may record at once.

    Raises ValueError when there are neither metrics nor a reason, or a value is not finite.
    """
    if bool(metrics) == bool(skipped):
        raise ValueError(f"record {technique!r} with either metrics or the reason why it was skipped")
    row = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "notebook": notebook,
        "technique": technique,
        "status": f"skipped: {skipped}" if skipped else "measured",
        "metrics": {name: {"value": float(value), "unit": unit} for name, (value, unit) in (metrics or {}).items()},
        "settings": settings,
        "device": str(device),
        "environment": measure.environment(),
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


def read(results_dir: str | Path) -> list[dict]:
    """All rows recorded in `results_dir`, oldest first; an empty list where nothing was. Raises ValueError for a damaged line."""
    path, rows = Path(results_dir, FILE), []
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is damaged: {error}; delete that line") from error
    return rows


class Table:
    """Rows of a scoreboard, shown as a table in a notebook and as text in a terminal."""

    HEAD = ("notebook", "technique", "result", "device", "threads")

    def __init__(self, rows: list[dict]):
        self.rows = [
            (
                row["notebook"],
                row["technique"],
                ", ".join(f"{name} {_short(m['value'])} {m['unit']}" for name, m in row["metrics"].items()) or row["status"],
                row["device"],
                str(row["settings"].get("threads", row["environment"]["threads"])),
            )
            for row in rows
        ]

    def __str__(self) -> str:
        widths = [max(map(len, column)) for column in zip(self.HEAD, *self.rows, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in (self.HEAD, *self.rows)
        )

    def _repr_html_(self) -> str:
        lines = [("th", self.HEAD), *(("td", row) for row in self.rows)]
        body = "".join(
            f"<tr>{''.join(f'<{tag} style=text-align:left>{html.escape(cell)}</{tag}>' for cell in row)}</tr>"
            for tag, row in lines
        )
        return f"<table>{body}</table>"


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
