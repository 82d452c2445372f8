"""The command `python -m companion fastest package.module:build --input 1x3x224x224 --evaluate ...`."""

import argparse
import json
import sys
from pathlib import Path

from companion import given


def add(commands) -> argparse.ArgumentParser:
    """Adds the command to those of the parser."""
    shape = "the shape of a batch, as 64x3x224x224 (random numbers: int8 is then scaled by them), or a "
    shape += "function that gives a batch of real inputs"
    sub = given.command(commands, "fastest", run, shape)
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
    model = given.model(arguments.build)
    found = fastest.search(
        model,
        given.inputs(arguments.input),
        given.named(arguments.evaluate),
        arguments.budget,
        fine_tune=given.named(arguments.fine_tune) if arguments.fine_tune else None,
        batch_sizes=given.sizes(arguments.batch_sizes),
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
