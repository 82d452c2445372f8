"""What a TPU would say to your model, asked on a laptop: Google's own compiler, without a TPU.

    verdict = preflight.check(model, images, labels, optimizer, chip="v5e", chips=8)
    print(verdict)

The compiler runs in a child process, in an environment of its own (`make preflight`). It tells whether the
step compiles and fits, what it computes and moves, and what the devices send each other. Nothing is run: what
a step takes is a bound or the compiler's own estimate, never a measurement.
"""

import copy
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from companion import preflight_chips, preflight_compiler, preflight_key, preflight_words, tpu
from companion.launch import pickling
from companion.preflight_chips import CHIPS as CHIPS
from companion.preflight_compiler import PreflightError as PreflightError
from companion.preflight_compiler import why_not as why_not
from companion.preflight_words import Problem as Problem
from companion.preflight_words import Verdict as Verdict
from companion.preflight_words import read as read

CACHE = Path("results", "preflight")
LAYOUTS = ("replicated", "sharded")
DTYPES = ("float32", "bfloat16")
FORMAT = 1
TRIES, TOLERANCE, MOST = 8, 0.02, 2**24  # compilations after the first; of a batch; samples
Inputs = torch.Tensor | tuple[torch.Tensor, ...]


def check(
    model: nn.Module,
    example_input: Inputs,
    target: torch.Tensor | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    loss: Callable = F.cross_entropy,
    chip: str = "v5e",
    chips: int = 1,
    dtype: str = "float32",
    layout: str = "replicated",
    limit_seconds: float = 600.0,
    limit_bytes: float = 8 * 2**30,
    cache: str | Path | None = CACHE,
    progress: bool = True,
) -> Verdict:
    """Compiles a training step, or without `optimizer` the answers in the model's present mode, for a TPU.

    `example_input` is a batch `[N, ...]`, or several, and `target` what `loss(model(*inputs), target)` takes
    beside; only shapes and types are read, so a model on the meta device serves too. `optimizer` is SGD, Adam
    or AdamW over the model's parameters. `dtype` bfloat16 keeps the weights in float32 and computes in
    bfloat16. The batch is split over the devices; `layout` says whether each keeps all weights, or a part.
    BatchNorm sees the whole batch, not a device's share: so does XLA where one program runs on all devices.

    What the compiler said of the model is kept in `cache` by content, and then read from there. Raises
    ValueError for what cannot be asked, PreflightError where there is no compiler, or it gives no answer
    within the limits.
    """
    known, inputs = preflight_chips.chip(chip, chips), _inputs(example_input)
    _checked(inputs, target, optimizer, known.devices_per_chip * chips, dtype, layout)
    _rehearsed(model, inputs, target, loss)
    trained = None if optimizer is None else groups(model, optimizer)
    content = {
        "model": model,
        "inputs": inputs,
        "target": target,
        "loss": loss,
        "groups": trained,
        "chip": chip,
        "slice": known.slices[chips],
        "dtype": dtype,
        "layout": layout,
    }
    answer, path = _kept(content, cache)
    if answer is None:
        answer = preflight_compiler.ask(_request(content), limit_seconds, limit_bytes, progress)
        answer = _short(answer)
        if path and preflight_words.settled(answer):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(answer, indent=1) + "\n", encoding="utf-8")
    about = {"batch": len(inputs[0]), "chips": chips, "layout": layout, "dtype": dtype}
    return preflight_words.verdict(answer, known, training=optimizer is not None, **about)


@dataclass(frozen=True)
class Largest:
    """The largest batch that was seen to fit, what was foretold for it from smaller ones (bytes), and the
    smallest that was seen not to fit, if there was one.
    """

    fits: Verdict
    foretold_bytes: float
    refused: Verdict | None

    def __str__(self) -> str:
        gib = f"{self.fits.needed_bytes / 2**30:.2f} of {self.fits.memory_bytes / 2**30:.2f} GiB a device"
        text = f"the largest batch that was seen to fit: {self.fits.batch}, {gib}"
        if not math.isnan(self.foretold_bytes):
            text += f" (foretold from two smaller ones: {self.foretold_bytes / 2**30:.2f})"
        if self.refused is None:
            return text
        return f"{text}; a batch of {self.refused.batch} is refused"


