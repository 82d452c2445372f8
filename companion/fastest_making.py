"""Makes the variants of a search, as many at a time as there are cores and memory for: measuring needs a
quiet machine, making does not.
"""

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from companion import devices, fastest_rounds, host, launch, pruning_channels, scratch
from companion.launch import worker
from companion.variants import Variant

OURS = ("UnfitError", "QuantizationError", "ArtefactError")  # whose messages are meant for people


@dataclass(frozen=True)
class Made:
    """An artefact, the seconds that it took, and why there is none."""

    folder: Path
    seconds: float
    reason: str | None = None


@dataclass
class Workshop:
    """Where variants of one model are made. `run(function, count, *args)` calls it in so many processes;
    `threads` is what the artefacts are made for, `limit_bytes` what each process may take.
    """

    run: Callable[..., list]
    model: nn.Module
    inputs: torch.Tensor
    threads: int
    limit_bytes: int | None
    limit_seconds: float
    folder: Path = field(default_factory=scratch.folder)
    made: dict[str, Made] = field(default_factory=dict)

    @property
    def at_once(self) -> int:
        """How many at a time: one where they would share a GPU, on which some are chosen by measuring."""
        if not self.inputs.is_cpu:
            return 1
        limit = self.limit_bytes or host.usable_memory_bytes()
        return max(1, min(host.usable_cores(), host.usable_memory_bytes() // limit))

    def take(self, waiting: Mapping[str, Variant]) -> Made:
        """What was made of the first of those that wait. If it was not made yet, it is now, together with as
        many of the others as can be.
        """
        first = next(iter(waiting))
        if first not in self.made:
            together = [name for name in waiting if name not in self.made][: self.at_once]
            folders = [self.folder / f"{len(self.made) + i}" for i in range(len(together))]
            variants = [waiting[name] for name in together]
            self.made |= zip(together, self._make(variants, folders), strict=True)
        return self.made[first]

    def _make(self, tried: Sequence[Variant], folders: Sequence[Path]) -> list[Made]:
        """Each of them, made at the same time. Where one of several ends its process, or takes too long, each
        is made alone.
        """
        start = time.perf_counter()
        given = (tried, self.model, self.inputs, folders, self.threads, self.limit_bytes)
        try:
            return self.run(one_of, len(tried), *given)
        except launch.WorkerError as error:
            if len(tried) > 1:
                for folder in folders:
                    shutil.rmtree(folder, ignore_errors=True)  # whole, half or not there
                alone = zip(tried, folders, strict=True)
                return [self._make([one], [folder])[0] for one, folder in alone]
            return [Made(folders[0], time.perf_counter() - start, reason(error, self.limit_seconds))]


def one_of(tried, model, inputs, folders, threads, limit_bytes) -> Made:
    """In each rank another one: writes its artefact, or says why it cannot be made."""
    rank, start, why = int(os.environ["RANK"]), time.perf_counter(), None
    host.limit_memory(limit_bytes)
    devices.set_threads(max(1, host.usable_cores() // len(tried)) if len(tried) > 1 else threads)
    try:
        tried[rank].make(model, inputs, folders[rank], threads)
    except Exception as error:
        why = without_type(worker.reason(error))
    return Made(folders[rank], time.perf_counter() - start, why)


def narrowed(
    model: nn.Module, example: torch.Tensor, ratio: float, fine_tune, evaluate
) -> tuple[nn.Module, float]:
    """A model with fewer channels, trained again, and its accuracy; in a process of its own."""
    small = pruning_channels.narrowed(model, example, ratio=ratio).model
    given = fine_tune(small)
    small = (given if isinstance(given, nn.Module) else small).to(example.device).eval()
    return small, fastest_rounds.accuracy_of(evaluate, small)


def reason(error: launch.WorkerError, limit_seconds: float) -> str:
    """What a row says of a process that ended badly."""
    return f"took longer than {limit_seconds:g} s" if error.rank is None else without_type(error.reason)


def without_type(reason: str) -> str:
    """What a rank says, without the name of the error where the message is meant for people."""
    kind, _, said = reason.partition(": ")
    return said if kind in OURS else reason
