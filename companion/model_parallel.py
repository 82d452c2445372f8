"""A model cut into stages on several ranks, fed with micro-batches: pipelines, their timelines, bubbles and memory.

    torchrun --nproc-per-node=8 -m companion.model_parallel --micro-batches 32 --schedule 1f1b

`Pipeline` is made in each rank, where the default process group is ready; stages come from `companion.splitting`.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed import pipelining

from companion import data, launch, models, splitting, stacks, training
from companion.schedules import KINDS, SCHEDULES, SavedBytes, Span, check, timed_stages


class _Stage(pipelining.PipelineStage):
    """A stage that keeps what it did when, and says in whatever is raised where that was."""

    def __init__(self, module: nn.Module, index: int, count: int, device: torch.device, given, handed_on):
        super().__init__(module, index, count, device, input_args=given, output_args=handed_on)
        self.handed_on, self.spans = handed_on, []

    @contextmanager
    def _kept(self, kind: str, micro_batch: int) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
            if launch.device().type == "cuda":
                torch.cuda.synchronize()
        except Exception as error:
            cause = error.__cause__ or error  # torch wraps what a stage raises in its forward
            cause.add_note(f"in stage {self.stage_index} of {self.num_stages}, {KINDS[kind]} of micro-batch {micro_batch}")
            raise cause from None
        self.spans.append(Span(kind, self.stage_index, micro_batch, start, time.perf_counter()))

    def forward_one_chunk(self, fwd_chunk_id: int, *args, **kwargs):
        with self._kept("F", fwd_chunk_id):
            output = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
            if (output.shape, output.dtype) != (self.handed_on.shape, self.handed_on.dtype):  # newer torch would send it
                raise ValueError(f"the stage gave {tuple(output.shape)}, where its first run gave {tuple(self.handed_on.shape)}")
            return output

    def backward_one_chunk(self, bwd_chunk_id: int, *args, **kwargs):
        with self._kept("B" if kwargs.get("full_backward", True) else "I", bwd_chunk_id):
            return super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, *args, **kwargs):
        with self._kept("W", bwd_chunk_id):
            return super().backward_weight_one_chunk(bwd_chunk_id, *args, **kwargs)

    def _get_init_p2p_neighbors_ops(self) -> list:
        """The first messages, which warm up the connections; before torch 2.13 gloo aborts on them, and needs none."""
        right = stacks.has_right_pipeline_warm_up() or dist.get_backend() != "gloo"
        return super()._get_init_p2p_neighbors_ops() if right else []


class _OnDevice(nn.Module):
    """A stage on a GPU that hands on tensors through main memory: gloo, which ranks that share a GPU need, sends only those."""

    def __init__(self, module: nn.Module, device: torch.device):
        super().__init__()
        self.module, self.device = module.to(device), device

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x.to(self.device)).cpu()


class Pipeline:
    """This rank's stages of a model, under a schedule. Every rank makes one of the same `stages`, and keeps only its own.

    Stage i runs on rank i modulo the world size. `loss_function(output, labels)` gives the mean over a micro-batch.
    Raises ValueError, on all ranks and before anything is sent, when stages, ranks and micro-batches do not fit together.
    """

    def __init__(self, stages: Sequence[nn.Module], schedule: str, micro_batches: int, loss_function: Callable = F.cross_entropy):
        self.rank, self.ranks, self.count = dist.get_rank(), dist.get_world_size(), len(stages)
        check(schedule, self.ranks, self.count, micro_batches)
        self.device, self.name, self.micro_batches, self.loss_function = launch.device(), schedule, micro_batches, loss_function
        self.all = stages
        self.own = nn.ModuleDict({str(i): stages[i].to(self.device) for i in range(self.rank, self.count, self.ranks)})
        self.shape: tuple[int, ...] | None = None

    @property
    def spans(self) -> list[Span]:
        """What this rank did in the last step, in order of time."""
        return sorted((span for stage in self.stages for span in stage.spans), key=lambda span: span.start)

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Forward and backward of a batch `[N, ...]`, given to all ranks; adds up gradients, and gives the mean loss to all.

        The first stage takes the images, the last one the labels. Raises ValueError, on all ranks alike, for a batch that
        micro-batches do not divide, or of another shape than the first; whatever a stage raises names stage and micro-batch.
        """
        self._check(images, labels)
        if self.shape is None:
            self._prepare(images)
        for stage in self.stages:
            stage.spans.clear()
        last, losses = (self.count - 1) % self.ranks, []
        given = (images.to(self.stages[0].device),) if self.rank == 0 else ()
        wanted = {"target": labels.to(self.stages[0].device), "losses": losses} if self.rank == last else {}
        self.schedule.step(*given, **wanted)
        loss = torch.stack(losses).mean().detach().to(self.device) if losses else torch.zeros((), device=self.device)
        dist.broadcast(loss, src=last)
        return loss

    def collect(self) -> None:
        """Makes all stages on all ranks equal to those that their owners have trained: each then has the whole model."""
        for index, stage in enumerate(self.all):
            for tensor in (*stage.parameters(), *stage.buffers()):
                value = tensor.detach().to(self.device)
                dist.broadcast(value, src=index % self.ranks)
                tensor.detach().copy_(value)

    def _check(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        if len(images) % self.micro_batches or len(images) != len(labels):
            fits = [n for n in range(self.count, len(images) + 1) if len(images) % n == 0]
            raise ValueError(
                f"{len(images)} images with {len(labels)} labels do not split into {self.micro_batches} equal micro-batches; "
                f"micro_batches could be {', '.join(map(str, fits[:6]))}, and a last, smaller batch must be dropped"
            )
        if self.shape and images.shape != self.shape:
            raise ValueError(
                f"a batch of shape {tuple(images.shape)} in a pipeline made for {tuple(self.shape)}: ranks have agreed on what "
                "they send; drop a smaller last batch (drop_last=True), or make another Pipeline"
            )

    def _prepare(self, images: torch.Tensor) -> None:
        """Finds what each stage hands on, its owner by running it on zeros, and makes the schedule.

        torch would find out by itself, but moves BatchNorm's statistics and the random numbers in doing so (before 2.13).
        """
        shapes, here = [torch.empty_like(images.chunk(self.micro_batches)[0], device="meta")], self.device
        for index in range(self.count):
            answer = [_output(self.own[str(index)], shapes[-1], here, index, self.count) if str(index) in self.own else None]
            dist.broadcast_object_list(answer, src=index % self.ranks)
            shape, stride, dtype = answer[0]
            handed_on = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
            shapes.append(handed_on.requires_grad_(dtype.is_floating_point))
        staged = here.type == "cuda" and dist.get_backend() == "gloo"
        self.stages = []
        for name, module in self.own.items():
            module, index = _OnDevice(module, here) if staged else module, int(name)
            place = torch.device("cpu") if staged else here
            self.stages.append(_Stage(module, index, self.count, place, shapes[index], shapes[index + 1]))
        schedule = SCHEDULES[self.name]
        single = issubclass(schedule.made_by, pipelining.schedules.PipelineScheduleSingle)
        stages = self.stages[0] if single else self.stages
        self.schedule = schedule.made_by(stages, self.micro_batches, loss_fn=self._loss)
        self.shape = images.shape

    def _loss(self, output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        try:
            return self.loss_function(output, labels)
        except Exception as error:
            error.add_note(f"in the loss, after stage {self.count - 1} of {self.count}")
            raise


def _output(
    module: nn.Module, given: torch.Tensor, device: torch.device, index: int, count: int
) -> tuple[torch.Size, tuple[int, ...], torch.dtype]:
    """Shape, strides and type of what a stage gives; nothing of it is changed."""
    before = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            output = module(torch.zeros_like(given, device=device))
            for buffer, value in before:
                buffer.copy_(value)
        if not isinstance(output, torch.Tensor):
            raise TypeError(f"a stage hands on one tensor, not a {type(output).__name__}")
    except Exception as error:
        error.add_note(f"in stage {index} of {count}, first run, on zeros of shape {tuple(given.shape)}")
        raise
    return output.shape, output.stride(), output.dtype


@dataclass(frozen=True)
class Steps:
    """What a rank measured in some steps: median seconds, the spans of the median step, most bytes kept for backward."""

    seconds: float
    spans: list[Span]
    saved_bytes: int


def measure_steps(pipeline: Pipeline, images: torch.Tensor, labels: torch.Tensor, rounds: int = 3) -> Steps:
    """Steps on one batch, all ranks starting together, after one that warms up and counts bytes (but not the batch's)."""
    times, spans = [], []
    with SavedBytes(pipeline.own, images) as saved:
        pipeline.step(images, labels)
    for _ in range(rounds):
        pipeline.own.zero_grad()
        dist.barrier()
        start = time.perf_counter()
        pipeline.step(images, labels)
        dist.barrier()
        times.append(time.perf_counter() - start)
        spans.append(pipeline.spans)
    middle = torch.tensor(sorted(range(rounds), key=times.__getitem__)[(rounds - 1) // 2], device=pipeline.device)
    dist.broadcast(middle, src=0)  # the same step on all ranks
    return Steps(times[middle], spans[middle], saved.most)


def rehearse(schedule: str, micro_batches: int, slot_seconds: float, rounds: int = 3) -> Steps:
    """Steps of stages that only sleep: `slot_seconds` on each rank for a forward pass, and for each half of a backward pass."""
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
    dataset: str,
    data_dir: str,
    recipe: training.Recipe,
    at: Sequence[str] | None = None,
    schedule: str = "1f1b",
    micro_batches: int = 8,
    pixels: int = 64,
    options: dict | None = None,
    progress: bool = True,
) -> Trained:
    """Trains AlexNet (with `options`) on all ranks together, cut after the layers `at`, or where the measured times balance.

    Dropout is off: each rank would draw random numbers of its own, and the result would depend on the cut.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    splits = data.resized(data.load_in_rank(dataset, data_dir, recipe.seed), pixels)
    model = alexnet(len(splits.classes), recipe.seed, **(options or {}))
    if at is None:
        wanted = SCHEDULES[schedule].stages_per_rank * ranks if schedule in SCHEDULES else 1
        few = splits.train.images[: max(1, recipe.batch_size // micro_batches)]
        answer = [splitting.balanced(splitting.profile(model, few), wanted)] if rank == 0 else [None]
        dist.broadcast_object_list(answer)
        at = answer[0]
    pipeline = Pipeline(splitting.split(model, at), schedule, micro_batches)

    def step(own, images, labels, loss_function, optimizer) -> torch.Tensor:
        optimizer.zero_grad()
        loss = pipeline.step(images, labels)
        optimizer.step()
        return loss

    batches = data.Batches(splits.train, recipe.batch_size, launch.device(), recipe.augment, drop_last=True, seed=recipe.seed)
    options = {"device": launch.device(), "step": step, "batches": batches, "validate": False}
    history = training.fit(pipeline.own, splits, recipe, **options, progress=progress)
    pipeline.collect()
    return Trained(history, training.evaluate(model.to(launch.device()), splits.test).accuracy)


def alexnet(classes: int = 10, seed: int = 0, **options) -> nn.Module:
    """AlexNet from a fixed seed, without Dropout."""
    training.seed_everything(seed)
    model = models.AlexNet(classes, **options)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def main() -> None:
    """Trains AlexNet through a pipeline in the ranks that torchrun has started; rank 0 prints what came out."""
    parser = argparse.ArgumentParser(prog="torchrun --nproc-per-node=RANKS -m companion.model_parallel", description=main.__doc__)
    own = {"dataset": "digits", "data_dir": "data", "schedule": "1f1b", "micro_batches": 8, "pixels": 64, "width": 1.0}
    of_recipe = {"epochs": 10, "batch_size": 64, "learning_rate": 1e-3, "seed": 0}
    for name, default in (own | of_recipe).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, help=f"({default})")
    arguments = vars(parser.parse_args())
    if on_gpu := launch.device().type == "cuda":
        torch.cuda.set_device(launch.device())  # where nccl puts what it sends by itself
    dist.init_process_group("nccl" if on_gpu else "gloo")
    recipe = training.Recipe(**{name: arguments[name] for name in of_recipe})
    options = {name: arguments[name] for name in ("schedule", "micro_batches", "pixels")}
    options |= {"options": {"width": arguments["width"]}, "progress": False}
    trained = train(arguments["dataset"], arguments["data_dir"], recipe, **options)
    if dist.get_rank() == 0:
        what = f"test accuracy {trained.accuracy:.2%}, {trained.history.samples_per_second:,.0f} samples/s"
        print(f"{dist.get_world_size()} ranks: {what}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
