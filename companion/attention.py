"""Attention whose products are layers of their own, so that what looks for linear layers finds them."""

import copy

import torch
import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    """What nn.MultiheadAttention computes, with four nn.Linear: `query`, `key`, `value` and `out`.

    Takes and gives what that does, its masks and weights included. Source: Vaswani et al. 2017.
    """

    in_proj_bias = None  # torch's layers ask for these two, and then leave their fused kernel alone
    _qkv_same_embed_dim = False

    def __init__(self, given: nn.MultiheadAttention):
        super().__init__()
        if not can_be_opened(given):
            raise ValueError("bias_k, bias_v and add_zero_attn are not supported")
        self.embed_dim, self.num_heads = given.embed_dim, given.num_heads
        self.dropout, self.batch_first = given.dropout, given.batch_first
        if given.in_proj_weight is None:
            weights = given.q_proj_weight, given.k_proj_weight, given.v_proj_weight
        else:
            weights = given.in_proj_weight.chunk(3)
        biases = (None,) * 3 if given.in_proj_bias is None else given.in_proj_bias.chunk(3)
        self.query, self.key, self.value = map(_linear, weights, biases)
        self.out = _linear(given.out_proj.weight, given.out_proj.bias)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`[N, L, E]`, or `[L, N, E]` without `batch_first`, or `[L, E]`, to the same and the weights
        `[N, L, S]`, by head `[N, H, L, S]`. `is_causal` says what `attn_mask` is, and changes nothing.
        """
        single, places = query.dim() == 2, (query, key, value)
        if single:
            places = tuple(place.unsqueeze(0) for place in places)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            places = tuple(place.transpose(0, 1) for place in places)
        layers = (self.query, self.key, self.value)
        q, k, v = (self._heads(layer(place)) for layer, place in zip(layers, places, strict=True))
        mask = self._mask(attn_mask, key_padding_mask, q)
        weights, p = None, self.dropout if self.training else 0.0
        if need_weights:
            scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), p)
            mixed = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, p)
        out = self.out(mixed.transpose(1, 2).flatten(2))
        if single:
            return out[0], None if weights is None else weights[0]
        return out if self.batch_first else out.transpose(0, 1), weights

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _mask(self, pairs: torch.Tensor | None, keys: torch.Tensor | None, q: torch.Tensor):
        """Both masks as one that is added to the scores `[N, H, L, S]`, or None; True means: not this one."""
        masks = []
        if pairs is not None:
            masks.append(pairs.unflatten(0, q.shape[:2]) if pairs.dim() == 3 else pairs)
        if keys is not None:
            masks.append(keys[:, None, None])
        added = [
            q.new_zeros(mask.shape).masked_fill(mask, -torch.inf)
            if mask.dtype == torch.bool
            else mask.to(q.dtype)
            for mask in masks
        ]
        return sum(added[1:], added[0]) if added else None


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    made.weight = nn.Parameter(weight.detach().clone())
    made.bias = None if bias is None else nn.Parameter(bias.detach().clone())
    return made


def can_be_opened(module: nn.Module) -> bool:
    """Whether it is an nn.MultiheadAttention that `Attention` can stand for."""
    plain = type(module) is nn.MultiheadAttention
    return plain and module.bias_k is None and module.bias_v is None and not module.add_zero_attn


def opened(model: nn.Module) -> nn.Module:
    """A copy of the model with `Attention` for each nn.MultiheadAttention that it can stand for."""
    holder = nn.Module()
    holder.model = copy.deepcopy(model)  # the model itself may be one
    for name, module in list(holder.named_modules()):
        if can_be_opened(module):
            holder.set_submodule(name, Attention(module).train(module.training))
    return holder.model
