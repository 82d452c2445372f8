"""The figures of all notebooks, in one look.

Each function gives a Figure, which shows as the last line of a notebook's cell.
"""

from collections.abc import Sequence

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from companion.figures import COLOURS, middle, panels_of, styled, whisker
from companion.measure import Spread
from companion.tables import short
from companion.training import History


@styled
def learning_curves(histories: dict[str, History]) -> Figure:
    """Loss and validation accuracy by epoch, of one or several trainings; those after the first as marks,
    which lie on its lines where they agree.
    """
    drawn, (left, right) = panels_of(2)
    for number, (name, history) in enumerate(histories.items()):
        colour, shape = COLOURS[number % len(COLOURS)], "os^v"[(number - 1) % 4]
        trained, validated = (shape, shape) if number else ("-", "--")
        fill = {"color": colour, "markersize": 6}
        epochs = range(1, len(history.train_loss) + 1)
        left.plot(epochs, history.train_loss, trained, label=f"{name}, training", **fill)
        if history.val_loss:
            hollow = fill | {"fillstyle": "none"}
            left.plot(epochs, history.val_loss, validated, label=f"{name}, validation", **hollow)
            accuracies = [100 * accuracy for accuracy in history.val_accuracy]
            right.plot(epochs, accuracies, trained, label=name, **fill)
    left.set(ylabel="cross-entropy", yscale="log")
    right.set(ylabel="validation accuracy (%)")
    for axis in (left, right):
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.legend(fontsize=8)
    if len(histories) > 1:
        right.legend(fontsize=8)
    return drawn


@styled
def breakdown(parts: dict[str, dict[str, float]], unit: str = "ms", scale: float = 1e3) -> Figure:
    """One stacked bar for each entry of `parts`: seconds by name of the part, drawn as seconds * `scale` in
    `unit`.
    """
    drawn, (axis,) = panels_of(1, 8, 0.9 + 0.55 * len(parts))
    names = list(dict.fromkeys(name for seconds in parts.values() for name in seconds))
    left = [0.0] * len(parts)
    for name, colour in zip(names, COLOURS, strict=False):
        widths = [seconds.get(name, 0.0) * scale for seconds in parts.values()]
        axis.barh(list(parts), widths, left=left, color=colour, label=name, height=0.6)
        for row, width in enumerate(widths):
            if width > 0.06 * max(sum(seconds.values()) for seconds in parts.values()) * scale:
                text = f"{width:.0f}" if width >= 10 else f"{width:.2g}"
                axis.text(
                    left[row] + width / 2, row, text, ha="center", va="center", fontsize=9, color="white"
                )
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.set(xlabel=f"time of a step ({unit})")
    drawn.legend(loc="outside upper center", ncols=len(names), fontsize=9)
    return drawn


@styled
def ladder(
    rungs: dict[str, tuple[float | Spread, float]],
    kept: Sequence[str],
    limits: dict[str, float],
    accuracy: str = "validation accuracy (%), same number of samples",
) -> Figure:
    """Samples per second (bars) and accuracy from 0 to 1 (points) of each rung; those not in `kept` are grey.

    Speeds with a spread have whiskers. `limits` are samples per second that theory or a bare computation
    allows, drawn as dashed lines.
    """
    drawn, (left, right) = panels_of(2, 9, 1.1 + 0.38 * len(rungs))
    names = list(rungs)
    speeds, accuracies = zip(*rungs.values(), strict=True)
    middles = [middle(speed) for speed in speeds]
    colours = [COLOURS[0] if name in kept else COLOURS[6] for name in names]
    bars = left.barh(names, middles, color=colours, height=0.65)
    gains = [f"{speed / middles[0]:.1f}x" for speed in middles]
    left.bar_label(bars, gains, label_type="center", color="white", fontsize=9)
    ends = [whisker(left, speed, place) for place, speed in enumerate(speeds)]
    for (name, limit), colour in zip(limits.items(), COLOURS[1:], strict=False):
        left.axvline(limit, linestyle="--", color=colour, label=name)
    left.set(
        xlabel="training samples per second (grey: not kept)", xlim=(0, 1.08 * max(*ends, *limits.values()))
    )
    left.xaxis.set_major_formatter(EngFormatter(sep=""))
    right.scatter([100 * value for value in accuracies], names, color=colours)
    right.set(xlabel=accuracy, yticklabels=[])
    for axis in (left, right):
        axis.invert_yaxis()
        axis.grid(axis="y", visible=axis is right)
    drawn.legend(loc="outside upper center", ncols=len(limits), fontsize=9)
    return drawn


