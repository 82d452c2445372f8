"""DistributedDataParallel: training on several ranks, what a step costs, and a program for torchrun.

    torchrun --nproc-per-node=8 -m companion.ddp --dataset cifar10 --epochs 30

Everything here but `main` is called in each rank, where the default process group is ready.
"""

import argparse
import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from companion import collectives, data, launch, measure, models, modules, parity, training
from companion.collectives import AllReduce

MIB = 2**20


def wrap(model: nn.Module, **options: object) -> DistributedDataParallel:
    """The model on this rank's device, in DDP; rank 0's weights become everybody's. `options` go to DDP.

    Gradients are views into the buckets that are sent, which saves a copy of all of them in each step.
    """
    device = launch.device()
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(
        modules.move(model, device), device_ids=ids, **({"gradient_as_bucket_view": True} | options)
    )


@dataclass(frozen=True)
class Trained:
    """What a rank gives back: its measurements, the test accuracy from 0 to 1, and a fingerprint of the
    weights.
    """

    history: training.History
    accuracy: float
    fingerprint: str


def train(
    model: nn.Module,
    splits: data.Splits,
    recipe: training.Recipe,
    save_to: str | Path | None = None,
    progress: bool = True,
) -> Trained:
    """Trains each rank's model on all ranks together; rank 0's weights become everybody's first.

    `recipe.batch_size` is that of all ranks, each takes its share of every batch. Rank 0 writes the plain
    model's weights to `save_to`. Raises ValueError when the batch cannot be shared out evenly.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if recipe.batch_size % world_size:
        below = [size for size in range(1, world_size) if recipe.batch_size % size == 0]
        raise ValueError(
            f"world_size={world_size} does not divide batch_size={recipe.batch_size}; use {below[-1]} ranks"
        )
    wrapped, here = wrap(model), launch.device()
    share = {"rank": rank, "world_size": world_size, "drop_last": True, "seed": recipe.seed}
    batches = data.Batches(splits.train, recipe.batch_size // world_size, here, recipe.augment, **share)
    history = training.fit(wrapped, splits, recipe, device=here, batches=batches, progress=progress)
    if save_to and rank == 0:
        Path(save_to).parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), save_to)
    return Trained(history, training.evaluate(model, splits.test).accuracy, parity.fingerprint(model))


def buckets(model: nn.Module, first_bytes: int = MIB, most_bytes: int = 25 * MIB) -> int:
    """About how many all-reduces a step of DDP makes: its first bucket is small, so that sending starts
    early.
    """
    size = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return 1 + math.ceil(max(0, size - first_bytes) / most_bytes)


@dataclass(frozen=True)
class Scaling:
    """Times of a training step at one global batch size, for `world_size` ranks, in turn.

    "alone": one rank does the whole batch, the others idle. "share": all ranks at once do their shares, and
    do not communicate. "wrapped": they do so in DDP, each in a group of its own. "ddp": the real thing.
    `gradient_bytes` are sent in `calls` all-reduces.
    """

    batch_size: int
    world_size: int
    times: measure.Times
    gradient_bytes: int
    calls: int

    @property
    def speed_up(self) -> measure.Spread:
        return self.times.speed_up("ddp", over="alone")

    def predicted(self, line: AllReduce) -> float:
        """The speed-up if communication came after the computation, none of it hidden: the shares alone, and
        the line.
        """
        together = self.times["share"].median + line.seconds(self.gradient_bytes, self.calls)
        return self.times["alone"].median / together

    def refined(self, line: AllReduce) -> float:
        """The same with what DDP itself costs, and an all-reduce of this size as it was measured."""
        together = self.times["wrapped"].median + line.between(self.gradient_bytes, self.calls)
        return self.times["alone"].median / together


def scaling(
    make: Callable[[], nn.Module], shape: tuple[int, int, int], batch_sizes: Sequence[int], rounds: int = 3
) -> list[Scaling]:
    """Measures `make`'s model on random images of `shape` at each global batch size; the ways take turns in
    each round.
    """
    world_size = dist.get_world_size()
    if min(batch_sizes) < world_size:
        raise ValueError(f"a batch of {min(batch_sizes)} has no share for each of {world_size} ranks")
    groups = [dist.new_group([other]) for other in range(world_size)]
    rows = []
    for batch_size in batch_sizes:
        rows.append(_scaling(make, shape, batch_size, rounds, groups[dist.get_rank()]))
        gc.collect()  # the models of one batch size go before those of the next one come
    return rows


def _scaling(make, shape, batch_size: int, rounds: int, alone: dist.ProcessGroup) -> Scaling:
    rank, world_size, device = dist.get_rank(), dist.get_world_size(), launch.device()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, *shape, generator=generator).to(device)
    labels = torch.randint(0, 10, (batch_size,), generator=generator).to(device)
    mine = images[rank::world_size].contiguous(), labels[rank::world_size].contiguous()
    plain = make().to(device)
    lonely, together = (_of_the_same_weights(make(), plain) for _ in range(2))
    whole = training.stepper(plain, images, labels)
    ways = {"alone": whole if rank == 0 else lambda: None, "share": training.stepper(plain, *mine)}
    ways["wrapped"] = training.stepper(wrap(lonely, process_group=alone), *mine)
    ways["ddp"] = training.stepper(wrap(together), *mine)
    size = sum(p.nbytes for p in plain.parameters())
    return Scaling(batch_size, world_size, collectives.compare(ways, rounds), size, buckets(together))


def _of_the_same_weights(model: nn.Module, other: nn.Module) -> nn.Module:
    """`model` with the parameters of `other` for its own, in the same memory; their gradients are not."""
    for mine, its in zip(model.parameters(), other.parameters(), strict=True):
        mine.data = its.data
    return model


def crossing(batch_sizes: list[int], speed_ups: list[float], level: float = 1.0) -> float:
    """The batch size from which on the speed-up is above `level`, between measured points on a logarithmic
    scale.

    0 if it is above it from the first, infinite if it is below it at the last.
    """
    if speed_ups[-1] < level:
        return math.inf
    last = max((i for i, value in enumerate(speed_ups) if value < level), default=None)
    if last is None:
        return 0.0
    part = (level - speed_ups[last]) / (speed_ups[last + 1] - speed_ups[last])
    return batch_sizes[last] * (batch_sizes[last + 1] / batch_sizes[last]) ** part


def timeline(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, **options: object
) -> dict[str, list[tuple]]:
    """When one training step of DDP computes and when it sends: lane -> [(what, start, end)], seconds from
    its start.

    The step is the third, when DDP has put its buckets into the order in which gradients come. On a GPU the
    times are those at which work was queued.
    """
    spans: dict[str, list[tuple]] = {}
    ddp = wrap(model, **options)

    def hook(state, bucket):
        begun, name = time.perf_counter(), f"bucket {bucket.index()}\n{bucket.buffer().nbytes / MIB:.1f} MiB"

        def received(future):
            spans["all-reduce"].append((name, begun, time.perf_counter()))
            return future.value()[0]

        return (
            dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True)
            .get_future()
            .then(received)
        )

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
    # The last gradients are there; what follows is waiting.
    last = max(begun for _, begun, _ in spans["all-reduce"])
    spans["compute"] = [
        ("forward", marks[0], marks[1]),
        ("backward", marks[1], last),
        ("wait", last, marks[2]),
    ]
    return {
        lane: [(what, start - marks[0], end - marks[0]) for what, start, end in done]
        for lane, done in spans.items()
    }


def main() -> None:
    """Trains in the ranks that torchrun has started; rank 0 prints what came out."""
    parser = argparse.ArgumentParser(
        prog="torchrun --nproc-per-node=RANKS -m companion.ddp", description=main.__doc__
    )
    own = {"dataset": "digits", "data_dir": "data", "model": "lenet5", "save_to": ""}
    of_recipe = {
        name: getattr(training.Recipe(), name) for name in ("epochs", "batch_size", "learning_rate", "seed")
    }
    for name, default in (own | of_recipe).items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=type(default), default=default, help=f"({default or 'none'})"
        )
    arguments = vars(parser.parse_args())
    launch.join()
    recipe = training.Recipe(label_smoothing=0.05, **{name: arguments[name] for name in of_recipe})
    splits = data.load_in_rank(arguments["dataset"], arguments["data_dir"], recipe.seed)
    # On purpose not the same: DDP makes the weights equal.
    training.seed_everything(recipe.seed + dist.get_rank())
    model = models.create(arguments["model"], classes=len(splits.classes))
    trained = train(model, splits, recipe, arguments["save_to"] or None, progress=False)
    if dist.get_rank() == 0:
        speed = trained.history.samples_per_second * dist.get_world_size()
        print(
            f"{dist.get_world_size()} ranks: test accuracy {trained.accuracy:.2%}, {speed:,.0f} samples/s, "
            f"{trained.fingerprint}"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
