"""A network of several machines on this one: network namespaces joined by virtual cables, which can be slow,
or be cut. Linux, and root alone.

    with network.Network(2) as cables:
        cables.slow(1, megabits=100)
"""

import ctypes
import os
import shutil
import subprocess
import uuid
from dataclasses import dataclass

NEW_NETWORK = 0x40000000  # CLONE_NEWNET, from linux/sched.h


def why_not() -> str | None:
    """Why there can be no such network here; None if there can."""
    if not hasattr(os, "geteuid") or not os.path.isdir("/proc/self/ns"):
        return "needs Linux, for its network namespaces"
    if os.geteuid():
        return "needs root, for its network namespaces"
    if missing := [name for name in ("ip", "tc") if not shutil.which(name)]:
        return f"needs {' and '.join(missing)} (iproute2)"
    tried = subprocess.run(["unshare", "--net", "true"], capture_output=True, text=True, check=False)
    return None if tried.returncode == 0 else "may not make network namespaces here"


@dataclass(frozen=True)
class Place:
    """A machine's end of the cable."""

    namespace: str
    interface: str
    address: str

    def enter(self) -> None:
        """Moves this process, and what it starts from now on, into the machine's network."""
        with open(f"/run/netns/{self.namespace}") as file:
            if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), NEW_NETWORK):
                raise OSError(ctypes.get_errno(), f"network namespace {self.namespace} cannot be entered")


class Network:
    """Machines that see each other through cables to a switch; a context that takes all of it down.

    Raises RuntimeError where there can be no such network, saying why.
    """

    def __init__(self, machines: int):
        if reason := why_not():
            raise RuntimeError(reason)
        self.id = uuid.uuid4().hex[:6]
        self.switch, self.hub = f"co{self.id}s", f"co{self.id}b"
        self.places = [
            Place(f"co{self.id}m{i}", f"co{self.id}e{i}", f"10.77.0.{i + 1}") for i in range(machines)
        ]

    def __enter__(self) -> "Network":
        try:
            self._make()
        except subprocess.CalledProcessError as error:
            self.__exit__()
            raise RuntimeError(f"no network: {error.stderr.strip()}") from error
        return self

    def _make(self) -> None:
        _run("ip", "netns", "add", self.switch)
        _in(self.switch, "ip", "link", "add", self.hub, "type", "bridge")
        _in(self.switch, "ip", "link", "set", self.hub, "up")
        for number, place in enumerate(self.places):
            far = f"co{self.id}p{number}"
            _run("ip", "netns", "add", place.namespace)
            _run(
                "ip",
                "link",
                "add",
                place.interface,
                "netns",
                place.namespace,
                "type",
                "veth",
                "peer",
                far,
                "netns",
                self.switch,
            )
            _in(self.switch, "ip", "link", "set", far, "master", self.hub, "up")
            _in(place.namespace, "ip", "addr", "add", f"{place.address}/24", "dev", place.interface)
            _in(place.namespace, "ip", "link", "set", place.interface, "up")
            _in(place.namespace, "ip", "link", "set", "lo", "up")

    def __exit__(self, *error) -> None:
        for name in (*(place.namespace for place in self.places), self.switch):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)

    def slow(self, machine: int, megabits: float) -> None:
        """From now on no more than so many megabits a second leave the machine."""
        place = self.places[machine]
        how = ["tbf", "rate", f"{megabits}mbit", "burst", "32kbit", "latency", "400ms"]
        _in(place.namespace, "tc", "qdisc", "replace", "dev", place.interface, "root", *how)

    def cut(self, machine: int) -> None:
        """Pulls the machine's cable."""
        place = self.places[machine]
        _in(place.namespace, "ip", "link", "set", place.interface, "down")

    def mend(self, machine: int) -> None:
        """Plugs it in again, as fast as it was made."""
        place = self.places[machine]
        _in(place.namespace, "ip", "link", "set", place.interface, "up")
        subprocess.run(
            ["ip", "netns", "exec", place.namespace, "tc", "qdisc", "del", "dev", place.interface, "root"],
            capture_output=True,
            check=False,
        )


def _run(*command: str) -> None:
    subprocess.run(command, capture_output=True, text=True, check=True)


def _in(namespace: str, *command: str) -> None:
    _run("ip", "netns", "exec", namespace, *command)
