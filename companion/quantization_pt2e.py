"""Today's ways to fewer bits: PT2E (export, put integers into the graph, compile it) and torchao's
`quantize_`.

As in `quantization` each function gives a new model, the given one stays, and a model in which nothing was
quantized is refused. Needs torchao. Source: torchao's documentation, "PyTorch 2 Export Quantization" and
"Quantized inference".
"""

import copy
import importlib
import logging
import warnings
from collections.abc import Callable, Iterable
from types import MethodType, ModuleType

import torch
from torch import fx, nn

from companion import attention, devices
from companion.quantization import QuantizationError

LARGEST_BATCH = 2**16 - 1  # cuDNN's batch normalisation takes no more

KINDS = ("int8_dynamic", "int8_weights", "int4_weights")


def quietly_imported(module: str) -> ModuleType:
    """A module of torch's or torchao's, without what they and torch's export say of themselves on the way."""
    for name in ("torch.utils._pytree", "torchao"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(module)


def _torchao(module: str) -> ModuleType:
    try:
        return quietly_imported(module)
    except ImportError as error:
        raise ImportError(
            f"{module} cannot be imported ({error}): pip install 'accelerating-pytorch[compress]'"
        ) from error


def exported(
    model: nn.Module, calibration: Iterable[torch.Tensor], *, dynamic: bool = False
) -> fx.GraphModule:
    """The model's graph with int8 between quantize and dequantize nodes, for inference; any batch size goes
    in.

    Weights have a scale for each channel; activations have one found on the batches of inputs in
    `calibration`, or with `dynamic` one found in each call. The integers pay only once `compiled` has fused
    the nodes. Residual sums, functional calls and reshapes are the graph's affair: nothing in the model needs
    to be changed.

    Raises QuantizationError for a model that torch.export cannot follow, a first batch of one sample, no
    calibration, and where nothing was quantized; ImportError without torchao.
    """
    pt2e = _torchao("torchao.quantization.pt2e.quantize_pt2e")
    x86 = _torchao("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    batches = list(calibration)
    if not batches:
        raise QuantizationError("there is no calibration data: give at least one batch of inputs")
    if len(batches[0]) < 2:
        raise QuantizationError(
            "the first batch has one sample: export would take 1 for the only batch size; give two"
        )
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_dynamic=dynamic))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # what export and torchao say of their own versions
        prepared = pt2e.prepare_pt2e(_graph(copy.deepcopy(model).eval(), batches[0]), quantizer)
        for batch in batches:
            prepared(batch)
        made = pt2e.convert_pt2e(prepared)
        if not quantize_nodes(made):
            raise QuantizationError(
                "nothing was quantized: the graph has no convolution, linear or matrix product"
            )
    _drop_unused(made)
    made.train, made.eval = MethodType(_as_it_is, made), MethodType(_as_it_is, made)  # else they are errors
    return made


def _drop_unused(graph: fx.GraphModule) -> None:
    """Takes out the float weights that nothing in the graph reads any more."""
    used = {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}
    for name, _ in list(graph.named_parameters()):
        if name not in used:
            parent, _, own = name.rpartition(".")
            delattr(graph.get_submodule(parent), own)


def _as_it_is(graph: fx.GraphModule, mode: bool = True) -> fx.GraphModule:
    """The graph has one mode, inference, whatever it is told."""
    return graph


def _graph(model: nn.Module, batch: torch.Tensor) -> fx.GraphModule:
    """The graph, with every linear layer marked as one.

    The quantizer looks for layers by where their nodes come from. Export goes into torch's own compositions,
    such as nn.TransformerEncoder, without saying that it met linear layers there: they would stay in float.
    """
    graph = program(model, batch).module()
    for node in graph.graph.nodes:
        source = node.meta.get("source_fn_stack") or []
        known = bool(source) and source[-1][1] in (nn.Linear, nn.functional.linear)
        if node.target is torch.ops.aten.linear.default and not known:
            node.meta["source_fn_stack"] = [*source, (node.name, nn.functional.linear)]
    return graph


