"""XLA on this CPU against eager, the same loop: steps a second once compiled, compilations, and what each
mistake costs.

Costs are steps of a run of `STEPS`: what is compiled beyond the right programs, and
what the run takes longer once compiled, in times of a right step.
"""

import time
from statistics import median

import torch
import torch.nn.functional as F

from companion import data, devices, host, launch, models, tpu

BATCH_SIZE = 64
STEPS = 20


def measure_all(rounds: int = 7) -> list[dict]:
    """A row for the loop, and one for each mistake; one that says why, without torch_xla."""
    if reason := devices.why_not("xla"):
        return [_row("XLA on CPU, LeNet5", plain=f"not measured: {reason}")]
    return launch.run(_rows, 1, rounds, STEPS, device="cpu", backend=None)[0]


def _row(
    what: str, plain: str = "-", ours: str = "-", limit: str = "-", against: str = "-", of_limit: str = "-"
) -> dict:
    return {
        "what": what,
        "plain": plain,
        "ours": ours,
        "limit": limit,
        "against plain": against,
        "of the limit": of_limit,
    }


def _update(model, optimizer, images, labels) -> torch.Tensor:
    optimizer.zero_grad()
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    return loss.detach()


def _marked(*step) -> torch.Tensor:
    import torch_xla

    with torch_xla.step():
        return _update(*step)


def _fetched(*step) -> torch.Tensor:
    loss = _marked(*step)
    loss.item()
    return loss


def _printed(*step) -> torch.Tensor:
    loss = _marked(*step)
    str(loss)
    return loss


def _masked(model, optimizer, images, labels) -> torch.Tensor:
    return _marked(model, optimizer, images + 0 * images[images > 1].mean(), labels)


MISTAKES = {  # the step, and whether it uses the right step's programs and only adds to them
    "no sync": (_update, False),
    "a ragged last batch": (_marked, True),
    "item() in each step": (_fetched, True),
    "a tensor printed": (_printed, True),
    "a mask": (_masked, True),
}


def _run(step, device: torch.device, pieces: list) -> tuple[float, tpu.Counts]:
    """Seconds of the run, and what XLA did in it."""
    torch.manual_seed(0)
    model = models.LeNet5().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    devices.synchronize(device)
    before, start = tpu.counts(), time.perf_counter()
    for images, labels in pieces:
        step(model, optimizer, images.to(device), labels.to(device))
    devices.synchronize(device)
    return time.perf_counter() - start, tpu.counts() - before


def _rows(rounds: int, steps: int) -> list[dict]:
    xla, cpu, train = devices.select("xla"), torch.device("cpu"), data.load("digits").train
    torch.set_num_threads(host.usable_cores())

    def pieces(size: int) -> list:
        return list(zip(train.images.split(size), train.labels.split(size), strict=True))[:steps]

    given = pieces(BATCH_SIZE)
    _, did = _run(_marked, xla, given)
    _run(_update, cpu, given)
    speeds = [(_run(_update, cpu, given)[0], _run(_marked, xla, given)[0]) for _ in range(rounds)]
    eager, warm = (median(times) / len(given) for times in zip(*speeds, strict=True))
    rows = [
        _row(
            f"XLA on CPU, LeNet5, batch {BATCH_SIZE} (steps/s, once compiled)",
            f"{1 / eager:.0f} (eager)",
            f"{1 / warm:.0f}",
            "-",
            f"{median(e / x for e, x in speeds):.2f}x",
        ),
        _row(
            f"compilations of {len(given)} steps ({did.compile_seconds:.1f} s)",
            ours=str(did.compilations),
            limit="3 (agreed)",
            of_limit=f"{did.compilations / 3:.0%}",
        ),
    ]
    for number, (name, (step, adds)) in enumerate(MISTAKES.items(), 1):
        # A size of its own, so that no program is found that another mistake has compiled.
        right = pieces(BATCH_SIZE - number)
        wrong = (
            [*right[:-1], tuple(part[: BATCH_SIZE // 2] for part in right[-1])] if "ragged" in name else right
        )
        needed, did = _run(_marked, xla, right)[1], _run(step, xla, wrong)[1]
        extra = did.compile_seconds - (0 if adds else needed.compile_seconds)
        again = [(_run(_marked, xla, right)[0], _run(step, xla, wrong)[0]) for _ in range(rounds)]
        lost = steps * (extra / median(time for time, _ in again) + median(b / a for a, b in again) - 1)
        what = f"{did.compilations + adds * needed.compilations} compilations, {did.transfers} transfers"
        rows.append(_row(f"steps lost in {steps} to: {name}", f"{round(lost)}", what, "0"))
    return rows
