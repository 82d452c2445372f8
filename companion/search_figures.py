"""Figures of a search: learning curves of its trials, and the space that they were drawn from."""

import math
from collections.abc import Sequence

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from companion.figures import COLOURS, panels_of, styled
from companion.tables import short


@styled
def halving(rungs: dict[int, int], epochs: int, spent: int) -> Figure:
    """Successive halving: trial by trial, how far it trains. `rungs`: epochs -> trials that train so far;
    `spent` are the epochs of all of them together.
    """
    trials = max(rungs.values())
    lengths = [max(rung for rung, many in rungs.items() if trial < many) for trial in range(trials)]
    drawn, (axis,) = panels_of(1, 8, 1.4 + 0.13 * trials)
    for trial, length in enumerate(lengths):
        axis.barh(trial, epochs, color="0.92", height=0.8)
        axis.barh(trial, length, color=COLOURS[0] if length == epochs else COLOURS[4], height=0.8)
    for rung in rungs:
        axis.axvline(rung, color="black", linewidth=0.8, linestyle="--")
    axis.set(xlabel="epoch", ylabel="trials, the best on top", xlim=(0, epochs))
    axis.set(xticks=list(rungs), yticks=[])
    axis.set_title(
        f"at each dashed line only the better part goes on: {spent} epochs instead of {trials * epochs}",
        fontsize=10,
    )
    axis.invert_yaxis()
    axis.grid(visible=False)
    return drawn


@styled
def curves(trials: Sequence[tuple[Sequence[float], bool]], metric: str) -> Figure:
    """A learning curve for each trial: (values by report, whether it went to the end); the others are grey,
    and end in a cross.
    """
    drawn, (axis,) = panels_of(1, 8, 3.4)
    labels = {True: "to the end", False: "stopped early"}
    for values, whole in sorted(trials, key=lambda trial: trial[1]):
        look = {"color": COLOURS[0], "linewidth": 1.4} if whole else {"color": COLOURS[6], "linewidth": 0.9}
        axis.plot(range(1, len(values) + 1), values, alpha=0.8, label=labels.pop(whole, None), **look)
        if values and not whole:
            axis.plot(len(values), values[-1], "x", color=COLOURS[5], markersize=5)
    axis.set(xlabel="epoch", ylabel=metric)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    drawn.legend(loc="outside upper center", ncols=2, fontsize=9)
    return drawn


@styled
def progress(searches: dict[str, Sequence[tuple[int, float]]], ylabel: str) -> Figure:
    """The best value so far against the reports spent, a line of steps for each search."""
    drawn, (axis,) = panels_of(1, 8, 3.4)
    for (name, pairs), colour in zip(searches.items(), COLOURS * len(searches), strict=False):
        spent, best = zip(*pairs, strict=True)
        axis.step(spent, best, where="post", color=colour, label=name)
        axis.plot(spent[-1], best[-1], "o", color=colour)
    axis.set(xlabel="epochs spent, all trials together", ylabel=ylabel)
    drawn.legend(loc="outside upper center", ncols=2, fontsize=9)
    return drawn


@styled
def parallel(rows: Sequence[dict[str, object]], metric: str, mode: str = "max") -> Figure:
    """Parallel coordinates: an axis for each name, a line for each row, coloured by its rank in the metric.

    Numbers that span more than a factor of 20 are on a logarithmic axis; texts stand in order.
    """
    names = list(rows[0])
    drawn, (axis,) = panels_of(1, 1.9 * len(names) + 1, 3.6)
    places = {name: _scale([row[name] for row in rows]) for name in names}
    order = sorted(rows, key=lambda row: row[metric], reverse=mode == "min")
    colours = plt.get_cmap("viridis")
    for rank, row in enumerate(order):
        share = rank / max(1, len(order) - 1)
        heights = [places[name][0][row[name]] for name in names]
        axis.plot(
            range(len(names)), heights, color=colours(share), alpha=0.35 + 0.65 * share**2, linewidth=1.6
        )
    for x, name in enumerate(names):
        axis.axvline(x, color="black", linewidth=0.8)
        for height, text in places[name][1]:
            axis.text(x + 0.03, height, text, fontsize=8, va="center")
    axis.set(xticks=range(len(names)), yticks=[], xlim=(-0.2, len(names) - 0.6))
    axis.set_xticklabels([f"{name}\n(yellow is best)" if name == metric else name for name in names])
    axis.grid(visible=False)
    axis.spines[["left", "bottom"]].set_visible(False)
    return drawn


def _scale(values: Sequence[object]) -> tuple[dict[object, float], list[tuple[float, str]]]:
    """Where each value stands on an axis from 0 to 1, and the axis' labels."""
    distinct = sorted(set(values), key=lambda value: (isinstance(value, str), value))
    numbers = all(isinstance(value, (int, float)) for value in distinct)
    if len(distinct) == 1:
        return {distinct[0]: 0.5}, [(0.5, _text(distinct[0]))]
    if not numbers:
        return {value: i / (len(distinct) - 1) for i, value in enumerate(distinct)}, [
            (i / (len(distinct) - 1), str(value)) for i, value in enumerate(distinct)
        ]
    low, high = distinct[0], distinct[-1]
    if low > 0 and high / low > 20:
        low, high = math.log(low), math.log(high)
        where = {value: (math.log(value) - low) / (high - low) for value in distinct}
    else:
        where = {value: (value - low) / (high - low) for value in distinct}
    labels = distinct if len(distinct) <= 8 else [distinct[0], distinct[-1]]
    return where, [(where[value], _text(value)) for value in labels]


def _text(value: object) -> str:
    return short(value, 3) if isinstance(value, (int, float)) else str(value)
