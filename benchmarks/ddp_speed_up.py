"""Two ranks of one thread against one process of one thread, at the same global batch; the limit is two."""

import statistics

import torchvision

from companion import ddp, devices, launch, models

# What the machine cannot give: `memory kept` takes the page faults of large tensors away from the single process.
CASES = (
    ("ResNet-18, 64 px, batch 128", lambda: torchvision.models.resnet18(num_classes=10), (3, 64, 64), 128),
    ("LeNet5, batch 2048", models.LeNet5, (3, 32, 32), 2048),
)
REPEATS = 3


def work(make, shape, batch_size: int, rounds: int, keep_memory: bool) -> ddp.Scaling:
    if keep_memory:
        devices.keep_memory()
    return ddp.scaling(make, shape, [batch_size], rounds)[0]


def measure_all(rounds: int = 7) -> list[dict]:
    """A row for each network, as the C library allocates by default and with memory kept; medians of `REPEATS` launches."""
    rows = []
    for name, make, shape, batch_size in CASES:
        for keep in (False, True):
            runs = [launch.run(work, 2, make, shape, batch_size, rounds, keep, threads=1)[0] for _ in range(REPEATS)]
            alone, share, together = (
                statistics.median(batch_size / getattr(run, f"{way}_seconds") for run in runs)
                for way in ("alone", "share", "ddp")
            )
            rows.append(
                {
                    "what": f"DDP, 2 ranks, {name}{', memory kept' if keep else ''} (samples/s)",
                    "plain": f"{alone:,.0f} (one process)",
                    "ours": f"{together:,.0f}",
                    "limit": f"{share:,.0f} (no all-reduce)",
                    "against plain": f"{statistics.median(run.speed_up for run in runs):.2f}x",
                    "of the limit": f"{statistics.median(run.share_seconds / run.ddp_seconds for run in runs):.1%}",
                }
            )
    return rows
