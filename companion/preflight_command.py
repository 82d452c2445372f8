"""The command `python -m companion preflight package.module:build --input 32x3x224x224 --chip v5e`."""

import argparse
import json
import sys
from pathlib import Path

from companion import given


def add(commands) -> argparse.ArgumentParser:
    """Adds the command to those of the parser."""
    shape = "the shape of a batch, as 32x3x224x224, or a function that gives a batch, or several"
    sub = given.command(commands, "preflight", run, shape)
    sub.add_argument("--target", metavar="SHAPE|MODULE:NAME", help="as above; else a class for each sample")
    sub.add_argument("--loss", metavar="MODULE:NAME", help="loss(output, target); else the cross-entropy")
    sub.add_argument("--optimizer", default="AdamW", choices=("SGD", "Adam", "AdamW", "none"))
    sub.add_argument("--chip", default="v5e", help="v4, v5e, v5p, v6e, tpu7x (v5e)")
    sub.add_argument("--chips", type=int, default=1, help="how many share the batch (1)")
    sub.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    sub.add_argument("--layout", default="replicated", choices=("replicated", "sharded"))
    sub.add_argument("--largest-batch", action="store_true", help="looks for the largest that fits, too")
    sub.add_argument("--time-limit", type=float, default=600.0, help="seconds for each compilation (600)")
    sub.add_argument("--json", type=Path, metavar="FILE", help="where the numbers are written")
    return sub


def run(arguments: argparse.Namespace) -> int:
    """Asks Google's compiler what a TPU would say to a model's training step; 1 if it cannot run there.

    Modules are found from the folder in which the command is typed. `--optimizer none` asks for the answers
    alone, in eval mode.
    """
    import torch.nn.functional as F

    from companion import preflight

    sys.path.insert(0, str(Path.cwd()))
    if arguments.json and arguments.json.exists():
        raise ValueError(f"{arguments.json} is there already")
    model = given.model(arguments.build)
    inputs = given.inputs(arguments.input)
    target = optimizer = None
    if arguments.optimizer == "none":
        model.eval()
    else:
        target, optimizer = _target(arguments.target, inputs), _optimizer(arguments.optimizer, model)
    options = {
        "loss": given.named(arguments.loss) if arguments.loss else F.cross_entropy,
        "chip": arguments.chip,
        "chips": arguments.chips,
        "dtype": arguments.dtype,
        "layout": arguments.layout,
        "limit_seconds": arguments.time_limit,
    }
    try:
        found = preflight.check(model, inputs, target, optimizer, **options)
        print(found)
        if arguments.json:
            text = json.dumps(found.numbers(), indent=1)
            arguments.json.write_text(text + "\n", encoding="utf-8")
        if arguments.largest_batch and found.fits:
            print(preflight.largest_batch(model, inputs, target, optimizer, **options))
    except preflight.PreflightError as error:
        raise ValueError(str(error)) from error
    return int(not found.fits)


def _optimizer(name: str, model):
    import torch

    options = {"momentum": 0.9} if name == "SGD" else {}
    return getattr(torch.optim, name)(model.parameters(), lr=0.01, **options)


def _target(text: str | None, inputs):
    """The target given, or a class for each sample."""
    import torch

    if text is not None:
        return given.inputs(text)
    first = inputs if isinstance(inputs, torch.Tensor) else inputs[0]
    return torch.zeros(len(first), dtype=torch.long)
