"""The one training loop of all notebooks, and the one evaluation."""

import math
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from companion import checkpoint as checkpoint_files
from companion import devices, modules, randomness
from companion.data import Batches, Split, Splits
from companion.recipe import History as History
from companion.recipe import Recipe as Recipe

Step = Callable[[nn.Module, torch.Tensor, torch.Tensor, Callable, torch.optim.Optimizer], torch.Tensor]
_CHECK_EVERY = 50  # steps between looks at the loss on an accelerator, where each look waits for the device


@dataclass(frozen=True)
class Evaluation:
    """Mean cross-entropy, accuracy from 0 to 1 and logits `[N, classes]` (on the CPU) over a split."""

    loss: float
    accuracy: float
    logits: torch.Tensor


def seed_everything(seed: int) -> None:
    """Seeds Python's, NumPy's and torch's random numbers, on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimizer over the model's parameters, in its fused version where the device has one."""
    parameters = list(model.parameters())
    options = {
        "lr": recipe.learning_rate,
        "weight_decay": recipe.weight_decay,
        "fused": parameters[0].device.type in ("cpu", "cuda", "mps"),
    }
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=0.9, **options)
    return torch.optim.AdamW(parameters, **options)


def plain_step(model, images, labels, loss_function, optimizer) -> torch.Tensor:
    """One training step, as in any textbook; gives the loss before the update."""
    optimizer.zero_grad()
    loss = loss_function(model(images), labels)
    loss.backward()
    optimizer.step()
    return loss.detach()


