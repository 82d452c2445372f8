import time

import pytest
import torch
from torch import nn

from companion import data, devices, measure, models, training


def test_latency_is_that_of_one_call():
    result = measure.latency(lambda: time.sleep(0.01), min_seconds=0.1)
    assert result.median_seconds >= 0.01
    assert result.spread_seconds >= 0
    assert result.runs >= 1
    assert result.throughput(50) == 50 / result.median_seconds
    assert str(result).startswith(f"{result.median_seconds * 1e3:.3g} ms (spread")


def test_latency_waits_for_the_device(monkeypatch):
    waited = []
    monkeypatch.setattr(devices, "synchronize", waited.append)
    measure.latency(lambda: None, min_seconds=0.01)
    assert set(waited) == {torch.device("cpu")}


def test_compared_functions_take_turns():
    calls = []
    times = measure.compare({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"  # the warm-up, then the rounds
    assert [len(series) for series in times.values()] == [3, 3]
    assert measure.ratio([2.0, 8.0, 9.0], [1.0, 2.0, 3.0]) == 3.0


def test_the_profile_of_a_step_has_all_its_parts(digits):
    model = models.LeNet5()
    optimizer = training.make_optimizer(model, training.Recipe())
    before = model.fc3.weight.clone()
    batches = data.Batches(data.Split(digits.train.images[:128], digits.train.labels[:128]), 64)
    profile = measure.step_profile(model, batches, optimizer, torch.device("cpu"), steps=5)  # runs through the batches twice
    assert {name: len(series) for name, series in profile.items()} == dict.fromkeys(
        ("data", "forward", "backward", "optimizer", "whole"), 5
    )
    sums = [sum(parts) for parts in zip(*(profile[name] for name in ("data", "forward", "backward", "optimizer")), strict=True)]
    assert sums == pytest.approx(profile["whole"])
    assert not torch.equal(before, model.fc3.weight)


def test_operators_are_found_longest_first():
    a = torch.randn(300, 300)
    found = measure.operators(lambda: (a @ a).relu())
    assert {"aten::mm", "aten::relu"} <= set(found)
    assert list(found.values()) == sorted(found.values(), reverse=True)


def test_sizes_are_counted_from_the_tensors():
    linear = nn.Linear(100, 10)
    assert measure.parameters(linear) == 1010
    assert measure.model_bytes(linear) == 4040
    assert 4040 < measure.disk_bytes(linear) < 8000
    tied = nn.Sequential(linear, nn.Linear(100, 10))
    tied[1].weight = linear.weight
    assert measure.model_bytes(tied) == 4040 + 40
    assert measure.model_bytes(nn.BatchNorm1d(8)) == 4 * 4 * 8 + 8  # weight, bias, mean, variance; a counter of 8 bytes
    assert measure.model_bytes(linear.half()) == 2020


def test_macs_are_those_of_the_formula():
    assert measure.macs(nn.Linear(100, 10), torch.zeros(4, 100)) == 4000
    assert measure.macs(nn.Conv2d(3, 6, 5), torch.zeros(1, 3, 32, 32)) == 6 * 28 * 28 * 3 * 5 * 5


def test_peak_memory_counts_what_lives_at_once():
    def function():
        a = torch.empty(1000)
        b = torch.empty(2000)
        del a
        view = b.view(2, 1000)  # shares b's memory
        c = torch.empty(1500)
        return view, c

    assert measure.peak_bytes(function) == 4 * 3500
    outside = torch.zeros(500)
    assert measure.peak_bytes(lambda: outside.add_(1)) == 0


def test_the_environment_stamp_is_plain_data():
    import json

    stamp = measure.environment()
    assert json.loads(json.dumps(stamp)) == stamp
    assert stamp["versions"]["torch"] == torch.__version__.split("+")[0] or "+" in stamp["versions"]["torch"]
    assert stamp["cores"] == devices.usable_cores()
