"""Weights of few bits, simulated in float: what 2, 3 or 4 bits cost in accuracy, and what training gives
back.
"""

import copy

import torch
from torch import nn
from torch.nn.utils import parametrize

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class _Rounded(nn.Module):
    """Weights rounded to `bits` bits, symmetric about 0; gradients pass as if they were not
    (straight-through).

    Source: Bengio, Leonard and Courville 2013, "Estimating or Propagating Gradients Through Stochastic
    Neurons".
    """

    def __init__(self, bits: int, per_channel: bool, kept: torch.Tensor | None):
        super().__init__()
        self.most, self.per_channel = 2 ** (bits - 1) - 1, per_channel
        self.register_buffer("kept", kept, persistent=False)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        weight = weight if self.kept is None else weight * self.kept
        largest = weight.detach().abs()
        largest = (
            largest.flatten(1).amax(1).view(-1, *[1] * (weight.dim() - 1))
            if self.per_channel
            else largest.amax()
        )
        scale = largest.clamp_min(1e-12) / self.most
        rounded = (weight / scale).round().clamp(-self.most, self.most) * scale
        return weight + (rounded - weight).detach()


def rounded(model: nn.Module, bits: int, per_channel: bool = True, keep_zeros: bool = False) -> nn.Module:
    """The model with weights of `bits` bits, from 2 to 8, simulated in float: for accuracy, not for speed.

    Convolutions and linear layers only. It can be trained on: the float weights below learn, the rounded ones
    compute. With `keep_zeros`, weights that are zero now stay so, as in a pruned model. `fixed` ends it.
    """
    if not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ValueError(f"bits={bits!r} must be a whole number from 2 to 8")
    made = copy.deepcopy(model)
    found = [module for module in made.modules() if isinstance(module, LAYERS)]
    if not found:
        raise ValueError("nothing was quantized: it has neither convolutions nor linear layers")
    for module in found:
        kept = module.weight.detach() != 0 if keep_zeros else None
        parametrize.register_parametrization(module, "weight", _Rounded(bits, per_channel, kept))
    return made


def fixed(model: nn.Module) -> nn.Module:
    """The model of `rounded` as a plain one, whose weights are the rounded values."""
    made = copy.deepcopy(model)
    for module in made.modules():
        if isinstance(module, LAYERS) and parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
            module.weight.data += 0.0  # no -0.0 among the zeros
    return made


def packed_bytes(model: nn.Module, bits: int, per_channel: bool = True) -> int:
    """Bytes that the weights of convolutions and linear layers would take, packed, with a float32 scale for
    each channel or tensor; everything else counts as it is."""
    total = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    for module in model.modules():
        if isinstance(module, LAYERS):
            scales = len(module.weight) if per_channel else 1
            total += -module.weight.nbytes + -(-module.weight.numel() * bits // 8) + 4 * scales
    return total
