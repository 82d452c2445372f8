"""The command `python -m companion fastest package.module:build --input 1x3x224x224 --evaluate ...`."""

import argparse
import importlib
import json
import sys
from pathlib import Path


def add(commands) -> argparse.ArgumentParser:
    """Adds the command to those of the parser."""
    sub = commands.add_parser("fastest", help=run.__doc__.splitlines()[0], description=run.__doc__)
    sub.set_defaults(command=run)
    sub.add_argument("build", metavar="MODULE:NAME", help="a function that gives the model, or the model")
    sub.add_argument(
        "--input",
        required=True,
        metavar="SHAPE|MODULE:NAME",
        help="the shape of a batch, as 64x3x224x224 (random numbers: int8 is then scaled by them), or a "
        "function that gives a batch of real inputs",
    )
    sub.add_argument("--evaluate", required=True, metavar="MODULE:NAME", help="accuracy(model), from 0 to 1")
    sub.add_argument("--fine-tune", metavar="MODULE:NAME", help="trains a model with fewer channels")
    sub.add_argument("--budget", type=float, default=0.01, help="of accuracy (0.01: one point)")
    sub.add_argument("--batch-sizes", default="1,64", metavar="A,B", help="for which it shall be fast (1,64)")
    sub.add_argument("--threads", type=int, help="on which it runs; else one and all cores are tried")
    sub.add_argument("--seconds", type=float, default=600.0, help="after which nothing new is tried (600)")
    sub.add_argument("--only", metavar="A;B", help="names of the variants to try, apart by semicolons")
    sub.add_argument("--save", type=Path, metavar="FOLDER", help="where the fastest is written")
    sub.add_argument("--json", type=Path, metavar="FILE", help="where the report is written")
    return sub


def run(arguments: argparse.Namespace) -> int:
    """Finds the fastest variant of a model within an accuracy budget, and saves it.

    Modules are found from the folder in which the command is typed.
    """
    from companion import fastest

    sys.path.insert(0, str(Path.cwd()))
    for path in (arguments.save, arguments.json):
        if path and path.exists():
            raise ValueError(f"{path} is there already")
    build = named(arguments.build)
    model = build() if not hasattr(build, "parameters") else build
    found = fastest.search(
        model,
        inputs(arguments.input),
        named(arguments.evaluate),
        arguments.budget,
        fine_tune=named(arguments.fine_tune) if arguments.fine_tune else None,
        batch_sizes=sizes(arguments.batch_sizes),
        threads=arguments.threads,
        seconds=arguments.seconds,
        names=[name.strip() for name in arguments.only.split(";")] if arguments.only else None,
    )
    print("", found.table(), "", found, sep="\n")
    if arguments.json:
        arguments.json.write_text(json.dumps(found.report(), indent=1) + "\n", encoding="utf-8")
    if arguments.save and found.winner is not found.plain:
        print(f"saved: {found.save(arguments.save)}; artefacts.load({str(arguments.save)!r}) reads it")
    return 0


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
