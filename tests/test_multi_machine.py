"""Several machines: what they train is the same however often they die, and what is wrong is said at once."""

import ast
import inspect
import os
import re
import resource
import signal
import socket
import subprocess
import sys
from dataclasses import replace

import launch_faults
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from torch import nn
from torch.distributed.run import parse_args as run_arguments

from companion import (
    cluster_scripts,
    data,
    launch,
    machines,
    multi_machine,
    network,
    recoveries,
    sharded_checkpoint,
)
from companion.multi_machine import Recipe
from companion.sharded_checkpoint import Checkpoints


@pytest.fixture(scope="module", autouse=True)
def _warm():
    """Agents are forked from the server of ranks; a server that runs already does as well."""
    launch.warm("sklearn.datasets", "sklearn.model_selection", "torch.distributed.run")


@pytest.fixture(scope="module")
def splits() -> data.Splits:
    return data.load("digits")


def test_the_batches_of_all_ranks_are_the_same_for_any_number_of_ranks():
    seen = [multi_machine.indices(step, 100, 24, seed=1) for step in range(8)]
    assert all(len(set(batch.tolist())) == 24 for batch in seen)
    assert len(torch.cat(seen[:4]).unique()) == 96, "no sample comes twice in an epoch"
    assert not torch.equal(seen[0], seen[4]), "the next epoch has another order"
    assert torch.equal(seen[3], multi_machine.indices(3, 100, 24, seed=1))


def trained(splits, recipe: Recipe) -> multi_machine.Trained:
    return multi_machine.train(splits, recipe)


def run(ranks: int, splits, recipe: Recipe) -> list[multi_machine.Trained]:
    return launch.run(trained, ranks, splits, recipe, device="cpu", threads=1)


def test_losses_agree_over_world_sizes(splits, tmp_path):
    """In float32 with sums in another order: 1e-4, after twelve steps of Adam."""
    found = {n: run(n, splits, Recipe(str(tmp_path / str(n)), steps=12))[0].losses for n in (1, 2, 4)}
    assert found[2] == pytest.approx(found[1], rel=1e-4)
    assert found[4] == pytest.approx(found[1], rel=1e-4)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_training_that_was_interrupted_ends_as_if_it_was_not(splits, tmp_path, asynchronous):
    whole = Recipe(str(tmp_path / "whole"), steps=14, every=4)
    undisturbed = run(2, splits, whole)
    assert {one.fingerprint for one in undisturbed} == {undisturbed[0].fingerprint}
    parts = replace(whole, folder=str(tmp_path / "parts"), asynchronous=asynchronous)
    run(2, splits, replace(parts, steps=9))
    assert sharded_checkpoint.steps(parts.folder) == [4, 8]
    again = run(2, splits, parts)
    assert [one.first for one in again] == [8, 8]
    assert {one.fingerprint for one in again} == {undisturbed[0].fingerprint}
    assert again[0].losses == undisturbed[0].losses[8:]


def test_an_interrupted_checkpoint_is_never_read(splits, tmp_path):
    recipe = Recipe(str(tmp_path), steps=8, every=4)
    run(2, splits, recipe)
    (tmp_path / "step-8" / sharded_checkpoint.WHOLE).unlink()  # what is written last
    assert sharded_checkpoint.steps(tmp_path) == [4]
    again = run(2, splits, replace(recipe, steps=9))
    assert again[0].first == 4
    assert sharded_checkpoint.steps(tmp_path) == [4, 8]


