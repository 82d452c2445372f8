"""What a search found: its trials as a table, as curves, and as a figure of the space."""

import itertools
import math
import re
from dataclasses import dataclass

from matplotlib.figure import Figure

from companion import search_figures, tables

MOMENT = "moment"  # the entry of a report that says when it came, in seconds since 1970


def rungs(trials: int, epochs: int, factor: int = 2, grace: int = 1) -> dict[int, int]:
    """Successive halving in theory: epochs -> how many trials train that far.

    After `grace` epochs, and then after `factor` times as many each time, the better 1 / `factor` go on; the
    last ones train to the end. Source: Li et al. 2020, "A System for Massively Parallel Hyperparameter
    Tuning", section 3.1.
    """
    found, rung, left = {}, grace, trials
    while rung < epochs:
        found[rung] = left
        rung, left = factor * rung, max(1, left // factor)
    return found | {epochs: left}


def spent(rungs: dict[int, int]) -> int:
    """The epochs that all trials together train, where so many train to each rung."""
    ends = [0, *rungs]
    return sum((end - begin) * rungs[end] for begin, end in itertools.pairwise(ends))


class SearchError(RuntimeError):
    """A search of which no trial can be used."""


@dataclass(frozen=True)
class Trial:
    """One configuration, and what its training reported: an entry for each report, with the metrics' names.

    `status` is "finished", "stopped early" (after fewer reports than the longest trial), "failed", or "not
    finite" (the metric became infinite or NaN). `at` has the seconds of the reports since the search's first.
    """

    config: dict[str, object]
    reports: tuple[dict[str, float], ...]
    at: tuple[float, ...]
    status: str
    error: str | None = None


@dataclass(frozen=True)
class Search:
    """What a search found. `seconds` are of the whole search, without the start of Ray."""

    metric: str
    mode: str
    trials: tuple[Trial, ...]
    seconds: float

    @property
    def reports(self) -> int:
        """How many reports there were, of all trials together: the epochs that were trained, if each
        reports after each.
        """
        return sum(len(trial.reports) for trial in self.trials)

    @property
    def best(self) -> Trial:
        """The trial with the best last report, of those that neither failed nor became infinite.

        Raises SearchError, with the first trial's error, if there is none.
        """
        usable = [trial for trial in self.trials if trial.status in ("finished", "stopped early")]
        if not usable:
            reasons = [trial.error or trial.status for trial in self.trials] or ["there is no trial"]
            raise SearchError(f"none of {len(self.trials)} trials can be used; the first: {reasons[0]}")
        return max(usable, key=lambda trial: self._worth(trial.reports[-1]))

    def _worth(self, report: dict[str, float]) -> float:
        return report[self.metric] if self.mode == "max" else -report[self.metric]

    def progress(self) -> list[tuple[int, float]]:
        """The best value so far against the reports spent, in the order in which they came: a pair for each
        report.
        """
        every = [
            (at, report)
            for trial in self.trials
            for at, report in zip(trial.at, trial.reports, strict=True)
            if math.isfinite(report[self.metric])
        ]
        best, pairs = None, []
        for spent, (_, report) in enumerate(sorted(every, key=lambda pair: pair[0]), 1):
            if best is None or self._worth(report) > self._worth(best):
                best = report
            pairs.append((spent, best[self.metric]))
        return pairs

    def table(self) -> tables.Table:
        """A row for each trial, the best first: configuration, reports, last value of the metric, status."""
        names = list(dict.fromkeys(name for trial in self.trials for name in trial.config))

        def last(trial: Trial) -> float:
            worth = self._worth(trial.reports[-1]) if trial.reports else -math.inf
            return worth if math.isfinite(worth) else -math.inf

        rows = [
            (
                *(_shown(trial.config.get(name, "")) for name in names),
                str(len(trial.reports)),
                _shown(trial.reports[-1][self.metric]) if trial.reports else "",
                f"{trial.status}: {trial.error}" if trial.error else trial.status,
            )
            for trial in sorted(self.trials, key=last, reverse=True)
        ]
        return tables.Table((*names, "reports", self.metric, "status"), rows)

    def curves(self) -> Figure:
        """The metric of each trial by report; those that were stopped early are grey."""
        return search_figures.curves(
            [
                ([report[self.metric] for report in trial.reports], trial.status == "finished")
                for trial in self.trials
            ],
            self.metric,
        )

    def figure(self) -> Figure:
        """Parallel coordinates: a line for each trial through its configuration and what came of it."""
        usable = [trial for trial in self.trials if trial.reports]
        return search_figures.parallel(
            [trial.config | {self.metric: trial.reports[-1][self.metric]} for trial in usable],
            self.metric,
            self.mode,
        )


def _shown(value: object) -> str:
    return tables.short(value) if isinstance(value, float) else str(value)


def read(results, metric: str, mode: str, seconds: float) -> Search:
    """From the ResultGrid of `Tuner.fit`, which took so many seconds.

    A value that was reported again after a trial was restored counts once.
    """
    from ray.tune.result import AUTO_RESULT_KEYS

    own = {*AUTO_RESULT_KEYS, "done", "trial_id", "checkpoint_dir_name", "should_checkpoint", MOMENT}
    found = []
    # A result itself may have no configuration, and does not say that its trial never ended.
    for result, trial in zip(results, results._experiment_analysis.trials, strict=True):
        frame = result.metrics_dataframe
        rows = [] if frame is None else frame.to_dict("records")
        rows = list({row["training_iteration"]: row for row in rows}.values())
        reports = [
            {name: value for name, value in row.items() if name not in own and not name.startswith("config/")}
            for row in rows
        ]
        moments = [float(row.get(MOMENT, row["timestamp"])) for row in rows]
        found.append((result.error, trial, tuple(reports), moments))
    longest = max((len(reports) for *_, reports, _ in found), default=0)
    first = min((moments[0] for *_, moments in found if moments), default=0.0)
    trials = []
    for error, trial, reports, moments in found:
        said = _said(error) if error else None
        if not error and trial.status not in ("TERMINATED", "ERROR"):
            said = f"Ray ended the search while this trial was {trial.status.lower()}"
        status = "failed" if said or not reports else _status(reports, metric, longest)
        since = tuple(moment - first for moment in moments)
        trials.append(Trial(dict(trial.config), reports, since, status, said))
    return Search(metric, mode, tuple(trials), seconds)


def _status(reports: tuple[dict[str, float], ...], metric: str, longest: int) -> str:
    if not math.isfinite(reports[-1][metric]):
        return "not finite"
    return "finished" if len(reports) == longest else "stopped early"


def _said(error: Exception) -> str:
    """What a trial's process raised, and where; or that it died."""
    text = str(error)
    if "creation task" in text:  # it never came to the training function
        return f"its process could not start: {text.strip().splitlines()[-1]}"
    cause = getattr(error, "cause", None)
    if cause is None:
        return "its process died: it was killed, crashed, or ran out of memory"
    places = re.findall(r'File "[^"]*", line (\d+), in (\S+)', text)
    where = f" (line {places[-1][0]}, in {places[-1][1]})" if places else ""
    return f"{type(cause).__name__}: {cause}{where}"
