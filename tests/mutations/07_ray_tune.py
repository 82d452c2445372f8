"""Ways to break a search."""

from mutating import breaks

from companion import ray_trials, ray_tune


@breaks("same-training")
def trials_get_another_learning_rate(notebook):
    """What a trial trains is not the configuration that the table shows."""
    prepared = ray_trials.prepared

    def wrong(train, threads, seed):
        return prepared(lambda config, **shared: train({**config, "lr": 0.5}, **shared), threads, seed)

    ray_trials.prepared = wrong


@breaks("same-training")
def trials_get_half_of_the_images(notebook):
    """The data that trials share is not all of it."""
    prepared = ray_trials.prepared

    def wrong(train, threads, seed):
        def fewer(config, learn, **shared):
            half = len(learn.labels) // 2
            train(config, learn=type(learn)(learn.images[:half], learn.labels[:half]), **shared)

        return prepared(fewer, threads, seed)

    ray_trials.prepared = wrong


def _with(**options):
    search = ray_tune.search
    ray_tune.search = lambda *args, **given: search(*args, **(given | options))


@breaks("keeps-the-best")
def the_worst_are_kept(notebook):
    """The scheduler is told that less is better."""
    _with(mode="min")


@breaks("keeps-the-best")
def nothing_is_stopped(notebook):
    """The scheduler is forgotten."""
    _with(scheduler="fifo")
