"""Which variant of fewer bits pays here: each tried in a process of its own, in turn with float32.

found = quantization_compare.compare(model, images, accuracy)  # accuracy(model): from 0 to 1
print(found.table()); found.figure(batch_size=64)
"""

import copy
import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from torch import nn

from companion import launch, measure, memory, quantization, tables, tradeoffs
from companion import quantization_peers as peers
from companion import quantization_pt2e as pt2e

FLOAT = "float32"
MOSTLY_FLOAT = 0.6  # of float32's bytes: where all weights are integers it is a quarter


@dataclass(frozen=True)
class Row:
    """One variant: accuracy, speed-up over float32 by batch size, bytes on disk; or the reason why not."""

    name: str
    accuracy: float | None = None
    speed_up: dict[int, measure.Spread] | None = None
    disk_bytes: int | None = None
    busy: str | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Comparison:
    """The variants in the order in which they were tried, float32 first."""

    rows: tuple[Row, ...]

    def __getitem__(self, name: str) -> Row:
        """The row of one variant; KeyError if it was not tried."""
        return {row.name: row for row in self.rows}[name]

    def table(self) -> tables.Table:
        sizes = list(self.rows[0].speed_up)
        head = ("variant", "accuracy", *(f"speed-up, batch {size}" for size in sizes), "KiB", "remark")
        return tables.Table(head, [self._cells(row, sizes) for row in self.rows])

    def _cells(self, row: Row, sizes: Sequence[int]) -> tuple[str, ...]:
        if row.reason:
            return row.name, *[""] * (len(sizes) + 2), row.reason
        gains = (f"{row.speed_up[size]:.2f}x {measure.verdict(row.speed_up[size])}" for size in sizes)
        share = row.disk_bytes / self.rows[0].disk_bytes
        mostly = f"most of it stayed float: {share:.0%} of the bytes" if share > MOSTLY_FLOAT else ""
        remarks = [mostly if row.name.startswith("int8") else "", row.busy or ""]
        size = f"{row.disk_bytes / 1024:,.1f}"
        return row.name, f"{row.accuracy:.2%}", *gains, size, "; ".join(filter(None, remarks))

    def figure(self, batch_size: int, noise: float = 0.0) -> Figure:
        """Accuracy against the speed-up at this batch size, and against how many times smaller files are.

        `noise` is what accuracies vary by chance, from 0 to 1: drawn as a band about float32's.
        """
        rows = {row.name: row for row in self.rows if not row.reason}
        gains = {
            f"speed-up over {FLOAT}, batch {batch_size}": {
                name: row.speed_up[batch_size] for name, row in rows.items()
            },
            "times smaller": {name: self.rows[0].disk_bytes / row.disk_bytes for name, row in rows.items()},
        }
        return tradeoffs.pareto({name: row.accuracy for name, row in rows.items()}, gains, noise=noise)

    def best(self, batch_size: int, budget: float = 0.005) -> Row:
        """The fastest variant at this batch size whose accuracy is at most `budget` (0.005: half a point)
        below float32's.

        Judged by the lower end of the spread; where nothing is faster for sure, that is float32 itself.
        """
        allowed = self.rows[0].accuracy - budget
        fit = [row for row in self.rows[1:] if not row.reason and row.accuracy >= allowed]
        fastest = max(fit, key=lambda row: row.speed_up[batch_size].low, default=self.rows[0])
        return fastest if fastest.speed_up[batch_size].low > 1 else self.rows[0]


class In(nn.Module):
    """A model of another type, or layout, that takes and gives float32."""

    def __init__(
        self, model: nn.Module, dtype: torch.dtype, layout: torch.memory_format = torch.preserve_format
    ):
        super().__init__()
        self.model, self.dtype, self.layout = model.to(memory_format=layout), dtype, layout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.is_floating_point():  # token numbers stay what they are
            x = x.to(self.dtype, memory_format=self.layout)
        return self.model(x).float()


