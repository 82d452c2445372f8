"""Ways to break training on several machines."""

from pathlib import Path

import torch
from mutating import breaks, in_ranks

from companion import multi_machine, recoveries, sharded_checkpoint


@breaks("two-machines")
def machines_train_with_another_order(notebook):
    """Machines take the batches of another seed."""
    main = multi_machine.main

    def wrong(arguments):
        indices = multi_machine.indices
        multi_machine.indices = lambda step, samples, size, seed: indices(step, samples, size, seed + 1)
        return main(arguments)

    multi_machine.main = wrong


@breaks("ring")
def sums_are_not_handed_round(notebook):
    """What is received in the second half of the ring is thrown away."""

    def damage():
        torch.Tensor.copy_ = lambda self, *args: self

    in_ranks(damage, "ring_and_library")


@breaks("faults")
def the_last_checkpoint_is_not_read(notebook):
    """After a fault weights are new ones, and steps go on where they were."""
    recovery, main = recoveries.recovery, multi_machine.main

    def wrong(*args):
        def forgetful(arguments):
            sharded_checkpoint.load = lambda model, optimizer, folder: None
            return main(arguments)

        multi_machine.main = forgetful
        return recovery(*args)

    recoveries.recovery = wrong


@breaks("interrupted")
def unfinished_checkpoints_count(notebook):
    """Every folder counts as a whole checkpoint."""

    def wrong(folder):
        return sorted(int(path.name.removeprefix("step-")) for path in Path(folder).glob("step-*"))

    sharded_checkpoint.steps = wrong


@breaks("world-sizes")
def ranks_share_the_batch_wrongly(notebook):
    """Each rank takes the first part of every batch."""

    def damage():
        indices = multi_machine.indices

        class First:
            def __init__(self, batch):
                self.batch = batch

            def chunk(self, count):
                return [self.batch.chunk(count)[0]] * count

        multi_machine.indices = lambda *about: First(indices(*about))

    in_ranks(damage, "trained")
