"""Weights set to zero by masks: how many, and how well the model bears it. Masks save neither time nor space.

Each function gives a new model, the given one stays. Masks are those of torch.nn.utils.prune, whose modules
keep the weights in `weight_orig` and the mask in `weight_mask`; `training.fit` trains what the masks leave.
What is really smaller is made by `pruning_channels` and `packing`.

Sources: torch's documentation, "torch.nn.utils.prune"; Han et al. 2015, "Learning both Weights and
Connections for Efficient Neural Networks".
"""

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import prune

from companion import measure

KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
METHODS = ("global_l1", "layer_l1", "random")


class PruningError(ValueError):
    """The model cannot be pruned as asked; the message says what to do."""


@dataclass(frozen=True)
class Sparsity:
    """Of the weights of convolutions and linear layers: the share that is zero, by layer and of all together.

    `remaining` is how many are not zero, `fewer` how many times fewer that is.
    """

    by_layer: dict[str, float]
    share: float
    remaining: int
    fewer: float


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """The model's convolutions and linear layers by name. Raises PruningError if there is none."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, KINDS)}
    if not found:
        raise PruningError(f"{type(model).__name__} has neither convolutions nor linear layers to prune")
    return found


def sparsity(model: nn.Module) -> Sparsity:
    """How many of the model's weights are zero, masked or not."""
    weights = {name: module.weight.detach() for name, module in layers(model).items()}
    zeros = {name: int((weight == 0).sum()) for name, weight in weights.items()}
    total = sum(weight.numel() for weight in weights.values())
    remaining = total - sum(zeros.values())
    by_layer = {name: zeros[name] / weight.numel() for name, weight in weights.items()}
    return Sparsity(by_layer, 1 - remaining / total, remaining, total / max(1, remaining))


def copied(model: nn.Module) -> nn.Module:
    """A copy, of masked modules too, which copy.deepcopy refuses once they were called."""
    memo = {}
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, prune.BasePruningMethod):
                computed = getattr(module, hook._tensor_name)  # anew before each call, from what is copied
                memo[id(computed)] = computed.detach().clone()
    return copy.deepcopy(model, memo)


def masked(
    model: nn.Module,
    amount: float,
    method: str = "global_l1",
    names: Sequence[str] | None = None,
    seed: int = 0,
) -> nn.Module:
    """The model with masks: the share `amount` (0 to 1) of its weights is zero, earlier masks included.

    "global_l1" takes the smallest weights of all layers together, "layer_l1" the smallest of each layer, and
    "random" any. `names` are the layers; None is all of them. Biases are left alone.

    Raises PruningError for an amount outside [0, 1), an unknown method or layer, and where a layer would lose
    all of its weights.
    """
    if not 0 <= amount < 1:
        raise PruningError(f"amount={amount} is not a share of the weights: give 0 or more, less than 1")
    if method not in METHODS:
        raise PruningError(f"method={method!r} is unknown; use one of {', '.join(map(repr, METHODS))}")
    made = permanent(model)
    found = layers(made)
    if unknown := [name for name in names or () if name not in found]:
        raise PruningError(f"no convolution or linear layer is called {', '.join(map(repr, unknown))}")
    chosen = {name: found[name] for name in (found if names is None else names)}
    for name, mask in _masks(chosen, amount, method, seed).items():
        if not mask.any():
            raise PruningError(f"amount={amount} leaves no weight in {name}: take less, or other layers")
        prune.custom_from_mask(chosen[name], "weight", mask)
    return made


def _masks(chosen: dict[str, nn.Module], amount: float, method: str, seed: int) -> dict[str, torch.Tensor]:
    """A mask for each layer: True where the weight stays."""
    generator = torch.Generator().manual_seed(seed)
    scores = {name: module.weight.detach().abs() for name, module in chosen.items()}
    if method == "random":  # what is zero already goes first
        scores = {
            name: torch.rand(score.shape, generator=generator).to(score.device) * (score > 0)
            for name, score in scores.items()
        }
    if method == "layer_l1":
        return {name: _largest(score.flatten(), amount).view_as(score) for name, score in scores.items()}
    kept = _largest(torch.cat([score.flatten() for score in scores.values()]), amount)
    parts = kept.split([score.numel() for score in scores.values()])
    return {name: part.view_as(scores[name]) for name, part in zip(scores, parts, strict=True)}


