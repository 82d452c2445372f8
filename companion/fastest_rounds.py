"""What `fastest` does in child processes: the model as it is, an artefact beside it, the last ones."""

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean

import psutil
import torch
from torch import nn

from companion import artefacts, devices, host, measure, memory
from companion.measure import Spread

Evaluate = Callable[[nn.Module], float]
AGREE = 1e-3  # how far exact variants may be apart, as a share of the largest answer
GLANCE = 3  # rounds after which a loser is dropped
BEHIND = 0.95  # of the best so far: who is slower, all batch sizes together, is a loser
HOPE = 1.25  # times the best known: so fast it may still be at a batch size that was not looked at
PRODUCTS = ("conv", "mm", "linear", "rnn", "lstm", "gru", "attention")  # in the names of such operators
FUSED = 2.0  # times faster may products become when a model is compiled, by other layouts and kernels
CALL_SECONDS = 0.01  # the least that is timed at once


class UnfitError(ValueError):
    """What was measured says that this variant cannot be used; the message says why."""


@dataclass(frozen=True)
class Plain:
    """The model as it is: accuracy of two evaluations, threads that serve it best, seconds of a call by batch
    size, bytes of its weights on disk, the share of its time in products of matrices and convolutions by
    batch size (on a CPU).
    """

    accuracies: tuple[float, float]
    threads: int
    latency: dict[int, Spread]
    disk_bytes: int
    products: dict[int, float]


@dataclass(frozen=True)
class Measured:
    """A variant beside the model: by batch size seconds of a call and speed-up; `dropped` says why it was not
    looked at further. `cold_seconds` is from loading to the first answers, `memory_bytes` what they added.
    """

    latency: dict[int, Spread]
    speed_up: dict[int, Spread]
    disk_bytes: int
    memory_bytes: int
    cold_seconds: float
    accuracy: float | None = None
    dropped: str | None = None
    busy: str | None = None


@dataclass
class Lead:
    """What is to be beaten: the best score, the highest speed-up known at each batch size, and the best
    speed-up that is expected, all batch sizes together: by the medians, where the score takes the lower ends.
    """

    score: float
    gains: dict[int, float]
    expected: float = 0.0

    def take(self, gains: dict[int, Spread]) -> None:
        """Has what gained so much lead, where it is faster."""
        self.score = max(self.score, geometric_mean(gain.low for gain in gains.values()))
        self.expected = max(self.expected, geometric_mean(gain.median for gain in gains.values()))

    def beyond(self, gains: dict[int, Spread]) -> bool:
        """Whether with these speed-ups, at some or all batch sizes, the lead is out of reach."""
        return self.far([gains[n].high if n in gains else HOPE * best for n, best in self.gains.items()])

    def beyond_kin(self, gains: dict[int, Spread]) -> bool:
        """Whether it is out of reach for what is expected to be about as fast as one with these speed-ups."""
        hoped = [gains[n].median if n in gains else HOPE * best for n, best in self.gains.items()]
        return geometric_mean(hoped) < BEHIND * self.expected

    def beyond_fusing(self, products: dict[int, float]) -> bool:
        """Whether it is out of reach for what makes products hardly faster, with these shares of the time."""
        return bool(products) and self.far([FUSED / share for share in products.values()])

    def far(self, hoped: Sequence[float]) -> bool:
        return geometric_mean(hoped) < BEHIND * self.score


