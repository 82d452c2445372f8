"""One process, one thread for each device: nn.DataParallel's way, over any list of devices, and what a step
of it costs.

    model = ThreadedDataParallel(model, ["cuda:0", "cuda:1"])  # or ["cpu", "cpu"], or one GPU twice

A batch is cut along its first dimension, every device gets a copy of the model and a piece, a thread computes
each piece, and the outputs are joined on the first device. Source: `torch.nn.parallel.DataParallel`, which
does so on GPUs only.
"""

import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from companion import devices, measure, modules


class ThreadedDataParallel(nn.Module):
    """`module` over the devices `places`, one of which may stand there more than once; inputs and outputs may
    be nested.

    Tensors among the inputs, keyword arguments too, are cut along their first dimension, which must be the
    same for all; those without dimensions, and whatever is no tensor, go to every device. Outputs are tensors
    whose first dimension is the batch, or scalars, which come back as a vector with one entry for each
    replica.

    As in nn.DataParallel the first replica shares the module's buffers and the others have copies that are
    thrown away: only the first piece of a batch moves BatchNorm's running statistics. What `forward` sets on
    the module (a counter, a tensor that it keeps) is lost; hooks are called once for each replica. `threads`
    are those of each replica's operators on a CPU.

    Raises ValueError for inputs that do not agree on a batch, TypeError for outputs that cannot be joined;
    what a replica raises is raised again, with a note that names the replica, its device, and the shapes it
    was given.
    """

    def __init__(self, module: nn.Module, places: Iterable[str | torch.device], threads: int | None = None):
        super().__init__()
        self.devices = devices.select_list([str(place) for place in places])
        self.module = modules.move(module, self.devices[0])
        self.threads = threads or max(1, torch.get_num_threads() // len(self.devices))

    def forward(self, *args, **kwargs):
        pieces = scatter((args, kwargs), self.devices)
        replicas = replicate(self.module, self.devices[: len(pieces)])
        outputs = parallel_apply(replicas, pieces, self.threads)
        return gather(outputs, self.devices[0])


def scatter(inputs: object, places: Sequence[torch.device]) -> list:
    """`inputs`, one for each device, with every tensor in it `[N, ...]` cut into pieces `[about N / devices,
    ...]`.

    As torch.chunk cuts: the last piece may be smaller, and few samples may leave devices without any.
    """
    leaves, structure = tree_flatten(inputs)
    # Each [N, ...]; numbers and tensors without a dimension go to every device as they are.
    batched = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dim()]
    if len({len(leaf) for leaf in batched}) != 1:
        raise ValueError(
            f"inputs must share one batch dimension; tensors have the shapes "
            f"{[tuple(x.shape) for x in batched]}"
        )
    count = len(batched[0].chunk(len(places)))
    cut = [
        leaf.chunk(count) if isinstance(leaf, torch.Tensor) and leaf.dim() else [leaf] * count
        for leaf in leaves
    ]
    rows = [
        [leaf.to(place) if isinstance(leaf, torch.Tensor) else leaf for leaf in row]
        for row, place in zip(zip(*cut, strict=True), places, strict=False)
    ]
    return [tree_unflatten(row, structure) for row in rows]


def replicate(module: nn.Module, places: Sequence[torch.device]) -> list[nn.Module]:
    """A replica for each device, as nn.DataParallel makes them: whatever is no parameter, buffer or module is
    shared with the module, and what `forward` sets on itself is lost.

    The first replica has the module's own parameters and buffers; those of the others are copies, and the
    parameters' lead gradients back. Raises TypeError for a scripted module.
    """
    if scripted := [
        name for name, part in module.named_modules() if isinstance(part, torch.jit.ScriptModule)
    ]:
        raise TypeError(
            f"{scripted[0] or 'the model'} is scripted: replicate the module it was scripted from"
        )
    return [replica(module, None if number == 0 else place) for number, place in enumerate(places)]


def replica(module: nn.Module, place: torch.device | None) -> nn.Module:
    """One of them, with copies of parameters and buffers on a device, or with the module's own."""
    tensors = [*module.parameters(), *module.buffers()]
    copies = {id(tensor): tensor.to(place, copy=True) if place else tensor for tensor in tensors}
    # Each module's own way to be copied but for its tensors: nn.LSTM and its like have one.
    replicas = {part: part._replicate_for_data_parallel() for part in module.modules()}
    for part, copied in replicas.items():
        for name, child in part._modules.items():
            copied._modules[name] = None if child is None else replicas[child]
        for name, buffer in part._buffers.items():
            copied._buffers[name] = None if buffer is None else copies[id(buffer)]
        for name, parameter in part._parameters.items():
            if parameter is None:
                copied._parameters[name] = None
            else:
                setattr(copied, name, copies[id(parameter)])  # of a copy a tensor, which is no leaf
    return replicas[module]


