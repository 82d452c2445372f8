"""The search for the fastest variant beside measuring all of them, on six networks, on one and two threads.

"Ours" is the speed-up of what the search picks over the model as it is, "limit" that of the best of all
variants, both again in turn; "of the limit" says how much of it is reached, and what the search took of the
time of measuring all, each with an empty cache of compiled programs. Random weights: accuracy is how often a
variant answers as the model does.
"""

import functools
import math
import os
import time
from collections.abc import Callable, Iterator
from unittest import mock

import torch
import torchvision
from torch import nn

from companion import fastest, fastest_rounds, launch, models, scratch, training
from companion.fastest_found import PLAIN, Found

CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, ...]]] = {
    "LeNet5": (models.LeNet5, (3, 32, 32), (1, 64)),
    "ResNet-18, 32 px": (models.resnet18, (3, 32, 32), (1, 16)),
    "ResNet-18, 224 px": (torchvision.models.resnet18, (3, 224, 224), (1, 4)),
    "mobilenet_v3_small, 224 px": (torchvision.models.mobilenet_v3_small, (3, 224, 224), (1, 4)),
    "encoder 6x768, 128 steps": (lambda: models.EncoderClassifier(64, 128), (128, 64), (1,)),
    "LSTM 2x512, 16 steps": (lambda: models.LSTMClassifier(16, 512), (16, 16), (1,)),
}
NAMES: list[str] | None = None  # all variants
THREADS = (1, 2)
PEERS = ("ONNX Runtime", "OpenVINO", "compiled")
ROUNDS = 15


def agreement(model: nn.Module, inputs: torch.Tensor) -> Callable[[nn.Module], float]:
    """How often a variant answers as the model does: the accuracy of one whose weights are random."""
    with torch.no_grad():
        right = torch.cat([model(x).argmax(1) for x in inputs.split(16)])

    def evaluate(net: nn.Module) -> float:
        found = torch.cat([net(x).argmax(1) for x in inputs.split(16)])
        return (found == right).double().mean().item()

    return evaluate


def rows_of(case: str, threads: int) -> Iterator[dict]:
    make, shape, sizes = CASES[case]
    training.seed_everything(0)
    model, inputs = make().eval(), torch.randn(64, *shape)
    ask = functools.partial(fastest.search, model, inputs, agreement(model, inputs), 0.05)
    launch.warm("companion.fastest_making", "companion.compiler")
    launch.run(os.getpid, 1, device="cpu", backend=None)  # else the first of the two waits for this server
    options = {"batch_sizes": sizes, "threads": threads, "names": NAMES, "progress": False}
    searched = cold(ask, **options)
    exhaustive = cold(ask, **options, early=False, seconds=math.inf)
    yield row(case, threads, model, inputs, searched, exhaustive, sizes)


def cold(ask: Callable[..., Found], **options: object) -> tuple[Found, float]:
    """What a search finds, and its seconds, where nothing was compiled before."""
    with mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=str(scratch.folder())):
        start = time.perf_counter()
        found = ask(**options)
        return found, time.perf_counter() - start


def row(case, threads, model, inputs, searched, exhaustive, sizes) -> dict:
    (found, took), (whole, of_all) = searched, exhaustive
    least = whole.plain.accuracy - whole.budget
    fit = [each for each in whole.rows[1:] if each.usable and each.accuracy >= least]
    best = max(fit, key=lambda each: each.score, default=whole.plain)
    peer = max((each for each in fit if each.name in PEERS), key=lambda each: each.score, default=whole.plain)
    gains = again(
        {"pick": (found, found.winner.name), "best": (whole, best.name), "peer": (whole, peer.name)},
        model,
        inputs,
        sizes,
        threads,
    )
    spent = f"the search took {took / of_all:.0%} of {of_all:.0f} s"
    return {
        "what": f"{case}, {threads} threads: picks {found.winner.name} (of all {best.name}; {spent})",
        "plain": f"1.00; {gains['peer']:.2f} ({peer.name})",
        "ours": f"{gains['pick']:.2f}",
        "limit": f"{gains['best']:.2f}",
        "against plain": f"{gains['pick']:.2f}x; {gains['pick'] / gains['peer']:.2f}x",
        "of the limit": f"{gains['pick'] / gains['best']:.0%}",
    }


def again(which: dict[str, tuple[Found, str]], model, inputs, sizes, threads: int) -> dict[str, float]:
    """The speed-ups of these over the model, all in turn: geometric means over the batch sizes."""
    folders = {key: found.folders[name] for key, (found, name) in which.items() if name != PLAIN}
    if not folders:
        return dict.fromkeys(which, 1.0)
    given = (folders, model, inputs, sizes, threads, (threads,), ROUNDS, 20.0)
    timed = launch.run(fastest_rounds.final, 1, *given, device="cpu", backend=None, threads=threads)[0]
    gains = {
        key: math.prod(both[1].median for both in by_size.values()) for (key, _), by_size in timed.items()
    }
    return {key: gains.get(key, 1.0) ** (1 / len(sizes)) for key in which}


def measure_all() -> Iterator[dict]:
    for case in CASES:
        for threads in THREADS:
            yield from rows_of(case, threads)