def _largest(scores: torch.Tensor, amount: float) -> torch.Tensor:
    """True for all of the scores `[N]` but the smallest `amount` of them."""
    order = scores.argsort()
    kept = torch.ones_like(scores, dtype=torch.bool)
    kept[order[: round(amount * len(scores))]] = False
    return kept


def permanent(model: nn.Module) -> nn.Module:
    """The model without masks, its weights zero where they were masked."""
    made = copied(model)
    for module in made.modules():
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, prune.BasePruningMethod):
                prune.remove(module, hook._tensor_name)
    return made


def rewound(ticket: nn.Module, first: nn.Module) -> nn.Module:
    """The masks of `ticket` on the weights of `first`, the same model before it was trained.

    Source: Frankle and Carbin 2019, "The Lottery Ticket Hypothesis".
    """
    made, masks = copied(first), layers(ticket)
    for name, module in layers(made).items():
        prune.custom_from_mask(module, "weight", masks[name].weight.detach() != 0)
    return made


def cubic(amount: float, steps: int, start: float = 0.0) -> list[float]:
    """Shares to be masked one after the other: large steps first, small ones towards `amount`.

    Source: Zhu and Gupta 2017, "To prune, or not to prune", equation 1.
    """
    return [amount + (start - amount) * (1 - step / steps) ** 3 for step in range(1, steps + 1)]


def gradual(
    model: nn.Module,
    amounts: Sequence[float],
    train: Callable[[nn.Module], object],
    method: str = "global_l1",
) -> nn.Module:
    """Masks the first amount and trains what is left, then the second, and so on; gives the masked model."""
    made = model
    for amount in amounts:
        made = masked(made, amount, method)
        train(made)
    return made


def sensitivity(
    model: nn.Module,
    evaluate: Callable[[nn.Module], float],
    amounts: Sequence[float] = (0.25, 0.5, 0.75, 0.9),
) -> dict[str, list[float]]:
    """What `evaluate` says when one layer alone loses its smallest weights: name -> one for each amount."""
    return {
        name: [evaluate(masked(model, amount, "layer_l1", [name])) for amount in amounts]
        for name in layers(model)
    }


def two_of_four(matrix: torch.Tensor) -> torch.Tensor:
    """A copy of a matrix `[N, M]` in which of each four neighbours in a row the two smallest are zero."""
    fours = matrix.reshape(-1, 4)
    return fours.scatter(1, fours.abs().argsort(1)[:, :2], 0).view_as(matrix)


def semi_structured_gain(size: int, rounds: int = 15, seed: int = 0) -> measure.Spread:
    """How much faster a GPU multiplies a float16 matrix `[size, size]`, of which `two_of_four` left half, by
    another one when it is stored as semi-structured (2:4), over the same matrix stored with its zeros.

    Needs compute capability 8.0 or higher. Raises PruningError if the products differ.
    """
    generator = torch.Generator("cuda").manual_seed(seed)
    options = {"device": "cuda", "dtype": torch.float16, "generator": generator}
    dense, right = two_of_four(torch.randn(size, size, **options)), torch.randn(size, size, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the API is a prototype
        halved = torch.sparse.to_sparse_semi_structured(dense)
    expected = (dense @ right).float()
    apart = (((halved @ right).float() - expected).norm() / expected.norm()).item()
    if not apart < 0.01:
        raise PruningError(f"the semi-structured product differs by {apart:.1%}")
    both = {"dense": lambda: dense @ right, "2:4": lambda: halved @ right}
    return measure.compare(both, torch.device("cuda"), rounds).speed_up("2:4", over="dense")
