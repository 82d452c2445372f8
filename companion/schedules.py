"""Schedules of pipelines: their names, what theory says of them, and what a run of one is recorded as."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed import pipelining


@dataclass(frozen=True)
class Schedule:
    """A schedule's class in torch.distributed.pipelining, and how many stages each rank has under it."""

    made_by: type
    stages_per_rank: int


SCHEDULES = {
    "gpipe": Schedule(pipelining.ScheduleGPipe, 1),
    "1f1b": Schedule(pipelining.Schedule1F1B, 1),
    "interleaved": Schedule(pipelining.ScheduleInterleaved1F1B, 2),
    "zero_bubble": Schedule(pipelining.ScheduleInterleavedZeroBubble, 1),
}
KINDS = {"F": "forward", "B": "backward", "I": "backward for inputs", "W": "backward for weights"}


def predicted_bubble(schedule: str, ranks: int, micro_batches: int) -> float:
    """Share of time that the ranks stand idle, from 0 to 1, if all stages take equally long and sending takes
    no time.

    (p - 1) / (v m + p - 1) with v stages on each of p ranks, m micro-batches. For the zero bubble schedule,
    which fills up with the weights' part of the backward pass, (p - 1) / (3 m + p - 1): forward and both
    parts of backward must take equally long. Sources: Huang et al. 2019, "GPipe"; Narayanan et al. 2021,
    "Efficient Large-Scale Language Model Training", section 2.2; Qi et al. 2023, "Zero Bubble Pipeline
    Parallelism", table 1 (ZB-H1).
    """
    work = micro_batches * (3 if schedule == "zero_bubble" else SCHEDULES[schedule].stages_per_rank)
    return (ranks - 1) / (work + ranks - 1)


@dataclass(frozen=True)
class Span:
    """One pass of one micro-batch through one stage: F, B, or B's halves I and W.

    Seconds of a clock that all ranks share.
    """

    kind: str
    stage: int
    micro_batch: int
    start: float
    end: float


def bubble(ranks: Sequence[Sequence[Span]]) -> float:
    """Share of time, from 0 to 1, that the ranks stood idle between the first span's start and the last one's
    end.
    """
    spans = [span for rank in ranks for span in rank]
    whole = max(span.end for span in spans) - min(span.start for span in spans)
    return 1 - sum(span.end - span.start for span in spans) / (len(ranks) * whole)


def lanes(ranks: Sequence[Sequence[Span]]) -> dict[str, list[tuple[str, float, float]]]:
    """What `plots.timeline` draws: by rank, what was done, on which micro-batch, from when to when; F' is of
    a second stage.
    """
    start = min(span.start for rank in ranks for span in rank)
    return {
        f"rank {i}": [
            (
                f"{span.kind}{chr(39) * (span.stage // len(ranks))} {span.micro_batch}",
                span.start - start,
                span.end - start,
            )
            for span in rank
        ]
        for i, rank in enumerate(ranks)
    }


def in_flight(spans: Sequence[Span]) -> int:
    """The most micro-batches that had gone forward and not yet all the way back, at any time, over the rank's
    stages.
    """
    most = now = 0
    for span in sorted(spans, key=lambda span: span.start):
        now += {"F": 1, "I": 0}.get(span.kind, -1)
        most = max(most, now)
    return most


def check(schedule: str, ranks: int, stages: int, micro_batches: int) -> None:
    """Raises ValueError if a schedule cannot run `stages` stages on so many ranks with so many
    micro-batches.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule={schedule!r} is unknown; use one of {', '.join(SCHEDULES)}")
    wanted = SCHEDULES[schedule].stages_per_rank * ranks
    if stages != wanted:
        raise ValueError(
            f"{schedule} on {ranks} ranks needs {wanted} stages, not {stages}: cut the model {wanted - 1} "
            f"times"
        )
    if micro_batches < stages:
        raise ValueError(
            f"micro_batches={micro_batches} is less than the {stages} stages; use {stages} or more"
        )


def predicted_in_flight(schedule: str, ranks: int, rank: int, micro_batches: int) -> int:
    """The most micro-batches of which a rank keeps activations at once, counted once for each of its stages.

    GPipe keeps all, 1F1B no more than there are ranks from this one on, zero bubble as many as ranks,
    interleaved 1F1B some more. Source: Narayanan et al. 2021, section 2.2 and the warm-up of Megatron-LM's
    schedules.
    """
    if schedule == "gpipe":
        return micro_batches
    if schedule == "interleaved":
        per_rank = SCHEDULES[schedule].stages_per_rank
        return min(per_rank * micro_batches, 2 * (ranks - rank - 1) + (per_rank - 1) * ranks + 1)
    return min(micro_batches, ranks if schedule == "zero_bubble" else ranks - rank)


class _Wait(torch.autograd.Function):
    """The identity, whose passes take as long as they are told to."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, forward_seconds: float, backward_seconds: float) -> torch.Tensor:
        ctx.seconds = backward_seconds
        time.sleep(forward_seconds)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple:
        time.sleep(ctx.seconds)
        return gradient, None, None


class TimedStage(nn.Module):
    """A stage that hands on what it gets, and sleeps: in forward, in backward for its inputs, and in backward
    for its weight.

    It shows a schedule by itself, whatever the machine does besides.
    """

    def __init__(self, forward_seconds: float, input_seconds: float, weight_seconds: float):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.seconds = forward_seconds, input_seconds, weight_seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ahead, for_inputs, for_weights = self.seconds
        return _Wait.apply(x, ahead, for_inputs) + _Wait.apply(self.weight, 0.0, for_weights)


def timed_stages(
    count: int, forward_seconds: float, input_seconds: float, weight_seconds: float
) -> list[TimedStage]:
    """Stages that take equally long.

    The first has no gradient of its input to compute, and works for its weight instead.
    """
    first = TimedStage(forward_seconds, 0.0, input_seconds + weight_seconds)
    return [first, *(TimedStage(forward_seconds, input_seconds, weight_seconds) for _ in range(count - 1))]
