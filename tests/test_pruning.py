"""Masks take the weights that they should, nothing else, and stay through copying and training."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from companion import models, parity, pruning, training
from companion.pruning import PruningError


def test_the_share_is_what_was_asked_for_and_the_model_is_untouched(trained_lenet):
    before = parity.fingerprint(trained_lenet)
    for method in pruning.METHODS:
        found = pruning.sparsity(pruning.masked(trained_lenet, 0.75, method))
        assert found.share == pytest.approx(0.75, abs=1e-3)
        assert found.fewer == pytest.approx(4, abs=0.02)
        assert set(found.by_layer) == {"conv1", "conv2", "fc1", "fc2", "fc3"}
    assert parity.fingerprint(trained_lenet) == before
    assert not any(prune.is_pruned(module) for module in [trained_lenet])


def test_the_smallest_weights_go(trained_lenet):
    by_layer = pruning.masked(trained_lenet, 0.5, "layer_l1")
    assert all(
        share == pytest.approx(0.5, abs=0.01) for share in pruning.sparsity(by_layer).by_layer.values()
    )
    whole = pruning.masked(trained_lenet, 0.5)
    weights = pruning.layers(trained_lenet)
    gone = [weights[n].weight[layer.weight == 0].abs() for n, layer in pruning.layers(whole).items()]
    kept = [weights[n].weight[layer.weight != 0].abs() for n, layer in pruning.layers(whole).items()]
    assert max(part.max() for part in gone if len(part)) <= min(part.min() for part in kept if len(part))
    assert len(set(pruning.sparsity(whole).by_layer.values())) == 5, "layers lose different shares"


def test_random_masks_depend_on_the_seed_and_keep_what_is_gone(trained_lenet):
    first, again, other = (pruning.masked(trained_lenet, 0.5, "random", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.fc1.weight, again.fc1.weight)
    assert not torch.equal(first.fc1.weight, other.fc1.weight)
    more = pruning.masked(first, 0.75, "random", seed=3)
    assert not more.fc1.weight[first.fc1.weight == 0].any()


def test_named_layers_only(trained_lenet):
    found = pruning.sparsity(pruning.masked(trained_lenet, 0.5, names=["conv2"]))
    assert found.by_layer["conv2"] == pytest.approx(0.5, abs=0.01)
    assert found.by_layer["fc1"] == 0


def test_a_masked_model_that_was_called_can_be_copied(trained_lenet):
    made = pruning.masked(trained_lenet, 0.5).train()
    made(torch.randn(2, 3, 32, 32))
    with pytest.raises(RuntimeError):
        copy.deepcopy(made)
    twin = pruning.copied(made)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(twin(x), made(x))
    twin.fc1.weight_orig.data.zero_()
    assert not torch.equal(twin(x), made(x)), "the copy has weights of its own"


def test_training_leaves_what_is_masked_at_zero(trained_lenet, digits):
    made = pruning.masked(trained_lenet, 0.9)
    zero = made.fc1.weight == 0
    training.fit(made, digits, training.Recipe(1, 64, 1e-3), device="cpu", progress=False, validate=False)
    final = pruning.permanent(made)
    assert not final.fc1.weight[zero].any()
    assert not torch.equal(final.fc1.weight, trained_lenet.fc1.weight)
    assert set(final.state_dict()) == set(trained_lenet.state_dict())
    assert pruning.sparsity(final).share == pytest.approx(0.9, abs=1e-3)


def test_rewinding_puts_the_masks_on_the_first_weights(trained_lenet):
    first = models.LeNet5()
    ticket = pruning.masked(trained_lenet, 0.8)
    found = pruning.rewound(ticket, first)
    mask = ticket.fc1.weight != 0
    assert torch.equal(found.fc1.weight, first.fc1.weight * mask)


def test_the_cubic_schedule_takes_large_steps_first():
    shares = pruning.cubic(0.9, 4)
    steps = [b - a for a, b in zip([0, *shares], shares, strict=False)]
    assert shares[-1] == pytest.approx(0.9)
    assert steps == sorted(steps, reverse=True)


def test_gradual_pruning_trains_after_each_step(trained_lenet):
    seen = []
    made = pruning.gradual(
        trained_lenet, [0.5, 0.8], lambda model: seen.append(pruning.sparsity(model).share)
    )
    assert seen == [pytest.approx(0.5, abs=1e-3), pytest.approx(0.8, abs=1e-3)]
    assert pruning.sparsity(made).share == seen[-1]


def test_sensitivity_tells_layers_apart(trained_lenet, digits):
    found = pruning.sensitivity(
        trained_lenet, lambda model: training.evaluate(model, digits.val).accuracy, [0.1, 0.95]
    )
    assert list(found) == ["conv1", "conv2", "fc1", "fc2", "fc3"]
    assert all(little >= much for little, much in found.values())
    assert min(much for _, much in found.values()) < 0.8


@pytest.mark.parametrize(
    ("attempt", "said"),
    [
        (lambda model: pruning.masked(model, 1.0), r"amount=1\.0 is not a share"),
        (lambda model: pruning.masked(model, -0.1), r"amount=-0\.1 is not a share"),
        (lambda model: pruning.masked(model, 0.5, "l2"), "method='l2' is unknown"),
        (lambda model: pruning.masked(model, 0.5, names=["relu"]), "no convolution or linear .*'relu'"),
        (lambda model: pruning.masked(model, 0.9999, "layer_l1"), "leaves no weight in conv1"),
        (lambda model: pruning.sparsity(nn.ReLU()), "ReLU has neither convolutions nor linear layers"),
    ],
)
def test_what_cannot_be_is_refused(trained_lenet, attempt, said):
    with pytest.raises(PruningError, match=said):
        attempt(trained_lenet)


def test_of_each_four_the_two_largest_stay():
    matrix = torch.tensor([[1.0, -4.0, 3.0, 2.0, 0.0, 5.0, -6.0, 1.0]])
    assert pruning.two_of_four(matrix).tolist() == [[0.0, -4.0, 3.0, 0.0, 0.0, 5.0, -6.0, 0.0]]
    assert matrix[0, 0] == 1.0, "the given matrix was changed"
