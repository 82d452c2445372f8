"""Each notebook's parameters: what is bad is refused in the cells after them, before any work starts."""

import importlib.util
import math
import warnings

import cells
import nbformat
import pytest
from cells import NOTEBOOKS, PARAMETERS, SETTINGS, code, tagged

from companion import jobs

# By the kind of a parameter: what none of that kind may be.
BAD = {int: (-1, 2.5, "many"), float: (math.nan, -1.0, "fast"), bool: ("perhaps", 2), str: ("?!",)}
ANY_TEXT = {"data_dir"}  # a folder that need not be there: only CIFAR-10 is read from it
# Combinations and limits of each notebook, and what the message must say.
TOGETHER = {
    "00_baseline": [
        ({"batch_size": 5000}, "batch_size=5000 .*1257 or less .*digits has so many"),
        ({"batch_size": 1000, "ladder_images": 2000}, "ladder_images=2000 .*4000 or more"),
        ({"ladder_images": 30_000}, "ladder_images=30000 .*20000 or less"),
        ({"seed": 2**32}, "seed=4294967296 .*4294967295 or less"),
    ],
    "01_tpu": [
        ({"batch_size": 60}, "batch_size=60 must be a multiple of 8"),
        ({"batch_size": 512}, "batch_size=512 needs 2048 images; digits has 1257"),
        ({"mistake_steps": 100}, "mistake_steps=100 needs 7200 images"),
        ({"unsynced": "8,4"}, "unsynced='8,4' must be two or more numbers"),
        ({"unsynced": "8"}, "unsynced='8' must be two or more numbers"),
    ],
    "02_data_parallel": [
        ({"world_size": 1}, "world_size=1 .*2 or more"),
        ({"world_size": 8, "batch_size": 4}, "batch_size=4 .*8 or more"),
        ({"world_size": 8, "small_batches": "4,64"}, "small_batches=4 .*8 or more"),
        ({"device": "cpu,cpu,cpu"}, "3 devices named where 2 are needed"),
    ],
    "03_ddp": [
        ({"batch_size": 1}, "batch_size=1 must be a multiple of 2"),
        ({"world_size": 1}, "world_size=1 .*2 or more"),
        ({"world_size": 64}, "world_size=64 .*COMPANION_MOST_RANKS"),
        ({"rank_counts": "1,64"}, "rank_counts=64 "),
        ({"large_pixels": 32}, "large_pixels=32 .*33 or more,.*BatchNorm"),
        ({"rank_counts": "8", "small_batches": "4,64"}, "small_batches=4 .*8 or more .*each rank"),
    ],
    "04_model_parallel": [
        ({"world_size": 1}, "world_size=1 .*2 or more"),
        ({"world_size": 9}, "world_size=9 .*8 or less"),
        ({"micro_batches": 1}, "micro_batches=1 .*2 or more"),
        ({"batch_size": 60}, "batch_size=60 must be a multiple of 8"),
        ({"counts": "5,7"}, "counts='5,7' .*divide timed_batch=64"),
    ],
    "05_hybrid": [
        ({"world_size": 3}, "world_size=3 must be a multiple of 2"),
        ({"heads": 3}, "heads=3 must be a multiple of 4"),
        ({"batch_size": 60}, "batch_size=60 must be a multiple of 16"),
        ({"dataset": "mnist"}, "dataset='mnist'"),
    ],
    "06_multi_machine": [
        ({"world_sizes": "1,5"}, "batch_size=48 must be a multiple of 5"),
        ({"steps": 6}, "steps=6 .*to go on after a fault"),
        ({"faults": "a meteor"}, "faults='a meteor'"),
        ({"world_sizes": "64"}, "world_sizes=64 "),
    ],
    "07_ray_tune": [
        ({"train_images": 100}, "train_images=100 .*128 or more"),
        ({"dataset": "digits"}, "val_images=2000 .*180 or less .*digits has so many"),
        ({"cpus_per_trial": 1000}, "cpus_per_trial=1000 "),
        ({"gpus_per_trial": 100.0}, "gpus_per_trial=100"),
    ],
    "08_quantization": [
        ({"threads": 1000}, "threads=1000 "),
        ({"bits": "1,4"}, "bits=1 .*2 or more"),
        ({"widths": "4"}, "widths=4 .*8 or more"),
        ({"dataset": "digits", "calibration_sizes": "2000"}, "calibration_sizes=2000 .*1257 or less"),
    ],
    "09_pruning": [
        ({"amounts": "100"}, "amounts=100 .*99 or less"),
        ({"tuning_images": 64}, "tuning_images=64 .*128 or more"),
        ({"batch_size": 25_000}, "batch_size=25000 .*20000 or less"),
    ],
    "10_scoreboard": [
        ({"batch_size": 1}, "batch_size=1 .*2 or more"),
        ({"compare_with": "nowhere"}, "'nowhere' is no scoreboard"),
        ({"input_shape": "3,8,8"}, "model='lenet5' takes no input_shape='3,8,8'"),
        ({"model": "lenet7"}, "unknown model 'lenet7'.*did you mean 'lenet5'"),
    ],
}
BY_STEM = {path.stem: path for path in NOTEBOOKS}


