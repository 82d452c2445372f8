"""Things sent between processes by value, functions of a notebook's cells too, with errors that name what
cannot be.
"""

import importlib
import inspect
import io
import math
import pickle
import sys
import types
from collections.abc import Callable

import cloudpickle
import torch
from cloudpickle import cloudpickle as insides


class _Unpickler(pickle.Unpickler):
    """Leaves classes that are here already as they are. cloudpickle finds the class of an object that comes
    back from another process, and would give it the methods, attributes and globals that it had there.
    """

    def __init__(self, file: io.BytesIO):
        super().__init__(file)
        self.here: set[type] = set()

    def find_class(self, module: str, name: str) -> object:
        found = super().find_class(module, name)
        if found in (insides._make_skeleton_class, insides._make_skeleton_enum):
            return lambda *about: self._class(found, about)
        if found is insides._class_setstate:
            return lambda kind, state: kind if kind in self.here else found(kind, state)
        return found

    def _class(self, make: Callable[..., type], about: tuple) -> type:
        known = set(insides._DYNAMIC_CLASS_TRACKER_BY_CLASS)
        kind = make(*about)
        self.here |= {kind} & known
        return kind


def unpack(packed: bytes) -> object:
    """What `pack` packed. Classes that this process has are not changed by it."""
    return _Unpickler(io.BytesIO(packed)).load()


class _TooLargeError(Exception):
    pass


class _Bounded(io.BytesIO):
    def __init__(self, most_bytes: float):
        super().__init__()
        self.most_bytes = most_bytes

    def write(self, data) -> int:
        if self.tell() + memoryview(data).nbytes > self.most_bytes:
            raise _TooLargeError
        return super().write(data)


class _Pickler(cloudpickle.Pickler):
    def reducer_override(self, thing):
        # torch.classes is a module of a type of its own. cloudpickle takes it along with any function that
        # mentions torch and an attribute called "classes", and then cannot pickle it.
        if isinstance(thing, types.ModuleType) and sys.modules.get(thing.__name__) is thing:
            return importlib.import_module, (thing.__name__,)
        # Of a view torch would send all that it is a view of.
        if type(thing) is torch.Tensor and _is_part(thing):
            return thing.clone().__reduce_ex__(pickle.HIGHEST_PROTOCOL)
        return super().reducer_override(thing)


def _is_part(tensor: torch.Tensor) -> bool:
    """Whether it is a small, dense part of a larger piece of memory, which a copy can stand for."""
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.requires_grad:
        return False
    if vars(tensor):  # a copy would lose attributes
        return False
    dense = tensor.is_contiguous() or (
        tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    )
    return dense and tensor.nbytes < tensor.untyped_storage().nbytes()


def pack(thing: object, name: str, most_bytes: float = math.inf) -> bytes:
    """`thing`, called `name` in errors, pickled by value.

    Raises TypeError that names the part which cannot be pickled, ValueError if it would be larger than
    `most_bytes`.
    """
    file = _Bounded(most_bytes)
    try:
        _Pickler(file).dump(thing)
    except _TooLargeError:
        most = f"{most_bytes / 2**30:.3g} GiB"
        raise ValueError(
            f"{name} is larger than {most}: return less, or save it to a file and return its path"
        ) from None
    except Exception as error:
        part, kind = _culprit(thing, name)
        raise TypeError(
            f"{name} cannot be sent between processes: {part} is a {kind}, which belongs to its process; "
            "make it inside the function, or leave it out"
        ) from error
    return file.getvalue()


def _culprit(thing: object, name: str, depth: int = 0) -> tuple[str, str]:
    """The innermost part of `thing` that cannot be pickled, and its type."""
    parts: dict[str, object] = {}
    if inspect.isfunction(thing):
        used = inspect.getclosurevars(thing)
        parts = {f"`{n}` in {name}": part for n, part in (used.globals | used.nonlocals).items()}
    elif inspect.ismethod(thing):
        parts = {f"the object of {name}": thing.__self__}
    elif isinstance(thing, dict):
        parts = {f"{name}[{key!r}]": part for key, part in thing.items()}
    elif isinstance(thing, (list, tuple, set)):
        parts = {f"{name}[{i}]": part for i, part in enumerate(thing)}
    elif not inspect.ismodule(thing):
        parts = {f"{name}.{attribute}": part for attribute, part in getattr(thing, "__dict__", {}).items()}
    for inner, part in parts.items() if depth < 8 else ():
        try:
            _Pickler(io.BytesIO()).dump(part)
        except Exception:
            return _culprit(part, inner, depth + 1)
    return name, type(thing).__name__
