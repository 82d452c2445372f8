"""Ways to break data parallelism in threads."""

import copy

from mutating import breaks

from companion import data_parallel


@breaks("gradients", "batchnorm")
def only_the_first_replica_learns(notebook):
    """Copies do not lead their gradients back to the module."""
    data_parallel.replicate = lambda module, places: [module] + [copy.deepcopy(module) for _ in places[1:]]


@breaks("gradients", "nested-inputs")
def outputs_in_another_order(notebook):
    """The last replica's outputs come first."""
    gather = data_parallel.gather
    data_parallel.gather = lambda outputs, place: gather(outputs[::-1], place)


@breaks("statistics")
def statistics_of_a_copy(notebook):
    """The first replica is a copy too, so that the module's running statistics stay where they are."""
    replicate = data_parallel.replicate
    data_parallel.replicate = lambda module, places: [copy.deepcopy(module), *replicate(module, places)[1:]]


@breaks("exception")
def replicas_are_misnumbered(notebook):
    """Replicas are called in the opposite order, and the wrong one is named."""
    apply = data_parallel.parallel_apply
    data_parallel.parallel_apply = lambda replicas, pieces, threads=1: apply(
        replicas[::-1], pieces[::-1], threads
    )[::-1]
