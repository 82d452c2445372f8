"""A model can be cut where one tensor goes on, and nowhere else; stages together are the model."""

import copy

import pytest
import torch
import torchvision
from torch import nn

from companion import models, splitting
from companion.splitting import Layer, SplitError

MODELS = {
    "lenet5": (models.LeNet5, (2, 3, 32, 32)),
    "alexnet": (models.AlexNet, (2, 3, 64, 64)),
    "resnet18": (models.resnet18, (2, 3, 32, 32)),
    "vgg11 (in-place ReLUs)": (lambda: torchvision.models.vgg11(num_classes=10), (1, 3, 32, 32)),
    "vit (attributes read in forward)": (
        lambda: torchvision.models.VisionTransformer(16, 8, 3, 2, 8, 16),
        (2, 3, 16, 16),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_stages_together_are_the_model(name):
    make, shape = MODELS[name]
    model, x = make().eval(), torch.randn(*shape)
    layers = splitting.profile(model, x, 1)
    for count in (1, 2, 3):
        stages = splitting.split(model, splitting.balanced(layers, count))
        assert len(stages) == count
        output = x
        for stage in stages:
            output = stage(output)
            assert not stage.training
        assert torch.equal(output, model(x))
        parameters = {id(p) for stage in stages for p in stage.parameters()}
        assert parameters == {id(p) for p in model.parameters()}
        names = [name for stage in stages for name in stage.state_dict()]
        assert sorted(names) == sorted(model.state_dict()), "a checkpoint of stages is one of the model"


def test_a_sequential_may_do_inside_what_it_likes():
    class Decides(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    model = nn.Sequential(nn.Linear(3, 3), Decides(), nn.Linear(3, 3))
    first, second = splitting.split(model, "1")
    x = torch.randn(2, 3)
    assert torch.equal(second(first(x)), model(x))


class Skip(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return x + self.up(self.down(x))


class Decides(Skip):
    def forward(self, x):
        return self.down(x) if x.sum() > 0 else self.up(x)


class Two(Skip):
    def forward(self, x, y):
        return self.up(self.down(x)) + y


def tied() -> nn.Module:
    layer = nn.Linear(3, 3)
    return nn.Sequential(layer, nn.ReLU(), layer)


REFUSED = [
    (
        Skip,
        ["down"],
        r"Skip cannot be cut after 'down': 2 values would have to be sent \(x, down\); use one of add",
    ),
    (Skip, ["middle"], r"after 'middle': there is no such layer"),
    (Decides, ["down"], r"the forward of Decides cannot be followed: .*control flow.*nn\.Sequential"),
    (Two, ["down"], r"forward takes 2 inputs \(x, y\)"),
    (tied, ["1"], r"stages 0 and 1 share 0\.weight: tied weights cannot be cut apart"),
    (models.LeNet5, ["fc2", "fc1"], r"not in the order of the model"),
    (models.LeNet5, ["fc1", "fc1"], r"each once"),
    (models.LeNet5, ["fc3"], r"nothing comes after 'fc3'"),
    (
        lambda: nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True)),
        ["0"],
        r"the next layer overwrites its input in place",
    ),
]


@pytest.mark.parametrize(("make", "at", "message"), REFUSED)
def test_what_cannot_be_cut_is_explained(make, at, message):
    with pytest.raises(SplitError, match=message):
        splitting.split(make(), at)


def test_profile_leaves_the_model_as_it_was():
    model, x = models.resnet18(), torch.randn(4, 3, 32, 32)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = copy.deepcopy(model.state_dict())
    layers = splitting.profile(model, x, 1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    assert sum(layer.parameter_bytes for layer in layers) == sum(p.nbytes for p in model.parameters())
    assert layers[-1].output_bytes == 4 * 10 * 4
    assert all(layer.forward_seconds > 0 for layer in layers)


def made(*seconds: float) -> list[Layer]:
    return [Layer(f"layer{i}", s / 3, 2 * s / 3, 4, 4) for i, s in enumerate(seconds)]


def test_cuts_are_balanced():
    layers = made(5, 1, 1, 1, 2, 4)
    assert splitting.balanced(layers, 1) == []
    assert splitting.balanced(layers, 2) == ["layer2"]
    assert splitting.stage_seconds(layers, ["layer2"]) == pytest.approx([7, 7])
    assert splitting.stage_seconds(layers, splitting.balanced(layers, 3)) == pytest.approx([5, 5, 4])
    assert splitting.stage_seconds(layers, []) == pytest.approx([14])


def test_every_stage_has_something_to_train():
    layers = [Layer("a", 1, 1, 4, 4), Layer("b", 9, 9, 0, 4), Layer("c", 9, 9, 0, 4), Layer("d", 1, 1, 4, 4)]
    assert splitting.balanced(layers, 2) == ["b"], "the best cut that leaves parameters on both sides"
    with pytest.raises(SplitError, match="2 layers with parameters cannot make 3 stages; use 1 to 2"):
        splitting.balanced(layers, 3)


def test_a_cut_may_come_after_a_block():
    model = models.VisionTransformer(width=16, layers=3, heads=2)
    images = torch.randn(4, 3, 32, 32)
    first, second = splitting.split(model, ["blocks.1"])
    assert torch.allclose(second(first(images)), model(images), atol=1e-6)
    inside = {name.rsplit(".", 2)[0] for name, _ in first.named_parameters() if name.startswith("blocks")}
    assert inside == {"blocks.0", "blocks.1"}