class Notebook:
    """What a notebook has before its first section: imports, parameters, and the cells that check them."""

    def __init__(self, stem: str):
        self.path = BY_STEM[stem]
        notebook = nbformat.read(self.path, 4)
        place = notebook.cells.index(tagged(notebook, PARAMETERS)[0])
        after = [cell.cell_type for cell in notebook.cells[place:]].index("markdown")
        self.parameters = jobs.parameters(self.path)
        self.checks = [cell.source for cell in notebook.cells[place + 1 : place + after]]
        self.before = {}
        for cell in notebook.cells[: place + 1]:
            if cell.cell_type == "code":
                exec(cells.plain(cell.source), self.before)

    def check(self, **values: object) -> None:
        names = {**self.before, **values}
        for source in self.checks:
            exec(source, names)


@pytest.fixture(scope="module", params=sorted(BY_STEM))
def notebook(request) -> Notebook:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Notebook(request.param)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # results_dir is made where the notebook runs
    monkeypatch.delenv("COMPANION_MOST_RANKS", raising=False)


def test_defaults_and_the_parameters_of_the_tests_pass(notebook):
    for kind in ("smaller", "fewer"):
        notebook.check(**SETTINGS[kind].get(notebook.path.stem, {}))
    notebook.check()


def test_each_parameter_is_checked(notebook, tmp_path):
    (tmp_path / "file").write_text("")
    for name, parameter in notebook.parameters.items():
        if name in ANY_TEXT:
            continue
        bad = (str(tmp_path / "file"),) if name == "results_dir" else BAD[type(parameter.value)]
        for value in bad:
            with pytest.raises((ValueError, RuntimeError)) as caught:
                notebook.check(**{name: value})
            assert name in str(caught.value) or str(value) in str(caught.value), (name, value)
            assert "\n" not in str(caught.value), "one line says it"


def test_what_does_not_fit_together_is_refused(notebook):
    for values, said in TOGETHER[notebook.path.stem]:
        with pytest.raises(ValueError, match=said):
            notebook.check(**values)


def test_more_ranks_may_be_allowed(monkeypatch):
    monkeypatch.setenv("COMPANION_MOST_RANKS", "64")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Notebook("03_ddp").check(world_size=64, small_batches="64,128", large_batches="64")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_an_installation_that_fails_in_colab_stops_in_its_cell(path, monkeypatch):
    class Shell:
        """Where pip fails, which raises nothing."""

        def run_line_magic(self, *_):
            return None

    monkeypatch.setenv("COLAB_RELEASE_TAG", "release")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    source = cells.plain(code(nbformat.read(path, 4))[0].source)
    with pytest.raises(ImportError, match=r"companion.* could not be installed: .*run this again"):
        exec(source, {"get_ipython": Shell})
