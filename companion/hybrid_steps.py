"""Training steps of a model that is laid out over ranks, and what they take: losses, seconds, bytes.

    torchrun --nproc-per-node=8 -m companion.hybrid_steps --data 2 --tensor 4 --sharding parameters

Everything but `main` is called in each rank, where the default process group is ready; `Job` is the same
everywhere.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from companion import collectives, data, hybrid, launch, measure, models, training
from companion.layouts import Layout
from companion.memory import SavedBytes


def adam(parameters) -> torch.optim.Optimizer:
    """Adam that also takes parameters of which a rank holds a part."""
    return torch.optim.Adam(parameters, 1e-3, foreach=False)


@dataclass(frozen=True)
class Job:
    """What is trained: `make()` gives the model, from `seed` the same on all ranks; one batch of images
    `[N, ...]` and labels `[N]`, the same on all ranks.

    `blocks` names the model's equal layers in order: they are gathered one at a time, and stages are cut
    between them. `split` names the Linear layers that tensor parallelism splits, see `hybrid.laid_out`, and
    `splits` is what it must divide, such as the number of heads.
    """

    make: Callable[[], nn.Module]
    images: torch.Tensor
    labels: torch.Tensor
    blocks: Sequence[str]
    split: Mapping[str, str] = field(default_factory=dict)
    splits: int = 1
    optimizer: Callable = adam
    loss_function: Callable = F.cross_entropy
    seed: int = 0


class Laid:
    """This rank's part of a job under a layout. `model` is what it trains, `optimizer` what updates it.

    Raises ValueError, on all ranks, for a batch or blocks that the layout does not divide: shares of other
    sizes would give other gradients.
    """

    def __init__(self, job: Job, layout: Layout):
        parts = layout.data * layout.micro_batches
        if len(job.images) % parts or len(job.blocks) % layout.pipeline:
            raise ValueError(
                f"{layout} does not divide a batch of {len(job.images)} into {parts} equal parts, or "
                f"{len(job.blocks)} blocks into {layout.pipeline} equal stages"
            )
        self.job, self.mesh = job, hybrid.mesh_of(layout)
        training.seed_everything(job.seed)
        whole = job.make()
        if layout.pipeline > 1:
            many = len(job.blocks) // layout.pipeline
            at = [job.blocks[many * stage - 1] for stage in range(1, layout.pipeline)]
            self.pipeline = hybrid.pipelined(whole, at, layout, self.mesh, loss_function=job.loss_function)
            self.model = self.pipeline.own
        else:
            shard = [whole.get_submodule(name) for name in job.blocks]
            self.pipeline = None
            self.model = hybrid.laid_out(whole, layout, self.mesh, split=job.split, shard=shard)
        self.optimizer = job.optimizer(self.model.parameters())
        self.images, self.labels = (
            hybrid.share(tensor, self.mesh).to(launch.device()) for tensor in (job.images, job.labels)
        )

    def step(self) -> torch.Tensor:
        """One training step on this rank's share of the batch; gives its loss there."""
        self.optimizer.zero_grad()
        if self.pipeline:
            loss = self.pipeline.step(self.images, self.labels)
        else:
            loss = self.job.loss_function(self.model(self.images), self.labels)
            loss.backward()
        self.optimizer.step()
        return loss.detach()


@dataclass(frozen=True)
class Measured:
    """What a rank found: the job's loss before each step, bytes that it holds by kind, bytes that it sends in
    a step, and seconds of a step on the slowest rank.
    """

    losses: list[float]
    held: dict[str, int]
    sent: dict[str, float]
    seconds: measure.Spread | None


def run(job: Job, layout: Layout, steps: int = 3, rounds: int = 0) -> Measured:
    """Trains for some steps, and times `rounds` further ones."""
    laid, losses = Laid(job, layout), []
    for _ in range(steps - 1):
        losses.append(hybrid.mean_loss(laid.step(), laid.mesh))
    with SavedBytes(laid.model, laid.images) as saved, collectives.SentBytes() as sent:
        last = laid.step()
    losses.append(hybrid.mean_loss(last, laid.mesh))
    held = hybrid.held_bytes(laid.model, laid.optimizer) | {"activations": saved.most}
    seconds = collectives.compare({"step": laid.step}, rounds, warm_up=0)["step"] if rounds else None
    return Measured(losses, held, sent.sizes, seconds)


def transformer(
    splits: data.Splits, batch_size: int, seed: int = 0, learning_rate: float = 1e-3, **options: int
) -> Job:
    """A vision transformer on the first training images; `options` are `models.VisionTransformer`'s."""

    def make() -> models.VisionTransformer:
        return models.VisionTransformer(len(splits.classes), **options)

    def optimizer(parameters) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, learning_rate, foreach=False)

    model = make()
    blocks = [f"blocks.{i}" for i in range(len(model.blocks))]
    images, labels = splits.train.images[:batch_size], splits.train.labels[:batch_size]
    heads = model.blocks[0].qkv.in_features // model.blocks[0].head_width
    return Job(make, images, labels, blocks, model.split(), heads, optimizer, seed=seed)


def main() -> None:
    """Trains a vision transformer under a layout in the ranks that torchrun has started, and prints what a
    step takes.
    """
    parser = argparse.ArgumentParser(
        prog="torchrun --nproc-per-node=RANKS -m companion.hybrid_steps", description=main.__doc__
    )
    own = {"dataset": "digits", "data_dir": "data", "batch_size": 64, "seed": 0, "steps": 3, "rounds": 5}
    of_model = {"width": 256, "layers": 4, "heads": 8}
    of_layout = {"data": 1, "tensor": 1, "pipeline": 1, "sharding": "none", "micro_batches": 1}
    for name, default in (own | of_model | of_layout).items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=type(default), default=default, help=f"({default})")
    given = vars(parser.parse_args())
    launch.join()
    splits = data.load_in_rank(given["dataset"], given["data_dir"], given["seed"])
    job = transformer(splits, given["batch_size"], given["seed"], **{name: given[name] for name in of_model})
    found = run(job, Layout(**{name: given[name] for name in of_layout}), given["steps"], given["rounds"])
    if dist.get_rank() == 0:
        held, sent = sum(found.held.values()) / 2**20, sum(found.sent.values()) / 2**20
        print(f"losses {found.losses}, {found.seconds.scaled(1e3):.1f} ms a step")
        print(f"rank 0 holds {held:.1f} MiB and sends {sent:.1f} MiB in a step")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
