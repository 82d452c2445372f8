"""Advice for a model, by rules: each cites the rows that were measured, and says what was not."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from companion import devices, host, measure, memory, tables, training
from companion.measure import Spread, says
from companion.summary import Entry

KINDS = {
    "convolutional": (nn.Conv1d, nn.Conv2d, nn.Conv3d),
    "recurrent": (nn.RNNBase,),
    "attention": (nn.MultiheadAttention,),
    "linear": (nn.Linear,),
}
WORTH = 1.2  # a speed-up by two ranks for which it is worth to start them
FULL = 0.5  # share of the memory from which activations may find no room
COPIES = 4  # of the weights in a training with Adam: themselves, gradients, and two of the optimizer


@dataclass(frozen=True)
class Facts:
    """What rules ask of a model: bytes of its weights, the kind of layer that has most of them, MACs of a
    sample, seconds of a training step by batch size (half of the batch with half of the cores, as each of two
    ranks would have it), and the bytes of the device's memory.
    """

    weight_bytes: int
    kind: str
    macs: int
    step_seconds: dict[int, Spread]
    memory_bytes: int


def facts(
    make: Callable[[], nn.Module],
    shape: Sequence[int],
    batch_size: int,
    classes: int = 10,
    device: torch.device | str = "cpu",
    rounds: int = 5,
) -> Facts:
    """Measures the model that `make` gives on random images of `shape` `[C, H, W]`: the whole batch, and half
    of it as each of two ranks would do it. On a CPU these share the cores, and a single core takes turns.

    Raises ValueError for a batch of one, which cannot be shared.
    """
    if batch_size < 2:
        raise ValueError(f"batch_size={batch_size} must be 2 or more, to be shared by two ranks")
    device = torch.device(device)
    model = make().to(device)
    images = torch.randn(batch_size, *shape, device=device)
    labels = torch.arange(batch_size, device=device) % classes
    # Of two samples: with one, a BatchNorm in training mode may have a single value to normalize.
    macs = measure.macs(model, images[:2]) // 2
    cores, on_gpu = torch.get_num_threads(), device.type == "cuda"

    def timed(size: int, threads: int) -> Spread:
        step = training.stepper(model, images[:size], labels[:size])
        devices.set_threads(threads)
        try:
            return measure.compare({"step": step}, device, rounds)["step"]
        finally:
            devices.set_threads(cores)

    half = timed(batch_size // 2, cores if on_gpu else max(1, cores // 2))
    turns = 2 if not on_gpu and cores == 1 else 1
    steps = {batch_size // 2: half.scaled(turns), batch_size: timed(batch_size, cores)}
    there = torch.cuda.get_device_properties(device).total_memory if on_gpu else host.usable_memory_bytes()
    return Facts(memory.model_bytes(model), _kind(model), macs, steps, there)


def _kind(model: nn.Module) -> str:
    """The kind of layer that has most of the parameters."""
    sizes = {}
    for module in model.modules():
        kind = next((kind for kind, types in KINDS.items() if isinstance(module, types)), "other")
        own = sum(p.numel() for p in module.parameters(recurse=kind in ("recurrent", "attention")))
        sizes[kind] = sizes.get(kind, 0) + own
    return max(sizes, key=sizes.get)


@dataclass(frozen=True)
class Advice:
    """What to do about something, and the measured rows that say so."""

    about: str
    text: str
    cites: tuple[str, ...]


def advise(found: Sequence[Entry], rows: Sequence[dict], model: Facts, budget_points: float) -> list[Advice]:
    """Advice from each rule that has something measured; the others say which notebook measures it.

    `budget_points` of accuracy may be lost.
    """
    rules = (_data, _one_device, _ranks, _memory, _inference, _size, _search)
    return [rule(found, rows, model, budget_points) for rule in rules]


def table(advice: Sequence[Advice]) -> tables.Table:
    return tables.Table(
        ("about", "advice", "measured"),
        [(one.about, one.text, "; ".join(one.cites) or "nothing yet") for one in advice],
    )


def _of(found: Sequence[Entry], notebook: str) -> list[Entry]:
    return [entry for entry in found if entry.notebook.startswith(notebook)]


def _missing(about: str, notebook: str) -> Advice:
    return Advice(about, f"not measured here: run notebook {notebook}", ())


def _data(found, rows, model: Facts, budget_points: float) -> Advice:
    ways = [e for e in _of(found, "00") if "vectorised" in e.technique or "workers" in e.technique]
    if not ways:
        return _missing("data", "00")
    best = max(ways, key=lambda entry: entry.speed_up.median)
    text = says(
        best.speed_up,
        f"{best.technique} made a small model's loop {best.speed_up:.1f} times as fast: profile yours first",
        "moving the data out of Python made it slower: keep your DataLoader",
        "the data was no bottleneck: leave it as it is",
    )
    return Advice("data", text, tuple(map(str, ways)))


def _one_device(found, rows, model: Facts, budget_points: float) -> Advice:
    gains = {
        row["technique"]: row["metrics"]["gain"]
        for row in rows
        if row["notebook"].startswith("00") and "gain" in row["metrics"]
    }
    tried = {
        name: Spread(gain["value"], gain.get("low", gain["value"]), gain.get("high", gain["value"]), 1)
        for name, gain in gains.items()
        if any(word in name for word in ("threads", "channels_last", "bfloat16", "compile"))
    }
    if not tried:
        return _missing("one device", "00")
    words = {name: says(gain, "try", "leave", "hardly worth") for name, gain in tried.items()}
    text = "; ".join(
        f"{word} {', '.join(name for name in words if words[name] == word)}"
        for word in ("try", "hardly worth", "leave")
        if word in words.values()
    )
    return Advice("one device", text, tuple(f"[00] {name}: {gain:.2f}x" for name, gain in tried.items()))


def _ranks(found, rows, model: Facts, budget_points: float) -> Advice:
    line = next((row for row in reversed(rows) if "latency" in row["metrics"]), None)
    if line is None:
        return _missing("several ranks", "03")
    ranks, metrics = line["settings"].get("ranks", 2), line["metrics"]
    sending = metrics["latency"]["value"] / 1e6 + model.weight_bytes / (metrics["rate"]["value"] * 1e9)
    half, whole = (model.step_seconds[size].median for size in sorted(model.step_seconds))
    gain, size = whole / (half + sending), max(model.step_seconds)
    text = (
        f"two ranks would make a step of {size} images {gain:.2f} times as fast: the all-reduce takes "
        f"{1e3 * sending:.1f} ms beside {1e3 * half:.1f} ms of computing"
    )
    text += ": use DDP" if gain > WORTH else ": grow the batch first, or stay with one"
    measured = [str(entry) for entry in _of(found, "03")[:3]]
    latency, rate = metrics["latency"]["value"], metrics["rate"]["value"]
    cite = f"[03] all-reduce of {ranks} ranks: {latency:.0f} us, {rate:.2f} GB/s"
    return Advice("several ranks", text, (cite, *measured))


def _memory(found, rows, model: Facts, budget_points: float) -> Advice:
    wanted, share = COPIES * model.weight_bytes, COPIES * model.weight_bytes / model.memory_bytes
    sharded = [entry for entry in found if "sharded" in entry.technique or "stages" in entry.technique]
    text = (
        f"weights, gradients and Adam's state take {wanted / 2**20:,.0f} MiB, {share:.1%} of the memory, "
        "without activations: "
    )
    text += "cut or shard the model (notebooks 04 and 05)" if share > FULL else "no need to cut it"
    return Advice("memory", text, tuple(map(str, sharded[:3])))


def _inference(found, rows, model: Facts, budget_points: float) -> Advice:
    ways = [
        entry for entry in _of(found, "08") + _of(found, "10") if entry.speed_up and entry.points is not None
    ]
    ways = [entry for entry in ways if entry.points >= -budget_points]
    if not ways:
        return _missing("inference", "08")
    best = sorted(ways, key=lambda entry: -entry.speed_up.low)[:3]
    text = says(
        best[0].speed_up,
        f"{best[0].technique} was the fastest within {budget_points:g} points; measure yours with "
        "quantization_compare.compare",
        "nothing was faster: keep float32",
        "nothing was faster beyond its spread: keep float32",
    )
    hint = "static" if model.kind == "convolutional" else "dynamic"
    text += f" (most of your weights are {model.kind}: try {hint} int8 too)"
    return Advice("inference", text, tuple(map(str, best)))


def _size(found, rows, model: Facts, budget_points: float) -> Advice:
    ways = [entry for entry in found if entry.size and entry.points is not None]
    ways = [entry for entry in ways if entry.points >= -budget_points]
    if not ways:
        return _missing("size", "09")
    best = min(ways, key=lambda entry: entry.size)
    text = f"the smallest within {budget_points:g} points keeps {best.size:.0%}: {best.technique}"
    return Advice("size", text, (str(best),))


def _search(found, rows, model: Facts, budget_points: float) -> Advice:
    row = next((row for row in reversed(rows) if "of FIFO's epochs" in row["metrics"]), None)
    if row is None:
        return _missing("search", "07")
    share, lost = (row["metrics"][name]["value"] for name in ("of FIFO's epochs", "points below the best"))
    text = (
        f"stop bad trials early: {share:.0f} % of the epochs found a model {lost:.1f} points below the best"
    )
    return Advice("search", text, (f"[07] {row['technique']}",))


def device_of(name: str) -> torch.device:
    """Where a model is measured; XLA is left out, whose steps must be marked."""
    chosen = devices.select(name)
    return torch.device("cpu") if chosen.type in ("xla", "tpu") else chosen
