"""A model's forward as a graph that really is the model: followed by torch.fx, where nothing gets lost.

torch.fx runs `forward` once and notes the operators. What Python did besides would be frozen or lost: a
random number that was drawn, a counter, a tensor kept in `self`, `torch.no_grad`, `self.training`. A module
in whose forward that happens is left whole, a single node of the graph; where it is the model's own, it is
refused with the line. Both modes are followed: the model's own forward may read `self.training`.
"""

import copy
import inspect
import traceback
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch
from torch import fx, nn

from companion import modules, randomness

_LIBRARY = (str(Path(torch.__file__).parent), str(Path(__file__).parent), inspect.__file__)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_CONSTANT = "_tensor_constant"  # how torch.fx calls a tensor that forward has made


class SplitError(ValueError):
    """The model cannot be cut as asked; the message says where and why."""


class _UnsafeError(Exception):
    """Something in the forward of a module that a graph would lose."""

    def __init__(self, module: nn.Module, reason: str):
        super().__init__(reason)
        self.module, self.reason = module, reason


@dataclass
class Followed:
    """The graphs of a model's forward in both modes, and why modules were left whole, by name."""

    training: fx.GraphModule
    evaluating: fx.GraphModule
    whole: dict[str, str] = field(default_factory=dict)

    @property
    def graphs(self) -> tuple[fx.GraphModule, fx.GraphModule]:
        return self.training, self.evaluating


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, whole: set[nn.Module]):
        super().__init__()
        self.whole, self.open = whole, []
        self.context = _context()

    def trace(self, root, concrete_args=None):
        self.open = [root]
        return super().trace(root, concrete_args)

    def create_args_for_root(self, function, is_module, concrete_args=None):
        """One input; all others must have defaults, which Python puts in."""
        parameters = list(inspect.signature(function).parameters.values())[1:]
        needed = [
            p.name
            for p in parameters
            if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.KEYWORD_ONLY)
        ]
        if len(needed) != 1:
            raise SplitError(
                f"forward takes {len(needed)} inputs ({', '.join(needed)}); a pipeline's stages hand on one"
            )
        return inspect.unwrap(function), [self.root, self.create_proxy("placeholder", needed[0], (), {})]

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return module in self.whole or super().is_leaf_module(module, name)

    def call_module(self, module, forward, args, kwargs):
        if self.is_leaf_module(module, self.path_of_module(module)):
            return super().call_module(module, forward, args, kwargs)
        self.open.append(module)
        with _blamed(module):
            result = super().call_module(module, forward, args, kwargs)
        self.open.pop()
        return result

    def create_node(self, kind, target, args, kwargs, name=None, type_expr=None):
        if kind.startswith("call_"):
            if _context() != self.context:
                self.refuse("it computes inside torch.no_grad(), autocast or their like")
            first = args[0] if args else None
            if in_place(kind, target, kwargs) and isinstance(first, fx.Node) and _is_constant(first):
                self.refuse("it changes a tensor that it has made, which would be the same one in each call")
        node = super().create_node(kind, target, args, kwargs, name, type_expr)
        node.meta["owner"] = self.open[-1] if self.open else self.root
        return node

    def refuse(self, what: str):
        raise _UnsafeError(self.open[-1], f"{what} ({_line()})")


def _context() -> tuple:
    """Modes that operators do not note."""
    casts = [torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) for kind in ("cpu", "cuda")]
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *casts


def _is_constant(node: fx.Node) -> bool:
    return node.op == "get_attr" and str(node.target).startswith(_CONSTANT)


def in_place(kind: str, target: object, kwargs: dict) -> bool:
    """Whether an operator changes its first input."""
    if kind == "call_module":
        return False
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    augmented = getattr(target, "__module__", "") == "_operator" and name.startswith("i") and name != "is_not"
    return augmented or bool(kwargs.get("inplace")) or (name.endswith("_") and not name.endswith("__"))


def _line() -> str:
    """The innermost line that is neither torch's nor this package's."""
    frames = [frame for frame in traceback.extract_stack() if not frame.filename.startswith(_LIBRARY)]
    return f"line {frames[-1].lineno}: {frames[-1].line}" if frames else "in torch"


@contextmanager
def _blamed(module: nn.Module) -> Iterator[None]:
    """Whatever goes wrong inside is this module's, unless it is that of one inside."""
    before = randomness.state()
    try:
        yield
    except (_UnsafeError, SplitError):
        raise
    except Exception as error:
        places = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in places if not frame.filename.startswith(_LIBRARY)]
        where = f" (line {own[-1].lineno}: {own[-1].line})" if own else ""
        said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise _UnsafeError(module, f"{said}{where}") from error
    if not randomness.same(before, randomness.state()):
        raise _UnsafeError(module, "it draws random numbers of its own, which would be the same in each call")


