"""What nbval runs: copies of the notebooks in results/nbval, made by this program, and how, by the plugin
that this is too.

A notebook that `make run` has executed as it is now, with the package and the versions as they are now, is
not executed again: nbval compares the outputs of that execution with the stored ones, as it would its own.

    python -m tests.nbval_copies [--fewer] [NUMBER ...]    # --fewer: with few repetitions of what is timed
"""

import argparse
import shutil
import sys
import time
from pathlib import Path

import nbformat

sys.path.insert(0, str(Path(__file__).parent))

import cells
import times

from companion import executed as files
from companion import host, jobs, runner

MORE = 1.2  # times as much memory as is told of: when the most is taken is chance
FOLDER = cells.ROOT / "results" / "nbval"


def executed(notebook: Path) -> nbformat.NotebookNode | None:
    """The newest execution of a notebook at its defaults, as everything is now, from results/ beside its
    folder; or None.
    """
    now, results = files.fingerprint(nbformat.read(notebook, 4)), notebook.parents[1] / "results"
    found = sorted(results.glob(f"*/{notebook.name}"), key=lambda path: path.stat().st_mtime, reverse=True)
    for copy in (nbformat.read(path, 4) for path in found):
        run = copy.metadata.get("companion", {}).get("run", {})
        if run.get("of") == now and not run["error"] and not run["parameters"]:
            return copy
    return None


def make(names: list[str], fewer: bool) -> list[Path]:
    """Copies the notebooks into an empty folder, `fewer` with the repetitions of parameters.toml."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    for path in jobs.find(names, cells.ROOT / "notebooks"):
        notebook = nbformat.read(path, 4)
        if fewer:
            cells.set_parameters(notebook, cells.SETTINGS["fewer"].get(path.stem, {}))
            notebook.metadata["fewer"] = True
        nbformat.write(notebook, FOLDER / path.name)
    return sorted(FOLDER.iterdir())


def pytest_collection_modifyitems(items) -> None:
    from nbval.plugin import IPyNbFile

    files = dict.fromkeys(item.parent for item in items if isinstance(item.parent, IPyNbFile))
    notebooks = {file: nbformat.read(file.path, 4) for file in files}
    # The longest first, so that at the end none runs alone for long.
    takes = {file: runner.needs(file.path)[0] for file in files}
    items.sort(key=lambda item: -takes.get(item.parent, 0))
    for file, notebook in notebooks.items():
        own = [item for item in items if item.parent is file]
        if run := executed(file.path.parents[2] / "notebooks" / file.path.name):
            _compare(file, own, run)
        else:
            _note_time(file, "fewer" if "fewer" in notebook.metadata else "defaults")


def _compare(file, items, run: nbformat.NotebookNode) -> None:
    """Has nbval compare with the outputs of an execution, where it would execute."""
    outputs = [cell.outputs for cell in cells.code(run) if "injected-parameters" not in cells.tags(cell)]

    def set_up() -> None:
        file.setup_sanitize_files()
        times.within_budget(file.path.stem, "defaults", run.metadata.companion.run.cpu_seconds)
        within_memory(run)

    file.setup = set_up
    for item, found in zip(items, outputs, strict=True):
        item.runtest = lambda item=item, found=found: compare(item, found)


def within_memory(run: nbformat.NotebookNode) -> None:
    """Fails if an execution took clearly more memory than the notebook's first cell tells its reader."""
    said = float(runner.NEEDS.search(run.cells[0].source)[2])
    took = run.metadata.companion.run.memory_bytes / 2**30
    assert took <= MORE * said, f"it took {took:.2f} GiB, {said} are told of"


def compare(item, outputs: list[nbformat.NotebookNode]) -> None:
    """Fails, as nbval does, if a compared cell's outputs are not those that are stored in the notebook."""
    from nbval.plugin import coalesce_streams

    if item.options["check"] and not item.compare_outputs(
        coalesce_streams(outputs), coalesce_streams(item.cell.outputs)
    ):
        item.raise_cell_error("Cell outputs differ", "\n".join(item.comparison_traceback))


def _note_time(file, kind: str) -> None:
    """Has the CPU-seconds of an executed notebook noted, and held to its budget, before its kernel ends."""
    set_up, tear_down, begun = file.setup, file.teardown, []

    def timed_set_up() -> None:
        begun.append(time.perf_counter())
        try:
            set_up()
        except RuntimeError as error:
            if not runner.never_came_up(str(error)):
                raise
            set_up()

    def timed_tear_down() -> None:
        used = (
            host.cpu_seconds(file.kernel.km.provisioner.pid)
            if file.kernel and file.kernel.is_alive()
            else 0.0
        )
        tear_down()
        times.add("notebook", f"{file.path.stem}, {kind}, by nbval", time.perf_counter() - begun[0], used)
        times.within_budget(file.path.stem, kind, used)

    file.setup, file.teardown = timed_set_up, timed_tear_down


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fewer", action="store_true")
    parser.add_argument("names", nargs="*")
    arguments = parser.parse_args()
    made = make(arguments.names, arguments.fewer)
    fresh = [path.stem for path in made if executed(cells.ROOT / "notebooks" / path.name)]
    print("nbval compares with what `make run` executed:", ", ".join(fresh) or "nothing; it executes all")


if __name__ == "__main__":
    main()
