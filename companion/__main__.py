"""Command line: python -m companion list | run | doctor | store | links | skips | fastest | preflight."""

import argparse
import os
import sys
import time
from pathlib import Path

from companion import batches, checks, executed, fastest_command, jobs, ledger, preflight_command, runner


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
    folder, wanted, done = _wanted(arguments)
    if done:
        print(f"{done} of {done + len(wanted)} have passed already")
    for notebook in sorted({job.notebook for job in wanted}):
        if short := runner.short_of_memory(notebook):
            print(f"{notebook.stem} {short}", flush=True)
    failed = []
    for outcome in _outcomes(arguments, wanted, folder):
        if outcome.error:
            failed.append(outcome)
        print(
            f"{outcome.job.name:40} {outcome.seconds:6.0f} s {outcome.cpu_seconds:6.0f} CPU-s "
            f"{outcome.memory_bytes / 2**30:5.1f} GiB  "
            f"{'failed: ' + outcome.error if outcome.error else 'passed'}",
            flush=True,
        )
    for outcome in failed:  # once more, where whoever looks at the end of a log sees it
        where = "" if outcome.cell is None else f" in cell {outcome.cell}"
        print(f"failed: {outcome.job.name}{where}: {outcome.error}")
    passed = done + len(wanted) - len(failed)
    print(f"{passed} passed, {len(failed)} failed; report: {folder / ledger.REPORT}")
    return int(bool(failed))


def _wanted(arguments: argparse.Namespace) -> tuple[Path, list[jobs.Job], int]:
    """The folder of the run, what is still to be done, and how much has been done before."""
    if arguments.resume:
        others = (arguments.names, arguments.parameter, arguments.sweep, arguments.file, arguments.output)
        if any(others):
            raise ValueError("--resume goes on with what was begun: give it no notebooks, values or folder")
        folder, planned = arguments.resume, ledger.planned(arguments.resume)
        of = {notebook: _fingerprint(notebook) for notebook in {job.notebook for job in planned}}
        wanted = ledger.left(folder, planned, of)
        return folder, wanted, len(planned) - len(wanted)
    if arguments.file and (arguments.names or arguments.parameter or arguments.sweep):
        raise ValueError("--file says which notebooks and values: give no others beside it")
    if arguments.file:
        wanted = batches.read(arguments.file, arguments.notebooks)
    else:
        fixed, sweeps = jobs.pairs(arguments.parameter, arguments.sweep)
        wanted = jobs.plan(jobs.find(arguments.names, arguments.notebooks), fixed, sweeps)
    folder = arguments.output or Path("results", time.strftime("%Y-%m-%d-%H%M%S"))
    checks.folder("output", folder)
    ledger.begin(folder, wanted)
    return folder, wanted, 0


def _fingerprint(notebook: Path) -> str:
    try:
        return executed.fingerprint(jobs.read(notebook))
    except ValueError:  # it will fail, and say why
        return ""


def _outcomes(arguments: argparse.Namespace, wanted: list[jobs.Job], folder: Path):
    if not arguments.ray:
        return runner.run(wanted, folder, arguments.jobs, time_limit=arguments.time_limit)
    from companion import ray_runner

    return ray_runner.run(wanted, folder, arguments.ray, time_limit=arguments.time_limit)


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
        said = [f"without {'; '.join(missing)}" if missing else "full strength"]
        said += filter(None, [runner.short_of_memory(notebook)])
        print(f"{notebook.stem:24} {'; '.join(said)}")
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


def links(arguments: argparse.Namespace) -> int:
    """Writes the repository, owner/name, wherever the project's address stands."""
    from companion import links as addresses

    if len(arguments.names) != 1:
        raise ValueError("name one repository: owner/name")
    changed = addresses.rewrite(Path.cwd(), arguments.names[0])
    print(f"{len(changed)} files now say {arguments.names[0]}")
    return 0


def skips(arguments: argparse.Namespace) -> int:
    """Of a run's folder, in Markdown: what could not run there, and why."""
    from companion import summary

    if len(arguments.names) != 1:
        raise ValueError("name one folder of a run, such as results/<time>")
    print(summary.skipped(summary.read(arguments.names[0])).markdown())
    return 0


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
    offered = {"list": list_notebooks, "run": run, "doctor": doctor, "store": store, "links": links}
    offered["skips"] = skips
    for name, command in offered.items():
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
            sub.add_argument("--file", type=Path, help="YAML with notebooks, parameters and sweeps")
            sub.add_argument("--resume", type=Path, metavar="FOLDER", help="go on with the run in it")
            sub.add_argument(
                "--time-limit", type=float, metavar="SECONDS", help="a notebook that takes longer has failed"
            )
            sub.add_argument(
                "--ray",
                metavar="ADDRESS",
                help="each run a task of this Ray cluster, or of a local one: local",
            )
    fastest_command.add(commands)
    preflight_command.add(commands)
    words, given = _parameters(sys.argv[1:] if words is None else words, parser)
    arguments = parser.parse_args(words)
    if given and arguments.command is not run:
        parser.error("-p is for run")
    arguments.parameter = given
    if getattr(arguments, "jobs", 1) < 1:
        parser.error(f"--jobs {arguments.jobs} must be at least 1")
    if (getattr(arguments, "time_limit", None) or 1) <= 0:
        parser.error(f"--time-limit {arguments.time_limit:g} must be above 0")
    try:
        return arguments.command(arguments)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; what was finished is kept", file=sys.stderr, flush=True)
        os._exit(130)  # at once, without waiting for running notebooks; a kernel ends when its parent has


if __name__ == "__main__":
    sys.exit(main())
