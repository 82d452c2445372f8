"""What is left of LeNet5 and ResNet-18, how much faster that is, and what it costs, over several seeds.

One thread for latencies, each variant in turn with the dense model. A row has the furthest setting whose
accuracy, on validation images and in the mean of all seeds, is within half a point of the dense model's; its
points are those on test images. Rows called "points" have what every setting cost. Limits are the figures of
the papers: 12 times fewer weights (Han et al. 2015), a file 39 times smaller (Han et al. 2016); for channels,
the factor in multiply-accumulates.
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch
from torch import nn

from companion import (
    data,
    devices,
    low_bits,
    measure,
    memory,
    models,
    packing,
    pruning,
    quantization,
    training,
)
from companion import pruning_channels as channels
from companion import quantization_pt2e as pt2e

SEEDS = 5
BUDGET = 0.005
SHARES = (0.5, 0.7, 0.8, 0.85, 0.9, 0.92, 0.94, 0.96)
PACKED = ("70%", "80%", "90%")
BITS = (4,)
RATIOS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
TASKS = {"cluttered_digits": (12, 128), "digits": (60, 64)}  # passes over the images, batch size
RESNET_RATIOS = (0.5, 0.6, 0.75)
RESNET_SEEDS = 3
RESNET_PASSES = 12


@dataclass(frozen=True)
class Case:
    """A trained network, and how it is trained further."""

    model: nn.Module
    splits: data.Splits
    passes: int
    batch_size: int

    def train(self, model: nn.Module, share: float, rate: float) -> nn.Module:
        """Trains for this share of the first training's passes."""
        recipe = training.Recipe(
            max(1, round(share * self.passes)), self.batch_size, rate, label_smoothing=0.05
        )
        training.fit(model, self.splits, recipe, device="cpu", validate=False, progress=False)
        return model.eval()

    def lost(self, model: nn.Module, test: bool = False) -> float:
        """By how much the accuracy, from 0 to 1, is lower than the dense model's."""
        split = self.splits.test if test else self.splits.val
        before, after = (training.evaluate(net, split).accuracy for net in (self.model, model))
        return before - after


def trained(task: str, make: Callable[[], nn.Module], seed: int, passes: int | None = None) -> Case:
    passes, batch_size = passes or TASKS[task][0], TASKS[task][1]
    splits = data.load(task, seed=seed)
    training.seed_everything(seed)
    recipe = training.Recipe(passes, batch_size, 6e-3, label_smoothing=0.05, seed=seed)
    model = make()
    training.fit(model, splits, recipe, device="cpu", validate=False, progress=False)
    return Case(model.eval(), splits, passes, batch_size)


@dataclass(frozen=True)
class Tried:
    """What one setting gave with one seed: gains by name, and what it cost on each split, from 0 to 1."""

    gains: dict[str, float]
    lost: float
    lost_on_test: float


def masks(case: Case) -> Iterator[tuple[str, Tried, nn.Module]]:
    """More and more zeros, with training after each step."""
    made = case.model
    for share in SHARES:
        made = case.train(pruning.masked(made, share), 0.5, 3e-3)
        yield f"{share:.0%}", tried(case, made, {"weights": 1 / (1 - share)}), pruning.permanent(made)


def packed(case: Case, sparse: nn.Module, share: str) -> Iterator[tuple[str, Tried]]:
    """Files of a network with zeros, in fewer and fewer bits."""
    for bits in BITS:
        rounded = low_bits.rounded(sparse, bits, per_channel=False, keep_zeros=True)
        made = low_bits.fixed(case.train(rounded, 0.5, 1e-3))
        for name, parameter in made.named_parameters():
            if name.endswith("bias"):
                parameter.data = parameter.data.half().float()
        with tempfile.TemporaryDirectory() as folder:
            size = packing.pack(made, Path(folder, "packed")).total_bytes
        yield f"{share}, {bits} bits", tried(case, made, {"file": memory.disk_bytes(case.model) / size})


def narrow(case: Case, rounds: int) -> Iterator[tuple[str, Tried]]:
    """Fewer and fewer channels, trained and then quantized."""
    calibration, x = list(case.splits.train.images[:512].split(64)), case.splits.test.images[:64]
    for ratio in RATIOS:
        made = (
            channels.narrowed(case.model, case.splits.train.images[:1], ratio=ratio).model if ratio else None
        )
        integers = quantization.static(case.train(made, 1.0, 4e-3) if made else case.model, calibration)
        gains = {
            "size": memory.disk_bytes(case.model) / memory.disk_bytes(integers),
            "speed": speed_up(case.model, integers, x, rounds).median,
        }
        yield f"{ratio:.0%}", tried(case, integers, gains)


def tried(case: Case, model: nn.Module, gains: dict[str, float]) -> Tried:
    return Tried(gains, case.lost(model), case.lost(model, test=True))


def speed_up(dense: nn.Module, small: nn.Module, x: torch.Tensor, rounds: int) -> measure.Spread:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        ways = {"dense": lambda: dense(x), "small": lambda: small(x)}
        times = measure.compare(ways, rounds=rounds)
    torch.set_num_threads(before)
    return times.speed_up("small", over="dense")


