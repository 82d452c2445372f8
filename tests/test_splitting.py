"""A model can be cut where one tensor goes on, and nowhere else; stages together are the model."""

import copy
import itertools
import operator
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
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


class Layers(nn.Module):
    """Two layers, with `between` in the model's own forward."""

    def __init__(self, between=lambda self, x: x, **held):
        super().__init__()
        self.a, self.b, self.between = nn.Linear(4, 4), nn.Linear(4, 4), between
        self.register_buffer("steps", torch.ones(()))
        self.act, self.same = nn.ReLU(inplace=True), nn.Identity()
        for name, value in held.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.b(self.between(self, self.a(x)))


class Inside(Layers):
    """The same, in a block of a model."""

    def __init__(self, between, **held):
        super().__init__()
        self.block = Layers(between, **held)

    def forward(self, x):
        return self.b(self.block(self.a(x)))


def noisy(self, x):
    return x + torch.randn(4)


def sometimes(self, x):
    return torch.relu(x) if random.random() < 0.5 else x


def numpys(self, x):
    return x * float(np.random.rand())


def counts(self, x):
    self.calls = getattr(self, "calls", 0) + 1
    return x / self.calls


def keeps(self, x):
    self.features = x
    return x


def lists(self, x):
    self.seen.append(x)
    return x


def accumulates(self, x):
    total = torch.zeros(4)
    total += x.mean(0)
    return x + total


def updates(self, x):
    self.steps += 1
    return x / self.steps


def without_gradient(self, x):
    with torch.no_grad():
        scale = x.abs().mean()
    return x / scale


def in_bfloat16(self, x):
    with torch.autocast("cpu", torch.bfloat16):
        x = x @ x.T @ x
    return x.float()


def decides(self, x):
    return x if x.sum() > 0 else -x


LOST = {
    noisy: "draws random numbers",
    sometimes: "draws random numbers",
    numpys: "draws random numbers",
    counts: r"sets self\.calls \(line \d+: self.calls = getattr",
    keeps: r"sets self\.features \(line \d+: self.features = x",
    lists: r"changes self\.seen",
    accumulates: r"changes a tensor that it has made.*total \+= x.mean\(0\)",
    updates: r"sets self\.steps",
    without_gradient: r"no_grad\(\), autocast.*scale = x.abs\(\).mean\(\)",
    in_bfloat16: r"no_grad\(\), autocast.*x = x @ x.T @ x",
    decides: r"control flow",
}


@pytest.mark.parametrize("between", LOST, ids=lambda function: function.__name__)
def test_what_a_graph_would_lose_is_refused_with_its_line_and_undone(between):
    model = Layers(between, seen=[])
    before, state = dict(vars(model)), random.getstate()
    with pytest.raises(SplitError, match=f"the forward of Layers cannot be followed: .*{LOST[between]}"):
        splitting.split(model, "a")
    assert vars(model).keys() == before.keys()
    assert model.seen == []
    assert model.steps == 1
    assert random.getstate() == state


@pytest.mark.parametrize("between", LOST, ids=lambda function: function.__name__)
def test_a_block_that_does_such_things_is_left_whole(between):
    model, x = Inside(between, seen=[]), torch.randn(6, 4)
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    expected = model(x)
    model.block.seen.clear()
    model.block.steps.fill_(1)
    vars(model.block).pop("calls", None)
    first, second = splitting.split(model, "a")
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    assert torch.equal(second(first(x)), expected)
    with pytest.raises(SplitError, match=r"after 'block\.a': block stays whole, since"):
        splitting.split(model, "block.a")


def test_hooks_and_replaced_forwards_are_not_passed_by():
    for change in (
        lambda part: part.register_forward_hook(lambda module, args, output: output + 1),
        lambda part: part.register_forward_pre_hook(lambda module, args: (args[0] + 1,)),
        lambda part: part.register_full_backward_hook(lambda module, given, gone: None),
        lambda part: setattr(part, "forward", torch.relu),
    ):
        model = Layers()
        change(model)
        with pytest.raises(
            SplitError, match=r"Layers cannot be cut: (it has hooks|its forward was replaced)"
        ):
            splitting.split(model, "a")
        model, x = Inside(lambda self, x: x), torch.randn(2, 4)
        change(model.block)
        first, second = splitting.split(model, "a")
        assert torch.equal(second(first(x)), model(x))


MODES = {
    "dropout": lambda self, x: F.dropout(x, 0.5, self.training),
    "by keyword": lambda self, x: F.dropout(x, 0.5, training=self.training),
    "a branch": lambda self, x: x + torch.randn_like(x) if self.training else x,
    "another layer": lambda self, x: self.act(x) if self.training else self.same(x),
}


@pytest.mark.parametrize("kind", [Layers, Inside])
@pytest.mark.parametrize("between", MODES.values(), ids=MODES)
@pytest.mark.parametrize("first", [True, False])
def test_stages_follow_the_mode_they_are_in(between, kind, first):
    model, x = kind(between).train(first), torch.randn(6, 4)
    stages = splitting.split(model, "a", x)
    for training in (not first, first):
        model.train(training)
        for stage in stages:
            stage.train(training)
        torch.manual_seed(0)
        expected = model(x)
        torch.manual_seed(0)
        assert torch.equal(stages[1](stages[0](x)), expected)


@pytest.mark.parametrize("name", ["efficientnet_b0", "mobilenet_v3_small", "swin_t", "densenet121"])
def test_models_of_torchvision_in_both_modes(name):
    torch.manual_seed(0)
    model, x = getattr(torchvision.models, name)(num_classes=10), torch.randn(2, 3, 64, 64)
    layers = splitting.profile(model, x, 1)
    made = splitting.split(model, splitting.balanced(layers, 2), x)
    for training in (True, False):
        model.train(training)
        for stage in made:
            stage.train(training)
        state = copy.deepcopy(model.state_dict())
        torch.manual_seed(1)
        expected = model(x)
        model.load_state_dict(state)
        torch.manual_seed(1)
        assert torch.allclose(made[1](made[0](x)), expected, atol=1e-5)