def stepper(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A training step of SGD on one batch, to be called again and again; the weights hardly change. It keeps
    no gradients: several models in turn would hold the memory of all.
    """
    optimizer = make_optimizer(model, Recipe(learning_rate=1e-7, optimizer="sgd"))

    def step() -> torch.Tensor:
        loss = plain_step(model, images, labels, F.cross_entropy, optimizer)
        optimizer.zero_grad()
        return loss

    return step


def amp_step(device_type: str, dtype: torch.dtype, scaler: torch.amp.GradScaler | None = None) -> Step:
    """A step whose forward pass is in mixed precision; `scaler` keeps float16 gradients from vanishing."""
    scaler = scaler or torch.amp.GradScaler(device_type, enabled=False)

    def step(model, images, labels, loss_function, optimizer) -> torch.Tensor:
        optimizer.zero_grad()
        with torch.autocast(device_type, dtype):
            loss = loss_function(model(images), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.detach()

    return step


def fit(
    model: nn.Module,
    splits: Splits,
    recipe: Recipe | None = None,
    *,
    device: torch.device | str = "auto",
    step: Step | None = None,
    batches: Iterable | None = None,
    checkpoint: str | Path | None = None,
    validate: bool = True,
    progress: bool = True,
) -> History:
    """Trains `model` in place on `splits.train` and gives what was measured; validates on `splits.val` after
    each epoch.

    `step(model, images, labels, loss_function, optimizer)` does one update and gives the loss: pass a
    technique's own. `batches` replaces the recipe's batches by any iterable with a length that gives (images,
    labels) on any device; with a step of your own both may be nested (dictionaries of tokens and masks).
    `checkpoint` names a file written after each epoch; if it is there, training goes on from it, to the very
    same weights as a run that was never interrupted (Python's, NumPy's and torch's random numbers go on where
    they were). Modules that were in eval mode in a model in training mode stay so: a BatchNorm frozen for
    fine-tuning. With a fixed seed, a CPU gives the same weights bit for bit.

    Raises ValueError for settings that contradict each other, FloatingPointError (step and learning rate
    named) when the loss is not finite, RuntimeError for a checkpoint that is damaged or of another recipe.
    """
    recipe = recipe or Recipe()
    if step and recipe.amp:
        raise ValueError(
            f"amp={recipe.amp!r} has no effect on a step of your own; use torch.autocast inside it"
        )
    device = device if isinstance(device, torch.device) else devices.select(device)
    modules.move(model, device, torch.channels_last if recipe.channels_last else torch.preserve_format)
    if batches is None:
        batches = Batches(
            splits.train, recipe.batch_size, device, recipe.augment, drop_last=True, seed=recipe.seed
        )
    if not len(batches):
        raise ValueError("there is no batch to train on: `batches` is empty")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            f"{type(model).__name__} has no parameter that requires a gradient: nothing to train"
        )
    run = _Run(model, recipe, device, step, batches)
    history = run.resumed(Path(checkpoint)) if checkpoint else None
    if history is None:
        history = History()
        seed_everything(recipe.seed)

    done, steps = len(history.train_loss), len(batches)
    with tqdm(
        total=recipe.epochs * steps, initial=done * steps, unit="step", disable=not progress, leave=False
    ) as bar:
        for epoch in range(done, recipe.epochs):
            run.epoch(epoch, history, bar)
            if validate:
                result = evaluate(model, splits.val)
                history.val_loss.append(result.loss)
                history.val_accuracy.append(result.accuracy)
                bar.set_postfix(val_accuracy=f"{result.accuracy:.3f}")
            if checkpoint:
                run.save(Path(checkpoint), history)
    return history


class _Run:
    """A training under way: what changes with each step, and the recipe that it follows."""

    def __init__(
        self, model: nn.Module, recipe: Recipe, device: torch.device, step: Step | None, batches: Iterable
    ):
        self.model, self.recipe, self.device, self.batches = model, recipe, device, batches
        self.modes = modules.for_training(model)
        self.optimizer = make_optimizer(model, recipe)
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.amp == "float16")
        amp = amp_step(device.type, getattr(torch, recipe.amp), self.scaler) if recipe.amp else plain_step
        self.step = step or amp
        steps = recipe.epochs * len(batches)
        one_cycle = recipe.schedule == "onecycle" and steps > 1
        schedule = torch.optim.lr_scheduler.OneCycleLR
        self.scheduler = (
            schedule(self.optimizer, recipe.learning_rate, total_steps=steps) if one_cycle else None
        )

    def loss_function(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(_logits(logits), labels, label_smoothing=self.recipe.label_smoothing)

    def epoch(self, epoch: int, history: History, bar: tqdm) -> None:
        """One pass over the batches; adds what it measured to the history."""
        modules.restore(self.modes)
        if hasattr(self.batches, "set_epoch"):
            self.batches.set_epoch(epoch)
        losses, rates, samples, before = [], [], 0, epoch * len(self.batches)
        check_every = 1 if self.device.type == "cpu" else _CHECK_EVERY
        devices.synchronize(self.device)
        start = time.perf_counter()
        for images, labels in self.batches:
            rates.append(self.optimizer.param_groups[0]["lr"])
            losses.append(self.update(images, labels))
            samples += devices.samples((labels, images))
            bar.update()
            if len(losses) % check_every == 0 and not math.isfinite(losses[-1]):
                _check_finite(losses[-check_every:], rates[-check_every:], epoch, before + len(losses))
        _check_finite(losses, rates, epoch, before + len(losses))
        devices.synchronize(self.device)
        history.epoch_seconds.append(time.perf_counter() - start)
        history.epoch_samples.append(samples)
        history.learning_rate.append(rates[-1])
        history.train_loss.append(float(torch.stack(losses).mean()))

    def update(self, images: object, labels: object) -> torch.Tensor:
        """One step: of the weights, and of the learning rate; gives the loss."""
        images, labels = devices.put((images, labels), self.device)
        if self.recipe.channels_last and isinstance(images, torch.Tensor):
            images = images.contiguous(memory_format=torch.channels_last)
        loss = self.step(self.model, images, labels, self.loss_function, self.optimizer)
        devices.end_step(self.device)
        if self.scheduler:
            self.scheduler.step()
        return loss

    def parts(self) -> dict[str, object]:
        """What a checkpoint holds the state of."""
        parts = {"model": self.model, "optimizer": self.optimizer, "scaler": self.scaler}
        return parts | ({"scheduler": self.scheduler} if self.scheduler else {})

    def save(self, path: Path, history: History) -> None:
        contents = {name: part.state_dict() for name, part in self.parts().items()}
        contents |= {"settings": asdict(self.recipe), "history": asdict(history)}
        checkpoint_files.save(path, contents | {"random": randomness.state(self.device)})

    def resumed(self, path: Path) -> History | None:
        """The history so far, everything else as it was then; None where there is no checkpoint yet."""
        saved = checkpoint_files.load(path, asdict(self.recipe))
        if saved is None:
            return None
        if not randomness.state().keys() <= saved["random"].keys():
            raise RuntimeError(
                f"checkpoint {path} is of an older version of this suite: delete it to start again"
            )
        shapes, theirs = (
            {name: tuple(tensor.shape) for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
            for state in (self.model.state_dict(), saved["model"])
        )
        if unlike := sorted({name for name, _ in shapes.items() ^ theirs.items()}):
            then, now = (state.get(unlike[0], "not there") for state in (theirs, shapes))
            raise RuntimeError(
                f"checkpoint {path} is of another model ({unlike[0]} was {then}, and is {now}): name another "
                "file, or delete it"
            )
        for name, part in self.parts().items():
            part.load_state_dict(saved[name])
        randomness.set_state(saved["random"], self.device)
        return History(**saved["history"])


@torch.no_grad()  # inference_mode would do, but torch_xla 2.9 refuses it
def evaluate(model: nn.Module, split: Split, batch_size: int = 250) -> Evaluation:
    """The model's loss, accuracy and logits over a split, on the device the model is on; each of its modules
    keeps its mode.

    On a 2-core CPU LeNet5 judged 2,000 images 1.4 to 1.6 times as fast in batches of about 250 as of 1,000.
    """
    held = [*model.parameters(), *model.buffers()]
    device = held[0].device if held else torch.device("cpu")  # a quantized model may hold neither
    with modules.evaluating(model):
        parts = split.images.split(batch_size)
        logits = [_logits(model(images.to(device))).float().cpu() for images in parts]
    logits = torch.cat(logits)
    labels = split.labels.cpu()
    accuracy = (logits.argmax(1) == labels).double().mean().item()
    return Evaluation(F.cross_entropy(logits, labels).item(), accuracy, logits)


def _logits(output: object) -> torch.Tensor:
    """The model's output; raises TypeError where it is no tensor."""
    if isinstance(output, torch.Tensor):
        return output
    raise TypeError(
        f"the model gives a {type(output).__name__} where one tensor of logits [N, classes] is needed: wrap "
        "it in a module that gives that one; to train, a step of your own may do as it likes (fit(step=...))"
    )


def _check_finite(losses: list[torch.Tensor], rates: list[float], epoch: int, last_step: int) -> None:
    finite = torch.stack(losses).isfinite()
    if finite.all():
        return
    first = int((~finite).int().argmax())
    step = last_step - len(losses) + first + 1
    raise FloatingPointError(
        f"the loss is {float(losses[first])} at step {step} (epoch {epoch + 1}), learning rate "
        f"{rates[first]:.3g}: "
        "lower the learning rate, or look for a division by zero or an overflow in the model"
    )
