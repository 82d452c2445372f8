"""TPUs through torch_xla: where this is, what XLA did, what a training step does wrong, one program on many devices.

torch_xla records operations and compiles them when asked to. It runs on TPUs, and on any CPU through XLA's own compiler.
"""

import os
import re
import tempfile
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from companion import devices, launch

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}


@dataclass(frozen=True)
class Place:
    """Where a notebook runs: `name` in words, TPU `chips` on the bus, and `packages` that could use them, with versions."""

    name: str
    chips: int
    packages: dict[str, str]

    def __str__(self) -> str:
        packages = ", ".join(f"{name} {number}" for name, number in self.packages.items()) or "neither torch_xla nor torch_tpu"
        return f"{self.name}: {self.chips} TPU chips, {packages}"


def where(sys_root: str = "/sys") -> Place:
    """Where this is, told from the hardware and the installed packages; nothing is imported or started, so nothing hangs."""
    chips, packages = devices.tpu_chips(sys_root), {}
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
class Counts:
    """What XLA did, by torch_xla's own counters."""

    compilations: int = 0
    compile_seconds: float = 0.0
    executions: int = 0
    transfers: int = 0  # from the device to main memory
    fallbacks: dict[str, int] = field(default_factory=dict)  # operators that ran on the CPU instead, and how often
    steps: int = 0  # times that what was recorded was told to run

    def __sub__(self, before: "Counts") -> "Counts":
        new = {name: number - before.fallbacks.get(name, 0) for name, number in self.fallbacks.items()}
        numbers = ("compilations", "compile_seconds", "executions", "transfers", "steps")
        return Counts(
            **{name: getattr(self, name) - getattr(before, name) for name in numbers},
            fallbacks={name: number for name, number in new.items() if number},
        )


def counts() -> Counts:
    """All that XLA did in this process until now; subtract an earlier one to see what happened between.

    Source: PyTorch/XLA documentation, "Troubleshooting", the metrics report.
    """
    from torch_xla.debug import metrics

    def total(name: str) -> tuple[int, float]:
        return (metrics.metric_data(name) or (0, 0.0))[:2]

    compilations, nanoseconds = total("CompileTime")
    on_cpu = [name for name in metrics.counter_names() if name.startswith("aten::") and name != "aten::_local_scalar_dense"]
    return Counts(
        compilations=compilations,
        compile_seconds=nanoseconds / 1e9,
        executions=total("ExecuteTime")[0] + total("ExecuteReplicatedTime")[0],
        transfers=total("TransferFromDeviceTime")[0],
        fallbacks={name: metrics.counter_value(name) for name in on_cpu},
        steps=metrics.counter_value("MarkStep") or 0,
    )


def graph(*tensors: torch.Tensor) -> list[str]:
    """The operations recorded for tensors on XLA and not yet run, one line each, in order."""
    import torch_xla

    lines = torch_xla._XLAC._get_xla_tensors_text(list(tensors)).splitlines()
    return [line.strip() for line in lines if " = " in line]