IN_PLACE = {
    "ReLU(inplace)": lambda self, x: self.act(x),
    "of a view": lambda self, x: self.act(x.view(-1, 4)),
    "of nothing": lambda self, x: self.act(self.same(x)),
    "relu_ of flatten": lambda self, x: x.flatten(1).relu_(),
    "torch.relu_": lambda self, x: torch.relu_(x),
    "positional": lambda self, x: F.relu(x, True),
    "hardtanh_": lambda self, x: F.hardtanh_(x),
    "mul_": lambda self, x: x.mul_(2).add_(1),
    "augmented": lambda self, x: operator.iadd(x, self.steps),
}


@pytest.mark.parametrize("between", IN_PLACE.values(), ids=IN_PLACE)
def test_what_was_received_may_be_overwritten(between):
    model, x = Layers(between), torch.randn(6, 4)
    stages = splitting.split(model, "a", x)
    assert "a" in [layer.name for layer in splitting.profile(model, x, 1)]
    sent = stages[0](x).detach().requires_grad_()  # as another rank receives it
    stages[1](sent).sum().backward()
    found = {name: p.grad for name, p in stages[1].named_parameters() if p.grad is not None}
    model.zero_grad()
    handed_on = model.a(x)
    handed_on.retain_grad()
    model.b(between(model, handed_on.clone())).sum().backward()
    assert torch.allclose(sent.grad, handed_on.grad)
    assert all(torch.allclose(found[f"b.{name}"], p.grad) for name, p in model.b.named_parameters())


class First(nn.Module):
    def forward(self, x):
        return x[0]


def test_profile_offers_no_cut_that_sends_no_tensor_of_floats_or_shares_weights():
    recurrent = nn.Sequential(nn.Linear(4, 8), nn.LSTM(8, 8, batch_first=True), First(), nn.Linear(8, 3))
    assert [layer.name for layer in splitting.profile(recurrent, torch.randn(6, 5, 4), 1)] == [
        "0",
        "getitem",
        "3",
    ]
    with pytest.raises(SplitError, match=r"after '1': what it gives is not one tensor of floats"):
        splitting.split(recurrent, "1", torch.randn(6, 5, 4))
    names = [layer.name for layer in splitting.profile(tied(), torch.randn(6, 3), 1)]
    assert names == ["0"], "all is in one stage"
    alike = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    alike[2].weight.data = alike[0].weight.data  # two parameters over one memory
    with pytest.raises(SplitError, match=r"both sides share 0\.weight"):
        splitting.split(alike, "1")


class Options(Layers):
    def forward(self, x, mask=None, scale=1.0, features=False):
        x = self.a(x) * scale
        if mask is not None:
            x = x * mask
        return x if features else self.b(x)


class Many(Layers):
    def forward(self, *xs):
        return self.b(self.a(xs[0]))


@pytest.mark.parametrize("kind", [Options, Many])
def test_optional_inputs_take_their_defaults(kind):
    model, x = kind(), torch.randn(2, 4)
    first, second = splitting.split(model, "a", x)
    assert torch.equal(second(first(x)), model(x))


class Masked(Layers):
    """Reads a buffer in both stages, and views of it."""

    def forward(self, x):
        scale = self.steps.expand(4)
        return self.b(self.a(x) * scale) * scale


def test_a_buffer_that_is_only_read_may_be_used_by_both_stages():
    model, x = Masked(), torch.randn(2, 4)
    model.steps.fill_(3.0)
    first, second = splitting.split(model, "a", x)
    assert torch.equal(second(first(x)), model(x))


def test_a_stage_that_is_something_else_is_found_out():
    class Changes(nn.Module):
        """Another factor in each call, by a generator that no graph sees."""

        def __init__(self):
            super().__init__()
            self.layer, self.factors = nn.Linear(4, 4), itertools.count(1)

        def forward(self, x):
            return self.layer(x) * next(self.factors)

    with pytest.raises(SplitError, match="do not compute what it does: in training mode, output"):
        splitting.split(nn.Sequential(nn.Linear(4, 4), Changes()), "0", torch.randn(2, 4))


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


class Gives(Skip):
    def __init__(self, what):
        super().__init__()
        self.what = what

    def forward(self, x):
        return self.what(self.up(self.down(x)))


REFUSED = [
    (lambda: Gives(lambda x: (x, x)), ["down"], r"forward gives a tuple; the last stage"),
    (lambda: Gives(lambda x: {"logits": x}), ["down"], r"forward gives a dict; the last stage"),
    (lambda: Gives(lambda x: [x]), ["down"], r"forward gives a list; the last stage"),
    (nn.Identity, ["down"], r"no place to cut|cannot be cut"),
    (
        Skip,
        ["down"],
        r"Skip cannot be cut after 'down': 2 values would have to be sent \(x, down\); use one of add",
    ),
    (Skip, ["middle"], r"after 'middle': there is no such layer"),
    (Decides, ["down"], r"the forward of Decides cannot be followed: .*control flow.*nn\.Sequential"),
    (Two, ["down"], r"forward takes 2 inputs \(x, y\)"),
    (tied, ["1"], r"both sides share 0\.weight: tied weights cannot be cut apart"),
    (models.LeNet5, ["fc2", "fc1"], r"not in the order of the model"),
    (models.LeNet5, ["fc1", "fc1"], r"each once"),
    (models.LeNet5, ["fc3"], r"nothing comes after 'fc3'"),
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
