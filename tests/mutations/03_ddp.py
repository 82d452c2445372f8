"""Ways to break distributed data parallel."""

import torch.distributed as dist
from mutating import breaks
from torch import nn

from companion import ddp, launch


@breaks("same-start", "averages")
def nothing_is_shared(notebook):
    """The wrapper neither sends weights nor averages gradients."""

    class DDP(nn.Module):
        def __init__(self, module, **options):
            super().__init__()
            self.module = module

        def forward(self, *inputs):
            return self.module(*inputs)

    notebook.DDP = DDP


@breaks("averages")
def gradients_are_added_up(notebook):
    """Gradients are sums over the ranks, not averages."""
    right = notebook.DDP

    def DDP(module, **options):  # noqa: N802
        wrapped = right(module, **options)

        def add(state, bucket):
            return (
                dist.all_reduce(bucket.buffer(), async_op=True)
                .get_future()
                .then(lambda done: done.value()[0])
            )

        wrapped.register_comm_hook(None, add)
        return wrapped

    notebook.DDP = DDP


@breaks("one-model")
def ranks_drift_apart(notebook):
    """In the training of all ranks every step stays unsynchronised."""
    run = launch.run

    def wrong(function, *args, **options):
        def alone(*inner):
            wrap = ddp.wrap

            def unsynchronised(module):
                wrapped = wrap(module)
                wrapped.require_backward_grad_sync = False
                return wrapped

            ddp.wrap = unsynchronised
            return function(*inner)

        return run(alone, *args, **options)

    launch.run = wrong
