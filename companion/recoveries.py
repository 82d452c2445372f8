"""Faults for real, and what becomes of a training under them: two machines, one of them damaged, watched.

print(recoveries.recovery("a worker is killed", folder, ["--steps", 60]))
"""

import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from companion import multi_machine, network
from companion.figures import COLOURS, panels_of, styled
from companion.machines import Machines, until

STEPS_BEFORE = 12  # done when the fault comes


@dataclass(frozen=True)
class Recovery:
    """What a fault did: the numbers of ranks that trained one after another, seconds from the fault to the
    next step that was done anew, steps that had to be done again, the loss of the last step, and a
    fingerprint of the weights at the end. `progress` has (seconds since the fault, steps done) of each step.
    """

    fault: str
    ranks: tuple[int, ...]
    seconds: float
    lost_steps: int
    loss: float
    fingerprint: str
    progress: tuple[tuple[float, int], ...] = ()


def _kill_worker(two: Machines, arguments: Sequence[object]) -> None:
    os.kill(two.machines[1].workers()[0], signal.SIGKILL)


def _kill_node(two: Machines, arguments: Sequence[object]) -> None:
    two.machines[1].kill()


def _kill_first_node(two: Machines, arguments: Sequence[object]) -> None:
    two.machines[0].kill()


def _comes_back(two: Machines, arguments: Sequence[object]) -> None:
    first = two.machines[0]
    two.machines[1].kill()
    until(lambda: [e for e in first.events("start") if e["ranks"] == two.per_node], "training with one node")
    two.start(1, arguments, "node 1 again")
    until(lambda: first.events("start")[-1]["ranks"] == 2 * two.per_node, "training with both nodes again")


def _stop_worker(two: Machines, arguments: Sequence[object]) -> None:
    os.kill(two.machines[1].workers()[0], signal.SIGSTOP)


FAULTS: dict[str, tuple[str, Callable]] = {  # the numbers of nodes that will do, and the damage
    "a worker is killed": ("2", _kill_worker),
    "a node is killed": ("1:2", _kill_node),
    "the first node is killed": ("1:2", _kill_first_node),
    "a node is killed and comes back": ("1:2", _comes_back),
    "a worker stops answering": ("2", _stop_worker),
    "a cable is cut": ("1:2", None),
}


def why_not(fault: str) -> str | None:
    """Why this fault cannot be had here; None if it can."""
    return network.why_not() if FAULTS[fault][1] is None else None


def recovery(fault: str, folder: str | Path, arguments: Sequence[object]) -> Recovery:
    """Trains on two machines, lets the fault happen after some steps, and waits for the end of those that are
    left. `arguments` are `multi_machine`'s, without its folder.

    Raises ValueError for an unknown fault, TimeoutError if training does not go on.
    """
    if fault not in FAULTS:
        raise ValueError(f"fault={fault!r} is unknown; use one of {', '.join(map(repr, FAULTS))}")
    nodes, damage = FAULTS[fault]
    folder = Path(folder, fault.replace(" ", "-"))
    arguments = ["--folder", folder / "checkpoints", *arguments]
    if damage:
        with Machines(folder, multi_machine.main, nodes) as two:
            return _watched(fault, two, arguments, lambda: damage(two, arguments))
    with (
        network.Network(2) as cables,
        Machines(folder, multi_machine.main, nodes, inside=cables.places) as two,
    ):
        return _watched(fault, two, arguments, lambda: cables.cut(1), cut_off=1)


def _watched(
    fault: str,
    two: Machines,
    arguments: Sequence[object],
    damage: Callable[[], None],
    cut_off: int | None = None,
) -> Recovery:
    """`cut_off` is a machine that lives on where nobody waits for it."""
    for rank in (0, 1):
        two.start(rank, arguments)
    until(lambda: [e for e in _said(two, "step") if e["step"] >= STEPS_BEFORE], f"step {STEPS_BEFORE}")
    when = time.time()
    damage()
    waited = [m for i, m in enumerate(two.machines) if i != cut_off and m.process.exitcode is None]
    for machine in waited:
        if code := machine.wait():
            raise RuntimeError(f"{machine.name} ended with {code} after {fault!r}: {machine.reason()}")
    steps, starts = _said(two, "step"), _said(two, "start")
    again = next(event for event in starts if event["time"] > when)
    before = max(event["step"] for event in steps if event["time"] < again["time"])
    after = next(event for event in steps if event["time"] > again["time"])
    ranks = [event["ranks"] for event in starts]
    return Recovery(
        fault,
        tuple(size for size, previous in zip(ranks, [0, *ranks], strict=False) if size != previous),
        after["time"] - when,
        before - again["step"],
        steps[-1]["loss"],
        _said(two, "end")[-1]["fingerprint"],
        tuple((event["time"] - when, event["step"]) for event in steps),
    )


def _said(two: Machines, kind: str) -> list[dict]:
    """What all machines' ranks said, in order of time."""
    return sorted((e for machine in two.machines for e in machine.events(kind)), key=lambda e: e["time"])


@styled
def figure(found: Sequence[Recovery], every: int) -> Figure:
    """Steps done against time, a line for each fault, which happens at 0; dashed where checkpoints are."""
    drawn, (axis,) = panels_of(1, 9, 4.2)
    for recovery, colour in zip(found, COLOURS, strict=False):
        times, done = zip(*recovery.progress, strict=True)
        axis.plot(times, done, ".-", color=colour, markersize=3, linewidth=1.2, label=recovery.fault)
    most = max(done for recovery in found for _, done in recovery.progress)
    for step in range(every, most + 1, every):
        axis.axhline(step, color="0.85", linewidth=0.7, linestyle="--", zorder=0)
    axis.axvline(0, color="black", linewidth=1)
    axis.annotate(
        "the fault", (0, 1), (4, -4), xycoords=("data", "axes fraction"), textcoords="offset points", va="top"
    )
    axis.set(xlabel="seconds since the fault", ylabel="training steps done")
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(visible=False)
    drawn.legend(loc="outside lower center", ncols=3, fontsize=9)
    return drawn
