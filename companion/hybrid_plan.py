"""Which layout for which machine: a model described, a machine measured, all layouts ranked by `layouts`.

found = launch.run(hybrid_plan.measured_cluster, 4, model, example)[0]  # this machine, quickly measured
plan = hybrid_plan.plan(model, example, 64, found, blocks=list(model.blocks), splits=8)
print(plan.table())
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from companion import collectives, host, launch, layouts, measure, memory, tables
from companion.layouts import Cluster, Estimate, Link, Workload

SIZES = (4 * 2**10, 2**18, 2**22)  # bytes of the all-reduces that are timed: the latency, between, the rate


def workload(
    model: nn.Module, example: torch.Tensor, blocks: Sequence[nn.Module], splits: int = 1
) -> Workload:
    """A model as the formulas see it, from one forward pass on `example` `[N, ...]` of float32.

    `blocks` are its equal layers, one after the other, between which it can be cut; `splits` is what tensor
    parallelism must divide, such as the number of heads. Training is in float32, by Adam.

    Raises ValueError if the blocks are not in the model, or do not hand on one tensor.
    """
    inside = set(model.modules())
    if not blocks or any(block not in inside for block in blocks):
        raise ValueError("blocks must be modules of the model: its equal layers, in order")
    handed_on: list[torch.Tensor] = []
    hook = blocks[0].register_forward_hook(lambda block, given, output: handed_on.append(output))
    try:
        with memory.SavedBytes(model, example) as saved:
            kept = model(example)
    finally:
        hook.remove()
    if not handed_on or not isinstance(handed_on[0], torch.Tensor):
        raise ValueError(f"{type(blocks[0]).__name__} hands on no single tensor")
    many, most = len(example), saved.most
    del kept
    return Workload(
        parameters=memory.parameters(model),
        layers=len(blocks),
        splits=splits,
        forward_flops=2 * measure.macs(model, example) / many,
        boundary_bytes=handed_on[0].nbytes / many,
        saved_bytes=most / many,
    )


def measured_cluster(model: nn.Module, example: torch.Tensor, rounds: int = 5) -> Cluster:
    """This machine as a cluster of one node, a device for each rank; called in each rank.

    What a device computes in a second is taken from forward and backward of the model itself, on all ranks at
    once; the link from all-reduces of several sizes.
    """
    ranks, here = dist.get_world_size(), launch.device()
    model, example = model.to(here), example.to(here)

    def step() -> None:
        model.zero_grad()
        model(example).sum().backward()

    seconds = collectives.compare({"step": step}, rounds)["step"].median
    flops = 3 * 2 * measure.macs(model, example) / seconds
    link = Link(0.0, float("inf"))
    if ranks > 1:
        line = collectives.AllReduce.fitted(collectives.all_reduce_seconds(SIZES))
        link = link_of(line, ranks)
    if here.type == "cuda":
        room = torch.cuda.get_device_properties(here).total_memory
    else:
        room = host.usable_memory_bytes() / ranks
    return Cluster(ranks, ranks, flops, room, link, link, f"measured here, {ranks} ranks on {here.type}")


def link_of(line: collectives.AllReduce, ranks: int) -> Link:
    """The link whose ring all-reduce over so many ranks takes as long as this line says."""
    steps = 2 * (ranks - 1)
    return Link(line.latency_seconds / steps, line.bytes_per_second * steps / ranks)


@dataclass(frozen=True)
class Plan:
    """Layouts by predicted time, the fastest first: those that fit into a device's memory, and the others."""

    cluster: Cluster
    fit: tuple[Estimate, ...]
    too_large: tuple[Estimate, ...]

    def table(self, most: int = 12) -> tables.Table:
        """The fastest layouts, with milliseconds of a step by term and MiB of each device."""
        terms = list(self.fit[0].seconds if self.fit else self.too_large[0].seconds)
        shown = [*self.fit, *self.too_large][:most]
        rows = [
            (
                str(one.layout),
                f"{1e3 * one.step_seconds:.1f}",
                *(f"{1e3 * one.seconds[term]:.1f}" for term in terms),
                f"{one.total_bytes / 2**20:,.1f}",
                "" if one in self.fit else "does not fit",
            )
            for one in shown
        ]
        return tables.Table(("layout (model, not measurement)", "ms", *terms, "MiB", ""), rows)


def plan(
    model: nn.Module,
    example: torch.Tensor,
    batch_size: int,
    cluster: Cluster,
    *,
    blocks: Sequence[nn.Module],
    splits: int = 1,
    micro_batches: int = 8,
) -> Plan:
    """All layouts of the cluster's devices for a training step on `batch_size` samples.

    Raises ValueError if no layout is possible at all.
    """
    work = workload(model, example, blocks, splits)
    fit, too_large = layouts.ranked(work, batch_size, cluster, micro_batches)
    if not fit and not too_large:
        raise ValueError(
            f"no layout of {cluster.devices} devices divides batch_size={batch_size}, {len(blocks)} blocks "
            f"and splits={splits}"
        )
    return Plan(cluster, tuple(fit), tuple(too_large))
