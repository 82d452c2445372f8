"""What ranks say to each other: its time, its bytes, and whether all have the same.

Called in each rank of a process group.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from companion import launch, measure


def slowest(seconds: float) -> float:
    """The longest of all ranks' times."""
    longest = torch.tensor(seconds, dtype=torch.float64)
    if dist.get_backend() == "nccl":  # which sends nothing from main memory
        longest = longest.to(launch.device())
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    return float(longest)


def compare(functions: dict[str, Callable[[], object]], rounds: int = 7, warm_up: int = 1) -> measure.Times:
    """`measure.compare` on all ranks together: they start at a barrier, and the slowest rank's time
    counts.
    """
    return measure.compare(
        functions, launch.device(), rounds, warm_up=warm_up, meet=dist.barrier, agree=slowest
    )


def equal_everywhere(tensor: torch.Tensor) -> bool:
    """Whether the tensor is the same on all ranks, to the last bit."""
    first = tensor.detach().clone()
    dist.broadcast(first, src=0)
    same = torch.tensor(float(torch.equal(first, tensor)), device=tensor.device)
    dist.all_reduce(same, dist.ReduceOp.MIN)
    return bool(same)


@contextmanager
def counted_bytes() -> Iterator[list[int]]:
    """Collects the bytes of each tensor that Python code, such as a communication hook, gives to
    `dist.all_reduce`.
    """
    plain, sizes = dist.all_reduce, []

    def counted(tensor, *args, **options):
        sizes.append(tensor.nbytes)
        return plain(tensor, *args, **options)

    dist.all_reduce = counted
    try:
        yield sizes
    finally:
        dist.all_reduce = plain


@dataclass(frozen=True)
class AllReduce:
    """The time of an all-reduce as a straight line: seconds = latency + bytes / rate (the alpha-beta model).

    Source: Hockney 1994; Thakur, Rabenseifner and Gropp 2005, "Optimization of collective communication
    operations".
    """

    latency_seconds: float
    bytes_per_second: float

    @classmethod
    def fitted(cls, measured: dict[int, measure.Spread]) -> "AllReduce":
        """The line with the least relative errors through the medians of what was measured, by bytes."""
        sizes = np.array(list(measured), dtype=float)
        seconds = np.array([spread.median for spread in measured.values()], dtype=float)
        slope, start = np.polyfit(sizes, seconds, 1, w=1 / seconds)
        return cls(max(0.0, float(start)), 1 / max(float(slope), 1e-15))

    def seconds(self, size_bytes: float, calls: int = 1) -> float:
        """Of `calls` all-reduces that send `size_bytes` in all."""
        return calls * self.latency_seconds + size_bytes / self.bytes_per_second


def all_reduce_seconds(sizes_bytes: Iterable[int], calls: int = 25) -> dict[int, measure.Spread]:
    """Seconds of an all-reduce of float32 tensors of these sizes, on the slowest rank."""
    tensors = {str(size): torch.zeros(size // 4, device=launch.device()) for size in sizes_bytes}
    times = compare({name: lambda x=x: dist.all_reduce(x) for name, x in tensors.items()}, calls)
    return {tensor.nbytes: times[name] for name, tensor in tensors.items()}
