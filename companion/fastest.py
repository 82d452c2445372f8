"""The fastest variant of your model within an accuracy budget, on this machine.

    found = fastest.search(model, images, accuracy)  # accuracy(model): from 0 to 1
    print(found)
    found.save("resnet-fast")  # artefacts.load("resnet-fast") is the model, without its class

Each variant is written as an artefact, loaded again and measured in a process of its own, in turn with the
model: what is measured is what is saved. A crash, a hang, too much memory or a refusal is a row with its
reason.
"""

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from companion import fastest_making, fastest_rounds, host, launch, machine, variants
from companion.fastest_found import PLAIN, Found, Row
from companion.fastest_making import Made, Workshop
from companion.fastest_rounds import Evaluate, Lead, Measured, Plain
from companion.measure import Spread
from companion.variants import Variant

FINALISTS = 3
ROUNDS = 15
RATIOS = (0.3, 0.5)  # of the channels, taken out where there is a `fine_tune`
SECONDS = 1.0  # for which a variant is timed, about; twice as long where nothing is dropped early
FINAL_SECONDS = 4.0  # for each that leads


def search(
    model: nn.Module,
    example_inputs: torch.Tensor,
    evaluate: Evaluate,
    budget: float = 0.01,
    *,
    fine_tune: Callable[[nn.Module], object] | None = None,
    batch_sizes: Sequence[int] = (1, 64),
    threads: int | None = None,
    seconds: float = 600.0,
    names: Sequence[str] | None = None,
    limit_seconds: float = 300.0,
    limit_bytes: int | None = None,
    early: bool = True,
    progress: bool = True,
) -> Found:
    """Tries what this machine supports; the fastest variant that costs at most `budget` of accuracy wins.

    `example_inputs` `[N, ...]` lie on the model's device and are the calibration data of int8: give 64 or
    more real ones. `evaluate(model)` gives the accuracy from 0 to 1; it runs in child processes, as does
    `fine_tune(model)`, which trains a model with fewer channels (in place, or it gives one). Speed is judged
    at all `batch_sizes` together, by the geometric mean. `threads`: None tries one and all cores.

    No new variant is begun after `seconds`; each may take `limit_seconds` and, on Linux, `limit_bytes` of
    memory (None: half of the machine's). `names` are those to try, None is all. On a CPU variants are made as
    many at a time as there are cores and memory for, and always measured one at a time. What is clearly
    behind, all batch sizes together, is dropped early; with `early=False` nothing is. Ctrl-C ends the search;
    what is known by then is given.

    Raises ValueError or TypeError, before anything is tried, for arguments that cannot work, and where the
    model as it is cannot be called or evaluated.
    """
    _checked(model, example_inputs, evaluate, budget, batch_sizes, threads, seconds)
    tried = variants.named(names, example_inputs.device)
    limit_bytes = host.usable_memory_bytes() // 2 if limit_bytes is None else limit_bytes
    one = _Search(
        copy.deepcopy(model).eval(),
        example_inputs,
        evaluate,
        budget,
        tuple(batch_sizes),
        _counts(threads, example_inputs.device),
        {"limit_seconds": limit_seconds, "limit_bytes": limit_bytes},
        early,
        progress,
    )
    return one.run(tried, fine_tune, seconds)


def _checked(model, inputs, evaluate, budget, sizes, threads, seconds) -> None:
    if not isinstance(model, nn.Module) or not callable(evaluate):
        raise TypeError("give a torch.nn.Module, and a function evaluate(model)")
    if not isinstance(inputs, torch.Tensor) or inputs.dim() < 2 or not len(inputs):
        raise ValueError("example_inputs is one tensor [N, ...] of samples: wrap a model that takes more")
    place = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), inputs.device)
    if place != inputs.device:
        raise ValueError(f"example_inputs are on {inputs.device}, the model on {place}: put both on one")
    if inputs.device.type not in ("cpu", "cuda"):
        raise ValueError(f"variants are known for cpu and cuda, not for {inputs.device.type}")
    if not 0 <= budget < 1:
        raise ValueError(f"budget={budget} must be 0 or more and below 1: 0.01 is one point of accuracy")
    if not sizes or any(not isinstance(size, int) or size < 1 for size in sizes):
        raise ValueError(f"batch_sizes={sizes} must be whole numbers, 1 or more")
    if (threads is not None and threads < 1) or not seconds > 0:
        raise ValueError(f"threads={threads} must be 1 or more, seconds={seconds} above 0")


def _counts(threads: int | None, device: torch.device) -> tuple[int, ...]:
    if threads is not None:
        return (threads,)
    return tuple(sorted({1, host.usable_cores()})) if device.type == "cpu" else (host.usable_cores(),)


