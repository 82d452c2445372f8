"""What ranks say to each other: its time, its bytes, and whether all have the same.

Called in each rank of a process group.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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


class SentBytes(TorchDispatchMode):
    """Counts the bytes that this rank sends inside, by kind of message, as a ring algorithm would send them.

    Of S bytes that a rank puts in, over n ranks: all-reduce 2 (n - 1) / n S, all-gather (n - 1) S,
    reduce-scatter (n - 1) / n S, a message to one rank S. Whatever goes through torch.distributed is seen,
    DDP's buckets too; broadcasts, which only prepare or report, do not count.
    """

    def __init__(self):
        super().__init__()
        self.sizes: dict[str, float] = {}

    @property
    def total(self) -> float:
        return sum(self.sizes.values())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        if function.namespace in ("c10d", "_c10d_functional") and name in _MESSAGES:
            kind, place = _MESSAGES[name]
            put_in = sum(tensor.nbytes for tensor in tree_leaves(args[place]))
            self.sizes[kind] = self.sizes.get(kind, 0.0) + _SHARES[kind](_ranks(args)) * put_in
        return function(*args, **(kwargs or {}))


# torch's operators: what they do, and which argument is what a rank puts in.
_MESSAGES = {
    "allreduce_": ("all_reduce", 0),
    "all_reduce": ("all_reduce", 0),
    "allgather_": ("all_gather", 1),
    "_allgather_base_": ("all_gather", 1),
    "all_gather_into_tensor": ("all_gather", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_scatter_tensor": ("reduce_scatter", 0),
    "send": ("send", 0),
}
_SHARES = {
    "all_reduce": lambda ranks: 2 * (ranks - 1) / ranks,
    "all_gather": lambda ranks: ranks - 1,
    "reduce_scatter": lambda ranks: (ranks - 1) / ranks,
    "send": lambda ranks: 1,
}


def _ranks(args: Sequence[object]) -> int:
    """The size of the process group among an operator's arguments: itself, or its name, which is the last."""
    for value in args:
        if isinstance(value, torch.ScriptObject) and str(value._type()).endswith("c10d.ProcessGroup"):
            return dist.ProcessGroup.unbox(value).size()
    return dist.distributed_c10d._resolve_process_group(args[-1]).size()


@dataclass(frozen=True)
class AllReduce:
    """The time of an all-reduce as a straight line: seconds = latency + bytes / rate (the alpha-beta model).

    Source: Hockney 1994; Thakur, Rabenseifner and Gropp 2005, "Optimization of collective communication
    operations".
    """

    latency_seconds: float
    bytes_per_second: float
    points: tuple[tuple[float, float], ...] = ()  # what was measured: bytes, seconds

    @classmethod
    def fitted(cls, measured: dict[int, measure.Spread]) -> "AllReduce":
        """The line with the least relative errors through the medians of what was measured, by bytes."""
        sizes = np.array(list(measured), dtype=float)
        seconds = np.array([spread.median for spread in measured.values()], dtype=float)
        slope, start = np.polyfit(sizes, seconds, 1, w=1 / seconds)
        points = tuple(zip(sizes.tolist(), seconds.tolist(), strict=True))
        return cls(max(0.0, float(start)), 1 / max(float(slope), 1e-15), points)

    def seconds(self, size_bytes: float, calls: int = 1) -> float:
        """Of `calls` all-reduces that send `size_bytes` in all."""
        return calls * self.latency_seconds + size_bytes / self.bytes_per_second

    def between(self, size_bytes: float, calls: int = 1) -> float:
        """Of `calls` all-reduces that send `size_bytes` in all, between the sizes that were measured (on
        logarithmic scales); beyond them as the line says.
        """
        each = size_bytes / calls
        if not self.points or not self.points[0][0] <= each <= self.points[-1][0]:
            return self.seconds(size_bytes, calls)
        sizes, seconds = (np.log(values) for values in zip(*self.points, strict=True))
        return calls * float(np.exp(np.interp(np.log(each), sizes, seconds)))


def all_reduce_seconds(
    sizes_bytes: Iterable[int],
    calls: int = 25,
    send: Callable[[torch.Tensor], object] = dist.all_reduce,
) -> dict[int, measure.Spread]:
    """Seconds of an all-reduce, or of what else `send` does, with float32 tensors of these sizes, on the
    slowest rank.
    """
    tensors = {str(size): torch.zeros(size // 4, device=launch.device()) for size in sizes_bytes}
    times = compare({name: lambda x=x: send(x) for name, x in tensors.items()}, calls)
    return {tensor.nbytes: times[name] for name, tensor in tensors.items()}
