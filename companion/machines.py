"""Several machines on this one: an elastic agent, what torchrun is, stands for each, in a network of its own
where there is one. They can be killed, stopped and started again, and nothing of them is left behind.

    with machines.Machines(folder, multi_machine.main) as two:
        for rank in (0, 1):
            two.start(rank, ["--folder", folder])
        two.machines[1].kill()
        print(two.machines[0].wait())
"""

import json
import os
import signal
import socket
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partialmethod
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
from torch.distributed.elastic.multiprocessing import PContext
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher import api

from companion import launch, network
from companion.launch import pickling

MARK = "COMPANION_MACHINES"  # in the environment of all that belongs to some machines
# Of the rendezvous: seconds until it closes once there are enough nodes, between signs of life, how many of
# those may be missing, and seconds until nodes give up waiting for others. With two missing signs a busy node
# takes itself for dead, and two worlds train at the same time.
QUICK = {"last_call_timeout": 1, "keep_alive_interval": 1, "keep_alive_max_attempt": 4, "join_timeout": 30}
PATIENCE_SECONDS = 3  # for a worker that is told to end; a stopped one never does


@dataclass
class Machine:
    """An agent and its workers. `log` is the file of what they print."""

    name: str
    process: BaseProcess
    log: Path

    def events(self, kind: str | None = None) -> list[dict]:
        """What its ranks said as lines of JSON, in order."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        found = [json.loads(line) for line in lines if line.startswith('{"event"') and line.endswith("}")]
        return [event for event in found if kind in (None, event["event"])]

    def workers(self) -> list[int]:
        """The process numbers of the ranks that it runs now, as far as they have begun to train."""
        return [pid for pid in dict.fromkeys(e["pid"] for e in self.events("start")) if _runs(pid)]

    def signal(self, number: int) -> None:
        """Sends a signal to agent and workers, the agent first, so that it has no time to say goodbye."""
        for process in _family(self.process.pid):
            process.send_signal(number)

    def kill(self) -> None:
        """As if the power went."""
        self.signal(signal.SIGKILL)
        self.process.join(30)

    def wait(self, limit_seconds: float = 120.0) -> int:
        """Its exit code; raises TimeoutError, saying what it printed last, if that takes too long."""
        self.process.join(limit_seconds)
        if self.process.exitcode is None:
            last = "\n".join(self.log.read_text(errors="replace").splitlines()[-8:])
            raise TimeoutError(f"{self.name} still runs after {limit_seconds:.0f} s; it said last:\n{last}")
        return self.process.exitcode

    def reason(self) -> str:
        """Why it failed: what one of its ranks said, or else the last error that was printed."""
        if said := self.events("failed"):
            return said[0]["reason"]
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines()]
        errors = [line for line in lines if line.split(":")[0].endswith(("Error", "Exception", "Timeout"))]
        return errors[-1] if errors else (lines or ["nothing was printed"])[-1]


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _family(pid: int) -> list[psutil.Process]:
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


@dataclass
class Machines:
    """Machines that run `main(arguments)` in ranks of one world, on the CPU: they share this machine's GPUs,
    and nccl refuses two ranks on one. A context that ends all of them.

    `nodes` is a number, or a range such as "1:2": training then goes on with fewer. `inside` are the networks
    of the machines by node rank, see `network.Network`; without them all use the loopback interface. The
    rendezvous "c10d" has its store in this process, outside of all machines; "static" has it on node 0.

    Raises ValueError for what cannot work, before anything starts.
    """

    folder: str | Path
    main: Callable[[Sequence[str]], object]
    nodes: str = "2"
    per_node: int = 1
    rendezvous: str = "c10d"
    restarts: int = 3
    port: int = 0
    inside: Sequence[network.Place] = ()
    machines: list[Machine] = field(default_factory=list)

    def __post_init__(self):
        self.folder, self.mark, self.store = Path(self.folder), uuid.uuid4().hex, None
        if self.rendezvous not in ("c10d", "static"):
            raise ValueError(f"rendezvous={self.rendezvous!r} is unknown; use 'c10d' or 'static'")
        if self.rendezvous == "static" and ":" in self.nodes:
            raise ValueError(f"nodes={self.nodes!r} is a range, which the static rendezvous cannot have")
        self.address = self.inside[0].address if self.inside else "127.0.0.1"

    def __enter__(self) -> "Machines":
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.rendezvous == "c10d" and not self.inside:
            self.store = launch.rendezvous(self.port)
            self.port = self.store.port
        elif not self.port:
            with socket.create_server(("127.0.0.1", 0)) as free:
                self.port = free.getsockname()[1]
        return self

    def __exit__(self, *error) -> None:
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark:
                    process.kill()
            except psutil.Error:
                continue
        for machine in self.machines:
            machine.kill()
        self.store = None

    def flags(self, rank: int) -> dict[str, object]:
        """What torchrun is told on this machine."""
        most = int(self.nodes.split(":")[-1])
        if not 0 <= rank < most:
            raise ValueError(f"node rank {rank} is not one of 0 to {most - 1}")
        found = {"nnodes": self.nodes, "nproc-per-node": self.per_node}
        if self.rendezvous == "static":
            return found | {"node-rank": rank, "master-addr": self.address, "master-port": self.port}
        conf = {"is_host": int(rank == 0 and not self.store)} | QUICK
        return found | {
            "rdzv-backend": "c10d",
            "rdzv-endpoint": f"{self.address}:{self.port}",
            "rdzv-id": "training",
            "rdzv-conf": ",".join(f"{name}={value}" for name, value in conf.items()),
            "max-restarts": self.restarts,
            "monitor-interval": 0.1,
            "local-addr": self.inside[rank].address if self.inside else "127.0.0.1",
        }

    def command(self, rank: int, arguments: Sequence[str]) -> str:
        """The same, as a person would type it on this machine."""
        flags = " ".join(f"--{name}={value}" for name, value in self.flags(rank).items())
        return f"torchrun {flags} -m {self.main.__module__} {' '.join(map(str, arguments))}"

    def start(self, rank: int, arguments: Sequence[object], name: str | None = None) -> Machine:
        """Starts a machine: an agent that is forked from a server where torch is there already."""
        name = name or f"node {rank}"
        log = self.folder / f"{name.replace(' ', '-')}-{len(self.machines)}.log"
        place = self.inside[rank] if self.inside else None
        variables = {
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",  # nor could forked workers use one
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # else a restart may hang on what the last one stored
            "GLOO_SOCKET_IFNAME": place.interface if place else launch.loopback(),
            MARK: self.mark,
        }
        sent = pickling.pack(self.main, "main"), list(map(str, arguments))
        about = self.flags(rank), log, dict(os.environ) | variables, place
        process = launch.warm().Process(target=_agent, args=(*sent, *about))
        process.start()
        self.machines.append(Machine(name, process, log))
        return self.machines[-1]


def _agent(main: bytes, arguments: list[str], flags: dict, log: Path, variables: dict, place) -> None:
    """A machine's agent: what torchrun does, with workers that are forked instead of started anew."""
    from torch.distributed import run

    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.clear()
    os.environ.update(variables)
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
    if place:
        place.enter()
    told = [f"--{name}={value}" for name, value in flags.items()]
    config, *_ = run.config_from_args(run.parse_args([*told, "program"]))
    config.start_method = "fork"
    PContext.close = partialmethod(_closed, PContext.close)
    try:
        api.elastic_launch(config, entrypoint=pickling.unpack(main))(arguments)
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        sys.exit(1)


