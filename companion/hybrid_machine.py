"""This machine as a cluster: what its ranks compute, send and lose, measured in some seconds.

Called in each rank, where the default process group is ready.
"""

from collections.abc import Callable
from dataclasses import replace
from math import inf

import torch
import torch.distributed as dist
from torch import nn

from companion import collectives, host, launch, layouts, measure, memory, models
from companion.clusters import Cluster, Link, Overheads
from companion.collectives import AllReduce
from companion.hybrid_plan import workload
from companion.hybrid_steps import Job, Laid
from companion.layouts import Layout

SIZES = (4 * 2**10, 2**18, 2**22)  # bytes that are sent: the latency, between, the rate


def measured(job: Job, rounds: int = 5) -> Cluster:
    """One node, a device for each rank.

    What a device computes in a second, and what a pass costs whatever its size, is a straight line through
    the times of two sizes of a rank's share of the batch, on all ranks at once; on the first rank alone it
    shows how far they share cores. Links are straight lines too. Other overheads are what layouts of a tiny
    transformer take beyond all that.
    """
    ranks, here, model = dist.get_world_size(), launch.device(), job.make()
    model, images = model.to(here), job.images[: max(2, len(job.images) // ranks)].to(here)
    few = images[: max(1, len(images) // 8)]
    optimizer, tiny = job.optimizer(model.parameters()), _tiny(ranks)
    small = tiny.make().to(here)

    def alone() -> None:
        if dist.get_rank() == 0:
            _passes(model, images)

    ways = {
        "all": lambda: _passes(model, images),
        "few": lambda: _passes(model, few),
        "alone": alone,
        "tiny": lambda: _passes(small, tiny.images[:1].to(here)),
        "update": optimizer.step,
    }
    times = collectives.compare(ways, rounds)
    slope = (times["all"].median - times["few"].median) / (len(images) - len(few))
    one = max(slope, 0.01 * times["all"].median / len(images))  # seconds of an image; noise may hide it
    layer = max(0.0, times["all"].median - len(images) * one) / len(job.blocks)
    shared = max(1.0, times.speed_up("alone", over="all").median)
    if here.type == "cuda":
        room = torch.cuda.get_device_properties(here).total_memory
    else:
        room = host.usable_memory_bytes() / ranks
    lines = links(rounds) if ranks > 1 else Link(0.0, inf)
    cluster = Cluster(
        ranks,
        ranks,
        3 * 2 * measure.macs(model, images) / len(images) / one,
        room,
        lines,
        lines,
        f"measured here, {ranks} ranks on {here.type}",
        memory.parameters(model) / times["update"].median,
        ranks / shared if shared > 1 else inf,
        Overheads(times["tiny"].median / len(tiny.blocks)),
    )
    beyond = _beyond(cluster, tiny, rounds) if ranks > 1 else {}
    return replace(cluster, overheads=Overheads(layer, **beyond))


def _passes(model: nn.Module, images: torch.Tensor) -> None:
    """Forward and backward; gradients are added up, as those of micro-batches are."""
    model(images).sum().backward()


def _tiny(ranks: int) -> Job:
    """A transformer with a head and a block for each rank, and next to nothing to compute."""
    images, labels = torch.zeros(2 * ranks, 3, 32, 32), torch.zeros(2 * ranks, dtype=torch.long)
    options = {"width": 8 * ranks, "layers": ranks, "heads": ranks, "patch": 16}

    def make() -> models.VisionTransformer:
        return models.VisionTransformer(**options)

    return Job(make, images, labels, [f"blocks.{i}" for i in range(ranks)], make().split(), ranks)


def _beyond(cluster: Cluster, tiny: Job, rounds: int) -> dict[str, float]:
    """What steps of the tiny job take beyond what is predicted for them, by layout."""
    ranks, work = cluster.devices, workload(tiny)
    found = {
        "tensor": Layout(tensor=ranks),
        "sharded": Layout(ranks, sharding="parameters"),
        "pipeline": Layout(pipeline=ranks, micro_batches=2 * ranks),
    }
    steps = {name: Laid(tiny, layout).step for name, layout in found.items()}
    times = collectives.compare(steps, rounds, warm_up=2)
    slots = sum(cluster.slot(busy) for busy in layouts.busy_stages(found["pipeline"]))
    shares = {"tensor": work.layers, "sharded": work.layers, "pipeline": slots}
    beyond = {}
    for name, layout in found.items():
        predicted = sum(layouts.step_seconds(layout, work, len(tiny.images), cluster).values())
        beyond[name] = max(0.0, times[name].median - predicted) / shares[name]
    return beyond


def links(rounds: int = 5) -> Link:
    """The link whose rings take as long as what was measured, each kind of message by itself."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    partner = rank ^ 1  # ranks 0 and 1, 2 and 3, ...
    through_memory = dist.get_backend() == "gloo"  # which sends from there only, as a pipeline's stages do

    def message(whole: torch.Tensor) -> None:
        if partner >= ranks:
            return
        whole = whole.cpu() if through_memory else whole
        if rank < partner:
            dist.send(whole, partner)
        else:
            dist.recv(whole, partner)

    def gather(whole: torch.Tensor) -> None:
        part = whole[: len(whole) // ranks]
        dist.all_gather_into_tensor(whole[: ranks * len(part)], part.clone())

    def scatter(whole: torch.Tensor) -> None:
        part = torch.empty_like(whole[: len(whole) // ranks])
        dist.reduce_scatter_tensor(part, whole[: ranks * len(part)])

    def line(send: Callable[[torch.Tensor], object]) -> AllReduce:
        return AllReduce.fitted(collectives.all_reduce_seconds(SIZES, 3 * rounds, send))

    kinds = {
        "reduce": ring(line(dist.all_reduce), 2 * (ranks - 1), ranks),
        "gather": ring(line(gather), ranks - 1, ranks),
        "scatter": ring(line(scatter), ranks - 1, ranks),
    }
    sent = line(message)
    return Link(sent.latency_seconds, sent.bytes_per_second, kinds)


def ring(line: AllReduce, steps: int, ranks: int) -> Link:
    """The link over which a ring of so many steps takes as long as this line says."""
    return Link(line.latency_seconds / steps, line.bytes_per_second * steps / ranks)
