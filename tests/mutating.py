"""How notebooks are broken on purpose: functions in mutations/NN_name.py, each run in the notebook's kernel.

A function gets the notebook's namespace (its `__main__`) and damages the technique; the docstring says how.
It names the proofs that must then fail. Classes and functions stand inside it, so that worker processes get
them by value.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from companion import data, launch

FOLDER = Path(__file__).parent / "mutations"


def breaks(*proofs: str, before: str = "") -> Callable[[Callable], Callable]:
    """Marks a function as a mutation that these proofs must catch, applied before the cell that holds the
    text `before`.

    Without one it is applied after the parameters, before anything else.
    """

    def mark(function: Callable) -> Callable:
        function.proofs, function.before = proofs, before
        return function

    return mark


def module(notebook: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"mutations_of_{notebook}", FOLDER / f"{notebook}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def mutations(notebook: str) -> dict[str, Callable]:
    """The notebook's mutations by name; none if it has no file."""
    if not (FOLDER / f"{notebook}.py").exists():
        return {}
    return {name: thing for name, thing in vars(module(notebook)).items() if hasattr(thing, "proofs")}


def cell(notebook: str, mutation: str) -> str:
    """Code that applies a mutation in the notebook's kernel."""
    return f"""import __main__, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import mutating
mutating.mutations({notebook!r})[{mutation!r}](__main__)"""


def labels_one_late() -> None:
    """From now on each image of a batch has the label of the one before."""
    plain = data.Batches.__iter__

    def wrong(self):
        for images, labels in plain(self):
            yield images, labels.roll(1)

    data.Batches.__iter__ = wrong


def in_ranks(damage: Callable[[], None], *of: str) -> None:
    """From now on ranks that run a function of one of these names are damaged first."""
    run = launch.run

    def wrong(function, *args, **options):
        if function.__name__ not in of:
            return run(function, *args, **options)

        def elsewhere(*inner):
            damage()
            return function(*inner)

        return run(elsewhere, *args, **options)

    launch.run = wrong
