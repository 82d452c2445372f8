"""torch's own mp.spawn beside a notebook: its workers end with it, and what they write is kept."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch.multiprocessing as mp
from torch.utils.data import DataLoader

from companion import launch

WORKERS = """import os, sys, time
import torch.distributed as dist
from companion import launch

launch.end_with_parent()

def wait(rank, folder):
    open(f"{folder}/{rank}-{os.getpid()}", "w").close()
    # In native code, where no signal of Python is seen: rank 2 never comes.
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=3)
"""
PARENT = """import sys, time
sys.path.insert(0, sys.argv[1])
import torch.multiprocessing as mp
from companion import scratch
import workers

if __name__ == "__main__":
    scratch.folder()
    mp.spawn(workers.wait, (sys.argv[1],), nprocs=2)
"""


def pids(folder: Path) -> list[int]:
    return [int(path.name.split("-")[1]) for path in folder.glob("?-*")]


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM])
def test_workers_that_wait_end_when_their_parent_is_killed(ending, tmp_path, monkeypatch):
    (tmp_path / "t").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "t"))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", launch.loopback())
    (tmp_path / "workers.py").write_text(WORKERS)
    (tmp_path / "parent.py").write_text(PARENT)
    with (tmp_path / "said").open("w") as said:
        parent = subprocess.Popen([sys.executable, tmp_path / "parent.py", tmp_path], stderr=said)
    end = time.monotonic() + 90
    while len(pids(tmp_path)) < 2 and time.monotonic() < end:
        assert parent.poll() is None, (tmp_path / "said").read_text()
        time.sleep(0.05)
    workers = [psutil.Process(pid) for pid in pids(tmp_path)]
    parent.send_signal(ending)
    parent.wait(timeout=30)
    gone, alive = psutil.wait_procs(workers, timeout=30)
    assert len(gone) == 2, f"left behind: {alive}"
    end = time.monotonic() + 20
    while list((tmp_path / "t").iterdir()) and time.monotonic() < end:
        time.sleep(0.02)
    assert not list((tmp_path / "t").iterdir())


def test_a_process_that_nobody_started_goes_on():
    launch.end_with_parent()
    assert os.getppid()


def fails(rank):
    print("a line of the worker")
    raise ValueError(f"rank {rank} fails")


def test_what_workers_write_is_kept_from_the_terminal(capfd, caplog):
    with launch.overheard() as said, pytest.raises(mp.ProcessRaisedException, match="rank 0 fails"):
        mp.spawn(fails, nprocs=1)
    assert "a line of the worker" in said
    print("back again")
    os.write(1, b"by descriptor\n")
    shown = capfd.readouterr().out
    assert "back again" in shown
    assert "by descriptor" in shown
    assert "a line of the worker" not in shown


class Indices:
    def __len__(self):
        return 4

    def __getitem__(self, i):
        return i


def loads(how, of_a_cell):
    """Batches of a DataLoader with a worker, in a rank; its class or its function is one of a cell."""
    names = vars(sys.modules["__main__"])
    exec("class Cells:\n    __len__ = lambda self: 4\n    __getitem__ = lambda self, i: i\n", names)
    images = names["Cells"]() if of_a_cell == "a class" else Indices()
    collate = (lambda batch: batch) if of_a_cell == "a function" else None
    return list(DataLoader(images, 2, num_workers=1, multiprocessing_context=how, collate_fn=collate))


@pytest.mark.parametrize("how", ["spawn", "forkserver"])
@pytest.mark.parametrize("of_a_cell", ["a class", "a function"])
def test_workers_of_a_dataloader_that_cannot_have_it_are_explained(how, of_a_cell):
    with pytest.raises(launch.WorkerError, match=r"DataLoader.*put it in a file"):
        launch.run(loads, 1, how, of_a_cell, device="cpu")


def test_forked_workers_of_a_dataloader_can_have_it():
    assert len(launch.run(loads, 1, "fork", "a class", device="cpu")[0]) == 2
