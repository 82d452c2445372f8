"""Drawings have the boxes and arrows that they are given."""

import matplotlib.pyplot as plt
import pytest

from companion import diagrams, machine, tables


def boxes(axis) -> int:
    return sum(isinstance(patch, plt.Rectangle) for patch in axis.patches)


def test_a_box_without_a_kind_is_a_gap():
    rows = {"rank 0": [("computes", "a"), ("waits", "b")], "network": [("", ""), ("sends", "c")]}
    drawn = diagrams.lanes(rows)
    (axis,) = drawn.axes
    assert boxes(axis) == 3
    texts = {text.get_text() for text in axis.texts}
    assert {"a", "b", "c", "rank 0", "network"} <= texts
    arrows = [text for text in axis.texts if getattr(text, "arrow_patch", None)]
    assert len(arrows) == 1, "none leads from the gap"
    (legend,) = drawn.legends
    assert [text.get_text() for text in legend.get_texts()] == ["computes", "waits", "sends"]


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_a_ring_has_an_arrow_from_each_rank(ranks):
    (axis,) = diagrams.ring(ranks).axes
    assert sum(isinstance(patch, plt.Circle) for patch in axis.patches) == ranks
    assert sum(bool(getattr(text, "arrow_patch", None)) for text in axis.texts) == ranks
    assert f"1/{ranks} of the gradient" in axis.texts[-1].get_text()
    assert f"{ranks - 1} steps add up" in axis.texts[-1].get_text()


def test_the_machine_folds_behind_a_line():
    folded = machine.describe().folded()
    assert "\n" not in str(folded)
    assert "cores" in str(folded)
    shown = folded._repr_html_()
    assert shown.startswith("<details><summary>")
    assert "instruction sets" in shown
    assert (
        tables.Folded("a < b", tables.Table((), [("x",)]))
        ._repr_html_()
        .startswith("<details><summary>a &lt; b")
    )
