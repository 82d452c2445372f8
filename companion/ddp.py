"""DistributedDataParallel: training on several ranks, and what a step of it costs; also a program for torchrun.

    torchrun --nproc-per-node=8 -m companion.ddp --dataset cifar10 --epochs 30

Everything here but `AllReduce` and `main` is called in each rank, where the default process group is ready.
"""

import argparse
import hashlib
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from companion import data, devices, launch, models, training

MIB = 2**20


def wrap(model: nn.Module, **options: object) -> DistributedDataParallel:
    """The model on this rank's device, in DDP; rank 0's weights become everybody's. `options` go to DDP.

    Gradients are views into the buckets that are sent, which saves a copy of all of them in each step.
    """
    device = launch.device()
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model.to(device), device_ids=ids, **({"gradient_as_bucket_view": True} | options))


@dataclass(frozen=True)
class Trained:
    """What a rank gives back: its measurements, the test accuracy from 0 to 1, and a fingerprint of the weights."""

    history: training.History
    accuracy: float
    fingerprint: str


def train(
    dataset: str,
    data_dir: str | Path,
    recipe: training.Recipe,
    model_name: str = "lenet5",
    save_to: str | Path | None = None,
    progress: bool = True,
) -> Trained:
    """Trains on all ranks together: `recipe.batch_size` is that of all, each rank takes its share of every batch.

    Rank 0 writes the plain model's weights to `save_to`. Raises ValueError when the batch cannot be shared out evenly.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if recipe.batch_size % world_size:
        below = [size for size in range(1, world_size) if recipe.batch_size % size == 0]
        raise ValueError(f"world_size={world_size} does not divide batch_size={recipe.batch_size}; use {below[-1]} ranks")
    splits = data.load_in_rank(dataset, data_dir, recipe.seed)
    training.seed_everything(recipe.seed + rank)  # on purpose not the same: DDP makes the weights equal
    model = wrap(models.create(model_name, classes=len(splits.classes)))
    share = {"rank": rank, "world_size": world_size, "drop_last": True, "seed": recipe.seed}
    batches = data.Batches(splits.train, recipe.batch_size // world_size, launch.device(), recipe.augment, **share)
    history = training.fit(model, splits, recipe, device=launch.device(), batches=batches, progress=progress)
    if save_to and rank == 0:
        Path(save_to).parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.module.state_dict(), save_to)
    return Trained(history, training.evaluate(model.module, splits.test).accuracy, fingerprint(model.module))


def fingerprint(model: nn.Module) -> str:
    """Twelve digits that are equal for models whose weights and buffers are equal to the last bit."""
    digest = hashlib.sha256()
    for value in model.state_dict().values():
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def gradients(model: nn.Module) -> torch.Tensor:
    """All gradients of the model in one vector, a copy."""
    return torch.cat([p.grad.detach().flatten() for p in model.parameters() if p.grad is not None])


def equal_everywhere(tensor: torch.Tensor) -> bool:
    """Whether the tensor is the same on all ranks, to the last bit."""
    first = tensor.detach().clone()
    dist.broadcast(first, src=0)
    same = torch.tensor(float(torch.equal(first, tensor)), device=tensor.device)
    dist.all_reduce(same, dist.ReduceOp.MIN)
    return bool(same)


@contextmanager
def counted_bytes() -> Iterator[list[int]]:
    """Collects the bytes of each tensor that Python code, such as a communication hook, gives to `dist.all_reduce`."""
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

    Source: Hockney 1994; Thakur, Rabenseifner and Gropp 2005, "Optimization of collective communication operations".
    """

    latency_seconds: float
    bytes_per_second: float

    @classmethod
    def fitted(cls, seconds_by_bytes: dict[int, float]) -> "AllReduce":
        """The line with the least relative errors."""
        sizes, seconds = (np.array(values, dtype=float) for values in (list(seconds_by_bytes), list(seconds_by_bytes.values())))
        slope, start = np.polyfit(sizes, seconds, 1, w=1 / seconds)
        return cls(max(0.0, float(start)), 1 / max(float(slope), 1e-15))

    def seconds(self, size_bytes: float, calls: int = 1) -> float:
        """Of `calls` all-reduces that send `size_bytes` in all."""
        return calls * self.latency_seconds + size_bytes / self.bytes_per_second


def slowest(seconds: float) -> float:
    """The longest of all ranks' times."""
    longest = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    return float(longest)


