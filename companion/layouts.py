"""What a layout of a training over many devices costs in theory: seconds of a step, bytes of a device.

A layout shares the batch out (data), splits every layer (tensor), cuts the model into stages (pipeline), and
may keep only a share of optimizer state, gradients or parameters on each device of the data dimension
(sharding). Everything here is a model, not a measurement: terms are added, nothing overlaps, and all devices
are equally fast.
"""

import itertools
from dataclasses import dataclass
from math import prod

SHARDINGS = ("none", "optimizer", "gradients", "parameters")  # ZeRO's stages 0 to 3; the last one is FSDP


@dataclass(frozen=True)
class Link:
    """A connection of a device: seconds before anything arrives, and bytes a second after that."""

    latency_seconds: float
    bytes_per_second: float

    def send(self, size: float) -> float:
        """Seconds for so many bytes to one other device."""
        return self.latency_seconds + size / self.bytes_per_second

    def gather(self, size: float, ranks: int) -> float:
        """Seconds of a ring all-gather that leaves `size` bytes on each rank; a reduce-scatter takes as long.

        Each rank sends (n - 1) / n of the bytes in n - 1 steps. Source: Thakur et al. 2005, "Optimization of
        Collective Communication Operations in MPICH", section 4.1.
        """
        if ranks == 1:
            return 0.0
        return (ranks - 1) * self.latency_seconds + (ranks - 1) / ranks * size / self.bytes_per_second

    def reduce(self, size: float, ranks: int) -> float:
        """Seconds of a ring all-reduce of `size` bytes: a reduce-scatter and an all-gather."""
        return 2 * self.gather(size, ranks)


@dataclass(frozen=True)
class Cluster:
    """Devices in nodes. `flops` are what a device reaches in practice, a second; `inside` links devices of a
    node, `between` is a device's share of what links nodes. `source` says where the figures are from.
    """

    devices: int
    per_node: int
    flops: float
    memory_bytes: float
    inside: Link
    between: Link
    source: str

    def link(self, reach: int) -> Link:
        """The slowest link of a group of ranks that lies within `reach` neighbouring devices."""
        return self.inside if reach <= self.per_node else self.between


@dataclass(frozen=True)
class Workload:
    """A model and how it is trained. Bytes and FLOPs of activations are those of one sample.

    `layers` are equal and can be cut between; `splits` is what tensor parallelism must divide, such as heads.
    `boundary_bytes` go from one layer to the next, `saved_bytes` are kept for backward by all layers
    together. `passes` is 3 (backward is twice forward), 4 where forward is computed again in backward.
    """

    parameters: float
    layers: int
    splits: int
    forward_flops: float
    boundary_bytes: float
    saved_bytes: float
    weight_bytes: int = 4
    gradient_bytes: int = 4
    optimizer_bytes: int = 8
    passes: int = 3


@dataclass(frozen=True, order=True)
class Layout:
    """How many devices share out what; their product is the number of devices."""

    data: int = 1
    tensor: int = 1
    pipeline: int = 1
    sharding: str = "none"
    micro_batches: int = 1

    @property
    def devices(self) -> int:
        return prod((self.data, self.tensor, self.pipeline))

    def __str__(self) -> str:
        parts = {"data": self.data, "tensor": self.tensor, "pipeline": self.pipeline}
        named = [f"{name} {size}" for name, size in parts.items() if size > 1] or ["one device"]
        if self.pipeline > 1:
            named.append(f"{self.micro_batches} micro-batches")
        return ", ".join(named) + ("" if self.sharding == "none" else f", {self.sharding} sharded")


@dataclass(frozen=True)
class Estimate:
    """What a layout costs: seconds of a step by term, and bytes of each device by what they hold."""

    layout: Layout
    seconds: dict[str, float]
    bytes: dict[str, float]

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def total_bytes(self) -> float:
        return sum(self.bytes.values())


def why_not(layout: Layout, work: Workload, batch_size: int, devices: int) -> str | None:
    """The reason why a layout is impossible, whatever it costs; None if it is not."""
    if layout.sharding not in SHARDINGS:
        return f"sharding={layout.sharding!r} is unknown; use one of {', '.join(SHARDINGS)}"
    if layout.devices != devices:
        return f"{layout} needs {layout.devices} devices, not {devices}"
    if work.splits % layout.tensor:
        return f"tensor={layout.tensor} does not divide the {work.splits} heads or features"
    if work.layers % layout.pipeline:
        return f"pipeline={layout.pipeline} does not divide the {work.layers} layers"
    if batch_size % (layout.data * layout.micro_batches):
        return f"batch_size={batch_size} does not divide into {layout.data} x {layout.micro_batches} parts"
    if layout.pipeline > 1 and layout.sharding in ("gradients", "parameters"):
        return f"{layout.sharding} sharded in a pipeline would be gathered again for every micro-batch"
    return None