def largest_batch(
    model: nn.Module,
    example_input: Inputs,
    target: torch.Tensor | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    **options: object,
) -> Largest:
    """The largest batch that fits, as near as TRIES compilations come: foretold from the batch given and from
    twice that, confirmed by compiling, and corrected where it does not fit, or leaves room.

    Takes what `check` takes. Raises ValueError if not even the given batch fits, or compiles.
    """
    inputs = _inputs(example_input)
    first = check(model, inputs, target, optimizer, **options)
    if not first.fits:
        raise ValueError(f"give a batch that fits, to begin with: {first}")

    def at(batch: int) -> Verdict:
        more = tuple(_of_size(one, batch) for one in inputs)
        return check(model, more, None if target is None else _of_size(target, batch), optimizer, **options)

    fits, refused, batch = [first], None, 2 * first.batch
    for _ in range(TRIES):
        found = at(batch)
        if found.fits:
            fits.append(found)
        else:
            refused = found
        batch = _next(fits[-2:], refused)
        if batch <= fits[-1].batch * (1 + TOLERANCE):
            break
    return Largest(fits[-1], _line(fits[-3:-1], fits[-1].batch), refused)


def _line(fits: list[Verdict], batch: int) -> float:
    """The bytes of a batch by the line through two others; not a number where there are not two."""
    if len(fits) < 2:
        return math.nan
    each = (fits[1].needed_bytes - fits[0].needed_bytes) / (fits[1].batch - fits[0].batch)
    return fits[1].needed_bytes + each * (batch - fits[1].batch)


def _next(fits: list[Verdict], refused: Verdict | None) -> int:
    """The batch that fills a device by the line through two that fit; where that was refused, one between:
    by the line to what was refused if that is near, else their geometric mean.
    """
    last = fits[-1]
    room, batch = last.memory_bytes - last.needed_bytes, MOST
    each = _line(fits, last.batch + 1) - last.needed_bytes if len(fits) > 1 else 0.0
    if each > 0:
        batch = int(last.batch + room / each)
    if refused and batch >= refused.batch:
        batch = math.isqrt(last.batch * refused.batch)
        if refused.batch < 2 * last.batch:
            each = (refused.needed_bytes - last.needed_bytes) / (refused.batch - last.batch)
            batch = int(last.batch + (1 - TOLERANCE / 2) * room / each)
    return min(batch, MOST) // last.devices * last.devices


def _of_size(tensor: torch.Tensor, batch: int) -> torch.Tensor:
    return torch.empty((batch, *tensor.shape[1:]), dtype=tensor.dtype, device="meta")


def _inputs(example: Inputs) -> tuple[torch.Tensor, ...]:
    inputs = (example,) if isinstance(example, torch.Tensor) else tuple(example)
    if not inputs or not all(isinstance(one, torch.Tensor) and one.dim() for one in inputs):
        raise ValueError("example_input is a batch [N, ...], or a tuple of such tensors")
    return inputs


