"""What runs in a trial's own process. It imports nothing heavy: each process would pay for it."""

import random
import sys
from collections.abc import Callable


def prepared(train: Callable[..., object], threads: int, seed: int) -> Callable[..., None]:
    """The function that Ray calls: `train(config, **shared)` with so many threads, all random generators
    seeded.
    """

    def trial(config: dict, **shared: object) -> None:
        random.seed(seed)
        if numpy := sys.modules.get("numpy"):
            numpy.random.seed(seed)
        if torch := sys.modules.get("torch"):  # it is there if anything that `train` refers to needs it
            torch.manual_seed(seed)
            torch.set_num_threads(threads)
        train(config, **shared)

    return trial
