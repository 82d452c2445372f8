"""What quantized models are made of: engines of integer kernels, layers of integers; how they are checked."""

import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

ENGINES = ("x86", "onednn", "fbgemm", "qnnpack")  # in the order in which "auto" takes them
_WITH_WEIGHTS = re.compile(r"Linear|Conv|LSTM|GRU|Embedding|Norm")


class QuantizationError(ValueError):
    """The model cannot be quantized as asked; the message says which layer or operator, and what to do."""


@dataclass(frozen=True)
class Layers:
    """The layers with weights: those that are integers now, and those that stay as they were; name ->
    type.
    """

    quantized: dict[str, str]
    left: dict[str, str]


def layers(model: nn.Module) -> Layers:
    """Which layers of the model compute in integers, and which do not."""
    quantized: dict[str, str] = {}
    left: dict[str, str] = {}
    for name, module in model.named_modules():
        kind = type(module)
        if any(name.startswith(f"{outer}.") for outer in quantized):
            continue
        if ".quantized" in kind.__module__ and _WITH_WEIGHTS.search(kind.__name__):
            quantized[name or "the model"] = kind.__name__
        elif next(module.parameters(recurse=False), None) is not None:
            left[name] = kind.__name__
    return Layers(quantized, left)


def engines() -> list[str]:
    """The engines of integer kernels that torch has here, the preferred one first."""
    return [name for name in ENGINES if name in torch.backends.quantized.supported_engines]


@contextmanager
def use_engine(name: str) -> Iterator[str]:
    """Makes `name`, or for "auto" the preferred one, the engine for which weights are packed; restores it
    after.
    """
    there = engines()
    chosen = there[0] if name == "auto" and there else name
    if chosen not in there:
        raise QuantizationError(
            f"engine={name!r} is not here; use one of {', '.join(map(repr, there)) or 'none'}"
        )
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = chosen
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.ao.quantization is deprecated", DeprecationWarning)
            warnings.filterwarnings("ignore", "torch.quantize_per_tensor, .* are deprecated")  # said once
            warnings.filterwarnings("ignore", "Please use quant_min and quant_max")
            warnings.filterwarnings("ignore", "must run observer before calling calculate_qparams")
            yield chosen
    finally:
        torch.backends.quantized.engine = before


@torch.no_grad()
def calibrate(made: nn.Module, calibration: Iterable[torch.Tensor]) -> torch.Tensor:
    """Shows the batches to the observers, and gives the first two samples."""
    first = None
    for batch in calibration:
        if not isinstance(batch, torch.Tensor):
            raise QuantizationError(
                f"calibration gives batches of inputs, not a {type(batch).__name__}: leave labels out"
            )
        if batch.dtype != torch.float32:
            raise QuantizationError(
                f"calibration gives {batch.dtype}, but integers are made of float32 inputs"
            )
        try:
            made(batch)
        except RuntimeError as error:
            said = str(error).splitlines()[0]
            raise QuantizationError(
                f"the model cannot take a calibration batch {tuple(batch.shape)}: {said}"
            ) from error
        first = batch[:2] if first is None else first
    if first is None:
        raise QuantizationError("there is no calibration data: give at least one batch of inputs")
    return first


def checked(made: nn.Module, why: str) -> nn.Module:
    if not layers(made).quantized:
        raise QuantizationError(f"nothing was quantized: {why}")
    return made


@torch.no_grad()
def runs(made: nn.Module, batch: torch.Tensor) -> nn.Module:
    """The converted model, once it has been seen to run."""
    try:
        made(batch)
    except Exception as error:  # whatever torch's integer layers fail with
        operator = re.search(r"Could not run '([\w:.]+)'", str(error))
        if operator:
            said = (
                f"{operator[1]} takes no integers: put a torch.ao.nn.quantized.FloatFunctional in its place,"
            )
            raise QuantizationError(f"{said} or a DeQuantStub before it and a QuantStub after it") from error
        said = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'without a message'}"
        raise QuantizationError(f"its integer version does not run ({said}); dynamic may do") from error
    return made
