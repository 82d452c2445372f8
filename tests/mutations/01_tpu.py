"""Ways to break training on XLA, its counts, and its mesh."""

import contextlib

import torch
from mutating import breaks, labels_one_late

from companion import tpu


@breaks("training", before='trained = here("training"')
def labels_of_other_images(notebook):
    """On XLA, labels belong to other images; the plain loop has run before."""
    labels_one_late()


@breaks("mistakes")
def no_step_is_marked(notebook):
    """No step ends."""
    import torch_xla

    torch_xla.step = contextlib.nullcontext


@breaks("other-ways")
def another_optimizer(notebook):
    """The optimizer that never waits is another one."""
    from torch_xla.amp import syncfree

    syncfree.AdamW = torch.optim.SGD


@breaks("checkpoint")
def rounded_on_the_way(notebook):
    """A checkpoint's weights are rounded to half precision."""
    save = torch.save
    torch.save = lambda state, file: save({name: tensor.half() for name, tensor in state.items()}, file)


@breaks("program-grows")
def operations_miscounted(notebook):
    """The longer the program, the more of its operations are overlooked."""
    graph = tpu.graph
    tpu.graph = lambda *tensors: graph(*tensors)[: int(10 * len(graph(*tensors)) ** 0.5)]


@breaks("diagnosis")
def float64_is_overlooked(notebook):
    """The diagnosis does not see operators in float64."""
    diagnose = tpu.diagnose
    tpu.diagnose = lambda step, batches: str(diagnose(step, batches)).replace("\n- float64, ", "\n- ")


@breaks("mesh")
def other_batches_on_the_mesh(notebook):
    """The mesh learns from the batches in another order."""
    spmd = tpu.spmd
    tpu.spmd = lambda count, function, weights, model, batches: spmd(
        count, function, weights, model, batches[::-1]
    )
