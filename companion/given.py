"""Commands that are about a model, and what their words name: things in modules, batches, numbers."""

import argparse
import importlib
from collections.abc import Callable


def command(commands, name: str, run: Callable, shape: str) -> argparse.ArgumentParser:
    """Adds a command to those of a parser: what it runs, the model and its inputs, whose `shape` is told."""
    sub = commands.add_parser(name, help=run.__doc__.splitlines()[0], description=run.__doc__)
    sub.set_defaults(command=run)
    sub.add_argument("build", metavar="MODULE:NAME", help="a function that gives the model, or the model")
    sub.add_argument("--input", required=True, metavar="SHAPE|MODULE:NAME", help=shape)
    return sub


def named(where: str) -> object:
    """What a MODULE:NAME is. Raises ValueError where there is none."""
    module, colon, name = where.partition(":")
    if not colon or not module or not name:
        raise ValueError(f"{where!r} is not of the form package.module:name")
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise ValueError(f"{where}: {error}") from error
    except AttributeError as error:
        raise ValueError(f"{where}: there is no {name!r} in {module}") from error


def model(where: str):
    """The model that a MODULE:NAME is, or makes where it is a class or a function.

    Raises ValueError for what is no model.
    """
    from torch import nn

    found = named(where)
    made = found if isinstance(found, nn.Module) or not callable(found) else found()
    if not isinstance(made, nn.Module):
        raise ValueError(f"{where} gives a {type(made).__name__}, not a torch.nn.Module")
    return made


def inputs(text: str):
    """A batch of inputs: random numbers of a shape, or what a function gives."""
    import torch

    if ":" in text:
        given = named(text)
        return given() if callable(given) else given
    try:
        shape = [int(number) for number in text.split("x")]
    except ValueError as error:
        raise ValueError(
            f"--input {text!r} is neither a shape such as 64x3x224x224 nor MODULE:NAME"
        ) from error
    if len(shape) < 2 or min(shape) < 1:
        raise ValueError(f"--input {text!r}: a batch has two dimensions at least, each 1 or more")
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def sizes(text: str) -> list[int]:
    """Numbers apart by commas. Raises ValueError for others."""
    try:
        return [int(number) for number in text.split(",")]
    except ValueError as error:
        raise ValueError(f"--batch-sizes {text!r}: give whole numbers, as 1,64") from error
