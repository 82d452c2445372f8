"""Channels really removed, along torch-pruning's dependency graph: smaller layers, which are faster.

Each function gives a new model, the given one stays. Needs torch-pruning. Sources: Fang et al. 2023,
"DepGraph: Towards Any Structural Pruning"; Li et al. 2017, "Pruning Filters for Efficient ConvNets".
"""

import copy
import importlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from companion import measure, memory, modules
from companion.pruning import KINDS, PruningError

TARGETS = ("ratio", "macs", "seconds")
_TRIES = 7  # halvings of the interval in which the ratio is looked for


@dataclass(frozen=True)
class Narrowed:
    """A model with fewer channels, and what it has of multiply-accumulates and parameters, before and now."""

    model: nn.Module
    ratio: float
    macs_before: int
    macs: int
    parameters_before: int
    parameters: int

    @property
    def macs_gain(self) -> float:
        return self.macs_before / self.macs

    @property
    def parameters_gain(self) -> float:
        return self.parameters_before / self.parameters


def _torch_pruning() -> ModuleType:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("torch_pruning")
    except ImportError as error:
        raise ImportError(
            f"torch_pruning cannot be imported ({error}): pip install 'accelerating-pytorch[compress]'"
        ) from error


def narrowed(
    model: nn.Module,
    example: torch.Tensor,
    *,
    ratio: float | None = None,
    macs: float | None = None,
    seconds: float | None = None,
    keep: Sequence[str] = (),
) -> Narrowed:
    """The model without the channels whose filters have the smallest L2 norm, in every layer the same share.

    Give one target: the `ratio` of channels to be removed, from 0 to 1; or how many times fewer `macs`; or
    the latency of one call on `example` in `seconds`, measured. The layer that is called last is kept, since
    its channels are the model's outputs, and so are the layers named in `keep`.

    The model must be trained again afterwards. Raises PruningError for targets out of range or not reached,
    for masks that are not permanent, for models that do not run or give other shapes afterwards; ImportError
    without torch-pruning.
    """
    given = {"ratio": ratio, "macs": macs, "seconds": seconds}
    chosen = {name: value for name, value in given.items() if value is not None}
    if len(chosen) != 1:
        raise PruningError(f"give one of {', '.join(TARGETS)}, not {', '.join(chosen) or 'none'}")
    (target, value) = next(iter(chosen.items()))
    lowest = {"ratio": 0, "macs": 1, "seconds": 0}[target]
    if not value > lowest or (target == "ratio" and not value < 1):
        rule = "between 0 and 1" if target == "ratio" else f"greater than {lowest}"
        raise PruningError(f"{target}={value} must be {rule}")
    if target == "ratio":
        return _without(model, example, value, keep)
    return _searched(model, example, keep, target, value)


def _searched(
    model: nn.Module, example: torch.Tensor, keep: Sequence[str], target: str, value: float
) -> Narrowed:
    """The narrowed model with the smallest ratio that reaches the target, by halving."""

    def reached(found: Narrowed) -> bool:
        if target == "macs":
            return found.macs_gain >= value
        with torch.no_grad():
            return measure.latency(lambda: found.model(example)).seconds.median <= value

    low, high, best = 0.0, 0.98, None
    for _ in range(_TRIES):
        middle = (low + high) / 2
        found = _without(model, example, middle, keep)
        if reached(found):
            high, best = middle, found
        else:
            low = middle
    if best is None:
        raise PruningError(f"{target}={value} is not reached, even without {high:.0%} of the channels")
    return best


def _without(model: nn.Module, example: torch.Tensor, ratio: float, keep: Sequence[str]) -> Narrowed:
    pruning = _torch_pruning()
    if masked := [name for name, _ in model.named_buffers() if name.endswith("weight_mask")]:
        raise PruningError(f"{masked[0]} is a mask: make it part of the weights by pruning.permanent first")
    made = copy.deepcopy(model)
    before_eval = modules.modes(made)
    made.eval()
    names = dict(made.named_modules())
    if unknown := [name for name in keep if name not in names]:
        raise PruningError(f"keep names {', '.join(map(repr, unknown))}, which the model does not have")
    shapes = _shapes(made, example)
    kept = [names[name] for name in keep] + [_last(made, example)]
    before = measure.macs(made, example), memory.parameters(made)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of parameters that belong to no layer, which stay as they are
            pruning.pruner.BasePruner(
                made,
                example,
                importance=pruning.importance.GroupMagnitudeImportance(p=2),
                pruning_ratio=ratio,
                ignored_layers=kept,
            ).step()
        found = _shapes(made, example)
    except Exception as error:  # whatever the dependency graph or the smaller model fails with
        said = str(error).strip().splitlines()
        reason = said[0] if said else type(error).__name__
        raise PruningError(
            f"{type(model).__name__} cannot lose {ratio:.0%} of its channels ({reason}); name the layers "
            f"that must stay in keep=[...]"
        ) from error
    if found != shapes:
        raise PruningError(
            f"the outputs' shapes would become {found} instead of {shapes}: name the layer that makes them "
            f"in keep=[...]"
        )
    after = memory.parameters(made)
    if after == before[1]:
        raise PruningError(f"nothing was removed with ratio={ratio}: the layers are too narrow, or all kept")
    modules.restore(before_eval)
    return Narrowed(made, ratio, before[0], measure.macs(made, example), before[1], after)


@torch.no_grad()
def _shapes(model: nn.Module, example: torch.Tensor) -> list[tuple[int, ...]]:
    """The shapes of all tensors that the model gives."""
    return [tuple(leaf.shape) for leaf in tree_leaves(model(example)) if isinstance(leaf, torch.Tensor)]


def _last(model: nn.Module, example: torch.Tensor) -> nn.Module:
    """The convolution or linear layer that is called last."""
    called: list[nn.Module] = []
    hooks = [
        module.register_forward_hook(lambda module, inputs, output: called.append(module))
        for module in model.modules()
        if isinstance(module, KINDS)
    ]
    with torch.no_grad():
        model(example)
    for hook in hooks:
        hook.remove()
    if not called:
        raise PruningError(f"{type(model).__name__} calls neither convolutions nor linear layers")
    return called[-1]


def fresh(model: nn.Module, seed: int = 0) -> nn.Module:
    """A model of the same shape with new random weights, to be trained from scratch beside the pruned one."""
    made = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in made.modules():
            reset: Callable | None = getattr(module, "reset_parameters", None)
            if reset:
                reset()
    return made
