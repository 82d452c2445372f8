"""Every variant is a row: measured where it can be made, with the reason where it cannot, crashes or
hangs.
"""

import os
import time

import pytest
import torch
from torch import nn

from companion import launch, measure
from companion import quantization_compare as compare

FEW = ("float32", "bfloat16", "int8 dynamic", "int8 static", "int8 static, scripted")


def crashes(model, data):
    os.abort()


def hangs(model, data):
    time.sleep(1000)


def test_all_kinds_of_rows(trained_lenet, digits, monkeypatch):
    monkeypatch.setattr(compare, "VARIANTS", {name: compare.VARIANTS[name] for name in FEW})
    images, labels = digits.test

    def accuracy(model):
        return (model(images).argmax(1) == labels).double().mean().item()

    own = {"crashes": crashes, "hangs": hangs}
    found = compare.compare(
        trained_lenet, images[:64], accuracy, batch_sizes=(1, 8), rounds=5, limit_seconds=20, variants=own
    )
    rows = {row.name: row for row in found.rows}
    assert found["int8 static"] is rows["int8 static"]
    assert len(found.figure(8).axes) == 2
    assert list(rows) == [*FEW, "crashes", "hangs"]
    for name in FEW:
        assert rows[name].reason is None, rows[name]
        assert rows[name].accuracy > rows["float32"].accuracy - 0.02
        assert set(rows[name].speed_up) == {1, 8}
    assert rows["int8 static"].disk_bytes < rows["bfloat16"].disk_bytes < rows["float32"].disk_bytes
    weights = sum(p.numel() for p in trained_lenet.parameters())
    assert all(weights < row.disk_bytes for row in rows.values() if row.disk_bytes), "a byte each at least"
    assert rows["crashes"].reason.startswith("killed by SIGABRT")
    assert rows["hangs"].reason.startswith("time-out: not all ranks returned within 20 s")
    shown = str(found.table())
    assert "speed-up, batch 8" in shown
    assert "killed by SIGABRT" in shown
    assert found.best(8, budget=-1.0).name == "float32", "nothing is a whole point better"


def test_what_cannot_be_made_says_why():
    given = ("int8 dynamic", None, nn.Conv2d(3, 3, 3), torch.ones(2, 3, 8, 8), len, (1,), 1)
    (row,) = launch.run(compare._tried, 1, *given, backend=None)
    assert row.reason == "nothing was quantized: it has no Linear or LSTM or GRU"


def test_the_best_is_the_fastest_within_the_budget_for_sure():
    def row(name, accuracy, low):
        return compare.Row(name, accuracy, {1: measure.Spread(low + 0.1, low, low + 0.2, 9)}, 1)

    first = row("float32", 0.95, 1.0)
    found = compare.Comparison(
        (first, row("a", 0.949, 1.5), row("b", 0.90, 9.0), compare.Row("c", reason="no"))
    )
    assert found.best(1).name == "a"
    assert found.best(1, budget=0.1).name == "b"
    assert compare.Comparison((first, row("a", 0.95, 0.9))).best(1) is first


def test_a_variant_of_which_most_stayed_float_says_so():
    def row(name, size):
        return compare.Row(name, 0.9, {1: measure.Spread(1.0, 1.0, 1.0, 9)}, size)

    rows = row("float32", 1000), row("bfloat16", 800), row("int8 static", 280), row("int8 dynamic", 940)
    shown = {line.split("  ")[0]: line for line in str(compare.Comparison(rows).table()).splitlines()}
    assert "most of it stayed float: 94% of the bytes" in shown["int8 dynamic"]
    assert not any("stayed" in shown[name] for name in ("float32", "bfloat16", "int8 static"))


def test_only_the_named_variants_are_tried():
    found = compare.compare(
        nn.Linear(4, 2), torch.randn(64, 4), lambda model: 1.0, rounds=1, names=["int8 dynamic"]
    )
    assert [row.name for row in found.rows] == ["float32", "int8 dynamic"]
    with pytest.raises(ValueError, match=r"unknown variants \['int7'\]"):
        compare.compare(nn.Linear(4, 2), torch.randn(64, 4), len, names=["int7"])


@pytest.mark.parametrize("inputs", [torch.ones(3, 4), torch.ones(64, 4).double()])
def test_inputs_that_cannot_serve_are_refused(inputs):
    with pytest.raises(ValueError, match="give 64 or more, of float32"):
        compare.compare(nn.Linear(4, 2), inputs, len)
