"""What `data` and `measure` give has the shapes and types that their docstrings name, checked as they run."""

from collections.abc import Iterator

import pytest
import torch
from beartype import beartype
from jaxtyping import Float, Int, TypeCheckError, jaxtyped
from torch import Tensor, nn

from companion import data, measure, models, training

Images = Float[Tensor, "n 3 height width"]
Labels = Int[Tensor, " n"]
Batch = tuple[Float[Tensor, "batch 3 32 32"], Int[Tensor, " batch"]]


@jaxtyped(typechecker=beartype)
def checked_split(images: Images, labels: Labels) -> tuple[Images, Labels]:
    return images, labels


@jaxtyped(typechecker=beartype)
def checked_batches(batches: data.Batches) -> list[Batch]:
    return list(batches)


@jaxtyped(typechecker=beartype)
def checked_parts(labels: Labels, parts: tuple[int, ...]) -> list[Int[Tensor, " _"]]:
    return data.datasets.split_indices(labels, parts, seed=0)


@pytest.mark.parametrize("name", ["digits", "cluttered_digits"])
def test_splits(name):
    splits = data.load(name)
    for split in (splits.train, splits.val, splits.test):
        images, _ = checked_split(*split)
        assert images.dtype == torch.float32
    assert splits.mean.shape == splits.std.shape == (3, 1, 1)


def test_resized_images(digits):
    small = data.resized(digits, 48)
    images, _ = checked_split(*small.val)
    assert images.shape[2:] == (48, 48)


@pytest.mark.parametrize("augment", [None, data.Augment(shift=2), data.Augment(shift=2, flip=True)])
def test_batches(digits, augment):
    part = data.Split(digits.train.images[:100], digits.train.labels[:100])
    assert [len(labels) for _, labels in checked_batches(data.Batches(part, 64, augment=augment))] == [64, 36]


def test_indices(digits):
    assert len(checked_parts(digits.train.labels[:100], (60, 40))) == 2


@jaxtyped(typechecker=beartype)
def checked_compare(ways: dict, rounds: int) -> measure.Times:
    return measure.compare(ways, rounds=rounds)


@jaxtyped(typechecker=beartype)
def checked_profile(batches: Iterator | data.Batches) -> dict[str, list[float]]:
    model = models.LeNet5()
    optimizer = training.make_optimizer(model, training.Recipe())
    return measure.step_profile(model, batches, optimizer, torch.device("cpu"), steps=3)


@jaxtyped(typechecker=beartype)
def checked_sizes(model: nn.Module, example: Float[Tensor, "n ..."]) -> tuple[int, dict[str, float]]:
    return measure.macs(model, example), measure.operators(lambda: model(example))


def test_measurements(digits):
    times = checked_compare({"a": lambda: None}, 3)
    assert {type(value) for value in (times["a"].median, times["a"].low, times["a"].high)} == {float}
    assert type(times["a"].runs) is int
    part = data.Split(digits.train.images[:128], digits.train.labels[:128])
    assert {len(series) for series in checked_profile(data.Batches(part, 64)).values()} == {3}
    assert checked_sizes(nn.Linear(4, 2), torch.zeros(3, 4))[0] == 24


def test_another_shape_would_be_found(digits):
    with pytest.raises(TypeCheckError):
        checked_split(digits.val.images[:, :1], digits.val.labels)
    with pytest.raises(TypeCheckError):
        checked_split(digits.val.images, digits.val.labels[:-1])
