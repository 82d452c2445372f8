"""Where to run: choosing devices, waiting for them, and describing the machine."""

import html
import importlib.util
import logging
import os
import platform
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from companion import stacks

# torch's benchmark and compiler import a module that warns wherever there is a CUDA toolkit but no GPU.
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)

KINDS = ("cpu", "cuda", "mps", "xla", "tpu")
# Google's PCI devices that are TPU chips; its network and storage cards have the same vendor.
# Source: jax._src.cloud_tpu_init and torch_xla._internal.tpu.
TPU_PCI_VENDOR = "0x1ae0"
TPU_PCI_DEVICES = {"0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076"}
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


def tpu_chips(sys_root: str = "/sys") -> int:
    """Number of TPU chips on the PCI bus, found without importing or starting any TPU runtime."""

    def is_tpu(device: Path) -> bool:
        vendor, model = ((device / name).read_text().strip() for name in ("vendor", "device"))
        return vendor == TPU_PCI_VENDOR and model in TPU_PCI_DEVICES

    return sum(map(is_tpu, Path(sys_root, "bus/pci/devices").glob("*")))


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def why_not(kind: str) -> str | None:
    """The reason why a kind of device, or "compile" (torch.compile on CPU), cannot be used here; None if it can."""
    if kind == "cuda" and not torch.cuda.is_available():
        return "no NVIDIA GPU or driver was found" if torch.version.cuda else f"torch {torch.__version__} is built without CUDA"
    if kind == "mps" and not torch.backends.mps.is_available():
        return "it needs macOS on Apple silicon"
    if kind == "xla" and not _installed("torch_xla"):
        if not stacks.current().has_torch_xla:
            return f"torch_xla's last release needs torch 2.9, not {torch.__version__}; torch_tpu takes its place"
        return "torch_xla is not installed; it needs Linux x86-64: pip install 'accelerating-pytorch[xla]'"
    if kind == "xla" and os.environ.get("PJRT_DEVICE") == "TPU" and not tpu_chips():
        return "PJRT_DEVICE=TPU is set, but there is no TPU chip and torch_xla would wait for one for ever"
    if kind == "xla" and not torch.__version__.startswith(f"{(needs := '.'.join(version('torch_xla').split('.')[:2]))}."):
        return f"the installed torch_xla needs torch {needs}, not {torch.__version__}: pip install 'accelerating-pytorch[xla]'"
    if kind == "tpu" and not tpu_chips():
        return "no TPU chip was found on the PCI bus"
    if kind == "tpu" and not (_installed("torch_tpu") or _installed("torch_xla")):
        return "there is a TPU chip, but neither torch_tpu nor torch_xla is installed"
    if kind == "compile" and not any(shutil.which(name) for name in (os.environ.get("CXX"), "g++", "clang++") if name):
        return "needs a C++ compiler (g++ or clang++)"
    if kind == "compile" and not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "needs Python's C headers (python3-dev)"
    if kind == "compile" and " " in torch.__file__ + tempfile.gettempdir():
        return "needs torch and the temporary folder in paths without a space"  # the compiler's command line is not quoted
    return None


def available() -> list[str]:
    """Kinds of device that `select` accepts here."""
    return [kind for kind in KINDS if why_not(kind) is None]


def select(name: str = "auto") -> torch.device:
    """The device called `name`: "auto", "cpu", "cuda", "mps", "xla" or "tpu", with an index where there are several ("cuda:1").

    "auto" takes the first that is here of tpu, cuda, mps and cpu. "xla" is torch_xla's device: a TPU, or the CPU through
    XLA's compiler; ask for it before the process's first backward pass, where autograd counts its devices. torch_xla and
    torch_tpu are imported only if "xla" or "tpu" is asked for or "auto" finds a TPU.

    Raises ValueError, naming what is available, when the name is unknown or the device is not here.
    """
    kind, _, index = str(name).strip().partition(":")
    if kind == "auto" and not index:
        kind = next(kind for kind in ("tpu", "cuda", "mps", "cpu") if why_not(kind) is None)
    if kind not in KINDS or (index and not index.isdecimal()):
        raise ValueError(f"unknown device {name!r}; use one of auto, {', '.join(KINDS)}, or one with an index such as cuda:1")
    if reason := why_not(kind):
        raise ValueError(f"device {name!r} is not available: {reason}; available here: {', '.join(available())}")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r} is not available: there are {torch.cuda.device_count()} GPUs, counted from cuda:0")
    if kind == "tpu" and _installed("torch_tpu"):
        import torch_tpu  # noqa: F401  (registers the device)

        return torch.device("tpu", int(index or 0))
    if kind in ("xla", "tpu"):
        os.environ.setdefault("PJRT_DEVICE", "TPU" if tpu_chips() else "CPU")
        import torch_xla

        return torch_xla.device(int(index)) if index else torch_xla.device()
    return torch.device(kind, int(index)) if index else torch.device(kind)


