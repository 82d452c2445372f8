"""A notebook's kernel: what it gets from its environment, the time that it and all its children take, cell by
cell, and their memory.
"""

import math
import os
import queue
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from companion import host

SAMPLE_SECONDS = 1.0  # at least, between two looks at the memory
LOOKS_SHARE = 0.02  # of the time, at most, goes into these looks
LOOK_SECONDS = 0.5
JOB = "COMPANION_JOB"  # the environment variable that names the run's job to what records in it


def shell_channel() -> type:
    """The class of a client's channel to the kernel, by which a cell's reply comes.

    nbclient answers an Output widget (of `widgets.interact`) on this channel's socket, past asyncio. That may
    swallow the signal that the cell's reply has come, and who waits for the signal waits for ever: 7 of
    600 such cells. So this one looks again each LOOK_SECONDS.
    """
    from jupyter_client.channels import AsyncZMQSocketChannel

    class Channel(AsyncZMQSocketChannel):
        async def get_msg(self, timeout=None):
            end = math.inf if timeout is None else time.monotonic() + timeout
            while True:
                left = max(0.0, end - time.monotonic())
                try:
                    return await super().get_msg(timeout=min(left, LOOK_SECONDS))
                except queue.Empty:
                    if time.monotonic() >= end:
                        raise

    return Channel


@dataclass(frozen=True)
class Spent:
    """What a cell or a whole notebook took."""

    seconds: float
    cpu_seconds: float


@dataclass
class Kernel:
    """Options for papermill.execute_notebook that give the kernel variables of its own, and note what its
    cells take.
    """

    variables: dict[str, str] = field(default_factory=dict)
    log: Path | None = None  # what its process writes besides, such as what native code says when it dies
    cells: dict[int, Spent] = field(default_factory=dict)
    pid: int = 0
    most_cpu_seconds: float = 0.0
    most_bytes: int = 0  # of memory, as often as SAMPLE_SECONDS looks
    running: int | None = None  # the cell that has begun and not ended, counted from 0
    overdue: bool = False  # whether it was killed because its time was over
    _manager_of: object = None

    def options(self) -> dict[str, object]:
        return {
            "kernel_manager_class": self._manager(),
            "on_cell_execute": self._before,
            "on_cell_executed": self._after,
        }

    def _manager(self) -> type:
        from jupyter_client.asynchronous import AsyncKernelClient
        from jupyter_client.manager import AsyncKernelManager

        kernel = self

        class Client(AsyncKernelClient):
            shell_channel_class = shell_channel()

        class Manager(AsyncKernelManager):
            client_factory = Client

            async def start_kernel(self, **options):
                options["env"] = os.environ | (options.get("env") or {}) | kernel.variables
                if kernel.log:
                    with kernel.log.open("ab") as log:
                        await super().start_kernel(stdout=log, stderr=log, **options)
                else:
                    await super().start_kernel(**options)
                kernel.pid, kernel._manager_of = self.provisioner.pid, self

        return Manager

    @contextmanager
    def limited(self, seconds: float | None) -> Iterator[None]:
        """Kills the kernel and all its children if what is inside takes longer."""
        if not seconds:
            yield
            return
        timer = threading.Timer(seconds, self._kill)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    @contextmanager
    def weighed(self) -> Iterator[None]:
        """Notes the most memory that the kernel and all its children take, looking now and then."""
        done = threading.Event()

        def look() -> None:
            took = 0.0
            while not done.wait(max(SAMPLE_SECONDS, took / LOOKS_SHARE)):
                start = time.thread_time()
                if self.pid:
                    self.most_bytes = max(self.most_bytes, host.memory_bytes(self.pid))
                took = time.thread_time() - start

        looking = threading.Thread(target=look, daemon=True)
        looking.start()
        try:
            yield
        finally:
            done.set()
            looking.join()

    def _kill(self) -> None:
        self.overdue = True
        with suppress(psutil.NoSuchProcess):
            kernel = psutil.Process(self.pid)
            for process in [*kernel.children(recursive=True), kernel]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()

    def death(self) -> str:
        """How the kernel's process ended, where a signal ended it; else nothing."""
        process = getattr(getattr(self._manager_of, "provisioner", None), "process", None)
        code = process.poll() if process else None
        if code is None or code >= 0:
            return ""
        reason = ", as the system does where memory is short" if -code == signal.SIGKILL else ""
        return f"its process was ended by {signal.Signals(-code).name}{reason}"

    def _before(self, cell, cell_index: int) -> None:
        self.running = cell_index
        self._begun = time.perf_counter(), host.cpu_seconds(self.pid)

    def _after(self, cell, cell_index: int, execute_reply) -> None:
        seconds, used = self._begun
        now = host.cpu_seconds(self.pid)
        self.running = None
        self.most_cpu_seconds = max(self.most_cpu_seconds, now)
        self.cells[cell_index] = Spent(time.perf_counter() - seconds, max(0.0, now - used))
