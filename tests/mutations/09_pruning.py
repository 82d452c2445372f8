"""Ways to break pruning."""

import copy

import torch
from mutating import breaks

from companion import packing, pruning, pruning_channels


@breaks("masks")
def the_largest_weights_go(notebook):
    """Masks take the largest weights instead of the smallest."""
    largest = pruning._largest
    pruning._largest = lambda scores, amount: largest(-scores, amount)


@breaks("masks")
def masks_are_forgotten_in_training(notebook):
    """Zeros are put into the weights, and training moves them."""
    masked = pruning.masked
    pruning.masked = lambda *args, **options: pruning.permanent(masked(*args, **options))


@breaks("channels")
def the_next_layer_reads_other_channels(notebook):
    """A channel is removed, and the next layer loses the part that read another one."""
    narrowed = pruning_channels.narrowed

    def wrong(*args, **options):
        found = narrowed(*args, **options)
        with torch.no_grad():
            found.model.fc2.weight.copy_(found.model.fc2.weight.roll(1, dims=1))
        return found

    pruning_channels.narrowed = wrong


@breaks("untouched")
def masks_are_put_on_the_given_model(notebook):
    """The model is not copied."""
    pruning.copied = lambda model: model


@breaks("packed")
def biases_are_packed_with_loss(notebook):
    """Everything is stored in half the bytes, exact or not."""
    pack = packing.pack

    def wrong(model, path):
        model = copy.deepcopy(model)
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16().float()
        return pack(model, path)

    packing.pack = wrong