def reach(address: str, port: int, limit_seconds: float = 5.0) -> float:
    """Seconds until another machine answers on this port, such as the one where the rendezvous is.

    Raises ConnectionError, saying what to look at, if it does not.
    """
    start = time.monotonic()
    try:
        with socket.create_connection((address, port), timeout=limit_seconds):
            return time.monotonic() - start
    except OSError as error:
        raise ConnectionError(
            f"{address}:{port} does not answer within {limit_seconds:g} s ({error.strerror or error}): is "
            "node 0 started, is this its address, and does the firewall let the port through?"
        ) from error


def _closed(workers: PContext, close: Callable, death_sig=None, timeout: float = PATIENCE_SECONDS) -> None:
    """Ends workers, but does not wait for them as long as torch does: 30 s, which no setting changes."""
    close(workers, death_sig, min(timeout, PATIENCE_SECONDS))


def until(happened: Callable[[], object], what: str, limit_seconds: float = 60.0) -> object:
    """Waits until `happened()` gives something true, and gives it; raises TimeoutError naming `what`."""
    end = time.monotonic() + limit_seconds
    while time.monotonic() < end:
        if found := happened():
            return found
        time.sleep(0.02)
    raise TimeoutError(f"{what} did not happen within {limit_seconds:.0f} s")