def all_reduce_seconds(sizes_bytes: Iterable[int], calls: int = 25) -> dict[int, float]:
    """Median seconds of an all-reduce of float32 tensors of these sizes, on the slowest rank."""
    tensors = [torch.zeros(size // 4, device=launch.device()) for size in sizes_bytes]
    times: dict[int, list[float]] = {tensor.nbytes: [] for tensor in tensors}
    for _ in range(calls + 1):
        for tensor in tensors:  # in turn, so that a slow moment hits all sizes alike
            dist.barrier()
            start = time.perf_counter()
            dist.all_reduce(tensor)
            devices.synchronize(launch.device())
            times[tensor.nbytes].append(time.perf_counter() - start)
    return {size: slowest(statistics.median(series[1:])) for size, series in times.items()}


def buckets(model: nn.Module, first_bytes: int = MIB, most_bytes: int = 25 * MIB) -> int:
    """About how many all-reduces a step of DDP makes: its first bucket is small, so that sending starts early."""
    size = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return 1 + math.ceil(max(0, size - first_bytes) / most_bytes)


@dataclass(frozen=True)
class Scaling:
    """Median seconds of a training step at one global batch size, for `world_size` ranks.

    `alone`: one rank does the whole batch, the others idle. `share`: all ranks at once do their shares, and do not
    communicate. `ddp`: the real thing. `gradient_bytes` are sent in `calls` all-reduces.
    """

    batch_size: int
    world_size: int
    alone_seconds: float
    share_seconds: float
    ddp_seconds: float
    gradient_bytes: int
    calls: int

    @property
    def speed_up(self) -> float:
        return self.alone_seconds / self.ddp_seconds

    def predicted(self, line: AllReduce) -> float:
        """The speed-up if communication came after the computation, none of it hidden."""
        return self.alone_seconds / (self.share_seconds + line.seconds(self.gradient_bytes, self.calls))


def stepper(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A training step of SGD on one batch, to be called again and again; the weights hardly change."""
    optimizer = training.make_optimizer(model, training.Recipe(learning_rate=1e-7, optimizer="sgd"))
    return lambda: training.plain_step(model, images, labels, F.cross_entropy, optimizer)


def scaling(
    make: Callable[[], nn.Module], shape: tuple[int, int, int], batch_sizes: Sequence[int], rounds: int = 3
) -> list[Scaling]:
    """Measures `make`'s model on random images of `shape` at each global batch size; the ways take turns in each round."""
    rank, world_size, device = dist.get_rank(), dist.get_world_size(), launch.device()
    if min(batch_sizes) < world_size:
        raise ValueError(f"a batch of {min(batch_sizes)} has no share for each of {world_size} ranks")
    rows = []
    for batch_size in batch_sizes:
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(batch_size, *shape, generator=generator).to(device)
        labels = torch.randint(0, 10, (batch_size,), generator=generator).to(device)
        mine = images[rank::world_size].contiguous(), labels[rank::world_size].contiguous()
        plain, model = make().to(device), make()
        ways = {"alone": stepper(plain, images, labels), "share": stepper(plain, *mine), "ddp": stepper(wrap(model), *mine)}
        times: dict[str, list[float]] = {name: [] for name in ways}
        turn = list(ways.items())
        for _ in range(rounds + 1):
            turn = [*turn[1:], turn[0]]
            for name, step in turn:
                dist.barrier()
                start = time.perf_counter()
                if name != "alone" or rank == 0:
                    step()
                    devices.synchronize(device)
                times[name].append(slowest(time.perf_counter() - start))
        medians = (statistics.median(series[1:]) for series in times.values())
        size = sum(p.nbytes for p in model.parameters())
        rows.append(Scaling(batch_size, world_size, *medians, gradient_bytes=size, calls=buckets(model)))
    return rows


def crossing(batch_sizes: list[int], speed_ups: list[float], level: float = 1.0) -> float:
    """The batch size from which on the speed-up is above `level`, between measured points on a logarithmic scale.

    0 if it is above it from the first, infinite if it is below it at the last.
    """
    if speed_ups[-1] < level:
        return math.inf
    last = max((i for i, value in enumerate(speed_ups) if value < level), default=None)
    if last is None:
        return 0.0
    part = (level - speed_ups[last]) / (speed_ups[last + 1] - speed_ups[last])
    return batch_sizes[last] * (batch_sizes[last + 1] / batch_sizes[last]) ** part


def timeline(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, **options: object) -> dict[str, list[tuple]]:
    """When one training step of DDP computes and when it sends: lane -> [(what, start, end)], seconds from its start.

    The step is the third, when DDP has put its buckets into the order in which gradients come. On a GPU the times are those
    at which work was queued.
    """
    spans: dict[str, list[tuple]] = {}
    ddp = wrap(model, **options)

    def hook(state, bucket):
        begun, name = time.perf_counter(), f"bucket {bucket.index()}\n{bucket.buffer().nbytes / MIB:.1f} MiB"

        def received(future):
            spans["all-reduce"].append((name, begun, time.perf_counter()))
            return future.value()[0]

        return dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True).get_future().then(received)

    ddp.register_comm_hook(None, hook)
    for _ in range(3):
        spans.clear()
        spans |= {"compute": [], "all-reduce": []}
        dist.barrier()
        marks = [time.perf_counter()]
        loss = F.cross_entropy(ddp(images), labels)
        marks.append(time.perf_counter())
        loss.backward()
        marks.append(time.perf_counter())
    last = max(begun for _, begun, _ in spans["all-reduce"])  # the last gradients are there; what follows is waiting
    spans["compute"] = [("forward", marks[0], marks[1]), ("backward", marks[1], last), ("wait", last, marks[2])]
    return {lane: [(what, start - marks[0], end - marks[0]) for what, start, end in done] for lane, done in spans.items()}


def main() -> None:
    """Trains in the ranks that torchrun has started; rank 0 prints what came out."""
    parser = argparse.ArgumentParser(prog="torchrun --nproc-per-node=RANKS -m companion.ddp", description=main.__doc__)
    own = {"dataset": "digits", "data_dir": "data", "model": "lenet5", "save_to": ""}
    of_recipe = {name: getattr(training.Recipe(), name) for name in ("epochs", "batch_size", "learning_rate", "seed")}
    for name, default in (own | of_recipe).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, help=f"({default or 'none'})")
    arguments = vars(parser.parse_args())
    device = launch.device()
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    recipe = training.Recipe(label_smoothing=0.05, **{name: arguments[name] for name in of_recipe})
    trained = train(arguments["dataset"], arguments["data_dir"], recipe, arguments["model"], arguments["save_to"] or None, False)
    if dist.get_rank() == 0:
        speed = trained.history.samples_per_second * dist.get_world_size()
        print(
            f"{dist.get_world_size()} ranks: test accuracy {trained.accuracy:.2%}, {speed:,.0f} samples/s, {trained.fingerprint}"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