@contextmanager
def _watched(model: nn.Module) -> Iterator[None]:
    """Raises for what forward sets on a module, or changes in its lists; afterwards all is as it was."""
    parts = {part: dict(part.__dict__) for part in model.modules()}
    held = [(part, name, *pair) for part in parts for name, pair in _held(part).items()]
    plain_set = nn.Module.__setattr__

    def watching(module: nn.Module, name: str, value: object) -> None:
        if module in parts and not name.startswith(_CONSTANT):
            raise _UnsafeError(module, f"it sets self.{name} ({_line()})")
        plain_set(module, name, value)

    try:
        with randomness.kept(), mock.patch.object(nn.Module, "__setattr__", watching):
            yield
        for part, name, container, before in held:
            if not _same(container, before) and not name.startswith("_"):
                raise _UnsafeError(part, f"it changes self.{name}")
    finally:
        for _, _, container, before in held:
            if not _same(container, before):
                container.clear()
                (container.extend if isinstance(container, list) else container.update)(before)
        for part, attributes in parts.items():
            part.__dict__.clear()
            part.__dict__.update(attributes)


def _held(part: nn.Module) -> dict[str, tuple]:
    """Lists, dictionaries and sets that a module holds, each with a copy of itself."""
    mine = {name: value for name, value in part.__dict__.items() if isinstance(value, (list, dict, set))}
    return {name: (value, copy.copy(value)) for name, value in mine.items()}


def _same(container: list | dict | set, before: list | dict | set) -> bool:
    if isinstance(container, set):
        return container == before
    now, then = (
        [*c.items()] if isinstance(c, dict) else [(i, e) for i, e in enumerate(c)]
        for c in (container, before)
    )
    return len(now) == len(then) and all(a == c and b is d for (a, b), (c, d) in zip(now, then, strict=True))


def follow(model: nn.Module, keep: Collection[nn.Module] = ()) -> Followed:
    """The model's forward in both modes; the modules in `keep` are left whole too.

    Raises SplitError where it cannot be followed without losing something, with the user's line.
    """
    whole = {part: reason for part in model.modules() if (reason := _not_to_be_opened(part))}
    whole |= dict.fromkeys(keep, "it is to be kept")
    if model in whole:
        raise SplitError(
            f"{type(model).__name__} cannot be cut: {whole[model]}, which its stages would not call"
        )
    names = {part: name for name, part in model.named_modules()}
    while True:
        try:
            graphs = [_traced(model, set(whole), training) for training in (True, False)]
            unlike = _unlike(*graphs) - {model}
            if not unlike:
                return Followed(*graphs, {names[part]: reason for part, reason in whole.items()})
            whole |= dict.fromkeys(unlike, "it reads self.training")
        except _UnsafeError as error:
            if error.module is model or error.module in whole:
                raise SplitError(
                    f"the forward of {type(error.module).__name__} cannot be followed: {error.reason}. "
                    "Write the model as an nn.Sequential of modules: those may do what they like inside."
                ) from error
            whole[error.module] = error.reason


def _not_to_be_opened(part: nn.Module) -> str | None:
    if any(getattr(part, name) for name in _HOOKS):
        return "it has hooks"
    if "forward" in part.__dict__:
        return "its forward was replaced"
    return "it is scripted" if isinstance(part, torch.jit.ScriptModule) else None


def _traced(model: nn.Module, whole: set[nn.Module], training: bool) -> fx.GraphModule:
    modes = modules.modes(model)
    try:
        for part in model.modules():
            part.__dict__["training"] = training
        with _watched(model), _blamed(model):
            return fx.GraphModule(model, _Tracer(whole).trace(model))
    finally:
        for part, before in modes.items():
            part.__dict__["training"] = before


def _unlike(training: fx.GraphModule, evaluating: fx.GraphModule) -> set[nn.Module]:
    """The modules whose own operators are not the same in both modes."""
    own = ({}, {})
    for found, graph in zip(own, (training, evaluating), strict=True):
        for node in graph.graph.nodes:
            if node.op.startswith("call_"):
                about = fx.node.map_arg((node.args, node.kwargs), lambda other: str(other.target))
                found.setdefault(node.meta["owner"], []).append((node.op, str(node.target), repr(about)))
    return {part for part in own[0].keys() | own[1].keys() if own[0].get(part) != own[1].get(part)}
