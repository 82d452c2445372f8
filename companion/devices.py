"""Where to run: choosing devices by name, saying why one is not here, and waiting for them."""

import importlib.util
import logging
import os
import shutil
import sysconfig
import tempfile
import warnings
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path

import torch
from torch.utils._pytree import tree_leaves, tree_map

from companion import host, stacks

# torch's benchmark and compiler import a module that warns wherever there is a CUDA toolkit but no GPU.
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)

KINDS = ("cpu", "cuda", "mps", "xla", "tpu")
_GIVEN_THREADS = torch.get_num_threads()  # when this process began: OMP_NUM_THREADS, or torch's own number


def why_not(kind: str) -> str | None:
    """The reason why a kind of device, or "compile" (torch.compile on CPU), cannot be used here; None if it
    can.
    """
    return REASONS[kind]() if kind in REASONS else None


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _no_cuda() -> str | None:
    if torch.cuda.is_available():
        return None
    return (
        "no NVIDIA GPU or driver was found"
        if torch.version.cuda
        else f"torch {torch.__version__} is built without CUDA"
    )


def _no_mps() -> str | None:
    return None if torch.backends.mps.is_available() else "it needs macOS on Apple silicon"


def _no_xla() -> str | None:
    if not _installed("torch_xla"):
        if stacks.current().has_torch_xla:
            return (
                "torch_xla is not installed; it needs Linux x86-64: pip install 'accelerating-pytorch[xla]'"
            )
        return f"torch_xla's last release needs torch 2.9, not {torch.__version__}; torch_tpu takes its place"
    if os.environ.get("PJRT_DEVICE") == "TPU" and not host.tpu_chips():
        return "PJRT_DEVICE=TPU is set, but there is no TPU chip and torch_xla would wait for one for ever"
    needed = ".".join(version("torch_xla").split(".")[:2])
    if not torch.__version__.startswith(f"{needed}."):
        return (
            f"the installed torch_xla needs torch {needed}, not {torch.__version__}: pip install "
            f"'accelerating-pytorch[xla]'"
        )
    return None


def _no_tpu() -> str | None:
    if not host.tpu_chips():
        return "no TPU chip was found on the PCI bus"
    if not (_installed("torch_tpu") or _installed("torch_xla")):
        return "there is a TPU chip, but neither torch_tpu nor torch_xla is installed"
    return None


def _no_compiler() -> str | None:
    if not any(shutil.which(name) for name in (os.environ.get("CXX"), "g++", "clang++") if name):
        return "needs a C++ compiler (g++ or clang++)"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "needs Python's C headers (python3-dev)"
    if " " in torch.__file__ + tempfile.gettempdir():  # the compiler's command line is not quoted
        return "needs torch and the temporary folder in paths without a space"
    return None


REASONS: dict[str, Callable[[], str | None]] = {
    "cuda": _no_cuda,
    "mps": _no_mps,
    "xla": _no_xla,
    "tpu": _no_tpu,
    "compile": _no_compiler,
}


def available() -> list[str]:
    """Kinds of device that `select` accepts here."""
    return [kind for kind in KINDS if why_not(kind) is None]


def select(name: str = "auto") -> torch.device:
    """The device called `name`: "auto", "cpu", "cuda", "mps", "xla" or "tpu", with an index where there are
    several ("cuda:1").

    "auto" takes the first that is here of tpu, cuda, mps and cpu. "xla" is torch_xla's device: a TPU, or the
    CPU through XLA's compiler; ask for it before the process's first backward pass, where autograd counts its
    devices. torch_xla and torch_tpu are imported only if "xla" or "tpu" is asked for or "auto" finds a TPU.

    Raises ValueError, naming what is available, when the name is unknown or the device is not here.
    """
    kind, _, index = str(name).strip().partition(":")
    if kind == "auto" and not index:
        kind = next(kind for kind in ("tpu", "cuda", "mps", "cpu") if why_not(kind) is None)
    if kind not in KINDS or (index and not index.isdecimal()):
        raise ValueError(
            f"unknown device {name!r}; use one of auto, {', '.join(KINDS)}, or one with an index such as "
            f"cuda:1"
        )
    if reason := why_not(kind):
        raise ValueError(
            f"device {name!r} is not available: {reason}; available here: {', '.join(available())}"
        )
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {name!r} is not available: there are {torch.cuda.device_count()} GPUs, counted from "
            f"cuda:0"
        )
    if kind == "tpu" and _installed("torch_tpu"):
        import torch_tpu  # noqa: F401  (registers the device)

        return torch.device("tpu", int(index or 0))
    if kind in ("xla", "tpu"):
        os.environ.setdefault("PJRT_DEVICE", "TPU" if host.tpu_chips() else "CPU")
        import torch_xla

        return torch_xla.device(int(index)) if index else torch_xla.device()
    return torch.device(kind, int(index)) if index else torch.device(kind)


def select_list(names: str | Iterable[str] = "auto", count: int | None = None) -> list[torch.device]:
    """Several devices, from "cuda:0, cuda:1" or a list of names; one device may stand in it more than once.

    With `count`, a single name stands for that many devices: the GPUs in turn for "auto" and "cuda", else one
    repeated. Raises ValueError as `select` does, and when `count` contradicts the names.
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


def put(batch: object, device: torch.device) -> object:
    """The batch with its tensors on a device, however they are nested in tuples, lists and dictionaries."""
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf, batch)


def samples(batch: object) -> int:
    """How many samples a nested batch has: the length of its first tensor that has one.

    Raises TypeError if there is none.
    """
    for leaf in tree_leaves(batch):
        if isinstance(leaf, torch.Tensor) and leaf.dim():
            return len(leaf)
    raise TypeError(f"a batch of {type(batch).__name__} holds no tensor [N, ...]: how many samples has it?")


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


def set_threads(threads: int | None = None) -> int:
    """Sets how many threads an operator uses, and returns it.

    None: as many as now, but no more than `host.usable_cores`.
    """
    cores = host.usable_cores()
    threads = min(torch.get_num_threads(), cores) if threads is None else threads
    if not 1 <= threads <= cores:
        raise ValueError(f"threads={threads} is not between 1 and the {cores} usable cores")
    torch.set_num_threads(threads)
    return threads


def most_threads() -> int:
    """As many threads as this process was given when it began, by OMP_NUM_THREADS or else by torch, but no
    more than `host.usable_cores`: what is right for work that is not timed, also where other notebooks run
    beside this one.
    """
    return min(_GIVEN_THREADS, host.usable_cores())


def set_exact(on: bool = True) -> None:
    """Lets GPUs compute with all 24 bits of float32, by the same kernels each time, so that results can be
    compared; with False as torch does from the start, whose convolutions keep 11 bits (TF32) and are faster.

    On other devices nothing changes. Ranks do as the process that starts them.
    """
    cudnn = torch.backends.cudnn
    cudnn.deterministic = on
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the older switch is old: torch.compile still asks for it
        cudnn.allow_tf32 = not on
    for kind in (cudnn.conv, cudnn.rnn):
        kind.fp32_precision = "ieee" if on else "tf32"


def is_exact() -> bool:
    """Whether `set_exact` holds; a GPU's kernels alone may have been made deterministic by others too."""
    return torch.backends.cudnn.deterministic and torch.backends.cudnn.conv.fp32_precision == "ieee"
