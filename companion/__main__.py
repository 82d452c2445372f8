"""Command line: python -m companion list | run | doctor | store."""

import argparse
import os
import sys
import time
from pathlib import Path

from companion import jobs, runner


def _headline(notebook: Path) -> tuple[str, dict]:
    """The notebook's question, its first line of text, and what its metadata says of its needs."""
    read = jobs.read(notebook)
    return read.cells[0].source.splitlines()[0].lstrip("# "), read.metadata.get("companion", {})


def list_notebooks(arguments: argparse.Namespace) -> int:
    """Each notebook with its question, and its parameters with type, default and meaning."""
    unreadable = 0
    for notebook in jobs.find(arguments.names, arguments.notebooks):
        try:
            print(f"{notebook.stem}: {_headline(notebook)[0]}")
            for name, about in jobs.parameters(notebook).items():
                print(f"    {name + ': ' + about.kind:24}= {' '.join(about.default.split()):20} {about.help}")
        except ValueError as error:
            unreadable += 1
            print(f"{notebook.stem}: {error}")
    return int(unreadable > 0)


def run(arguments: argparse.Namespace) -> int:
    """Runs notebooks into results/<time>/; 1 if any failed."""
    fixed, sweeps = jobs.pairs(arguments.parameter, arguments.sweep)
    wanted = jobs.plan(jobs.find(arguments.names, arguments.notebooks), fixed, sweeps)
    folder, failed = arguments.output or Path("results", time.strftime("%Y-%m-%d-%H%M%S")), 0
    for outcome in runner.run(wanted, folder, arguments.jobs):
        failed += outcome.error is not None
        print(
            f"{outcome.job.name:40} {outcome.seconds:6.0f} s {outcome.cpu_seconds:6.0f} CPU-s  "
            f"{'failed: ' + outcome.error if outcome.error else 'passed'}",
            flush=True,
        )
    print(f"{len(wanted) - failed} passed, {failed} failed; report: {folder / runner.REPORT}")
    return int(failed > 0)


def doctor(arguments: argparse.Namespace) -> int:
    """What this machine is, and for each notebook what runs at full strength here and what does not, and
    why.
    """
    from companion import devices, machine

    print(machine.describe(), end="\n\n")
    for notebook in jobs.find(arguments.names, arguments.notebooks):
        missing = [
            f"{what}: {reason}"
            for what in _headline(notebook)[1].get("uses", [])
            if (reason := devices.why_not(what))
        ]
        print(f"{notebook.stem:24} {'without ' + '; '.join(missing) if missing else 'full strength'}")
    return 0


def store(arguments: argparse.Namespace) -> int:
    """Runs notebooks at their defaults and keeps the outputs in them; 1 if any failed."""
    import tempfile

    failed = 0
    for notebook in jobs.find(arguments.names, arguments.notebooks):
        with tempfile.TemporaryDirectory() as folder:
            error = runner.store(notebook, Path(folder))
        failed += error is not None
        print(f"{notebook.stem}: {'failed: ' + error if error else 'stored'}", flush=True)
    return int(failed > 0)


def _parameters(words: list[str], parser: argparse.ArgumentParser) -> tuple[list[str], list[tuple[str, str]]]:
    """The other words, and the pairs after -p, which argparse would take for options where they begin with a
    minus.
    """
    others, given, left = [], [], list(words)
    while left:
        word = left.pop(0)
        if word not in ("-p", "--parameter"):
            others.append(word)
        elif len(left) < 2:
            parser.error("-p needs a name and a value")
        else:
            given.append((left.pop(0), left.pop(0)))
    return others, given


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m companion", description="Runs the notebooks and tells what can run here."
    )
    commands = parser.add_subparsers(required=True)
    for command, name in ((list_notebooks, "list"), (run, "run"), (doctor, "doctor"), (store, "store")):
        sub = commands.add_parser(name, help=command.__doc__.splitlines()[0], description=command.__doc__)
        sub.set_defaults(command=command)
        sub.add_argument(
            "names", nargs="*", help="numbers or names, such as 03 or 03_ddp; all if none is given"
        )
        sub.add_argument(
            "--notebooks", type=Path, default=jobs.NOTEBOOKS, help="folder they are in (notebooks)"
        )
        if command is run:
            sub.add_argument(
                "-p",
                "--parameter",
                nargs=2,
                action="append",
                default=[],
                metavar=("NAME", "VALUE"),
                help="set a parameter, to whatever follows: -1e-3 and --all are values too",
            )
            sub.add_argument(
                "--sweep",
                action="append",
                default=[],
                metavar="NAME=A,B",
                help="run once for each value (several: each combination)",
            )
            sub.add_argument("--jobs", type=int, default=1, help="notebooks at once (1)")
            sub.add_argument("--output", type=Path, help="folder for what is made (results/<time>)")
    words, given = _parameters(sys.argv[1:] if words is None else words, parser)
    arguments = parser.parse_args(words)
    if given and arguments.command is not run:
        parser.error("-p is for run")
    arguments.parameter = given
    if getattr(arguments, "jobs", 1) < 1:
        parser.error(f"--jobs {arguments.jobs} must be at least 1")
    try:
        return arguments.command(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; what was finished is kept", file=sys.stderr, flush=True)
        os._exit(130)  # at once, without waiting for running notebooks; a kernel ends when its parent has


if __name__ == "__main__":
    sys.exit(main())
