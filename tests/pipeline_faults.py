"""Everything that can go wrong in a pipeline, made to happen.

    python tests/pipeline_faults.py --times 20 --seed 0

Each case must be reported with its rank and stage, in time, and must leave no process behind; see
launch_faults.py.
"""

import os
import re
import signal
import sys

import pytest
import torch
import torch.distributed as dist
from launch_faults import failure, main
from torch import nn

from companion import launch, models, splitting
from companion.model_parallel import Pipeline


class Fails(torch.autograd.Function):
    """The identity, that fails backwards if its gradient is that of a sum with fives in it."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        if (ctx.saved_tensors[0] == 5).any():
            raise ArithmeticError("five, backward")  # culprit
        return gradient


class Culprit(nn.Module):
    """A stage that hands on what it gets, until there is a five in it."""

    def __init__(self, kind: str):
        super().__init__()
        self.weight, self.kind = nn.Parameter(torch.ones(1)), kind

    def forward(self, x):
        five = bool((x == 5).any())
        if self.kind == "backward":
            return Fails.apply(x) * self.weight
        if five and self.kind == "forward":
            raise ArithmeticError("five, forward")  # culprit
        if five and self.kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if five and self.kind == "shape":
            return x[:1] * self.weight
        if self.kind == "pair":
            return x, x
        return x * self.weight


def step(
    kind: str,
    schedule: str = "1f1b",
    micro_batches: int = 4,
    images: int = 8,
    classes: int = 4,
    stages: int | None = None,
):
    """One step of a pipeline whose stage 1 misbehaves at the images of micro-batch 2."""
    x, labels = torch.zeros(images, 4), torch.full((images,), classes - 1)
    x[4:6] = 5
    modules = [Culprit(kind if i == 1 else "fine") for i in range(stages or dist.get_world_size())]
    Pipeline(modules, schedule, micro_batches).step(x, labels)


def refused(message: str, *args, world_size: int = 2) -> None:
    """All ranks refuse, at once and alike."""
    error = failure(step, world_size, "fine", *args)
    assert re.search(message, error.reason), error.reason
    assert error.reason.startswith("ValueError")


def batch_does_not_split():
    refused(
        r"8 images with 8 labels do not split into 3 equal micro-batches; micro_batches could be 2, 4, 8",
        "gpipe",
        3,
    )


def too_few_micro_batches():
    refused(r"micro_batches=2 is less than the 3 stages; use 3 or more", "1f1b", 2, world_size=3)


def wrong_number_of_stages():
    refused(r"interleaved on 2 ranks needs 4 stages, not 2: cut the model 3 times", "interleaved")


def unknown_schedule():
    refused(r"schedule='zigzag' is unknown; use one of gpipe, 1f1b, interleaved, zero_bubble", "zigzag")


def device_not_there():
    with pytest.raises(ValueError, match="'cuda:99' is not available"):
        launch.run(step, 2, "fine", device="cpu,cuda:99")


def cannot_be_cut():
    def cut():
        splitting.split(models.resnet18(), ["layer1.0.conv1"])

    assert (
        "SplitError: ResNet cannot be cut after 'layer1.0.conv1': 2 values would have to be sent"
        in failure(cut, 2).reason
    )


def batch_of_another_shape():
    def steps():
        pipeline = Pipeline([Culprit("fine"), Culprit("fine")], "1f1b", 2)
        for count in (8, 6):
            pipeline.step(torch.zeros(count, 4), torch.zeros(count, dtype=torch.long))

    assert "a batch of shape (6, 4) in a pipeline made for (8, 4)" in failure(steps, 2).reason


def shape_changes_between_micro_batches():
    for schedule in ("gpipe", "1f1b", "zero_bubble"):
        error = failure(step, 3, "shape", schedule)
        assert error.rank == 1
        assert error.reason.endswith("(in stage 1 of 3, forward of micro-batch 2)"), error.reason


def shape_changes_in_the_last_stage():
    error = failure(step, 2, "shape")
    assert error.rank == 1
    assert "in stage 1 of 2, forward of micro-batch 2" in error.reason


def stage_gives_a_pair():
    error = failure(step, 3, "pair")
    assert error.rank == 1
    assert error.reason.startswith(
        "TypeError: a stage hands on one tensor, not a tuple (in stage 1 of 3, first run"
    )


def stages_do_not_fit():
    def mismatch():
        Pipeline([nn.Linear(4, 5), nn.Linear(4, 4)], "1f1b", 2).step(
            torch.zeros(4, 4), torch.zeros(4, dtype=torch.long)
        )

    error = failure(mismatch, 2)
    assert error.rank == 1
    assert "in stage 1 of 2, first run, on zeros of shape (2, 5)" in error.reason


def exception_forward():
    for schedule in ("gpipe", "1f1b", "zero_bubble"):
        error = failure(step, 3, "forward", schedule)
        assert error.rank == 1
        assert error.reason == "ArithmeticError: five, forward (in stage 1 of 3, forward of micro-batch 2)"
        assert 'raise ArithmeticError("five, forward")  # culprit' in error.place


def exception_backward():
    for schedule, kind in (
        ("gpipe", "backward"),
        ("1f1b", "backward"),
        ("zero_bubble", "backward for inputs"),
    ):
        error = failure(step, 3, "backward", schedule)
        assert error.rank == 1
        assert error.reason == f"ArithmeticError: five, backward (in stage 1 of 3, {kind} of micro-batch 2)"
        assert 'raise ArithmeticError("five, backward")  # culprit' in error.place


def exception_in_a_second_stage():
    error = failure(step, 2, "forward", "interleaved", 4, 8, 4, 4)
    assert error.rank == 1
    assert "in stage 1 of 4, forward of micro-batch 2" in error.reason


def exception_in_the_loss():
    error = failure(step, 2, "fine", "1f1b", 4, 8, 9)
    assert error.rank == 1
    assert error.reason.endswith("(in the loss, after stage 1 of 2)")


def stage_killed():
    error = failure(step, 3, "killed")
    assert error.rank == 1
    assert error.reason.startswith("killed by SIGKILL")


def stage_that_does_not_come():
    def absent():
        if dist.get_rank() != 1:
            step("fine")

    error = failure(absent, 2, timeout_seconds=1)
    assert error.rank == 0
    assert "rank 1 had returned" in str(error)


def cut_apart():
    if dist.get_rank() == 0:
        stages = splitting.split(models.LeNet5(), "fc1")
    else:
        stages = splitting.split(models.LeNet5(), "fc2")
    Pipeline(stages, "1f1b", 2).step(torch.zeros(4, 3, 32, 32), torch.zeros(4, dtype=torch.long))


def different_cuts():
    error = failure(cut_apart)
    assert error.reason.startswith("ValueError: ranks 0 and 1 have cut the model in different places")


FAULTS = {
    case.__name__: case
    for case in (
        batch_does_not_split,
        too_few_micro_batches,
        wrong_number_of_stages,
        unknown_schedule,
        device_not_there,
        cannot_be_cut,
        batch_of_another_shape,
        shape_changes_between_micro_batches,
        shape_changes_in_the_last_stage,
        stage_gives_a_pair,
        stages_do_not_fit,
        different_cuts,
        exception_forward,
        exception_backward,
        exception_in_a_second_stage,
        exception_in_the_loss,
        stage_killed,
        stage_that_does_not_come,
    )
}

if __name__ == "__main__":
    sys.exit(main(FAULTS, __doc__))
