"""TPU chips as Google documents them, and the slices of them that its compiler knows.

Source: Google Cloud's "System architecture" pages of each chip, read in 2026; of the memory, what the
compiler says is available.
"""

from dataclasses import dataclass

_SQUARES = {
    1: "1x1",
    4: "2x2",
    8: "2x4",
    16: "4x4",
    32: "4x8",
    64: "8x8",
    128: "8x16",
    256: "16x16",
}
_CUBES = {
    4: "2x2x1",
    8: "2x2x2",
    16: "2x2x4",
    32: "2x4x4",
    64: "4x4x4",
    128: "4x4x8",
    256: "4x8x8",
    512: "8x8x8",
}


@dataclass(frozen=True)
class Chip:
    """A kind of chip: its peak in bfloat16 (FLOP/s), its high-bandwidth memory (bytes) and the speed of that
    (bytes/s), what it sends to its neighbours over all links (bytes/s, one direction), by number of chips
    the compiler's name for such a slice, and how many devices a program sees in a chip.
    """

    name: str
    peak_flops: float
    memory_bytes: float
    memory_speed: float
    link_speed: float
    slices: dict[int, str]
    devices_per_chip: int = 1

    @property
    def ridge(self) -> float:
        """The arithmetic intensity, in FLOP/byte, from which on computing is what limits. Source: Williams,
        Waterman and Patterson 2009.
        """
        return self.peak_flops / self.memory_speed


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, 30.75 * 2**30, 1228e9, 300e9, _CUBES),
        Chip("v5e", 197e12, 15.75 * 2**30, 819e9, 200e9, _SQUARES),
        Chip("v5p", 459e12, 95.73 * 2**30, 2765e9, 600e9, _CUBES),
        Chip("v6e", 918e12, 31.24 * 2**30, 1640e9, 400e9, _SQUARES),
        Chip("tpu7x", 2307e12, 2 * 94.74 * 2**30, 7380e9, 600e9, {4: "2x2x1"}, devices_per_chip=2),
    )
}


def chip(name: str, chips: int) -> Chip:
    """The chip of this name. Raises ValueError, with the valid ones, for a name or number that the compiler
    does not know.
    """
    if name not in CHIPS:
        raise ValueError(f"chip={name!r}: give one of {', '.join(CHIPS)}")
    known = CHIPS[name]
    if chips not in known.slices:
        sizes = ", ".join(f"{count} ({shape})" for count, shape in known.slices.items())
        raise ValueError(f"chips={chips!r}: of {name} there are slices of {sizes} chips")
    return known
