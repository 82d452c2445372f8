"""Errors are found at the layer that makes them, and grow with coarser numbers."""

import torch

from companion import models, quantization
from companion import quantization_errors as errors


def test_each_layer_has_its_error(trained_lenet, digits):
    images = digits.test.images[:64]
    made = quantization.static(trained_lenet, [digits.train.images[:64]])
    found = errors.by_layer(trained_lenet, made, images)
    assert list(found) == ["conv1", "conv2", "fc1", "fc2", "fc3"]
    assert all(0 < error < 0.1 for error in found.values())
    assert not any(module._forward_hooks for model in (trained_lenet, made) for module in model.modules())
    plain = quantization.static(trained_lenet, [digits.train.images[:64]], fuse=[])
    assert all(0 < error < 0.1 for error in errors.by_layer(trained_lenet, plain, images).values())


def test_a_damaged_layer_is_seen_where_it_is(trained_lenet, digits):
    made = quantization.static(trained_lenet, [digits.train.images[:64]])
    made.module.fc1.scale *= 64
    found = errors.by_layer(trained_lenet, made, digits.test.images[:64])
    assert found["fc1"] > 10 * found["conv2"]


def test_dynamic_layers_too():
    torch.manual_seed(0)
    model = models.LSTMClassifier(8, 32).train()
    found = errors.by_layer(model, quantization.dynamic(model), torch.randn(4, 6, 8))
    assert set(found) == {"lstm", "head"}
    assert all(0 < error < 0.1 for error in found.values())
    assert model.training, "the mode is kept"
