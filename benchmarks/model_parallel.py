"""Pipelines: idle time of stages of known duration against theory, and AlexNet in two stages against one
process.

Every process has one thread; the one process takes the batch whole or in as many pieces, whichever is faster.
Idle time is in percent of all ranks' time; its limit is the schedule's own bubble.
"""

import torch
import torch.nn.functional as F

from companion import launch, measure, model_parallel, schedules, splitting
from companion.model_parallel import Pipeline

PIECES = (4, 8)  # micro-batches of the stages of known duration
SLOT_SECONDS = 0.02
BATCH_SIZE = 256
WIDTH = 1.0  # of AlexNet's layers


def rehearsed(schedule: str, ranks: int, micro_batches: int, rounds: int) -> dict:
    steps = launch.run(
        model_parallel.rehearse, ranks, schedule, micro_batches, SLOT_SECONDS, rounds, threads=1
    )
    idle = schedules.bubble([step.spans for step in steps])
    theory, naive = schedules.predicted_bubble(schedule, ranks, micro_batches), 1 - 1 / ranks
    return {
        "what": f"idle, {schedule}, {ranks} ranks, {micro_batches} micro-batches (%)",
        "plain": f"{100 * naive:.1f} (no pipeline)",
        "ours": f"{100 * idle:.1f}",
        "limit": f"{100 * theory:.1f} (theory)",
        "against plain": f"{idle / naive:.2f}x",
        "of the limit": f"{100 * (idle - theory):+.1f} points",
    }


def timed(
    at: list[str], images: torch.Tensor, labels: torch.Tensor, width: float, micro_batches: int, rounds: int
) -> model_parallel.Steps:
    pipeline = Pipeline(splitting.split(model_parallel.alexnet(width=width), at), "1f1b", micro_batches)
    return model_parallel.measure_steps(pipeline, images, labels, rounds)


def measure_all(rounds: int = 5) -> list[dict]:
    """Rows of idle time, and of AlexNet cut in two, balanced and as in the 2021 book."""
    rows = [
        rehearsed(schedule, ranks, micro_batches, rounds)
        for schedule in schedules.SCHEDULES
        for ranks in (2, 4)
        for micro_batches in PIECES
        if micro_batches >= ranks * schedules.SCHEDULES[schedule].stages_per_rank
    ]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    model = model_parallel.alexnet(width=WIDTH)
    images, labels = torch.randn(BATCH_SIZE, 3, 64, 64), torch.zeros(BATCH_SIZE, dtype=torch.long)

    def uncut(pieces: int) -> None:
        model.zero_grad()
        for x, y in zip(images.chunk(pieces), labels.chunk(pieces), strict=True):
            (F.cross_entropy(model(x), y) / pieces).backward()

    balanced = splitting.balanced(splitting.profile(model, images[: BATCH_SIZE // 8]), 2)
    cuts = {f"after {balanced[0]} (balanced)": balanced, "after avgpool (the book)": ["avgpool"]}
    for name, at in cuts.items():
        runs = {}
        for micro_batches in (4, 8, 16) if at == balanced else (8,):
            ways = {pieces: lambda pieces=pieces: uncut(pieces) for pieces in (1, micro_batches)}
            # Each time anew, since the machine is shared; a large batch may be slower in one piece.
            times = measure.compare(ways, rounds=3)
            alone = min(times[pieces].median for pieces in ways)
            steps = launch.run(timed, 2, at, images, labels, WIDTH, micro_batches, rounds, threads=1)
            runs[micro_batches] = steps[0].seconds.rate(alone), alone, steps
        micro_batches, (gain, alone, steps) = max(runs.items(), key=lambda run: run[1][0].median)
        limit = 2 * micro_batches / (micro_batches + 1)
        idle, theory = (
            schedules.bubble([step.spans for step in steps]),
            schedules.predicted_bubble("1f1b", 2, micro_batches),
        )
        about = f"samples/s; idle {idle:.0%}, theory {theory:.0%}"
        rows.append(
            {
                "what": f"AlexNet, 2 stages cut {name}, batch {BATCH_SIZE} in {micro_batches} ({about})",
                "plain": f"{BATCH_SIZE / alone:,.0f} (one process)",
                "ours": f"{steps[0].seconds.rate(BATCH_SIZE):,.0f}",
                "limit": f"{BATCH_SIZE / alone * limit:,.0f} (2m/(m+1))",
                "against plain": f"{gain:.2f}x",
                "of the limit": f"{gain.scaled(1 / limit):.1%}",
            }
        )
    torch.set_num_threads(before)
    return rows
