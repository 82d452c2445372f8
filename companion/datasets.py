"""The data sets: scikit-learn's digits, a harder task made from them, and CIFAR-10; each in three parts."""

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

DIGITS = tuple("0123456789")
# Images for training, validation and test of each data set.
SIZES = {
    "digits": (1257, 180, 360),
    "cluttered_digits": (20_000, 4_000, 10_000),
    "cifar10": (45_000, 5_000, 10_000),
}


class Split(NamedTuple):
    """Images `[N, 3, H, W]` float32, normalised, and their labels `[N]` int64."""

    images: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True)
class Splits:
    """A data set cut in three: learn from `train`, choose on `val`, report `test` once.

    `images * std + mean` is in [0, 1].
    """

    name: str
    train: Split
    val: Split
    test: Split
    classes: tuple[str, ...]
    mean: torch.Tensor  # [3, 1, 1]
    std: torch.Tensor  # [3, 1, 1]


def split_indices(labels: torch.Tensor, parts: tuple[int, ...], seed: int) -> list[torch.Tensor]:
    """Indices of disjoint parts of the given sizes, each with the classes in the proportion of `labels`
    (stratified).
    """
    from sklearn.model_selection import train_test_split

    if sum(parts) != len(labels):
        raise ValueError(f"the parts {parts} add up to {sum(parts)}, not to {len(labels)} labels")
    rest, chosen = torch.arange(len(labels)), []
    for size in reversed(parts[1:]):
        rest, part = (
            torch.as_tensor(i)
            for i in train_test_split(
                rest.numpy(), test_size=size, stratify=labels[rest].numpy(), random_state=seed
            )
        )
        chosen.append(part)
    return [rest, *reversed(chosen)]


def _normalised(name: str, parts: list[Split], classes: tuple[str, ...]) -> Splits:
    """Splits of images in [0, 1], normalised in place by the training images' mean and deviation."""
    std, mean = torch.std_mean(parts[0].images, dim=(0, 2, 3), keepdim=True)
    parts = [Split(part.images.sub_(mean).div_(std), part.labels) for part in parts]
    return Splits(name, *parts, classes, mean[0], std[0])


