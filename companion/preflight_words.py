"""What the TPU compiler's answer means, in words and numbers about the reader's code."""

import linecache
import re
import sysconfig
from dataclasses import asdict, dataclass
from pathlib import Path

from companion import tables, tpu
from companion.preflight_chips import CHIPS, Chip

VALUES = (
    "a decision by a tensor's value (if, while, float(), item(), a range): the program is made before values "
    "are known",
    "decide on the device (torch.where, a product with 0 or 1), or leave the decision out of the step",
)
MASK = (
    "a selection whose size depends on values (x[mask], nonzero, unique): shapes must be known before",
    "keep the shape: torch.where(mask, x, 0), or a product with the mask and a division by its sum",
)
OUTSIDE = (
    "a tensor that is neither a parameter nor a buffer of the model meets one that is",
    "self.register_buffer(name, tensor, persistent=False), or make it in forward with device=x.device",
)
OPERATOR = (
    "an operator that torchax does not translate",
    "write it with other operators; torch_xla, which runs on the TPU itself, may know it",
)
NUMPY = (
    "values are taken out of the program (numpy(), tolist()): they are known only when it has run",
    "compute with torch's operators, on the device",
)
KINDS = {
    "TracerBoolConversionError": VALUES,
    "ConcretizationTypeError": VALUES,
    "TracerIntegerConversionError": VALUES,
    "TracerArrayConversionError": NUMPY,
    "NonConcreteBooleanIndexError": MASK,
    "OperatorNotFound": OPERATOR,
    "NotImplementedError": OPERATOR,
}
NOT_THEIRS = re.compile(r"-packages/(torch|torchax|jax|jaxlib|functorch)/|preflight_child\.py$|^<")
# The compiler's two ways to say that it does not fit, both of all that is needed.
NEEDED = re.compile(r"Used ([\d.]+)([KMGT]) of|for HLO temporaries \(([\d.]+)([KMGT])\) exceeds")
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Problem:
    """Why a step does not compile: what it is, the line of code (`file:line: text`), what to do, and the
    tool's own words.
    """

    what: str
    line: str
    fix: str
    said: str

    def __str__(self) -> str:
        return f"{self.what}\n  at {self.line}\n  fix: {self.fix}\n  ({self.said})"


@dataclass(frozen=True)
class Verdict:
    """What Google's compiler said of a step on so many chips; all numbers are of one device and one step.

    `needed_bytes` of `memory_bytes` are taken; `weight_bytes` are its arguments: weights, the optimizer's
    state, the batch. `flops` and `moved_bytes` are counted by the compiler. `estimate` are the seconds that
    it expects of the operators that it knows, a lower bound; of `unknown` others it knows nothing.
    `collectives` are the messages between devices.
    """

    chip: Chip
    chips: int
    batch: int
    layout: str
    dtype: str
    training: bool
    problem: Problem | None = None
    fits: bool = False
    needed_bytes: float = 0.0
    weight_bytes: float = 0.0
    temporary_bytes: float = 0.0
    flops: float = 0.0
    moved_bytes: float = 0.0
    estimate: float = 0.0
    unknown: int = 0
    collectives: tuple[tpu.Collective, ...] = ()
    compile_seconds: float = 0.0
    compiler_bytes: float = 0.0

    def numbers(self) -> dict[str, object]:
        """All of it as JSON can hold it, for `read`."""
        return asdict(self) | {"chip": self.chip.name}

    @property
    def compiles(self) -> bool:
        return self.problem is None

    @property
    def devices(self) -> int:
        return self.chips * self.chip.devices_per_chip

    @property
    def memory_bytes(self) -> float:
        """What a device has."""
        return self.chip.memory_bytes / self.chip.devices_per_chip

    @property
    def intensity(self) -> float:
        """FLOP for each byte moved."""
        return self.flops / self.moved_bytes if self.moved_bytes else 0.0

    @property
    def bound(self) -> str:
        """What limits it at best: "compute" or "memory"."""
        return "compute" if self.intensity >= self.chip.ridge else "memory"

    @property
    def roofline(self) -> float:
        """Seconds of a step at the chip's peak and full memory speed: a lower bound."""
        share = self.chip.devices_per_chip
        return max(self.flops / self.chip.peak_flops, self.moved_bytes / self.chip.memory_speed) * share

    @property
    def share_of_peak(self) -> float:
        """Of the chip's peak in bfloat16, at most: what the longer of both bounds allows."""
        seconds = max(self.roofline, self.estimate)
        return self.flops * self.chip.devices_per_chip / self.chip.peak_flops / seconds if seconds else 0.0

    @property
    def sent_bytes(self) -> float:
        """What each device sends in a step, in rings."""
        return sum(one.sent_bytes(self.devices) for one in self.collectives)

    @property
    def message_seconds(self) -> float:
        """What that takes at the full speed of all of a chip's links; some of it overlaps with computing."""
        return self.sent_bytes * self.chip.devices_per_chip / self.chip.link_speed

    def __str__(self) -> str:
        what = "training step" if self.training else "forward pass"
        where = (
            f"{self.chips} x {self.chip.name} ({self.chip.slices[self.chips]}), {self.layout}, {self.dtype}"
        )
        head = f"{what}, batch {self.batch}, on {where}"
        if self.problem:
            return f"{head}: does not compile: {self.problem}"
        gib = f"{self.needed_bytes / 2**30:.2f} of {self.memory_bytes / 2**30:.2f} GiB a device"
        if not self.fits:
            return f"{head}: does not fit: it needs {gib}"
        unknown = f"; operators unknown to it: {self.unknown}" if self.unknown else ""
        lines = [
            f"{head}: compiles and fits, {gib}",
            f"{self.flops:.3g} FLOP, {self.moved_bytes:.3g} bytes: {self.intensity:.1f} FLOP/byte, "
            f"{self.bound}-bound ({self.chip.name} turns at {self.chip.ridge:.0f})",
            f"at best {1e3 * self.roofline:.3g} ms by the roofline; the compiler's estimate, a lower bound, "
            f"{1e3 * self.estimate:.3g} ms{unknown}; at most {self.share_of_peak:.1%} of the peak",
        ]
        if self.devices > 1:
            lines.append(self.messages())
        return "\n".join(lines)

    def messages(self) -> str:
        """The collectives of a step, counted by kind."""
        counts: dict[str, int] = {}
        for one in self.collectives:
            counts[one.kind] = counts.get(one.kind, 0) + 1
        listed = ", ".join(f"{count} {kind}" for kind, count in counts.items()) or "none"
        return (
            f"messages: {listed}; each device sends {self.sent_bytes / 2**20:.3g} MiB, at best "
            f"{1e3 * self.message_seconds:.3g} ms beside computing"
        )

    def table(self) -> tables.Table:
        """All numbers, one a row."""
        mib = 2**20
        rows = [
            ("weights, optimizer's state, batch (MiB)", f"{self.weight_bytes / mib:,.1f}"),
            ("temporary (MiB)", f"{self.temporary_bytes / mib:,.1f}"),
            ("needed of a device's memory (GiB)", f"{self.needed_bytes / 2**30:.2f}"),
            ("FLOP", f"{self.flops:.4g}"),
            ("bytes moved", f"{self.moved_bytes:.4g}"),
            ("FLOP/byte", f"{self.intensity:.1f}"),
            ("roofline (ms)", f"{1e3 * self.roofline:.3g}"),
            ("compiler's estimate (ms)", f"{1e3 * self.estimate:.3g}"),
            ("operators unknown to the estimate", str(self.unknown)),
            ("bytes sent (MiB)", f"{self.sent_bytes / mib:.3g}"),
            ("messages at best (ms)", f"{1e3 * self.message_seconds:.3g}"),
            ("compiling took (s)", f"{self.compile_seconds:.1f}"),
            ("and memory (GiB)", f"{self.compiler_bytes / 2**30:.1f}"),
        ]
        return tables.Table(("a device, a step", "value"), rows)


