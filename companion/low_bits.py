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

    def __init__(self, bits: int, per_channel: bool):
        super().__init__()
        self.most, self.per_channel = 2 ** (bits - 1) - 1, per_channel

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        largest = weight.detach().abs()
        largest = (
            largest.flatten(1).amax(1).view(-1, *[1] * (weight.dim() - 1))
            if self.per_channel
            else largest.amax()
        )
        scale = largest.clamp_min(1e-12) / self.most
        rounded = (weight / scale).round().clamp(-self.most, self.most) * scale
        return weight + (rounded - weight).detach()


def rounded(model: nn.Module, bits: int, per_channel: bool = True) -> nn.Module:
    """The model with weights of `bits` bits, from 2 to 8, simulated in float: what they cost in accuracy, not
    in time.

    Convolutions and linear layers only. It can be trained on: the float weights below learn, the rounded ones
    compute.
    """
    if not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ValueError(f"bits={bits!r} must be a whole number from 2 to 8")
    made = copy.deepcopy(model)
    found = [module for module in made.modules() if isinstance(module, LAYERS)]
    if not found:
        raise ValueError("nothing was quantized: it has neither convolutions nor linear layers")
    for module in found:
        parametrize.register_parametrization(module, "weight", _Rounded(bits, per_channel))
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