@styled
def against_theory(
    series: dict[str, tuple[Sequence[float], Sequence[float | Spread], Sequence[float]]],
    xlabel: str,
    ylabel: str,
    levels: dict[str, float] | None = None,
    marks: dict[str, float] | None = None,
    log: str = "x",
) -> Figure:
    """Points that were measured and a dashed line that theory predicts, for each name: (x, measured,
    predicted).

    Either may be empty. Measured values with a spread have whiskers.

    `levels` and `marks` are named horizontal and vertical lines; `log` names the logarithmic axes, "", "x" or
    "xy".
    """
    drawn, (axis,) = panels_of(1, 8, 3.4 + 0.25 * len(series))
    for (name, (x, measured, predicted)), colour in zip(series.items(), COLOURS, strict=False):
        if measured:
            axis.plot(
                x,
                [middle(value) for value in measured],
                "o-",
                color=colour,
                linewidth=1,
                label=f"{name}, measured",
            )
            for at, value in zip(x, measured, strict=True):
                if isinstance(value, Spread):
                    axis.vlines(at, value.low, value.high, color=colour, linewidth=1.2)
        if predicted:
            axis.plot(x, predicted, "--", color=colour, label=f"{name}, predicted")
    for name, level in (levels or {}).items():
        axis.axhline(level, color="black", linewidth=0.8, linestyle=":")
        axis.annotate(name, (1, level), (4, 0), xycoords=("axes fraction", "data"), **_NOTE)
    if "x" in log:
        axis.set_xscale("log", base=2)
    for number, (name, place) in enumerate((marks or {}).items()):
        axis.axvline(place, color=COLOURS[6], linewidth=0.8, linestyle=":")
        above = {"xycoords": ("data", "axes fraction"), "rotation": 35, "ha": "left"}
        # Every other one higher: names of near places would lie on each other.
        axis.annotate(name, (place, 1), (0, 2 + 16 * (number % 2)), **_NOTE | above | {"va": "bottom"})
    axis.set(xlabel=xlabel, ylabel=ylabel, yscale="log" if "y" in log else "linear")
    axis.xaxis.set_major_formatter(
        EngFormatter(sep="", places=0) if "x" in log else axis.xaxis.get_major_formatter()
    )
    if "y" not in log:
        axis.set_ylim(bottom=0)
    drawn.legend(loc="outside upper center", ncols=2, fontsize=9)
    return drawn


@styled
def lines(x: Sequence[float], curves: dict[str, Sequence[float]], xlabel: str, ylabel: str) -> Figure:
    """Functions of the same x, one line each."""
    drawn, (axis,) = panels_of(1, 8, 3.2)
    for (name, values), colour in zip(curves.items(), COLOURS, strict=False):
        axis.plot(x, values, color=colour, label=name)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    drawn.legend(loc="outside upper center", ncols=len(curves), fontsize=9)
    return drawn


@styled
def difference(
    series: dict[str, Sequence[float]], xlabel: str, ylabel: str, allowed: dict[str, float]
) -> Figure:
    """How far apart two curves are, point by point from 1 on, where the curves would hide each other.

    `allowed` are named tolerances, drawn as dashed lines. The axis is logarithmic above the smallest
    difference, and 0 is 0.
    """
    drawn, (axis,) = panels_of(1, 8, 3.2)
    for (name, values), colour in zip(series.items(), COLOURS, strict=False):
        apart = [abs(value) for value in values]
        axis.plot(range(1, len(apart) + 1), apart, "o", markersize=4, color=colour, label=name)
    sizes = [abs(x) for values in series.values() for x in values if x] or [min(allowed.values())]
    axis.set_yscale("symlog", linthresh=min(sizes))
    axis.set(xlabel=xlabel, ylabel=ylabel, ylim=(-0.2 * min(sizes), 5 * max(*sizes, *allowed.values())))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    for name, level in allowed.items():
        axis.axhline(level, color="black", linewidth=1, linestyle="--")
        axis.annotate(name, (1, level), (4, 0), xycoords=("axes fraction", "data"), **_NOTE)
    drawn.legend(loc="outside upper center", ncols=len(series), fontsize=9)
    return drawn


