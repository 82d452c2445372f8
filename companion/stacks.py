"""What depends on the version of torch, decided here and nowhere else."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Stack:
    """A set of versions that fit together and that everything is tested on."""

    name: str
    constraints: str  # the file that pins it
    has_torch_xla: bool  # torch_xla's last release needs exactly torch 2.9; torch_tpu takes its place
    torchao: str  # the releases that work with its torch


TABLE = {
    (2, 9): Stack("reference", "constraints.txt", has_torch_xla=True, torchao="0.15.*"),
    (2, 15): Stack("newest", "constraints-newest.txt", has_torch_xla=False, torchao="0.18.*"),
}


def current() -> Stack:
    """The entry for the installed torch; between two entries, the newer one's rules hold."""
    return TABLE[min((version for version in TABLE if version >= _installed()), default=max(TABLE))]


def _installed() -> tuple[int, ...]:
    return tuple(int(part) for part in torch.__version__.split(".")[:2])


def has_right_pipeline_warm_up() -> bool:
    """Whether torch.distributed.pipelining's first messages have the same type at both ends, which gloo
    insists on.
    """
    return _installed() >= (2, 13)
