"""Two training steps as the TPU compiler gets them, run by jax on the CPU, against PyTorch's own: a program.

    .venv-preflight/bin/python -m tests.preflight_values

Prints, for each model, how far loss, parameters and buffers are apart, relative to the largest value.
"""

import copy
import json
import os

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import torch
import torch.nn.functional as F
from torch import nn
from torchax.ops.mappings import j2t, t2j

from companion import models, preflight, preflight_child

STEPS = 2


class Tied(nn.Module):
    """An embedding whose weights give the answers too, and attention with a mask that is a buffer."""

    def __init__(self, words=50, width=16, steps=6):
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.block = nn.TransformerEncoderLayer(width, 2, 32, dropout=0.0, batch_first=True)
        self.answer = nn.Linear(width, words)
        self.answer.weight = self.words.weight
        mask = torch.triu(torch.full((steps, steps), float("-inf")), 1)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x):
        return self.answer(self.block(self.words(x), src_mask=self.mask)).flatten(0, 1)


def normalised():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
    net[0].bias.requires_grad_(False)
    return net


def cases():
    images, labels = torch.randn(8, 3, 8, 8), torch.randint(0, 10, (8,))
    sgd, adam, adamw = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
    yield "LeNet5", models.LeNet5(), torch.randn(8, 3, 32, 32), labels, sgd, {"lr": 0.1}
    options = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}
    yield "BatchNorm, a frozen bias", normalised(), images, labels, sgd, options
    yield "BatchNorm, AdamW", normalised(), images, labels, adamw, {"lr": 1e-2, "weight_decay": 0.1}
    words = torch.randint(0, 50, (4, 6))
    # No Adam here: a bias of attention's keys has a gradient of 0 but for rounding, which Adam scales up.
    yield "tied embedding", Tied(), words, words.flatten(), sgd, options
    sequences = torch.randn(4, 5, 6)
    yield "LSTM", models.LSTMClassifier(6, 8), sequences, torch.randint(0, 10, (4,)), adamw, {"lr": 1e-2}
    yield "BatchNorm, Adam", normalised(), images, labels, adam, {"lr": 1e-2, "weight_decay": 0.01}


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    differs = one != other  # an infinite entry of a mask is equal, and has no difference
    if not differs.any():
        return 0.0
    return ((one - other)[differs].abs().max() / other[differs].abs().max()).item()


def stepped(model, inputs, target, groups):
    """Losses, and what the model holds after the steps, by jax."""
    copied = copy.deepcopy(model)  # it gets hooks
    step = jax.jit(preflight_child.step_of(copied, F.cross_entropy, groups, "float32"))
    weights, rest = (jax.tree.map(t2j, part) for part in preflight_child.parts(model, groups))
    state, losses = preflight_child.states(groups, weights), []
    for number in range(STEPS):
        key = jax.random.key(number)
        weights, rest, state, loss = step(weights, rest, state, (t2j(inputs),), t2j(target), key)
        losses.append(float(loss))
    return losses, {name: j2t(value) for name, value in {**weights, **rest}.items()}


def main() -> None:
    found = {}
    for name, model, inputs, target, kind, options in cases():
        torch.manual_seed(0)
        optimizer = kind(model.parameters(), **options)
        losses, after = stepped(model, inputs, target, preflight.groups(model, optimizer))
        right = []
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), target)
            loss.backward()
            optimizer.step()
            right.append(loss.item())
        held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        assert set(after) == set(held), set(after) ^ set(held)
        found[name] = {
            "loss": max(abs(a - b) / abs(b) for a, b in zip(losses, right, strict=True)),
            "tensors": max(apart(after[key], held[key].detach()) for key in held),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
