"""Parameters of a notebook, checked before work starts. Errors name parameter, value and rule."""

import math
import os
from collections.abc import Sequence
from pathlib import Path

from companion import host

RANKS_PER_CORE = 4
MOST_RANKS = "COMPANION_MOST_RANKS"  # the environment variable that allows more of them, or fewer
RANK_BYTES = 300 * 2**20  # what a rank takes that has imported torch and trains a small model
LARGEST_SEED = 2**32 - 1  # of numpy, which scikit-learn splits data with


def number(
    name: str,
    value: float,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    why: str = "",
) -> None:
    """Raises ValueError unless the value is a finite number, `least` or more, greater than `above`, and
    `most` or less. `why` is added to the message.
    """
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if (
        not usable
        or (least is not None and value < least)
        or (above is not None and value <= above)
        or (most is not None and value > most)
    ):
        raise ValueError(f"{name}={value!r} must be a number{_rules(least, above, most, why)}")


def _rules(least: float | None, above: float | None, most: float | None, why: str) -> str:
    rules = [
        "" if least is None else f"{least:.10g} or more",
        "" if above is None else f"greater than {above:g}",
        "" if most is None else f"{most:.10g} or less",
    ]
    return "".join(f", {rule}" for rule in rules if rule) + (f" ({why})" if why else "")


def whole(name: str, value: int, least: int = 1, most: int | None = None, why: str = "") -> None:
    """Raises ValueError unless the value is a whole number from `least` to `most`."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be a whole number")
    number(name, value, least=least, most=most, why=why)


def multiple(name: str, value: int, of: int, why: str) -> None:
    """Raises ValueError unless the value is a whole number that `of` divides."""
    whole(name, value)
    if value % of:
        raise ValueError(f"{name}={value} must be a multiple of {of} ({why})")


def choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raises ValueError unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; use one of {', '.join(map(repr, choices))}")


def whole_numbers(name: str, text: str, least: int = 1, most: int | None = None, why: str = "") -> list[int]:
    """The whole numbers of a list in text, such as "8,64,512", each from `least` to `most`.

    Raises ValueError for text that is no such list, or an empty one.
    """
    parts = [part.strip() for part in str(text).split(",")]
    try:
        found = [int(part) for part in parts]
    except ValueError:
        raise ValueError(f"{name}={text!r} must be whole numbers with commas between, like '8,64'") from None
    for value in found:
        whole(name, value, least, most, why)
    return found


def folder(name: str, path: str | Path) -> Path:
    """The folder, made if need be. Raises ValueError if it cannot be made or written to."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{name}={str(path)!r} cannot be made: {error.strerror}") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise ValueError(f"{name}={str(path)!r} cannot be written to")
    return path


def most_ranks(rank_bytes: int = RANK_BYTES) -> int:
    """How many ranks a notebook starts here at most: four for each core and eight at least, as far as the
    memory goes when each takes `rank_bytes`, or what the environment variable COMPANION_MOST_RANKS says.
    """
    if MOST_RANKS in os.environ:
        return whole_numbers(MOST_RANKS, os.environ[MOST_RANKS])[0]
    cores = max(8, RANKS_PER_CORE * host.usable_cores())
    memory = host.usable_memory_bytes() // rank_bytes
    return max(1, min(cores, memory)) if memory else cores


def ranks(name: str, value: int, least: int = 1, most: int | None = None, why: str = "") -> None:
    """Raises ValueError unless the value is a number of ranks, `least` or more, that this machine bears and,
    for the reason `why`, no more than `most`.
    """
    bears = most_ranks()
    if most is None or bears < most:
        most = bears
        why = f"by this machine's cores and memory; the environment variable {MOST_RANKS} allows more"
    whole(name, value, least, most, why)


def shared(**parameters: object) -> None:
    """Checks the parameters that mean the same in every notebook: `dataset`, `epochs`, `batch_size`,
    `learning_rate`, `seed`, `rounds`, `world_size` and `results_dir`.

    A batch has no more images than the data set has for training. Raises ValueError with the rule that is
    broken, KeyError for a parameter that has no rule here.
    """
    for name, value in parameters.items():
        _RULES[name](name, value)
    if {"dataset", "batch_size"} <= set(parameters):
        images = _sizes()[parameters["dataset"]][0]
        why = f"{parameters['dataset']} has so many training images"
        whole("batch_size", parameters["batch_size"], most=images, why=why)


def _sizes() -> dict[str, tuple[int, int, int]]:
    """Of the data sets; imported here, since that imports torch, and the runner checks without it."""
    from companion import datasets

    return datasets.SIZES


_RULES = {
    "dataset": lambda name, value: choice(name, value, list(_sizes())),
    "epochs": whole,
    "batch_size": whole,
    "learning_rate": lambda name, value: number(name, value, above=0),
    "seed": lambda name, value: whole(name, value, least=0, most=LARGEST_SEED),
    "rounds": whole,
    "world_size": ranks,
    "results_dir": folder,
}