_NOTE = {"textcoords": "offset points", "va": "center", "fontsize": 9}


@styled
def timeline(
    lanes: dict[str, list[tuple[str, float, float]]],
    colours: dict[str, str] | None = None,
    title: str | None = None,
    xlabel: str = "time (ms)",
) -> Figure:
    """What happened when: lane -> [(what, start, end)], in seconds, drawn in milliseconds; `colours` by the
    first word.
    """
    drawn, (axis,) = panels_of(1, 9, 0.9 + 0.6 * len(lanes))
    words = list(dict.fromkeys(what.split()[0].rstrip(",") for spans in lanes.values() for what, *_ in spans))
    colours = dict(zip(words, COLOURS * len(words), strict=False)) | (colours or {})
    width = 1e3 * max(end for spans in lanes.values() for *_, end in spans)
    for row, spans in enumerate(lanes.values()):
        levels: list[float] = []  # spans that overlap are drawn below each other
        places = []
        for what, start, end in sorted(spans, key=lambda span: span[1]):
            level = next((i for i, free in enumerate(levels) if free <= start), len(levels))
            levels[level : level + 1] = [end]
            places.append((what, 1e3 * start, 1e3 * (end - start), level))
        for what, start, length, level in places:
            height = 0.8 / len(levels)
            bottom = row - 0.4 + level * height
            look = {"facecolor": colours[what.split()[0].rstrip(",")], "edgecolor": "white", "linewidth": 0.5}
            axis.broken_barh([(start, length)], (bottom, 0.92 * height), **look)
            # A micro-batch's number fits where its name does not.
            short = what if "\n" in what else what.split()[-1]
            for text in (what, short):
                if length > 0.012 * max(map(len, text.split("\n"))) * width:
                    axis.text(
                        start + length / 2,
                        bottom + 0.46 * height,
                        text,
                        ha="center",
                        va="center",
                        fontsize=8,
                        color="white",
                    )
                    break
    if title:
        drawn.legend(
            [plt.Rectangle((0, 0), 1, 1, color=colours[word]) for word in words],
            words,
            loc="outside right upper",
        )
    axis.set(
        title=title,
        xlabel=xlabel,
        xlim=(0, width),
        yticks=range(len(lanes)),
        ylim=(len(lanes) - 0.5, -0.5),
    )
    axis.set_yticklabels(list(lanes))
    axis.grid(axis="y", visible=False)
    return drawn


@styled
def bars(columns: dict[str, dict[str, float | Spread]], log: Sequence[str] = ()) -> Figure:
    """One panel for each quantity: quantity with its unit -> name -> value.

    Those in `log` are points on a logarithmic axis, where the length of a bar would mean nothing. Values with
    a spread have whiskers.
    """
    rows = list(dict.fromkeys(name for values in columns.values() for name in values))
    drawn, panels = panels_of(len(columns), 9, 1.0 + 0.34 * len(rows))
    for axis, (title, values), colour in zip(panels, columns.items(), COLOURS * len(columns), strict=False):
        places, middles = (
            range(len(rows)),
            [middle(values[name]) if name in values else 0.0 for name in rows],
        )
        if title in log:
            axis.plot(middles, places, "o", color=colour)
            axis.set_xscale("log")
        else:
            axis.barh(places, middles, color=colour, height=0.65)
        for place, name in zip(places, rows, strict=True):
            if name in values:
                end = whisker(axis, values[name], place)
                axis.annotate(
                    short(middle(values[name]), 3),
                    (end, place),
                    (5, 0),
                    va="center",
                    textcoords="offset points",
                    fontsize=9,
                )
        if all(isinstance(value, int) for value in values.values()):
            axis.xaxis.set_major_locator(MaxNLocator(max(2, 10 // len(columns)), integer=True))
        axis.set(xlabel=title, yticks=places, yticklabels=rows if axis is panels[0] else [])
        axis.margins(x=0.3)
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.grid(axis="y", visible=False)
    return drawn
