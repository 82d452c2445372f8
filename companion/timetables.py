"""Timetables of pipeline schedules, as theory has them: who does what when, if only passes take time."""

from collections.abc import Callable
from dataclasses import dataclass, field

from companion import schedules
from companion.schedules import SCHEDULES, Span

# Slots of each kind of pass through all of a rank's layers; backward takes two, one for each of its halves.
SLOTS = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}


@dataclass
class _Rank:
    """A rank while the timetable is made: what it has done, and until when it is busy."""

    number: int
    spans: list[Span] = field(default_factory=list)
    free: float = 0.0

    def done(self, kind: str, stage: int) -> int:
        return sum(span.kind == kind and span.stage == stage for span in self.spans)


def timetable(schedule: str, ranks: int, micro_batches: int) -> list[list[Span]]:
    """The passes of each rank, in slots: a forward pass through a rank's layers takes one, a backward pass
    two, or one for each of its halves. Sending takes no time.

    Each rank does what may be done first: backward before forward, and no more forward passes ahead than the
    schedule keeps activations for. Raises ValueError for a schedule, ranks and micro-batches that do not fit.
    """
    schedules.check(schedule, ranks, _per_rank(schedule) * ranks, micro_batches)
    if schedule == "interleaved" and micro_batches % ranks:
        raise ValueError(f"interleaved on {ranks} ranks needs a multiple of {ranks} micro-batches")
    found = [_Rank(number) for number in range(ranks)]
    ends: dict[tuple[str, int, int], float] = {}
    passes = 3 if schedule == "zero_bubble" else 2
    wanted = ranks * _per_rank(schedule) * micro_batches * passes
    time = 0.0
    while sum(len(rank.spans) for rank in found) < wanted:
        for rank in found:
            if rank.free <= time:
                _start(rank, schedule, ranks, micro_batches, time, ends)
        later = [rank.free for rank in found if rank.free > time]
        time = min(later)
    return [rank.spans for rank in found]


def _per_rank(schedule: str) -> int:
    return SCHEDULES[schedule].stages_per_rank if schedule in SCHEDULES else 1


def _start(
    rank: _Rank, schedule: str, ranks: int, micro_batches: int, time: float, ends: dict[tuple, float]
) -> None:
    """Notes the pass that the rank begins now, if any may."""
    stages = ranks * _per_rank(schedule)
    own = range(rank.number, stages, ranks)

    def ended(kind: str, stage: int, number: int) -> bool:
        return ends.get((kind, stage, number), float("inf")) <= time

    may = (
        (kind, stage, rank.done(kind, stage))
        for kind, stage in _order(rank, schedule, own, micro_batches, ranks)
    )
    begun = next((it for it in may if it[2] < micro_batches and _ready(*it, stages, ended)), None)
    if begun:
        end = time + SLOTS[begun[0]] / _per_rank(schedule)
        rank.spans.append(Span(*begun, time, end))
        ends[begun], rank.free = end, end


def _ready(kind: str, stage: int, number: int, stages: int, ended: Callable[[str, int, int], bool]) -> bool:
    """Whether what the pass needs is there."""
    if kind == "F":
        return stage == 0 or ended("F", stage - 1, number)
    if kind == "W":
        return ended("I", stage, number)
    return ended("F", stage, number) and (stage == stages - 1 or ended(kind, stage + 1, number))


def _order(rank: _Rank, schedule: str, own: range, micro_batches: int, ranks: int) -> list[tuple[str, int]]:
    """Kinds of passes that the schedule would begin, each with its stage, the first choice first."""
    backward = "I" if schedule == "zero_bubble" else "B"
    forward = sum(rank.done("F", stage) for stage in own)
    back = sum(rank.done(backward, stage) for stage in own)
    most = schedules.predicted_in_flight(schedule, ranks, rank.number, micro_batches)
    if schedule == "gpipe":
        every = forward == micro_batches
        return [(backward, own[0])] if every else [("F", own[0])]
    ahead = [("F", _next_stage(forward, own, ranks, micro_batches))]
    behind = [(backward, _next_stage(back, own[::-1], ranks, micro_batches))]
    if schedule == "interleaved":  # in a fixed order: some forward passes, then one of each in turn
        more = forward < micro_batches * len(own)
        return ahead if more and forward - back < most else behind
    last = [("W", own[0])] if schedule == "zero_bubble" else []
    return behind + (ahead if forward - back < most else []) + last


def _next_stage(done: int, own: range, ranks: int, micro_batches: int) -> int:
    """The stage of a rank's next pass: as many micro-batches as there are ranks through each in turn."""
    group = min(ranks, micro_batches)
    return own[done // group % len(own)]