def parallel_apply(
    replicas: Sequence[nn.Module], pieces: Sequence[tuple[tuple, dict]], threads: int = 1
) -> list:
    """`replica(*args, **kwargs)` for each replica and its piece, at once, each in a thread of its own."""
    grad, inference, before = (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_num_threads(),
    )
    autocasts = {
        kind: torch.get_autocast_dtype(kind) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)
    }
    results: list = [None] * len(replicas)

    def work(i: int) -> None:
        try:
            with ExitStack() as modes:  # which torch keeps for each thread
                modes.enter_context(torch.inference_mode(inference))
                modes.enter_context(torch.set_grad_enabled(grad))
                for kind, dtype in autocasts.items():
                    modes.enter_context(torch.autocast(kind, dtype))
                torch.set_num_threads(threads)
                if (place := place_of(pieces[i])).type == "cuda":
                    modes.enter_context(torch.cuda.device(place))
                    torch.ones(1, device=place)  # gives the thread its context, of which cuBLAS would warn
                args, kwargs = pieces[i]
                results[i] = replicas[i](*args, **kwargs)
        except BaseException as error:  # whatever it is, it is raised again where the model was called
            results[i] = error

    at_once([lambda i=i: work(i) for i in range(len(replicas))])
    torch.set_num_threads(before)  # else threads that start later would take the workers' number
    for i, result in enumerate(results):
        if isinstance(result, BaseException):
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors_of(pieces[i]))
            result.add_note(
                f"in replica {i} of {len(replicas)}, on {place_of(pieces[i])}, with inputs of shape {shapes}"
            )
            raise result
    return results


def tensors_of(piece: tuple[tuple, dict]) -> list[torch.Tensor]:
    """The tensors among the arguments of a replica, however they are nested."""
    return [leaf for leaf in tree_flatten(piece)[0] if isinstance(leaf, torch.Tensor)]


def place_of(piece: tuple[tuple, dict]) -> torch.device:
    """The device that a piece was sent to."""
    return tensors_of(piece)[0].device


def gather(outputs: Sequence, place: torch.device) -> object:
    """The replicas' outputs as one, on `place`: tensors `[n, ...]` joined to `[N, ...]`, scalars to
    `[replicas]`.
    """
    structure = tree_flatten(outputs[0])[1]
    columns = zip(*(tree_flatten(output)[0] for output in outputs), strict=True)
    joined = []
    for column in columns:
        if all(isinstance(leaf, torch.Tensor) for leaf in column):  # [n, ...] each, or scalars
            joined.append(
                torch.cat([leaf.to(place) if leaf.dim() else leaf.to(place)[None] for leaf in column])
            )
        elif all(leaf is None for leaf in column):
            joined.append(None)
        else:
            raise TypeError(
                f"outputs of type {type(column[0]).__name__} cannot be joined; return tensors, nested as "
                f"you like"
            )
    return tree_unflatten(joined, structure)


def at_once(functions: Sequence[Callable[[], object]]) -> None:
    """Calls all functions, each in a thread of its own, and waits until all have returned."""
    workers = [threading.Thread(target=function) for function in functions]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def step_parts(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, rounds: int = 5
) -> dict[str, float]:
    """Median seconds of each part of a step, forward and backward, of a plain model or a
    `ThreadedDataParallel`.
    """
    parts = parts_in_turn({"it": model}, images, labels, rounds)["it"]
    return {name: measure.Spread.of(series).median for name, series in parts.items()}


def parts_in_turn(
    models: dict[str, nn.Module], images: torch.Tensor, labels: torch.Tensor, rounds: int = 5
) -> dict[str, dict[str, list[float]]]:
    """Seconds of each part of a step in each of `rounds` rounds, after one that does not count; the models
    take turns, so that a slow moment hits all of them.
    """
    laps = {
        name: measure.Laps(model.devices if isinstance(model, ThreadedDataParallel) else images.device)
        for name, model in models.items()
    }
    turn = list(models)
    for _ in range(rounds + 1):
        for name in turn:
            _timed_step(models[name], images, labels, laps[name])
        turn = [*turn[1:], turn[0]]
    return {name: {part: series[1:] for part, series in lap.seconds.items()} for name, lap in laps.items()}


def _timed_step(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, laps: measure.Laps) -> None:
    model.zero_grad()
    if isinstance(model, ThreadedDataParallel):
        places = model.devices
        pieces = laps("scatter", scatter, ((images,), {}), places)
        replicas = laps("replicate", replicate, model.module, places[: len(pieces)])
        outputs = laps("forward", parallel_apply, replicas, pieces, model.threads)
        logits = laps("gather", gather, outputs, places[0])
    else:
        logits = laps("forward", model, images)
    laps("backward", F.cross_entropy(logits, labels).backward)


def gain_in_turn(plain: dict[str, list[float]], threaded: dict[str, list[float]]) -> measure.Spread:
    """How many times as fast the second one's steps are, round by round, of `parts_in_turn`."""
    wholes = ([sum(parts) for parts in zip(*one.values(), strict=True)] for one in (plain, threaded))
    return measure.Spread.of([slow / fast for slow, fast in zip(*wholes, strict=True)])


def predicted_step(plain: dict[str, float], threaded: dict[str, float], replicas: int) -> float:
    """Seconds of a step if only the forward pass were shared out, perfectly: Amdahl's law with `step_parts`'
    overheads.

    `backward` counts whole: on a CPU autograd has one queue for all replicas. Each GPU has a queue of its
    own.
    """
    return (
        plain["forward"] / replicas
        + plain["backward"]
        + sum(threaded[name] for name in ("scatter", "replicate", "gather"))
    )
