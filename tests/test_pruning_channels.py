"""Models with fewer channels run, are as small as asked for, and keep their outputs' shape."""

import builtins

import pytest
import torch
from torch import nn

from companion import measure, models, parity, pruning, training
from companion import pruning_channels as channels
from companion.pruning import PruningError


@pytest.fixture
def images(digits):
    return digits.test.images[:4]


def test_half_of_the_channels(trained_lenet, images):
    before = parity.fingerprint(trained_lenet)
    found = channels.narrowed(trained_lenet, images, ratio=0.5)
    widths = [found.model.conv1.out_channels, found.model.conv2.out_channels, found.model.fc1.out_features]
    assert widths == [3, 8, 60]
    assert found.model.fc1.in_features == 8 * 25
    assert found.model(images).shape == (4, 10)
    assert found.parameters_gain > 3
    assert found.macs_gain > 2
    assert found.macs == measure.macs(found.model, images)
    assert parity.fingerprint(trained_lenet) == before


def test_the_weakest_filters_go(trained_lenet, images):
    model = models.LeNet5()
    model.load_state_dict(trained_lenet.state_dict())
    with torch.no_grad():
        model.conv1.weight[2].mul_(1e-6)
        model.conv1.bias[2] = 0
        model.conv2.weight[:, 2].mul_(1e-6)
    found = channels.narrowed(model.eval(), images, ratio=1 / 6)
    assert found.model.conv1.out_channels == 5
    assert not any(torch.equal(model.conv1.weight[2], kept) for kept in found.model.conv1.weight)


def test_residual_networks_and_targets_of_macs():
    model, images = models.resnet18().eval(), torch.randn(1, 3, 32, 32)
    found = channels.narrowed(model, images, macs=3)
    assert 3 <= found.macs_gain < 4
    assert found.model(images).shape == (1, 10)


def test_a_target_of_latency_is_measured(trained_lenet, images, monkeypatch):
    def latency(function, *rest):
        function()
        return measure.Latency(measure.Spread(next(times), 1, 1, 1), 1)

    times = iter([3.0, 1.0, 3.0, 1.0, 1.0, 1.0, 1.0])
    monkeypatch.setattr(channels.measure, "latency", latency)
    found = channels.narrowed(trained_lenet, images, seconds=2.0)
    assert found.ratio == pytest.approx(0.98 * 81 / 128, abs=0.01)


def test_a_narrow_model_learns_and_a_fresh_one_is_new(trained_lenet, images, digits):
    found = channels.narrowed(trained_lenet, images, ratio=0.5)
    state = torch.get_rng_state()
    new = channels.fresh(found.model, seed=1)
    assert torch.equal(state, torch.get_rng_state()), "nobody else's random numbers change"
    assert new.conv1.weight.shape == found.model.conv1.weight.shape
    assert not torch.equal(new.conv1.weight, found.model.conv1.weight)
    history = training.fit(found.model, digits, training.Recipe(2, 64, 2e-3), device="cpu", progress=False)
    assert history.val_accuracy[-1] > 0.9


class Shapes(nn.Module):
    """Its outputs are not those of the layer that is called last."""

    def __init__(self):
        super().__init__()
        self.body, self.head, self.aside = nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(8, 1)

    def forward(self, x):
        outputs = self.head(self.body(x))
        self.aside(x)
        return outputs


def test_masks_are_refused(trained_lenet, images):
    with pytest.raises(PruningError, match=r"conv1\.weight_mask is a mask"):
        channels.narrowed(pruning.masked(trained_lenet, 0.5), images, ratio=0.5)


class Reshapes(nn.Module):
    """The sizes of its views are numbers in its code."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(8, 6), nn.Linear(6, 1)

    def forward(self, x):
        return self.head(self.body(x).view(-1, 2, 3).flatten(1))


REFUSED = {
    "give one of ratio, macs, seconds, not none": {},
    "not ratio, macs": {"ratio": 0.5, "macs": 2},
    r"ratio=1\.0 must be between 0 and 1": {"ratio": 1.0},
    "macs=1 must be greater than 1": {"macs": 1},
    "keep names 'head'": {"ratio": 0.5, "keep": ["head"]},
    "macs=1000000.0 is not reached": {"macs": 1e6},
    "nothing was removed": {"ratio": 0.5, "keep": ["conv1", "conv2", "fc1", "fc2"]},
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_cannot_be_is_refused(trained_lenet, images, said):
    with pytest.raises(PruningError, match=said):
        channels.narrowed(trained_lenet, images, **REFUSED[said])


def test_channels_that_are_the_outputs_are_refused():
    with pytest.raises(PruningError, match=r"would become \[\(2, 3\)\] instead of \[\(2, 6\)\]"):
        channels.narrowed(Shapes().eval(), torch.randn(2, 8), ratio=0.5)
    found = channels.narrowed(Shapes().eval(), torch.randn(2, 8), ratio=0.5, keep=["head"])
    assert found.model.body.out_features == 3
    with pytest.raises(PruningError, match=r"Reshapes cannot lose 50% of its channels .*keep="):
        channels.narrowed(Reshapes().eval(), torch.randn(2, 8), ratio=0.5)
    with pytest.raises(PruningError, match="ReLU calls neither"):
        channels.narrowed(nn.ReLU(), torch.randn(2, 8), ratio=0.5)


def test_without_torch_pruning_the_error_names_the_extra(trained_lenet, images, monkeypatch):
    real = builtins.__import__

    def missing(name, *args):
        if name == "torch_pruning":
            raise ImportError("No module named 'torch_pruning'")
        return real(name, *args)

    monkeypatch.setattr(channels.importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"accelerating-pytorch\[compress\]"):
        channels.narrowed(trained_lenet, images, ratio=0.5)
