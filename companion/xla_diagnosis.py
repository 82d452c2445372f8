"""What a TPU would wait for in a training step, with the line of the code that causes it."""

import os
import re
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from companion import devices
from companion.xla_counts import Counts, counts

# Operators whose result has a size that depends on values; indexing with a mask is another.
_SIZED_BY_VALUES = ("aten.nonzero", "aten.masked_select", "aten._unique", "aten.unique", "aten.bincount")
_NO_SYNC = (
    "the step does not end with torch_xla.sync(): without one, in your loop too, all steps become one program"
)
_OF_VALUES = (
    "this line makes a tensor whose size depends on values, so the programs around it are new whenever the "
    "size is: use torch.where, or multiply by the mask"
)
_CHANGING = (
    "the shapes are not new, but the program is: a Python number or branch changes between steps; make it a "
    "tensor"
)


@dataclass(frozen=True)
class Finding:
    """Something that costs time on a TPU: its kind, what it is in plain words, where in the code, in how many
    steps, and how many programs were compiled for it.
    """

    kind: str  # "recompilation", "transfer", "fallback", "float64" or "no sync"
    text: str
    where: str
    steps: int
    programs: int = 0

    def __str__(self) -> str:
        head = f"{self.kind}, {_number(self.steps, 'step')}"
        head += f", {_number(self.programs, 'program')}" if self.programs else ""
        return f"{head}: {self.text}" + (f" [{self.where}]" if self.where else "")


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` saw: the number of steps, what XLA did in them, and what to change."""

    steps: int
    counts: Counts
    findings: tuple[Finding, ...]

    @property
    def expected(self) -> int:
        """Compilations that are no fault: those of the first and second step of each kind."""
        return self.counts.compilations - sum(finding.programs for finding in self.findings)

    def __str__(self) -> str:
        c = self.counts
        head = (
            f"{self.steps} steps: {c.compilations} compilations ({self.expected} of them in first and second "
            f"steps), {c.executions} programs run, {c.transfers} transfers"
        )
        return "\n".join([head, *(f"- {finding}" for finding in self.findings or ("nothing to change",))])


def diagnose(step: Callable, batches: Iterable) -> Diagnosis:
    """Runs the training step `step(*batch)` on each of `batches` on the XLA device, and tells what would be
    slow on a TPU.

    It reports recompilations with what caused them, values fetched from the device, operators that fall back
    to the CPU, float64, and a missing sync, with the line of code. Tensors of a batch are moved to the device
    first. The model must be there, and is trained by it. The first program of each kind of step, and a second
    one once the optimizer has its state, are no faults; with gradients accumulated over several batches there
    are several kinds, and it takes two rounds of them to see more.

    Raises ValueError where there is no XLA device or no batch, RuntimeError for an operator that XLA has not.
    """
    device = devices.select("xla")
    found: dict[tuple[str, str, str], set[int]] = {}
    programs: Counter[tuple[str, str, str]] = Counter()
    sizes_seen: list[tuple] = []
    times: Counter[tuple] = Counter()
    devices.synchronize(device)
    start, done, stepped = counts(), 0, True
    for done, batch in enumerate(batches, 1):
        batch = batch if isinstance(batch, (tuple, list)) else (batch,)
        shapes = tuple(
            (tuple(t.shape), str(t.dtype)) for t in tree_leaves(batch) if isinstance(t, torch.Tensor)
        )
        batch, before, stepped_before = devices.put(tuple(batch), device), counts(), stepped
        watch = _watched(step, batch, done)
        synced, stepped = counts().steps > before.steps, watch.stepped
        devices.synchronize(device)
        faults = list(watch.seen) if synced else [*watch.seen, ("no sync", _NO_SYNC, "")]
        compiled, kind = counts().compilations - before.compilations, (shapes, stepped, stepped_before)
        if compiled and sizes_seen and shapes not in sizes_seen:
            text = f"a batch of {_sizes(shapes)} after {_sizes(sizes_seen[0])}: give all batches one size"
            faults.append(("recompilation", text + " (drop_last=True)", ""))
            programs[faults[-1]] += compiled
        elif compiled and times[kind] > 1:
            faults.append(("recompilation", _OF_VALUES if watch.sized else _CHANGING, watch.sized))
            programs[faults[-1]] += compiled
        for fault in faults:
            found.setdefault(fault, set()).add(done)
        sizes_seen.append(shapes)
        times[kind] += 1
    if not done:
        raise ValueError(
            "there are no batches: give diagnose at least three, and the last of an epoch among them"
        )
    findings = [Finding(*key, len(steps), programs[key]) for key, steps in found.items()]
    return Diagnosis(done, counts() - start, tuple(findings))


def _watched(step: Callable, batch: tuple, number: int) -> "_Watch":
    """Runs a step; gives what was seen in it. Raises RuntimeError with the reason for what XLA cannot do."""
    try:
        with _Watch() as watch:
            step(*batch)
    except NotImplementedError as error:
        operator = re.search(r"aten::\w+", str(error))
        reason = f"{operator[0] if operator else error} does not exist on XLA"
        raise RuntimeError(
            f"step {number}: {reason} [{_line(error.__traceback__)}]: do that on the CPU, before"
        ) from error
    except RuntimeError as error:
        if "device_ready_queues_" not in str(error):
            raise
        first = "XLA was asked for after a backward pass on the CPU had counted the devices"
        raise RuntimeError(f"{first}: start again with devices.select('xla') before it") from error
    return watch


class _Watch(TorchDispatchMode):
    """Looks, after each operator, at what XLA's counters say it has caused."""

    def __init__(self):
        super().__init__()
        self.seen: list[tuple[str, str, str]] = []
        self.sized = ""  # the first line that makes a tensor whose size depends on values
        self.stepped = False  # whether an optimizer has made a step
        self.last = counts()

    def __enter__(self):
        self.hook = register_optimizer_step_post_hook(lambda *_: setattr(self, "stepped", True))
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self._printed()
        result = function(*args, **(kwargs or {}))
        change, name = counts() - self.last, str(function).removesuffix(".default")
        if not self.sized and _sized_by_values(name, args):
            self.sized = _line()
        for fallback in change.fallbacks:
            self._add(
                "fallback",
                f"{fallback} runs on the CPU: its input is fetched and its result sent back, in the midst "
                f"of the step",
            )
        if change.transfers and not change.fallbacks:
            what = "item(), float(), bool() or if" if "_local_scalar_dense" in name else "cpu() or numpy()"
            self._add(
                "transfer", f"{what} waits for the device; fetch values every 50 steps, or after the epoch"
            )
        if any(
            t.dtype == torch.float64 and t.device.type == "xla"
            for t in tree_leaves(result)
            if isinstance(t, torch.Tensor)
        ):
            self._add("float64", "TPUs have no float64 and emulate it, many times slower: use float32")
        self.last = counts()
        return result

    def __exit__(self, *error):
        super().__exit__(*error)
        self.hook.remove()
        self._printed()

    def _printed(self) -> None:
        """What happened between two operators: torch prints tensors behind the back of dispatch modes."""
        if (counts() - self.last).transfers:
            text = "a tensor was printed or formatted, which waits for the device; print after the epoch"
            self.seen.append(("transfer", text, f"before, {_line()}"))
            self.last = counts()

    def _add(self, kind: str, text: str) -> None:
        if kind != "float64" or (kind, text) not in [
            seen[:2] for seen in self.seen
        ]:  # of float64, where it begins
            self.seen.append((kind, text, _line()))


def _sized_by_values(operator: str, args: tuple) -> bool:
    """Whether the size of the operator's result depends on the values that it gets, as with a mask."""
    masked = operator.startswith("aten.index.") and any(
        isinstance(t, torch.Tensor) and t.dtype in (torch.bool, torch.uint8) for t in tree_leaves(args[1:2])
    )
    return masked or operator.startswith(_SIZED_BY_VALUES)


def _line(trace=None) -> str:
    """The user's line of code that is running now, or that raised: the innermost that is in no library."""
    frames = traceback.extract_tb(trace) if trace else traceback.extract_stack()
    ours = max(
        (i for i, frame in enumerate(frames) if frame.filename == __file__ and frame.name == "_watched"),
        default=-1,
    )
    libraries = (os.path.dirname(torch.__file__), os.path.join("site-packages", "torch"), __file__)
    users = [
        frame
        for frame in frames[ours + 1 :]
        if ours >= 0 and not any(part in frame.filename for part in libraries)
    ]
    return (
        f"in {users[-1].name}, line {users[-1].lineno}: {users[-1].line}" if users else "in the backward pass"
    )


def _number(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _sizes(shapes: tuple) -> str:
    return " and ".join(" x ".join(map(str, shape)) or "one number" for shape, _ in shapes)
