"""The global random numbers of Python, NumPy and torch: their state, and how to leave them as they were."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

CPU = torch.device("cpu")


def state(device: torch.device = CPU) -> dict[str, object]:
    """The state of Python's, NumPy's and torch's random numbers, the latter on the CPU and on a GPU; in types
    that a file may hold.
    """
    name, keys, *rest = np.random.get_state()
    found = {"cpu": torch.get_rng_state(), "python": random.getstate()}
    found["numpy"] = (name, keys.tolist(), *rest)
    if device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(device)
    return found


def set_state(state: dict[str, object], device: torch.device = CPU) -> None:
    """Goes on with the random numbers where `state` was asked."""
    torch.set_rng_state(state["cpu"])
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def same(one: dict[str, object], other: dict[str, object]) -> bool:
    """Whether no number was drawn on the CPU between two states."""
    plain = all(one[name] == other[name] for name in ("python", "numpy"))
    return plain and torch.equal(one["cpu"], other["cpu"])


@contextmanager
def kept() -> Iterator[None]:
    """Afterwards the random numbers on the CPU go on where they were."""
    before = state()
    try:
        yield
    finally:
        set_state(before)
