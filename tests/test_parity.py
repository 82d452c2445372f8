"""Differences between models are found, named, and measured."""

import pytest
import torch
from torch import nn

from companion import parity


def test_fingerprints_tell_models_apart():
    torch.manual_seed(0)
    first, second = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    assert parity.fingerprint(first) == parity.fingerprint(second)
    second(torch.randn(4, 3))
    assert parity.fingerprint(first) != parity.fingerprint(second), "buffers count"
    assert parity.fingerprint(nn.Linear(2, 2).bfloat16()) != parity.fingerprint(nn.Linear(2, 2).bfloat16())


def test_gradients_have_the_names_of_the_model_inside():
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, x):
            return self.module(x)

    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    net[1].bias.requires_grad_(False)
    Wrapper(net)(torch.ones(4, 2)).sum().backward()
    found = parity.gradients(Wrapper(net))
    assert list(found) == ["0.weight", "0.bias", "1.weight"]
    assert parity.difference(found, parity.gradients(net)) == 0
    net.zero_grad(set_to_none=False)
    assert found["0.weight"].norm() > 0, "a copy"


def test_differences_are_relative_to_what_is_expected():
    expected = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([0.01])}
    found = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([0.02])}
    assert parity.difference(found, expected) == pytest.approx(0.01 / 5, rel=1e-3)
    assert parity.largest_difference(found, expected) == pytest.approx(1.0)
    zero = {"a": torch.zeros(2)}
    assert parity.difference(zero, zero) == 0
    assert parity.difference({"a": torch.ones(2)}, zero) == float("inf")


def test_what_cannot_be_compared_is_named():
    a, b = {"x": torch.ones(2), "y": torch.ones(2)}, {"x": torch.ones(2)}
    with pytest.raises(ValueError, match="only one of the two has y"):
        parity.difference(a, b)
    with pytest.raises(ValueError, match=r"other shapes: x \(2,\), not \(3,\)"):
        parity.largest_difference(b, {"x": torch.ones(3)})
    with pytest.raises(ValueError, match="has backward been called"):
        parity.difference({}, {})
