"""Faults of two machines, each many times: how often training goes on, and after how many seconds.

A worker or a machine is killed, stopped or cut off, at a moment that a seed chooses; limits are what was
agreed. Then what a checkpoint costs the training when a thread writes it, for each of five steps, beside one
for which all wait.
"""

import random
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from companion import launch, measure, recoveries
from companion.sharded_checkpoint import Checkpoints

REPEATS, SEED, STEPS = 20, 0, 40
FAULTS = [name for name in recoveries.FAULTS if recoveries.why_not(name) is None]
LIMITS = {"a worker is killed": 6.0}
OTHERS = 12.0  # seconds: those in which a node is lost
WIDTH, LAYERS, EVERY, SAVES = 512, 16, 5, 8


def recovered(fault: str, repeats: int) -> dict:
    chance, seconds, lost, failed = random.Random(f"{SEED} {fault}"), [], [], []
    for _ in range(repeats):
        recoveries.STEPS_BEFORE = chance.randint(6, 16)
        with tempfile.TemporaryDirectory() as folder:
            flags = ["--steps", STEPS, "--pause-seconds", 0.05, "--timeout-seconds", 3]
            try:
                found = recoveries.recovery(fault, folder, flags)
            except (RuntimeError, TimeoutError) as error:
                failed.append(str(error))
                continue
        seconds.append(found.seconds)
        lost.append(found.lost_steps)
    spread, limit = measure.Spread.of(seconds or [float("nan")]), LIMITS.get(fault, OTHERS)
    about = f"steps done twice {max(lost, default=0)} at most" + (
        f"; failed: {failed[0][:80]}" if failed else ""
    )
    return {
        "what": f"{fault}: seconds to go on, {len(seconds)} of {repeats} recovered ({about})",
        "plain": "-",
        "ours": f"{spread:.1f}",
        "limit": f"{limit:.0f} (agreed)",
        "against plain": "-",
        "of the limit": f"{spread.median / limit:.0%}",
    }


def _stalls(folder: str, asynchronous: bool) -> list[float]:
    model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)])
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer, x = torch.optim.Adam(model.parameters()), torch.randn(64, WIDTH)
    checkpoints = Checkpoints(folder, asynchronous=asynchronous)
    for step in range(1, EVERY * SAVES + 1):
        optimizer.zero_grad()
        wrapped(x).sum().backward()
        optimizer.step()
        if step % EVERY == 0:
            checkpoints.save(step, model, optimizer)
        time.sleep(0.1)
    checkpoints.wait()
    return checkpoints.stalls[1:]


def measure_all(rounds: int = REPEATS) -> list[dict]:
    launch.warm("sklearn.datasets", "sklearn.model_selection", "torch.distributed.run")
    rows = [recovered(fault, rounds) for fault in FAULTS]
    with tempfile.TemporaryDirectory() as folder:
        found = {
            name: measure.Spread.of(
                launch.run(_stalls, 2, str(Path(folder, name)), name == "thread", device="cpu", threads=1)[0]
            )
            for name in ("all", "thread")
        }
    share = found["thread"].speed_up(over=found["all"])
    a_step = found["thread"].median / EVERY / found["all"].median
    return [
        *rows,
        {
            "what": f"a checkpoint by a thread, its cost for each of {EVERY} steps (of one that all await)",
            "plain": f"{found['all'].scaled(1e3):.0f} ms (all wait)",
            "ours": f"{found['thread'].scaled(1e3):.0f} ms, {a_step:.1%} a step",
            "limit": "5 % a step (agreed)",
            "against plain": f"{share:.1f}x",
            "of the limit": f"{a_step / 0.05:.0%}",
        },
    ]
