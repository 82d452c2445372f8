"""Training functions for the tests of searches. Each trial's process imports this file: it imports little."""

import math
import os
import signal
import tempfile
import time
from pathlib import Path

from ray import tune


def train(config, scale=1.0):
    for epoch in range(8):
        tune.report({"accuracy": scale * config["lr"] * (1 - 0.5 ** (epoch + 1))})


def misbehaving(config):
    for epoch in range(4):
        if config["kind"] == "raises" and epoch == 2:
            raise ValueError("no such layer")
        if config["kind"] == "is killed" and epoch == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        value = math.nan if config["kind"] == "diverges" and epoch == 2 else 0.1 * epoch
        tune.report({"accuracy": value})
    if config["kind"] == "asks in the old way":
        tune.report(accuracy=1.0)


def recovers(config):
    start = 0
    if checkpoint := tune.get_checkpoint():
        with checkpoint.as_directory() as folder:
            start = int(Path(folder, "epoch").read_text())
    for epoch in range(start, config.get("epochs", 4)):
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "epoch").write_text(str(epoch + 1))
            report = {"accuracy": float(epoch), "started_at": float(start)}
            tune.report(report, checkpoint=tune.Checkpoint.from_directory(folder))
        time.sleep(config.get("seconds", 0))
        if config.get("dies") and epoch == 1 and start == 0:
            os._exit(1)


def is_a_ddp_job(config):
    """A trial of two ranks: what each trains is averaged over both."""
    from companion import launch

    def rank_sum() -> float:
        import torch
        import torch.distributed as dist

        total = torch.ones(1) * config["x"]
        dist.all_reduce(total)
        return total.item()

    (first, second) = launch.run(rank_sum, 2, device="cpu")
    tune.report({"accuracy": first, "same": float(first == second)})