def held_bytes(layout: Layout, work: Workload, batch_size: int) -> dict[str, float]:
    """Bytes of each device: parameters, gradients, optimizer state and activations.

    Sources: Rajbhandari et al. 2020, "ZeRO", section 5; for the activations of 1F1B, where no more
    micro-batches are under way than there are stages, Narayanan et al. 2021, section 2.2.
    """
    mine = work.parameters / (layout.tensor * layout.pipeline)
    stage = SHARDINGS.index(layout.sharding)
    shares = {
        "optimizer state": (work.optimizer_bytes, stage >= 1),
        "gradients": (work.gradient_bytes, stage >= 2),
        "parameters": (work.weight_bytes, stage >= 3),
    }
    found = {name: mine * size / (layout.data if shared else 1) for name, (size, shared) in shares.items()}
    part = batch_size / (layout.data * layout.micro_batches)
    under_way = min(layout.pipeline, layout.micro_batches) if layout.pipeline > 1 else 1
    found["activations"] = part * under_way * work.saved_bytes / (layout.tensor * layout.pipeline)
    return found


def step_seconds(layout: Layout, work: Workload, batch_size: int, cluster: Cluster) -> dict[str, float]:
    """Seconds of a training step by term: compute, tensor, pipeline, bubble and data.

    A layer that is split needs two all-reduces of its boundary in forward, as many in backward, and two more
    where forward is computed again. Ranks of the tensor dimension are neighbours, those of the data dimension
    come next, stages are furthest apart. Sources: Shoeybi et al. 2019, "Megatron-LM", section 3; Narayanan et
    al. 2021, sections 2 and 3.
    """
    d, t, p, m = layout.data, layout.tensor, layout.pipeline, layout.micro_batches
    samples = batch_size / (d * m)  # of a micro-batch
    boundary = samples * work.boundary_bytes
    compute = work.passes * work.forward_flops * samples / (t * p) / cluster.flops
    split = work.layers / p * 2 * (work.passes - 1) * cluster.link(t).reduce(boundary, t)
    moved = 2 * cluster.link(d * t * p).send(boundary / t) if p > 1 else 0.0
    once = compute + split + moved
    weights = work.parameters / (t * p)
    network = cluster.link(d * t)
    data = network.reduce(weights * work.gradient_bytes, d)
    if layout.sharding == "parameters":  # gathered for forward and again for backward, gradients scattered
        sizes = (work.weight_bytes, work.weight_bytes, work.gradient_bytes)
        data = sum(network.gather(weights * size, d) for size in sizes)
    bubble = once * (p - 1)
    return {
        "compute": m * compute,
        "tensor": m * split,
        "pipeline": m * moved,
        "bubble": bubble,
        "data": data,
    }


def estimate(layout: Layout, work: Workload, batch_size: int, cluster: Cluster) -> Estimate:
    """Time and memory of a layout. Raises ValueError for an impossible one, saying why."""
    if reason := why_not(layout, work, batch_size, cluster.devices):
        raise ValueError(reason)
    return Estimate(
        layout, step_seconds(layout, work, batch_size, cluster), held_bytes(layout, work, batch_size)
    )


def every(work: Workload, batch_size: int, devices: int, micro_batches: int = 8) -> list[Layout]:
    """All possible layouts of so many devices. Pipelines have `micro_batches`, or as many times more as they
    have stages.
    """
    sizes = [size for size in range(1, devices + 1) if devices % size == 0]
    found = set()
    for data, tensor in itertools.product(sizes, sizes):
        if devices % (data * tensor):
            continue
        pipeline = devices // (data * tensor)
        counts = {1} if pipeline == 1 else {micro_batches, micro_batches * pipeline}
        shardings = SHARDINGS if data > 1 else SHARDINGS[:1]
        for sharding, many in itertools.product(shardings, counts):
            layout = Layout(data, tensor, pipeline, sharding, many)
            if why_not(layout, work, batch_size, devices) is None:
                found.add(layout)
    return sorted(found)


def ranked(
    work: Workload, batch_size: int, cluster: Cluster, micro_batches: int = 8
) -> tuple[list[Estimate], list[Estimate]]:
    """Estimates of all possible layouts, the fastest first: those that fit into the memory of a device, and
    those that do not. Of equally fast ones the smaller comes first.
    """
    layouts = every(work, batch_size, cluster.devices, micro_batches)
    found = [estimate(layout, work, batch_size, cluster) for layout in layouts]
    found.sort(key=lambda one: (one.step_seconds, one.total_bytes))
    fit = [one for one in found if one.total_bytes <= cluster.memory_bytes]
    return fit, [one for one in found if one.total_bytes > cluster.memory_bytes]