def read(numbers: dict) -> Verdict:
    """A verdict from its `numbers`."""
    problem = numbers["problem"] and Problem(**numbers["problem"])
    messages = tuple(tpu.Collective(**one) for one in numbers["collectives"])
    return Verdict(**numbers | {"chip": CHIPS[numbers["chip"]], "problem": problem, "collectives": messages})


def settled(answer: dict) -> bool:
    """Whether the same question would get the same answer: it compiled, does not fit, or is known not to
    compile. Another error may be the environment's.
    """
    return "error" not in answer or answer["error"] in KINDS or bool(NEEDED.search(answer["message"]))


def verdict(answer: dict, chip: Chip, **about: object) -> Verdict:
    """What the child's answer means."""
    spent = {
        "compile_seconds": answer.get("read_seconds", 0.0) + answer.get("compile_seconds", 0.0),
        "compiler_bytes": answer["memory_bytes"],
    }
    if "error" in answer:
        if found := NEEDED.search(answer["message"]):
            number, unit = [group for group in found.groups() if group]
            needed = float(number) * UNITS[unit]
            return Verdict(chip, needed_bytes=needed, **about, **spent)
        return Verdict(chip, problem=_problem(answer), **about, **spent)
    unknown = answer["unknown"]
    return Verdict(
        chip,
        fits=True,
        needed_bytes=answer["argument_bytes"]
        + answer["output_bytes"]
        + answer["temporary_bytes"]
        + answer["code_bytes"]
        - answer["reused_bytes"],
        weight_bytes=answer["argument_bytes"],
        temporary_bytes=answer["temporary_bytes"],
        flops=answer["flops"],
        moved_bytes=answer["bytes"],
        estimate=answer["optimal_seconds"] + unknown,
        unknown=unknown,
        collectives=tuple(tpu.Collective(*one) for one in answer["collectives"]),
        **about,
        **spent,
    )


def _problem(answer: dict) -> Problem:
    said = f"{answer['error']}: {answer['message'].strip().splitlines()[0] if answer['message'] else ''}"
    what, fix = KINDS.get(answer["error"], ("the compiler refuses the step", "see what it says"))
    if "mixed math" in answer["message"]:
        what, fix = OUTSIDE
    theirs = [
        frame for frame in answer["frames"] if not NOT_THEIRS.search(frame[0]) and not _standard(frame[0])
    ]
    if not theirs:
        return Problem(what, "a line of torch's or jax's own", fix, said)
    file, number, _ = theirs[-1]
    text = linecache.getline(file, number).strip()
    name = "a cell" if "ipykernel" in file else Path(file).name
    return Problem(what, f"{name}:{number}: {text}", fix, said)


def _standard(file: str) -> bool:
    """Whether it is Python's own."""
    return file.startswith(sysconfig.get_path("stdlib")) and "site-packages" not in file
