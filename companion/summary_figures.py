"""Figures of what several notebooks have measured: gains, losses, theory against measurement, machines."""

from collections.abc import Iterable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from companion.figures import COLOURS, panels_of, styled
from companion.measure import Spread
from companion.summary import Entry

TICKS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)  # of an axis of speed-ups
LABELLED = 6  # of the points in a panel, the furthest out, that get a number


@styled
def gains(found: Sequence[Entry]) -> Figure:
    """Speed-up against what it changed of the accuracy, and against the share of the size that is left; a
    colour for each notebook. The best have numbers, which the list explains.
    """
    accurate = [entry for entry in found if entry.speed_up and entry.points is not None]
    small = [entry for entry in found if entry.speed_up and entry.size is not None]
    colours = _colours([*accurate, *small])
    named = _furthest(accurate) + [entry for entry in _furthest(small) if entry not in _furthest(accurate)]
    drawn, (left, right) = panels_of(2, 10, 4.0 + 0.17 * len(named))
    for axis, shown, height in ((left, accurate, "points"), (right, small, "size")):
        for entry in shown:
            y = entry.points if height == "points" else 100 * entry.size
            _point(axis, entry, y, colours[entry.notebook], named)
        axis.axvline(1, color="black", linewidth=0.8, linestyle=":")
        axis.set(xlabel="speed-up (x)", xscale="log")
        ticks = [tick for tick in TICKS if axis.get_xlim()[0] <= tick <= axis.get_xlim()[1]]
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
    left.axhline(0, color="black", linewidth=0.8, linestyle=":")
    left.set(ylabel="change of the accuracy (points)")
    right.set(ylabel="size (% of the plain one)")
    _list(drawn, map(str, named))
    _legend(drawn, colours)
    return drawn


@styled
def predicted(found: Sequence[Entry]) -> Figure:
    """Measured speed-ups against predicted ones; on the diagonal theory is right."""
    drawn, (axis,) = panels_of(1, 6, 4.6)
    shown = [entry for entry in found if entry.speed_up and entry.predicted]
    colours = _colours(shown)
    for entry in shown:
        colour, gain = colours[entry.notebook], entry.speed_up
        axis.vlines(entry.predicted, gain.low, gain.high, color=colour, linewidth=1.2)
        axis.plot(entry.predicted, gain.median, "o", color=colour, markersize=6)
    _diagonal(axis, [entry.predicted for entry in shown] + [entry.speed_up.median for entry in shown])
    axis.set(xlabel="predicted speed-up (x)", ylabel="measured speed-up (x)")
    _legend(drawn, colours)
    return drawn


@styled
def machines(pairs: dict[str, tuple[Spread, Spread]], here: str, there: str) -> Figure:
    """The same techniques on two machines: on the diagonal they gain as much on both."""
    drawn, (axis,) = panels_of(1, 7, 4.6 + 0.17 * LABELLED)
    far = sorted(pairs, key=lambda name: -abs(pairs[name][0].median / pairs[name][1].median - 1))[:LABELLED]
    for name, (own, other) in pairs.items():
        colour = COLOURS[0] if name in far else COLOURS[6]
        axis.hlines(own.median, other.low, other.high, color=colour, linewidth=1)
        axis.vlines(other.median, own.low, own.high, color=colour, linewidth=1)
        axis.plot(other.median, own.median, "o", color=colour, markersize=6)
    for number, name in enumerate(far, 1):
        own, other = pairs[name]
        axis.annotate(str(number), (other.median, own.median), (5, 4), textcoords="offset points", fontsize=9)
    _diagonal(axis, [value.median for pair in pairs.values() for value in pair])
    axis.set(xlabel=f"speed-up on: {there}", ylabel=f"speed-up on: {here}")
    _list(drawn, far)
    return drawn


def _list(drawn: Figure, texts: Iterable[str]) -> None:
    """What the numbers mean, below the panels."""
    listed = "\n".join(f"{number}  {text}" for number, text in enumerate(texts, 1))
    drawn.supxlabel(listed, x=0.02, ha="left", fontsize=8.5)


def _colours(found: Sequence[Entry]) -> dict[str, str]:
    names = sorted({entry.notebook for entry in found})
    return {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(names)}


def _furthest(shown: list[Entry]) -> list[Entry]:
    """The fastest of those that lose less than a point, or nothing that was measured."""
    good = [entry for entry in shown if entry.points is None or entry.points > -1]
    return sorted(good, key=lambda entry: -entry.speed_up.median)[:LABELLED]


def _point(axis: Axes, entry: Entry, height: float, colour: str, named: list[Entry]) -> None:
    gain = entry.speed_up
    axis.hlines(height, gain.low, gain.high, color=colour, linewidth=1)
    axis.plot(
        gain.median, height, "o", color=colour, markersize=6, fillstyle="none" if entry.busy else "full"
    )
    if entry in named:
        number = str(named.index(entry) + 1)
        axis.annotate(number, (gain.median, height), (5, 4), textcoords="offset points", fontsize=9)


def _diagonal(axis: Axes, values: list[float]) -> None:
    reach = (0.0, 1.1 * max(values, default=1.0))
    axis.plot(reach, reach, "--", color="black", linewidth=1)
    axis.set(xlim=reach, ylim=reach)


def _legend(drawn: Figure, colours: dict[str, str]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colour, marker="o", linestyle="") for colour in colours.values()]
    drawn.legend(handles, list(colours), loc="outside upper center", ncols=max(1, len(colours)), fontsize=9)