def _checked(inputs, target, optimizer, devices: int, dtype: str, layout: str) -> None:
    """Raises ValueError for what cannot be asked."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: give one of {', '.join(DTYPES)}")
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r}: give one of {', '.join(LAYOUTS)}")
    if (target is None) != (optimizer is None):
        raise ValueError("a training step needs a target and an optimizer, answers alone neither of them")
    batch = len(inputs[0])
    if batch == 0 or batch % devices:
        raise ValueError(f"a batch of {batch} cannot be shared by {devices} devices evenly")
    others = [*inputs[1:], *([] if target is None else [target])]
    if any(one.dim() == 0 or len(one) % devices for one in others):
        raise ValueError(
            f"the first dimension of each input and of the target is shared by {devices} devices"
        )


def _rehearsed(model, inputs, target, loss) -> None:
    """The step's forward on the meta device, which computes nothing. Raises ValueError where shapes or types
    do not fit; where the code asks for values, the compiler will say where.
    """
    meta, given = _meta(model), [one.to("meta") for one in inputs]
    shapes = ", ".join(str(list(one.shape)) for one in inputs)
    what = f"{type(model).__name__} does not take {shapes}"
    try:
        with torch.no_grad():
            output = meta(*given)
            if target is None:
                return
            what = f"loss(output, target) fails for a target {list(target.shape)}"
            value = loss(output, target.to("meta"))
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        if "meta" in str(error).lower():
            return
        raise ValueError(f"{what}: {error}") from error
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        raise ValueError(f"loss(output, target) must be one number, not {getattr(value, 'shape', value)}")


def _meta(model: nn.Module) -> nn.Module:
    """A copy without values, which takes no memory for them."""
    kept = {
        id(tensor): torch.nn.Parameter(tensor.to("meta"), tensor.requires_grad)
        if isinstance(tensor, nn.Parameter)
        else tensor.to("meta")
        for tensor in (*model.parameters(), *model.buffers())
    }
    return copy.deepcopy(model, kept)


def groups(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[dict[str, object]]:
    """What the compiled step needs to know of an optimizer: its kind, and for each group the names of the
    parameters and the options. Raises ValueError for what is not known here.
    """
    kind = type(optimizer).__name__
    if type(optimizer) not in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
        raise ValueError(f"the optimizer is {kind}: SGD, Adam and AdamW are known here")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = []
    for group in optimizer.param_groups:
        for option in ("maximize", "amsgrad"):
            if group.get(option):
                raise ValueError(f"{kind}({option}=True) is not known here")
        if group.get("dampening"):
            raise ValueError(f"{kind}(dampening={group['dampening']}) is not known here")
        if any(id(parameter) not in names for parameter in group["params"]):
            raise ValueError("the optimizer trains a parameter that is not one of the model's")
        trained = [names[id(one)] for one in group["params"] if one.requires_grad]
        options = ("lr", "momentum", "nesterov", "weight_decay", "betas", "eps")
        values = {name: group[name] for name in options if name in group}
        values = {name: float(v) if isinstance(v, torch.Tensor) else v for name, v in values.items()}
        found.append({"kind": kind, "names": trained, **values})
    return found


def _request(content: dict[str, object]) -> dict[str, object]:
    """What the child is sent: the model without its weights' values, and where its code is found."""
    model, inputs, target = content["model"], content["inputs"], content["target"]
    tensors = [*model.parameters(), *model.buffers(), *inputs, *([] if target is None else [target])]
    thin = {
        "model": _meta(model),
        "inputs": tuple(one.to("meta") for one in inputs),
        "target": None if target is None else target.to("meta"),
        "loss": content["loss"],
    }
    rest = {name: value for name, value in content.items() if name not in thin}
    double = any(one.dtype in (torch.float64, torch.complex128) for one in tensors)
    return {**rest, "x64": double, "path": sys.path, "packed": pickling.pack(thin, "the model")}


def _short(answer: dict) -> dict:
    """The answer with the program's text read: its collectives, and how many operators have no estimate."""
    found = tpu.collectives(answer.pop("program", ""))
    answer["collectives"] = [[one.kind, one.nbytes, one.tensors] for one in found]
    # The compiler counts -1 s for each operator that it knows nothing of.
    answer["unknown"] = math.ceil(-answer["optimal_seconds"]) if answer.get("optimal_seconds", 0) < 0 else 0
    return answer


def _kept(content: dict[str, object], cache: str | Path | None) -> tuple[dict | None, Path | None]:
    """What was answered before, if it was, and the file in which the answer is kept, if it may be."""
    if cache is None:
        return None, None
    try:
        name = preflight_key.key(FORMAT, preflight_compiler.versions(), content)
    except preflight_key.UnknownError:
        return None, None
    path = Path(cache) / f"{name[:32]}.json"
    return (json.loads(path.read_text(encoding="utf-8")) if path.exists() else None), path
