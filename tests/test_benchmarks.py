"""The benchmarks run and compare like with like; what they measure is not judged here."""

import json
import re

import nbformat
import pytest
import torch
from nbformat.v4 import new_code_cell, new_notebook

from benchmarks import __main__ as benchmarks
from benchmarks import (
    data_parallel,
    ddp_speed_up,
    fastest,
    hybrid,
    import_time,
    launch,
    model_parallel,
    multi_machine,
    preflight,
    pruning,
    quantization,
    ray_tune,
    runner,
    tpu,
    training_loop,
)
from companion import devices

IDLE = [
    (name, ranks, pieces)
    for name in ("gpipe", "1f1b", "interleaved", "zero_bubble")
    for ranks in (2, 4)
    for pieces in (4,)
    if (name, ranks) != ("interleaved", 4)
]

PLANNED = ["bytes held, largest error", "bytes sent, largest error", "seconds, median error"]
PLANNED += ["correlation of the rankings", "the fastest layout found", "ms, predicted ones in brackets"]
XLA = ["XLA on CPU, LeNet5"]
if devices.why_not("xla") is None:
    XLA = ["XLA on CPU, LeNet5, batch 64", "compilations of 4 steps"]
    XLA += [f"steps lost in 4 to: {name}" for name in tpu.MISTAKES]
COMPILER = ["TPU compiler: not measured, the TPU compiler"]
if preflight.preflight.why_not() is None:
    COMPILER = ["TPU compiler, MLP, training step", "TPU compiler, MLP, the same again"]


def trained_once(seed):
    recipe = quantization.training.Recipe(1, 64, 4e-3, seed=seed)
    return quantization._fitted(quantization.models.LeNet5(), quantization.data.load("digits"), recipe)


def short_notebook(folder):
    """A notebook that does next to nothing."""
    cells = [new_code_cell("number: int = 0  # of it", metadata={"tags": ["parameters"]})]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(new_notebook(cells=cells, metadata=kernel), folder / "00_short.ipynb")
    return folder / "00_short.ipynb"


PRODUCTS = ("bfloat16", "int8, x86", "int8, onednn")


@pytest.fixture(autouse=True)
def _small(monkeypatch, tmp_path):
    monkeypatch.setattr(training_loop, "SAMPLES", 512)
    monkeypatch.setattr(ddp_speed_up, "REPEATS", 1)
    monkeypatch.setattr(
        ddp_speed_up, "CASES", [(name, make, (3, 32, 32), 8) for name, make, *_ in ddp_speed_up.CASES]
    )
    monkeypatch.setattr(
        data_parallel, "CASES", [(name, make, shape, 4) for name, make, shape, _ in data_parallel.CASES]
    )
    for constant, value in {"PIECES": (4,), "BATCH_SIZE": 32, "WIDTH": 0.1, "SLOT_SECONDS": 0.001}.items():
        monkeypatch.setattr(model_parallel, constant, value)
    monkeypatch.setattr(tpu, "STEPS", 4)
    monkeypatch.setattr(quantization, "CASES", {"LeNet5": (quantization.models.LeNet5, (3, 32, 32), (1,))})
    monkeypatch.setattr(quantization, "NAMES", ["int8 static", "float16"])
    smaller = {"SEEDS": 1, "TASKS": {"digits": (2, 64)}, "SHARES": (0.5,), "RATIOS": (0.2,)}
    smaller |= {"PACKED": ("50%",), "BITS": (4,), "RESNET_SEEDS": 1, "RESNET_PASSES": 1}
    for constant, value in {**smaller, "RESNET_RATIOS": (0.5,)}.items():
        monkeypatch.setattr(pruning, constant, value)
    monkeypatch.setattr(pruning.pt2e, "compiled", lambda model: model)  # takes half a minute
    monkeypatch.setattr(pruning.models, "resnet18", pruning.models.LeNet5)  # trained in no time
    for constant, value in {"RANKS": 2, "BATCH_SIZE": 16, "REPEATS": 1}.items():
        monkeypatch.setattr(hybrid, constant, value)
    monkeypatch.setattr(hybrid, "SHAPE", {"width": 16, "layers": 2, "heads": 2})
    monkeypatch.setattr(
        hybrid,
        "LAYOUTS",
        [hybrid.Layout(2), hybrid.Layout(tensor=2), hybrid.Layout(pipeline=2, micro_batches=4)],
    )
    for constant, value in {"FAULTS": ["a worker is killed"], "WIDTH": 8, "LAYERS": 1, "SAVES": 2}.items():
        monkeypatch.setattr(multi_machine, constant, value)
    smaller = {
        "DATASET": "digits",
        "TRIALS": 2,
        "EPOCHS": 2,
        "IMAGES": 128,
        "OVERHEAD_TRIALS": (1, 2),
        "SETTINGS": [(1, 2)],
    }
    for constant, value in smaller.items():
        monkeypatch.setattr(ray_tune, constant, value)
    smaller = {"CASES": {"LeNet5": (quantization.models.LeNet5, (3, 32, 32), (1,))}, "THREADS": (1,)}
    for constant, value in {**smaller, "NAMES": ["script"], "ROUNDS": 3}.items():
        monkeypatch.setattr(fastest, constant, value)
    monkeypatch.setattr(preflight, "CASES", {"MLP": (preflight.mlp, (64, 1024), 15)})
    name, _, make = quantization.ACCURACIES[0]
    monkeypatch.setattr(quantization, "ACCURACIES", [(name, trained_once, make)])
    modules = [
        import_time,
        training_loop,
        launch,
        ddp_speed_up,
        data_parallel,
        model_parallel,
        hybrid,
        multi_machine,
        tpu,
    ]
    monkeypatch.setattr(runner, "SEVERAL", ["short", "short too"])
    for name in ("smaller", "at_defaults"):
        monkeypatch.setattr(runner, name, lambda stem: runner.jobs.Job(short_notebook(tmp_path), {}, stem))
    for module in (*modules, ray_tune, quantization, pruning, runner, preflight):
        monkeypatch.setattr(
            module, "measure_all", lambda measure_all=module.measure_all: measure_all(rounds=1)
        )


