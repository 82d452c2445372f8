"""Machines as layouts see them: what a device computes, keeps and sends; some published ones."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf


@dataclass(frozen=True)
class Link:
    """A connection of a device: seconds before anything arrives, and bytes a second after that.

    `kinds` are those of "reduce", "gather" and "scatter" where a backend differs from what the ring says.
    """

    latency_seconds: float
    bytes_per_second: float
    kinds: Mapping[str, "Link"] = field(default_factory=dict)

    def send(self, size: float) -> float:
        """Seconds for so many bytes to one other device."""
        return self.latency_seconds + size / self.bytes_per_second

    def gather(self, size: float, ranks: int) -> float:
        """Seconds of a ring all-gather that leaves `size` bytes on each rank.

        Each rank sends (n - 1) / n of the bytes in n - 1 steps. Source: Thakur et al. 2005, "Optimization of
        Collective Communication Operations in MPICH", section 4.1.
        """
        return self.kinds.get("gather", self)._ring(size, ranks)

    def scatter(self, size: float, ranks: int) -> float:
        """Seconds of a ring reduce-scatter of `size` bytes on each rank."""
        return self.kinds.get("scatter", self)._ring(size, ranks)

    def reduce(self, size: float, ranks: int) -> float:
        """Seconds of a ring all-reduce of `size` bytes: a reduce-scatter and an all-gather."""
        return 2 * self.kinds.get("reduce", self)._ring(size, ranks)

    def _ring(self, size: float, ranks: int) -> float:
        if ranks == 1:
            return 0.0
        return (ranks - 1) * self.latency_seconds + (ranks - 1) / ranks * size / self.bytes_per_second


@dataclass(frozen=True)
class Overheads:
    """Seconds that do not depend on sizes, all ranks at once: of a `layer` in forward and backward, of one
    that is split (`tensor`), of one whose parameters are gathered (`sharded`), and of a micro-batch in a
    stage (`pipeline`).
    """

    layer: float = 0.0
    tensor: float = 0.0
    sharded: float = 0.0
    pipeline: float = 0.0


@dataclass(frozen=True)
class Cluster:
    """Devices in nodes. `flops` are what a device reaches in practice, a second; `inside` links devices of a
    node, `between` is a device's share of what links nodes. `source` says where the figures are from.

    `updates` are the parameters that a device's optimizer updates in a second. `at_once` is how many devices
    can compute at full speed at the same time, for ranks that share cores; `flops` are a device's while all
    compute.
    """

    devices: int
    per_node: int
    flops: float
    memory_bytes: float
    inside: Link
    between: Link
    source: str
    updates: float = inf
    at_once: float = inf
    overheads: Overheads = Overheads()

    def slot(self, busy: int) -> float:
        """How long work takes while so many devices compute, as a share of what it takes while all do."""
        return max(1.0, busy / self.at_once) / max(1.0, self.devices / self.at_once)

    def link(self, reach: int) -> Link:
        """The slowest link of a group of ranks that lies within `reach` neighbouring devices."""
        return self.inside if reach <= self.per_node else self.between


EFFICIENCY = 0.5  # of the peak, assumed; fitted to Megatron-LM's table 1 it is 0.54 of an A100's
UPDATE_BYTES = 28  # of a parameter, by Adam in mixed precision: 2 + 12 are read, 12 + 2 written
NVLINK, INFINIBAND, ICI, DATA_CENTER = 5e-6, 10e-6, 2e-6, 50e-6  # assumed seconds of latency


def _hopper(devices: int, memory_bytes: float, memory_rate: float, source: str) -> Cluster:
    """Nodes of eight: 989 TFLOP/s in bfloat16, 900 GB/s of NVLink both ways together, 400 Gb/s a GPU."""
    inside, between = Link(NVLINK, 450e9), Link(INFINIBAND, 50e9)
    updates = memory_rate / UPDATE_BYTES
    return Cluster(devices, 8, EFFICIENCY * 989e12, memory_bytes, inside, between, source, updates)


def h100(devices: int) -> Cluster:
    return _hopper(devices, 80e9, 3.35e12, "NVIDIA DGX H100 data sheet")


def h200(devices: int) -> Cluster:
    return _hopper(devices, 141e9, 4.8e12, "NVIDIA DGX H200 data sheet")


def tpu_v5p(devices: int) -> Cluster:
    """Pods of 8,960 chips in a torus of three axes, of which a ring uses one: a third of 1,200 GB/s, half of
    it in each direction. Between pods 50 Gb/s a chip.
    """
    inside, between = Link(ICI, 200e9), Link(DATA_CENTER, 6.25e9)
    source, updates = "Google Cloud documentation, TPU v5p", 2.765e12 / UPDATE_BYTES
    return Cluster(devices, 8960, EFFICIENCY * 459e12, 95 * 2**30, inside, between, source, updates)


PUBLISHED = {"H100": h100, "H200": h200, "TPU v5p": tpu_v5p}
