"""Fewer bits: quantization in eager mode, on any model. Each function gives a new model, the given one stays.

None gives back a model in which nothing was quantized: that is refused, and so is what its engine cannot run,
with the layer or the operator and what to do. torch calls eager mode deprecated; it is what the 2021 book
shows. Everything here runs on the CPU, by integer kernels.

Sources: torch's documentation, "Quantization"; Jacob et al. 2018, "Quantization and Training of Neural
Networks".
"""

import copy
import functools
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.ao import quantization as ao

from companion import checkpoint
from companion.fusing import fused, fusible

ENGINES = ("x86", "onednn", "fbgemm", "qnnpack")  # in the order in which "auto" takes them
DYNAMIC = (nn.Linear, nn.LSTM, nn.GRU)
OBSERVERS = {"histogram": ao.HistogramObserver, "minmax": ao.MinMaxObserver}
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
def _engine(name: str) -> Iterator[str]:
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


def _silent(function: Callable) -> Callable:
    """torch's own files of integer tensors go through a class of its own that it warns of."""

    @functools.wraps(function)
    def called(*args, **options):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "TypedStorage is deprecated")
            return function(*args, **options)

    return called


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model in float16 or bfloat16, in eval mode; its inputs must be of that type too."""
    if dtype not in (torch.float16, torch.bfloat16):
        raise QuantizationError(f"dtype={dtype} is neither torch.float16 nor torch.bfloat16")
    made = copy.deepcopy(model).to(dtype).eval()
    if not any(parameter.dtype == dtype for parameter in made.parameters()):
        raise QuantizationError(f"{type(model).__name__} has no floating point parameters to cast")
    return made


def dynamic(model: nn.Module, kinds: Sequence[type[nn.Module]] = DYNAMIC, engine: str = "auto") -> nn.Module:
    """Weights of the layers of these `kinds` as int8; activations are quantized as they come, by their own
    range.

    Needs no data. torch's documentation has it for models whose time goes into reading weights: recurrent
    networks and transformers. Raises QuantizationError for an engine that is not here, or a model without
    such layers.
    """
    with _engine(engine):
        holder = nn.Module()
        holder.model = copy.deepcopy(model).eval()  # what is in a module can be replaced: a lone nn.LSTM too
        made = ao.quantize_dynamic(holder, set(kinds), dtype=torch.qint8, inplace=True).model
    for module in made.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # its fused kernel reads float weights, and would fail
    return _checked(made, f"it has no {' or '.join(kind.__name__ for kind in kinds)}")


def static(
    model: nn.Module,
    calibration: Iterable[torch.Tensor],
    *,
    fuse: Sequence[Sequence[str]] | None = None,
    per_channel: bool = True,
    observer: str = "histogram",
    engine: str = "auto",
) -> nn.Module:
    """Weights and activations as int8, with scales of activations found on the batches of inputs in
    `calibration`.

    torch's documentation has it for convolutional networks, where activations are moved. `fuse` names the
    layers that become one, `[["conv1", "relu1"], ...]`; None finds them (`fusible`). `per_channel` gives each
    output channel a scale of its own.

    Raises QuantizationError for an engine that is not here, calibration without a batch, and for operators
    between the layers that take no integers, such as the sum of a residual block.
    """
    if observer not in OBSERVERS:
        raise QuantizationError(f"observer={observer!r} is unknown; use one of {', '.join(OBSERVERS)}")
    with _engine(engine) as chosen:
        made = _with_stubs(model, fusible(model) if fuse is None else fuse, ao.fuse_modules, training=False)
        made.qconfig = _settings(chosen, per_channel, OBSERVERS[observer])
        ao.prepare(made, inplace=True)
        first = _calibrate(made, calibration)
        ao.convert(made, inplace=True)
        return _runs(_checked(made, "none of its layers has an integer version"), first)


def trained(
    model: nn.Module,
    train: Callable[[nn.Module], object],
    *,
    fuse: Sequence[Sequence[str]] | None = None,
    engine: str = "auto",
) -> nn.Module:
    """Quantization-aware training: `train(model)` trains a model that rounds as the int8 one will, then it is
    converted.

    It is for what `static` costs in accuracy. The rounding starts from the given weights. Raises as `static`
    does.
    """
    with _engine(engine) as chosen:
        made = _with_stubs(
            model, fusible(model) if fuse is None else fuse, ao.fuse_modules_qat, training=True
        )
        made.qconfig = ao.get_default_qat_qconfig(chosen)
        ao.prepare_qat(made, inplace=True)
        seen: list[torch.Tensor] = []
        hook = made.register_forward_pre_hook(
            lambda module, inputs: seen.append(inputs[0][:1].detach()) if not seen else None
        )
        train(made)
        hook.remove()
        if not seen:
            raise QuantizationError(
                "train(model) has never called the model: there is nothing to take scales from"
            )
        ao.convert(made.eval(), inplace=True)
        return _runs(_checked(made, "none of its layers has an integer version"), seen[0])


def _with_stubs(
    model: nn.Module, fuse: Sequence[Sequence[str]], fuser: Callable, training: bool
) -> nn.Module:
    """A copy with its layers fused, between stubs that make integers of what comes in and floats of what goes
    out.
    """
    made = copy.deepcopy(model).train(training)
    names = dict(made.named_modules())
    if unknown := [name for group in fuse for name in group if name not in names]:
        raise QuantizationError(f"fuse names {', '.join(map(repr, unknown))}, which the model does not have")
    try:
        made = fused(made, fuse, fuser)
    except (AssertionError, NotImplementedError) as error:  # of torch's fuser, for layers that it has not
        raise QuantizationError(f"fuse={fuse}: {error}") from error
    return (
        made if any(isinstance(module, ao.QuantStub) for module in made.modules()) else ao.QuantWrapper(made)
    )


def _settings(engine: str, per_channel: bool, observer: type) -> ao.QConfig:
    """Older x86 kernels add up pairs of products in 16 bits: activations then use 7 bits, lest the sums
    overflow.
    """
    activations = observer.with_args(reduce_range=engine in ("x86", "fbgemm"))
    weights = ao.default_per_channel_weight_observer if per_channel else ao.default_weight_observer
    return ao.QConfig(activation=activations, weight=weights)


@torch.no_grad()
def _calibrate(made: nn.Module, calibration: Iterable[torch.Tensor]) -> torch.Tensor:
    """Shows the batches to the observers, and gives the first one."""
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
        first = batch if first is None else first
    if first is None:
        raise QuantizationError("there is no calibration data: give at least one batch of inputs")
    return first


def _checked(made: nn.Module, why: str) -> nn.Module:
    if not layers(made).quantized:
        raise QuantizationError(f"nothing was quantized: {why}")
    return made


@torch.no_grad()
def _runs(made: nn.Module, batch: torch.Tensor) -> nn.Module:
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


@_silent
def save(model: nn.Module, path: str | Path) -> None:
    """Writes the model's weights and scales, replacing the file in one move."""
    checkpoint.save(
        Path(path), {"settings": {"layers": layers(model).quantized}, "state": model.state_dict()}
    )


@_silent
def load(path: str | Path, like: nn.Module) -> nn.Module:
    """What `save` wrote, in a model like `like`: made by the same function from the same architecture, on any
    data.

    Nothing in the file is executed. Raises RuntimeError for a file that is damaged, or of a model with other
    layers.
    """
    saved = checkpoint.load(Path(path), {"layers": layers(like).quantized})
    if saved is None:
        raise FileNotFoundError(f"there is no {path}")
    made = copy.deepcopy(like)
    made.load_state_dict(saved["state"])
    return made
