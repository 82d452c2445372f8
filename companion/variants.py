"""What can be tried to make a model answer faster on this machine: each variant is written as an artefact."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from companion import artefacts, devices, machine, quantization
from companion import quantization_pt2e as pt2e
from companion.artefacts import About
from companion.quantization_compare import In

Change = Callable[[nn.Module, list[torch.Tensor]], nn.Module]


@dataclass(frozen=True)
class Variant:
    """A way to make it faster: what is done to the model, and as which kind of artefact it is written.

    `exact`: the same arithmetic in another order, so its answers must agree with the model's. `needs` names
    the instruction sets of which one must be there, `takes` the inputs: "images" of four dimensions, "floats"
    or "any". `after` names quicker ones of its kind: where all are behind the lead, it need not be tried.
    `fuses`: what it saves lies between the products of matrices, which it leaves nearly as they are.
    """

    name: str
    kind: str
    change: Change = lambda model, data: model
    exact: bool = False
    needs: tuple[str, ...] = ()
    takes: str = "any"
    mode: str = "default"
    precision: str = "f32"
    tf32: bool = False
    after: tuple[str, ...] = ()
    fuses: bool = False

    def make(self, model: nn.Module, inputs: torch.Tensor, folder: Path, threads: int) -> About:
        """Writes the artefact; `inputs` `[N, ...]` are the calibration data. The model stays as it is."""
        about = About(
            self.kind,
            self.name,
            tuple(inputs.shape[1:]),
            str(inputs.dtype).removeprefix("torch."),
            inputs.device.type,
            threads,
            self.mode,
            self.precision,
            self.tf32,
        )
        batches = list(inputs.split(max(2, min(64, len(inputs)))))
        batches = [batch for batch in batches if len(batch) > 1] or [
            inputs.repeat(2, *[1] * (inputs.dim() - 1))
        ]
        artefacts.save(
            self.change(copy.deepcopy(model).eval().requires_grad_(False), batches), batches, folder, about
        )
        return about


class Autocast(nn.Module):
    """A model under autocast, which takes and gives float32."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, device: str):
        super().__init__()
        self.model, self.dtype, self.device = model, dtype, device

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device, self.dtype, cache_enabled=False):
            return self.model(x).float()


def _cast(dtype: torch.dtype, layout: torch.memory_format = torch.preserve_format) -> Change:
    return lambda model, data: In(quantization.cast(model, dtype), dtype, layout)


def _last(model: nn.Module, data: list[torch.Tensor]) -> nn.Module:
    return In(model, torch.float32, torch.channels_last)


def _autocast(dtype: torch.dtype) -> Change:
    return lambda model, data: Autocast(model, dtype, data[0].device.type)


def _static(model: nn.Module, data: list[torch.Tensor]) -> nn.Module:
    quantization.static(model, [data[0][:2]])  # a model that has no integer version is refused at once
    return quantization.static(model, data)


