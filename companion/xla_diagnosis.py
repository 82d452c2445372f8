"""What a TPU would wait for in a training step, with the line of the code that causes it."""

import os
import re
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from companion import devices
from companion.xla_counts import Counts, counts


@dataclass(frozen=True)
class Finding:
    """Something that costs time on a TPU: its kind, what it is in plain words, where in the code, and in how
    many steps.
    """

    kind: str  # "recompilation", "transfer", "fallback", "float64" or "no sync"
    text: str
    where: str
    steps: int

    def __str__(self) -> str:
        return (
            f"{self.kind}, {self.steps} {'step' if self.steps == 1 else 'steps'}: {self.text}"
            + f" [{self.where}]" * bool(self.where)
        )


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` saw: the number of steps, what XLA did in them, and what to change."""

    steps: int
    counts: Counts
    findings: tuple[Finding, ...]

    def __str__(self) -> str:
        c = self.counts
        head = (
            f"{self.steps} steps: {c.compilations} compilations, {c.executions} programs run, "
            f"{c.transfers} transfers"
        )
        return "\n".join([head, *(f"- {finding}" for finding in self.findings or ("nothing to change",))])


def diagnose(step: Callable, batches: Iterable) -> Diagnosis:
    """Runs the training step `step(*batch)` on each of `batches` on the XLA device, and tells what would be
    slow on a TPU.

    It reports recompilations with the shapes that caused them, values fetched from the device, operators that
    fall back to the CPU, float64, and a missing sync, with the line of code. Tensors of a batch are moved to
    the device first. The model must be there, and is trained by it. The first program, and a second one once
    the optimizer has its state, are no faults.

    Raises ValueError where there is no XLA device or no batch, RuntimeError for an operator that XLA has not.
    """
    device = devices.select("xla")
    found: dict[tuple[str, str, str], set[int]] = {}
    shapes_seen: dict[tuple, int] = {}
    devices.synchronize(device)
    start, done = counts(), 0
    for done, batch in enumerate(batches, 1):
        batch = batch if isinstance(batch, (tuple, list)) else (batch,)
        shapes = tuple(
            (tuple(t.shape), str(t.dtype)) for t in tree_leaves(batch) if isinstance(t, torch.Tensor)
        )
        batch = devices.put(tuple(batch), device)
        before = counts()
        try:
            with _Watch() as watch:
                step(*batch)
        except NotImplementedError as error:
            operator = re.search(r"aten::\w+", str(error))
            reason = f"{operator[0] if operator else error} does not exist on XLA"
            raise RuntimeError(
                f"step {done}: {reason} [{_line(error.__traceback__)}]: do that on the CPU, before"
            ) from error
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
            text = (
                "the step does not end with torch_xla.sync(): without one, in your loop too, all steps "
                "become one program"
            )
            found.setdefault(("no sync", text, ""), set()).add(done)
        times, compiled = shapes_seen.get(shapes, 0), counts().compilations > before.compilations
        if compiled and times > 1:
            text = (
                "the shapes are not new, but the program is: a Python number or branch changes between "
                "steps; make it a tensor"
            )
            found.setdefault(("recompilation", text, ""), set()).add(done)
        if compiled and shapes_seen and not times:
            text = (
                f"a batch of {_sizes(shapes)} after {_sizes(next(iter(shapes_seen)))}: give all batches "
                f"one size"
            )
            found.setdefault(("recompilation", text + " (drop_last=True)", ""), set()).add(done)
        shapes_seen[shapes] = times + 1
    if not done:
        raise ValueError(
            "there are no batches: give diagnose at least three, and the last of an epoch among them"
        )
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


def _line(trace=None) -> str:
    """The user's line of code that is running now, or that raised: the innermost that is in no library."""
    frames = traceback.extract_tb(trace) if trace else traceback.extract_stack()
    ours = max(
        (i for i, frame in enumerate(frames) if frame.filename == __file__ and frame.name == "diagnose"),
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


def _sizes(shapes: tuple) -> str:
    return " and ".join(" x ".join(map(str, shape)) or "one number" for shape, _ in shapes)
