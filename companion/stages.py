"""The stages of a model whose forward was followed: where one tensor alone goes on, and what lies between."""

from collections.abc import Iterable, Sequence

import torch
from torch import fx, nn
from torch.fx.graph_module import GraphModule

from companion import modules
from companion.tracing import Followed, SplitError, in_place

Cut = tuple[fx.Node, fx.Node]  # the same value in the graphs of both modes
_PLAIN = (
    "size",
    "to",
    "view",
    "reshape",
    "expand",
    "unsqueeze",
    "squeeze",
    "transpose",
    "permute",
    "type_as",
)


def _name(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else node.name


def _named(nodes: Iterable[fx.Node]) -> dict[str, fx.Node]:
    """Nodes by a name that is unique or numbered."""
    found: dict[str, fx.Node] = {}
    for node in nodes:
        name, number = _name(node), 1
        while name in found:  # a module that is called several times
            name, number = f"{_name(node)}@{number}", number + 1
        found[name] = node
    return found


def _fit(graph: GraphModule) -> dict[str, fx.Node]:
    """The places after which one value alone goes on, and no weights are shared."""
    alive = _alive(graph)
    return _named(node for node in alive if alive[node] == [node] and not _shared(graph, node))


def _free(graph: GraphModule) -> set[fx.Node]:
    """Nodes that any stage can compute by itself: parameters and buffers, and plain views of them."""
    found: set[fx.Node] = set()
    for node in graph.graph.nodes:
        plain = getattr(node.target, "__module__", "") == "_operator" or node.target in (getattr, *_PLAIN)
        computed = node.op.startswith("call_") and plain and not in_place(node.op, node.target, node.kwargs)
        if node.op == "get_attr" or (computed and set(node.all_input_nodes) <= found):
            found.add(node)
    return found


def _alive(graph: GraphModule) -> dict[fx.Node, list[fx.Node]]:
    """For each node that computes something, the values that are still to be used after it."""
    nodes, free = list(graph.graph.nodes), _free(graph)
    place = {node: number for number, node in enumerate(nodes)}
    last = {node: max((place[user] for user in node.users), default=-1) for node in nodes}
    return {
        node: [other for other in nodes[: place[node] + 1] if other not in free and last[other] > place[node]]
        for node in nodes
        if node.op.startswith("call_") and node not in free
    }


def _tensors(graph: GraphModule, nodes: Sequence[fx.Node]) -> dict[tuple, str]:
    """What these nodes use of parameters and buffers: by memory, the name."""
    found = {}
    for node in nodes:
        if node.op == "call_module":
            part = graph.get_submodule(node.target)
            named = [*part.named_parameters(str(node.target)), *part.named_buffers(str(node.target))]
        else:
            read = [other for other in node.all_input_nodes if other.op == "get_attr"]
            named = [(str(other.target), _attribute(graph, str(other.target))) for other in read]
        found |= {
            modules.memory_key(tensor): name for name, tensor in named if isinstance(tensor, torch.Tensor)
        }
    return found


def _attribute(graph: GraphModule, name: str) -> object:
    *path, last = name.split(".")
    return getattr(graph.get_submodule(".".join(path)), last)


def _shared(graph: GraphModule, node: fx.Node) -> str | None:
    """A parameter or buffer that is used before a cut and after it; buffers that are only read may be."""
    nodes = [other for other in graph.graph.nodes if other.op.startswith("call_")]
    at = nodes.index(node) + 1
    before, after = _tensors(graph, nodes[:at]), _tensors(graph, nodes[at:])
    return next((name for key, name in before.items() if key in after), None)


def cuts(followed: Followed, example: torch.Tensor | None = None) -> dict[str, Cut]:
    """The places after which one value alone goes on and no weights are shared, by name; the last is the end.

    With an `example`, the value is one tensor of floats too. Raises SplitError if there is none, or the
    output is not one value.
    """
    for graph in followed.graphs:
        _end(graph)
    training, evaluating = map(_fit, followed.graphs)
    found = {name: (node, evaluating[name]) for name, node in training.items() if name in evaluating}
    if example is not None:
        floats = _floats(followed.training, example)
        found = {name: cut for name, cut in found.items() if cut[0] in floats}
    if not found:
        raise SplitError("forward computes nothing between layers of its own: there is no place to cut")
    return found


def _end(graph: GraphModule) -> fx.Node:
    """The value that the model gives."""
    end = next(node.args[0] for node in graph.graph.nodes if node.op == "output")
    if not isinstance(end, fx.Node):
        kind = type(end).__name__.replace("immutable_", "")
        raise SplitError(f"forward gives a {kind}; the last stage of a pipeline gives one tensor")
    return end


class _Recorder(fx.Interpreter):
    """Notes which nodes give a tensor of floats."""

    def __init__(self, graph: GraphModule):
        super().__init__(graph)
        self.floats: set[fx.Node] = set()

    def run_node(self, node: fx.Node) -> object:
        result = super().run_node(node)
        if isinstance(result, torch.Tensor) and result.is_floating_point():
            self.floats.add(node)
        return result


def _floats(graph: GraphModule, example: torch.Tensor) -> set[fx.Node]:
    recorder = _Recorder(graph)
    with torch.no_grad(), modules.unchanged(graph):
        recorder.run(example)
    return recorder.floats


def why_not(followed: Followed, name: str) -> str:
    """Why there is no cut of this name."""
    graph, fit = followed.training, _fit(followed.training)
    named = _named(node for node in graph.graph.nodes if node.op.startswith("call_")) | fit
    inside = [whole for whole in followed.whole if whole and name.startswith(f"{whole}.")]
    if name not in named:
        return (
            f"{inside[0]} stays whole, since {followed.whole[inside[0]]}"
            if inside
            else "there is no such layer"
        )
    alive = _alive(graph).get(named[name], [])
    if len(alive) != 1:
        return f"{len(alive)} values would have to be sent ({', '.join(map(_name, alive))})"
    if shared := _shared(graph, named[name]):
        return f"both sides share {shared}: tied weights cannot be cut apart"
    in_both = name in fit and name in _fit(followed.evaluating)
    return "what it gives is not one tensor of floats" if in_both else "it is not there in both modes"


class _Received(torch.autograd.Function):
    """What another stage has sent, as a value that may be overwritten in place: it is the receiver's own."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


class Stage(nn.Module):
    """What computes one value of a model from another, as the model does in the stage's mode. Its parameters,
    buffers and modules are the model's, by the model's names.
    """

    def __init__(self, training: GraphModule, evaluating: GraphModule, mode: bool):
        super().__init__()
        for graph in (training, evaluating):
            _merge(self, graph)
        self.ways = (type(training).forward, type(evaluating).forward)
        self.training = mode

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        received = x.is_leaf and x.requires_grad
        return self.ways[0 if self.training else 1](self, _Received.apply(x) if received else x)


def _merge(into: nn.Module, graph: nn.Module) -> None:
    """Adds the tensors and modules that a graph refers to; those that forward made are in no checkpoint."""
    for name, tensor in graph._parameters.items():
        into._parameters.setdefault(name, tensor)
    for name, tensor in graph._buffers.items():
        into.register_buffer(name, tensor, persistent=not name.startswith("_tensor_constant"))
    for name, part in graph._modules.items():
        if name not in into._modules:
            into.add_module(name, part)
        elif into._modules[name] is not part:
            _merge(into._modules[name], part)


def between(followed: Followed, ends: Sequence[Cut], mode: bool) -> list[nn.Module]:
    """The stages that end at these cuts, and the last one; in training mode or not."""
    pieces = []
    for way, graph in enumerate(followed.graphs):
        nodes = list(graph.graph.nodes)
        given = next(node for node in nodes if node.op == "placeholder")
        pieces.append([])
        for end in [*(cut[way] for cut in ends), _end(graph)]:
            pieces[-1].append(_between(graph, given, end))
            given = end
    return [Stage(training, evaluating, mode) for training, evaluating in zip(*pieces, strict=True)]


def _between(graph: GraphModule, given: fx.Node, end: fx.Node) -> GraphModule:
    """What computes the value `end` from the value `given`."""
    part, nodes, free = fx.Graph(), list(graph.graph.nodes), _free(graph)
    copies = {given: part.placeholder("x")}
    inside = nodes[nodes.index(given) + 1 : nodes.index(end) + 1]
    needed = {node for node in inside if node.op.startswith("call_") and node not in free}
    for node in reversed(nodes):  # and what they read that any stage can compute
        if node in free and any(user in needed for user in node.users):
            needed.add(node)
    for node in nodes:
        if node in needed:
            copies[node] = part.node_copy(node, copies.__getitem__)
    part.output(copies[end])
    return GraphModule(graph, part)