class Scripted(nn.Module):
    """A model as a frozen script, which has no modes and would not be told of any."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.script = (torch.jit.freeze(torch.jit.script(model.eval())),)  # a tuple: not part of this module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.script[0](x)


Maker = Callable[[nn.Module, list[torch.Tensor]], nn.Module]
VARIANTS: dict[str, Maker] = {
    FLOAT: lambda model, data: model,
    "float32, compiled": lambda model, data: pt2e.compiled(model),
    "float16": lambda model, data: In(quantization.cast(model, torch.float16), torch.float16),
    "bfloat16": lambda model, data: In(quantization.cast(model, torch.bfloat16), torch.bfloat16),
    "bfloat16, channels_last": lambda model, data: _channels_last(model, data),
    "int8 dynamic": lambda model, data: quantization.dynamic(model),
    "int8 dynamic, onednn": lambda model, data: quantization.dynamic(model, engine="onednn"),
    "int8 static": lambda model, data: quantization.static(model, data),
    "int8 static, onednn": lambda model, data: quantization.static(model, data, engine="onednn"),
    "int8 static, scripted": lambda model, data: Scripted(quantization.static(model, data)),
    "int8 static, traced": lambda model, data: quantization.traced(model, data),
    "int8 PT2E, compiled": lambda model, data: pt2e.compiled(pt2e.exported(model, data)),
    "int8 torchao, dynamic": lambda model, data: pt2e.weights(model, "int8_dynamic"),
    "ONNX Runtime, float32": lambda model, data: peers.onnx_runtime(model, data, int8=False),
    "ONNX Runtime, int8 static": lambda model, data: peers.onnx_runtime(model, data),
    "OpenVINO, float32": lambda model, data: peers.openvino(model, data, int8=False),
    "OpenVINO, int8 static": lambda model, data: peers.openvino(model, data),
}


def _channels_last(model: nn.Module, data: list[torch.Tensor]) -> nn.Module:
    if data[0].dim() != 4:
        raise quantization.QuantizationError("only images [N, C, H, W] have channels to put last")
    return In(quantization.cast(model, torch.bfloat16), torch.bfloat16, torch.channels_last)


def compare(
    model: nn.Module,
    inputs: torch.Tensor,
    evaluate: Callable[[nn.Module], float],
    *,
    batch_sizes: Sequence[int] = (1, 64),
    threads: int = 1,
    rounds: int = 15,
    limit_seconds: float = 300.0,
    variants: dict[str, Maker] | None = None,
    names: Sequence[str] | None = None,
) -> Comparison:
    """Tries every variant on `inputs` `[N, ...]` of float32, which are the calibration data too.

    `evaluate(model)` gives the accuracy from 0 to 1 of a model that takes and gives float32; it runs in the
    variant's process. What cannot be made, crashes or takes more than `limit_seconds` is a row with its
    reason. `variants` adds ways of your own to `VARIANTS`: name -> function of the model and the batches of
    calibration data. `names` are those to try, float32 in any case; None is all.

    Raises ValueError for inputs that are fewer than the largest batch, or not float32, and for unknown names.
    """
    if len(inputs) < max(batch_sizes) or inputs.dtype != torch.float32:
        raise ValueError(
            f"inputs {tuple(inputs.shape)} of {inputs.dtype}: give {max(batch_sizes)} or more, of float32"
        )
    model, own, rows = copy.deepcopy(model).eval(), variants or {}, []
    there = [*(VARIANTS | own)]
    if unknown := set(names or ()) - set(there):
        raise ValueError(f"unknown variants {sorted(unknown)}: use some of {', '.join(there)}")
    wanted = [name for name in there if names is None or name == FLOAT or name in names]
    needs_compiler = any("compiled" in name for name in wanted)
    launch.warm(__name__, *(["companion.compiler"] if needs_compiler else []))
    for name in wanted:
        try:
            given = (name, own.get(name), model, inputs, evaluate, tuple(batch_sizes), rounds)
            options = {"device": "cpu", "backend": None, "threads": threads, "limit_seconds": limit_seconds}
            rows += launch.run(_tried, 1, *given, **options)
        except launch.WorkerError as error:
            rows.append(Row(name, reason=error.reason))
    return Comparison(tuple(rows))


def _tried(name, make, model, inputs, evaluate, batch_sizes, rounds) -> Row:
    """One variant's row, in a process of its own."""
    try:
        made = (make or VARIANTS[name])(model, list(inputs.split(max(2, min(64, len(inputs))))))
    except (quantization.QuantizationError, ImportError) as error:
        return Row(name, reason=str(error))
    gains, busy = {}, None
    with torch.no_grad():
        for size in batch_sizes:
            x = inputs[:size].contiguous()
            calls = _calls(model, x)
            ways = {
                FLOAT: lambda x=x, n=calls: _again(model, x, n),
                "it": lambda x=x, n=calls: _again(made, x, n),
            }
            times = measure.compare(ways, rounds=rounds)
            gains[size], busy = times.speed_up("it", over=FLOAT), busy or times.busy
        if name == FLOAT:
            gains = {size: measure.Spread(1, 1, 1, rounds) for size in gains}  # by definition
        return Row(name, float(evaluate(made)), gains, _disk_bytes(made), busy)


def _disk_bytes(model: nn.Module) -> int:
    """Of the file with its weights; a frozen script's are constants of its code, which counts with them."""
    if isinstance(model, peers.Runtime):
        return model.disk_bytes
    if not isinstance(model, Scripted):
        return memory.disk_bytes(model)
    file = io.BytesIO()
    torch.jit.save(model.script[0], file)
    return file.tell()


def _again(model: nn.Module, x: torch.Tensor, calls: int) -> None:
    for _ in range(calls):
        model(x)


def _calls(model: nn.Module, x: torch.Tensor, seconds: float = 0.01) -> int:
    """How often the model is to be called for a time that a clock can tell."""
    _again(model, x, 2)
    start = time.perf_counter()
    model(x)
    return max(1, int(seconds / (time.perf_counter() - start)))
