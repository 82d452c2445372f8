"""Data parallel times model parallel: a model laid out over a mesh of ranks, by what torch has for each part.

Everything here is called in each rank, where the default process group is ready, with the same model and the
same weights everywhere.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from companion import ddp, launch, memory, modules, parity, splitting
from companion.layouts import Layout
from companion.pipeline import Pipeline

STYLES = {"column": ColwiseParallel, "row": RowwiseParallel}


def mesh_of(layout: Layout) -> DeviceMesh:
    """The ranks as a mesh of "pipeline" x "data" x "tensor": neighbours share a layer, since that sends most.

    Raises ValueError if the layout's product is not the world size.
    """
    if layout.devices != dist.get_world_size():
        raise ValueError(f"{layout} needs {layout.devices} ranks; there are {dist.get_world_size()}")
    shape = (layout.pipeline, layout.data, layout.tensor)
    return init_device_mesh(launch.device().type, shape, mesh_dim_names=("pipeline", "data", "tensor"))


def check_equal(model: nn.Module) -> None:
    """Raises ValueError, on all ranks, unless all have a model with the same parameters and values."""
    own = [
        (name, tuple(p.shape), parity.fingerprint(nn.ParameterList([p])))
        for name, p in model.named_parameters()
    ]
    every: list[list] = [[]] * dist.get_world_size()
    dist.all_gather_object(every, own)
    for rank, other in enumerate(every):
        if other != every[0]:
            differing = [mine[0] for mine, first in zip(other, every[0], strict=False) if mine != first]
            what = differing[0] if differing else "the number of parameters"
            raise ValueError(f"rank {rank} has another model than rank 0: {what} differs; seed all alike")


def laid_out(
    model: nn.Module,
    layout: Layout,
    mesh: DeviceMesh,
    *,
    split: Mapping[str, str] | None = None,
    shard: Iterable[nn.Module] = (),
) -> nn.Module:
    """The model, changed in place, on a mesh without stages: tensor parallel first, then data parallel.

    `split` says which Linear layers are split, by name: "column" those whose outputs are shared out, "row"
    those that take such outputs and add up. `shard` are the modules that are gathered one at a time where the
    layout shards parameters (FSDP2), such as a transformer's blocks; else DDP averages gradients.

    Raises ValueError, before anything is sent, for a layout that this model or this function cannot have.
    """
    _check(model, layout, split or {})
    check_equal(model)
    modules.move(model, launch.device())
    if layout.tensor > 1:
        plan = {name: STYLES[style]() for name, style in split.items()}
        parallelize_module(model, mesh["tensor"], plan)
    if layout.data == 1:
        return model
    if layout.sharding == "parameters":
        for module in shard:
            fully_shard(module, mesh=mesh["data"])
        return fully_shard(model, mesh=mesh["data"])
    return ddp.wrap(model, process_group=mesh["data"].get_group())


def _check(model: nn.Module, layout: Layout, split: Mapping[str, str]) -> None:
    if layout.pipeline > 1:
        raise ValueError(f"{layout} has stages: use hybrid.pipelined")
    if layout.sharding not in ("none", "parameters"):
        raise ValueError(f"sharding={layout.sharding!r} is not offered here; use 'none' or 'parameters'")
    if layout.tensor == 1:
        return
    if layout.data > 1 and layout.sharding == "none":
        raise ValueError(f"{layout}: DDP takes no split layers; use sharding='parameters'")
    if not split:
        raise ValueError(f"{layout}: say which layers are split, such as split={{'0.up': 'column'}}")
    modules = dict(model.named_modules())
    for name, style in split.items():
        if style not in STYLES:
            raise ValueError(f"split[{name!r}]={style!r} is unknown; use one of {', '.join(STYLES)}")
        layer = modules.get(name)
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"split[{name!r}]: the model has no Linear layer of this name")
        features = layer.out_features if style == "column" else layer.in_features
        if features % layout.tensor:
            raise ValueError(f"tensor={layout.tensor} does not divide the {features} features of {name}")


def pipelined(
    model: nn.Module,
    at: Sequence[str],
    layout: Layout,
    mesh: DeviceMesh,
    schedule: str = "1f1b",
    loss_function: Callable = F.cross_entropy,
) -> Pipeline:
    """This rank's stage of the model, cut after the layers `at`, in a pipeline of its own data rank; DDP
    averages its gradients with those of the same stage of the other pipelines.

    Raises ValueError, on all ranks, for a stage without parameters, and for what `pipelined` does not offer.
    """
    if layout.tensor > 1 or layout.sharding != "none":
        raise ValueError(f"{layout}: stages are neither split nor sharded here")
    check_equal(model)
    stages = splitting.split(model, at)
    for index, stage in enumerate(stages):
        if not any(p.requires_grad for p in stage.parameters()):
            raise ValueError(f"stage {index} of {len(stages)} has no parameters to train; cut elsewhere")
    data = mesh["data"].get_group()

    def wrap(stage: nn.Module) -> nn.Module:
        return ddp.wrap(stage, process_group=data) if layout.data > 1 else stage

    pipelines = mesh["pipeline"].get_group()
    return Pipeline(stages, schedule, layout.micro_batches, loss_function, group=pipelines, wrap=wrap)


def share(batch: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """This data rank's part of a batch `[N, ...]`, which all ranks have; ranks that share a layer or a
    pipeline get the same one.
    """
    return batch.chunk(mesh["data"].size())[mesh["data"].get_local_rank()]


def mean_loss(loss: torch.Tensor, mesh: DeviceMesh) -> float:
    """The mean over the data ranks of a loss that each took over its share."""
    total = loss.detach().clone()
    dist.all_reduce(total, group=mesh["data"].get_group())
    return total.item() / mesh["data"].size()


def own_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the parts of these tensors that this rank holds."""
    return sum(memory.local(tensor).nbytes for tensor in tensors)


def held_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """What this rank keeps between two steps: bytes of parameters, gradients and optimizer state, counted
    from tensors (the memory of the process would mislead: it keeps what was freed).
    """
    parameters = list(model.parameters())
    states = [value for state in optimizer.state.values() for value in state.values()]
    return {
        "parameters": own_bytes(parameters),
        "gradients": own_bytes(p.grad for p in parameters if p.grad is not None),
        "optimizer state": own_bytes(t for t in states if isinstance(t, torch.Tensor) and t.dim()),
    }


def whole_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's parameters by name, put together from all ranks' parts; called by all ranks together."""
    return {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        for name, p in model.named_parameters()
    }
