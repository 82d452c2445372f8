"""What a search for the fastest variant has found: rows, a table, a figure, a report, and the winner."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import geometric_mean

from matplotlib.figure import Figure

from companion import artefacts, measure, tables, tradeoffs
from companion.measure import Spread

PLAIN = "the model as it is"


@dataclass(frozen=True)
class Row:
    """One variant: threads, accuracy, by batch size the seconds of a call and the speed-up over the model,
    bytes on disk and added to memory, seconds from loading to the first answers and those that it took to
    try it; or the reason why not. `final`: measured again in turn with all that lead.
    """

    name: str
    threads: int | None = None
    accuracy: float | None = None
    latency: dict[int, Spread] | None = None
    speed_up: dict[int, Spread] | None = None
    disk_bytes: int | None = None
    memory_bytes: int | None = None
    cold_seconds: float | None = None
    seconds: float | None = None
    reason: str | None = None
    remark: str | None = None
    final: bool = False

    @property
    def usable(self) -> bool:
        """Whether it was measured whole."""
        return self.reason is None and self.accuracy is not None

    @property
    def score(self) -> float:
        """The lower ends of its speed-ups together, as a geometric mean."""
        return geometric_mean(spread.low for spread in self.speed_up.values())

    def __str__(self) -> str:
        if self.reason:
            return f"{self.name:32} {self.reason}"
        gains = ", ".join(f"{gain:.2f}x at {size}" for size, gain in self.speed_up.items())
        known = f"accuracy {self.accuracy:.2%}" if self.accuracy is not None else ""
        again = f"again, {self.threads} threads" if self.final else ""
        return f"{self.name:32} {'; '.join(filter(None, (gains, known, again, self.remark)))}"


@dataclass(frozen=True)
class Found:
    """What a search has found. `accuracies` are two evaluations of the model as it is: where they differ,
    differences of that size are chance.
    """

    rows: tuple[Row, ...]
    batch_sizes: tuple[int, ...]
    folders: dict[str, Path] = field(repr=False)
    environment: dict[str, object] = field(repr=False)
    budget: float
    accuracies: tuple[float, float]
    seconds: float
    interrupted: bool = False

    def __getitem__(self, name: str) -> Row:
        """The row of one variant; KeyError if it was not tried."""
        return {row.name: row for row in self.rows}[name]

    @property
    def plain(self) -> Row:
        return self.rows[0]

    @property
    def winner(self) -> Row:
        """The fastest over all batch sizes; the model as it is where nothing is faster for sure."""
        return self._best(lambda row: row.score)

    def at(self, batch_size: int) -> Row:
        """The fastest at one batch size; the model as it is where nothing is faster for sure."""
        return self._best(lambda row: row.speed_up[batch_size].low)

    def _best(self, speed) -> Row:
        least = self.plain.accuracy - self.budget
        fit = [row for row in self.rows[1:] if row.usable and row.accuracy >= least]
        fit = [row for row in fit if row.final] or fit
        fastest = max(fit, key=speed, default=self.plain)
        return fastest if speed(fastest) > 1 else self.plain

    @property
    def noise(self) -> float:
        """How far two evaluations of the same model were apart."""
        return abs(self.accuracies[0] - self.accuracies[1])

    def save(self, folder: str | Path) -> Path:
        """Writes the winner's artefact into a folder that is not there yet; `artefacts.load` reads it.

        Raises ValueError where the model as it is has won: there is nothing to save.
        """
        if self.winner is self.plain:
            raise ValueError("nothing was faster than the model as it is: keep it, there is nothing to save")
        if Path(folder).exists():
            raise ValueError(f"{folder} is there already")
        made = Path(shutil.copytree(self.folders[self.winner.name], folder))
        about = made / artefacts.ABOUT
        text = json.loads(about.read_text(encoding="utf-8")) | {"threads": self.winner.threads}
        about.write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")
        return made

    def table(self) -> tables.Table:
        """All variants: the finalists first, then what was measured, then what could not be."""
        head = ["variant", "threads"]
        for size in self.batch_sizes:
            head += [f"ms, batch {size}", f"speed-up, batch {size}"]
        head += ["samples/s", "accuracy", "MiB", "memory (MiB)", "cold start (s)", "remark"]
        order = sorted(self.rows[1:], key=lambda row: (not row.final, not row.usable, row.reason is not None))
        return tables.Table(tuple(head), [self._cells(row) for row in (self.plain, *order)])

    def _cells(self, row: Row) -> tuple[str, ...]:
        if row.reason:
            return row.name, *[""] * (2 * len(self.batch_sizes) + 6), row.reason
        cells = [row.name, str(row.threads)]
        for size in self.batch_sizes:
            if size not in row.speed_up:  # dropped before
                cells += ["", ""]
                continue
            gain = row.speed_up[size]
            verdict = "" if row is self.plain else f" {measure.verdict(gain)}"
            cells += [f"{row.latency[size].scaled(1e3):.3g}", f"{gain:.2f}x{verdict}"]
        largest = max(self.batch_sizes)
        accuracy = "" if row.accuracy is None else f"{row.accuracy:.2%}"
        rate = f"{row.latency[largest].rate(largest):,.0f}" if largest in row.latency else ""
        cells += [rate, accuracy, f"{row.disk_bytes / 2**20:.2f}"]
        cells += ["" if row.memory_bytes is None else f"{row.memory_bytes / 2**20:.0f}"]
        cells += ["" if row.cold_seconds is None else f"{row.cold_seconds:.2f}", self._remark(row)]
        return tuple(cells)

    def _remark(self, row: Row) -> str:
        beyond = row.accuracy is not None and row.accuracy < self.plain.accuracy - self.budget
        said = ["the fastest" if row is self.winner and row is not self.plain else ""]
        said += ["beyond the accuracy budget" if beyond else "", row.remark or ""]
        return "; ".join(filter(None, said))

    def figure(self, batch_size: int) -> Figure:
        """Accuracy against the speed-up at this batch size, and against how many times smaller files are."""
        rows = {row.name: row for row in self.rows if row.usable}
        gains = {
            f"speed-up, batch {batch_size}": {name: row.speed_up[batch_size] for name, row in rows.items()},
            "times smaller": {name: self.plain.disk_bytes / row.disk_bytes for name, row in rows.items()},
        }
        return tradeoffs.pareto({name: row.accuracy for name, row in rows.items()}, gains, noise=self.noise)

    def report(self) -> dict[str, object]:
        """All of it as JSON can hold it, with the machine: to compare with another machine's."""
        rows = [_plainly(row) for row in self.rows]
        about = {"budget": self.budget, "accuracies": self.accuracies, "seconds": round(self.seconds, 1)}
        about |= {"interrupted": self.interrupted, "winner": self.winner.name}
        return about | {"environment": self.environment, "rows": rows}

    def __str__(self) -> str:
        best, lines = self.winner, []
        if best is self.plain:
            tried = len(self.rows) - 1
            lines.append(f"Keep it as it is: none of {tried} variants is faster for sure within the budget.")
        else:
            gains = " and ".join(f"{gain:.2f}x at batch {size}" for size, gain in best.speed_up.items())
            threads = "1 thread" if best.threads == 1 else f"{best.threads} threads"
            lines.append(f"{best.name}, on {threads}: {gains}.")
            lines.append(f"Accuracy {best.accuracy:.2%}; as it is {self.plain.accuracy:.2%}.")
        others = {size: self.at(size).name for size in self.batch_sizes}
        lines += [f"At batch {size} alone: {name}." for size, name in others.items() if name != best.name]
        if self.noise:
            lines.append(f"Two evaluations of the same model were {self.noise:.2%} apart: so much is chance.")
        if self.interrupted:
            lines.append("The search was interrupted: the leading ones were not compared in turn.")
        return "\n".join(lines)


def _plainly(row: Row) -> dict[str, object]:
    def spreads(of: dict[int, Spread] | None) -> dict[str, list[float]] | None:
        return of and {str(size): [one.median, one.low, one.high] for size, one in of.items()}

    return vars(row) | {"latency": spreads(row.latency), "speed_up": spreads(row.speed_up)}


def compared(reports: Sequence[dict]) -> tables.Table:
    """Several machines' reports side by side: the speed-up of each variant, at each batch size."""
    sizes = list(reports[0]["rows"][0]["speed_up"])
    names = list(dict.fromkeys(row["name"] for report in reports for row in report["rows"]))
    machines = [
        f"{report['environment']['cpu']}, {report['environment']['cores']} cores" for report in reports
    ]
    lines = []
    for name in names:
        found = [next((row for row in report["rows"] if row["name"] == name), {}) for report in reports]
        gains = [row.get("speed_up") or {} for row in found]
        lines.append(
            (name, *[f"{gain[size][0]:.2f}x" if size in gain else "" for gain in gains for size in sizes])
        )
    return tables.Table(("variant", *[f"{what}, batch {size}" for what in machines for size in sizes]), lines)
