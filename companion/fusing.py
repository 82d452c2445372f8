"""Layers that can become one: found by following the model's forward."""

import copy
from collections import Counter
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

    A module that is used more than once is left alone: fused with one user, it would be gone for the others.
    """
    after, groups, taken = _followers(model), [], set()
    for name in after:
        for pattern in _FUSED:
            chain = [name]
            while len(chain) < len(pattern) and chain[-1] in after:
                chain.append(after[chain[-1]])
            kinds = tuple(type(model.get_submodule(part)) for part in chain)
            if kinds == pattern and not taken & set(chain):
                groups.append(chain)
                taken |= set(chain)
    return groups


def _followers(model: nn.Module) -> dict[str, str]:
    """The layers whose output goes to one other layer alone, both used once: name -> name of the other."""
    try:
        calls = [
            node for node in fx.symbolic_trace(copy.deepcopy(model)).graph.nodes if node.op == "call_module"
        ]
    except Exception:  # whatever fx cannot follow: what stands in an nn.Sequential is plain to see
        return _followers_in_sequences(model)
    used, found = Counter(node.target for node in calls), {}
    for node in calls:
        users = list(node.users)
        if (
            len(users) == 1
            and users[0].op == "call_module"
            and used[node.target] == used[users[0].target] == 1
        ):
            found[node.target] = users[0].target
    return found


def _followers_in_sequences(model: nn.Module) -> dict[str, str]:
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Sequential):
            children = [f"{name}.{child}" if name else child for child, _ in module.named_children()]
            found |= dict(pairwise(children))
    return found