def select_list(names: str | Iterable[str] = "auto", count: int | None = None) -> list[torch.device]:
    """Several devices, from "cuda:0, cuda:1" or a list of names; one device may stand in it more than once.

    With `count`, a single name stands for that many devices: the GPUs in turn for "auto" and "cuda", else one repeated.
    Raises ValueError as `select` does, and when `count` contradicts the names.
    """
    names = names.split(",") if isinstance(names, str) else list(names)
    if count is not None and len(names) == 1:
        device = select(names[0])
        if device.type == "cuda" and device.index is None:
            return [torch.device("cuda", i % torch.cuda.device_count()) for i in range(count)]
        return [device] * count
    if not names or (count is not None and len(names) != count):
        raise ValueError(f"{len(names)} devices named where {count or 'at least one'} are needed: {names}")
    return [select(name) for name in names]


def synchronize(device: torch.device) -> None:
    """Waits until `device` has finished all work queued on it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "xla":
        import torch_xla

        torch_xla.sync(wait=True)
    elif device.type != "cpu":
        torch.accelerator.synchronize(device)


def end_step(device: torch.device) -> None:
    """Marks the end of a training step: XLA compiles and starts what was recorded; others need nothing."""
    if device.type == "xla":
        import torch_xla

        torch_xla.sync()


def _cgroup_limits(root: str = "/") -> tuple[float, float]:
    """CPU and memory (bytes) limits that a container or control group sets on this process; infinite if none."""

    def number(path: Path) -> float:
        text = path.read_text().split()[0] if path.is_file() else "max"
        return float("inf") if text in ("max", "-1") else float(text)

    cpus = memory = float("inf")
    lines = Path(root, "proc/self/cgroup")
    groups = [line.split(":", 2) for line in lines.read_text().splitlines()] if lines.is_file() else []
    for _, controllers, path in groups:
        base = Path(root, "sys/fs/cgroup")
        inner = (base / controllers if controllers else base) / path.strip("/")
        for folder in (inner, *inner.parents):
            if not folder.is_relative_to(base):
                break
            if (folder / "cpu.max").is_file():
                cpus = min(cpus, number(folder / "cpu.max") / float((folder / "cpu.max").read_text().split()[1]))
            if (folder / "cpu.cfs_quota_us").is_file():
                cpus = min(cpus, number(folder / "cpu.cfs_quota_us") / number(folder / "cpu.cfs_period_us"))
            memory = min(memory, number(folder / "memory.max"), number(folder / "memory.limit_in_bytes"))
    return cpus, memory


def usable_cores(root: str = "/") -> int:
    """Cores this process may use: of the machine's, those that its affinity and its container's quota allow."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min(affinity, _cgroup_limits(root)[0])))


def usable_memory_bytes(root: str = "/") -> int:
    """Main memory this process may use: the machine's, or less if its container says so; 0 where it cannot be told."""
    names = getattr(os, "sysconf_names", {})
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if "SC_PHYS_PAGES" in names else 0
    return int(min(physical, _cgroup_limits(root)[1]))


def set_threads(threads: int | None = None) -> int:
    """Sets how many threads an operator uses, and returns it. None: as many as now, but no more than `usable_cores`."""
    cores = usable_cores()
    threads = min(torch.get_num_threads(), cores) if threads is None else threads
    if not 1 <= threads <= cores:
        raise ValueError(f"threads={threads} is not between 1 and the {cores} usable cores")
    torch.set_num_threads(threads)
    return threads


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

    def rows(self) -> list[tuple[str, str]]:
        fields = {**self.__dict__, "versions": ", ".join(f"{name} {number}" for name, number in self.versions.items())}
        return [(name.replace("_", " "), str(value)) for name, value in fields.items()]

    def __str__(self) -> str:
        return "\n".join(f"{name:17}{value}" for name, value in self.rows())

    def _repr_html_(self) -> str:
        cells = "".join(
            f"<tr><th style='text-align:left'>{n}</th><td style='text-align:left'>{html.escape(v)}</td></tr>"
            for n, v in self.rows()
        )
        return f"<table>{cells}</table>"


def describe() -> Machine:
    """The machine as this process sees it: processor, usable cores and memory, accelerators, versions."""
    info = Path("/proc/cpuinfo")
    fields = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line) if info.is_file() else {}
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)]
    gpu_names = [f"{gpu.name} ({gpu.total_memory / 2**30:.0f} GiB, capability {gpu.major}.{gpu.minor})" for gpu in gpus]
    versions = {"python": platform.python_version()}
    for package in ("torch", "torchvision", "torch_xla", "torch_tpu"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return Machine(
        cpu=fields.get("model name") or platform.processor() or platform.machine(),
        instruction_sets=", ".join(name for flag, name in INSTRUCTION_SETS.items() if flag in flags) or "unknown",
        cores=usable_cores(),
        threads=torch.get_num_threads(),
        memory=f"{usable_memory_bytes() / 2**30:.1f} GiB",
        gpus=", ".join(gpu_names) or ("Apple GPU" if why_not("mps") is None else f"none: {why_not('cuda')}"),
        tpu=f"{tpu_chips()} chips" if tpu_chips() else f"none: {why_not('tpu')}",
        system=f"{platform.system()} on {platform.machine()}" + (", Colab" if "COLAB_RELEASE_TAG" in os.environ else ""),
        versions=versions | ({} if sys.platform == "linux" else {"macos": platform.mac_ver()[0]}),
    )
