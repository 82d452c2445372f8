"""Fewer bits: quantization in eager mode, on any model. Each function gives a new model, the given one stays.

None gives back a model in which nothing was quantized: that is refused, and so is what its engine cannot run,
with the layer or the operator and what to do. torch calls eager mode deprecated; it is what the 2021 book
shows. Everything here runs on the CPU, by integer kernels.

Sources: torch's documentation, "Quantization"; Jacob et al. 2018, "Quantization and Training of Neural
Networks".
"""

import copy
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.ao import quantization as ao
from torch.nn.modules.rnn import GRU  # torch_xla puts one of its own into torch.nn

from companion import attention, checkpoint
from companion.fusing import fused, fusible
from companion.quantized import QuantizationError, calibrate, checked, engines, layers, runs, use_engine

__all__ = [
    "QuantizationError",
    "cast",
    "dynamic",
    "engines",
    "layers",
    "load",
    "save",
    "static",
    "traced",
    "trained",
]
DYNAMIC = (nn.Linear, nn.LSTM, GRU)
OBSERVERS = {"histogram": ao.HistogramObserver, "minmax": ao.MinMaxObserver}


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


def _is_xla_gru(kind: type[nn.Module]) -> bool:
    """Whether it is torch_xla's, which is nn.GRU once that is imported: the same weights, another loop."""
    return kind is not GRU and issubclass(kind, GRU) and kind.__module__.startswith("torch_xla.")


@contextmanager
def _torchs_own_gru() -> Iterator[None]:
    """nn.GRU is torch's own inside: torch quantizes only what is exactly that."""
    there, nn.GRU = nn.GRU, GRU
    try:
        yield
    finally:
        nn.GRU = there


def dynamic(model: nn.Module, kinds: Sequence[type[nn.Module]] = DYNAMIC, engine: str = "auto") -> nn.Module:
    """Weights of the layers of these `kinds` as int8; activations are quantized as they come, by their own
    range.

    The products inside nn.MultiheadAttention count as linear layers (`attention.opened`). Needs no data.
    torch's documentation has it for models whose time goes into reading weights: recurrent networks and
    transformers. Raises QuantizationError for an engine that is not here, or a model without
    such layers.
    """
    with use_engine(engine), _torchs_own_gru():
        holder = nn.Module()  # what is in a module can be replaced: a lone nn.LSTM too
        holder.model = (attention.opened if nn.Linear in kinds else copy.deepcopy)(model).eval()
        for module in holder.modules():
            if _is_xla_gru(type(module)):
                module.__class__ = GRU
        wanted = {GRU if _is_xla_gru(kind) else kind for kind in kinds}
        made = ao.quantize_dynamic(holder, wanted, dtype=torch.qint8, inplace=True).model
    for module in made.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # its fused kernel reads float weights, and would fail
    return checked(made, f"it has no {' or '.join(kind.__name__ for kind in kinds)}")


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
    with use_engine(engine) as chosen:
        made = _with_stubs(model, fusible(model) if fuse is None else fuse, ao.fuse_modules, training=False)
        made.qconfig = _settings(chosen, per_channel, OBSERVERS[observer])
        ao.prepare(made, inplace=True)
        first = calibrate(made, calibration)
        ao.convert(made, inplace=True)
        return runs(checked(made, "none of its layers has an integer version"), first)


def traced(
    model: nn.Module, calibration: Iterable[torch.Tensor], *, engine: str = "auto"
) -> torch.fx.GraphModule:
    """As `static`, on the graph of the model that torch.fx traces: residual sums and functional calls get
    integers too. What torch.fx takes as one piece, such as nn.TransformerEncoder, stays in float (`layers`).

    For inference: what depends on the mode or on data is decided while tracing. Raises as `static` does, and
    for a model that torch.fx cannot trace.
    """
    from torch.ao.quantization import get_default_qconfig_mapping, quantize_fx

    batches = list(calibration)
    with use_engine(engine) as chosen:
        try:
            made = quantize_fx.prepare_fx(
                copy.deepcopy(model).eval(), get_default_qconfig_mapping(chosen), tuple(batches[:1])
            )
        except Exception as error:  # whatever torch.fx cannot follow
            said = str(error).strip().splitlines()
            reason = said[0] if said else type(error).__name__
            raise QuantizationError(f"torch.fx cannot trace {type(model).__name__}: {reason}") from error
        first = calibrate(made, batches)
        made = quantize_fx.convert_fx(made)
        return runs(checked(made, "none of its layers has an integer version"), first)


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
    with use_engine(engine) as chosen:
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
        return runs(checked(made, "none of its layers has an integer version"), seen[0])


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
