"""How large a model is, and how much memory a computation needs: counted from tensors, since a process's own
size misleads.
"""

import io
import weakref
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def model_bytes(model: nn.Module) -> int:
    """Bytes of the model's parameters and buffers in memory; tensors that share storage count once."""
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in (*model.parameters(), *model.buffers())
    }
    return sum(storages.values())


def disk_bytes(model: nn.Module) -> int:
    """Bytes of the file that `torch.save(model.state_dict())` writes."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.tell()


def parameters(model: nn.Module) -> int:
    """Number of the model's parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


class _Allocations(TorchDispatchMode):
    """Adds up the bytes of the storages that operators make, and takes them off when they die."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.seen: dict[int, weakref.finalize] = {}

    def _free(self, key: int, size: int) -> None:
        self.live -= size
        del self.seen[key]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        before = {
            t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)
        }
        for tensor in tree_leaves(result):
            if (
                isinstance(tensor, torch.Tensor)
                and (key := (storage := tensor.untyped_storage())._cdata) not in self.seen
                and key not in before
            ):
                self.live += storage.nbytes()
                self.seen[key] = weakref.finalize(storage, self._free, key, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result


def peak_bytes(function: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Most bytes of tensors alive at once during one call of `function`, above what was alive before it.

    On CUDA the allocator's own figure; elsewhere counted from the tensors that operators return, so that an
    operator's private workspace is not seen. Process memory would mislead: it keeps what was freed.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _Allocations() as allocations:
        function()
    return allocations.peak


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
