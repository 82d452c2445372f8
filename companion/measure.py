"""How long it takes: ways in turn, medians with their spread, verdicts, doubt where the machine was busy."""

import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from companion import devices, dispatch, host, modules

WILD = 0.5  # rounds whose middle half spreads over more than this share of their median disagree wildly


@dataclass(frozen=True)
class Spread:
    """A measured value: the median of `runs`, and the range in which the true median lies with at least 90 %
    confidence.

    Five runs are the fewest that can say so much; of fewer, the range is that of all of them. With a format
    it shows as "1.23 (1.20-1.31)". Source: the binomial confidence interval of a median, Conover 1999,
    section 3.2.
    """

    median: float
    low: float
    high: float
    runs: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of measured values, at least one; raises ValueError for none."""
        if not values:
            raise ValueError("there is no value of which to take the median")
        ordered, cut = sorted(values), _cut(len(values))
        return cls(statistics.median(ordered), ordered[cut], ordered[-1 - cut], len(ordered))

    def scaled(self, factor: float) -> "Spread":
        """The same in another unit, such as milliseconds for a factor of 1000."""
        return Spread(factor * self.median, factor * self.low, factor * self.high, self.runs)

    def rate(self, amount: float = 1.0) -> "Spread":
        """What is done in a second, where `amount` is done in these seconds."""
        return Spread(amount / self.median, amount / self.high, amount / self.low, self.runs)

    def speed_up(self, over: "Spread") -> "Spread":
        """How many times as fast as `over` this is, both in seconds and measured one after the other: the
        widest range that both allow. What was measured in turn is compared by `Times.speed_up`.
        """
        return Spread(
            over.median / self.median, over.low / self.high, over.high / self.low, min(self.runs, over.runs)
        )

    def __format__(self, spec: str) -> str:
        low, high = format(self.low, spec), format(self.high, spec)
        return f"{self.median:{spec}}" if low == high else f"{self.median:{spec}} ({low}-{high})"

    def __str__(self) -> str:
        return format(self, ".3g")


def _cut(count: int) -> int:
    """How many of `count` ordered values may be left out at either end for 90 % confidence in what is
    left.
    """
    # In whole numbers, of 2**count equally likely cases: a timer gives thousands of values now and then, and
    # such numbers do not fit into a float.
    cut, ways, outside, allowed = 0, 1, 2, 2**count // 10
    while True:
        ways = ways * (count - cut) // (cut + 1)  # in which cut + 1 of them lie below the median
        outside += 2 * ways
        if outside > allowed:
            return cut
        cut += 1


def verdict(ratio: Spread) -> str:
    """ "faster", "slower" or "no difference", of a speed-up whose spread is above, below, or on both sides of
    1.
    """
    return says(ratio, "faster", "slower", "no difference")


def says(ratio: Spread, faster: str, slower: str, no_difference: str) -> str:
    """The wording that fits a measured speed-up, so that a sentence cannot contradict it."""
    if ratio.low > 1:
        return faster
    return slower if ratio.high < 1 else no_difference


@dataclass(frozen=True)
class Times:
    """Seconds of several ways, name -> one entry a round, the same rounds for all; `busy` says why they are
    not to be trusted.
    """

    rounds: dict[str, list[float]]
    busy: str | None = None

    def __getitem__(self, name: str) -> Spread:
        """Seconds of one way."""
        return Spread.of(self.rounds[name])

    def speed_up(self, name: str, over: str) -> Spread:
        """How many times as fast as `over` a way is, round by round: what disturbs a round disturbs both."""
        pairs = zip(self.rounds[over], self.rounds[name], strict=True)
        return Spread.of([slow / fast for slow, fast in pairs])

    def part(self, name: str, of: str) -> Spread:
        """The share of the time of `of` that a way takes, round by round."""
        return self.speed_up(of, over=name)


def compare(
    functions: dict[str, Callable[[], object]],
    device: torch.device | str = "cpu",
    rounds: int = 7,
    *,
    warm_up: int = 1,
    meet: Callable[[], object] | None = None,
    agree: Callable[[float], float] | None = None,
) -> Times:
    """Seconds of each function in each of `rounds` rounds, after `warm_up` that do not count: all functions
    in turn.

    A slow moment then hits all of them alike. Each round begins with another function, so that none has the
    advantage of its place. Before a function starts the device has done all that was queued, and `meet` is
    called (in ranks: a barrier); `agree` gives what is kept of the seconds (in ranks: the slowest rank's).
    `collectives.compare` passes both.
    """
    device, turn = torch.device(device), list(functions.items())
    times: dict[str, list[float]] = {name: [] for name in functions}
    watch = host.Watch()
    for number in range(warm_up + rounds):
        for name, function in turn:
            devices.synchronize(device)
            if meet:
                meet()
            start = time.perf_counter()
            function()
            devices.synchronize(device)
            seconds = time.perf_counter() - start
            if number >= warm_up:
                times[name].append(agree(seconds) if agree else seconds)
            elif agree:
                agree(seconds)
        turn = [*turn[1:], turn[0]]
    return Times(times, watch.busy() or _wild(times))


def _wild(times: dict[str, list[float]]) -> str | None:
    """What is said of rounds that disagree wildly; a few rounds may."""
    for name, series in times.items():
        if len(series) >= 5:
            first, middle, third = statistics.quantiles(series, n=4)
            if third - first > WILD * middle:
                return (
                    f"half of the rounds of {name!r} lie {(third - first) / middle:.0%} of their median apart"
                )
    return None


@dataclass
class Laps:
    """Seconds of the named parts of something that is done several times: `laps("forward", model,
    images)`.
    """

    places: torch.device | Sequence[torch.device]
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def _wait(self) -> None:
        for place in [self.places] if isinstance(self.places, torch.device) else self.places:
            devices.synchronize(place)

    def __call__(self, name: str, function: Callable, *args: object) -> object:
        """Calls `function(*args)`, waits for the devices, notes the seconds under `name`, and gives the
        result.
        """
        self._wait()
        start = time.perf_counter()
        result = function(*args)
        self._wait()
        self.seconds.setdefault(name, []).append(time.perf_counter() - start)
        return result

    def spreads(self, warm_up: int = 1) -> dict[str, Spread]:
        """Of each part, without its first `warm_up` times."""
        return {name: Spread.of(series[warm_up:]) for name, series in self.seconds.items()}


@dataclass(frozen=True)
class Latency:
    """Seconds of one call, over timed blocks of calls, and the threads that it used."""

    seconds: Spread
    threads: int

    def throughput(self, samples: int) -> Spread:
        """Samples per second, where one call handles `samples`."""
        return self.seconds.rate(samples)

    def __str__(self) -> str:
        return f"{self.seconds.scaled(1e3):.3g} ms, {self.seconds.runs} runs, {self.threads} threads"


def latency(
    function: Callable[[], object], device: torch.device | str = "cpu", min_seconds: float = 0.3
) -> Latency:
    """Time of one call of `function`, measured for at least `min_seconds` with torch.utils.benchmark after a
    warm-up.

    The device's queue is empty before and after each block of calls, so that asynchronous work is counted.
    """
    from torch.utils import benchmark

    device, threads = torch.device(device), torch.get_num_threads()
    function()
    timer = benchmark.Timer(
        "function(); synchronize(device)",
        globals={"function": function, "synchronize": devices.synchronize, "device": device},
        num_threads=threads,
    )
    result = timer.blocked_autorange(min_run_time=min_seconds)
    return Latency(Spread.of(result.times), threads)


def operators(function: Callable[[], object], calls: int = 10) -> dict[str, float]:
    """Seconds that one call of `function` spends in each operator itself on the CPU, the longest first, by
    torch's profiler.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # else it reports on stderr that there is no GPU driver
    function()
    with torch.autograd.profiler.profile(use_kineto=False) as profile:
        for _ in range(calls):
            function()
    found = {event.key: event.self_cpu_time_total / 1e6 / calls for event in profile.key_averages()}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def step_profile(
    model: nn.Module,
    batches: Iterable,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    steps: int = 50,
) -> dict[str, list[float]]:
    """Seconds of "data", "forward", "backward" and "optimizer" in each of `steps` training steps, and of the
    "whole" step.

    Waits for the device after each part; the first step is a warm-up and not counted. The model is trained by
    it.
    """
    laps, source = Laps(device), _endless(batches)
    modules.for_training(model)

    def fetch() -> list[torch.Tensor]:
        return devices.put(next(source), device)

    def backward(loss: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()

    for _ in range(steps + 1):
        images, labels = laps("data", fetch)
        loss = laps("forward", lambda x, y: F.cross_entropy(model(x), y), images, labels)
        laps("backward", backward, loss)
        laps("optimizer", optimizer.step)
    seconds = {name: series[1:] for name, series in laps.seconds.items()}
    return seconds | {"whole": [sum(parts) for parts in zip(*seconds.values(), strict=True)]}


def _endless(batches: Iterable) -> Iterator:
    while True:
        yield from batches


def macs(model: nn.Module, example: torch.Tensor) -> int:
    """Multiply-accumulate operations of one forward pass on `example`, by torch's formulas, in all
    threads that it starts; the model stays as it was.

    Warns, with their names, of operators that may have some and for which there is no formula. Those that
    compute with each element by itself, such as an activation or a normalization, have none by convention.
    """
    counted = dispatch.Counted()
    with torch.no_grad(), modules.unchanged(model), dispatch.in_all_threads(counted.counter):
        model(example)
    if counted.unknown:
        names = ", ".join(sorted(counted.unknown))
        warnings.warn(f"not counted, since there is no formula: the MACs of {names}", stacklevel=2)
    return counted.macs
