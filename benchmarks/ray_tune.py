"""How much of the training early stopping saves, what it costs, and what a trial costs beyond its training.

Every configuration is trained to its end, once for each seed, as Ray's FIFO does. Schedulers are then tried
on the recorded curves, one trial at a time: what they decide depends on those numbers only. "Saved" rows are
epochs relative to FIFO's, at the book's settings and at the best of some others.
"""

import sys
import time
from statistics import median

import torch.nn.functional as F

from companion import data, devices, measure, models, ray_results, ray_session, ray_tune, training

SEEDS = 5
DATASET = "cluttered_digits"
TRIALS = 16
EPOCHS = 10
IMAGES = 4000
OVERHEAD_TRIALS = (4, 36)
SIZES = [16, 32, 64, 128]
WIDTHS = [4, 8, 16, 32, 64, 128, 256]
SETTINGS = [(1, 2), (1, 3), (1, 4), (2, 2), (2, 3)]  # grace period, reduction factor; the book's first


def train(config, learn, judge, seed, report=None) -> None:
    """One trial of notebook 07, on the CPU."""
    from ray import tune

    report = report or tune.report
    training.seed_everything(seed)
    model = models.LeNet5(config["nodes_1"], config["nodes_2"])
    recipe = training.Recipe(EPOCHS, config["batch_size"], config["lr"], "sgd", weight_decay=0.0)
    optimizer = training.make_optimizer(model, recipe)
    batches = data.Batches(learn, config["batch_size"], devices.select("cpu"), seed=seed)
    for epoch in range(EPOCHS):
        batches.set_epoch(epoch)
        for images, labels in batches:
            training.plain_step(model, images, labels, F.cross_entropy, optimizer)
        report({"accuracy": training.evaluate(model, judge).accuracy})


def replay(config, recorded) -> None:
    """What a configuration reached, without training it."""
    from ray import tune

    for accuracy in recorded[config["number"]]:
        tune.report({"accuracy": accuracy})


def nothing(config) -> None:
    from ray import tune

    tune.report({"accuracy": config["x"]})


def quiet_search(function, space, **options) -> ray_tune.Search:
    """A search of which no trial failed."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # trials need not find this file
    found = ray_tune.search(function, space, metric="accuracy", progress=False, **options)
    if errors := [trial.error for trial in found.trials if trial.error]:
        raise ray_results.SearchError(f"{len(errors)} of {len(found.trials)} trials failed: {errors[0]}")
    return found


def parts(seed: int) -> tuple[data.Split, data.Split]:
    """The images that trials learn from, and those that judge them."""
    splits = data.load(DATASET, seed=seed)
    return data.Split(splits.train.images[:IMAGES], splits.train.labels[:IMAGES]), splits.val


def recorded(seed: int) -> tuple[list[list[float]], float]:
    """The curves of the configurations that this seed draws, and trials a minute."""
    from ray import tune

    learn, judge = parts(seed)
    space = {
        "nodes_1": tune.choice(WIDTHS),
        "nodes_2": tune.choice(WIDTHS),
        "lr": tune.loguniform(1e-4, 1e-1),
        "batch_size": tune.choice(SIZES),
    }
    shared = {"learn": learn, "judge": judge, "seed": seed}
    found = quiet_search(train, space, trials=TRIALS, seed=seed, shared=shared)
    curves = [[report["accuracy"] for report in trial.reports] for trial in found.trials]
    return curves, 60 * TRIALS / found.seconds


def alone(seed: int) -> float:
    """Trials a minute of Optuna without Ray, in this process, with a thread for each core."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    learn, judge = parts(seed)

    def objective(trial) -> float:
        config = {name: trial.suggest_categorical(name, WIDTHS) for name in ("nodes_1", "nodes_2")}
        config["lr"] = trial.suggest_float("lr", 1e-4, 1e-1, log=True)
        config["batch_size"] = trial.suggest_categorical("batch_size", SIZES)
        reports: list[dict] = []
        train(config, learn, judge, seed, reports.append)
        return reports[-1]["accuracy"]

    start = time.perf_counter()
    sampler = optuna.samplers.RandomSampler(seed=seed)
    optuna.create_study(direction="maximize", sampler=sampler).optimize(objective, n_trials=TRIALS)
    return 60 * TRIALS / (time.perf_counter() - start)


def tried(curves: list[list[float]], grace: int, factor: int, cpus: int) -> tuple[float, float]:
    """The share of FIFO's epochs that ASHA spends on these trials, and the accuracy that it misses."""
    from ray import tune
    from ray.tune import schedulers

    asha = schedulers.ASHAScheduler(max_t=EPOCHS, grace_period=grace, reduction_factor=factor)
    space = {"number": tune.grid_search(list(range(len(curves))))}
    found = quiet_search(replay, space, trials=1, scheduler=asha, shared={"recorded": curves}, cpus=cpus)
    missed = max(curve[-1] for curve in curves) - found.best.reports[-1]["accuracy"]
    return found.reports / (EPOCHS * len(curves)), missed


def overhead() -> float:
    """Seconds that a trial costs beyond its training, with processes that go on to the next one."""
    from ray import tune

    few, many = (quiet_search(nothing, {"x": tune.uniform(0, 1)}, trials=n).seconds for n in OVERHEAD_TRIALS)
    return (many - few) / (OVERHEAD_TRIALS[1] - OVERHEAD_TRIALS[0])


def saved(name: str, results: list[tuple[float, float]], limit: float) -> dict:
    spent = measure.Spread.of([share for share, _ in results])
    missed = measure.Spread.of([100 * points for _, points in results])
    return {
        "what": f"share of FIFO's epochs, {name}, {len(results)} seeds ({missed:.2f} points below the best)",
        "plain": "1 (FIFO)",
        "ours": f"{spent:.2f}",
        "limit": f"{limit:.2f} (agreed)",
        "against plain": f"{1 / spent.median:.1f}x fewer",
        "of the limit": f"{limit / spent.median:.0%}",
    }


def measure_all(rounds: int = SEEDS) -> list[dict]:
    """Rows of ASHA, of a trial's overhead, and of Ray beside Optuna alone; `rounds` seeds."""
    devices.set_threads()
    with ray_session.running() as there:
        known = [recorded(seed) for seed in range(rounds)]
        by_setting = {
            setting: [tried(curves, *setting, int(there["CPU"])) for curves, _ in known]
            for setting in SETTINGS
        }
        beyond = overhead()
    close = {
        setting: results
        for setting, results in by_setting.items()
        if median(points for _, points in results) <= 0.005
    }
    best = min(close or by_setting, key=lambda setting: median(share for share, _ in by_setting[setting]))
    through_ray = measure.Spread.of([rate for _, rate in known])
    optuna = measure.Spread.of([alone(seed) for seed in range(min(2, rounds))])
    return [
        saved("ASHA at the book's settings", by_setting[SETTINGS[0]], 0.40),
        saved(f"ASHA, grace period {best[0]}, factor {best[1]}", by_setting[best], 1 / 3),
        {
            "what": "seconds a trial costs beyond its training, processes reused",
            "plain": "-",
            "ours": f"{beyond:.2f}",
            "limit": "0.50 (agreed)",
            "against plain": "-",
            "of the limit": f"{0.5 / beyond:.0%}" if beyond > 0.01 else "-",
        },
        {
            "what": "trials a minute, Ray's processes against Optuna alone in one process",
            "plain": f"{optuna:.1f} (Optuna)",
            "ours": f"{through_ray:.1f}",
            "limit": "-",
            "against plain": f"{through_ray.median / optuna.median:.2f}x",
            "of the limit": "-",
        },
    ]
