"""Operators as torch dispatches them: seen in every thread that a computation starts, and the
multiply-accumulate operations (MACs) of each.
"""

import re
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import AbstractContextManager, contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

aten = torch.ops.aten


@contextmanager
def in_all_threads(make: Callable[[], AbstractContextManager]) -> Iterator[None]:
    """Enters what `make()` gives here, in each thread started inside, and for each call submitted inside to a
    ThreadPoolExecutor. A thread that runs already and takes its work from elsewhere is not seen.
    """
    start, submit, seen = threading.Thread.start, futures.ThreadPoolExecutor.submit, threading.local()

    def entered(function: Callable) -> Callable:
        def inside(*args: object, **options: object) -> object:
            if getattr(seen, "inside", False):
                return function(*args, **options)
            seen.inside = True
            try:
                with make():
                    return function(*args, **options)
            finally:
                seen.inside = False

        return inside

    def started(thread: threading.Thread) -> None:
        if getattr(thread, "_target", None) is not futures.thread._worker:  # whose calls are seen one by one
            thread.run = entered(thread.run)
        start(thread)

    def submitted(pool: futures.ThreadPoolExecutor, function: Callable, /, *args: object, **options: object):
        return submit(pool, entered(function), *args, **options)

    threading.Thread.start, futures.ThreadPoolExecutor.submit = started, submitted
    try:
        with make():
            seen.inside = True
            yield
    finally:
        threading.Thread.start, futures.ThreadPoolExecutor.submit = start, submit


def _recurrent(x, weight_ih, weight_hh, *others, out_val=None, **options) -> int:
    """FLOPs of one layer and direction of an LSTM or GRU: both products, for each step of each sequence."""
    return 2 * x.shape[0] * x.shape[1] * (weight_ih.numel() + weight_hh.numel())


FORMULAS: dict[object, Callable[..., int]] = {
    **flop_registry,
    aten.mv: lambda matrix, vector, **out: 2 * matrix.numel(),
    aten.addmv: lambda x, matrix, vector, **out: 2 * matrix.numel(),
    aten.dot: lambda a, b, **out: 2 * a.numel(),
    aten.vdot: lambda a, b, **out: 2 * a.numel(),
    aten.mkldnn_rnn_layer: _recurrent,
    aten._scaled_dot_product_flash_attention_for_cpu: lambda query, key, value, *others, **out: (
        sdpa_flop_count(query.shape, key.shape, value.shape)
    ),
}
# Names begin so of operators that move elements, or reduce them without a product.
_FREE = re.compile(
    r"""_*(?:unsafe_|safe_)?(?:
        adaptive_avg_pool|adaptive_max_pool|all|amax|amin|any|arange|argmax|argmin|argsort|as_strided|
        avg_pool|batch_norm|bernoulli|bincount|cat|clone|constant_pad|copy|count|cudnn_batch_norm|cum|
        detach|diag|dropout|embedding|empty|equal|eye|fill|flip|full|fused_adam|fused_sgd|gather|
        grid_sampler|hardswish|hardtanh|index|is_|item|kthvalue|lift|linalg_vector_norm|linspace|local_scalar_dense|
        log_softmax|logsumexp|masked|max|mean|median|min|miopen_batch_norm|mode|multinomial|nan|
        native_batch_norm|native_dropout|native_group_norm|native_layer_norm|new_|nonzero|norm|normal|
        one|ones|pack_padded|pad|pad_packed|poisson|prod|put|rand|reflection_pad|repeat|replication_pad|
        resize|rms_norm|roll|scatter|select_backward|set_|slice_scatter|softmax|sort|split|stack|std|sum|take|
        thnn_fused|to_|to_copy|topk|tril|triu|unfold|uniform|unique|upsample|var|view|zero
    )""",
    re.VERBOSE,
)


def _costs_no_macs(operator: torch._ops.OpOverload) -> bool:
    """Whether an operator moves elements, or computes with each by itself: by convention it has no MACs."""
    if torch.Tag.pointwise in operator.tags or operator.is_view:
        return True
    namespace, _, name = operator._schema.name.partition("::")
    return namespace == "aten" and bool(_FREE.match(name))  # of others a name says nothing


class Counted:
    """MACs so far, and the names of operators that may have some but no formula."""

    def __init__(self):
        self.lock, self.macs, self.unknown = threading.Lock(), 0, set()

    def counter(self) -> TorchDispatchMode:
        """Counts in the thread that enters it."""
        return _Counter(self)

    def add(self, operator: torch._ops.OpOverload, args: tuple, options: dict, result: object) -> None:
        packet = getattr(operator, "_overloadpacket", operator)
        with self.lock:
            if formula := FORMULAS.get(packet):
                self.macs += formula(*args, **options, out_val=result) // 2
            elif not isinstance(operator, torch._ops.OpOverload) or not _costs_no_macs(operator):
                self.unknown.add(str(packet))


class _Counter(TorchDispatchMode):
    def __init__(self, counted: Counted):
        super().__init__()
        self.counted = counted

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        options = kwargs or {}
        if isinstance(function, torch._ops.OpOverload) and function._overloadpacket not in FORMULAS:
            with self:  # an operator made of others is these
                result = function.decompose(*args, **options)
            if result is not NotImplemented:
                return result
        result = function(*args, **options)
        self.counted.add(function, args, options, result)
        return result