def program(model: nn.Module, batch: torch.Tensor, strict: bool = True) -> torch.export.ExportedProgram:
    """The model as torch.export has it, for any batch size; `batch` `[N, ...]` has two samples at least.
    `strict`: Python is followed by the compiler, else it runs; the quantizer needs what the first notes.

    Raises QuantizationError for a model that torch.export cannot follow.
    """
    from torch._dynamo import config  # the compiler takes seconds to import, and few need it

    sizes = ({0: torch.export.Dim("batch", min=1, max=LARGEST_BATCH)},)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(
        False
    )  # one operator for a whole layer, which export cannot follow
    try:
        # Guards in C++ would need a compiler, and torch in a path without a space.
        with config.patch(enable_cpp_symbolic_shape_guards=False):
            return torch.export.export(model, (batch,), dynamic_shapes=sizes, strict=strict)
    except Exception as error:  # whatever torch.export has to say of the model
        said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise QuantizationError(f"torch.export cannot follow {type(model).__name__}: {said}") from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def quantize_nodes(graph: fx.GraphModule) -> list[str]:
    """The names of the nodes that make integers of floats or floats of integers, in order."""
    return [
        node.name
        for node in graph.graph.nodes
        if node.op == "call_function" and "quantize" in str(node.target)
    ]


class Compiled(nn.Module):
    """A model compiled for inference with its weights as constants ("freezing"); it gets copies of its
    inputs.

    The copies are there because torch 2.9 compiles some int8 models into code that writes to what it is
    given.
    """

    def __init__(self, model: nn.Module, mode: str = "default"):
        super().__init__()
        self.model, self.known = model, set()
        self.call = torch.compile(model, mode=mode)

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape in self.known:
            return self.call(x.clone())
        self.known.add(x.shape)
        from torch._inductor import config

        # What the compiler says of its own ways is not the caller's matter.
        quiet = {"autotune_num_choices_displayed": 0, "max_autotune_report_choices_stats": False}
        with config.patch(freezing=True, **quiet), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.call(x.clone())


def compiled(model: nn.Module) -> nn.Module:
    """The model through torch.compile, for inference; the first call with each shape takes seconds.

    Raises QuantizationError where torch.compile cannot work here, with the reason.
    """
    if reason := devices.why_not("compile"):
        raise QuantizationError(f"torch.compile cannot be used here: it {reason}")
    return Compiled(model)


def weights(model: nn.Module, kind: str = "int8_dynamic") -> nn.Module:
    """The model with its linear layers' weights, attention's too, as tensors of few bits, by torchao's
    `quantize_`, in eval mode.

    "int8_dynamic" computes in integers, with activations quantized in each call. "int8_weights" and
    "int4_weights" store integers and compute in floats: for memory, and where reading weights takes the time.

    Raises QuantizationError for another kind, one that this torchao has not for the CPU, or without linear
    layers that it can take (int4: inputs in multiples of 32, outputs of 16); ImportError without torchao.
    """
    if kind not in KINDS:
        raise QuantizationError(f"kind={kind!r} is unknown; use one of {', '.join(KINDS)}")
    torchao = _torchao("torchao.quantization")
    made = attention.opened(model).eval()
    before = {
        name: type(module.weight) for name, module in made.named_modules() if isinstance(module, nn.Linear)
    }
    if not before:
        raise QuantizationError("nothing was quantized: it has no linear layers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # versions of its settings that torchao will drop
        torchao.quantize_(made, _setting(kind)(torchao), _takes(kind))
    if not any(type(made.get_submodule(name).weight.data) is not torch.Tensor for name in before):
        raise QuantizationError(
            "nothing was quantized: no linear layer has inputs in multiples of 32 and outputs of 16"
        )
    return made


def _takes(kind: str) -> Callable[[nn.Module, str], bool]:
    """Which layers: the CPU's int4 kernel takes inputs in multiples of 32 and outputs in multiples of 16."""
    columns, rows = (32, 16) if kind == "int4_weights" else (1, 1)

    def takes(module: nn.Module, name: str) -> bool:
        linear = isinstance(module, nn.Linear)
        return linear and module.in_features % columns == 0 and module.out_features % rows == 0

    return takes


def _setting(kind: str) -> Callable[[ModuleType], object]:
    return {
        "int8_dynamic": lambda torchao: torchao.Int8DynamicActivationInt8WeightConfig(),
        "int8_weights": lambda torchao: torchao.Int8WeightOnlyConfig(),
        "int4_weights": _int4,
    }[kind]


def _int4(torchao: ModuleType) -> object:
    layouts = _torchao("torchao.dtypes")
    if not hasattr(layouts, "Int4CPULayout"):
        version = _torchao("torchao").__version__
        raise QuantizationError(
            f"torchao {version} has no int4 weights for the CPU; 0.15, of the reference stack, has"
        )
    return torchao.Int4WeightOnlyConfig(group_size=32, layout=layouts.Int4CPULayout(), version=1)