def _too_large(folder: str, asynchronous: bool) -> tuple[str, list[int]]:
    """A checkpoint, and then another one that finds no room: files may not be longer than 20 kB."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(nn.Linear(100, 100))
    optimizer = torch.optim.Adam(model.parameters())
    checkpoints = Checkpoints(folder, asynchronous=asynchronous)
    model(torch.ones(1, 100)).sum().backward()
    optimizer.step()
    checkpoints.save(1, model, optimizer)
    checkpoints.wait()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        checkpoints.save(2, model, optimizer)
        checkpoints.wait()
    except RuntimeError as error:
        return str(error), sharded_checkpoint.steps(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    return "written", []


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_is_said_and_the_checkpoint_before_stays(tmp_path, asynchronous):
    for said, left in launch.run(_too_large, 2, str(tmp_path), asynchronous, device="cpu", threads=1):
        assert re.search(r"cannot be written: rank \d: .*; [\d,]+ MiB are free there", said), said
        assert left == [1]


def test_only_the_last_checkpoints_are_kept(splits, tmp_path):
    run(1, splits, Recipe(str(tmp_path), steps=9, every=2))
    assert sharded_checkpoint.steps(tmp_path) == [6, 8]
    assert not list(tmp_path.glob("step-2*"))


def test_another_training_in_the_same_folder_is_noticed(splits, tmp_path):
    def both() -> str:
        model = nn.Linear(2, 2)
        optimizer = torch.optim.Adam(model.parameters())
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        mine, other = Checkpoints(tmp_path), Checkpoints(tmp_path)
        mine.resume(model, optimizer)
        other.resume(model, optimizer)
        mine.save(1, model, optimizer)
        try:
            other.save(2, model, optimizer)
        except RuntimeError as error:
            return str(error)
        return "written"

    (said,) = launch.run(both, 1, device="cpu", threads=1)
    assert "has a checkpoint of step 1 that this training did not write" in said


def test_ranks_with_other_arguments_are_refused(splits, tmp_path):
    def attempt() -> str:
        recipe = Recipe(str(tmp_path), learning_rate=1e-3 * (1 + dist.get_rank()))
        try:
            multi_machine.train(splits, recipe)
        except ValueError as error:
            return str(error)
        return "accepted"

    said = launch.run(attempt, 2, device="cpu", threads=1)
    assert all("rank 1 (node 0, " in one and "learning_rate=0.002, not 0.001" in one for one in said)


def test_batches_that_cannot_be_shared_are_refused(splits, tmp_path):
    for reason, ranks, size in (("cannot share batch_size=10", 4, 10), ("more than 1257", 2, 5000)):
        with pytest.raises(launch.WorkerError, match=reason):
            run(ranks, splits, Recipe(str(tmp_path), batch_size=size))


def test_bad_recipes_are_refused():
    for name, value in (("steps", 0), ("every", -1), ("learning_rate", 0.0), ("timeout_seconds", 0.0)):
        with pytest.raises(ValueError, match=name):
            Recipe("folder", **{name: value})


def test_a_folder_that_cannot_be_used_is_said(splits, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(launch.WorkerError, match="cannot be made"):
        run(1, splits, Recipe(str(tmp_path / "file" / "inside")))


@pytest.fixture(scope="module")
def undisturbed(splits, tmp_path_factory) -> dict[tuple[int, ...], str]:
    """Fingerprints of the weights that two ranks, and one, train."""
    place = tmp_path_factory.mktemp("undisturbed")
    return {(n,): run(n, splits, Recipe(str(place / str(n)), steps=24))[0].fingerprint for n in (1, 2)}


# One of a worker and one of a machine; the others are provoked on the newest stack too by `make test-all`.
ON_EACH_STACK = ("a worker is killed", "a node is killed and comes back")
FAULTS = [
    pytest.param(fault, marks=[] if fault in ON_EACH_STACK else pytest.mark.once)
    for fault in recoveries.FAULTS
]


@pytest.mark.parametrize("fault", FAULTS)
def test_training_survives(fault, undisturbed, tmp_path):
    if reason := recoveries.why_not(fault):
        pytest.skip(reason)
    flags = ["--steps", 24, "--pause-seconds", 0.05, "--timeout-seconds", 4]
    if fault == "a node is killed and comes back":
        flags[1] = 60  # there must be something left to do
    with launch_faults.no_orphans():
        found = recoveries.recovery(fault, tmp_path, flags)
    assert 0 < found.lost_steps <= 6
    if found.ranks == (2,):
        assert found.fingerprint == undisturbed[2,], "to the last bit"
    else:
        assert found.ranks in {(2, 1), (2, 1, 2)}
    assert found.loss < 2.3


def test_an_unknown_fault_is_refused(tmp_path):
    with pytest.raises(ValueError, match="fault='bad luck' is unknown; use one of 'a worker is killed'"):
        recoveries.recovery("bad luck", tmp_path, [])


def test_what_a_person_would_type_trains_too(undisturbed, tmp_path):
    """torchrun itself, with the static rendezvous, and what came before it, on one node each."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    about = f"--nnodes=2 --nproc-per-node=1 --master-addr=127.0.0.1 --master-port={port}"
    program = "-m companion.multi_machine --steps 24 --timeout-seconds 60 --folder"
    environment = dict(os.environ) | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": launch.loopback()}
    nodes = [
        subprocess.Popen(
            [*torchrun, *about.split(), f"--node-rank={rank}", *program.split(), str(tmp_path)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    for node in nodes:
        said, _ = node.communicate(timeout=120)
        assert node.returncode == 0, said
        assert undisturbed[2,] in said


def test_a_wrong_node_rank_is_refused_before_anything_starts(tmp_path):
    with machines.Machines(tmp_path, multi_machine.main) as two:
        with pytest.raises(ValueError, match="node rank 2 is not one of 0 to 1"):
            two.start(2, [])
        assert not two.machines


def test_bad_rendezvous_are_refused(tmp_path):
    with pytest.raises(ValueError, match="rendezvous='carrier pigeon' is unknown"):
        machines.Machines(tmp_path, multi_machine.main, rendezvous="carrier pigeon")
    with pytest.raises(ValueError, match="nodes='1:2' is a range"):
        machines.Machines(tmp_path, multi_machine.main, nodes="1:2", rendezvous="static")


def test_a_port_in_use_is_said(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="cannot be had"):
        machines.Machines(tmp_path, multi_machine.main, port=taken.getsockname()[1]).__enter__()


def test_other_arguments_on_a_node_end_both_with_the_reason(tmp_path):
    with machines.Machines(tmp_path, multi_machine.main, restarts=0) as two:
        for rank in (0, 1):
            two.start(rank, ["--folder", tmp_path / "checkpoints", "--timeout-seconds", 5, "--seed", rank])
        assert [machine.wait(60) for machine in two.machines] == [1, 1]
        assert all("(node 1, " in machine.reason() for machine in two.machines)
        assert all("seed=1, not 0" in machine.reason() for machine in two.machines)


def test_a_machine_that_takes_too_long_is_named(tmp_path):
    with launch_faults.no_orphans(), machines.Machines(tmp_path, multi_machine.main) as two:
        two.start(0, ["--folder", tmp_path / "checkpoints"])  # nobody else comes
        with pytest.raises(TimeoutError, match="node 0 still runs after 1 s"):
            two.machines[0].wait(1)


def test_a_machine_that_does_not_answer_is_said():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert machines.reach("127.0.0.1", port) < 5
    with pytest.raises(ConnectionError, match=f"127.0.0.1:{port} does not answer within 1 s"):
        machines.reach("127.0.0.1", port, 1)


def test_the_script_for_slurm_is_one(tmp_path):
    script = cluster_scripts.slurm("--folder /shared/run --steps 100", nodes=4, least=2)
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --nodes=4" in script
    flags = re.search(r"torchrun (.*) -m companion.multi_machine (.*)", script.replace("\\\n", " "))
    told = [word.replace("$head", "host").replace('"', "") for word in flags[1].split()]
    parsed = run_arguments([*told, "program"])
    assert (parsed.nnodes, parsed.nproc_per_node, parsed.rdzv_endpoint) == ("2:4", "8", "host:29500")
    assert flags[2] == "--folder /shared/run --steps 100"
    with pytest.raises(ValueError, match="nodes=2, least=3"):
        cluster_scripts.slurm("", least=3)


def test_the_program_for_ray_is_one():
    config = {"folder": "/shared/run", "steps": 100}
    program = cluster_scripts.ray(config, workers=4, use_gpu=False)
    tree = ast.parse(program)
    calls = {
        node.func.id: node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and hasattr(node.func, "id")
    }
    assert Recipe(**ast.literal_eval(calls["TorchTrainer"].keywords[0].value)).steps == 100
    pytest.importorskip("ray.train", reason="needs Ray")
    from ray import train
    from ray.train.torch import TorchTrainer

    for name, real in (("ScalingConfig", train.ScalingConfig), ("FailureConfig", train.FailureConfig)):
        real(**{word.arg: ast.literal_eval(word.value) for word in calls[name].keywords})
    words = {word.arg: None for word in calls["TorchTrainer"].keywords}
    inspect.signature(TorchTrainer.__init__).bind(None, None, **words)
    with pytest.raises(ValueError, match="workers=0"):
        cluster_scripts.ray(config, workers=0)


@pytest.mark.skipif(network.why_not() is not None, reason=str(network.why_not()))
def test_a_cable_can_be_slow_and_mended():
    """300 kB through 20 Mbit/s take at least 0.1 s, but for what goes through at once."""

    def seconds(place: network.Place, address: str) -> float:
        command = ["ip", "netns", "exec", place.namespace, sys.executable, "-c", SEND, address]
        return float(subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout)

    with network.Network(2) as cables:
        first, second = cables.places
        server = subprocess.Popen(
            ["ip", "netns", "exec", second.namespace, sys.executable, "-c", ANSWER, second.address]
        )
        try:
            plain = seconds(first, second.address)
            cables.slow(0, megabits=20)
            slow = seconds(first, second.address)
            cables.mend(0)
            assert slow > max(0.1, 2 * plain)
            assert seconds(first, second.address) < slow / 2
        finally:
            server.kill()
            server.wait()
    assert not [name for name in os.listdir("/run/netns") if name.startswith(f"co{cables.id}")]


ANSWER = """
import socket, sys
with socket.create_server((sys.argv[1], 5000)) as server:
    while True:
        one, _ = server.accept()
        left = 300_000
        while left:
            left -= len(one.recv(min(left, 65536)))
        one.sendall(b"x")
"""
SEND = """
import socket, sys, time
for attempt in range(100):
    try:
        one = socket.create_connection((sys.argv[1], 5000), timeout=5)
        break
    except ConnectionRefusedError:
        time.sleep(0.05)
start = time.perf_counter()
one.sendall(bytes(300_000))
one.recv(1)
print(time.perf_counter() - start)
"""