def _original_digits(seed: int) -> list[Split]:
    """scikit-learn's 1,797 scanned digits `[N, 1, 8, 8]` in [0, 1], as 1,257 for training, 180 for
    validation, 360 for test.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images, labels = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 16, torch.tensor(bunch.target)
    return [Split(images[part], labels[part]) for part in split_indices(labels, SIZES["digits"], seed)]


def digits(seed: int) -> Splits:
    def enlarge(images: torch.Tensor) -> torch.Tensor:
        return F.interpolate(images, size=(32, 32), mode="bilinear", align_corners=False).repeat(1, 3, 1, 1)

    return _normalised(
        "digits", [Split(enlarge(images), labels) for images, labels in _original_digits(seed)], DIGITS
    )


def cluttered_digits(seed: int) -> Splits:
    """20,000 / 4,000 / 10,000 pictures of a turned, scaled, shifted and coloured digit among pieces of
    others.

    Each part is made from its own scanned digits only, so that no test image shares a stroke with a training
    image.
    """
    parts = zip(_original_digits(seed), SIZES["cluttered_digits"], strict=True)
    return _normalised(
        "cluttered_digits", [_clutter(part, size, seed + i) for i, (part, size) in enumerate(parts)], DIGITS
    )


def _clutter(digits: Split, size: int, seed: int, pieces: int = 2, noise: float = 0.1) -> Split:
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator) * (high - low) + low

    def place(images: torch.Tensor, turn: float, scale: tuple[float, float], shift: float) -> torch.Tensor:
        """`images` `[N, 1, 8, 8]`, each turned, scaled and shifted by chance, as `[N, 1, 32, 32]`."""
        angle, zoom = uniform(-turn, turn, size), uniform(*scale, size)  # [N] each
        dx, dy = uniform(-shift, shift, size), uniform(-shift, shift, size)
        cos, sin = angle.cos() / zoom, angle.sin() / zoom
        rows = [
            torch.stack([cos, -sin, sin * dy - cos * dx], 1),
            torch.stack([sin, cos, -sin * dx - cos * dy], 1),
        ]  # two of [N, 3]: the rows of N affine maps
        grid = F.affine_grid(torch.stack(rows, 1), (size, 1, 32, 32), align_corners=False)
        return F.grid_sample(images, grid, align_corners=False)

    chosen = torch.randint(len(digits.images), (size,), generator=generator)
    picture = place(digits.images[chosen], 0.3, (0.6, 0.85), 0.25)
    for _ in range(pieces):
        others = digits.images[torch.randint(len(digits.images), (size,), generator=generator)]
        top, left = torch.randint(0, 5, (2, size, 1), generator=generator)
        inside = torch.arange(8)
        rows, columns = ((inside >= start) & (inside < start + 4) for start in (top, left))
        corner = others * (rows[:, None, :, None] & columns[:, None, None, :])  # a 4x4 piece of another digit
        picture = torch.maximum(picture, 0.8 * place(corner, 3.1, (0.5, 0.8), 0.8))
    ink, paper = uniform(0.4, 1, size, 3, 1, 1), uniform(0, 0.5, size, 3, 1, 1)  # a colour for each image
    images = torch.randn(size, 3, 32, 32, generator=generator).mul_(noise)
    images.add_(torch.lerp(paper, ink, picture)).clamp_(0, 1)  # [N, 3, 32, 32]
    return Split(images, digits.labels[chosen])


def cifar10(data_dir: Path, seed: int) -> Splits:
    cache = data_dir / "cifar10.pt"
    if not cache.exists():
        _convert_cifar10(data_dir, cache)
    try:
        raw = torch.load(cache, weights_only=True)
        train, test = (
            Split(raw[part].float().div_(255), raw[f"{part}_labels"]) for part in ("train", "test")
        )
    except Exception as error:
        raise RuntimeError(f"{cache} is damaged ({type(error).__name__}): delete it and run again") from error
    sizes = (len(train.labels) - len(train.labels) // 10, len(train.labels) // 10)
    learn, val = (
        Split(train.images[part], train.labels[part]) for part in split_indices(train.labels, sizes, seed)
    )
    return _normalised("cifar10", [learn, val, test], tuple(raw["classes"]))


def _convert_cifar10(data_dir: Path, cache: Path) -> None:
    """Writes `cache` from what torchvision finds in `data_dir` or downloads, checksums verified; all or
    nothing.
    """
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity

    data_dir.mkdir(parents=True, exist_ok=True)
    archive, folder = data_dir / CIFAR10.filename, data_dir / CIFAR10.base_folder
    if archive.exists() and not check_integrity(str(archive), CIFAR10.tgz_md5):
        raise RuntimeError(
            f"{archive} is truncated or corrupt (its checksum is wrong): delete it and run again, or use "
            f"dataset='digits'"
        )
    staging = Path(tempfile.mkdtemp(prefix=".cifar10-", dir=data_dir))
    try:
        for source in (archive, folder):
            if source.exists():
                (staging / source.name).symlink_to(source.resolve(), target_is_directory=source.is_dir())
        try:
            train, test = (
                CIFAR10(staging, train=part, download=not folder.exists()) for part in (True, False)
            )
        except (OSError, RuntimeError) as error:
            if folder.exists():
                raise RuntimeError(
                    f"{folder} is incomplete or corrupt: delete it and run again, or use dataset='digits'"
                ) from error
            raise RuntimeError(
                f"CIFAR-10 is not in {data_dir} and could not be downloaded ({error}): put "
                f"{CIFAR10.filename} there, "
                "set data_dir to where it is, or use dataset='digits' or 'cluttered_digits', which need no "
                "download"
            ) from error
        raw: dict[str, object] = {"classes": train.classes}
        for name, part in (("train", train), ("test", test)):
            raw[name] = torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous()
            raw[f"{name}_labels"] = torch.tensor(part.targets)
        torch.save(raw, staging / cache.name)
        os.replace(staging / cache.name, cache)
    finally:
        shutil.rmtree(staging)
