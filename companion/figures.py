"""The look of all figures: colours, lines and grounds."""

import functools
from collections.abc import Callable

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from companion.measure import Spread

# Okabe and Ito's colours, which people with any colour vision can tell apart; a white ground reads in dark
# themes too.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999", "#000000")
STYLE = {
    "figure.facecolor": "white",
    "figure.dpi": 100,
    "figure.constrained_layout.use": True,
    "axes.prop_cycle": plt.cycler(color=COLOURS),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "font.size": 10,
}


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draws in the suite's look, and leaves the figure to be shown once, as the last value of a cell."""

    @functools.wraps(draw)
    def drawn(*args, **kwargs) -> Figure:
        with plt.rc_context(STYLE):
            figure = draw(*args, **kwargs)
        plt.close(figure)
        return figure

    return drawn


def panels_of(columns: int = 1, width: float = 8, height: float = 3.4) -> tuple[Figure, list[Axes]]:
    drawn, axes = plt.subplots(1, columns, figsize=(width, height), squeeze=False)
    return drawn, list(axes[0])


def middle(value: float | Spread) -> float:
    """The median of a value with a spread, or the value itself."""
    return value.median if isinstance(value, Spread) else value


def whisker(axis: Axes, value: float | Spread, place: float) -> float:
    """Draws the spread, if the value has one, and gives where it ends."""
    if not isinstance(value, Spread):
        return value
    axis.hlines(place, value.low, value.high, color="black", linewidth=1.2)
    return value.high
