"""What a layout of a training over many devices costs in theory: seconds of a step, bytes of a device.

A layout shares the batch out (data), splits every layer (tensor), cuts the model into stages (pipeline), and
may keep only a share of optimizer state, gradients or parameters on each device of the data dimension
(sharding). Everything here is a model, not a measurement: terms are added, nothing overlaps, and all devices
are equally fast.
"""

import itertools
from dataclasses import dataclass
from math import prod

from companion.clusters import Cluster

SHARDINGS = ("none", "optimizer", "gradients", "parameters")  # ZeRO's stages 0 to 3; the last one is FSDP


@dataclass(frozen=True)
class Workload:
    """A model and how it is trained. Bytes and FLOPs of activations are those of one sample.

    `layers` are equal and can be cut between; `splits` is what tensor parallelism must divide, such as heads.
    `boundary_bytes` go from one layer to the next, `saved_bytes` are kept for backward by all layers
    together. `passes` is 3 (backward is twice forward), 4 where forward is computed again in backward. Where
    a layer is split, its forward needs `reduces` all-reduces of the boundary, a transformer's two.

    Tensor parallelism does not split everything: `whole_parameters`, `whole_flops` and `whole_saved_bytes`
    say how much of each every device of a layer has. `outside_parameters`, a part of the whole ones, are
    those before and those after the equal layers, which stay in the first and in the last stage.
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
    reduces: float = 2.0
    whole_parameters: float = 0.0
    whole_flops: float = 0.0
    whole_saved_bytes: float = 0.0
    outside_parameters: tuple[float, float] = (0.0, 0.0)

    def own_parameters(self, tensor: int, pipeline: int) -> float:
        """Parameters that a device works with, in the largest stage."""
        first, last = self.outside_parameters
        inside = self.whole_parameters - first - last
        split = (self.parameters - self.whole_parameters) / tensor
        return (split + inside) / pipeline + (max(first, last) if pipeline > 1 else first + last)

    def own_flops(self, tensor: int, pipeline: int) -> float:
        """FLOPs of a sample's forward pass on a device."""
        return ((self.forward_flops - self.whole_flops) / tensor + self.whole_flops) / pipeline

    def own_saved_bytes(self, tensor: int, pipeline: int) -> float:
        """Bytes of a sample's activations that a device keeps."""
        return ((self.saved_bytes - self.whole_saved_bytes) / tensor + self.whole_saved_bytes) / pipeline


def gpt(
    heads: int,
    hidden: int,
    layers: int,
    sequence: int = 2048,
    vocabulary: int = 51200,
    recompute: bool = True,
) -> Workload:
    """A GPT in mixed precision, trained by Adam; a sample is a sequence.

    With `recompute` a layer keeps its input alone and is computed again in backward. Sources: Narayanan et
    al. 2021, equations 2 and 3; without it, Korthikanti et al. 2022, equation 2.
    """
    h, s, v = hidden, sequence, vocabulary
    parameters = 12 * layers * h**2 * (1 + 13 / (12 * h) + (v + s) / (12 * layers * h))
    forward = 24 * s * layers * h**2 * (1 + s / (6 * h) + v / (16 * layers * h))
    boundary = 2 * s * h
    saved, whole, passes = boundary, boundary, 4
    if not recompute:
        saved, whole, passes = s * h * (34 + 5 * heads * s / h), 10 * s * h, 3
    return Workload(
        parameters,
        layers,
        heads,
        forward,
        boundary,
        layers * saved,
        weight_bytes=2,
        gradient_bytes=2,
        optimizer_bytes=12,
        passes=passes,
        whole_saved_bytes=layers * whole,
    )


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
    """Bytes of the fullest device: parameters, gradients, optimizer state and activations.

    Sources: Rajbhandari et al. 2020, "ZeRO", section 5; for the activations of 1F1B, where no more
    micro-batches are under way than there are stages, Narayanan et al. 2021, section 2.2.
    """
    mine = work.own_parameters(layout.tensor, layout.pipeline)
    stage = SHARDINGS.index(layout.sharding)
    shares = {
        "optimizer state": (work.optimizer_bytes, stage >= 1),
        "gradients": (work.gradient_bytes, stage >= 2),
        "parameters": (work.weight_bytes, stage >= 3),
    }
    found = {name: mine * size / (layout.data if shared else 1) for name, (size, shared) in shares.items()}
    part = batch_size / (layout.data * layout.micro_batches)
    under_way = min(layout.pipeline, layout.micro_batches) if layout.pipeline > 1 else 1
    found["activations"] = part * under_way * work.own_saved_bytes(layout.tensor, layout.pipeline)
    return found


