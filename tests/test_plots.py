import io

import matplotlib.pyplot as plt
import pytest
import torch
from PIL import Image

from companion import diagrams, measure, pictures, plots, tradeoffs, training

HISTORY = training.History([2.0, 1.0], [1.5, 0.9], [0.5, 0.8], [0.1, 0.1], [1.0, 1.0], [10, 10])


@pytest.fixture
def figures(digits):
    guesses = digits.test.labels.clone()
    guesses[:5] = (guesses[:5] + 1) % 10
    return {
        "images": pictures.images(digits, digits.train, 13),
        "guesses": pictures.images(digits, digits.test, 3, guesses),
        "curves": plots.learning_curves({"one": HISTORY, "two": training.History([2.0])}),
        "confusion": pictures.confusion(digits.test.labels, guesses, digits.classes),
        "breakdown": plots.breakdown(
            {"plain": {"data": 3e-3, "forward": 1e-3}, "fast": {"data": 1e-4, "forward": 1e-3}}
        ),
        "against_theory": plots.against_theory(
            {"a": ([1, 2, 4], [1.0, 1.8, 3.1], [1.0, 2.0, 4.0])},
            "ranks",
            "speed-up",
            {"no gain": 1},
            {"cores": 2},
        ),
        "logarithmic": plots.against_theory(
            {"a": ([1, 1e6], [1e-3, 1e-1], [1e-3, 1e-1])}, "bytes", "time (ms)", log="xy"
        ),
        "timeline": plots.timeline(
            {"compute": [("forward", 0.0, 0.01)], "send": [("b 0", 0.0, 0.02), ("b 1", 0.01, 0.03)]}
        ),
        "difference": plots.difference({"a": [0.0, 1e-7, 1e-3]}, "step", "apart", {"allowed": 1e-2}),
        "equal": plots.difference({"a": [0.0, 0.0]}, "step", "apart", {"allowed": 1e-2}),
        "matrices": pictures.matrices({"mask": torch.eye(3), "weights": torch.randn(4, 5)}),
        "lines": plots.lines([1, 2], {"a": [1, 2], "b": [2, 1]}, "x", "y"),
        "lanes": diagrams.lanes(
            {"a": [("float", "in"), ("int8", "out")], "b": [("float", "in")]}, back={"a": "gradient"}
        ),
        "pareto": tradeoffs.pareto(
            {"float": 0.9, "int8": 0.89},
            {"speed-up": {"float": 1.0, "int8": measure.Spread(2.0, 1.5, 3.0, 7)}, "KiB": {"int8": 70}},
            log=["KiB"],
        ),
        "accuracies": tradeoffs.accuracies(
            {"a": ([2, 4], [0.5, measure.Spread(0.9, 0.8, 1.0, 5)])},
            "bits",
            {"float": 0.95},
            ticks=[2, 4],
            marks={"3 bits": 3},
        ),
        "histograms": tradeoffs.histograms({"float": torch.randn(99), "int8": torch.ones(9)}, "weight"),
        "spread": plots.bars({"speed-up": {"a": measure.Spread(2.0, 1.5, 3.0, 7), "b": 1.0}}),
        "bars": plots.bars({"size (MiB)": {"a": 1.0, "b": 20.0}, "error": {"a": 1e-7}}, log=("error",)),
        "ladder": plots.ladder({"plain": (1000.0, 0.9), "fast": (4000.0, 0.8)}, ["plain"], {"limit": 5000.0}),
    }


def test_each_figure_draws_and_is_shown_by_nobody_else(figures):
    assert plt.get_fignums() == []
    for name, figure in figures.items():
        file = io.BytesIO()
        figure.savefig(file, format="png")
        image = Image.open(file).convert("RGB")
        assert image.getpixel((0, 0)) == (255, 255, 255), (
            f"{name} has no white ground and cannot be read in a dark theme"
        )
        assert len(image.getcolors(1_000_000)) > 5, f"{name} is empty"


def test_axes_have_labels(figures):
    for name in figures.keys() - {"images", "guesses", "lanes", "matrices"}:  # a drawing has no axes
        assert all(axis.get_xlabel() for axis in figures[name].axes), name


def test_the_confusion_counts(figures, digits):
    texts = {text.get_text() for text in figures["confusion"].axes[0].texts}
    counts = torch.bincount(digits.test.labels)
    assert "1" in texts
    assert str(int(counts.max())) in texts


def test_the_look_does_not_leak():
    before = dict(plt.rcParams)
    plots.learning_curves({"one": HISTORY})
    assert dict(plt.rcParams) == before


def test_spans_that_overlap_are_drawn_beside_each_other():
    (axis,) = plots.timeline({"send": [("b 0", 0.0, 0.02), ("b 1", 0.01, 0.03), ("b 2", 0.02, 0.04)]}).axes
    rows = [bar.get_paths()[0].get_extents() for bar in axis.collections]
    assert [round(1e-3 * (row.x1 - row.x0), 3) for row in rows] == [0.02, 0.02, 0.02]
    assert rows[0].y1 <= rows[1].y0, "the second begins before the first has ended: below it"
    assert rows[0].y0 == rows[2].y0, "the third finds the first one's place free"


def test_the_front_has_what_nothing_else_beats():
    points = {"slow": (1, 0.9), "worse": (1, 0.8), "fast": (3, 0.7), "same": (1, 0.9), "beaten": (2, 0.6)}
    assert tradeoffs.front(points) == ["slow", "same", "fast"]
