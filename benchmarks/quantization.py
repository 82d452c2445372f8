"""Fewer bits on four networks: every variant that this machine supports, ONNX Runtime and OpenVINO beside.

One thread, each variant in turn with float32, in a process of its own. "Plain" is float32 as it is and
compiled; the limit is the fastest of the peers. The networks' weights are random; what int8 costs in accuracy
is measured on trained ones, over several seeds.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from companion import data, devices, low_bits, measure, models, quantization, training
from companion import quantization_compare as qc
from companion import quantization_pt2e as pt2e

SEEDS = 5
COMPILED = "float32, compiled"
NAMES: list[str] | None = None  # all variants
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, ...]]] = {
    "LeNet5": (models.LeNet5, (3, 32, 32), (1, 64)),
    "ResNet-18, 32 px": (models.resnet18, (3, 32, 32), (1, 16)),
    "LSTM 2x512, 16 steps": (lambda: models.LSTMClassifier(16, 512), (16, 16), (1,)),
    "encoder 6x768, 128 steps": (lambda: models.EncoderClassifier(64, 128), (128, 64), (1,)),
}


def is_peer(name: str) -> bool:
    return name.startswith(("ONNX Runtime", "OpenVINO"))


def compared(make: Callable[[], nn.Module], shape: tuple[int, ...], sizes: tuple[int, ...], rounds: int):
    """The variants of a network with random weights; "accuracy" is 1 - the relative error of its outputs."""
    training.seed_everything(0)
    model, inputs = make().eval(), torch.randn(max(64, *sizes), *shape)
    with torch.no_grad():
        expected = model(inputs)

    def closeness(made: nn.Module) -> float:
        found = torch.cat([made(x) for x in inputs.split(max(sizes))])
        return 1 - float((found - expected).norm() / expected.norm())

    options = {"batch_sizes": sizes, "rounds": rounds, "names": NAMES, "limit_seconds": 150}
    return qc.compare(model, inputs, closeness, **options)


def rows_of(case: str, found: qc.Comparison, size: int) -> Iterator[dict]:
    """A row for each variant at a batch size; those that could not be made say why."""
    measured = {row.name: row for row in found.rows if not row.reason}
    speeds = {name: row.speed_up[size].median for name, row in measured.items()}
    peer = max((name for name in speeds if is_peer(name)), key=speeds.get, default=None)
    for row in found.rows[1:]:
        if row.name == COMPILED or is_peer(row.name):
            continue
        what = f"{row.name}, {case}, batch {size}"
        if row.reason:
            reason = row.reason.splitlines()[0][:90]
            dashes = dict.fromkeys(("plain", "ours", "limit", "against plain", "of the limit"), "-")
            yield {"what": f"{what} (not measured: {reason})", **dashes}
            continue
        smaller = found.rows[0].disk_bytes / row.disk_bytes
        error, gain = f"{1 - row.accuracy:.1%}", row.speed_up[size]
        over = f"; {gain.median / speeds[COMPILED]:.2f}x" if COMPILED in speeds else ""
        yield {
            "what": f"{what} (speed-up; {smaller:.1f}x smaller, outputs {error} off)",
            "plain": f"1.00 (float32); {speeds.get(COMPILED, float('nan')):.2f} (compiled)",
            "ours": f"{gain.median:.2f}",
            "limit": f"{speeds[peer]:.2f} ({peer})" if peer else "-",
            "against plain": f"{gain:.2f}x{over}",
            "of the limit": f"{gain.median / speeds[peer]:.0%}" if peer else "-",
        }


def products(rounds: int, width: int = 1024) -> Iterator[dict]:
    """Rows of one product of square matrices in fewer bits: what the instructions gain, and so about the most
    that a network can gain whose time goes into such products.
    """
    torch.manual_seed(0)
    dense, x = nn.Sequential(nn.Linear(width, width, bias=False)), torch.randn(width, width)
    half = nn.Sequential(nn.Linear(width, width, bias=False)).bfloat16()
    ways = {"float32": lambda: dense(x), "bfloat16": lambda: half(x.bfloat16())}
    for engine in ("x86", "onednn"):
        integers = torch.quantize_per_tensor(x, 8 / 255, 128, torch.quint8)
        layer = quantization.static(dense, [x], engine=engine)
        ways[f"int8, {engine}"] = functools.partial(_only_product(layer), integers)
    with torch.no_grad():
        times = measure.compare(ways, rounds=rounds, warm_up=2)
    for name in list(ways)[1:]:
        yield {
            "what": f"a product of two matrices of {width} x {width}: {name} (speed-up)",
            "plain": f"1.00 ({1e3 * times['float32'].median:.1f} ms)",
            "ours": "-",
            "limit": f"{times.speed_up(name, over='float32'):.2f}",
            "against plain": "-",
            "of the limit": "-",
        }


def _only_product(made: nn.Module) -> nn.Module:
    """The integer layer of a converted model, without the changes to integers and back."""
    (layer,) = (module for module in made.modules() if isinstance(module, torch.ao.nn.quantized.Linear))
    return layer


def lost(name: str, trained: Callable[[int], tuple], make: Callable, seeds: int) -> dict:
    """Points of test accuracy that integers cost, over several trainings."""
    points, accuracies = [], []
    for seed in range(seeds):
        model, calibration, test = trained(seed)
        before = training.evaluate(model, test).accuracy
        points.append(100 * (before - training.evaluate(make(model, calibration), test, 64).accuracy))
        accuracies.append(100 * before)
    return {
        "what": f"accuracy that it costs: {name}, {seeds} seeds (points)",
        "plain": f"{measure.Spread.of(accuracies):.2f} (float32, %)",
        "ours": f"{measure.Spread.of(points):.2f}",
        "limit": "0.5 (agreed)",
        "against plain": "-",
        "of the limit": "-",
    }


@functools.cache
def lenet(seed: int) -> tuple:
    training.seed_everything(seed)
    splits = data.load("cluttered_digits", seed=seed)
    return _fitted(models.LeNet5(), splits, training.Recipe(8, 128, 6e-3, label_smoothing=0.05, seed=seed))


def resnet(seed: int) -> tuple:
    training.seed_everything(seed)
    recipe = training.Recipe(2, 64, 2e-3, label_smoothing=0.05, seed=seed)
    return _fitted(models.resnet18(), data.load("digits", seed=seed), recipe)


def lstm(seed: int) -> tuple:
    training.seed_everything(seed)
    splits = data.load("digits", seed=seed)
    parts = {
        name: data.Split(getattr(splits, name).images.mean(1)[:, ::2, ::2], getattr(splits, name).labels)
        for name in ("train", "val", "test")
    }
    return _fitted(models.LSTMClassifier(16, 512), replace(splits, **parts), training.Recipe(8, seed=seed))


def _fitted(model: nn.Module, splits: data.Splits, recipe: training.Recipe) -> tuple:
    batches = DataLoader(TensorDataset(*splits.train), recipe.batch_size, shuffle=True, drop_last=True)
    training.fit(model, splits, recipe, device="cpu", batches=batches, validate=False, progress=False)
    return model.eval(), list(splits.train.images[:512].split(64)), splits.test


ACCURACIES = (
    ("int8 static, LeNet5 on cluttered_digits", lenet, quantization.static),
    ("4 bits for weights, LeNet5 on cluttered_digits", lenet, lambda model, _: low_bits.rounded(model, 4)),
    ("int8 PT2E, ResNet-18 on digits", resnet, pt2e.exported),
    ("int8 dynamic, LSTM 2x512 on digits", lstm, lambda model, _: quantization.dynamic(model)),
)


def measure_all(rounds: int = 9) -> list[dict]:
    """Rows of each variant on each network, then of what int8 costs in accuracy."""
    rows, threads = [], torch.get_num_threads()
    for case, (make, shape, sizes) in CASES.items():
        found = compared(make, shape, sizes, rounds)
        rows += [row for size in sizes for row in rows_of(case, found, size)]
    torch.set_num_threads(threads)
    devices.set_threads()
    rows += products(rounds)
    return rows + [lost(*accuracy, SEEDS) for accuracy in ACCURACIES]
