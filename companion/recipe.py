"""How to train, and what a training has measured."""

import statistics
from dataclasses import dataclass, field

from companion.data import Augment


@dataclass(frozen=True)
class Recipe:
    """How to train. `amp` is None (float32), "bfloat16" or "float16"; `schedule` "onecycle" or "constant"."""

    epochs: int = 10
    batch_size: int = 64
    learning_rate: float = 4e-3
    optimizer: str = "adamw"
    weight_decay: float = 0.01
    schedule: str = "onecycle"
    label_smoothing: float = 0.0
    augment: Augment | None = None
    amp: str | None = None
    channels_last: bool = False
    seed: int = 0

    def __post_init__(self):
        choices = {
            "optimizer": ("adamw", "sgd"),
            "schedule": ("onecycle", "constant"),
            "amp": (None, "bfloat16", "float16"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is unknown; use one of {', '.join(map(repr, allowed))}"
                )
        for name in ("epochs", "batch_size", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0")


@dataclass
class History:
    """What `fit` measured, one entry an epoch.

    Accuracies are from 0 to 1, times in seconds, without the validation's.
    """

    train_loss: list[float] = field(default_factory=list)
    val_loss: list[float] = field(default_factory=list)
    val_accuracy: list[float] = field(default_factory=list)
    learning_rate: list[float] = field(default_factory=list)
    epoch_seconds: list[float] = field(default_factory=list)
    epoch_samples: list[int] = field(default_factory=list)

    @property
    def samples_per_second(self) -> float:
        """Median over the epochs; the first, which warms up, counts only if it is the only one."""
        rates = [n / s for n, s in zip(self.epoch_samples, self.epoch_seconds, strict=True)]
        return statistics.median(rates[1:] or rates)
