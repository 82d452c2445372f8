"""Worker processes from anywhere: `run` calls a function, even one of a notebook's cell, on several ranks.

    def worker(x):
        dist.all_reduce(x)  # plain torch.distributed
        return x

    by_rank = launch.run(worker, 2, torch.ones(3))

Ranks are forked from a server that has imported torch and done nothing else: safe where `fork` hangs, and
quick the second time.
"""

import linecache
import math
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Iterable
from datetime import timedelta
from multiprocessing import forkserver

import torch
import torch.distributed as dist

from companion import devices, host, scratch
from companion.launch import pickling
from companion.launch.outcome import WorkerError as WorkerError
from companion.launch.outcome import collect
from companion.launch.ranks import Rank
from companion.launch.spawned import end_with_parent as end_with_parent
from companion.launch.spawned import overheard as overheard

# What the functions that notebooks send need: imported once, by the server, instead of in each rank.
PRELOAD = [
    "torch._dynamo",
    "torch.nn.parallel",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.pipelining",
    "torch.distributed.tensor.parallel",
    "tqdm.notebook",
    "companion.ddp",
    "companion.hybrid",
    "companion.model_parallel",
]


def device() -> torch.device:
    """The device of this rank: the one `run` gave it; under torchrun the machine's GPUs in turn by
    LOCAL_RANK, or the CPU if there is none.
    """
    index, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    return torch.device(os.environ.get("COMPANION_DEVICE") or (f"cuda:{index % gpus}" if gpus else "cpu"))


def places(world_size: int, device: str | torch.device | Iterable[str] = "auto") -> list[torch.device]:
    """Where each rank runs. `device` is one name or a list by rank; "auto" is the GPUs in turn, or else the
    CPU.
    """
    if not isinstance(world_size, int) or world_size < 1:
        raise ValueError(f"world_size={world_size!r} must be a whole number, 1 or more")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    found = devices.select_list(str(device) if isinstance(device, torch.device) else device, world_size)
    if others := {place.type for place in found} - {"cpu", "cuda"}:
        raise ValueError(f"ranks run on cpu and cuda, not on {', '.join(sorted(others))}")
    return found


def join(backend: str | None = None, timeout_seconds: float = 1800.0) -> torch.device:
    """Joins the process group that torchrun's variables tell of, and gives this rank's device, which is set
    before anything is sent.

    `run` needs no such call: its ranks have joined before the function starts. `backend` is nccl where each
    of this machine's ranks has a GPU of its own, else gloo. No collective may wait longer than
    `timeout_seconds`. Raises RuntimeError if this process was not started by torchrun, or `run`.
    """
    if "RANK" not in os.environ:
        raise RuntimeError(
            "this process has no rank: start it by torchrun, or call the function through launch.run"
        )
    here = device()
    if here.type == "cuda":
        torch.cuda.set_device(here)  # where nccl puts what it sends by itself, as in a barrier
    alone = here.type == "cuda" and int(os.environ["LOCAL_WORLD_SIZE"]) <= torch.cuda.device_count()
    dist.init_process_group(
        backend or ("nccl" if alone else "gloo"), timeout=timedelta(seconds=timeout_seconds)
    )
    return here


