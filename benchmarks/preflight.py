"""What a question to the TPU compiler costs: anew, in a process of its own, and from what is kept."""

import tempfile
import time
from collections.abc import Iterator

import torch
import torchvision
from torch import nn

from companion import devices, measure, models, preflight

ROUNDS = 3


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(1024, 4096), nn.ReLU(), nn.Linear(4096, 1024))


# What is asked: a model, a batch, and the seconds agreed for the whole answer.
CASES = {
    "MLP 1024-4096-1024": (mlp, (64, 1024), 15),
    "LeNet5": (models.LeNet5, (64, 3, 32, 32), 45),
    "ResNet-18, 64 px": (torchvision.models.resnet18, (64, 3, 64, 64), 40),
    "ResNet-18 for small images, 64 px": (models.resnet18, (64, 3, 64, 64), None),  # nobody agreed on that
}
KEPT_SECONDS = 0.5


def asked(build, shape: tuple[int, ...], folder: str) -> float:
    """Seconds until the answer of a training step's check."""
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    batch, target = torch.zeros(shape), torch.zeros(shape[0], dtype=torch.long)
    start = time.perf_counter()
    verdict = preflight.check(model, batch, target, optimizer, cache=folder, progress=False)
    if not verdict.fits:
        raise RuntimeError(str(verdict))
    return time.perf_counter() - start


def row(what: str, seconds: list[float], limit: float | None) -> dict:
    taken = measure.Spread.of(seconds) if seconds else None
    return {
        "what": what,
        "plain": "-",
        "ours": f"{taken:.2f}" if taken else "-",
        "limit": f"{limit:g} (agreed)" if limit else "-",
        "against plain": "-",
        "of the limit": f"{taken.median / limit:.0%}" if taken and limit else "-",
    }


def measure_all(rounds: int = ROUNDS) -> Iterator[dict]:
    if reason := preflight.why_not():
        yield row(f"TPU compiler: not measured, {reason}", [], None)
        return
    devices.set_threads(1)
    for name, (build, shape, limit) in CASES.items():
        new, kept = [], []
        for _ in range(rounds):
            with tempfile.TemporaryDirectory() as folder:
                new.append(asked(build, shape, folder))
                kept.append(asked(build, shape, folder))
        yield row(f"TPU compiler, {name}, training step (s)", new, limit)
        yield row(f"TPU compiler, {name}, the same again (s)", kept, KEPT_SECONDS)
