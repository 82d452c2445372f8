"""Cuts a model into stages that run one after another, each handing a single tensor to the next, and balances
their times.

    layers = splitting.profile(model, images)      # where it can be cut, and how long each layer takes here
    at = splitting.balanced(layers, stages=4)      # the layers after which to cut
    stages = splitting.split(model, at)            # modules that share the model's parameters
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn

from companion import measure


class SplitError(ValueError):
    """The model cannot be cut as asked; the message says where and why."""


class _Tracer(fx.Tracer):
    """Follows a model's forward, but does not look into `closed` modules."""

    def __init__(self, closed: Sequence[nn.Module] = ()):
        super().__init__()
        self.closed = closed

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return any(module is one for one in self.closed) or super().is_leaf_module(module, name)


def _trace(model: nn.Module, closed: Sequence[nn.Module] = ()) -> fx.GraphModule:
    """The model's forward as a graph, `closed` modules as single nodes. The children of a plain nn.Sequential
    need not be traceable.
    """
    try:
        return fx.GraphModule(model, _Tracer(closed).trace(model))
    except Exception as error:
        if isinstance(model, nn.Sequential):
            return fx.GraphModule(model, _Tracer(list(model)).trace(model))
        raise SplitError(
            f"the forward of {type(model).__name__} cannot be followed: {error}. "
            "Write the model as an nn.Sequential of modules: those may do what they like inside."
        ) from error


