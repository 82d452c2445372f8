"""Everything that can go wrong in worker processes, made to happen.

    python tests/launch_faults.py --times 20 --seed 0

Each case runs in processes of its own, must be reported as it should, in time, and must leave no process
behind. The tests run each once; as a program this repeats them in a random order and prints a summary; it
ends with 1 if any failed.
"""

import argparse
import os
import random
import re
import resource
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from companion import launch

HANG_SECONDS = 60
MARK = (
    "COMPANION_TESTS"  # in the environment of all that these tests start; other tests may run on this machine
)
os.environ.setdefault(MARK, str(os.getpid()))
SLEEP = "86399"  # an argument of `sleep` by which its process can be told


def ours() -> set[int]:
    """Processes that come from this one: forked from a forkserver, with what they forked, and marked
    sleepers.
    """
    found = set()
    for process in psutil.process_iter(["cmdline", "status", "environ"]):
        words, theirs = " ".join(process.info["cmdline"] or []), (process.info["environ"] or {}).get(MARK)
        kind = "multiprocessing.forkserver" in words or f"sleep {SLEEP}" in words
        if kind and theirs == os.environ[MARK] and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.add(process.pid)
    return found


@contextmanager
def no_orphans(seconds: float = 20.0):
    """Fails if processes that were not there before are still there `seconds` after."""
    launch.run(int, 1)  # the forkserver itself stays
    before = ours()
    yield
    end = time.monotonic() + seconds
    while (left := ours() - before) and time.monotonic() < end:
        time.sleep(0.02)
    assert not left, f"left behind: {left}"


def failure(function, world_size: int = 2, *args, **options) -> launch.WorkerError:
    try:
        result = launch.run(function, world_size, *args, **options)
    except launch.WorkerError as error:
        return error
    raise AssertionError(f"no failure, but {result}")


def others_wait(rank: int) -> None:
    """All ranks but one wait in a barrier, for ever; that one goes on once they do."""
    pids = [0] * dist.get_world_size()
    dist.all_gather_object(pids, os.getpid())
    if dist.get_rank() != rank:
        dist.barrier()  # rank `rank` does not come
    for pid in set(pids) - {os.getpid()}:
        asleep(psutil.Process(pid))


def asleep(process: psutil.Process, looks: int = 5) -> None:
    """Waits until the process sleeps, at several looks in a row: in a barrier it does, before it, however
    busy, it does not.
    """
    seen = 0
    while seen < looks:
        time.sleep(0.02)
        seen = seen + 1 if process.status() == psutil.STATUS_SLEEPING else 0


# What the ranks do. Line numbers and sources are checked, so each culprit says so in a comment.


def raises(rank):
    others_wait(rank)
    raise ValueError("a bad value")  # culprit


def dies(rank, by):
    others_wait(rank)
    os.kill(os.getpid(), by)


def crashes(rank):
    others_wait(rank)
    import ctypes

    ctypes.string_at(0)  # culprit


def exits(rank, code):
    others_wait(rank)
    sys.exit(code)


def exits_at_once(rank):
    others_wait(rank)
    os._exit(7)


def one_more(rank):
    x = torch.ones(2)
    dist.all_reduce(x)
    if dist.get_rank() != rank:
        dist.all_reduce(x)  # culprit


def sleeps(rank):
    if dist.get_rank() == rank:
        time.sleep(1000)  # culprit


def spins(rank):
    while dist.get_rank() == rank:
        pass


def too_much_memory(rank):
    others_wait(rank)
    used = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
    torch.ones(2**30)  # culprit


def with_loader(rank, by):
    for _ in DataLoader(torch.arange(1000), batch_size=1, num_workers=2, persistent_workers=True):
        if dist.get_rank() == rank:
            os.kill(os.getpid(), by)
        time.sleep(0.02)


def with_child(rank):
    subprocess.Popen(["sleep", SLEEP])
    others_wait(rank)
    raise ValueError("the parent of a sleeper")


def gives_lock():
    return {"fine": 1, "lock": [threading.Lock()]}


def gives_much():
    from companion.launch import worker

    worker.RESULT_BYTES = 2**20
    return torch.zeros(2**20)


class Unloadable:
    def __reduce__(self):
        return int, ("not a number",)


class NeedsHintError(Exception):
    """Its message does not fit its arguments, so that it cannot be made again from them."""

    def __init__(self, code, *, hint):
        super().__init__(f"{code}: {hint}")


class WithoutTextError(Exception):
    def __str__(self):
        raise ZeroDivisionError


def gives_exception(rank):
    return NeedsHintError(3, hint="more") if dist.get_rank() == rank else None


