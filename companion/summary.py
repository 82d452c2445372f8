"""What the notebooks have recorded, in common terms: speed-up, accuracy, size, and what was predicted."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from companion import scoreboard, tables
from companion.measure import Spread, verdict

_ACCURACY = ("accuracy", "validation accuracy")
_BATCH = re.compile(r"speed-up, batch (\d+)")


@dataclass(frozen=True)
class Entry:
    """One way of doing something, as one machine measured it, against the plain way of its notebook.

    `speed_up` is over the plain way, `points` are what it changed of the accuracy, in percent points, `size`
    is its share of the plain way's size, and `predicted` the speed-up that theory gave. What was not measured
    is None.
    """

    notebook: str
    technique: str
    machine: str
    threads: int
    speed_up: Spread | None = None
    points: float | None = None
    size: float | None = None
    predicted: float | None = None
    busy: str | None = None

    def __str__(self) -> str:
        said = [f"{self.speed_up:.2f}x"] if self.speed_up else []
        said += [f"{self.points:+.1f} points"] if self.points is not None else []
        said += [f"{self.size:.0%} of the size"] if self.size is not None else []
        doubt = ", on a busy machine" if self.busy else ""
        return f"[{self.notebook[:2]}] {self.technique}: {', '.join(said)}{doubt}"


def read(place: str | Path) -> list[dict]:
    """The records of a scoreboard: of a file, or of the one in a folder; the last of each technique.

    Raises ValueError for a place that is not there, or a damaged line.
    """
    path = Path(place)
    if not path.exists():
        raise ValueError(f"{str(path)!r} is no scoreboard, and no folder with one")
    rows = scoreboard.read(path) if path.is_dir() else scoreboard.read(path.parent, path.name)
    last = {(row["notebook"], row["technique"]): row for row in rows}
    return list(last.values())


def machine_of(row: dict) -> str:
    """The machine that measured a row, in a few words."""
    about = row["environment"]
    gpus = about.get("gpus", "none")
    where = about["cpu"] if str(gpus).startswith("none") or row["device"] == "cpu" else gpus
    return f"{where}, {about['cores']} cores"


def machines_of(rows: Sequence[dict]) -> str:
    """All machines that measured one of these rows."""
    return " and ".join(dict.fromkeys(map(machine_of, rows)))


def entries(rows: Sequence[dict]) -> list[Entry]:
    """What was measured, an entry for each batch size that a row has; in the order of the notebooks.

    Speeds are set against the first row of their notebook that has a speed, accuracies and sizes against the
    first that has one: notebooks record the plain way first.
    """
    found = []
    for notebook in sorted({row["notebook"] for row in rows}):
        own = [row for row in rows if row["notebook"] == notebook and row["metrics"]]
        for row in own:
            found += _of_row(row, own)
    return found


def _of_row(row: dict, own: list[dict]) -> list[Entry]:
    metrics = row["metrics"]
    accuracy, plain_accuracy = _value(row, *_ACCURACY), _first(own, *_ACCURACY)
    size, plain_size = _value(row, "size"), _first(own, "size")
    about = {
        "notebook": row["notebook"],
        "machine": machine_of(row),
        "threads": row["settings"].get("threads", row["environment"]["threads"]),
        "points": None if accuracy is None else accuracy - plain_accuracy,
        "size": None if size is None else size / plain_size,
        "predicted": _value(row, "predicted", unit="x"),
        "busy": row.get("busy"),
    }
    by_batch = {name: _BATCH.fullmatch(name) for name in metrics}
    gains = {
        f"{row['technique']}, batch {match[1]}": _spread(metrics[name])
        for name, match in by_batch.items()
        if match and f"batch {match[1]}" not in row["technique"]
    }
    if "speed-up" in metrics:
        gains[row["technique"]] = _spread(metrics["speed-up"])
    elif not gains and "speed" in metrics:
        gains[row["technique"]] = _against_first(row, own)
    if not gains and about["points"] is None and about["size"] is None:
        return []
    return [Entry(technique=name, speed_up=gain, **about) for name, gain in gains.items()] or [
        Entry(technique=row["technique"], **about)
    ]


def _against_first(row: dict, own: list[dict]) -> Spread:
    """The speed of a row over that of the first: measured at different times, so with the widest range."""
    first = next(other for other in own if "speed" in other["metrics"])
    speed, plain = (_spread(one["metrics"]["speed"]) for one in (row, first))
    if row is first:
        return Spread(1.0, 1.0, 1.0, 1)
    return Spread(speed.median / plain.median, speed.low / plain.high, speed.high / plain.low, 1)


def _spread(entry: dict) -> Spread:
    value = entry["value"]
    return Spread(value, entry.get("low", value), entry.get("high", value), 1)


def _value(row: dict, *names: str, unit: str | None = None) -> float | None:
    values = [row["metrics"][name] for name in names if name in row["metrics"]]
    return next((entry["value"] for entry in values if unit in (None, entry["unit"])), None)


def _first(rows: list[dict], *names: str) -> float:
    """Of the first row that has it; only asked for where one has."""
    return next((value for row in rows if (value := _value(row, *names)) is not None), 0.0)


def table(found: Sequence[Entry]) -> tables.Table:
    """The entries, the fastest first, with a verdict by their spread."""
    ordered = sorted(found, key=lambda entry: -(entry.speed_up.median if entry.speed_up else 0.0))
    head, lines = ("notebook", "technique", "speed-up", "verdict", "accuracy", "size", "predicted"), []
    for entry in ordered:
        gain = entry.speed_up
        cells = [f"{gain:.2f}x" if gain else "", verdict(gain) if gain else ""]
        cells += ["" if entry.points is None else f"{entry.points:+.1f}"]
        cells += ["" if entry.size is None else f"{entry.size:.0%}"]
        cells += ["" if entry.predicted is None else f"{entry.predicted:.2f}x"]
        lines.append((entry.notebook, entry.technique, *cells))
    return tables.Table(head, lines)


def skipped(rows: Sequence[dict]) -> tables.Table:
    """What could not run, with the reason; of a run in which nothing was skipped, no line."""
    prefix = "skipped: "
    lines = [
        (row["notebook"], row["technique"], row["status"].removeprefix(prefix))
        for row in rows
        if row["status"].startswith(prefix)
    ]
    return tables.Table(("notebook", "technique", "not run, because"), lines)


def side_by_side(here: Sequence[Entry], there: Sequence[Entry]) -> dict[str, tuple[Spread, Spread]]:
    """Speed-ups of what both machines have measured, by notebook and technique."""
    others = {(entry.notebook, entry.technique): entry.speed_up for entry in there if entry.speed_up}
    return {
        f"[{entry.notebook[:2]}] {entry.technique}": (entry.speed_up, others[entry.notebook, entry.technique])
        for entry in here
        if entry.speed_up and (entry.notebook, entry.technique) in others
    }


def stored() -> list[dict]:
    """The records of a whole run that come with the package, of the machine that they name."""
    return read(scoreboard.STORED)
