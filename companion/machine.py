"""The machine as it decides how fast things run: for a notebook's table, and as the stamp of every stored
figure.
"""

import os
import platform
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from companion import devices, host, tables

# Instruction sets that decide how fast low-precision arithmetic is, as Linux names them.
INSTRUCTION_SETS = {
    "avx2": "AVX2",
    "avx512f": "AVX512",
    "avx_vnni": "AVX-VNNI",
    "avx512_vnni": "AVX512-VNNI",
    "avx512_bf16": "AVX512-BF16",
    "avx512_fp16": "AVX512-FP16",
    "amx_int8": "AMX-INT8",
    "amx_bf16": "AMX-BF16",
    "asimddp": "DOTPROD",
    "i8mm": "I8MM",
    "bf16": "BF16",
    "sve": "SVE",
}


@dataclass(frozen=True)
class Machine:
    """What decides how fast things run here. Shows as a table in a notebook, as text in a terminal."""

    cpu: str
    instruction_sets: str
    cores: int
    threads: int
    memory: str
    gpus: str
    tpu: str
    system: str
    versions: dict[str, str]

    def table(self) -> tables.Table:
        versions = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        fields = {**vars(self), "versions": versions}
        return tables.Table((), [(name.replace("_", " "), str(value)) for name, value in fields.items()])

    def folded(self) -> tables.Folded:
        """The same behind one line, for a reader who has seen the table before."""
        gpus = "no GPU" if self.gpus.startswith("none") else self.gpus
        line = f"{self.cpu}, {self.cores} cores, {self.memory}, {gpus}, torch {self.versions['torch']}"
        return tables.Folded(line, self.table())

    def __str__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def describe() -> Machine:
    """The machine as this process sees it: processor, usable cores and memory, accelerators, versions."""
    processor = _processor()
    flags = (processor.get("flags") or processor.get("Features") or "").split()
    chips = host.tpu_chips()
    return Machine(
        cpu=processor.get("model name") or platform.processor() or platform.machine(),
        instruction_sets=", ".join(name for flag, name in INSTRUCTION_SETS.items() if flag in flags)
        or "unknown",
        cores=host.usable_cores(),
        threads=torch.get_num_threads(),
        memory=f"{host.usable_memory_bytes() / 2**30:.1f} GiB",
        gpus=_gpus(),
        tpu=f"{chips} chips" if chips else f"none: {devices.why_not('tpu')}",
        system=f"{platform.system()} on {platform.machine()}"
        + (", Colab" if "COLAB_RELEASE_TAG" in os.environ else ""),
        versions=_versions(),
    )


def environment() -> dict[str, object]:
    """The stamp kept with every stored figure: processor, instruction sets, cores, threads, accelerators,
    versions.
    """
    return dict(vars(describe()))


def _processor() -> dict[str, str]:
    """What Linux says of the last of its cores; nothing elsewhere."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def _gpus() -> str:
    if reason := devices.why_not("cuda"):
        return "Apple GPU" if devices.why_not("mps") is None else f"none: {reason}"
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    names = [
        f"{gpu.name} ({gpu.total_memory / 2**30:.0f} GiB, capability {gpu.major}.{gpu.minor})"
        for gpu in found
    ]
    return ", ".join(names)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("torch", "torchvision", "torch_xla", "torch_tpu"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found if sys.platform == "linux" else found | {"macos": platform.mac_ver()[0]}
