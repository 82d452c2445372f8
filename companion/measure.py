"""How long it takes, how much memory it needs, how large it is. Medians with their spread, after a warm-up."""

import io
import os
import statistics
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from companion import devices


@dataclass(frozen=True)
class Latency:
    """Seconds of one call: median, and the interquartile range as its spread, over `runs` timed blocks of calls."""

    median_seconds: float
    spread_seconds: float
    runs: int
    threads: int

    def throughput(self, samples: int) -> float:
        """Samples per second, where one call handles `samples`."""
        return samples / self.median_seconds

    def __str__(self) -> str:
        median, spread = self.median_seconds * 1e3, self.spread_seconds * 1e3
        return f"{median:.3g} ms (spread {spread:.2g} ms, {self.runs} runs, {self.threads} threads)"


def latency(function: Callable[[], object], device: torch.device | str = "cpu", min_seconds: float = 0.3) -> Latency:
    """Time of one call of `function`, measured for at least `min_seconds` with torch.utils.benchmark after a warm-up.

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
    return Latency(result.median, result.iqr, len(result.times), threads)


def compare(
    functions: dict[str, Callable[[], object]], device: torch.device | str = "cpu", rounds: int = 7
) -> dict[str, list[float]]:
    """Seconds of each function in each of `rounds` rounds, all functions in turn: a slow moment hits all of them alike.

    Each round begins with another function, so that none has the advantage of its place.
    Take ratios round by round and their median: `ratio(times["plain"], times["fast"])`.
    """
    device, times, turn = torch.device(device), {name: [] for name in functions}, list(functions.items())
    for function in functions.values():
        function()
    for _ in range(rounds):
        for name, function in turn:
            devices.synchronize(device)
            start = time.perf_counter()
            function()
            devices.synchronize(device)
            times[name].append(time.perf_counter() - start)
        turn = [*turn[1:], turn[0]]
    return times


def ratio(numerator: list[float], denominator: list[float]) -> float:
    """Median of the ratios of two series of `compare`, round by round."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def operators(function: Callable[[], object], calls: int = 10) -> dict[str, float]:
    """Seconds that one call of `function` spends in each operator itself on the CPU, the longest first, by torch's profiler."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # else it reports on stderr that there is no GPU driver
    function()
    with torch.autograd.profiler.profile(use_kineto=False) as profile:
        for _ in range(calls):
            function()
    found = {event.key: event.self_cpu_time_total / 1e6 / calls for event in profile.key_averages()}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def step_profile(
    model: nn.Module, batches: Iterable, optimizer: torch.optim.Optimizer, device: torch.device, steps: int = 50
) -> dict[str, list[float]]:
    """Seconds of "data", "forward", "backward" and "optimizer" in each of `steps` training steps, and of the "whole" step.

    Waits for the device after each part; the first step is a warm-up and not counted. The model is trained by it.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ("data", "forward", "backward", "optimizer", "whole")}

    def now() -> float:
        devices.synchronize(device)
        return time.perf_counter()

    source = iter(batches)
    model.train()
    for number in range(steps + 1):
        marks = [now()]
        if (batch := next(source, None)) is None:
            source = iter(batches)
            batch = next(source)
        images, labels = (tensor.to(device) for tensor in batch)
        marks.append(now())
        loss = F.cross_entropy(model(images), labels)
        marks.append(now())
        optimizer.zero_grad()
        loss.backward()
        marks.append(now())
        optimizer.step()
        marks.append(now())
        if number:
            for name, start, end in zip(seconds, marks, marks[1:], strict=False):
                seconds[name].append(end - start)
            seconds["whole"].append(marks[-1] - marks[0])
    return seconds


def model_bytes(model: nn.Module) -> int:
    """Bytes of the model's parameters and buffers in memory; tensors that share storage count once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers())}
    return sum(storages.values())


def disk_bytes(model: nn.Module) -> int:
    """Bytes of the file that `torch.save(model.state_dict())` writes."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.tell()


def parameters(model: nn.Module) -> int:
    """Number of the model's parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def macs(model: nn.Module, example: torch.Tensor) -> int:
    """Multiply-accumulate operations of one forward pass on `example`, counted by torch's FlopCounterMode (2 FLOPs each)."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(example)
    return counter.get_total_flops() // 2


class _Allocations(TorchDispatchMode):
    """Adds up the bytes of the storages that operators make, and takes them off when they die."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.seen: dict[int, weakref.finalize] = {}

    def _free(self, key: int, size: int) -> None:
        self.live -= size
        del self.seen[key]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if (
                isinstance(tensor, torch.Tensor)
                and (key := (storage := tensor.untyped_storage())._cdata) not in self.seen
                and key not in before
            ):
                self.live += storage.nbytes()
                self.seen[key] = weakref.finalize(storage, self._free, key, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result


def peak_bytes(function: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Most bytes of tensors alive at once during one call of `function`, above what was alive before it.

    On CUDA the allocator's own figure; elsewhere counted from the tensors that operators return, so that an operator's
    private workspace is not seen. Process memory would mislead: it keeps what was freed.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _Allocations() as allocations:
        function()
    return allocations.peak


def environment() -> dict[str, object]:
    """The stamp kept with every stored figure: processor, instruction sets, cores, threads, accelerators, versions."""
    return dict(vars(devices.describe()))
