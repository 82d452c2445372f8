"""Whether two models are, or compute, the same: gradients side by side, relative differences,
fingerprints.
"""

import hashlib
from collections.abc import Mapping

import torch
from torch import nn


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """The gradients of the model's parameters that have one, by name, copied to the CPU.

    Names are those of the model inside, where it is wrapped in DDP, nn.DataParallel or torch.compile.
    """
    prefixes = ("module.", "_orig_mod.")
    found = {}
    for name, parameter in model.named_parameters():
        while name.startswith(prefixes):
            name = name.split(".", 1)[1]
        if parameter.grad is not None:
            found[name] = parameter.grad.detach().cpu().clone()
    return found


def difference(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> float:
    """The relative error of all tensors together: the norm of what differs, over the norm of what is
    expected.

    Raises ValueError, naming them, if one has tensors that the other lacks, or of another shape.
    """
    _check(found, expected)
    off = sum((found[name].double() - tensor.double()).square().sum() for name, tensor in expected.items())
    whole = sum(tensor.double().square().sum() for tensor in expected.values())
    return _ratio(off, whole)


def largest_difference(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> float:
    """The largest relative error of any one tensor, as `difference` has it for all of them together."""
    _check(found, expected)
    return max(difference({name: found[name]}, {name: expected[name]}) for name in expected)


def _ratio(off: torch.Tensor | float, whole: torch.Tensor | float) -> float:
    if float(whole) == 0.0:
        return 0.0 if float(off) == 0.0 else float("inf")
    return float(off / whole) ** 0.5


def _check(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    if lacking := sorted(expected.keys() ^ found.keys()):
        raise ValueError(f"only one of the two has {', '.join(lacking)}")
    if other := [name for name in expected if expected[name].shape != found[name].shape]:
        shapes = ", ".join(
            f"{name} {tuple(found[name].shape)}, not {tuple(expected[name].shape)}" for name in other
        )
        raise ValueError(f"tensors have other shapes: {shapes}")
    if not expected:
        raise ValueError("there is nothing to compare: has backward been called?")


def fingerprint(model: nn.Module) -> str:
    """Twelve digits that are equal for models whose weights and buffers are equal to the last bit."""
    digest = hashlib.sha256()
    for _, value in sorted(model.state_dict().items()):  # whatever the order in which they were registered
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]