BF16, FP16, LAST = ("AVX512-BF16", "AMX-BF16", "BF16"), ("AVX512-FP16", "AMX-FP16"), torch.channels_last
# In the order in which they are tried: first what leads most often, beside which others are soon dropped.
ON_CPU = (
    Variant("OpenVINO, int8", "openvino", precision="int8"),
    Variant("OpenVINO", "openvino", exact=True),
    Variant("OpenVINO, bfloat16", "openvino", needs=BF16, precision="bf16"),
    Variant("script", "script", exact=True),
    Variant("bfloat16, channels_last", "script", _cast(torch.bfloat16, LAST), needs=BF16, takes="images"),
    Variant("bfloat16", "script", _cast(torch.bfloat16), needs=BF16),
    Variant("int8 dynamic", "script", lambda model, data: quantization.dynamic(model)),
    Variant("int8 static, traced", "script", quantization.traced, takes="floats"),
    Variant("ONNX Runtime", "onnx", exact=True),
    Variant("ONNX Runtime, int8", "onnx", precision="int8"),
    Variant("script, channels_last", "script", _last, exact=True, takes="images"),
    Variant("int8 static", "script", _static, takes="floats"),
    Variant("bfloat16 autocast", "script", _autocast(torch.bfloat16), needs=BF16),
    Variant("float16", "script", _cast(torch.float16), needs=FP16),
    Variant("compiled", "program", exact=True, fuses=True),
    Variant(
        "compiled, bfloat16",
        "program",
        _cast(torch.bfloat16),
        needs=BF16,
        after=("bfloat16", "bfloat16, channels_last"),
    ),
    Variant(
        "compiled, int8 PT2E",
        "program",
        pt2e.exported,
        after=("int8 static", "int8 static, traced", "int8 dynamic", "ONNX Runtime, int8"),
    ),
    Variant(
        "compiled, int8 torchao",
        "program",
        lambda model, data: _plain_tensors(model),
        after=("int8 dynamic",),
    ),
    Variant(
        "compiled, max-autotune",
        "program",
        exact=True,
        mode="max-autotune-no-cudagraphs",
        after=("compiled",),
    ),
)
HALF = _cast(torch.float16)
ON_GPU = (
    Variant("script", "script", exact=True),
    Variant("TF32", "script", tf32=True),
    Variant("TF32, channels_last", "script", _last, tf32=True, takes="images"),
    Variant("float16", "script", HALF),
    Variant("float16, channels_last", "script", _cast(torch.float16, LAST), takes="images"),
    Variant("bfloat16", "script", _cast(torch.bfloat16)),
    Variant("float16 autocast", "script", _autocast(torch.float16)),
    Variant("compiled", "program", exact=True),
    Variant("compiled, float16", "program", HALF),
    Variant("compiled, CUDA graphs", "program", exact=True, mode="reduce-overhead"),
    Variant(
        "compiled, float16, CUDA graphs",
        "program",
        HALF,
        mode="reduce-overhead",
    ),
    Variant(
        "compiled, float16, max-autotune",
        "program",
        HALF,
        mode="max-autotune",
    ),
)


def _plain_tensors(model: nn.Module) -> nn.Module:
    """With torchao's int8 weights taken apart, since its own tensors could be written by pickle only."""
    made = pt2e.weights(model, "int8_dynamic")
    from torchao.utils import unwrap_tensor_subclass

    made = unwrap_tensor_subclass(made)
    for module in made.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if not weight.is_floating_point():  # torch.export.load takes integers as buffers only
                delattr(module, name)
                module.register_buffer(name, weight.data)
    return made


def offered(device: torch.device) -> tuple[Variant, ...]:
    """What there is to try on such a device."""
    return ON_GPU if device.type == "cuda" else ON_CPU


def why_not(variant: Variant, inputs: torch.Tensor) -> str | None:
    """Why a variant cannot pay or run on this machine with such inputs, or None."""
    sets = machine.describe().instruction_sets if variant.needs else "unknown"
    if sets != "unknown" and not set(variant.needs) & set(sets.split(", ")):
        return f"the processor has none of {', '.join(variant.needs)}, which make it fast"
    if variant.takes != "any" and not inputs.is_floating_point():
        return "its inputs are whole numbers, which have no other type"
    if variant.takes == "images" and inputs.dim() != 4:
        return "only images [N, C, H, W] have channels to put last"
    if variant.kind == "program" and (reason := devices.why_not("compile")):
        return f"torch.compile cannot be used here: it {reason}"
    return None


def named(names: Sequence[str] | None, device: torch.device) -> list[Variant]:
    """The variants of these names, or all. Raises ValueError for one that is not there."""
    there = {variant.name: variant for variant in offered(device)}
    if unknown := set(names or ()) - set(there):
        raise ValueError(f"unknown variants {sorted(unknown)}: use some of {', '.join(there)}")
    return [variant for name, variant in there.items() if names is None or name in names]
