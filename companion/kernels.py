"""A notebook's kernel: what it gets from its environment, and the time that it and all its children take, cell by cell."""

import os
import time
from dataclasses import dataclass, field

import psutil


def cpu_seconds(pid: int) -> float:
    """CPU-seconds so far of a process and of all that came from it; of those that have ended once their parent has
    waited for them. 0 for a process that is not there."""
    try:
        tree = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0.0
    total = 0.0
    for process in tree:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue  # it has ended since, and is in its parent's times
        total += times.user + times.system + times.children_user + times.children_system
    return total


@dataclass(frozen=True)
class Spent:
    """What a cell or a whole notebook took."""

    seconds: float
    cpu_seconds: float


@dataclass
class Kernel:
    """Options for papermill.execute_notebook that give the kernel variables of its own, and note what its cells take."""

    variables: dict[str, str] = field(default_factory=dict)
    cells: dict[int, Spent] = field(default_factory=dict)
    pid: int = 0
    most_cpu_seconds: float = 0.0

    def options(self) -> dict[str, object]:
        return {
            "kernel_manager_class": self._manager(),
            "on_cell_execute": self._before,
            "on_cell_executed": self._after,
        }

    def _manager(self) -> type:
        from jupyter_client.manager import AsyncKernelManager

        kernel = self

        class Manager(AsyncKernelManager):
            async def start_kernel(self, **options):
                options["env"] = os.environ | (options.get("env") or {}) | kernel.variables
                await super().start_kernel(**options)
                kernel.pid = self.provisioner.pid

        return Manager

    def _before(self, cell, cell_index: int) -> None:
        self._begun = time.perf_counter(), cpu_seconds(self.pid)

    def _after(self, cell, cell_index: int, execute_reply) -> None:
        seconds, used = self._begun
        now = cpu_seconds(self.pid)
        self.most_cpu_seconds = max(self.most_cpu_seconds, now)
        self.cells[cell_index] = Spent(time.perf_counter() - seconds, max(0.0, now - used))
