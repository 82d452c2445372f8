"""Training under which machines may join, leave and die: DDP, checkpoints of steps, a program for torchrun.

    torchrun --nnodes=2 --node-rank=0 --nproc-per-node=8 --master-addr=10.0.0.1 --master-port=29500 \\
        -m companion.multi_machine --folder /shared/run --steps 1000 --every 50

Everything here but `main` is called in each rank, where the default process group is ready. What happens is
printed as lines of JSON, with the seconds since 1970.
"""

import argparse
import hashlib
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from companion import checks, data, ddp, launch, models, parity, training
from companion.sharded_checkpoint import Checkpoints


@dataclass(frozen=True)
class Recipe:
    """How long and from what is trained: `batch_size` is that of all ranks together; a checkpoint after each
    `every` steps goes into `folder`, which all machines see. `pause_seconds` make a step longer, so that
    there is time for a fault. No message may wait longer than `timeout_seconds`. `precision` is float32, or
    float64, whose rounding stays small even where Adam divides by it.
    """

    folder: str
    steps: int = 40
    every: int = 5
    batch_size: int = 48
    learning_rate: float = 1e-3
    seed: int = 0
    dataset: str = "digits"
    data_dir: str = "data"
    asynchronous: bool = False
    pause_seconds: float = 0.0
    timeout_seconds: float = 60.0
    precision: str = "float32"

    def __post_init__(self):
        for name in ("steps", "every", "batch_size"):
            checks.whole(name, getattr(self, name))
        checks.number("learning_rate", self.learning_rate, above=0)
        checks.number("pause_seconds", self.pause_seconds, least=0)
        checks.number("timeout_seconds", self.timeout_seconds, above=0)
        checks.choice("precision", self.precision, ("float32", "float64"))


@dataclass(frozen=True)
class Trained:
    """What a rank gives back: the step it began with, the loss of each further step over all ranks, seconds
    that each checkpoint took of the training, and a fingerprint of the weights.
    """

    first: int
    losses: list[float]
    stalls: list[float]
    fingerprint: str


def indices(step: int, samples: int, batch_size: int, seed: int) -> torch.Tensor:
    """Which samples the batch of a step has, of all ranks together `[batch_size]`: epoch by epoch another
    order, whatever the number of ranks. The last samples of an epoch, too few for a batch, are left out.
    """
    epoch, place = divmod(step, samples // batch_size)
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed + 1_000_003 * epoch))
    return order[place * batch_size : (place + 1) * batch_size]


def say(event: str, **what: object) -> None:
    """One line of JSON about this rank, for whoever watches."""
    about = {"event": event, "time": time.time(), "pid": os.getpid()}
    print(json.dumps(about | what), flush=True)


def check_same(recipe: Recipe) -> None:
    """Raises ValueError, on all ranks, unless all have the same recipe and the same code, naming the rank and
    machine that differs.
    """
    code = hashlib.sha256(b"".join(Path(name).read_bytes() for name in (__file__, ddp.__file__)))
    shown = asdict(recipe) | {"code": code.hexdigest()[:12], "torch": torch.__version__}
    every: list = [None] * dist.get_world_size()
    dist.all_gather_object(every, (socket.gethostname(), os.environ.get("GROUP_RANK", "0"), shown))
    for rank, (host, node, other) in enumerate(every):
        different = [
            f"{name}={other[name]!r}, not {every[0][2][name]!r}"
            for name in shown
            if other[name] != every[0][2][name]
        ]
        if different:
            raise ValueError(
                f"rank {rank} (node {node}, {host}) differs from rank 0 in {'; '.join(different)}: start the "
                "same code with the same arguments on all machines"
            )


def train(
    splits: data.Splits, recipe: Recipe, tell: Callable[..., object] = lambda event, **what: None
) -> Trained:
    """Trains LeNet5 from the last whole checkpoint on, on all ranks. `tell`, such as `say`, is called with
    what happens.

    The same weights come out, to the last bit, however often training was interrupted, if the number of ranks
    was the same; with another number sums run in another order. Raises ValueError if ranks do not fit
    together or the folder cannot be used, RuntimeError if a checkpoint cannot be written.
    """
    rank, ranks, here = dist.get_rank(), dist.get_world_size(), launch.device()
    if recipe.batch_size % ranks:
        fits = [n for n in range(1, ranks) if recipe.batch_size % n == 0]
        raise ValueError(
            f"{ranks} ranks cannot share batch_size={recipe.batch_size}; use {fits[-1]} or others"
        )
    if recipe.batch_size > len(splits.train.labels):
        raise ValueError(f"batch_size={recipe.batch_size} is more than {len(splits.train.labels)} samples")
    folder = checks.folder("folder", recipe.folder)
    check_same(recipe)
    training.seed_everything(recipe.seed)
    dtype = getattr(torch, recipe.precision)
    model = models.LeNet5(classes=len(splits.classes)).to(here, dtype)
    wrapped = ddp.wrap(model)
    optimizer = torch.optim.Adam(model.parameters(), recipe.learning_rate)
    checkpoints = Checkpoints(folder, asynchronous=recipe.asynchronous)
    first, losses = checkpoints.resume(model, optimizer), []
    restart = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    tell("start", rank=rank, ranks=ranks, step=first, restart=restart)
    for step in range(first, recipe.steps):
        own = indices(step, len(splits.train.labels), recipe.batch_size, recipe.seed).chunk(ranks)[rank]
        images, labels = splits.train.images[own].to(here, dtype), splits.train.labels[own].to(here)
        loss = training.plain_step(wrapped, images, labels, F.cross_entropy, optimizer).detach()
        dist.all_reduce(loss)
        losses.append(loss.item() / ranks)
        time.sleep(recipe.pause_seconds)
        if rank == 0:
            tell("step", step=step + 1, ranks=ranks, loss=losses[-1])
        if (step + 1) % recipe.every == 0:
            checkpoints.save(step + 1, model, optimizer)
            if rank == 0:
                tell("saved", step=step + 1)
    checkpoints.wait()
    return Trained(first, losses, checkpoints.stalls, parity.fingerprint(model))


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains LeNet5 in the ranks that torchrun has started, from the last checkpoint on if there is one."""
    parser = argparse.ArgumentParser(prog="torchrun ... -m companion.multi_machine", description=main.__doc__)
    defaults = asdict(Recipe("runs/multi_machine"))
    for name, default in defaults.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(default, bool):
            parser.add_argument(flag, action="store_true")
        else:
            parser.add_argument(flag, type=type(default), default=default, help=f"({default})")
    try:
        recipe = Recipe(**vars(parser.parse_args(arguments)))
    except ValueError as error:
        parser.error(str(error))
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    launch.join(timeout_seconds=recipe.timeout_seconds)
    splits = data.load_in_rank(recipe.dataset, recipe.data_dir, recipe.seed)
    try:
        trained = train(splits, recipe, say)
    except (ValueError, RuntimeError) as error:
        say("failed", rank=dist.get_rank(), reason=f"{type(error).__name__}: {error}")
        raise
    say("end", rank=dist.get_rank(), **asdict(trained))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
