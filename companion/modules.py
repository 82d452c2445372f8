"""What must stay as it is when somebody's model is used: the mode of each module, and the weights they share.

A module that was frozen in eval mode, such as a BatchNorm in fine-tuning, stays frozen; weights that two
layers share stay shared on every device.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def modes(model: nn.Module) -> dict[nn.Module, bool]:
    """Whether each module of the model is in training mode."""
    return {module: module.training for module in model.modules()}


def restore(modes: dict[nn.Module, bool]) -> None:
    """Brings each module back into the mode that `modes` found."""
    for module, training in modes.items():  # a parent comes before its children, and takes them along
        if module.training != training:
            module.train(training)


def for_training(model: nn.Module) -> dict[nn.Module, bool]:
    """Puts the model into the modes to train in, and gives them. A model in training mode keeps the modules
    that are in eval mode; one that is in eval mode as a whole is put into training mode as a whole.
    """
    if not model.training:
        model.train()
    return modes(model)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The whole model in eval mode; afterwards each module in the mode in which it was."""
    before = modes(model)
    model.eval()
    try:
        yield
    finally:
        restore(before)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Afterwards the model's buffers (BatchNorm's statistics), its gradients, and torch's random numbers on
    the CPU and on the model's GPUs are as they were.
    """
    buffers = [(table, name, table[name], table[name].clone()) for table, name in _buffers(model)]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    gpus = {tensor.device for tensor in (*model.parameters(), *model.buffers()) if tensor.is_cuda}
    try:
        with torch.random.fork_rng(devices=gpus):
            yield
    finally:
        with torch.no_grad():
            for table, name, buffer, before in buffers:
                table[name] = buffer.copy_(before)
        for parameter, before in gradients:
            parameter.grad = before


def _buffers(model: nn.Module) -> list[tuple[dict, str]]:
    tables = [module._buffers for module in _own(model)]
    return [(table, name) for table in tables for name in table if table[name] is not None]


def memory_key(tensor: torch.Tensor) -> tuple[str, int]:
    """Equal for tensors that begin at the same memory; by identity where memory has no address."""
    plain = type(tensor) in (torch.Tensor, nn.Parameter) and tensor.device.type in ("cpu", "cuda")
    address = tensor.data_ptr() if plain and tensor.layout == torch.strided and tensor.numel() else 0
    return ("address", address) if address else ("object", id(tensor))


def move(
    model: nn.Module, device: torch.device, memory_format: torch.memory_format = torch.preserve_format
) -> nn.Module:
    """The model itself, on a device. Parameters and buffers that are one tensor stay one: torch's own `to`
    makes several of it where it makes new tensors, as on XLA.

    Raises ValueError for parameters that are several tensors over the same memory, which would come apart.
    """
    entries = [(table, name) for table in _tables(model) for name in table if table[name] is not None]
    shared, places = defaultdict(list), defaultdict(dict)
    for table, name in entries:
        shared[id(table[name])].append((table, name))
        places[memory_key(table[name])][id(table[name])] = table[name]
    moves = any(_elsewhere(table[name], device) for table, name in entries)
    for tensors in places.values():
        if moves and len(tensors) > 1:
            names = [name for name, tensor in _named(model) if id(tensor) in tensors]
            raise ValueError(
                f"{' and '.join(names)} are several tensors over the same memory, and would be trained apart "
                f"on {device}: make them one, as in `model.b.weight = model.a.weight`"
            )
    model.to(device, memory_format=memory_format)
    for (first, its_name), *others in shared.values():
        for table, name in others:
            table[name] = first[its_name]
    return model


def _elsewhere(tensor: torch.Tensor, device: torch.device) -> bool:
    """Whether it is on another device; "cuda" without a number means each of them."""
    return tensor.device.type != device.type or device.index not in (None, tensor.device.index)


def _tables(model: nn.Module) -> list[dict[str, torch.Tensor | None]]:
    return [table for module in _own(model) for table in (module._parameters, module._buffers)]


def _own(model: nn.Module) -> list[nn.Module]:
    """Its modules, but for scripted ones: those keep their tensors to themselves."""
    return [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]


def _named(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    parameters = model.named_parameters(remove_duplicate=False)
    return [*parameters, *model.named_buffers(remove_duplicate=False)]
