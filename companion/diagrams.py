"""Drawings of what moves where: boxes with shapes in them, and arrows between them."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
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

    def arrow(start: tuple[float, float], end: tuple[float, float]) -> None:
        axis.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": "grey"})

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
        arrow((1.7, middle), (2.6, middle))
        arrow((7.4, middle), (8.3, middle))
        top -= height
    for place, word in ((2.15, "scatter"), (5, "replicate, forward"), (7.85, "gather")):
        axis.text(place, 1, word, ha="center", va="bottom", fontsize=9)
    return drawn
