"""What a model's compiled step depends on, as a hash: code, structure, shapes; not the weights' values."""

import dis
import hashlib
import sys
import sysconfig
import types
from pathlib import Path

import torch
from torch import nn

_PLAIN = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device)
_LIBRARIES = [Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib", "stdlib")]


class UnknownError(ValueError):
    """Something in the model cannot be looked into, so that no answer may be kept for it."""


def key(*things: object) -> str:
    """A hash that is equal for equal content: of code the text, of tensors shape and type.

    Raises UnknownError for what it cannot look into.
    """
    content = _Content()
    for thing in things:
        content.add(thing)
    return content.digest.hexdigest()


class _Content:
    def __init__(self):
        self.digest, self.seen, self.packages = hashlib.sha256(), {}, set()

    def add(self, thing: object) -> None:
        if isinstance(thing, _PLAIN):
            self.digest.update(f"{type(thing).__name__}:{thing!r};".encode())
            return
        if id(thing) in self.seen:  # shared, or in a circle: which one it is
            self.digest.update(f"again:{self.seen[id(thing)][0]};".encode())
            return
        self.seen[id(thing)] = len(self.seen), thing  # kept, so that no other gets its id
        self.digest.update(f"{type(thing).__module__}.{type(thing).__qualname__}(".encode())
        for part in self.parts(thing):
            self.add(part)
        self.digest.update(b")")

    def parts(self, thing: object) -> list[object]:
        """What a thing consists of."""
        if isinstance(thing, torch.Tensor):
            return [*thing.shape, thing.dtype, thing.requires_grad, isinstance(thing, nn.Parameter)]
        if type(thing) in (list, tuple):
            return list(thing)
        if type(thing) in (set, frozenset):
            return sorted(thing, key=repr)
        if type(thing) is dict:
            return [part for pair in thing.items() for part in pair]
        if isinstance(thing, types.ModuleType):
            return [thing.__name__]
        if isinstance(thing, types.MethodType):
            return [thing.__func__, thing.__self__]
        if isinstance(thing, types.FunctionType | type):
            return self.code(thing)
        if isinstance(thing, types.CodeType):
            return [_instructions(thing)]
        if isinstance(thing, property | staticmethod | classmethod):
            return [getattr(thing, "fget", None) or thing.__func__]
        if hasattr(thing, "__wrapped__"):
            return [thing.__wrapped__]
        try:
            made = thing.__reduce_ex__(4)  # what pickle would need to make it again
        except Exception as error:
            kind = type(thing).__name__
            raise UnknownError(f"there is no telling what a {kind} consists of: {error}") from error
        if isinstance(made, str):
            return [made]  # known by its name
        call, arguments, state, items, pairs = [*made, None, None, None][:5]
        return [call, arguments, state, list(items or ()), [list(pair) for pair in pairs or ()]]

    def code(self, thing) -> list[object]:
        """A function or a class: its name and the text of its file, of a package of the reader's the texts of
        all its files; made in a notebook, what it consists of.
        """
        module = sys.modules.get(thing.__module__)
        file = getattr(module, "__file__", None)
        if file is None or thing.__module__ == "__main__":
            return self.made_here(thing)
        path, package = Path(file).resolve(), thing.__module__.split(".")[0]
        if any(path.is_relative_to(folder) for folder in _LIBRARIES):
            return [thing.__module__, thing.__qualname__, _text(path)]
        if package in self.packages:
            return [thing.__qualname__]
        self.packages.add(package)
        names = sorted(name for name in sys.modules if name.split(".")[0] == package)
        files = [getattr(sys.modules[name], "__file__", None) for name in names]
        return [thing.__qualname__, *(_text(Path(file)) for file in files if file)]

    def made_here(self, thing) -> list[object]:
        if isinstance(thing, type):
            own = {
                name: part
                for name, part in vars(thing).items()
                if callable(part) or not (name.startswith("__") and name.endswith("__"))
            }
            return [thing.__qualname__, *thing.__bases__, own]
        used = sorted(_names(thing.__code__) & set(thing.__globals__))
        return [
            thing.__code__,
            thing.__defaults__,
            thing.__kwdefaults__,
            {name: thing.__globals__[name] for name in used},
            [cell.cell_contents for cell in thing.__closure__ or ()],
        ]


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.suffix == ".py" else path.name


def _names(code: types.CodeType) -> set[str]:
    """The names that the code, and what is defined in it, may mean globals by."""
    inner = [_names(part) for part in code.co_consts if isinstance(part, types.CodeType)]
    return set(code.co_names).union(*inner)


def _instructions(code: types.CodeType) -> str:
    """What the code does, without the lines and addresses where it stands."""
    steps = []
    for step in dis.get_instructions(code):
        inside = isinstance(step.argval, types.CodeType)
        steps.append(f"{step.opname} {step.argval.co_name if inside else step.argrepr}")
    inner = [_instructions(part) for part in code.co_consts if isinstance(part, types.CodeType)]
    return "\n".join([*steps, *inner])
