"""Cuts a model into stages that run one after another, each handing a single tensor to the next, and balances
their times.

    layers = splitting.profile(model, images)      # where it can be cut, and how long each layer takes here
    at = splitting.balanced(layers, stages=4)      # the layers after which to cut
    stages = splitting.split(model, at)            # modules that share the model's parameters
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from companion import measure, modules, stages
from companion.tracing import SplitError as SplitError
from companion.tracing import follow


def split(model: nn.Module, at: str | Sequence[str], example: torch.Tensor | None = None) -> list[nn.Module]:
    """Stages of `model`, cut after each layer or block named in `at` ("features.5"); they share the model's
    parameters and buffers, and compute what it computes in training and in eval mode.

    With an `example` of the input `[N, ...]`, two samples or more, that is tried: outputs and gradients in
    both modes, twice each. Modules whose forward does what a graph would lose (see `tracing`) are left whole,
    and there is no cut inside them.

    Raises SplitError, a ValueError: for a name after which no cut is possible, saying why; for a model whose
    own forward cannot be followed, with its line; for stages that do not compute what the model does.
    """
    at = [at] if isinstance(at, str) else list(at)
    known = dict(model.named_modules())
    followed = follow(model, [known[name] for name in at if known.get(name) not in (None, model)])
    cuts = stages.cuts(followed, example)
    for name in at:
        if name not in cuts:
            why = stages.why_not(followed, name)
            raise SplitError(
                f"{type(model).__name__} cannot be cut after {name!r}: {why}; use one of {', '.join(cuts)}"
            )
    order = list(cuts)
    if len(set(at)) != len(at) or sorted(at, key=order.index) != at:
        raise SplitError(f"the cuts {at} are not in the order of the model, each once: {', '.join(order)}")
    if at and at[-1] == order[-1]:
        raise SplitError(f"nothing comes after {at[-1]!r}, the last layer")
    made = stages.between(followed, [cuts[name] for name in at], model.training)
    if example is not None:
        check(model, made, example)
    return made


def check(
    model: nn.Module, made: Sequence[nn.Module], example: torch.Tensor, tolerance: float = 1e-4
) -> None:
    """Raises SplitError unless the stages give the model's outputs and gradients on `example` `[N, ...]`, in
    training and in eval mode (of a single sample in the model's own, since BatchNorm needs two to train on),
    in two calls each; both are left as they were.

    `tolerance` is of the largest value.
    """
    parts = list(dict.fromkeys([*model.modules(), *(part for stage in made for part in stage.modules())]))
    before = {part: part.training for part in parts}
    try:
        for training in (True, False) if len(example) > 1 else (model.training,):
            model.train(training)
            for stage in made:
                stage.train(training)
            expected, found = (_calls(model, way, example) for way in ([model], made))
            for what, a, b in zip(("output", "gradient") * 2, expected, found, strict=True):
                apart = max(
                    (x - y).abs().max().item() / max(x.abs().max().item(), 1e-12)
                    for x, y in zip(a, b, strict=True)
                )
                if not apart <= tolerance:
                    mode = "training" if training else "eval"
                    raise SplitError(
                        f"the stages of {type(model).__name__} do not compute what it does: in {mode} mode, "
                        f"{what} {apart:.1%} off. Does its forward change from call to call?"
                    )
    finally:
        for part, mode in before.items():
            part.training = mode


def _calls(model: nn.Module, way: Sequence[nn.Module], example: torch.Tensor) -> list[list[torch.Tensor]]:
    """Outputs and gradients of two calls in a row, which begin with the same random numbers."""
    found = []
    with modules.unchanged(model):
        torch.manual_seed(0)
        for _ in range(2):
            value = example
            for part in way:
                value = part(value)
            model.zero_grad()
            if value.requires_grad:
                value.float().pow(2).sum().backward()
            found.append([value.detach().float()])
            found.append(
                [p.grad.clone() for p in model.parameters() if p.grad is not None] or [torch.zeros(1)]
            )
    return found


@dataclass(frozen=True)
class Layer:
    """What lies between two possible cuts: median seconds of its passes, bytes of its parameters and of what
    it hands on.
    """

    name: str
    forward_seconds: float
    backward_seconds: float
    parameter_bytes: int
    output_bytes: int

    @property
    def seconds(self) -> float:
        return self.forward_seconds + self.backward_seconds


def profile(model: nn.Module, images: torch.Tensor, rounds: int = 5) -> list[Layer]:
    """Measures every layer on `images` `[N, ...]`, on the device the model is on; gradients and buffers stay
    as they were. Tries, on the first two images, that the stages compute what the model does.

    Raises SplitError for a model that cannot be followed, or is not what its stages are.
    """
    followed = follow(model)
    cuts = stages.cuts(followed, images[:2])
    names = list(cuts)
    made = stages.between(followed, [cuts[name] for name in names[:-1]], model.training)
    check(model, made, images[:2])
    laps, sizes = measure.Laps(images.device), [0] * len(made)
    with modules.unchanged(model):
        for _ in range(rounds + 1):
            model.zero_grad()
            value, passes = images, []
            for number, stage in enumerate(made):
                given = value.detach().clone().requires_grad_(number > 0 and value.is_floating_point())
                value = laps(f"{number} forward", stage, given)  # [N, ...], what this stage hands on
                passes.append((given, value))
                sizes[number] = value.nbytes
            gradient = torch.ones_like(value)  # of the sum of all outputs
            for number, (given, value) in reversed(list(enumerate(passes))):
                backward = value.backward if value.requires_grad else lambda gradient: None
                laps(f"{number} backward", backward, gradient)
                gradient = given.grad
    seconds = {name: spread.median for name, spread in laps.spreads().items()}
    return [
        Layer(name, seconds[f"{i} forward"], seconds[f"{i} backward"], _bytes(stage), size)
        for i, (name, stage, size) in enumerate(zip(names, made, sizes, strict=True))
    ]


def _bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def balanced(layers: Sequence[Layer], stages: int) -> list[str]:
    """The layers after which to cut so that the slowest of `stages` stages is as fast as can be; each has
    parameters to train.
    """
    learning = sum(layer.parameter_bytes > 0 for layer in layers)
    if not 1 <= stages <= learning:
        raise SplitError(
            f"{learning} layers with parameters cannot make {stages} stages; use 1 to {learning}"
        )
    seconds, parameters = [0.0], [0]
    for layer in layers:
        seconds.append(seconds[-1] + layer.seconds)
        parameters.append(parameters[-1] + layer.parameter_bytes)
    # best[n][i]: the slowest of n stages made of the first i layers, and where the last of them begins
    best: list[dict[int, tuple[float, int]]] = [{0: (0.0, 0)}]
    for _ in range(stages):
        ways = {
            i: [
                (max(slowest, seconds[i] - seconds[j]), j)
                for j, (slowest, _) in best[-1].items()
                if parameters[j] < parameters[i]
            ]
            for i in range(1, len(layers) + 1)
        }
        best.append({i: min(way) for i, way in ways.items() if way})
    ends, i = [], len(layers)
    for n in range(stages, 1, -1):
        i = best[n][i][1]
        ends.append(layers[i - 1].name)
    return ends[::-1]


def stage_seconds(layers: Sequence[Layer], at: Sequence[str]) -> list[float]:
    """Seconds of forward and backward of each stage, by the layers' measured times."""
    sums = [0.0]
    for layer in layers:
        sums[-1] += layer.seconds
        if layer.name in at:
            sums.append(0.0)
    return sums
