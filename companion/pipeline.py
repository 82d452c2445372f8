"""A model's stages on several ranks, under a schedule: `Pipeline`, made in each rank where the process group
is ready.

Stages come from `companion.splitting`, schedules from `companion.schedules`.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed import pipelining

from companion import launch, modules, stacks
from companion.schedules import KINDS, SCHEDULES, Span, check


class _Stage(pipelining.PipelineStage):
    """A stage that keeps what it did when, and says in whatever is raised where that was."""

    def __init__(self, module: nn.Module, index: int, count: int, device, given, handed_on, group):
        super().__init__(module, index, count, device, input_args=given, output_args=handed_on, group=group)
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
            cause.add_note(
                f"in stage {self.stage_index} of {self.num_stages}, {KINDS[kind]} of micro-batch "
                f"{micro_batch}"
            )
            raise cause from None
        self.spans.append(Span(kind, self.stage_index, micro_batch, start, time.perf_counter()))

    def forward_one_chunk(self, fwd_chunk_id: int, *args, **kwargs):
        with self._kept("F", fwd_chunk_id):
            output = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
            if (output.shape, output.dtype) != (
                self.handed_on.shape,
                self.handed_on.dtype,
            ):  # newer torch would send it
                raise ValueError(
                    f"the stage gave {tuple(output.shape)}, where its first run gave "
                    f"{tuple(self.handed_on.shape)}"
                )
            return output

    def backward_one_chunk(self, bwd_chunk_id: int, *args, **kwargs):
        with self._kept("B" if kwargs.get("full_backward", True) else "I", bwd_chunk_id):
            return super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, *args, **kwargs):
        with self._kept("W", bwd_chunk_id):
            return super().backward_weight_one_chunk(bwd_chunk_id, *args, **kwargs)

    def _get_init_p2p_neighbors_ops(self) -> list:
        """The first messages, which warm up the connections; before torch 2.13 gloo aborts on them, and needs
        none.
        """
        right = stacks.has_right_pipeline_warm_up() or dist.get_backend(self.group) != "gloo"
        return super()._get_init_p2p_neighbors_ops() if right else []


def plain_stage(module: nn.Module) -> pipelining.PipelineStage:
    """torch's own PipelineStage for this rank; before torch 2.13 without the first messages, on which gloo
    aborts.
    """
    stage = pipelining.PipelineStage(module, dist.get_rank(), dist.get_world_size(), launch.device())
    if not stacks.has_right_pipeline_warm_up() and dist.get_backend() == "gloo":
        stage._get_init_p2p_neighbors_ops = list
    return stage


class _Sendable(nn.Module):
    """A stage that hands on what can be sent: a tensor in one piece of memory, and in main memory where gloo,
    which ranks that share a GPU need, sends only from there.
    """

    def __init__(self, module: nn.Module, device: torch.device, staged: bool):
        super().__init__()
        self.module, self.device, self.staged = modules.move(module, device), device, staged

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output = self.module(x.to(self.device)).contiguous()
        return output.cpu() if self.staged else output


class Pipeline:
    """This rank's stages of a model, under a schedule.

    Every rank makes one of the same `stages`, and keeps only its own.

    Stage i runs on rank i modulo the world size: that of `group`, where only some ranks share the pipeline.
    `wrap` is what each stage is put into, such as DDP over the ranks that have the same stage of other
    pipelines. `loss_function(output, labels)` gives the mean over a
    micro-batch; one whose value for the batch is not the mean of its values for micro-batches (class weights,
    `ignore_index`, sums) is refused in the step where it shows, since its gradients would not be the uncut
    model's.

    Raises ValueError, on all ranks and before anything is sent, when stages, ranks and micro-batches do not
    fit together.
    """

    def __init__(
        self,
        stages: Sequence[nn.Module],
        schedule: str,
        micro_batches: int,
        loss_function: Callable = F.cross_entropy,
        *,
        group: dist.ProcessGroup | None = None,
        wrap: Callable[[nn.Module], nn.Module] | None = None,
    ):
        self.group, self.wrap = group, wrap or (lambda stage: stage)
        self.rank, self.ranks, self.count = dist.get_rank(group), dist.get_world_size(group), len(stages)
        check(schedule, self.ranks, self.count, micro_batches)
        self.device, self.name, self.micro_batches, self.loss_function = (
            launch.device(),
            schedule,
            micro_batches,
            loss_function,
        )
        self.all = stages
        self.own = nn.ModuleDict(
            {str(i): stages[i].to(self.device) for i in range(self.rank, self.count, self.ranks)}
        )
        self.shape: tuple[int, ...] | None = None
        self.seen: list[
            tuple[torch.Tensor, torch.Tensor, torch.Tensor]
        ] = []  # output, labels, loss of each micro-batch

    @property
    def spans(self) -> list[Span]:
        """What this rank did in the last step, in order of time."""
        return sorted((span for stage in self.stages for span in stage.spans), key=lambda span: span.start)

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Forward and backward of a batch `[N, ...]`, given to all ranks; adds up gradients, and gives the
        mean loss to all.

        The first stage takes the images, the last one the labels. Raises ValueError, on all ranks alike, for
        a batch that micro-batches do not divide, or of another shape than the first; whatever a stage raises
        names stage and micro-batch.
        """
        self._check(images, labels)
        if self.shape is None:
            self._prepare(images)
        for stage in self.stages:
            stage.spans.clear()
        last, losses = (self.count - 1) % self.ranks, []
        given = (images.to(self.stages[0].device),) if self.rank == 0 else ()
        wanted = {"target": labels.to(self.stages[0].device), "losses": losses} if self.rank == last else {}
        self.seen.clear()
        self.schedule.step(*given, **wanted)
        self._check_loss()
        loss = (
            torch.stack(losses).mean().detach().to(self.device)
            if losses
            else torch.zeros((), device=self.device)
        )
        dist.broadcast(loss, group_src=last, group=self.group)
        return loss

    def collect(self) -> None:
        """Makes all stages on all ranks equal to those that their owners have trained: each then has the
        whole model.
        """
        for index, stage in enumerate(self.all):
            for tensor in (*stage.parameters(), *stage.buffers()):
                value = tensor.detach().to(self.device)
                dist.broadcast(value, group_src=index % self.ranks, group=self.group)
                tensor.detach().copy_(value)

    def _check(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        if len(images) % self.micro_batches or len(images) != len(labels):
            fits = [n for n in range(self.count, len(images) + 1) if len(images) % n == 0]
            raise ValueError(
                f"{len(images)} images with {len(labels)} labels do not split into {self.micro_batches} "
                f"equal micro-batches; "
                f"micro_batches could be {', '.join(map(str, fits[:6]))}, and a last, smaller batch must "
                f"be dropped"
            )
        if self.shape and images.shape != self.shape:
            raise ValueError(
                f"a batch of shape {tuple(images.shape)} in a pipeline made for {tuple(self.shape)}: ranks "
                f"have agreed on what "
                "they send; drop a smaller last batch (drop_last=True), or make another Pipeline"
            )

    def _agree(self) -> None:
        """Raises ValueError, on all ranks, where they have not cut the model in the same places."""
        mine = [sorted(stage.state_dict()) for stage in self.all]
        everyones: list = [None] * self.ranks
        dist.all_gather_object(everyones, mine, group=self.group)
        if others := [rank for rank, theirs in enumerate(everyones) if theirs != everyones[0]]:
            raise ValueError(
                f"ranks 0 and {others[0]} have cut the model in different places: cut it once, and give all "
                "ranks the same cuts (each measures other times)"
            )

    def _prepare(self, images: torch.Tensor) -> None:
        """Finds what each stage hands on, its owner by running it on zeros, and makes the schedule.

        torch would find out by itself, but moves BatchNorm's statistics and the random numbers in doing so
        (before 2.13).
        """
        self._agree()
        shapes, here = [torch.empty_like(images.chunk(self.micro_batches)[0], device="meta")], self.device
        for index in range(self.count):
            answer = [
                _output(self.own[str(index)], shapes[-1], here, index, self.count)
                if str(index) in self.own
                else None
            ]
            dist.broadcast_object_list(answer, group_src=index % self.ranks, group=self.group)
            shape, dtype = answer[0]
            handed_on = torch.empty(shape, dtype=dtype, device="meta")
            shapes.append(handed_on.requires_grad_(dtype.is_floating_point))
        staged = here.type == "cuda" and dist.get_backend(self.group) == "gloo"
        self.stages = []
        for name, module in self.own.items():
            module, index = self.wrap(_Sendable(module, here, staged)), int(name)
            place, passed = torch.device("cpu") if staged else here, shapes[index : index + 2]
            self.stages.append(_Stage(module, index, self.count, place, *passed, self.group))
        schedule = SCHEDULES[self.name]
        single = issubclass(schedule.made_by, pipelining.schedules.PipelineScheduleSingle)
        stages = self.stages[0] if single else self.stages
        self.schedule = schedule.made_by(stages, self.micro_batches, loss_fn=self._loss)
        self.shape = images.shape

    def _loss(self, output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        try:
            loss = self.loss_function(output, labels)
        except Exception as error:
            error.add_note(f"in the loss, after stage {self.count - 1} of {self.count}")
            raise
        self.seen.append((output.detach(), labels, loss.detach()))
        return loss

    @torch.no_grad()
    def _check_loss(self) -> None:
        """Raises ValueError if the batch's loss is not the mean of the micro-batches', whose gradients were
        taken.
        """
        if not self.seen:
            return
        outputs, labels, losses = zip(*self.seen, strict=True)
        whole, mean = self.loss_function(torch.cat(outputs), torch.cat(labels)), torch.stack(losses).mean()
        if whole.isfinite() and not abs(whole - mean) <= 1e-4 * max(
            1.0, abs(whole)
        ):  # a mean may be no number
            raise ValueError(
                f"the loss of the batch is {float(whole):.6g}, the mean of its micro-batches' "
                f"{float(mean):.6g}: gradients would "
                "not be the uncut model's; use a plain mean over samples, without class weights, ignored "
                "labels or sums"
            )


def _output(
    module: nn.Module, given: torch.Tensor, device: torch.device, index: int, count: int
) -> tuple[torch.Size, torch.dtype]:
    """Shape and type of what a stage gives; nothing of it is changed."""
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
    return output.shape, output.dtype
