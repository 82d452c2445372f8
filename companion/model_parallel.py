"""A model in stages on several ranks: training it, its timeline, its bubble and its memory.

    torchrun --nproc-per-node=8 -m companion.model_parallel --micro-batches 32 --schedule 1f1b

Everything here but `alexnet` and `main` is called in each rank, where the default process group is ready.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from companion import collectives, data, launch, measure, models, splitting, training
from companion.memory import SavedBytes
from companion.pipeline import Pipeline
from companion.schedules import SCHEDULES, Span, timed_stages


@dataclass(frozen=True)
class Steps:
    """What a rank measured in some steps: seconds, the spans of the median step, most bytes kept for
    backward.
    """

    seconds: measure.Spread
    spans: list[Span]
    saved_bytes: int


def measure_steps(pipeline: Pipeline, images: torch.Tensor, labels: torch.Tensor, rounds: int = 3) -> Steps:
    """Steps on one batch, all ranks starting together, after one that warms up and counts bytes (but not the
    batch's).
    """
    spans = []
    with SavedBytes(pipeline.own, images) as saved:
        pipeline.step(images, labels)

    def step() -> None:
        pipeline.own.zero_grad()
        pipeline.step(images, labels)
        spans.append(pipeline.spans)

    times = collectives.compare({"step": step}, rounds, warm_up=0)
    series = times.rounds["step"]  # the slowest rank's, and so the same on all
    middle = sorted(range(rounds), key=series.__getitem__)[(rounds - 1) // 2]
    return Steps(times["step"], spans[middle], saved.most)


def rehearse(schedule: str, micro_batches: int, slot_seconds: float, rounds: int = 3) -> Steps:
    """Steps of stages that only sleep: `slot_seconds` on each rank for a forward pass, and for each half of a
    backward pass.
    """
    per_rank = SCHEDULES[schedule].stages_per_rank
    stages = timed_stages(per_rank * dist.get_world_size(), *[slot_seconds / per_rank] * 3)
    pipeline = Pipeline(stages, schedule, micro_batches, lambda output, labels: output.mean())
    return measure_steps(pipeline, torch.zeros(micro_batches, 1), torch.zeros(micro_batches), rounds)


@dataclass(frozen=True)
class Trained:
    """What a rank gives back: its measurements, and the whole model's test accuracy from 0 to 1."""

    history: training.History
    accuracy: float


def train(
    model: nn.Module,
    splits: data.Splits,
    recipe: training.Recipe,
    at: Sequence[str] | None = None,
    schedule: str = "1f1b",
    micro_batches: int = 8,
    progress: bool = True,
) -> Trained:
    """Trains a model on all ranks together, cut after the layers `at`, or where the measured times balance.

    Every rank is given the same model, with the same weights; afterwards all have the trained one. Dropout
    draws random numbers on each rank by itself, so that what is learned then depends on the cut.
    """
    if at is None:
        at = _balanced(model, splits.train.images[: max(1, recipe.batch_size // micro_batches)], schedule)
    stages = splitting.split(model, at, splits.train.images[:2])
    pipeline = Pipeline(stages, schedule, micro_batches)

    def step(own, images, labels, loss_function, optimizer) -> torch.Tensor:
        optimizer.zero_grad()
        pipeline.loss_function = loss_function
        loss = pipeline.step(images, labels)
        optimizer.step()
        return loss

    here = launch.device()
    batches = data.Batches(
        splits.train, recipe.batch_size, here, recipe.augment, drop_last=True, seed=recipe.seed
    )
    options = {"device": here, "step": step, "batches": batches, "validate": False, "progress": progress}
    history = training.fit(pipeline.own, splits, recipe, **options)
    pipeline.collect()
    return Trained(history, training.evaluate(model.to(here), splits.test).accuracy)


def _balanced(model: nn.Module, images: torch.Tensor, schedule: str) -> list[str]:
    """Where to cut, by rank 0's measurement, for all ranks."""
    wanted = SCHEDULES[schedule].stages_per_rank * dist.get_world_size() if schedule in SCHEDULES else 1
    answer = (
        [splitting.balanced(splitting.profile(model, images), wanted)] if dist.get_rank() == 0 else [None]
    )
    dist.broadcast_object_list(answer)
    return answer[0]


def alexnet(classes: int = 10, seed: int = 0, **options) -> nn.Module:
    """AlexNet from a fixed seed, without Dropout."""
    training.seed_everything(seed)
    model = models.AlexNet(classes, **options)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def main() -> None:
    """Trains AlexNet through a pipeline in the ranks that torchrun has started; rank 0 prints what came
    out.
    """
    parser = argparse.ArgumentParser(
        prog="torchrun --nproc-per-node=RANKS -m companion.model_parallel", description=main.__doc__
    )
    own = {
        "dataset": "digits",
        "data_dir": "data",
        "schedule": "1f1b",
        "micro_batches": 8,
        "pixels": 64,
        "width": 1.0,
    }
    of_recipe = {"epochs": 10, "batch_size": 64, "learning_rate": 1e-3, "seed": 0}
    for name, default in (own | of_recipe).items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=type(default), default=default, help=f"({default})"
        )
    arguments = vars(parser.parse_args())
    launch.join()
    recipe = training.Recipe(**{name: arguments[name] for name in of_recipe})
    splits = data.load_in_rank(arguments["dataset"], arguments["data_dir"], recipe.seed)
    model = alexnet(len(splits.classes), recipe.seed, width=arguments["width"])
    options = {name: arguments[name] for name in ("schedule", "micro_batches")}
    trained = train(model, data.resized(splits, arguments["pixels"]), recipe, **options, progress=False)
    if dist.get_rank() == 0:
        what = f"test accuracy {trained.accuracy:.2%}, {trained.history.samples_per_second:,.0f} samples/s"
        print(f"{dist.get_world_size()} ranks: {what}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