def _name(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else node.name


def _in_place(node: fx.Node, graph: fx.GraphModule) -> bool:
    """Whether the node overwrites its input, which must not be what another stage has sent."""
    if node.op == "call_module":
        return any(getattr(module, "inplace", False) for module in graph.get_submodule(node.target).modules())
    return bool(node.kwargs.get("inplace")) or (node.op == "call_method" and str(node.target).endswith("_"))


def _alive(graph: fx.GraphModule) -> list[tuple[fx.Node, list[fx.Node]]]:
    """Each node that computes something, with the values that are still to be used after it."""
    nodes = list(graph.graph.nodes)
    place = {node: i for i, node in enumerate(nodes)}
    last = {node: max((place[user] for user in node.users), default=-1) for node in nodes}
    computing = [node for node in nodes if node.op.startswith("call_")]
    return [
        (node, [n for n in nodes[: place[node] + 1] if n.op != "get_attr" and last[n] > place[node]])
        for node in computing
    ]


def _cuts(graph: fx.GraphModule) -> dict[str, fx.Node]:
    """The places after which one value alone goes on, by name; the last is the end of the model.

    A name is unique or numbered.
    """
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder" and node.users]
    if len(inputs) != 1:
        raise SplitError(
            f"forward takes {len(inputs)} inputs ({', '.join(map(str, inputs))}); a pipeline's stages hand "
            f"on one"
        )
    found: dict[str, fx.Node] = {}
    for node, alive in _alive(graph):
        if alive == [node] and not any(_in_place(user, graph) for user in node.users):
            name, number = _name(node), 1
            while name in found:  # a module that is called several times
                name, number = f"{_name(node)}@{number}", number + 1
            found[name] = node
    return found


def split(model: nn.Module, at: str | Sequence[str]) -> list[nn.Module]:
    """Stages of `model`, cut after each layer or block named in `at` ("features.5"); they share the model's
    parameters and buffers.

    Any model will do whose forward torch.fx can follow, and any nn.Sequential. Raises SplitError, a
    ValueError: for a name after which no cut is possible, saying what else would have to be sent; for
    parameters used on both sides of a cut; for forwards that cannot be followed.
    """
    at, modules = [at] if isinstance(at, str) else at, dict(model.named_modules())
    graph = _trace(model, [modules[name] for name in at if name in modules])
    cuts = _cuts(graph)
    for name in at:
        if name not in cuts:
            crossing = {_name(node): alive for node, alive in _alive(graph)}.get(name)
            why = "there is no such layer"
            if crossing and len(crossing) > 1:
                why = f"{len(crossing)} values would have to be sent ({', '.join(map(_name, crossing))})"
            elif crossing:
                why = "the next layer overwrites its input in place"
            raise SplitError(
                f"{type(model).__name__} cannot be cut after {name!r}: {why}; use one of {', '.join(cuts)}"
            )
    order = list(cuts)
    if len(set(at)) != len(at) or [order.index(name) for name in at] != sorted(
        order.index(name) for name in at
    ):
        raise SplitError(
            f"the cuts {list(at)} are not in the order of the model, each once: {', '.join(order)}"
        )
    if at and at[-1] == order[-1]:
        raise SplitError(f"nothing comes after {at[-1]!r}, the last layer")
    ends = [cuts[name] for name in at] + [
        next(node.args[0] for node in graph.graph.nodes if node.op == "output")
    ]
    stages, given = [], next(node for node in graph.graph.nodes if node.op == "placeholder" and node.users)
    for end in ends:
        stages.append(_between(graph, given, end))
        given = end
    owner: dict[int, int] = {}
    for number, module in enumerate(stages):
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if owner.setdefault(id(tensor), number) != number:
                raise SplitError(
                    f"stages {owner[id(tensor)]} and {number} share {name}: tied weights cannot be cut apart"
                )
    return stages


def _between(graph: fx.GraphModule, given: fx.Node, end: fx.Node) -> fx.GraphModule:
    """What computes the value `end` from the value `given`; names of parameters and modules are those of the
    model.
    """
    part, copies = fx.Graph(), {}
    copies[given] = part.placeholder("x")
    nodes = list(graph.graph.nodes)
    inside = nodes[nodes.index(given) + 1 : nodes.index(end) + 1]
    read = {node for user in inside for node in user.all_input_nodes if node.op == "get_attr"}
    for node in nodes:
        if node in read or (node in inside and node.op.startswith("call_")):
            copies[node] = part.node_copy(node, copies.__getitem__)
    part.output(copies[end])
    return fx.GraphModule(graph, part)


@dataclass(frozen=True)
class Layer:
    """What lies between two possible cuts: median seconds of its passes, bytes of its parameters and of what
    it hands on.
    """

    name: str
    forward_seconds: float
    backward_seconds: float
    parameter_bytes: int
    output_bytes: int

    @property
    def seconds(self) -> float:
        return self.forward_seconds + self.backward_seconds


def profile(model: nn.Module, images: torch.Tensor, rounds: int = 5) -> list[Layer]:
    """Measures every layer on `images` `[N, ...]`, on the device the model is on; gradients and buffers stay
    as they were.

    Raises SplitError for a model that torch.fx cannot follow.
    """
    names = list(_cuts(_trace(model)))
    stages = split(model, names[:-1])
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    gradients = [(p, p.grad) for p in model.parameters()]
    model.zero_grad()  # or they would be added to
    laps, sizes = measure.Laps(images.device), [0] * len(stages)
    for _ in range(rounds + 1):
        value, passes = images, []
        for number, stage in enumerate(stages):
            given = value.detach().requires_grad_(number > 0)  # nobody asks for the images' gradient
            value = laps(f"{number} forward", stage, given)  # [N, ...], what this stage hands on
            passes.append((given, value))
            sizes[number] = value.nbytes
        gradient = torch.ones_like(value)  # of the sum of all outputs
        for number, (given, value) in reversed(list(enumerate(passes))):
            backward = value.backward if value.requires_grad else lambda gradient: None
            laps(f"{number} backward", backward, gradient)
            gradient = given.grad
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
    for parameter, before in gradients:
        parameter.grad = before
    seconds = {name: spread.median for name, spread in laps.spreads().items()}
    return [
        Layer(name, seconds[f"{i} forward"], seconds[f"{i} backward"], _bytes(stage), size)
        for i, (name, stage, size) in enumerate(zip(names, stages, sizes, strict=True))
    ]


def _bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def balanced(layers: Sequence[Layer], stages: int) -> list[str]:
    """The layers after which to cut so that the slowest of `stages` stages is as fast as can be; each has
    parameters to train.
    """
    learning = sum(layer.parameter_bytes > 0 for layer in layers)
    if not 1 <= stages <= learning:
        raise SplitError(
            f"{learning} layers with parameters cannot make {stages} stages; use 1 to {learning}"
        )
    seconds, parameters = [0.0], [0]
    for layer in layers:
        seconds.append(seconds[-1] + layer.seconds)
        parameters.append(parameters[-1] + layer.parameter_bytes)
    # best[n][i]: the slowest of n stages made of the first i layers, and where the last of them begins
    best: list[dict[int, tuple[float, int]]] = [{0: (0.0, 0)}]
    for _ in range(stages):
        ways = {
            i: [
                (max(slowest, seconds[i] - seconds[j]), j)
                for j, (slowest, _) in best[-1].items()
                if parameters[j] < parameters[i]
            ]
            for i in range(1, len(layers) + 1)
        }
        best.append({i: min(way) for i, way in ways.items() if way})
    ends, i = [], len(layers)
    for n in range(stages, 1, -1):
        i = best[n][i][1]
        ends.append(layers[i - 1].name)
    return ends[::-1]


def stage_seconds(layers: Sequence[Layer], at: Sequence[str]) -> list[float]:
    """Seconds of forward and backward of each stage, by the layers' measured times."""
    sums = [0.0]
    for layer in layers:
        sums[-1] += layer.seconds
        if layer.name in at:
            sums.append(0.0)
    return sums
