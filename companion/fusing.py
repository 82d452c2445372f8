"""Layers that can become one: found by following the model's forward."""

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import fx, nn

_FUSED = [
    (nn.Conv2d, nn.BatchNorm2d, nn.ReLU),
    (nn.Conv2d, nn.BatchNorm2d),
    (nn.Conv2d, nn.ReLU),
    (nn.Linear, nn.ReLU),
]


def fusible(model: nn.Module) -> list[list[str]]:
    """Layers that follow each other and can become one: convolution, BatchNorm and ReLU, or linear and ReLU.

    A ReLU that is used several times stands in several groups, if each of its uses can become part of one.
    Any other module that is used more than once is left alone: fused with one user, it would be gone for the
    others.
    """
    after, uses = _followers(model)
    groups = _groups(model, after)
    ends = Counter(group[-1] for group in groups)
    shared = {name for name, count in uses.items() if count > 1 and ends[name] != count}
    return _groups(model, {name: next_one for name, next_one in after.items() if next_one not in shared})


def fused(model: nn.Module, groups: Sequence[Sequence[str]], fuse_modules: Callable) -> nn.Module:
    """The model with each group as one layer, by torch's `fuse_modules` or `fuse_modules_qat`; changes it."""
    ends: set[str] = set()
    for group in groups:
        if group[-1] in ends:  # a ReLU that several groups share, gone with an earlier one
            model.set_submodule(group[-1], nn.ReLU())
        model = fuse_modules(model, [list(group)])
        ends.add(group[-1])
    return model


def _groups(model: nn.Module, after: dict[str, str]) -> list[list[str]]:
    groups: list[list[str]] = []
    for name in after:
        for pattern in _FUSED:
            chain = [name]
            while len(chain) < len(pattern) and chain[-1] in after:
                chain.append(after[chain[-1]])
            kinds = tuple(type(model.get_submodule(part)) for part in chain)
            if kinds == pattern and not any(name in group for group in groups):
                groups.append(chain)
    return groups


def _followers(model: nn.Module) -> tuple[dict[str, str], Counter[str]]:
    """The layers, each used once, whose output goes to one other layer alone, and how often each is used.

    name -> name of the other, which is used once too, or is a ReLU.
    """
    try:
        calls = [
            node for node in fx.symbolic_trace(copy.deepcopy(model)).graph.nodes if node.op == "call_module"
        ]
    except Exception:  # whatever fx cannot follow: what stands in an nn.Sequential is plain to see
        return _followers_in_sequences(model)
    used, found = Counter(node.target for node in calls), {}
    for node in calls:
        users = list(node.users)
        if len(users) != 1 or users[0].op != "call_module" or used[node.target] > 1:
            continue
        other = users[0].target
        if used[other] == 1 or isinstance(model.get_submodule(other), nn.ReLU):
            found[node.target] = other
    return found, used


def _followers_in_sequences(model: nn.Module) -> tuple[dict[str, str], Counter[str]]:
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Sequential):
            children = [f"{name}.{child}" if name else child for child, _ in module.named_children()]
            found |= dict(pairwise(children))
    return found, Counter()