def test_the_three_ways_take_the_same_number_of_steps(monkeypatch):
    seen = []
    plain = training_loop.training.plain_step

    def counted(model, images, *rest):
        seen.append(images.shape)
        return plain(model, images, *rest)

    monkeypatch.setattr(training_loop.training, "plain_step", counted)
    for way in training_loop.runs(64, torch.device("cpu")).values():
        seen.clear()
        way()
        assert seen == [(64, 3, 32, 32)] * 8


@pytest.mark.once
def test_the_table_is_printed_and_written(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    benchmarks.main([])
    printed = capfd.readouterr().out
    assert "| what | plain | ours | limit | against plain | of the limit |" in printed
    written = json.loads((tmp_path / "results" / "benchmarks.json").read_text())
    names = [row["what"].split(" (")[0] for row in written["rows"]]
    assert [re.sub(r"(on digits), (?:dense|\d+%.*), 1 seeds", r"\1", name) for name in names] == [
        "`import companion`",
        "training loop, batch 64",
        "training loop, batch 256",
        "2 ranks and an all-reduce, warm",
        "2 ranks and an all-reduce, warm",
        "2 ranks and an all-reduce, the first launch of a process",
        "DDP, 2 ranks, ResNet-18, 64 px, batch 128",
        "DDP, 2 ranks, LeNet5, batch 2048",
        "2 replicas in threads, AlexNet, 64 px, batch 64",
        "scatter, replicate, gather, AlexNet, 64 px, batch 64",
        "2 replicas in threads, LeNet5, batch 256",
        "scatter, replicate, gather, LeNet5, batch 256",
        *(f"idle, {name}, {ranks} ranks, {pieces} micro-batches" for name, ranks, pieces in IDLE),
        *[row["what"].split(" (")[0] for row in written["rows"] if "2 stages cut after" in row["what"]],
        *(f"plan: {what}, 3 layouts of 2 ranks, 1 times" for what in PLANNED),
        "a worker is killed: seconds to go on, 1 of 1 recovered",
        "a checkpoint by a thread, its cost for each of 5 steps",
        *XLA,
        "share of FIFO's epochs, ASHA at the book's settings, 1 seeds",
        "share of FIFO's epochs, ASHA, grace period 1, factor 2, 1 seeds",
        "seconds a trial costs beyond its training, processes reused",
        "trials a minute, Ray's processes against Optuna alone in one process",
        "float16, LeNet5, batch 1",
        "int8 static, LeNet5, batch 1",
        *(f"a product of two matrices of 1024 x 1024: {way}" for way in PRODUCTS),
        "accuracy that it costs: int8 static, LeNet5 on cluttered_digits, 5 seeds",
        "times fewer weights by masks, LeNet5 on digits",
        "points on test, share of zeros, LeNet5 on digits",
        "times smaller file, LeNet5 on digits",
        "points on test, zeros and bits of the file, LeNet5 on digits",
        "channels and int8, times smaller, LeNet5 on digits",
        "channels and int8, speed-up at batch 64, LeNet5 on digits",
        "points on test, channels removed, int8, LeNet5 on digits",
        "speed-up, ResNet-18, 32 px, batch 8, 50% removed, 1 seeds",
        "speed-up, ResNet-18, 32 px, batch 8, 50% removed, then int8",
        *[row["what"].split(" (")[0] for row in written["rows"] if "threads: picks" in row["what"]],
        "the runner, 02_data_parallel with small parameters",
        "the runner, 02_data_parallel with its defaults",
        "2 notebooks with small parameters, two at once",
        *COMPILER,
    ]
    assert any("x smaller" in row["what"] for row in written["rows"])
    assert sum("2 stages cut after" in row["what"] for row in written["rows"]) == 2
    assert all(row["of the limit"].endswith(("%", " points", "-")) for row in written["rows"])
