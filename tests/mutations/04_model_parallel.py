"""Ways to break models in stages, and pipelines."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from mutating import breaks

from companion import launch, model_parallel, pipeline


@breaks("two-devices")
def pieces_in_another_order(notebook):
    """The pieces' outputs are put together in the opposite order."""
    cat = torch.cat
    torch.cat = lambda tensors, *args, **options: cat(list(tensors)[::-1], *args, **options)


@breaks("schedules")
def a_micro_batch_is_dropped(notebook):
    """The last micro-batch is dropped, the first comes twice."""

    class Pipeline(pipeline.Pipeline):
        def step(self, images, labels):
            piece = len(images) // self.micro_batches
            twice = (torch.cat([part[:piece], part[:-piece]]) for part in (images, labels))
            return super().step(*twice)

    notebook.Pipeline = Pipeline


@breaks("schedules")
def micro_batches_are_added_up(notebook):
    """Losses of micro-batches are sums, not averages."""

    class Pipeline(pipeline.Pipeline):
        def __init__(self, stages, schedule, micro_batches):
            super().__init__(
                stages, schedule, micro_batches, lambda x, labels: micro_batches * F.cross_entropy(x, labels)
            )

    notebook.Pipeline = Pipeline


@breaks("training")
def the_ranks_see_other_batches(notebook):
    """The pipeline's ranks get the images in another order."""
    run = launch.run

    def wrong(function, *args, **options):
        def elsewhere(*inner):
            train = model_parallel.train

            def reseeded(model, splits, recipe, *rest):
                return train(model, splits, replace(recipe, seed=recipe.seed + 1), *rest)

            model_parallel.train = reseeded
            return function(*inner)

        return run(elsewhere, *args, **options)

    launch.run = wrong