class Chunked(nn.Module):
    """Asks in batches of one size, so that a compiled program is not compiled again for the last one."""

    def __init__(self, model: nn.Module, size: int):
        super().__init__()
        self.model, self.size = model, size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat(list(self._pieces(x)))[: len(x)]

    def _pieces(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        for piece in x.split(self.size):
            yield self.model(batch(piece, self.size)).clone()


def batch(inputs: torch.Tensor, size: int) -> torch.Tensor:
    """So many samples, the given ones over and over where they are too few."""
    times = math.ceil(size / len(inputs))
    return inputs.repeat(times, *[1] * (inputs.dim() - 1))[:size].contiguous()


def accuracy_of(evaluate: Evaluate, model: nn.Module) -> float:
    """What `evaluate` says of a model. Raises UnfitError for what is no share from 0 to 1."""
    with torch.no_grad():
        value = float(evaluate(model))
    if not 0 <= value <= 1:
        raise UnfitError(f"evaluate(model) gave {value}: give a share from 0 to 1")
    return value


def plain(
    model: nn.Module,
    inputs: torch.Tensor,
    evaluate: Evaluate,
    sizes: Sequence[int],
    counts: Sequence[int],
    rounds: int,
) -> Plain:
    """The model as it is, at each number of threads in turn."""
    with torch.no_grad():
        answers = model(batch(inputs, 2))
    if not isinstance(answers, torch.Tensor) or answers.shape[:1] != (2,):
        kind = type(answers).__name__
        raise UnfitError(f"two samples gave a {kind}: wrap the model in one that gives a tensor [N, ...]")
    devices.set_threads(max(counts))
    accuracies = accuracy_of(evaluate, model), accuracy_of(evaluate, model)
    latency = {}
    for size in sizes:
        x = batch(inputs, size)
        ways = {str(count): at(count, model, x) for count in counts}
        latency[size] = timed(ways, x, rounds, 2.0)
    best = min(counts, key=lambda count: math.prod(latency[size][str(count)].median for size in sizes))
    own = {size: latency[size][str(best)] for size in sizes}
    devices.set_threads(best)
    profiled = sizes if inputs.is_cpu else ()  # operators' seconds on a CPU say nothing of a GPU's
    products = {size: in_products(model, batch(inputs, size), own[size]) for size in profiled}
    return Plain(accuracies, best, own, memory.disk_bytes(model), products)


def in_products(model: nn.Module, x: torch.Tensor, latency: Spread) -> float:
    """The share of a call's time that is spent in products of matrices and convolutions."""
    with torch.no_grad():
        seconds = measure.operators(lambda: model(x), calls=3)
    inside = sum(took for name, took in seconds.items() if any(word in name for word in PRODUCTS))
    return min(1.0, max(inside / latency.median, 1e-6))


def at(threads: int, model: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    """A call on so many threads."""

    def call() -> object:
        torch.set_num_threads(threads)
        return model(x)

    return call


def timed(
    ways: dict[str, Callable[[], object]], x: torch.Tensor, rounds: int, seconds: float
) -> measure.Times:
    """Seconds of a call, in turn, in at most so many rounds and about so many seconds (three rounds at
    least).
    """
    calls, once = {}, 0.0
    with torch.no_grad():
        for name, way in ways.items():
            way()
            start = time.perf_counter()
            way()
            devices.synchronize(x.device)
            took = time.perf_counter() - start
            calls[name] = max(1, round(CALL_SECONDS / took))
            once += calls[name] * took
        fit = max(GLANCE, min(rounds, int(seconds / once)))
        repeated = {name: again(way, calls[name]) for name, way in ways.items()}
        times = measure.compare(repeated, x.device, fit)
    per_call = {name: [took / calls[name] for took in all_of] for name, all_of in times.rounds.items()}
    return measure.Times(per_call, times.busy)


def again(way: Callable[[], object], calls: int) -> Callable[[], None]:
    def repeated() -> None:
        for _ in range(calls):
            way()

    return repeated


def measured(
    folder: Path,
    exact: bool,
    model: nn.Module,
    inputs: torch.Tensor,
    evaluate: Evaluate,
    lead: Lead,
    rounds: int,
    seconds: float,
    limit_bytes: int | None,
) -> Measured:
    """An artefact beside the model, one batch size after the other, and its accuracy. As soon as the lead is
    out of its reach it is dropped: it may then have figures for some batch sizes only.
    """
    host.limit_memory(limit_bytes)
    about, sizes = artefacts.read(folder), list(lead.gains)
    devices.set_threads(about.threads)
    before, start = _own_bytes(), time.perf_counter()
    it = artefacts.load(folder)
    cold, first = time.perf_counter() - start, {}
    for size in sizes:
        start = time.perf_counter()
        answers = it(batch(inputs, size))
        devices.synchronize(inputs.device)
        cold += time.perf_counter() - start
        added = max(0, _own_bytes() - before)
        _check(model, batch(inputs, size), answers, exact)
        first[size] = _in_turn(model, it, batch(inputs, size), GLANCE, seconds / len(sizes))
        if lead.beyond(_columns(first)[1]):
            dropped = "others are clearly faster"
            return Measured(*_columns(first), it.disk_bytes, added, cold, dropped=dropped)
    accuracy = accuracy_of(evaluate, Chunked(it, max(sizes)) if about.kind == "program" else it)
    more = {n: _in_turn(model, it, batch(inputs, n), rounds, seconds / len(sizes)) for n in sizes}
    busy = next((both[2] for both in more.values() if both[2]), None)
    return Measured(*_columns(more), it.disk_bytes, added, cold, accuracy=accuracy, busy=busy)


def _columns(found: dict[int, tuple]) -> tuple[dict[int, Spread], dict[int, Spread]]:
    """Seconds of a call, and the speed-up, by batch size."""
    return {size: one[0] for size, one in found.items()}, {size: one[1] for size, one in found.items()}


def _own_bytes() -> int:
    return psutil.Process(os.getpid()).memory_full_info().uss


def _in_turn(model, it, x, rounds, seconds) -> tuple[Spread, Spread, str | None]:
    """Seconds of a call, the speed-up over the model, and doubts."""
    times = timed({"plain": lambda: model(x), "it": lambda: it(x)}, x, rounds, seconds)
    return times["it"], times.speed_up("it", over="plain"), times.busy


@torch.no_grad()
def _check(model, x: torch.Tensor, given: torch.Tensor, exact: bool) -> None:
    """Raises UnfitError for answers of another shape or without meaning; for an exact one, other answers."""
    right = model(x)
    if given.shape != right.shape:
        raise UnfitError(f"a batch of {len(x)} gave {list(given.shape)}, not {list(right.shape)}")
    if not given.isfinite().all() and right.isfinite().all():
        raise UnfitError(f"a batch of {len(x)} gave numbers that are not finite")
    apart = ((given - right).abs().max() / right.abs().max().clamp_min(1e-12)).item()
    if exact and apart > AGREE:
        raise UnfitError(f"its answers differ by {apart:.1%}, where they should be the model's")


def final(
    folders: dict[str, Path],
    model: nn.Module,
    inputs: torch.Tensor,
    sizes: Sequence[int],
    threads: int,
    counts: Sequence[int],
    rounds: int,
    seconds: float,
) -> dict[tuple[str, int], dict[int, tuple[Spread, Spread]]]:
    """The last ones in turn with the model, each at each number of threads: (name, threads) -> batch size ->
    seconds of a call and speed-up over the model, which has the threads that serve it best.
    """
    loaded = {
        (name, count): artefacts.load(folder, count) for name, folder in folders.items() for count in counts
    }
    found: dict[tuple[str, int], dict[int, tuple[Spread, Spread]]] = {key: {} for key in loaded}
    for size in sizes:
        x = batch(inputs, size)
        ways = {"plain": at(threads, model, x)}
        ways |= {str(key): at(key[1], it, x) for key, it in loaded.items()}
        times = timed(ways, x, rounds, seconds / len(sizes))
        for key in loaded:
            found[key][size] = times[str(key)], times.speed_up(str(key), over="plain")
    return found