def raises_odd(kind):
    if dist.get_rank() == 1:
        raise {
            "hint": NeedsHintError(3, hint="more"),
            "text": WithoutTextError(),
            "line": ValueError("\n \nsaid"),
        }[kind]


# The cases.


def exception():
    error = failure(raises, 3, 1)
    assert (error.rank, error.reason) == (1, "ValueError: a bad value")
    text = str(error)
    assert 'raise ValueError("a bad value")  # culprit' in text
    assert re.search(r'File "[^"]*launch_faults.py", line \d+, in raises', text)
    assert "ranks 0, 2 was at" not in text
    assert re.search(r"ranks 0, 2 were at .*, in others_wait: dist.barrier\(\)", text)
    assert "companion/launch/worker.py" not in text


def killed(by=signal.SIGKILL):
    error = failure(dies, 3, 2, by)
    assert error.rank == 2
    assert error.reason.startswith(f"killed by {signal.Signals(by).name}")


def terminated():
    killed(signal.SIGTERM)


def crash():
    error = failure(crashes, 2, 1)
    assert error.rank == 1
    assert error.reason.startswith("killed by SIGSEGV")


def stopped():
    """The ranks that time out wait for the one that says nothing: it is to blame."""
    error = failure(dies, 3, 1, signal.SIGSTOP, timeout_seconds=2)
    assert error.rank == 1, str(error)
    assert error.reason.startswith("gave no answer")
    assert re.search(r"rank [02] waited: .*(time-?out|timed out)", str(error), re.IGNORECASE)


def odd_exceptions():
    for kind, reason in (
        ("hint", "NeedsHintError: 3: more"),
        ("text", "WithoutTextError: its message cannot be had, str() raises ZeroDivisionError"),
        ("line", "ValueError: said"),
    ):
        error = failure(raises_odd, 2, kind)
        assert (error.rank, error.reason) == (1, reason)
        assert "in raises_odd" in error.place


def unloadable_result():
    error = failure(gives_exception, 2, 1)
    assert error.rank == 1
    assert "its result cannot be unpickled: TypeError" in error.reason


def system_exit():
    error = failure(exits, 2, 0, 3)
    assert (error.rank, error.reason) == (0, "SystemExit: 3")


def exit_at_once():
    error = failure(exits_at_once, 2, 1)
    assert (error.rank, error.reason) == (1, "its process ended with exit code 7")


def unequal_collectives():
    error = failure(one_more, 3, 1, timeout_seconds=1)
    text = str(error)
    assert error.rank in (0, 2)
    assert re.search("time-?out|timed out", text, re.IGNORECASE)
    assert "rank 1 had returned" in text
    other = 2 - error.rank
    assert re.search(
        rf"rank {other} (failed too: .*, at|was at) .*in one_more: dist.all_reduce\(x\)  # culprit", text
    )


def too_long():
    error = failure(sleeps, 3, 1, limit_seconds=8)  # a busy machine must have started all by then
    assert error.rank is None
    assert "time-out: not all ranks returned within 8 s" in str(error)
    assert "ranks 0, 2 had returned" in str(error)
    assert re.search(r"rank 1 was at .*, in sleeps: time.sleep\(1000\)  # culprit", str(error))


def busy():
    error = failure(spins, 2, 0, limit_seconds=8)
    assert re.search(r"rank 0 was at .*, in spins: ", str(error))


def out_of_memory():
    error = failure(too_much_memory, 2, 1)
    assert error.rank == 1
    assert "memory" in error.reason
    assert "torch.ones(2**30)  # culprit" in str(error)


def killed_with_loader():
    error = failure(with_loader, 2, 1, signal.SIGKILL)
    assert error.rank == 1
    assert error.reason.startswith("killed by SIGKILL")


def child_left():
    assert failure(with_child, 2, 0).reason == "ValueError: the parent of a sleeper"


def unsendable_result():
    error = failure(gives_lock)
    assert "the result of rank " in error.reason
    assert "['lock'][0] is a lock" in error.reason


def result_too_large():
    assert (
        "is larger than 0.000977 GiB: return less, or save it to a file and return its path"
        in failure(gives_much).reason
    )


def unloadable():
    assert "not a number" in failure(print, 2, Unloadable()).reason


def unsendable_function():
    with tempfile.TemporaryFile() as log:
        settings = {"log": log}

        def train():
            return settings["log"]

        with pytest.raises(
            TypeError, match=r"train cannot be sent between processes: `settings` in train\['log'\] is a "
        ):
            launch.run(train, 2)


