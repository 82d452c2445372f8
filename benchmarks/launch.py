"""Starting two ranks that do one all-reduce, again and again: launch.run, warm, beside torch's own ways of
starting processes.
"""

import statistics
import tempfile
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from companion import launch

LIMIT_SECONDS = 0.3


def work() -> float:
    """What each rank does in its group."""
    x = torch.ones(1)
    dist.all_reduce(x)
    return x.item()


def spawned(rank: int, meeting_place: str) -> None:
    dist.init_process_group("gloo", f"file://{meeting_place}", rank=rank, world_size=2)
    assert work() == 2
    dist.destroy_process_group()


def elastic() -> float:
    dist.init_process_group("gloo")
    result = work()
    dist.destroy_process_group()
    return result


def by_spawn() -> None:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(spawned, args=(f"{folder}/ranks",), nprocs=2)


def by_elastic_launch() -> None:
    config = LaunchConfig(
        1, 1, 2, run_id="benchmark", rdzv_backend="c10d", rdzv_endpoint="127.0.0.1:0", max_restarts=0
    )
    assert elastic_launch(config, elastic)() == {0: 2, 1: 2}


def by_launch() -> None:
    assert launch.run(work, 2) == [2, 2]


def measure_all(rounds: int = 5) -> list[dict]:
    """Medians of calls taken in turn; the first `launch.run`, which starts the warm server, is a row of its
    own.
    """
    start = time.perf_counter()
    by_launch()
    first = time.perf_counter() - start
    ways = {"mp.spawn": by_spawn, "elastic_launch": by_elastic_launch, "launch.run": by_launch}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - start)
    warm = statistics.median(times["launch.run"])

    def row(what: str, plain: str, ours: float) -> dict:
        peer = statistics.median(times[plain])
        return {
            "what": f"2 ranks and an all-reduce, {what} (s)",
            "plain": f"{peer:.2f} ({plain})",
            "ours": f"{ours:.3f}",
            "limit": f"{LIMIT_SECONDS} (agreed)",
            "against plain": f"{ours / peer:.3f}x",
            "of the limit": f"{ours / LIMIT_SECONDS:.1%}",
        }

    return [
        row("warm", "mp.spawn", warm),
        row("warm", "elastic_launch", warm),
        row("the first launch of a process", "mp.spawn", first),
    ]
