"""How large a model is, and how much memory a computation needs: counted from tensors, since a process's own
size misleads.
"""

import io
import threading
import weakref
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from companion import dispatch


def model_bytes(model: nn.Module) -> int:
    """Bytes of the model's parameters and buffers in memory, or of what they would take (on the meta device);
    tensors that share storage count once.
    """
    sizes: dict[tuple[str, int], int] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        storages = parts(tensor)
        sizes |= {("storage", storage._cdata): storage.nbytes() for storage in storages}
        if not storages:
            sizes["tensor", id(tensor)] = tensor.numel() * tensor.element_size()
    return sum(sizes.values())


def disk_bytes(model: nn.Module) -> int:
    """Bytes of the file that `torch.save(model.state_dict())` writes."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.tell()


def parameters(model: nn.Module) -> int:
    """Number of the model's parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


class _Live:
    """Bytes of the storages that are alive, of those that operators made or made larger, and their peak."""

    def __init__(self):
        self.lock, self.now, self.peak = threading.RLock(), 0, 0
        self.sizes: dict[int, int] = {}  # what counts of each storage, by its address
        self.there: dict[int, int] = {}  # what does not: bytes that were there before

    def mode(self) -> TorchDispatchMode:
        """Counts in the thread that enters it."""
        return _Allocations(self)

    def note(self, storage: torch.UntypedStorage, there: int = 0) -> None:
        """Its size now; the first time, with the bytes that were `there` before."""
        with self.lock:
            key = storage._cdata
            size = storage.nbytes() - self.there.setdefault(key, there)
            if key not in self.sizes:
                weakref.finalize(storage, self._free, key)
            self.now += size - self.sizes.get(key, 0)
            self.sizes[key] = size
            self.peak = max(self.peak, self.now)

    def _free(self, key: int) -> None:
        with self.lock:
            self.now -= self.sizes.pop(key)
            del self.there[key]


class _Allocations(TorchDispatchMode):
    """Tells of the storages that operators make, or resize."""

    def __init__(self, live: _Live):
        super().__init__()
        self.live = live

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = [part for tensor in _tensors((args, kwargs)) for part in parts(tensor)]
        before = {storage._cdata: (storage, storage.nbytes()) for storage in given}
        result = function(*args, **(kwargs or {}))
        for storage, size in before.values():
            if storage.nbytes() != size and storage._cdata not in self.live.sizes:
                self.live.note(storage, size)  # it was there before, and has grown
        for storage in (part for tensor in _tensors(result) for part in parts(tensor)):
            if storage._cdata not in before or storage._cdata in self.live.sizes:
                self.live.note(storage)
        return result


def _tensors(tree: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


_SPARSE = {
    torch.sparse_coo: ("_indices", "_values"),
    torch.sparse_csr: ("crow_indices", "col_indices", "values"),
    torch.sparse_bsr: ("crow_indices", "col_indices", "values"),
    torch.sparse_csc: ("ccol_indices", "row_indices", "values"),
    torch.sparse_bsc: ("ccol_indices", "row_indices", "values"),
}


def parts(tensor: torch.Tensor) -> list[torch.UntypedStorage]:
    """The storages of a tensor: one; of a sparse one, or one that wraps others (nested, quantized, shared out
    over ranks), those of its parts. A tensor whose device or layout keeps it (XLA, MKL-DNN) has none.
    """
    if tensor.layout in _SPARSE:
        return [part for name in _SPARSE[tensor.layout] for part in parts(getattr(tensor, name)())]
    if is_traceable_wrapper_subclass(tensor):
        return [part for name in tensor.__tensor_flatten__()[0] for part in parts(getattr(tensor, name))]
    try:
        return [tensor.untyped_storage()]
    except (NotImplementedError, RuntimeError):
        return []


def peak_bytes(function: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Most bytes of tensors alive at once during one call of `function`, above what was alive before it.

    On CUDA the allocator's own figure; elsewhere counted from the tensors that operators return, in all
    threads that the function starts, so that an operator's private workspace is not seen. Process memory
    would mislead: it keeps what was freed.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    live = _Live()
    with dispatch.in_all_threads(live.mode):
        function()
    return live.peak


class SavedBytes:
    """Counts the bytes that autograd keeps for the backward passes of what runs inside; `most` is their peak.

    Tensors of `model` and `others`, which are there anyway, do not count, nor do parameters that the model
    has only for a while (those that FSDP gathers); what several operators save counts once. Of a tensor that
    is shared out over ranks, this rank's part counts.
    """

    def __init__(self, model: nn.Module, *others: torch.Tensor):
        self.now = self.most = 0
        self.model = model
        self.known = _storages((*model.parameters(), *model.buffers(), *others))
        self.holders: dict[int, int] = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda holder: holder.tensor)

    def _pack(self, tensor: torch.Tensor) -> "_Holder":
        holder, storage = _Holder(tensor), local(tensor).untyped_storage()
        key = storage.data_ptr()
        if key in self.holders or key not in self.known | _storages(self.model.parameters()):
            self.holders[key] = self.holders.get(key, 0) + 1
            if self.holders[key] == 1:
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
            weakref.finalize(holder, self._dropped, key, storage.nbytes())
        return holder

    def _dropped(self, key: int, size: int) -> None:
        self.holders[key] -= 1
        if not self.holders[key]:
            self.now -= size

    def __enter__(self) -> "SavedBytes":
        self.hooks.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self.hooks.__exit__(*error)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor that may be shared out over ranks (a DTensor)."""
    with torch.no_grad():
        return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _storages(tensors: Iterable[torch.Tensor]) -> set[int]:
    return {local(tensor).untyped_storage().data_ptr() for tensor in tensors}


class _Holder:
    """What autograd keeps in a saved tensor's place."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor
