"""What this process may use of the machine, and what it and others do use: cores, memory, TPU chips."""

import os
import time
from contextlib import suppress
from pathlib import Path

import psutil

# Google's PCI devices that are TPU chips; its network and storage cards have the same vendor.
# Source: jax._src.cloud_tpu_init and torch_xla._internal.tpu.
TPU_PCI_VENDOR = "0x1ae0"
TPU_PCI_DEVICES = {"0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076"}

SHORT_SECONDS = 0.5  # of less the system's clocks, of a hundredth of a second, say nothing
BUSY_CORES = 0.5


def tpu_chips(sys_root: str = "/sys") -> int:
    """Number of TPU chips on the PCI bus, found without importing or starting any TPU runtime."""

    def is_tpu(device: Path) -> bool:
        vendor, model = ((device / name).read_text().strip() for name in ("vendor", "device"))
        return vendor == TPU_PCI_VENDOR and model in TPU_PCI_DEVICES

    return sum(map(is_tpu, Path(sys_root, "bus/pci/devices").glob("*")))


def _cgroup_limits(root: str = "/") -> tuple[float, float]:
    """CPU and memory (bytes) limits that a container or control group sets on this process; infinite if
    none.
    """

    def number(path: Path) -> float:
        text = path.read_text().split()[0] if path.is_file() else "max"
        return float("inf") if text in ("max", "-1") else float(text)

    cpus = memory = float("inf")
    lines = Path(root, "proc/self/cgroup")
    groups = [line.split(":", 2) for line in lines.read_text().splitlines()] if lines.is_file() else []
    for _, controllers, path in groups:
        base = Path(root, "sys/fs/cgroup")
        inner = (base / controllers if controllers else base) / path.strip("/")
        for folder in (inner, *inner.parents):
            if not folder.is_relative_to(base):
                break
            if (folder / "cpu.max").is_file():
                cpus = min(
                    cpus, number(folder / "cpu.max") / float((folder / "cpu.max").read_text().split()[1])
                )
            if (folder / "cpu.cfs_quota_us").is_file():
                cpus = min(cpus, number(folder / "cpu.cfs_quota_us") / number(folder / "cpu.cfs_period_us"))
            memory = min(memory, number(folder / "memory.max"), number(folder / "memory.limit_in_bytes"))
    return cpus, memory


def usable_cores(root: str = "/") -> int:
    """Cores this process may use: of the machine's, those that its affinity and its container's quota
    allow.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min(affinity, _cgroup_limits(root)[0])))


def usable_memory_bytes(root: str = "/") -> int:
    """Main memory this process may use: the machine's, or less if its container says so; 0 where it cannot be
    told.
    """
    names = getattr(os, "sysconf_names", {})
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if "SC_PHYS_PAGES" in names else 0
    return int(min(physical, _cgroup_limits(root)[1]))


def limit_memory(limit_bytes: int | None) -> None:
    """From now on this process may take so many bytes of memory more (on Linux)."""
    status = Path("/proc/self/status")
    if limit_bytes is None or not status.exists():
        return
    import resource

    taken = next(line for line in status.read_text().splitlines() if line.startswith("VmData"))
    most = 1024 * int(taken.split()[1]) + limit_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (most, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def _family(pid: int) -> list[psutil.Process]:
    """A process and all that came from it; none if it is not there."""
    try:
        return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def cpu_seconds(pid: int) -> float:
    """CPU-seconds so far of a process and of all that came from it; of those that have ended, once they were
    waited for.

    0 for a process that is not there.
    """
    total = 0.0
    for process in _family(pid):
        with suppress(psutil.NoSuchProcess):  # it has ended since, and is in its parent's times
            times = process.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


def memory_bytes(pid: int) -> int:
    """Memory that a process and all that came from it take now and the system cannot take back: without files
    that are only read. What several of them share counts once (on Linux; elsewhere for nobody).

    0 for a process that is not there.
    """
    total = 0
    for process in _family(pid):
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied, OSError):  # it has ended since
            total += _taken(process)
    return total


def _taken(process: psutil.Process) -> int:
    """A process's share of what it has written to, or its memory for itself where only that is known."""
    told = Path(f"/proc/{process.pid}/smaps_rollup")
    if not told.exists():
        return process.memory_full_info().uss
    lines = [line.split() for line in told.read_text().splitlines()]
    return sum(1024 * int(line[1]) for line in lines if line[0] in ("Pss_Anon:", "Pss_Shmem:"))


def lose_children() -> None:
    """Says that children of this process will end without being waited for, as those of Ray's raylet do: what
    they took cannot be told from what others took, so `Watch` makes no claim from now on.
    """
    Watch.sure = False


class Watch:
    """Looks what other processes take while something is measured."""

    sure = True  # in a process whose children are all waited for

    def __init__(self):
        self._begin()

    def _begin(self) -> None:
        self.start, self.own, self.all = time.monotonic(), cpu_seconds(os.getpid()), _machine_seconds()

    def busy(self, again: bool = False) -> str | None:
        """Why figures taken since the start are not to be trusted, or None; with `again` the next look begins
        here.

        Others may use cores that this process may not; of those that it may, they took half a one or more. A
        rank that has fellows says nothing: they are none of its children.
        """
        seconds = time.monotonic() - self.start
        others = (_machine_seconds() - self.all - (cpu_seconds(os.getpid()) - self.own)) / max(seconds, 1e-9)
        spare = (os.cpu_count() or 1) - usable_cores()
        if again:
            self._begin()
        fellows = "LOCAL_RANK" in os.environ and os.environ.get("WORLD_SIZE") != "1"
        unsure = fellows or not self.sure
        if unsure or seconds < SHORT_SECONDS or others < spare + BUSY_CORES:
            return None
        return f"other processes took {others - spare:.1f} of {usable_cores()} cores"


def _machine_seconds() -> float:
    """CPU-seconds that were used, or taken by another guest, on the whole machine since it was started."""
    times = psutil.cpu_times()
    return sum(getattr(times, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq", "steal"))
