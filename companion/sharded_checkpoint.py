"""Checkpoints that all ranks write together, each its part: read by any number of ranks, and only if whole.

Called in each rank, where the default process group is ready. Source: torch.distributed.checkpoint.
"""

import json
import os
import shutil
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.utils._pytree import tree_flatten, tree_unflatten

WHOLE = "checksums.json"  # written last, in one move: a folder without it is no checkpoint
CHUNK_BYTES = 2**20


def save(model: nn.Module, optimizer: torch.optim.Optimizer, folder: str | Path) -> None:
    """Writes a checkpoint to which each rank adds its own part; called by all ranks together.

    Raises RuntimeError, on all ranks, if a part cannot be written, saying which rank's and why.
    """
    try:
        _write(_state(model, optimizer), folder)
    except checkpoint.CheckpointException as error:
        raise RuntimeError(_unwritten(folder, error)) from error


def _write(state: dict[str, object], folder: str | Path, group: dist.ProcessGroup | None = None) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TypedStorage is deprecated")  # torch's own
        checkpoint.save(state, checkpoint_id=str(folder), process_group=group)
    # Each rank reads what it has written; torch's own reader looks at no checksum.
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    own = {path.name: _checksum(path) for path in Path(folder).glob(f"__{rank}_*")}
    found = [None] * ranks if rank == 0 else None
    dist.gather_object(own, found, dst=0, group=group)
    reason = [_sealed(Path(folder), found) if rank == 0 else ""]
    dist.broadcast_object_list(reason, src=0, group=group)
    if reason[0]:
        raise RuntimeError(f"a checkpoint in {folder} cannot be written: rank 0: {reason[0]}")


def _sealed(folder: Path, found: list[dict[str, int]]) -> str:
    """Writes the checksums of all ranks' files, which makes the checkpoint a whole one; or says why not."""
    part = folder / (WHOLE + ".part")
    try:
        sums = {name: number for one in found for name, number in one.items()}
        part.write_text(json.dumps(sums | {".metadata": _checksum(folder / ".metadata")}))
        os.replace(part, folder / WHOLE)
    except OSError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _checksum(path: Path) -> int:
    number = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            number = zlib.crc32(chunk, number)
    return number


def _damaged(folder: Path) -> list[str]:
    """The files that are not as they were written; each rank looks at its share of them."""
    together = dist.is_initialized()
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
    try:
        sums = json.loads((folder / WHOLE).read_text())
    except ValueError:  # on all ranks alike
        return [WHOLE]
    mine = sorted(sums)[rank::ranks]
    wrong = [name for name in mine if not (folder / name).is_file() or _checksum(folder / name) != sums[name]]
    if not together:
        return wrong
    found: list[list[str]] = [[] for _ in range(ranks)]
    dist.all_gather_object(found, wrong)
    return sorted(name for one in found for name in one)


def load(model: nn.Module, optimizer: torch.optim.Optimizer, folder: str | Path) -> None:
    """Reads a checkpoint of `save` into a model that may be laid out over another number of ranks, or over
    none; called by all ranks together, and nothing is changed if it fails before it reads.

    Raises RuntimeError for a folder that holds no complete checkpoint, a damaged one, or one of another
    model.
    """
    if not Path(folder, WHOLE).is_file():
        raise RuntimeError(f"{folder} holds no complete checkpoint: its {WHOLE} is missing")
    if damaged := _damaged(Path(folder)):
        raise RuntimeError(f"{folder} is damaged ({', '.join(damaged)}): delete it to use an earlier one")
    state = _state(model, optimizer)
    try:
        checkpoint.load(state, checkpoint_id=str(folder))
    except checkpoint.CheckpointException as error:
        raise RuntimeError(f"{folder} cannot be read into this model: {_first(error)}") from error
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, object]:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state}


def _first(error: checkpoint.CheckpointException) -> str:
    rank, (reason, _) = next(iter(error.failures.items()))
    return f"rank {rank}: {type(reason).__name__}: {reason}"


