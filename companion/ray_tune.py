"""A search for hyperparameters with Ray Tune: one call, with everything checked before and a table after.

found = ray_tune.search(train, {"lr": tune.loguniform(1e-4, 1e-1)}, metric="accuracy", trials=16)
print(found.best.config); print(found.table()); found.figure()
"""

import inspect
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from companion import checks, randomness, ray_callbacks, ray_results, ray_session, ray_trials, training
from companion.ray_results import Search

SCHEDULERS = ("fifo", "asha")
SEARCHERS = ("random", "optuna")
_SETTINGS = "search.json"  # beside Ray's own files: what a search that goes on must agree with


@dataclass(frozen=True)
class _Wanted:
    """What was asked of `search`."""

    train: Callable[..., object]
    space: dict[str, object]
    metric: str
    mode: str
    trials: int
    epochs: int | None
    scheduler: object
    searcher: object
    shared: dict[str, object]
    cpus: float
    gpus: float
    retries: int
    seed: int
    limit_seconds: float | None
    progress: bool

    def check(self) -> None:
        """Raises ValueError for settings that cannot be right."""
        from ray.tune.search.sample import Function

        checks.choice("mode", self.mode, ("max", "min"))
        checks.whole("trials", self.trials)
        checks.whole("retries", self.retries, least=0)
        checks.number("cpus", self.cpus, least=0)
        checks.number("gpus", self.gpus, least=0)
        if self.cpus == self.gpus == 0:
            raise ValueError(
                "cpus=0 and gpus=0: all trials would start at once; give each a share of something"
            )
        for name, known in (("scheduler", SCHEDULERS), ("searcher", SEARCHERS)):
            if isinstance(getattr(self, name), str):
                checks.choice(name, getattr(self, name), known)
        if self.scheduler == "asha":
            checks.whole("epochs", self.epochs or 0)
        if inspect.isclass(self.train) or not callable(self.train):
            raise ValueError(f"train={self.train!r} must be a function of a configuration")
        try:
            inspect.signature(self.train).bind({}, **self.shared)
        except TypeError as error:
            raise ValueError(f"train(config, {', '.join(self.shared)}) cannot be called: {error}") from None
        if not self.space:
            raise ValueError("the space is empty: there is nothing to search for")
        drawn = [name for name, domain in self.space.items() if isinstance(domain, Function)]
        if drawn and self.searcher != "random":
            raise ValueError(
                f"space[{drawn[0]!r}] is a function, which only the random searcher can draw from: write "
                "tune.choice([4, 8, ...]), tune.randint or tune.loguniform instead"
            )

    def settings(self) -> dict[str, object]:
        """What decides what a search finds, as far as it can be written down."""
        names = ("metric", "mode", "trials", "epochs", "seed")
        kinds = {name: _kind(getattr(self, name)) for name in ("scheduler", "searcher")}
        return {name: getattr(self, name) for name in names} | kinds | {"space": sorted(self.space)}

    def trainable(self) -> Callable:
        """The function that Ray calls in a trial's process, with what it shares and what it needs."""
        from ray import tune

        trial = ray_trials.prepared(self.train, max(1, int(self.cpus)), self.seed)
        shared = tune.with_parameters(trial, **self.shared) if self.shared else trial
        return tune.with_resources(shared, {"cpu": self.cpus, "gpu": self.gpus})

    def tuner(self, path: Path):
        """Ray's Tuner that begins, or goes on with, the search in a folder."""
        from ray import tune
        from ray.tune.logger import JsonLoggerCallback
        from ray.tune.schedulers import PopulationBasedTraining, PopulationBasedTrainingReplay

        if tune.Tuner.can_restore(str(path)):
            return tune.Tuner.restore(
                str(path), self.trainable(), resume_unfinished=True, resume_errored=True
            )
        return tune.Tuner(
            self.trainable(),
            param_space=self.space,
            tune_config=tune.TuneConfig(
                metric=self.metric,
                mode=self.mode,
                num_samples=self.trials,
                scheduler=self._scheduler(),
                search_alg=self._searcher(),
                time_budget_s=self.limit_seconds,
                # A proposal then knows of all trials but those that run.
                max_concurrent_trials=self._at_once(),
                # Of the trials of PBT some were taken for finished halfway where processes were used again.
                reuse_actors=not isinstance(
                    self.scheduler, (PopulationBasedTraining, PopulationBasedTrainingReplay)
                ),
            ),
            run_config=tune.RunConfig(
                name=path.name,
                storage_path=str(path.parent),
                stop=ray_callbacks.not_finite(self.metric),
                failure_config=tune.FailureConfig(max_failures=self.retries),
                callbacks=[ray_callbacks.bar(self.metric, self.mode, self.progress), JsonLoggerCallback()],
                progress_reporter=ray_callbacks.silent(),
                verbose=0,
            ),
        )

    @contextmanager
    def pending(self) -> Iterator[None]:
        """Has Ray start as many trials at once as there is room for; with a searcher it would start one, and
        wait for its process.
        """
        limit = self._at_once()
        with mock.patch.dict(os.environ, {"TUNE_MAX_PENDING_TRIALS_PG": str(limit)} if limit else {}):
            yield

    def _at_once(self) -> int | None:
        """How many trials may be under way with Optuna; None where Ray is to choose: schedulers of Ray's own
        may have to pause more trials than run.
        """
        limited = self.searcher == "optuna" and self.scheduler in SCHEDULERS
        return ray_session.at_once(self.cpus, self.gpus) if limited else None

    def _scheduler(self):
        from ray.tune import schedulers

        if self.scheduler == "asha":
            return schedulers.ASHAScheduler(max_t=self.epochs, grace_period=1, reduction_factor=2)
        return schedulers.FIFOScheduler() if self.scheduler == "fifo" else self.scheduler

    def _searcher(self):
        from ray.tune.search.basic_variant import BasicVariantGenerator

        if self.searcher == "random":
            return BasicVariantGenerator(random_state=self.seed)
        if self.searcher == "optuna":
            from ray.tune.search.optuna import OptunaSearch

            return OptunaSearch(seed=self.seed)
        return self.searcher


