"""What stays as it is when somebody's model is used: modes of modules, ties of weights."""

import subprocess

import pytest
import torch
from torch import nn

from companion import data, datasets, devices, measure, modules, quantization_errors, training


def toy(shape: tuple[int, ...] = (3, 8, 8), classes: int = 10) -> data.Splits:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(32, *shape, generator=generator) + 5
    split = data.Split(images, torch.randint(0, classes, (32,), generator=generator))
    return data.Splits("toy", split, split, split, datasets.DIGITS, torch.zeros(3, 1, 1), torch.ones(3, 1, 1))


@pytest.fixture
def splits() -> data.Splits:
    return toy()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.norm(self.conv(x)))


def network() -> nn.Sequential:
    return nn.Sequential(Block(), nn.Sequential(nn.Flatten(), nn.Linear(144, 10)))


def freeze(model: nn.Module, *names: str) -> nn.Module:
    for name in names:
        model.get_submodule(name).eval().requires_grad_(False)
    return model


FROZEN = [("0.norm",), ("0.drop",), ("0",), ("1",), ("0.norm", "1.1")]


@pytest.mark.parametrize("names", FROZEN)
def test_evaluate_leaves_each_module_in_its_mode(splits, names):
    model = freeze(network().train(), *names)
    before = modules.modes(model)
    training.evaluate(model, splits.val)
    assert modules.modes(model) == before

    def broken(module, args):
        raise RuntimeError("on purpose")

    model[1].register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="on purpose"):
        training.evaluate(model, splits.val)
    assert modules.modes(model) == before


@pytest.mark.parametrize("names", FROZEN)
def test_fit_trains_what_is_not_frozen_and_only_that(splits, names):
    model = freeze(network().train(), *names)
    before = modules.modes(model)
    frozen = {f"{name}.{key}" for name in names for key in model.get_submodule(name).state_dict()}
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    training.fit(model, splits, training.Recipe(epochs=2, batch_size=16), device="cpu", progress=False)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, weights[name])}
    assert modules.modes(model) == before
    assert changed == set(weights) - frozen


def test_a_model_in_eval_mode_is_trained_as_a_whole(splits):
    model = network().eval()
    before = model[0].norm.running_mean.clone()
    training.fit(model, splits, training.Recipe(epochs=1, batch_size=16), device="cpu", progress=False)
    assert all(module.training for module in model.modules())
    assert not torch.equal(model[0].norm.running_mean, before)


def test_a_step_that_changes_modes_does_not_change_those_of_the_next_epoch(splits):
    model, seen = freeze(network().train(), "0.norm"), []

    def step(model, images, labels, loss_function, optimizer):
        seen.append((model.training, model[0].drop.training, model[0].norm.training))
        loss = training.plain_step(model, images, labels, loss_function, optimizer)
        model.eval()
        return loss

    recipe = training.Recipe(epochs=3, batch_size=32)
    training.fit(model, splits, recipe, device="cpu", step=step, progress=False)
    assert seen == [(True, True, False)] * 3


def test_measuring_leaves_frozen_modules_alone(splits):
    model = freeze(network().train(), "0.norm")
    before = model[0].norm.running_mean.clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    batches = [(splits.train.images[:8], splits.train.labels[:8])]
    measure.step_profile(model, batches, optimizer, torch.device("cpu"), steps=2)
    assert torch.equal(model[0].norm.running_mean, before)
    quantization_errors._outputs(model, ["0.conv"], splits.train.images[:4])
    assert model.training
    assert not model[0].norm.training


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self.last.weight = self.first.weight
        self.register_buffer("scale", torch.ones(8))
        self.first.register_buffer("scale", self.scale)

    def forward(self, x):
        return self.last(self.first(x) * self.scale)


@pytest.mark.parametrize("place", ["cpu", "meta", "xla"])
def test_shared_weights_stay_shared_on_each_device(place):
    if place == "xla" and (reason := devices.why_not("xla")):
        pytest.skip(reason)
    model = Tied()
    device = devices.select("xla") if place == "xla" else torch.device(place)
    assert modules.move(model, device) is model
    assert model.last.weight is model.first.weight
    assert model.scale is model.first.scale
    assert model.last.weight.device.type == place
    assert len(list(model.parameters())) == 3


ON_XLA = """
import sys
sys.path.insert(0, "tests")
from test_modules import Tied, toy
import torch
from torch import nn
from companion import training

found = {}
for place in ("xla", "cpu"):  # XLA first: autograd counts its devices at the first backward pass
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), Tied())
    recipe = training.Recipe(epochs=2, batch_size=16, learning_rate=0.05)
    training.fit(model, toy((1, 1, 8), 8), recipe, device=place, progress=False)
    found[place] = model[1].first.weight.detach().cpu()
    print(model[1].last.weight is model[1].first.weight)
print(torch.allclose(found["cpu"], found["xla"], atol=1e-4))
"""


def test_shared_weights_are_trained_as_one_on_xla(python, root):
    if reason := devices.why_not("xla"):
        pytest.skip(reason)
    ran = subprocess.run([*python, "-c", ON_XLA], cwd=root, capture_output=True, text=True, timeout=120)
    assert ran.stdout.split() == ["True"] * 3, ran.stderr


def views() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight.data = model[0].weight.data
    return model


def test_weights_over_the_same_memory_that_would_come_apart_are_refused():
    with pytest.raises(ValueError, match=r"0.weight and 1.weight are several tensors over the same memory"):
        modules.move(views(), torch.device("meta"))
    modules.move(views(), torch.device("cpu"))  # nothing moves, and they stay one
    flat = torch.zeros(32)
    parts = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    parts[0].weight.data, parts[1].weight.data = flat[:16].view(4, 4), flat[16:].view(4, 4)
    modules.move(parts, torch.device("meta"))  # beside one another in one storage: nothing is shared


def test_a_model_without_parameters_or_with_an_empty_one_is_moved():
    modules.move(nn.ReLU(), torch.device("cpu"))
    holed = nn.BatchNorm1d(4, affine=False)
    holed.register_buffer("empty", torch.empty(0))
    holed.register_parameter("none", None)
    modules.move(holed, torch.device("meta"))
