"""Figures of layouts: what lies where, predictions against measurements, and what grows with a cluster."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from companion.figures import COLOURS, panels_of, styled
from companion.layouts import Estimate, Layout
from companion.measure import Spread

PALE = 0.45
ALLOWED = 0.2  # the relative error that the agreement's band shows


@styled
def placed(layouts: Sequence[Layout], layers: int = 4, columns: int = 4) -> Figure:
    """A row for each layout, a drawing for each device: the share of the batch that it sees (left), and which
    part of which layer it computes with (right); pale where it keeps only a share of that between the steps.
    """
    devices = layouts[0].devices
    drawn, (axis,) = panels_of(1, 2.6 + 1.9 * devices, 0.6 + 1.25 * len(layouts))
    axis.axis("off")
    for row, layout in enumerate(layouts):
        axis.text(-0.1, row + 0.42, str(layout).replace(", ", "\n"), ha="right", va="center", fontsize=9.5)
        for device in range(devices):
            _device(axis, layout, device, (device, row), layers, columns)
    for device in range(devices):
        axis.text(device + 0.42, -0.12, f"device {device}", ha="center", va="bottom", fontsize=9.5)
    axis.set(xlim=(-0.75, devices), ylim=(len(layouts), -0.35))
    looks = {
        "its part of the batch": (COLOURS[1], 1.0),
        "weights that it computes with": (COLOURS[0], 1.0),
        "the same, of which it keeps a share": (COLOURS[0], PALE),
    }
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour, alpha=alpha) for colour, alpha in looks.values()]
    drawn.legend(handles, list(looks), loc="outside lower center", ncols=3, fontsize=9)
    return drawn


def _device(axis: Axes, layout: Layout, device: int, corner: tuple[float, float], layers: int, columns: int):
    """Ranks count through tensor first, then data, then pipeline."""
    tensor, rest = device % layout.tensor, device // layout.tensor
    data, stage = rest % layout.data, rest // layout.data
    left, top = corner
    height = 0.8 / layers
    for part in range(layout.devices):
        seen = data * layout.devices <= part * layout.data < (data + 1) * layout.devices
        place = (left, top + 0.8 * part / layout.devices)
        look = {"facecolor": COLOURS[1] if seen else "0.92", "edgecolor": "white"}
        axis.add_patch(plt.Rectangle(place, 0.1, 0.8 / layout.devices, **look))
    for layer in range(layers):
        for column in range(columns):
            mine = layer * layout.pipeline // layers == stage and column * layout.tensor // columns == tensor
            pale = PALE if mine and layout.sharding == "parameters" else 1.0
            look = {"facecolor": COLOURS[0] if mine else "0.92", "alpha": pale}
            place = (left + 0.16 + 0.64 * column / columns, top + height * layer)
            axis.add_patch(plt.Rectangle(place, 0.64 / columns, height, edgecolor="white", **look))


@styled
def agreement(measured: Mapping[str, Spread], predicted: Mapping[str, float], quantity: str) -> Figure:
    """Predictions against measurements by name; on the line both are equal, in the band within 20 %."""
    drawn, (axis,) = panels_of(1, 8, 4.6)
    ends = [*(spread.low for spread in measured.values()), *predicted.values()]
    low = 0.85 * min(ends)
    high = 1.15 * max(*(spread.high for spread in measured.values()), *predicted.values())
    axis.plot((low, high), (low, high), "--", color="black", linewidth=1, label="equal")
    band = ((1 - ALLOWED) * low, (1 - ALLOWED) * high), ((1 + ALLOWED) * low, (1 + ALLOWED) * high)
    axis.fill_between((low, high), *band, color="0.92", label=f"within {ALLOWED:.0%}")
    markers = "osD^vP*X<>hd"
    for number, (name, spread) in enumerate(measured.items()):
        colour, marker = COLOURS[number % len(COLOURS)], markers[number % len(markers)]
        axis.hlines(predicted[name], spread.low, spread.high, color=colour, linewidth=1.2)
        axis.plot(spread.median, predicted[name], marker, color=colour, markersize=7, label=name)
    axis.set(xlabel=f"measured: {quantity}", ylabel=f"predicted: {quantity}")
    axis.set(xlim=(low, high), ylim=(low, high))
    drawn.legend(loc="outside right upper", fontsize=9)
    return drawn


@styled
def scaling(found: Mapping[str, Mapping[int, Estimate]], limits: Mapping[str, float], title: str) -> Figure:
    """Time of a step and bytes of a device against the number of devices, a line for each cluster.

    `found`: cluster -> devices -> the best layout's estimate; `limits`: cluster -> bytes of its devices.
    """
    drawn, (times, memory) = panels_of(2, 10, 4.2)
    looks = zip(COLOURS, ("o", "s", "^", "D"), (9, 5, 5, 5), strict=False)  # lines may hide each other
    for (name, estimates), (colour, marker, size) in zip(found.items(), looks, strict=False):
        look, counts = {"marker": marker, "markersize": size, "color": colour}, list(estimates)
        seconds = [one.step_seconds for one in estimates.values()]
        times.plot(counts, seconds, label=name, **look)
        ideal = [seconds[0] * counts[0] / count for count in counts]
        times.plot(counts, ideal, ":", color=colour, linewidth=1)
        gigabytes = [one.total_bytes / 1e9 for one in estimates.values()]
        memory.plot(counts, gigabytes, **look)
        memory.axhline(limits[name] / 1e9, color=colour, linewidth=1, linestyle="--")
    times.plot([], [], ":", color="black", linewidth=1, label="twice the devices, half the time")
    memory.plot([], [], "--", color="black", linewidth=1, label="memory of a device")
    times.set(xlabel="devices", ylabel="seconds a step")
    memory.set(xlabel="devices", ylabel="GB a device")
    memory.set_ylim(bottom=0)
    times.set_yscale("log")
    for axis in (times, memory):
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda value, place: f"{value:,.0f}")
        axis.tick_params(axis="x", rotation=45)
    drawn.suptitle(title, fontsize=10)
    drawn.legend(loc="outside lower center", ncols=5, fontsize=9)
    return drawn


@styled
def shares(found: Mapping[str, Mapping[int, Estimate]], title: str) -> Figure:
    """Which share of a step each term takes, against the number of devices; a panel for each cluster."""
    drawn, panels = panels_of(len(found), 11, 4.2)
    for axis, (name, estimates) in zip(panels, found.items(), strict=True):
        counts = list(estimates)
        parts = {
            term: [100 * one.seconds[term] / one.step_seconds for one in estimates.values()]
            for term in next(iter(estimates.values())).seconds
        }
        colours = COLOURS[: len(parts)]
        axis.stackplot(range(len(counts)), *parts.values(), colors=colours, labels=list(parts))
        axis.set(title=name, xlabel="devices", xlim=(0, len(counts) - 1), ylim=(0, 100))
        axis.set_xticks(range(len(counts)), [f"{count:,}" for count in counts], rotation=60, fontsize=8)
        axis.grid(visible=False)
    panels[0].set_ylabel("share of a step (%)")
    drawn.suptitle(title, fontsize=10)
    handles, labels = panels[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=9)
    return drawn