def sent_bytes(layout: Layout, work: Workload, batch_size: int) -> dict[str, float]:
    """Bytes that a device sends in a step, the mean of all, by the dimension that they serve.

    A layer that is split needs as many all-reduces in backward as in forward, and once more as many where
    forward is computed again. Sharded parameters are gathered for forward and again for backward, and
    their gradients reduced and scattered; else gradients are all-reduced.
    """
    d, t, p = layout.data, layout.tensor, layout.pipeline
    boundary = batch_size / d * work.boundary_bytes
    mine = work.own_parameters(t, p)
    each = (work.weight_bytes, work.weight_bytes, work.gradient_bytes)
    sizes = each if layout.sharding == "parameters" else (work.gradient_bytes, work.gradient_bytes)
    return {
        "tensor": work.layers / p * work.reduces * (work.passes - 1) * 2 * (t - 1) / t * boundary,
        "pipeline": 2 * (p - 1) / p * boundary,
        "data": (d - 1) / d * mine * sum(sizes),
    }


def step_seconds(layout: Layout, work: Workload, batch_size: int, cluster: Cluster) -> dict[str, float]:
    """Seconds of a training step by term: compute, tensor, pipeline, bubble, data and update.

    Messages are those of `sent_bytes`. Ranks of the tensor dimension are neighbours, those of the data
    dimension come next, stages are furthest apart. In the bubble only some stages compute, and those that
    share cores with the others then do so faster. Sources: Shoeybi et al. 2019, "Megatron-LM", section 3;
    Narayanan et al. 2021, sections 2 and 3.
    """
    d, t, p, m = layout.data, layout.tensor, layout.pipeline, layout.micro_batches
    samples = batch_size / (d * m)  # of a micro-batch
    boundary = samples * work.boundary_bytes
    own_layers, fixed = work.layers / p, cluster.overheads
    compute = work.passes * work.own_flops(t, p) * samples / cluster.flops + own_layers * fixed.layer
    split = own_layers * work.reduces * (work.passes - 1) * cluster.link(t).reduce(boundary, t)
    split += own_layers * fixed.tensor if t > 1 else 0.0
    moved = 2 * cluster.link(d * t * p).send(boundary / t) + fixed.pipeline if p > 1 else 0.0
    weights = work.own_parameters(t, p)
    network = cluster.link(d * t)
    data = network.reduce(weights * work.gradient_bytes, d)
    if layout.sharding == "parameters" and d > 1:  # each layer gathered twice, its gradients scattered
        part = weights / own_layers
        twice, once = (
            network.gather(part * work.weight_bytes, d),
            network.scatter(part * work.gradient_bytes, d),
        )
        data = own_layers * (2 * twice + once + fixed.sharded)
    slots = sum(cluster.slot(d * t * stages) for stages in busy_stages(layout))
    updated = weights / (d if layout.sharding != "none" else 1)
    return {
        "compute": m * compute,
        "tensor": m * split,
        "pipeline": m * moved,
        "bubble": (compute + split + moved) * (slots - m),
        "data": data,
        "update": updated / cluster.updates,
    }


def busy_stages(layout: Layout) -> list[int]:
    """How many stages work in each slot of a pipeline of equal slots: it fills, and runs empty."""
    p, m = layout.pipeline, layout.micro_batches
    return [min(slot + 1, p, m, m + p - 1 - slot) for slot in range(m + p - 1)]


def estimate(layout: Layout, work: Workload, batch_size: int, cluster: Cluster) -> Estimate:
    """Time and memory of a layout. Raises ValueError for an impossible one, saying why."""
    if reason := why_not(layout, work, batch_size, cluster.devices):
        raise ValueError(reason)
    return Estimate(
        layout, step_seconds(layout, work, batch_size, cluster), held_bytes(layout, work, batch_size)
    )


def every(work: Workload, batch_size: int, devices: int, micro_batches: int = 8) -> list[Layout]:
    """All possible layouts of so many devices. Pipelines have `micro_batches`, or two, four, eight times more
    and so on.
    """
    sizes = [size for size in range(1, devices + 1) if devices % size == 0]
    found = set()
    for data, tensor in itertools.product(sizes, sizes):
        if devices % (data * tensor):
            continue
        pipeline = devices // (data * tensor)
        doubled = [micro_batches * 2**n for n in range(batch_size.bit_length())]
        counts = [1] if pipeline == 1 else [count for count in doubled if count * data <= batch_size]
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
