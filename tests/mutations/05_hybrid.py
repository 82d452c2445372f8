"""Ways to break a model that is laid out over ranks."""

from mutating import breaks, in_ranks

from companion import hybrid, hybrid_steps, sharded_checkpoint


@breaks("book")
def gradients_are_not_averaged(notebook):
    """DDP leaves each rank its own gradients."""

    class Alone(notebook.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, x):
            return self.module(x)

    notebook.DDP = Alone


@breaks("layouts")
def a_split_layer_is_not_added_up(notebook):
    """Layers that take a part of their inputs each do not add up what they give."""

    def damage():
        from torch.distributed.tensor.parallel import RowwiseParallel

        class Alone(RowwiseParallel):
            @staticmethod
            def _prepare_output_fn(output_layouts, use_local_output, module, outputs, mesh):
                return outputs.to_local()

        hybrid.STYLES["row"] = Alone

    in_ranks(damage, "run")


@breaks("layouts")
def all_ranks_see_the_first_part(notebook):
    """Each data rank gets the first part of the batch."""

    def damage():
        hybrid.share = lambda batch, mesh: batch.chunk(mesh["data"].size())[0]

    in_ranks(damage, "run")


@breaks("layouts")
def ranks_are_not_averaged(notebook):
    """Models, and stages of several pipelines, are not put into DDP."""

    def damage():
        hybrid.ddp.wrap = lambda stage, **options: stage

    in_ranks(damage, "run")


@breaks("checkpoint")
def nothing_is_loaded(notebook):
    """The checkpoint is not read."""

    def damage():
        sharded_checkpoint.load = lambda *args: None

    in_ranks(damage, "load")


@breaks("checkpoint")
def a_part_is_lost(notebook):
    """The last rank writes zeros."""

    def damage():
        import torch.distributed as dist

        step = hybrid_steps.Laid.step

        def wrong(laid):
            loss = step(laid)
            weights = hybrid.whole_weights(laid.model)
            for parameter in laid.model.parameters():
                if dist.get_rank() == dist.get_world_size() - 1:
                    parameter.data.to_local().zero_()
            hybrid.whole_weights = lambda model: weights
            return loss

        hybrid_steps.Laid.step = wrong

    in_ranks(damage, "save")