class _Search:
    """One search: what is given, what is known so far."""

    def __init__(self, model, inputs, evaluate, budget, sizes, counts, limits, early, progress):
        self.model, self.inputs, self.evaluate, self.budget = model, inputs, evaluate, budget
        self.sizes, self.counts, self.limits, self.early = sizes, counts, limits, early
        self.progress, self.start = progress, time.perf_counter()
        self.rows: dict[str, Row] = {}
        self.folders: dict[str, Path] = {}
        self.hopeless: set[str] = set()  # not tried, since the lead is out of their reach
        self.lead = Lead(0.0, dict.fromkeys(sizes, 1.0))

    def run(self, tried: list[Variant], fine_tune, seconds: float) -> Found:
        needs_compiler = any(variant.kind == "program" for variant in tried)
        launch.warm("companion.fastest_making", *(["companion.compiler"] if needs_compiler else []))
        plain = self._plain()
        interrupted = False
        try:
            self._try({variant.name: variant for variant in tried}, self.model, plain, seconds)
            if fine_tune:
                self._pruned(tried, fine_tune, plain, seconds)
            self._finals(plain)
        except KeyboardInterrupt:
            interrupted = True
        took = time.perf_counter() - self.start
        about = {"budget": self.budget, "accuracies": plain.accuracies, "seconds": took}
        return Found(
            tuple(self.rows.values()),
            self.sizes,
            self.folders,
            machine.environment(),
            **about,
            interrupted=interrupted,
        )

    def _children(self, function: Callable, count: int, *args: object) -> list:
        options = {"device": str(self.inputs.device), "backend": None, "threads": max(self.counts)}
        return launch.run(function, count, *args, **options, limit_seconds=self.limits["limit_seconds"])

    def _child(self, function: Callable, *args: object):
        return self._children(function, 1, *args)[0]

    def _plain(self) -> Plain:
        given = (self.model, self.inputs, self.evaluate, self.sizes, self.counts, ROUNDS)
        try:
            plain = self._child(fastest_rounds.plain, *given)
        except launch.WorkerError as error:
            where = f" ({error.place})" if error.place else ""
            raise ValueError(
                f"the model as it is cannot be measured: {fastest_making.without_type(error.reason)}{where}"
            ) from error
        gains = {
            size: replace(spread, median=1.0, low=1.0, high=1.0) for size, spread in plain.latency.items()
        }
        accuracy = sum(plain.accuracies) / 2
        self._note(Row(PLAIN, plain.threads, accuracy, plain.latency, gains, plain.disk_bytes))
        return plain

    def _note(self, row: Row) -> None:
        self.rows[row.name] = row
        if self.progress:
            print(row, flush=True)

    def _try(self, named: dict[str, Variant], model: nn.Module, plain: Plain, seconds: float) -> None:
        """Makes, checks and measures variants of a model; their rows. The next ones are made together with
        the one whose turn it is.
        """
        workshop = Workshop(self._children, model, self.inputs, plain.threads, **self.limits)
        for place, (name, variant) in enumerate(named.items()):
            if reason := self._why_not(variant, plain, seconds):
                self._note(Row(name, reason=reason))
                continue
            later = [each for each in [*named][place + 1 :] if not self._why_not(named[each], plain, seconds)]
            made = workshop.take({each: named[each] for each in [name, *later]})
            self._attempt(name, variant, made, plain)

    def _why_not(self, variant: Variant, plain: Plain, seconds: float) -> str | None:
        if reason := variants.why_not(variant, self.inputs):
            return reason
        if time.perf_counter() - self.start > seconds:
            return f"not tried: {seconds:g} seconds were over"
        return self._hopeless(variant, plain)

    def _attempt(self, name: str, variant: Variant, made: Made, plain: Plain) -> None:
        """Checks and measures what was made; its row."""
        if made.reason:
            self._note(Row(name, reason=made.reason, seconds=made.seconds))
            return
        lead = self.lead if self.early else replace(self.lead, score=0.0)
        seconds = SECONDS if self.early else 2 * SECONDS
        given = (self.model, self.inputs, self.evaluate, lead, ROUNDS, seconds)
        start = time.perf_counter()
        try:
            limit = self.limits["limit_bytes"]
            found = self._child(fastest_rounds.measured, made.folder, variant.exact, *given, limit)
        except launch.WorkerError as error:
            took = made.seconds + time.perf_counter() - start
            reason = fastest_making.reason(error, self.limits["limit_seconds"])
            self._note(Row(name, reason=reason, seconds=took))
            return
        self._measured(name, made.folder, found, plain, made.seconds + time.perf_counter() - start)

    def _hopeless(self, variant: Variant, plain: Plain) -> str | None:
        """Why it need not be tried: the profile says so, or the quicker ones of its kind, all behind."""
        if not self.early:
            return None
        if variant.fuses and self.lead.beyond_fusing(plain.products):
            self.hopeless.add(variant.name)
            shares = " and ".join(f"{share:.0%}" for share in plain.products.values())
            return f"not tried: {shares} of the time is in products, which it makes hardly faster"
        known = [name for name in variant.after if name in self.hopeless or self._speed_up(name)]
        if not known or not all(
            name in self.hopeless or self.lead.beyond_kin(self._speed_up(name)) for name in known
        ):
            return None
        self.hopeless.add(variant.name)
        return f"not tried: the lead is out of reach for {', '.join(known)}"

    def _speed_up(self, name: str) -> dict[int, Spread] | None:
        return self.rows[name].speed_up if name in self.rows else None

    def _measured(self, name: str, folder: Path, found: Measured, plain: Plain, took: float) -> None:
        known = (found.disk_bytes, found.memory_bytes, found.cold_seconds, took)
        row = Row(name, plain.threads, found.accuracy, found.latency, found.speed_up, *known)
        self.folders[name] = folder
        for size, gain in found.speed_up.items():
            self.lead.gains[size] = max(self.lead.gains[size], gain.median)
        self._note(replace(row, remark=found.dropped or found.busy))
        if found.accuracy is not None and found.accuracy >= sum(plain.accuracies) / 2 - self.budget:
            self.lead.take(row.speed_up)

    def _pruned(self, tried: list[Variant], fine_tune, plain: Plain, seconds: float) -> None:
        """Models with fewer channels, trained again, as the variants that were the fastest so far."""
        leading = self._leading(FINALISTS)
        for ratio in RATIOS:
            base = f"pruned {ratio:.0%}"
            if time.perf_counter() - self.start > seconds:
                self._note(Row(base, reason=f"not tried: {seconds:g} seconds were over"))
                continue
            given = (self.model, self.inputs[:1], ratio, fine_tune, self.evaluate)
            try:
                small, accuracy = self._child(fastest_making.narrowed, *given)
            except launch.WorkerError as error:
                self._note(Row(base, reason=fastest_making.without_type(error.reason)))
                continue
            if accuracy < sum(plain.accuracies) / 2 - self.budget:
                self._note(Row(base, reason=f"accuracy {accuracy:.2%} after fine_tune: beyond the budget"))
                continue
            chosen = [each for each in tried if each.name in leading] or tried[:1]
            loose = {f"{base}, {variant.name}": replace(variant, exact=False) for variant in chosen}
            self._try(loose, small, plain, seconds)

    def _leading(self, count: int) -> list[str]:
        """The fastest so far that keep the accuracy: by their geometric mean those that are not far behind
        the best, and the best at each batch size.
        """
        least = self.rows[PLAIN].accuracy - self.budget
        fit = [
            row for row in self.rows.values() if row.usable and row.accuracy >= least and row.name != PLAIN
        ]
        near = [row for row in fit if not self.lead.beyond(row.speed_up)]
        ranked = sorted(near, key=lambda row: -row.score)[:count]
        for size in self.sizes:
            ranked += sorted(fit, key=lambda row: -row.speed_up[size].low)[:1]
        return list(dict.fromkeys(row.name for row in ranked))

    def _finals(self, plain: Plain) -> None:
        """The leading ones once more, all in turn with the model, at each number of threads."""
        leading = self._leading(FINALISTS)
        if not leading:
            return
        folders = {name: self.folders[name] for name in leading}
        given = (
            self.model,
            self.inputs,
            self.sizes,
            plain.threads,
            self.counts,
            ROUNDS,
            FINAL_SECONDS * len(leading),
        )
        try:
            found = self._child(fastest_rounds.final, folders, *given)
        except launch.WorkerError as error:  # they were measured one by one, which stays
            self._note(replace(self.rows[leading[0]], remark=f"not confirmed: {error.reason}"))
            return
        for name in leading:
            row = self.rows[name]
            ways = {count: both for (whose, count), both in found.items() if whose == name}
            count = max(ways, key=lambda n: math.prod(ways[n][size][1].low for size in self.sizes))
            latency, gains = ({size: both[k] for size, both in ways[count].items()} for k in (0, 1))
            self._note(replace(row, threads=count, latency=latency, speed_up=gains, final=True))
