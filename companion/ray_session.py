"""Ray on this machine, for this process alone: started quietly, listening on loopback only, ended with
nothing left.
"""

import atexit
import logging
import math
import os
import secrets
import shlex
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import psutil
import torch

from companion import host

LOOPBACK = "127.0.0.1"
_END_SECONDS = 10
_SOCKET_BYTES = 103 if sys.platform == "darwin" else 107  # of a socket's name, at most
_LONGEST = "ray-abcdefgh/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store_10"
_TOO_SLOW = ("timed out during startup", "Failed to start GCS")  # what Ray says when it gives up
_QUIET = {"logging_level": logging.ERROR, "log_to_driver": False}
_started: dict[
    str, object
] = {}  # the session of this process: its temporary folder, and its cluster of nodes


def imported():
    """The module ray, its settings made: no reports of usage to its makers, a secret for every connection.

    Raises ImportError, naming the extra to install, where it is missing.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's future way, which it announces
    try:
        import ray
        from ray import tune  # noqa: F401
    except ImportError as error:
        raise ImportError("Ray Tune is not installed: pip install 'accelerating-pytorch[tune]'") from error
    return ray


def start(cpus: int | None = None, gpus: int | None = None, nodes: int = 1) -> dict[str, float]:
    """Starts Ray and gives what it has to share out, such as {"CPU": 2.0}.

    `cpus` and `gpus` are those of each node: None is all that this process may use. Several `nodes` are a
    cluster that is only simulated: each has its own processes, all on this machine.

    A machine that is so busy that Ray gives up waiting for itself is given a second chance. Raises
    RuntimeError if Ray already runs in this process, or would listen on another address than loopback.
    """
    if imported().is_initialized():
        raise RuntimeError("Ray already runs in this process: ray_session.stop() ends what start() started")
    node = {"num_cpus": cpus or host.usable_cores(), "num_gpus": gpus, "include_dashboard": False}
    try:
        _begin(node, nodes)
    except Exception as error:
        if not any(said in str(error) for said in _TOO_SLOW):
            raise
        _begin(node, nodes)
    return resources()


def _begin(node: dict, nodes: int) -> None:
    ray = imported()
    host.lose_children()
    _guard(only_loopback=True)
    folder = tempfile.mkdtemp(prefix="ray-", dir=_where())
    _started.update(folder=folder, cluster=None)
    try:
        with _threads_by_cpus():
            if nodes == 1:
                ray.init("local", **node, **_options(), _node_ip_address=LOOPBACK, _temp_dir=folder)
            else:
                _started["cluster"] = cluster = _simulated(nodes, node, folder)
                ray.init(cluster.address, **_options(), _node_ip_address=LOOPBACK)
        addresses = {one["NodeManagerAddress"] for one in ray.nodes()}
        if addresses != {LOOPBACK}:
            raise RuntimeError(f"Ray listens on {', '.join(addresses)} instead of on loopback only")
    except BaseException:
        stop()
        raise


@contextmanager
def _threads_by_cpus() -> Iterator[None]:
    """Hides this process's number of threads from what is started: each worker would take so many, whereas
    Ray gives it as many as the CPUs that its task asked for.
    """
    own = os.environ.pop("OMP_NUM_THREADS", None)
    try:
        yield
    finally:
        if own is not None:
            os.environ["OMP_NUM_THREADS"] = own


def _options() -> dict[str, object]:
    """Of `ray.init`: quiet, and with Python's path as a shell takes it, for Ray gives it to one as it is.

    Where the path has a space its workers would die as they start, and whoever asked would wait for ever.
    """
    quoted = shlex.quote(sys.executable)
    return _QUIET if quoted == sys.executable else _QUIET | {"runtime_env": {"py_executable": quoted}}


def _guard(only_loopback: bool) -> None:
    """Has Ray ask for the secret, and keep to loopback."""
    from ray._private import ray_constants
    from ray._private.authentication import authentication_token_setup

    authentication_token_setup.logger.setLevel(logging.ERROR)  # it announces what is done on purpose
    authentication_token_setup.enable_token_auth_by_default()
    # Otherwise Ray replaces loopback by the address of a network card.
    ray_constants.ENABLE_RAY_CLUSTER = not only_loopback


def address() -> str:
    """Where the running Ray can be joined by another process of this machine that has its secret."""
    return imported().get_runtime_context().gcs_address


def join(address: str) -> dict[str, float]:
    """Uses a Ray that already runs, by its address ("auto" finds one of this machine), and gives what it has
    to share out. Both must have the same secret: the environment variable RAY_AUTH_TOKEN, which processes
    inherit. Where this process ends, what it runs there is ended, and the Ray itself goes on.
    """
    if imported().is_initialized():
        raise RuntimeError("Ray already runs in this process: ray_session.stop() ends what start() started")
    inside = address.startswith(LOOPBACK)
    _guard(only_loopback=inside)
    imported().init(address, **_options(), **({"_node_ip_address": LOOPBACK} if inside else {}))
    return resources()


def _where() -> str:
    """The folder for temporary files; "/tmp" where the names of Ray's sockets in it would get too long."""
    usual = tempfile.gettempdir()
    return usual if len(os.fsencode(f"{usual}/{_LONGEST}")) <= _SOCKET_BYTES else "/tmp"


