"""Where a quantized model errs: layer by layer, against the float model that it was made from."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from companion import modules, quantization


@torch.no_grad()
def by_layer(model: nn.Module, made: nn.Module, images: torch.Tensor) -> dict[str, float]:
    """How far each layer's output is from the float model's: the norm of the error over that of the output.

    `made` is `model` quantized by `quantization.static`, `trained` or `dynamic`. A layer gets what earlier
    layers give, with their errors. Names are the float model's, in the order in which its layers stand.
    """
    names = {name: name.removeprefix("module.") for name in quantization.layers(made).quantized}
    expected = _outputs(model, list(names.values()), images)
    found = _outputs(made, list(names), images)
    errors = {}
    for name, own in names.items():
        if own in expected and name in found:
            fused = "ReLU" in type(made.get_submodule(name)).__name__
            wanted = F.relu(expected[own]) if fused else expected[own]
            errors[own] = float((found[name] - wanted).norm() / wanted.norm())
    return errors


def _outputs(model: nn.Module, names: list[str], images: torch.Tensor) -> dict[str, torch.Tensor]:
    """What these layers give, as floats, when the model is called in eval mode."""
    found: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple, output: object) -> None:
            output = output[0] if isinstance(output, tuple) else output
            found[name] = output.dequantize() if output.is_quantized else output.clone()

        return hook

    hooks = [
        module.register_forward_hook(keep(name)) for name, module in model.named_modules() if name in names
    ]
    try:
        with modules.evaluating(model):
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found
