"""Training steps of a model that is laid out over ranks, and what they take: losses, seconds, bytes.

Called in each rank, where the default process group is ready; `Job` is the same everywhere.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from companion import collectives, hybrid, launch, measure, training
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
    """This rank's part of a job under a layout. `model` is what it trains, `optimizer` what updates it."""

    def __init__(self, job: Job, layout: Layout):
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