def _simulated(nodes: int, node: dict, folder: str):
    """A cluster of nodes that are only processes here."""
    from ray.cluster_utils import Cluster

    Path(folder, "ray").mkdir()
    with mock.patch.dict(os.environ, RAY_TMPDIR=folder):  # it notes its address there, whatever `temp_dir` is
        node = node | {"node_ip_address": LOOPBACK}
        cluster = Cluster(initialize_head=True, head_node_args=node)
        for _ in range(nodes - 1):
            cluster.add_node(**node)
    return cluster


def resources() -> dict[str, float]:
    """What the nodes of the running Ray have to share out: "CPU", "GPU" and what else they were given."""
    found = imported().cluster_resources()
    return {
        name: amount
        for name, amount in found.items()
        if ":" not in name and name not in ("memory", "object_store_memory")
    }


def afford(cpus: float, gpus: float) -> None:
    """Raises ValueError if no node has so many CPUs and GPUs: what asks for them would wait for ever."""
    if imported().is_initialized():
        nodes = _nodes()
    else:
        nodes = [{"CPU": host.usable_cores(), "GPU": torch.cuda.device_count()}]
    wanted = {"CPU": cpus, "GPU": gpus}
    for name, amount in wanted.items():
        most = max(node.get(name, 0) for node in nodes)
        if amount > most:
            raise ValueError(
                f"{name.lower()}s={amount:g} for each trial, but no node of this Ray has more than {most:g}: "
                "Ray would wait for ever"
            )
    if not any(all(node.get(name, 0) >= amount for name, amount in wanted.items()) for node in nodes):
        raise ValueError(
            f"cpus={cpus:g} and gpus={gpus:g} for each trial: nodes of this Ray have so many of each, but no "
            "node has both: Ray would wait for ever"
        )


def _nodes() -> list[dict[str, float]]:
    """What each node of the running Ray has."""
    return [node["Resources"] for node in imported().nodes() if node["Alive"]]


def at_once(cpus: float, gpus: float) -> int:
    """How many trials that take so many CPUs and GPUs each the nodes of the running Ray can hold."""
    wanted = {name: amount for name, amount in (("CPU", cpus), ("GPU", gpus)) if amount}
    fitting = [min(node.get(name, 0) / amount for name, amount in wanted.items()) for node in _nodes()]
    return sum(math.floor(trials + 1e-9) for trials in fitting)  # 1 / 0.1 trials are ten


def stop() -> None:
    """Ends what `start` started, waits until its processes are gone, and deletes its temporary folder.

    Does nothing where nothing was started. It is called when this process ends, too; where that is killed,
    Ray's processes end by themselves, the last ones a minute later.
    """
    if not _started:
        return
    processes = [child for child in psutil.Process().children(recursive=True) if _is_rays(child)]
    imported().shutdown()
    if _started["cluster"]:
        _started["cluster"].shutdown()
    _, left = psutil.wait_procs(processes, _END_SECONDS)
    for process in left:
        process.kill()
    psutil.wait_procs(left, _END_SECONDS)
    shutil.rmtree(_started["folder"], ignore_errors=True)
    _started.clear()


def _is_rays(process: psutil.Process) -> bool:
    """Whether a process of this session's Ray: its command names the folder, or it is one of the workers."""
    try:
        command = " ".join(process.cmdline())
    except psutil.Error:
        return False
    return str(_started["folder"]) in command or command.startswith("ray::")


@contextmanager
def careful() -> Iterator[None]:
    """Keeps Ray from printing its own tables, and of failures what the caller reports.

    It also notes the state of a search every second, so that little is lost where it is interrupted.
    """
    logger = logging.getLogger("ray.tune")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with (
            mock.patch.dict(os.environ, RAY_AIR_NEW_OUTPUT="0", TUNE_GLOBAL_CHECKPOINT_S="1"),
            mock.patch("ray._private.worker.print_to_stdstream"),  # of workers that died
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings("ignore", "Consider boosting PBT")  # by what breaks it
            yield
    finally:
        logger.setLevel(before)


@contextmanager
def running(cpus: int | None = None, gpus: int | None = None) -> Iterator[dict[str, float]]:
    """The resources of the Ray that runs in this process; where none does, of one started for as long as
    this lasts.
    """
    if imported().is_initialized():
        yield resources()
        return
    found = start(cpus, gpus)
    try:
        yield found
    finally:
        stop()


atexit.register(stop)
