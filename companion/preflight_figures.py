"""The roofline of a TPU chip, with what was asked of it."""

from matplotlib.figure import Figure

from companion.figures import COLOURS, panels_of, styled
from companion.preflight_words import Verdict


@styled
def roofline(verdicts: dict[str, Verdict]) -> Figure:
    """Attainable speed against arithmetic intensity: what the chip allows, and where each step stands.

    A hollow circle is what the roofline allows at the step's intensity, a dot what is left of it by the
    compiler's own estimate; both are bounds. Raises ValueError for several kinds of chip. Source:
    Williams, Waterman and Patterson 2009.
    """
    chip = next(iter(verdicts.values())).chip
    if any(verdict.chip != chip for verdict in verdicts.values()):
        raise ValueError("one roofline is of one kind of chip")
    drawn, (axis,) = panels_of(1, 9, 4.2)
    values = [max(verdict.intensity, 1e-3) for verdict in verdicts.values()]
    ends = [min(*values, chip.ridge) / 3, max(*values, chip.ridge) * 3]
    x = [ends[0], chip.ridge, ends[1]]
    roof = [min(chip.peak_flops, chip.memory_speed * value) / 1e12 for value in x]
    axis.plot(x, roof, color="black", linewidth=1.5)
    axis.axvline(chip.ridge, color=COLOURS[6], linewidth=1, linestyle=":")
    order = sorted(verdicts, key=lambda name: verdicts[name].intensity)
    for number, (name, verdict) in enumerate(verdicts.items(), 1):
        colour = COLOURS[(number - 1) % len(COLOURS)]
        allowed = min(chip.peak_flops, chip.memory_speed * verdict.intensity) / 1e12
        reached = verdict.share_of_peak * chip.peak_flops / 1e12
        axis.plot(verdict.intensity, allowed, "o", color=colour, markerfacecolor="none", markersize=8)
        axis.plot(verdict.intensity, reached, "o", color=colour, label=f"{number}  {name}")
        axis.plot([verdict.intensity] * 2, [allowed, reached], color=colour, linewidth=1)
        above = order.index(name) % 2  # neighbours' numbers on either side
        place = (-10, 8) if above else (4, -12)
        axis.annotate(str(number), (verdict.intensity, reached), place, textcoords="offset points")
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="FLOP per byte of memory moved",
        ylabel=f"TFLOP/s of one {chip.name}",
    )
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=9)
    return drawn
