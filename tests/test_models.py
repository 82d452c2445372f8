import pytest
import torch
from torch import nn

from companion import memory, models


@pytest.mark.parametrize(
    ("name", "size", "count"), [("lenet5", 32, 62_006), ("resnet18", 32, 11_173_962), ("alexnet", 64, None)]
)
def test_models_give_logits_of_the_right_shape(name, size, count):
    model = models.create(name).eval()
    assert model(torch.randn(2, 3, size, size)).shape == (2, 10)
    assert count is None or memory.parameters(model) == count


@pytest.mark.parametrize(
    "model", [models.LSTMClassifier(4, 8), models.EncoderClassifier(4, 6, width=16, layers=2, heads=2)]
)
def test_models_of_sequences_read_all_of_their_steps(model):
    model, x = model.eval(), torch.randn(3, 6, 4, requires_grad=True)
    logits = model(x)
    assert logits.shape == (3, 10)
    logits.sum().backward()
    assert (x.grad.abs().sum((0, 2)) > 0).all()


def test_lenet5_has_the_books_configurable_layers():
    model = models.create("lenet5", nodes_1=32, nodes_2=16, classes=7)
    assert [tuple(layer.weight.shape) for layer in (model.fc1, model.fc2, model.fc3)] == [
        (32, 400),
        (16, 32),
        (7, 16),
    ]


def test_alexnet_has_torchvisions_parts_and_scales():
    model = models.create("alexnet", width=0.5)
    features = model.features(torch.randn(2, 3, 64, 64))
    assert model.avgpool(features).shape == (2, 128, 4, 4)
    assert memory.parameters(model) < memory.parameters(models.create("alexnet")) / 2


def test_unknown_model_is_refused_with_the_nearest():
    with pytest.raises(
        ValueError,
        match=r"unknown model 'LeNet': use one of lenet5, resnet18, alexnet .* did you mean 'lenet5'\?",
    ):
        models.create("LeNet")


def test_a_users_own_model_is_found_by_name():
    assert isinstance(models.create("torch.nn:Linear", in_features=3, out_features=2), nn.Linear)
    with pytest.raises(ValueError, match=r"torch\.nn has no 'Nonsense'"):
        models.create("torch.nn:Nonsense")
    with pytest.raises(ValueError, match="No module named 'no_such_package'"):
        models.create("no_such_package:f")
    with pytest.raises(TypeError, match=r"gave a dict, not a torch\.nn\.Module"):
        models.create("builtins:dict")
