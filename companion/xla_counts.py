"""What XLA did in this process, by its own counters, and what it has recorded and not yet run."""

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Counts:
    """What XLA did, by torch_xla's own counters."""

    compilations: int = 0
    compile_seconds: float = 0.0
    executions: int = 0
    transfers: int = 0  # from the device to main memory
    # Operators that ran on the CPU instead, and how often.
    fallbacks: dict[str, int] = field(default_factory=dict)
    steps: int = 0  # times that what was recorded was told to run

    def __sub__(self, before: "Counts") -> "Counts":
        new = {name: number - before.fallbacks.get(name, 0) for name, number in self.fallbacks.items()}
        numbers = ("compilations", "compile_seconds", "executions", "transfers", "steps")
        return Counts(
            **{name: getattr(self, name) - getattr(before, name) for name in numbers},
            fallbacks={name: number for name, number in new.items() if number},
        )


def counts() -> Counts:
    """All that XLA did in this process until now; subtract an earlier one to see what happened between.

    Source: PyTorch/XLA documentation, "Troubleshooting", the metrics report.
    """
    from torch_xla.debug import metrics

    def total(name: str) -> tuple[int, float]:
        return (metrics.metric_data(name) or (0, 0.0))[:2]

    compilations, nanoseconds = total("CompileTime")
    on_cpu = [
        name
        for name in metrics.counter_names()
        if name.startswith("aten::") and name != "aten::_local_scalar_dense"
    ]
    return Counts(
        compilations=compilations,
        compile_seconds=nanoseconds / 1e9,
        executions=total("ExecuteTime")[0] + total("ExecuteReplicatedTime")[0],
        transfers=total("TransferFromDeviceTime")[0],
        fallbacks={name: metrics.counter_value(name) for name in on_cpu},
        steps=metrics.counter_value("MarkStep") or 0,
    )


def graph(*tensors: torch.Tensor) -> list[str]:
    """The operations recorded for tensors on XLA and not yet run, one line each, in order."""
    import torch_xla

    lines = torch_xla._XLAC._get_xla_tensors_text(list(tensors)).splitlines()
    return [line.strip() for line in lines if " = " in line]