def bad_arguments():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        cases = [
            ({"world_size": 0}, ValueError, "world_size=0 must be a whole number, 1 or more"),
            ({"world_size": 1.5}, ValueError, "world_size=1.5 must be"),
            ({"device": ["cpu"] * 3}, ValueError, "3 devices named where 2 are needed"),
            ({"device": "cuda:99"}, ValueError, "'cuda:99' is not available"),
            ({"backend": "mpi"}, ValueError, "backend='mpi' is unknown"),
            (
                {"backend": "nccl", "device": "cpu"},
                ValueError,
                "nccl needs a GPU of its own for each of 2 ranks",
            ),
            ({"threads": 0}, ValueError, "threads=0 must be"),
            ({"timeout_seconds": 0}, ValueError, "must be above 0"),
            ({"limit_seconds": -1}, ValueError, "must be above 0"),
            ({"port": taken.getsockname()[1]}, OSError, "cannot be had"),
            ({"function": 3}, TypeError, "3 is not a function"),
        ]
        for options, kind, message in cases:
            with pytest.raises(kind, match=re.escape(message)):
                launch.run(**({"function": print, "world_size": 2} | options))


def script_with(body: str) -> subprocess.Popen:
    """A program of its own that launches `body`, the body of a function; which must say "ready" once all
    ranks are busy.
    """
    source = f"""
import os, subprocess, sys, time
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from companion import launch

def work():
{body}

print("started once", flush=True)
launch.run(work, 2)
"""
    folder = tempfile.mkdtemp()
    Path(folder, "script.py").write_text(source)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(launch.__file__).parents[1]), *sys.path])
    }
    return subprocess.Popen(
        [sys.executable, f"{folder}/script.py"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )


LOADER = f"""
    subprocess.Popen(["sleep", "{SLEEP}"])
    for i, _ in enumerate(DataLoader(torch.arange(10**6), num_workers=1)):
        if i == 0:
            dist.barrier()
            if dist.get_rank() == 0:
                print("ready", flush=True)
        time.sleep(0.01)
"""


def ended_by(send, seconds: float = 30.0) -> tuple[int, str]:
    """Starts a script whose ranks are busy, with loaders and children, ends it by `send`, and waits for
    it.
    """
    with script_with(LOADER) as program:
        lines = [program.stdout.readline().strip(), program.stdout.readline().strip()]
        assert lines == ["started once", "[rank 0] ready"], (lines, program.stderr.read())
        send(program)
        code = program.wait(seconds)
        return code, program.stderr.read()


def ctrl_c():
    code, said = ended_by(lambda program: os.killpg(program.pid, signal.SIGINT))
    assert code == -signal.SIGINT
    assert said.rstrip().endswith("KeyboardInterrupt")
    assert said.count("Traceback") == 1, said


def launcher_killed():
    code, _ = ended_by(lambda program: program.kill())
    assert code == -signal.SIGKILL


FAULTS = {
    case.__name__: case
    for case in (
        exception,
        killed,
        terminated,
        crash,
        stopped,
        odd_exceptions,
        unloadable_result,
        system_exit,
        exit_at_once,
        unequal_collectives,
        too_long,
        busy,
        out_of_memory,
        killed_with_loader,
        child_left,
        unsendable_result,
        result_too_large,
        unloadable,
        unsendable_function,
        bad_arguments,
        ctrl_c,
        launcher_killed,
    )
}


def main(faults: dict = FAULTS, about: str = __doc__) -> int:
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("cases", nargs="*", help="all if none is named")
    arguments = parser.parse_args()
    names = [name for name in arguments.cases or faults for _ in range(arguments.times)]
    random.Random(arguments.seed).shuffle(names)
    seconds: dict[str, list[float]] = {name: [] for name in faults}
    failed: dict[str, int] = dict.fromkeys(faults, 0)

    def hung(*_):
        raise AssertionError(f"hung for {HANG_SECONDS} s")

    signal.signal(signal.SIGALRM, hung)
    for name in names:
        start = time.monotonic()
        signal.alarm(HANG_SECONDS)
        try:
            with no_orphans():
                faults[name]()
        except Exception:
            failed[name] += 1
            print(f"{name}:", traceback.format_exc(), file=sys.stderr)
        finally:
            signal.alarm(0)
        seconds[name].append(time.monotonic() - start)
    print(f"torch {torch.__version__}, seed {arguments.seed}")
    for name in [name for name in faults if seconds[name]]:
        median, most = statistics.median(seconds[name]), max(seconds[name])
        print(
            f"{name:36} {len(seconds[name]):3} times, {failed[name]} failed, median {median:5.2f} s, "
            f"longest {most:5.2f} s"
        )
    print(f"{len(names) - sum(failed.values())} passed, {sum(failed.values())} failed")
    return int(any(failed.values()))


if __name__ == "__main__":
    sys.exit(main())
