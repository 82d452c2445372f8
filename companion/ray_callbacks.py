"""What Ray Tune calls back while a search runs: the end of a trial that diverged, and a progress bar."""

import math
import time

from tqdm.auto import tqdm

from companion import ray_results


def not_finite(metric: str):
    """Ends a trial whose metric is infinite or NaN, before scheduler or searcher hear of it."""
    from ray.tune import Stopper

    class NotFinite(Stopper):
        def __call__(self, trial_id: str, result: dict) -> bool:
            return not math.isfinite(result[metric])

        def stop_all(self) -> bool:
            return False

    return NotFinite()


def silent():
    """In place of Ray's own reporter, which leaves an empty display in a notebook."""
    from ray.tune import ProgressReporter

    class Silent(ProgressReporter):
        def should_report(self, trials, done: bool = False) -> bool:
            return False

        def report(self, trials, done: bool, *info: object) -> None:
            pass

    return Silent()


def bar(metric: str, mode: str, shown: bool):
    """A progress bar: trials that have ended, reports, and the best value. It notes when each report came."""
    from ray.tune import Callback

    better = max if mode == "max" else min

    class Bar(Callback):
        def __init__(self):
            self.reports, self.best, self.bar = 0, None, None

        def __getstate__(self) -> dict:
            return self.__dict__ | {"bar": None}

        def setup(self, total_num_samples: int = 0, **info: object) -> None:
            self.bar = tqdm(total=total_num_samples, unit="trial", disable=not shown, leave=False)

        def on_trial_result(self, iteration, trials, trial, result, **info) -> None:
            result[ray_results.MOMENT] = time.time()  # Ray's own timestamp is in whole seconds
            self.reports += 1
            if math.isfinite(result[metric]):
                self.best = result[metric] if self.best is None else better(self.best, result[metric])
                self.bar.set_postfix({"reports": self.reports, f"best {metric}": f"{self.best:.4g}"})

        def on_trial_complete(self, iteration, trials, trial, **info) -> None:
            self.bar.update()

        def on_trial_error(self, iteration, trials, trial, **info) -> None:
            self.bar.update()

        def on_experiment_end(self, trials, **info) -> None:
            self.bar.close()

    return Bar()
