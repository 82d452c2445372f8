"""Two ranks of one thread against one process of one thread, at the same global batch.

The limit is what the ranks reach with the same work and no all-reduce.
"""

import statistics

import torchvision

from companion import ddp, launch, measure, models

CASES = (
    ("ResNet-18, 64 px, batch 128", lambda: torchvision.models.resnet18(num_classes=10), (3, 64, 64), 128),
    ("LeNet5, batch 2048", models.LeNet5, (3, 32, 32), 2048),
)
REPEATS = 3


def measure_all(rounds: int = 7) -> list[dict]:
    """A row for each network; medians of `REPEATS` launches."""
    rows = []
    for name, make, shape, batch_size in CASES:
        launches = [
            launch.run(ddp.scaling, 2, make, shape, [batch_size], rounds, threads=1) for _ in range(REPEATS)
        ]
        times = [ranks[0][0].times for ranks in launches]
        alone, share, together = (
            statistics.median(run[way].rate(batch_size).median for run in times)
            for way in ("alone", "share", "ddp")
        )
        gains = [run.speed_up("ddp", over="alone").median for run in times]
        of_limit = [run.speed_up("ddp", over="share").median for run in times]
        rows.append(
            {
                "what": f"DDP, 2 ranks, {name} (samples/s)",
                "plain": f"{alone:,.0f} (one process)",
                "ours": f"{together:,.0f}",
                "limit": f"{share:,.0f} (no all-reduce)",
                "against plain": f"{measure.Spread.of(gains):.2f}x",
                "of the limit": f"{measure.Spread.of(of_limit):.1%}",
            }
        )
    return rows