def search(
    train: Callable[..., object],
    space: Mapping[str, object],
    *,
    metric: str,
    mode: str = "max",
    trials: int = 10,
    epochs: int | None = None,
    scheduler: object = "fifo",
    searcher: object = "random",
    shared: Mapping[str, object] | None = None,
    cpus: float = 1,
    gpus: float = 0,
    retries: int = 0,
    seed: int = 0,
    folder: str | Path | None = None,
    limit_seconds: float | None = None,
    progress: bool = True,
) -> Search:
    """Trains `trials` configurations drawn from `space`, as many at a time as there are CPUs and GPUs for.

    `train(config, **shared)` runs in a process of its own, with a thread for each of its `cpus` and after all
    random generators were seeded with `seed`. It calls `tune.report({metric: value, ...})` after each epoch;
    `epochs` is how often at most, which "asha" must know. `shared` is put into Ray's object store once.
    `space` maps names to values, or to what tune.choice, tune.loguniform and their like give; there are
    `trials` for each point of a tune.grid_search in it.

    `scheduler` is "fifo", "asha" (grace period 1, reduction factor 2) or one of Ray's; `searcher` is
    "random", "optuna" or one of Ray's. `gpus` may be a fraction of one that trials share. A trial whose
    metric is infinite or NaN is ended. One that fails is tried `retries` times more, from the last checkpoint
    that it reported, and what it raised is in the table.

    With a `folder`, a search that was interrupted goes on where it stopped when it is called again. Ray is
    started, and stopped afterwards, unless it runs already.

    Raises ValueError before anything starts, for settings that cannot be right, and for more CPUs or GPUs
    than a node has (Ray itself would wait for them for ever); ImportError without Ray; RuntimeError where an
    interrupted search has lost trials.
    """
    ray_session.imported()
    wanted = _Wanted(
        train,
        dict(space),
        metric,
        mode,
        trials,
        epochs,
        scheduler,
        searcher,
        dict(shared or {}),
        cpus,
        gpus,
        retries,
        seed,
        limit_seconds,
        progress,
    )
    wanted.check()
    ray_session.afford(cpus, gpus)
    path = Path(folder or tempfile.mkdtemp(prefix="search-")).absolute()
    _agree(path, wanted.settings())
    try:
        with ray_session.running(), ray_session.careful(), _seeded(seed), wanted.pending():
            resumed = any(path.glob("experiment_state-*.json"))
            tuner, start = wanted.tuner(path), time.perf_counter()
            results = tuner.fit()
            if resumed and limit_seconds is None and len(results) < trials:
                raise RuntimeError(
                    f"{path} knows only {len(results)} of {trials} trials: the search was killed while Ray "
                    "wrote its state down; search anew in another folder"
                )
            return ray_results.read(results, metric, mode, time.perf_counter() - start)
    finally:
        if folder is None:
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The global random generators, from which schedulers draw; as they were before, afterwards."""
    with randomness.kept():
        training.seed_everything(seed)
        yield


def _kind(choice: object) -> str:
    return choice if isinstance(choice, str) else type(choice).__name__


def _agree(path: Path, settings: dict[str, object]) -> None:
    """Notes the settings of a search in its folder; raises ValueError if another one is there."""
    note = path / _SETTINGS
    if note.exists():
        before = json.loads(note.read_text())
        for name, value in settings.items():
            if before.get(name) != value:
                raise ValueError(
                    f"{path} holds a search with {name}={before.get(name)!r}, not {value!r}: give the same "
                    "settings to go on with it, or another folder"
                )
        return
    if path.exists() and any(path.iterdir()):
        raise ValueError(f"{path} is not empty, and what it holds is no search: give another folder")
    checks.folder("folder", path)
    note.write_text(json.dumps(settings))