def _unwritten(folder: str | Path, error: checkpoint.CheckpointException) -> str:
    place = next(path for path in (Path(folder), *Path(folder).absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free / 2**20
    return f"a checkpoint in {folder} cannot be written: {_first(error)}; {free:,.0f} MiB are free there"


def steps(folder: str | Path) -> list[int]:
    """The steps after which a whole checkpoint was written, in order; none for a folder that is not there."""
    found = [path.parent.name.removeprefix("step-") for path in Path(folder).glob(f"step-*/{WHOLE}")]
    return sorted(int(name) for name in found if name.isdigit())


class Checkpoints:
    """A training's checkpoints, one folder for each: `FOLDER/step-10`. Made in each rank; the folder is one
    that all ranks see.

    With `asynchronous` they are written beside the training, from a copy of what is to be saved; the next
    `save`, or `wait`, waits for the one before. `keep` whole ones are left, and what was interrupted goes.
    `stalls` are the seconds that each `save` took of the training.
    """

    def __init__(self, folder: str | Path, keep: int = 2, asynchronous: bool = False):
        self.folder, self.keep, self.asynchronous = Path(folder), keep, asynchronous
        # A thread writes: it must not send into the group in which DDP sends at the same time.
        self.group = dist.new_group(backend="gloo") if asynchronous else None
        self.thread = ThreadPoolExecutor(1) if asynchronous else None
        self.staged: dict[str, object] = {}
        self.writing, self.stalls, self.last = None, [], 0

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Begins to write, or writes, the checkpoint after so many steps.

        Raises RuntimeError as `save` does, asynchronously one `save` later; and if another training, such as
        a machine that was cut off and goes on alone, writes into the same folder.
        """
        start = time.perf_counter()
        self.wait()
        if others := [other for other in steps(self.folder) if other > self.last]:
            raise RuntimeError(
                f"{self.folder} has a checkpoint of step {others[-1]} that this training did not write: "
                "another one writes into the same folder"
            )
        self.last = step
        place = self.folder / f"step-{step}"
        if self.asynchronous:
            self._stage(_state(model, optimizer))
            self.writing = self.thread.submit(_write, self.staged, place, self.group)
        else:
            save(model, optimizer, place)
            self._tidy()
        self.stalls.append(time.perf_counter() - start)

    def wait(self) -> None:
        """Until what is being written is written."""
        if self.writing is None:
            return
        writing, self.writing = self.writing, None
        try:
            writing.result()
        except checkpoint.CheckpointException as error:
            raise RuntimeError(_unwritten(self.folder, error)) from error
        self._tidy()

    def resume(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Reads the last whole checkpoint, and gives the number of steps done: 0 if there is none."""
        newest = [max(steps(self.folder), default=0)]
        dist.broadcast_object_list(newest)  # all ranks read the same one, even while another is being written
        if newest[0]:
            load(model, optimizer, self.folder / f"step-{newest[0]}")
        if dist.get_rank() == 0:
            self._interrupted(newest[0])
        dist.barrier()
        self.last = newest[0]
        return newest[0]

    def _stage(self, state: dict[str, object]) -> None:
        """Copies what is to be written into main memory, each time to the same place: new memory would cost
        more time than the copy.
        """
        now, places = tree_flatten(state)
        before, known = tree_flatten(self.staged)
        if places != known:
            before = [
                value.to("cpu", copy=True) if isinstance(value, torch.Tensor) else value for value in now
            ]
        for number, value in enumerate(now):
            if isinstance(value, torch.Tensor):
                before[number].copy_(value)
            else:
                before[number] = value
        self.staged = tree_unflatten(before, places)

    def _tidy(self) -> None:
        if dist.get_rank() == 0:
            for step in steps(self.folder)[: -self.keep]:
                shutil.rmtree(self.folder / f"step-{step}")

    def _interrupted(self, newest: int) -> None:
        for path in self.folder.glob("step-*"):
            if path.name != f"step-{newest}" and not (path / WHOLE).is_file():
                shutil.rmtree(path)
