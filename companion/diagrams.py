"""Drawings of what moves where: boxes with shapes in them, and arrows between them."""

import math
from collections.abc import Sequence

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from companion.figures import COLOURS, panels_of, styled


@styled
def batch_split(
    batch: Sequence[int], pieces: dict[str, tuple[Sequence[int], Sequence[int]]], joined: Sequence[int]
) -> Figure:
    """How a batch is shared out and comes back: its shape, by replica the shapes that go in and come out, and
    the joined one.
    """
    drawn, (axis,) = panels_of(1, 9, 0.8 + 0.9 * len(pieces))
    axis.axis("off")
    axis.set(xlim=(0, 10), ylim=(0, 1))

    def box(left: float, bottom: float, width: float, height: float, colour: str, text: str) -> None:
        axis.add_patch(plt.Rectangle((left, bottom), width, height, color=colour))
        axis.text(
            left + width / 2, bottom + height / 2, text, ha="center", va="center", color="white", fontsize=9
        )

    def size(shape: Sequence[int]) -> str:
        return " x ".join(map(str, shape))

    box(0, 0.05, 1.7, 0.9, COLOURS[7], f"batch\n{size(batch)}")
    box(8.3, 0.05, 1.7, 0.9, COLOURS[7], f"outputs\n{size(joined)}")
    top = 0.95
    for (name, (given, output)), colour in zip(pieces.items(), COLOURS * len(pieces), strict=False):
        height = 0.9 * given[0] / batch[0]
        middle = top - height / 2
        box(
            2.6,
            top - 0.96 * height,
            4.8,
            0.92 * height,
            colour,
            f"{name}\n{size(given)}  \u2192  {size(output)}",
        )
        _arrow(axis, (1.7, middle), (2.6, middle))
        _arrow(axis, (7.4, middle), (8.3, middle))
        top -= height
    for place, word in ((2.15, "scatter"), (5, "replicate, forward"), (7.85, "gather")):
        axis.text(place, 1, word, ha="center", va="bottom", fontsize=9)
    return drawn


@styled
def lanes(rows: dict[str, Sequence[tuple[str, str]]], back: dict[str, str] | None = None) -> Figure:
    """What becomes of something step by step, a row for each way: name -> (kind, text) of each box.

    A kind has one colour in all rows, which the legend explains; a box without a kind is a gap. `back` has
    the text of an arrow from a row's end to its beginning, such as a gradient's.
    """
    drawn, (axis,) = panels_of(1, 10, 0.5 + 1.0 * len(rows))
    kinds = list(dict.fromkeys(kind for boxes in rows.values() for kind, _ in boxes if kind))
    colours = dict(zip(kinds, COLOURS, strict=False))
    columns = max(map(len, rows.values()))
    axis.axis("off")
    axis.set(xlim=(-0.02, columns), ylim=(len(rows) - 0.35, -0.55))
    for row, (name, boxes) in enumerate(rows.items()):
        axis.text(0, row - 0.36, name, va="bottom", fontsize=10, fontweight="bold")
        for column, (kind, text) in enumerate(boxes):
            if not kind:
                continue
            axis.add_patch(plt.Rectangle((column, row - 0.3), 0.82, 0.6, color=colours[kind]))
            axis.text(column + 0.41, row, text, ha="center", va="center", color="white", fontsize=8.5)
            if column and boxes[column - 1][0]:
                _arrow(axis, (column - 0.18, row), (column, row))
        if back and name in back:
            last = len(boxes) - 1
            bent = {"arrowstyle": "->", "color": "grey", "connectionstyle": "bar,fraction=-0.04"}
            axis.annotate("", (0.41, row + 0.3), (last + 0.41, row + 0.3), arrowprops=bent)
            axis.text(0.41 + last / 2, row + 0.45, back[name], ha="center", va="top", fontsize=8.5)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colours[kind]) for kind in kinds]
    drawn.legend(handles, kinds, loc="outside upper center", ncols=len(kinds), fontsize=9)
    return drawn


@styled
def ring(ranks: int) -> Figure:
    """A ring all-reduce: each rank gives a part of its gradient to the next one, who adds it to its own."""
    drawn, (axis,) = panels_of(1, 5, 3.6)
    axis.axis("off")
    axis.set(xlim=(-1.6, 1.6), ylim=(-1.35, 1.35), aspect="equal")
    angles = [math.pi / 2 - 2 * math.pi * rank / ranks for rank in range(ranks)]
    places = [(math.cos(angle), math.sin(angle)) for angle in angles]
    bent = {"arrowstyle": "->", "color": "grey", "shrinkA": 22, "shrinkB": 22}
    for rank, (x, y) in enumerate(places):
        axis.add_patch(plt.Circle((x, y), 0.27, color=COLOURS[rank % len(COLOURS)]))
        axis.text(x, y, f"rank {rank}", ha="center", va="center", color="white", fontsize=9)
        bent["connectionstyle"] = f"arc3,rad={-0.25 if ranks > 2 else -0.5}"
        axis.annotate("", places[(rank + 1) % ranks], (x, y), arrowprops=dict(bent))
    said = f"each step: 1/{ranks} of the gradient\nto the next rank\n{ranks - 1} steps add up,\n"
    axis.text(0, 0, said + f"{ranks - 1} hand the sums round", ha="center", va="center", fontsize=8)
    return drawn


def _arrow(axis: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axis.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": "grey"})
