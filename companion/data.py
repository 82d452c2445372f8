"""Images to learn from, as tensors, and mini-batches of them without per-sample Python."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from companion import datasets
from companion.datasets import SIZES, Split, Splits

# Gathered at once: several batches, for few allocations, yet small enough to stay in the cache.
_BLOCK_BYTES = 4 * 2**20


def load_in_rank(name: str, data_dir: str | Path, seed: int) -> Splits:
    """`load` in each rank of a process group; rank 0 goes ahead alone where something may have to be
    downloaded.
    """
    if name == "cifar10":
        if dist.get_rank() == 0:
            load(name, data_dir, seed)
        dist.barrier()
    return load(name, data_dir, seed)


def resized(splits: Splits, pixels: int) -> Splits:
    """The same images as `[N, 3, pixels, pixels]`, interpolated."""

    def larger(split: Split) -> Split:
        return Split(
            F.interpolate(split.images, (pixels, pixels), mode="bilinear", align_corners=False), split.labels
        )

    return replace(splits, train=larger(splits.train), val=larger(splits.val), test=larger(splits.test))


def load(name: str = "digits", data_dir: str | Path = "data", seed: int = 0) -> Splits:
    """One of the data sets "digits", "cluttered_digits" (both made from scikit-learn's images, no download)
    and "cifar10".

    "cifar10" is read from `data_dir`, where torchvision downloads it on first use; `seed` decides who is in
    which split. Raises ValueError for another name, RuntimeError when CIFAR-10 cannot be had or is damaged,
    saying what to do.
    """
    if name == "digits":
        return datasets.digits(seed)
    if name == "cluttered_digits":
        return datasets.cluttered_digits(seed)
    if name == "cifar10":
        return datasets.cifar10(Path(data_dir), seed)
    raise ValueError(f"unknown dataset {name!r}; use one of {', '.join(map(repr, SIZES))}")


@dataclass(frozen=True)
class Augment:
    """Random changes of a training image: a shift of up to `shift` pixels each way (edges repeated), a
    left-right flip.
    """

    shift: int = 4
    flip: bool = False


def crops(images: torch.Tensor, augment: Augment) -> tuple[torch.Tensor, tuple[int, int]]:
    """Every shifted and every mirrored version of every image, as overlapping views of one padded copy.

    `images` is `[N, C, H, W]`. Gives `views` `[M, C, H, W]` and the strides `(image, row)`: image n, moved by
    `dy` rows and `dx` columns in 0..2*shift, is `views[n * image + dy * row + dx]`, and its mirror image that
    of n + N. No pixel is copied until `views.index_select` gathers a batch.
    """
    padded = (
        F.pad(images, (augment.shift,) * 4, mode="replicate").contiguous()
        if augment.shift
        else images.contiguous()
    )
    padded = torch.cat([padded, padded.flip(3)]) if augment.flip else padded  # [N or 2N, C, H + 2s, W + 2s]
    (channels, height, width), (rows, columns) = images.shape[1:], padded.shape[2:]
    # From an image's first to its last element.
    reach = (channels - 1) * rows * columns + (height - 1) * columns + width
    views = padded.as_strided(
        (padded.numel() - reach + 1, channels, height, width), (1, rows * columns, columns, 1)
    )
    return views, (channels * rows * columns, columns)


class Batches:
    """Mini-batches (images, labels) already on `device`: shuffled, augmented and shared among ranks without
    per-sample Python.

    The order and the augmentation depend on `seed`, the epoch and nothing else; call `set_epoch` before each
    epoch. `batch_size` is per rank. With several ranks each gets the same number of samples; the last few are
    left out. Source: Keller Jordan, airbench (data kept on the device); torch's DistributedSampler (shares of
    ranks).
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        device: torch.device | str = "cpu",
        augment: Augment | None = None,
        *,
        shuffle: bool = True,
        drop_last: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.share = len(split.labels) // world_size if 0 <= rank < world_size else 0
        if not self.share:
            raise ValueError(
                f"rank={rank} of world_size={world_size} has no share of {len(split.labels)} samples"
            )
        if not 1 <= batch_size <= (self.share if drop_last else batch_size):
            raise ValueError(
                f"batch_size={batch_size} is not between 1 and the {self.share} samples of a rank"
            )
        self.device = torch.device(device)
        self.batch_size, self.shuffle, self.drop_last = batch_size, shuffle, drop_last
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.augment, self.epoch = augment or Augment(shift=0), 0
        # XLA would compile a program per gather.
        store = torch.device("cpu") if self.device.type == "xla" else self.device
        self.labels = split.labels.to(store)
        self.views, self.strides = crops(split.images.to(store), self.augment)

    def set_epoch(self, epoch: int) -> None:
        """Chooses another order and other augmentations; the same epoch gives the same ones again."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.share // self.batch_size if self.drop_last else -(-self.share // self.batch_size)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        samples, (image, row) = len(self.labels), self.strides
        generator = torch.Generator().manual_seed((self.seed << 20) + self.epoch)
        order = torch.randperm(samples, generator=generator) if self.shuffle else torch.arange(samples)  # [N]
        down, right = torch.randint(0, 2 * self.augment.shift + 1, (2, samples), generator=generator)
        mirror = torch.randint(0, 1 + self.augment.flip, (samples,), generator=generator)
        starts = (order + mirror * samples) * image + down * row + right  # [N], each an index of `views`
        mine = slice(self.rank, self.share * self.world_size, self.world_size)
        starts, labels = starts[mine].to(self.labels.device), self.labels[order[mine].to(self.labels.device)]
        end = len(self) * self.batch_size if self.drop_last else self.share
        block = self.batch_size * max(1, _BLOCK_BYTES // (4 * self.batch_size * self.views[0].numel()))
        for begin in range(0, end, block):
            these = slice(begin, min(begin + block, end))
            images = self.views.index_select(0, starts[these])  # [block, C, H, W]
            for x, y in zip(images.split(self.batch_size), labels[these].split(self.batch_size), strict=True):
                yield x.to(self.device), y.to(self.device)  # [batch, C, H, W], [batch]