def furthest(settings: dict[str, list[Tried]], gain: str) -> str | None:
    """The setting with the largest gain of those within the budget on validation images, over all seeds."""
    within = [name for name, runs in settings.items() if mean(run.lost for run in runs) <= BUDGET]
    return max(within, key=lambda name: mean(run.gains[gain] for run in settings[name]), default=None)


def row(what: str, settings: dict[str, list[Tried]], gain: str, limit: float, source: str) -> dict:
    """What the furthest setting within the budget gains."""
    best = furthest(settings, gain)
    runs = settings[best] if best else [Tried({gain: 1.0}, 0.0, 0.0)]
    spread = measure.Spread.of([run.gains[gain] for run in runs])
    points = measure.Spread.of([-100 * run.lost_on_test for run in runs])
    return {
        "what": f"{what}, {best or 'dense'}, {len(runs)} seeds ({points:+.2f} points on test)",
        "plain": "1 (dense)",
        "ours": f"{spread:.1f}",
        "limit": f"{limit:.1f} ({source})",
        "against plain": f"{spread:.1f}x",
        "of the limit": f"{spread.median / limit:.0%}",
    }


def curve(what: str, settings: dict[str, list[Tried]]) -> dict:
    """What every setting costs on test images, in points, mean over the seeds."""
    costs = (
        f"{name}: {-100 * mean(run.lost_on_test for run in runs):+.2f}" for name, runs in settings.items()
    )
    rest = dict.fromkeys(("plain", "ours", "limit", "against plain", "of the limit"), "-")
    return {"what": f"points on test, {what}", **rest, "plain": "0 (dense)", "ours": "; ".join(costs)}


def lenet(task: str, rounds: int) -> list[dict]:
    zeros, files, fewer = {}, {}, {}
    for seed in range(SEEDS):
        case = trained(task, models.LeNet5, seed)
        for share, run, sparse in masks(case):
            zeros.setdefault(share, []).append(run)
            if share in PACKED:
                for name, file in packed(case, sparse, share):
                    files.setdefault(name, []).append(file)
        for name, run in narrow(case, rounds):
            fewer.setdefault(name, []).append(run)
    where = f"LeNet5 on {task}"
    return [
        row(f"times fewer weights by masks, {where}", zeros, "weights", 12, "Han et al. 2015"),
        curve(f"share of zeros, {where}", zeros),
        row(f"times smaller file, {where}", files, "file", 39, "Han et al. 2016"),
        curve(f"zeros and bits of the file, {where}", files),
        row(f"channels and int8, times smaller, {where}", fewer, "size", 9, "agreed"),
        row(f"channels and int8, speed-up at batch 64, {where}", fewer, "speed", 3.5, "agreed"),
        curve(f"channels removed, int8, {where}", fewer),
    ]


def resnet(rounds: int) -> list[dict]:
    """Channels of ResNet-18, trained on digits: what each ratio costs, and its speed against its MACs."""
    gains: dict[str, list[measure.Spread]] = {}
    points: dict[str, list[float]] = {}
    limits: dict[str, float] = {}
    for seed in range(RESNET_SEEDS):
        case = trained("digits", models.resnet18, seed, RESNET_PASSES)
        x = case.splits.train.images[:8]
        for ratio in RESNET_RATIOS:
            found = channels.narrowed(case.model, x[:1], ratio=ratio)
            small = case.train(found.model, 1.0, 3e-3)
            exported = pt2e.exported(small, [x])
            smaller = memory.disk_bytes(case.model) / memory.disk_bytes(exported)
            names = (f"{ratio:.0%} removed", f"{ratio:.0%} removed, then int8 ({smaller:.1f} times smaller)")
            limits[names[0]] = found.macs_gain
            for name, net, fast in zip(
                names, (small, exported), (small, pt2e.compiled(exported)), strict=True
            ):
                gains.setdefault(name, []).append(speed_up(case.model, fast, x, rounds))
                points.setdefault(name, []).append(-100 * case.lost(net, test=True))
    rows = []
    for name, times in gains.items():
        middle = measure.Spread.of([gain.median for gain in times])
        cost, limit = measure.Spread.of(points[name]), limits.get(name)
        rows.append(
            {
                "what": f"speed-up, ResNet-18, 32 px, batch 8, {name}, {len(times)} seeds "
                f"({cost:+.2f} points on test)",
                "plain": "1 (dense)",
                "ours": f"{middle.median:.1f}",
                "limit": f"{limit:.1f} (MACs)" if limit else "-",
                "against plain": f"{middle:.1f}x",
                "of the limit": f"{middle.median / limit:.0%}" if limit else "-",
            }
        )
    return rows


def measure_all(rounds: int = 15) -> Iterator[dict]:
    """Rows of LeNet5 on each task, and of ResNet-18, as they come: all of it takes an hour."""
    devices.set_threads()
    for task in TASKS:
        yield from lenet(task, rounds)
    yield from resnet(rounds)