def warm(*modules: str) -> multiprocessing.context.ForkServerContext:
    """Starts the server that ranks are forked from, which imports torch, and these modules of yours, in the
    background; the first `run` then waits less. Of a server that runs already nothing changes.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOAD, *modules])
    scratch.own()  # the server's socket goes with this process, even if that is killed
    forkserver.ensure_running()
    return context


def run(
    function: Callable,
    world_size: int,
    *args: object,
    device: str | Iterable[str] = "auto",
    backend: str | None = "auto",
    threads: int | None = None,
    timeout_seconds: float = 300.0,
    limit_seconds: float = math.inf,
    port: int = 0,
) -> list:
    """Calls `function(*args)` in `world_size` processes and gives what each returned, by rank.

    In each, the default process group is ready (with `backend=None`: the variables that
    `dist.init_process_group` reads), `launch.device()` is its device (see `places`) and torch uses `threads`
    threads, or else its share of the usable cores. The backend "auto" is nccl if each rank has a GPU of its
    own, else gloo. Lines that ranks print appear as `[rank 1] ...`, tqdm's bars from rank 0 alone.

    No collective may wait longer than `timeout_seconds`, nor the whole take more than `limit_seconds`. `port`
    is the store's, any free one for 0. Only the loopback interface is used. However it ends, no process is
    left behind.

    Raises ValueError or TypeError, before anything starts, for what cannot work; OSError for a port in use;
    WorkerError.
    """
    if not callable(function):
        raise TypeError(f"{function!r} is not a function")
    if threads is not None and threads < 1:
        raise ValueError(f"threads={threads} must be 1 or more")
    if not min(timeout_seconds, limit_seconds) > 0:
        raise ValueError(
            f"timeout_seconds={timeout_seconds} and limit_seconds={limit_seconds} must be above 0"
        )
    where = places(world_size, device)
    backend = _backend(backend, where)
    threads = max(1, host.usable_cores() // world_size) if threads is None else threads
    payload = (
        pickling.pack(function, getattr(function, "__name__", "the function")),
        pickling.pack(args, "args"),
    )
    store, context, method = rendezvous(port), warm(), multiprocessing.get_start_method()
    shared = {
        "MASTER_ADDR": store.host,
        "MASTER_PORT": store.port,
        "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": world_size,
    }
    shared |= {
        "TORCHELASTIC_USE_AGENT_STORE": True,
        "TORCHELASTIC_RESTART_COUNT": 0,
        "OMP_NUM_THREADS": threads,
        "COMPANION_EXACT": devices.is_exact(),
    }
    shared |= {
        name: os.environ.get(name, loopback()) for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    }
    ranks, cells = [Rank(number) for number in range(world_size)], _cells()
    try:
        for rank, place in zip(ranks, where, strict=True):
            own = {"RANK": rank.number, "LOCAL_RANK": rank.number, "COMPANION_DEVICE": place}
            variables = dict(os.environ) | {name: str(value) for name, value in (shared | own).items()}
            rank.start(context, payload, cells, variables, method, backend, timeout_seconds)
        return collect(ranks, limit_seconds)
    finally:
        for rank in ranks:
            rank.end()
        del store  # also where a notebook keeps this frame for its last traceback: the port is free again


def _backend(name: str | None, where: list[torch.device]) -> str | None:
    """What the ranks talk through; nccl wants each to have a GPU of its own."""
    if name not in ("auto", "gloo", "nccl", None):
        raise ValueError(
            f"backend={name!r} is unknown; use 'auto', 'gloo', 'nccl', or None to make the group yourself"
        )
    alone = len(set(where)) == len(where) and {place.type for place in where} == {"cuda"}
    if name == "nccl" and not alone:
        there = torch.cuda.device_count() if torch.cuda.is_available() else 0
        raise ValueError(
            f"nccl needs a GPU of its own for each of {len(where)} ranks; there are {there}: use 'gloo'"
        )
    return ("cpu:gloo,cuda:nccl" if alone else "gloo") if name == "auto" else name


def rendezvous(port: int = 0) -> dist.TCPStore:
    """The place where the ranks find each other, listening on the loopback interface only (TCPStore's own
    would on all).
    """
    try:
        server = socket.create_server(("127.0.0.1", port))
    except OSError as error:
        raise OSError(
            error.errno, f"port {port} cannot be had ({error.strerror}); port=0 takes any that is free"
        ) from error
    port = server.getsockname()[1]
    return dist.TCPStore(
        "127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=server.detach()
    )


def loopback() -> str:
    """The name of this machine's loopback interface, such as "lo"."""
    return next(name for _, name in socket.if_nameindex() if name.startswith("lo"))


def _cells() -> dict[str, tuple[str, list[str]]]:
    """The code that is in no file: filename -> (the name that a notebook shows for it, its lines)."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    # New in IPython 8.
    known = getattr(getattr(shell, "compile", None), "format_code_name", lambda filename: None)
    cells = {
        name: entry[2]
        for name, entry in linecache.cache.items()
        if len(entry) == 4 and not os.path.exists(name)
    }
    return {name: (" ".join(known(name) or ("File", f'"{name}"')), lines) for name, lines in cells.items()}