@dataclass(frozen=True)
class Finding:
    """Something that costs time on a TPU: its kind, what it is in plain words, where in the code, and in how many steps."""

    kind: str  # "recompilation", "transfer", "fallback", "float64" or "no sync"
    text: str
    where: str
    steps: int

    def __str__(self) -> str:
        return f"{self.kind}, {self.steps} {'step' if self.steps == 1 else 'steps'}: {self.text}" + f" [{self.where}]" * bool(
            self.where
        )


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` saw: the number of steps, what XLA did in them, and what to change."""

    steps: int
    counts: Counts
    findings: tuple[Finding, ...]

    def __str__(self) -> str:
        c = self.counts
        head = f"{self.steps} steps: {c.compilations} compilations, {c.executions} programs run, {c.transfers} transfers"
        return "\n".join([head, *(f"- {finding}" for finding in self.findings or ("nothing to change",))])


def diagnose(step: Callable, batches: Iterable) -> Diagnosis:
    """Runs the training step `step(*batch)` on each of `batches` on the XLA device, and tells what would be slow on a TPU.

    It reports recompilations with the shapes that caused them, values fetched from the device, operators that fall back to
    the CPU, float64, and a missing sync, with the line of code. Tensors of a batch are moved to the device first. The model
    must be there, and is trained by it. The first program, and a second one once the optimizer has its state, are no faults.

    Raises ValueError where there is no XLA device or no batch, RuntimeError for an operator that XLA has not.
    """
    device = devices.select("xla")
    found: dict[tuple[str, str, str], set[int]] = {}
    shapes_seen: dict[tuple, int] = {}
    devices.synchronize(device)
    start, done = counts(), 0
    for done, batch in enumerate(batches, 1):
        batch = batch if isinstance(batch, (tuple, list)) else (batch,)
        shapes = tuple((tuple(t.shape), str(t.dtype)) for t in tree_leaves(batch) if isinstance(t, torch.Tensor))
        batch = tuple(part.to(device) if isinstance(part, torch.Tensor) else part for part in batch)
        before = counts()
        try:
            with _Watch() as watch:
                step(*batch)
        except NotImplementedError as error:
            operator = re.search(r"aten::\w+", str(error))
            reason = f"{operator[0] if operator else error} does not exist on XLA"
            raise RuntimeError(f"step {done}: {reason} [{_line(error.__traceback__)}]: do that on the CPU, before") from error
        except RuntimeError as error:
            if "device_ready_queues_" not in str(error):
                raise
            first = "XLA was asked for after a backward pass on the CPU had counted the devices"
            raise RuntimeError(f"{first}: start again with devices.select('xla') before it") from error
        synced = counts().steps > before.steps
        devices.synchronize(device)
        for kind, text, place in watch.seen:
            found.setdefault((kind, text, place), set()).add(done)
        if not synced:
            text = "the step does not end with torch_xla.sync(): without one, in your loop too, all steps become one program"
            found.setdefault(("no sync", text, ""), set()).add(done)
        times, compiled = shapes_seen.get(shapes, 0), counts().compilations > before.compilations
        if compiled and times > 1:
            text = "the shapes are not new, but the program is: a Python number or branch changes between steps; make it a tensor"
            found.setdefault(("recompilation", text, ""), set()).add(done)
        if compiled and shapes_seen and not times:
            text = f"a batch of {_sizes(shapes)} after {_sizes(next(iter(shapes_seen)))}: give all batches one size"
            found.setdefault(("recompilation", text + " (drop_last=True)", ""), set()).add(done)
        shapes_seen[shapes] = times + 1
    if not done:
        raise ValueError("there are no batches: give diagnose at least three, and the last of an epoch among them")
    findings = [Finding(*key, len(steps)) for key, steps in found.items()]
    return Diagnosis(done, counts() - start, tuple(findings))


class _Watch(TorchDispatchMode):
    """Looks, after each operator, at what XLA's counters say it has caused."""

    def __init__(self):
        super().__init__()
        self.seen: list[tuple[str, str, str]] = []
        self.last = counts()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self._printed()
        result = function(*args, **(kwargs or {}))
        change, name = counts() - self.last, str(function).removesuffix(".default")
        for fallback in change.fallbacks:
            self._add(
                "fallback", f"{fallback} runs on the CPU: its input is fetched and its result sent back, in the midst of the step"
            )
        if change.transfers and not change.fallbacks:
            what = "item(), float(), bool() or if" if "_local_scalar_dense" in name else "cpu() or numpy()"
            self._add("transfer", f"{what} waits for the device; fetch values every 50 steps, or after the epoch")
        if any(t.dtype == torch.float64 and t.device.type == "xla" for t in tree_leaves(result) if isinstance(t, torch.Tensor)):
            self._add("float64", "TPUs have no float64 and emulate it, many times slower: use float32")
        self.last = counts()
        return result

    def __exit__(self, *error):
        super().__exit__(*error)
        self._printed()

    def _printed(self) -> None:
        """What happened between two operators: torch prints tensors behind the back of dispatch modes."""
        if (counts() - self.last).transfers:
            text = "a tensor was printed or formatted, which waits for the device; print after the epoch"
            self.seen.append(("transfer", text, f"before, {_line()}"))
            self.last = counts()

    def _add(self, kind: str, text: str) -> None:
        if kind != "float64" or (kind, text) not in [seen[:2] for seen in self.seen]:  # of float64, where it begins
            self.seen.append((kind, text, _line()))


def _line(trace=None) -> str:
    """The user's line of code that is running now, or that raised: the innermost that is in no library."""
    frames = traceback.extract_tb(trace) if trace else traceback.extract_stack()
    ours = max((i for i, frame in enumerate(frames) if frame.filename == __file__ and frame.name == "diagnose"), default=-1)
    libraries = (os.path.dirname(torch.__file__), os.path.join("site-packages", "torch"), __file__)
    users = [frame for frame in frames[ours + 1 :] if ours >= 0 and not any(part in frame.filename for part in libraries)]
    return f"in {users[-1].name}, line {users[-1].lineno}: {users[-1].line}" if users else "in the backward pass"


def _sizes(shapes: tuple) -> str:
    return " and ".join(" x ".join(map(str, shape)) or "one number" for shape, _ in shapes)


@dataclass(frozen=True)
class Collective:
    """A message between devices in a compiled program: its kind, the bytes each device gives to it, and how many tensors."""

    kind: str
    nbytes: int
    tensors: int


def collectives(program: str) -> list[Collective]:
    """The collectives in the text of a compiled program (HLO), in order of appearance."""
    found = []
    for shapes, kind in re.findall(
        r"= (.+?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(", program
    ):
        sizes = re.findall(r"(\w+)\[([\d,]*)\]", shapes)
        total = sum(_BYTES[kind] * torch.Size(map(int, filter(None, dims.split(",")))).numel() for kind, dims in sizes)
        found.append(Collective(kind, total, len(sizes)))
    return found


def spmd(count: int, function: Callable, *args: object) -> tuple[object, list[list[Collective]]]:
    """Calls `function(*args)` in SPMD mode, where one program runs on all devices: a TPU's, or `count` made of this CPU.

    Without a TPU it runs in a child process, since flags must be set before torch_xla is imported, and also gives the
    collectives of each program that was compiled. On a TPU it runs here, which stays in SPMD mode, and gives none of them.
    Raises ValueError without torch_xla or for a count that is not from 1 to 64, WorkerError as `launch.run` does.
    """
    if reason := devices.why_not("xla"):
        raise ValueError(f"no XLA devices: {reason}")
    if devices.tpu_chips():
        import torch_xla.runtime

        torch_xla.runtime.use_spmd()
        return function(*args), []
    if not 1 <= count <= 64:
        raise ValueError(f"count={count} is not from 1 to 64: each virtual device takes memory and a share of the cores")
    return launch.run(_on_virtual_devices, 1, count, function, args, device="cpu", backend=None)[0]


def _on_virtual_devices(count: int, function: Callable, args: tuple) -> tuple[object, list[list[Collective]]]:
    with tempfile.TemporaryDirectory(prefix="xla-") as folder:
        os.environ |= {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": str(count), "TF_CPP_MIN_LOG_LEVEL": "2"}
        os.environ["XLA_FLAGS"] = f"--xla_dump_to={folder} --xla_dump_hlo_as_text --xla_dump_hlo_module_re=SyncTensorsGraph"
        import torch_xla.runtime

        torch_xla.runtime.use_spmd()
        value = function(*args)
        programs = sorted(Path(folder).glob("*after_optimizations.txt"))
        return value, [collectives(program.read_text()) for program in programs]


def check_shares(batch_size: int, count: int) -> None:
    """Raises ValueError if the shares of a batch on `count` devices would differ in size."""
    if batch_size % count:
        fits = [n for n in range(1, 2 * count) if batch_size % n == 0]
        raise ValueError(f"{count} devices do not divide batch_size={batch_size}; use {', '.join(map(str, fits))} of them")
