"""Two replicas in threads, two ranks of DDP, and one process, each worker with one thread, at the same batch.

The limit is what Amdahl's law leaves when only the forward pass is shared out, as on a CPU. What copying
takes is another row.
"""

import torch

from companion import data_parallel, ddp, launch, measure, models, training

CASES = (
    ("AlexNet, 64 px, batch 64", models.AlexNet, (3, 64, 64), 64),
    ("LeNet5, batch 256", models.LeNet5, (3, 32, 32), 256),
)


def measure_all(rounds: int = 7) -> list[dict]:
    """Two rows for each network: steps of training, and scatter + replicate + gather as a share of a step."""
    rows, before = [], torch.get_num_threads()
    torch.set_num_threads(1)
    for name, make, shape, batch_size in CASES:
        images, labels = torch.randn(batch_size, *shape), torch.zeros(batch_size, dtype=torch.long)
        threaded = data_parallel.ThreadedDataParallel(make(), ["cpu", "cpu"], 1)
        steps = {
            "one": training.stepper(make(), images, labels),
            "threads": training.stepper(threaded, images, labels),
        }
        times = measure.compare(steps, rounds=rounds)
        gain = times.speed_up("threads", over="one")
        processes = launch.run(ddp.scaling, 2, make, shape, [batch_size], rounds, threads=1)[0][
            0
        ].speed_up.median
        plain, parts = (
            data_parallel.step_parts(model, images, labels, rounds) for model in (make(), threaded)
        )
        limit = sum(plain.values()) / data_parallel.predicted_step(plain, parts, 2)
        one = times["one"].median
        copying = sum(parts[part] for part in ("scatter", "replicate", "gather"))
        rows += [
            {
                "what": f"2 replicas in threads, {name} (samples/s)",
                "plain": f"{batch_size / one:,.0f} (one process); {batch_size / one * processes:,.0f} (DDP)",
                "ours": f"{batch_size / one * gain.median:,.0f}",
                "limit": f"{batch_size / one * limit:,.0f} (backward not shared)",
                "against plain": f"{gain:.2f}x; {gain.scaled(1 / processes):.2f}x",
                "of the limit": f"{gain.scaled(1 / limit):.1%}",
            },
            {
                "what": f"scatter, replicate, gather, {name} (ms)",
                "plain": f"{1e3 * sum(parts.values()):.1f} (the step)",
                "ours": f"{1e3 * copying:.2f}",
                "limit": "-",
                "against plain": f"{copying / sum(parts.values()):.1%}",
                "of the limit": "-",
            },
        ]
    torch.set_num_threads(before)
    return rows
