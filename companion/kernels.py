"""A notebook's kernel: what it gets from its environment, and the time that it and all its children take,
cell by cell.
"""

import os
import time
from dataclasses import dataclass, field

from companion import host


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
        self._begun = time.perf_counter(), host.cpu_seconds(self.pid)

    def _after(self, cell, cell_index: int, execute_reply) -> None:
        seconds, used = self._begun
        now = host.cpu_seconds(self.pid)
        self.most_cpu_seconds = max(self.most_cpu_seconds, now)
        self.cells[cell_index] = Spent(time.perf_counter() - seconds, max(0.0, now - used))
