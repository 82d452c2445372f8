"""training.fit on CIFAR-10-shaped data against the usual DataLoader loop and against compute alone: LeNet5,
SGD, float32.

All three do the same arithmetic at the same batch size. Compute alone trains on one batch that is already
there: no loop with data can be faster.
"""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from companion import data, devices, measure, models, training

AUGMENT = data.Augment(shift=4, flip=True)
SAMPLES = 8192


class PerSample(Dataset):
    """Images as files hold them, transformed one at a time as most tutorials do."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor):
        self.images, self.labels = images.permute(0, 2, 3, 1).numpy(), labels
        self.transform = transforms.Compose(
            [
                transforms.ToPILImage(),
                transforms.RandomCrop(32, padding=AUGMENT.shift, padding_mode="edge"),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int):
        return self.transform(self.images[index]), self.labels[index]


def runs(batch_size: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """One epoch in each of the three ways, ready to be called again and again."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (SAMPLES, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 10, (SAMPLES,), generator=generator)
    train = data.Split(pixels.float() / 255 - 0.5, labels)
    splits = data.Splits(
        "random", train, train, train, tuple("0123456789"), torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
    )
    # How fast ReLU and pooling are depends on the weights: a network that knows its only batch by heart is
    # some percent faster. A tiny learning rate and one network for all keep the weights, and so the
    # arithmetic, the same.
    recipe = training.Recipe(1, batch_size, 1e-7, "sgd", schedule="constant", augment=AUGMENT)
    loader = DataLoader(PerSample(pixels, labels), batch_size, shuffle=True, drop_last=True)
    batches = data.Batches(train, batch_size, device, AUGMENT, drop_last=True)
    network = models.LeNet5().to(device)
    optimizer = training.make_optimizer(network, recipe)
    image, label = (tensor[:batch_size].to(device) for tensor in train)

    def fit(source: Iterable) -> None:
        training.fit(network, splits, recipe, device=device, batches=source, validate=False, progress=False)

    def compute_alone() -> None:
        for _ in range(SAMPLES // batch_size):
            training.plain_step(network, image, label, F.cross_entropy, optimizer)

    return {
        "DataLoader": lambda: fit(loader),
        "companion": lambda: fit(batches),
        "compute alone": compute_alone,
    }


def measure_all(rounds: int = 15) -> list[dict]:
    """A row for each batch size: samples/s of the three ways (medians), and the two ratios (medians round by
    round).
    """
    device = devices.select("cpu")
    rows = []
    for batch_size in (64, 256):
        times = measure.compare(runs(batch_size, device), device, rounds)
        samples = SAMPLES // batch_size * batch_size
        plain, ours, limit = (times[way].rate(samples).median for way in times.rounds)
        rows.append(
            {
                "what": f"training loop, batch {batch_size} (samples/s)",
                "plain": f"{plain:,.0f} (DataLoader)",
                "ours": f"{ours:,.0f}",
                "limit": f"{limit:,.0f} (compute alone)",
                "against plain": f"{times.speed_up('companion', over='DataLoader'):.2f}x",
                "of the limit": f"{times.speed_up('companion', over='compute alone'):.1%}",
            }
        )
    return rows
