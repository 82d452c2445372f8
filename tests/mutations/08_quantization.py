"""Ways to break quantization."""

import copy

import torch
from mutating import breaks
from torch import nn

from companion import low_bits, quantization, quantization_pt2e


@breaks("integers")
def nothing_is_calibrated(notebook):
    """The observers see no data, so that every layer's scale is 1."""
    quantization.calibrate = lambda made, calibration: calibration[0]


@breaks("answers")
def relus_are_lost(notebook):
    """Fusing takes a layer's ReLU away and does not make it part of the layer."""

    def lost(model, groups, fuse_modules):
        for group in groups:
            model.set_submodule(group[-1], nn.Identity())
        return model

    quantization.fused = lost


@breaks("nothing-else")
def a_file_is_not_read(notebook):
    """Loading gives back the model that only says what the file is like."""
    quantization.load = lambda path, like: like


@breaks("nothing-else")
def a_layer_stays_in_float(notebook):
    """The last layer is left out, as an observer without settings leaves it out."""
    settings = quantization._with_stubs

    def wrong(model, *args, **options):
        made = settings(model, *args, **options)
        made.module.fc3 = nn.Sequential(quantization.ao.DeQuantStub(), made.module.fc3)
        made.module.fc3[1].qconfig = None
        made.dequant = nn.Identity()
        return made

    quantization._with_stubs = wrong


@breaks("few-bits")
def a_bit_too_many(notebook):
    """Weights are rounded to one bit more than asked for."""
    rounded = low_bits.rounded
    low_bits.rounded = lambda model, bits, **options: rounded(model, min(8, bits + 1), **options)


@breaks("graph")
def the_export_goes_past_the_quantizer(notebook):
    """The graph is the float model's, as it was exported."""

    def wrong(model, calibration):
        return torch.export.export(copy.deepcopy(model).eval(), (calibration[0],)).module()

    quantization_pt2e.exported = wrong
