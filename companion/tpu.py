"""TPUs through torch_xla: where this is, what XLA did, what a step does wrong, one program on many devices.

torch_xla records operations and compiles them when asked to. It runs on TPUs, and on any CPU through XLA's
own compiler.
"""

import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from companion import devices, host, launch
from companion.xla_counts import Counts, counts, graph
from companion.xla_diagnosis import Diagnosis, Finding, diagnose

# The technique's own, from its helpers.
__all__ = ["Counts", "Diagnosis", "Finding", "counts", "diagnose", "graph"]

_BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "bf16": 2,
    "f16": 2,
    "f32": 4,
    "s32": 4,
    "u32": 4,
    "f64": 8,
    "s64": 8,
    "u64": 8,
}


@dataclass(frozen=True)
class Place:
    """Where a notebook runs: `name` in words, TPU `chips` on the bus, and `packages` that could use them,
    with versions.
    """

    name: str
    chips: int
    packages: dict[str, str]

    def __str__(self) -> str:
        packages = (
            ", ".join(f"{name} {number}" for name, number in self.packages.items())
            or "neither torch_xla nor torch_tpu"
        )
        return f"{self.name}: {self.chips} TPU chips, {packages}"


def where(sys_root: str = "/sys") -> Place:
    """Where this is, told from the hardware and the installed packages; nothing is imported or started, so
    nothing hangs.
    """
    chips, packages = host.tpu_chips(sys_root), {}
    for package in ("torch_xla", "torch_tpu"):
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            continue
    if "COLAB_RELEASE_TAG" in os.environ:
        name = "Colab's TPU runtime" if chips else "Colab without a TPU"
    else:
        name = "a TPU VM" if chips else "a machine without a TPU"
    return Place(name, chips, packages)


@dataclass(frozen=True)
class Collective:
    """A message between devices in a compiled program: its kind, the bytes of its result on each device, and
    of how many tensors.
    """

    kind: str
    nbytes: int
    tensors: int

    def sent_bytes(self, devices: int) -> float:
        """What each of `devices` sends in a ring. Source: Thakur, Rabenseifner and Gropp 2005."""
        share = (devices - 1) / devices
        times = {"all-reduce": 2 * share, "all-gather": share, "reduce-scatter": devices - 1}
        times |= {"all-to-all": share, "collective-permute": 1}
        return times[self.kind] * self.nbytes


def collectives(program: str) -> list[Collective]:
    """The collectives in the text of a compiled program (HLO), in order of appearance."""
    found = []
    for shapes, kind in re.findall(
        r"= (.+?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(", program
    ):
        sizes = re.findall(r"(\w+)\[([\d,]*)\]", shapes)
        total = sum(
            _BYTES[kind] * torch.Size(map(int, filter(None, dims.split(",")))).numel() for kind, dims in sizes
        )
        found.append(Collective(kind, total, len(sizes)))
    return found


def spmd(count: int, function: Callable, *args: object) -> tuple[object, list[list[Collective]]]:
    """Calls `function(*args)` in SPMD mode, where one program runs on all devices: a TPU's, or `count` made
    of this CPU.

    Without a TPU it runs in a child process, since flags must be set before torch_xla is imported, and also
    gives the collectives of each program that was compiled. On a TPU it runs here, which stays in SPMD mode,
    and gives none of them. Raises ValueError without torch_xla or for a count that is not from 1 to 64,
    WorkerError as `launch.run` does.
    """
    if reason := devices.why_not("xla"):
        raise ValueError(f"no XLA devices: {reason}")
    if host.tpu_chips():
        import torch_xla.runtime

        torch_xla.runtime.use_spmd()
        return function(*args), []
    if not 1 <= count <= 64:
        raise ValueError(
            f"count={count} is not from 1 to 64: each virtual device takes memory and a share of the cores"
        )
    return launch.run(_on_virtual_devices, 1, count, function, args, device="cpu", backend=None)[0]


def _on_virtual_devices(count: int, function: Callable, args: tuple) -> tuple[object, list[list[Collective]]]:
    with tempfile.TemporaryDirectory(prefix="xla-") as folder:
        os.environ |= {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": str(count), "TF_CPP_MIN_LOG_LEVEL": "2"}
        os.environ["XLA_FLAGS"] = (
            f"--xla_dump_to={folder} --xla_dump_hlo_as_text --xla_dump_hlo_module_re=SyncTensorsGraph"
        )
        import torch_xla.runtime

        torch_xla.runtime.use_spmd()
        value = function(*args)
        programs = sorted(Path(folder).glob("*after_optimizations.txt"))
        return value, [collectives(program.read_text()) for program in programs]


def check_shares(batch_size: int, count: int) -> None:
    """Raises ValueError if the shares of a batch on `count` devices would differ in size."""
    if batch_size % count:
        fits = [n for n in range(1, 2 * count) if batch_size % n == 0]
        raise ValueError(
            f"{count} devices do not divide batch_size={batch_size}; use {', '.join(map(str, fits))} of them"
        )
