"""Figures of what is gained against what is lost: size, speed and accuracy; distributions of weights."""

from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from companion.figures import COLOURS, middle, panels_of, styled
from companion.measure import Spread


@styled
def pareto(
    accuracy: dict[str, float],
    gains: dict[str, dict[str, float | Spread]],
    log: Sequence[str] = (),
    noise: float = 0.0,
) -> Figure:
    """Accuracy, from 0 to 1, against each gain (more is better), a panel each: title -> name -> value.

    The line joins those that nothing else beats in both. Points have numbers, which a list explains: names
    would lie on each other. The grey band is `noise`, such as two standard errors, about the first accuracy.
    """
    names = list(accuracy)
    drawn, panels = panels_of(len(gains), 10, 3.2 + 0.07 * len(names))
    for axis, (title, values) in zip(panels, gains.items(), strict=True):
        for number, name in enumerate(names, 1):
            if name in values:
                _point(axis, values[name], 100 * accuracy[name], number)
        best = front({name: (middle(values[name]), accuracy[name]) for name in names if name in values})
        axis.plot(
            [middle(values[name]) for name in best],
            [100 * accuracy[name] for name in best],
            color=COLOURS[6],
            linewidth=1,
            zorder=1,
        )
        _band(axis, accuracy[names[0]], noise)
        axis.set(xlabel=title, xscale="log" if title in log else "linear")
        axis.margins(0.12)
    panels[0].set(ylabel="accuracy (%)")
    listed = "\n".join(f"{number}  {name}" for number, name in enumerate(names, 1))
    panels[-1].text(1.04, 1, listed, transform=panels[-1].transAxes, va="top", fontsize=9)
    return drawn


def front(points: dict[str, tuple[float, float]]) -> list[str]:
    """The names of the points that no other equals or beats in both coordinates, by the first one."""

    def beaten(name: str) -> bool:
        x, y = points[name]
        return any(a >= x and b >= y and (a, b) != (x, y) for a, b in points.values())

    return sorted((name for name in points if not beaten(name)), key=lambda name: points[name])


def _point(axis: Axes, value: float | Spread, height: float, number: int) -> None:
    colour = COLOURS[(number - 1) % len(COLOURS)]
    if isinstance(value, Spread):
        axis.hlines(height, value.low, value.high, color=colour, linewidth=1.2)
    axis.plot(middle(value), height, "o", color=colour, markersize=7)
    offset = [(4, 4), (4, -12), (-14, 4), (-14, -12)][number % 4]  # in turn, where points lie close together
    axis.annotate(str(number), (middle(value), height), offset, textcoords="offset points", fontsize=9)


def _band(axis: Axes, level: float, noise: float) -> None:
    if noise:
        axis.axhspan(100 * (level - noise), 100 * (level + noise), color="0.93", zorder=0)


@styled
def accuracies(
    curves: dict[str, tuple[Sequence[float], Sequence[float | Spread]]],
    xlabel: str,
    levels: dict[str, float] | None = None,
    log: bool = False,
    ticks: Sequence[float] | None = None,
    dashed: Sequence[str] = (),
    noise: float = 0.0,
    marks: dict[str, float] | None = None,
) -> Figure:
    """Accuracy, from 0 to 1, against something: name -> (x, accuracies); `levels` are named accuracies.

    Accuracies with a spread have whiskers. `dashed` names the curves of what is only there to compare with.
    The grey bands are `noise`, such as two standard errors, about the levels; `marks` are named places on the
    horizontal axis.
    """
    drawn, (axis,) = panels_of(1, 8, 3.4 + 0.12 * len(curves))
    for (name, (x, values)), colour in zip(curves.items(), COLOURS * len(curves), strict=False):
        look = "o--" if name in dashed else "o-"
        axis.plot(x, [100 * middle(value) for value in values], look, color=colour, linewidth=1, label=name)
        for at, value in zip(x, values, strict=True):
            if isinstance(value, Spread):
                axis.vlines(at, 100 * value.low, 100 * value.high, color=colour, linewidth=1.2)
    for name, level in (levels or {}).items():
        axis.axhline(100 * level, color="black", linewidth=0.8, linestyle=":")
        _band(axis, level, noise)
        place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        axis.annotate(name, (1, 100 * level), (4, 0), va="center", fontsize=9, **place)
    for name, mark in (marks or {}).items():
        axis.axvline(mark, color="black", linewidth=0.8, linestyle="--", label=name)
    axis.set(xlabel=xlabel, ylabel="accuracy (%)")
    if log:
        axis.set_xscale("log", base=2)
    if ticks is not None:
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
    drawn.legend(loc="outside upper center", ncols=min(3, len(curves)), fontsize=9)
    return drawn


@styled
def histograms(weights: dict[str, torch.Tensor], xlabel: str, bins: int = 201) -> Figure:
    """How often each value stands in each tensor, a panel each, all on the same axes.

    With so many bins the few values that integers can have are seen apart from each other.
    """
    drawn, panels = panels_of(len(weights), 10, 2.8)
    reach = max(float(tensor.detach().abs().max()) for tensor in weights.values())
    for axis, (name, tensor), colour in zip(panels, weights.items(), COLOURS * len(weights), strict=False):
        counts = torch.histc(tensor.detach().float().flatten(), bins, -reach, reach)  # [bins]
        axis.bar(torch.linspace(-reach, reach, bins).numpy(), counts.numpy(), 2 * reach / bins, color=colour)
        axis.set(title=f"{name}: {len(tensor.unique())} values", xlabel=xlabel, yscale="symlog")
        axis.set_ylim(bottom=0)
    panels[0].set(ylabel="how many")
    return drawn
