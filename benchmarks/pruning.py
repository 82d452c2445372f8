"""What is left of LeNet5 and ResNet-18, how much faster that is, and what it costs, over several seeds.

One thread for latencies, each variant in turn with the dense model. Each row has the highest gain whose
accuracy is within half a point of the dense model's on validation images; its points are those on test
images. Limits are the figures of the papers: 12 times fewer weights (Han et al. 2015), a file 39 times
smaller (Han et al. 2016); for channels, the factor in multiply-accumulates.
"""

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

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
SHARES = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.92, 0.94)
RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
TASKS = {"cluttered_digits": (12, 128), "digits": (60, 64)}  # passes over the images, batch size
RESNET_RATIOS = (0.5, 0.75)


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


def trained(task: str, make: Callable[[], nn.Module], seed: int) -> Case:
    passes, batch_size = TASKS[task]
    splits = data.load(task, seed=seed)
    training.seed_everything(seed)
    recipe = training.Recipe(passes, batch_size, 6e-3, label_smoothing=0.05, seed=seed)
    model = make()
    training.fit(model, splits, recipe, device="cpu", validate=False, progress=False)
    return Case(model.eval(), splits, passes, batch_size)


def sparsest(case: Case) -> tuple[float, nn.Module, nn.Module]:
    """Masks more and more, training after each step: the last share within the budget, and its model."""
    best, made = (0.0, case.model), case.model
    for share in SHARES:
        made = case.train(pruning.masked(made, share), 0.5, 3e-3)
        if case.lost(made) > BUDGET:
            break
        best = share, pruning.permanent(made)
    return best[0], best[1], made


def packed(case: Case, sparse: nn.Module) -> tuple[float, nn.Module]:
    """How many times smaller the file of the sparse model is with the fewest bits within the budget."""
    best = (1.0, case.model)
    for bits in (5, 4, 3):
        rounded = low_bits.rounded(sparse, bits, per_channel=False, keep_zeros=True)
        made = low_bits.fixed(case.train(rounded, 0.5, 1e-3))
        for name, parameter in made.named_parameters():
            if name.endswith("bias"):
                parameter.data = parameter.data.half().float()
        if case.lost(made) > BUDGET:
            break
        with tempfile.TemporaryDirectory() as folder:
            size = packing.pack(made, Path(folder, "packed")).total_bytes
        best = memory.disk_bytes(case.model) / size, made
    return best


def narrowest(case: Case, ratios: Iterable[float]) -> channels.Narrowed | None:
    """The network with the fewest channels within the budget."""
    best = None
    for ratio in ratios:
        found = channels.narrowed(case.model, case.splits.train.images[:1], ratio=ratio)
        case.train(found.model, 0.75, 4e-3)
        if case.lost(found.model) > BUDGET:
            break
        best = found
    return best


def speed_up(dense: nn.Module, small: nn.Module, x: torch.Tensor, rounds: int) -> measure.Spread:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        ways = {"dense": lambda: dense(x), "small": lambda: small(x)}
        times = measure.compare(ways, rounds=rounds)
    torch.set_num_threads(before)
    return times.speed_up("small", over="dense")


def row(what: str, ours: list[float], limit: float | None, source: str, points: list[float]) -> dict:
    gain = measure.Spread.of(ours)
    return {
        "what": f"{what}, {len(ours)} seeds ({100 * measure.Spread.of(points).median:+.2f} points on test)",
        "plain": "1 (dense)",
        "ours": f"{gain:.1f}",
        "limit": f"{limit:.1f} ({source})" if limit else "-",
        "against plain": f"{gain:.1f}x",
        "of the limit": f"{gain.median / limit:.0%}" if limit else "-",
    }


def lenet(task: str, rounds: int) -> list[dict]:
    fewer, files, small, fast, points = [], [], [], [], {"fewer": [], "file": [], "narrow": []}
    for seed in range(SEEDS):
        case = trained(task, models.LeNet5, seed)
        share, sparse, _ = sparsest(case)
        fewer.append(1 / (1 - share))
        times, tiny = packed(case, sparse)
        files.append(times)
        found = narrowest(case, RATIOS)
        calibration = list(case.splits.train.images[:512].split(64))
        integers = quantization.static(found.model if found else case.model, calibration)
        small.append(memory.disk_bytes(case.model) / memory.disk_bytes(integers))
        fast.append(speed_up(case.model, integers, case.splits.test.images[:64], rounds).median)
        for name, net in (("fewer", sparse), ("file", tiny), ("narrow", integers)):
            points[name].append(-case.lost(net, test=True))
    where = f"LeNet5 on {task}"
    return [
        row(f"times fewer weights by masks, {where}", fewer, 12, "Han et al. 2015", points["fewer"]),
        row(f"times smaller file, {where}", files, 39, "Han et al. 2016", points["file"]),
        row(f"channels and int8, times smaller, {where}", small, 9, "agreed", points["narrow"]),
        row(f"channels and int8, speed-up at batch 64, {where}", fast, 3.5, "agreed", points["narrow"]),
    ]


def resnet(rounds: int) -> list[dict]:
    """Channels of ResNet-18, random weights: the speed of each ratio against what MACs promise."""
    rows, model, x = [], models.resnet18().eval(), torch.randn(8, 3, 32, 32)
    for ratio in RESNET_RATIOS:
        found = channels.narrowed(model, x[:1], ratio=ratio)
        gain = speed_up(model, found.model, x, rounds)
        integers = pt2e.compiled(pt2e.exported(found.model, [x]))
        both, smaller = speed_up(model, integers, x, rounds), memory.disk_bytes(model)
        smaller /= memory.disk_bytes(pt2e.exported(found.model, [x]))
        for what, times, limit in (
            (f"{ratio:.0%} of the channels removed", gain, f"{found.macs_gain:.1f} (MACs)"),
            (f"{ratio:.0%} removed, then int8 ({smaller:.1f} times smaller)", both, "-"),
        ):
            rows.append(
                {
                    "what": f"speed-up, ResNet-18, 32 px, batch 8, {what}",
                    "plain": "1 (dense)",
                    "ours": f"{times.median:.1f}",
                    "limit": limit,
                    "against plain": f"{times:.1f}x",
                    "of the limit": f"{times.median / found.macs_gain:.0%}" if limit != "-" else "-",
                }
            )
    return rows


def measure_all(rounds: int = 15) -> list[dict]:
    """Rows of LeNet5 on each task, and of ResNet-18."""
    devices.set_threads()
    return [row for task in TASKS for row in lenet(task, rounds)] + resnet(rounds)
