"""Worker processes: what comes back, what is shown, and (from launch_faults) everything that can go wrong."""

import enum
import os
import socket
import subprocess
import sys
import textwrap
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import forkserver

import cloudpickle
import launch_faults
import psutil
import pytest
import torch
import torch.distributed as dist
from jupyter_client.manager import start_new_kernel
from torch.utils.data import DataLoader

from companion import data, host, launch, models, training
from companion.launch import pickling


def test_results_come_by_rank():
    def double_sum(x, factor):
        x = x * (dist.get_rank() + 1)
        dist.all_reduce(x)
        return dist.get_rank(), x * factor

    results = launch.run(double_sum, 3, torch.arange(3.0), 2)
    assert [rank for rank, _ in results] == [0, 1, 2]
    assert all(torch.equal(x, torch.arange(3.0) * 12) for _, x in results)


def test_a_function_that_mentions_torch_and_classes_can_be_sent(digits):
    """cloudpickle then takes torch.classes along, a module of a type that it cannot pickle."""

    def count(splits):
        return torch.tensor(len(splits.classes)), torch.ops.aten.add(1, 1)

    assert launch.run(count, 1, digits) == [(torch.tensor(10), 2)]


def test_of_a_view_only_its_own_numbers_are_sent():
    large = torch.arange(400_000.0).reshape(1000, 4, 10, 10)
    last = large.to(memory_format=torch.channels_last)[-2:]
    views = {"rows": large[3:5], "columns": large[:, 1], "channels_last": last, "whole": large}
    for name, view in views.items():
        packed = pickling.pack(view, name)
        back = pickling.unpack(packed)
        assert torch.equal(back, view), name
        assert back.stride() == view.stride(), name
        assert len(packed) < 10_000 or name in ("columns", "whole"), f"{name}: {len(packed):,} bytes"


SCALE = 1.0


class Counted:
    """A class as one of a notebook's cell: sent by value (`by_value`)."""

    made, table = 0, {}

    def __init__(self, number):
        self.number = number

    def scaled(self):
        return SCALE * self.number


class CountedModule(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)

    def forward(self, x):
        return self.layer(x) * SCALE


class Kind(enum.Enum):
    ONE = 1


@pytest.fixture
def by_value():
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def test_what_comes_back_leaves_the_callers_classes_alone(by_value, monkeypatch):
    def work(given):
        Counted.made = 99  # in the rank only
        return {"new": Counted(3), "given": given, "module": CountedModule(), "kind": Kind.ONE}

    methods = Counted.scaled, Counted.table, CountedModule.forward
    for made in (5, 6):
        Counted.made = made
        found = launch.run(work, 1, [Counted(4)])[0]
        monkeypatch.setitem(globals(), "SCALE", 10.0 * made)
        assert (Counted.scaled, Counted.table, CountedModule.forward) == methods
        assert Counted.table is methods[1]
        assert Counted.made == made
        assert isinstance(found["new"], Counted)
        assert found["new"].scaled() == 30.0 * made
        assert found["given"][0].scaled() == 40.0 * made
        assert torch.equal(found["module"](torch.ones(1, 2)), found["module"].layer(torch.ones(1, 2)) * SCALE)
        assert found["kind"] is Kind.ONE


def test_a_class_made_in_a_rank_comes_back_whole():
    def work():
        class Inner:
            factor = 3

            def times(self, x):
                return self.factor * x

        return Inner()

    assert launch.run(work, 1)[0].times(2) == 6


@pytest.mark.parametrize("draw", ["random.random()", "np.random.rand()", "random.getrandbits(64)"])
def test_ranks_draw_different_numbers(draw):
    def work():
        import random  # noqa: F401

        import numpy as np  # noqa: F401

        return eval(draw)

    drawn = [number for _ in range(2) for number in launch.run(work, 2)]
    assert len(set(drawn)) == 4


def test_several_launches_at_once_from_threads():
    def work(number):
        x = torch.tensor([float(number)])
        dist.all_reduce(x)
        return float(x)

    script = sys.modules["__main__"]
    for _ in range(2):
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(lambda number: launch.run(work, 2, number), range(3)))
        assert found == [[0.0, 0.0], [2.0, 2.0], [4.0, 4.0]]
        assert sys.modules["__main__"] is script


def test_one_rank_is_enough():
    assert launch.run(lambda: (dist.get_world_size(), dist.get_backend(), launch.device()), 1) == [
        (1, "gloo", torch.device("cpu"))
    ]


def test_lines_are_whole_and_named(capfd):
    def talk():
        rank = dist.get_rank()
        for line in range(50):
            for piece in ("line ", str(line), " of ", str(rank), "\n"):
                sys.stdout.write(piece)
                sys.stdout.flush()
        print("careful", file=sys.stderr)
        os.write(1, b"from native code\n")
        subprocess.run(["echo", "from a child"], check=True)
        print("without an end", end="", flush=True)

    launch.run(talk, 2)
    out, err = capfd.readouterr()
    lines = [f"[rank {rank}] line {line} of {rank}" for rank in (0, 1) for line in range(50)]
    others = [
        f"[rank {rank}] {said}"
        for rank in (0, 1)
        for said in ("from native code", "from a child", "without an end")
    ]
    assert Counter(out.splitlines()) == Counter(lines + others)
    assert Counter(err.splitlines()) == Counter(["[rank 0] careful", "[rank 1] careful"])
    positions = [out.index(line) for line in lines[:50]]
    assert positions == sorted(positions), "a rank's lines are out of order"


def test_bars_of_rank_0_are_shown_here(capfd, monkeypatch):
    from tqdm import auto

    shown = []

    class Bar(auto.tqdm):
        def refresh(self, *args, **options):
            shown.append((self.desc, self.n, self.total, self.postfix))
            return super().refresh(*args, **options)

    monkeypatch.setattr(auto, "tqdm", Bar)

    def work():
        from tqdm import tqdm

        tqdm(range(3), delay=60).close()
        with tqdm(range(3), desc=f"work {dist.get_rank()}", mininterval=0, leave=False) as bar:
            for i in bar:
                bar.set_postfix(i=i)

    launch.run(work, 2)
    assert {name for name, *_ in shown} == {"work 0"}
    assert shown[-1] == ("work 0", 3, 3, "i=2")
    assert "rank 1" not in "".join(capfd.readouterr())


def test_data_loaders_have_workers_of_their_own():
    def read():
        parts = DataLoader(
            torch.arange(10), batch_size=5, num_workers=2, worker_init_fn=lambda _: print("loading")
        )
        return torch.cat(list(parts)).tolist()

    assert launch.run(read, 2) == [list(range(10))] * 2


def test_ranks_see_what_the_launching_process_sees(monkeypatch, tmp_path):
    launch.run(int, 1)  # the server is warm: what follows changes after it has started
    monkeypatch.setenv("SOMETHING_NEW", "here")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "beside.py").write_text("def say():\n    return 'beside'\n")

    def look():
        import beside

        return os.environ["SOMETHING_NEW"], os.getcwd(), beside.say(), torch.get_num_threads()

    share = max(1, host.usable_cores() // 2)
    assert launch.run(look, 2) == [("here", str(tmp_path), "beside", share)] * 2
    assert launch.run(torch.get_num_threads, 1, threads=1) == [1]


def test_the_group_can_be_made_by_hand():
    def by_hand():
        assert not dist.is_initialized()
        dist.init_process_group("gloo")
        dist.barrier()
        dist.destroy_process_group()
        return os.environ["RANK"], os.environ["WORLD_SIZE"]

    assert launch.run(by_hand, 2, backend=None) == [("0", "2"), ("1", "2")]


def test_only_the_loopback_interface_is_listened_on():
    def listening():
        dist.barrier()
        return [
            c.laddr.ip for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN
        ]

    def all_of_them():
        mine = listening()
        family = [
            process.net_connections("inet")
            for process in (psutil.Process(), psutil.Process(os.getppid()).parent())
        ]
        return mine, [
            c.laddr.ip for connections in family for c in connections if c.status == psutil.CONN_LISTEN
        ]

    for mine, theirs in launch.run(all_of_them, 2):
        assert set(mine + theirs) == {"127.0.0.1"}


def test_a_fixed_port_is_free_again_after_success_and_failure():
    def fail():
        raise ValueError

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    for _ in range(2):
        assert launch.run(dist.get_rank, 2, port=port) == [0, 1]
        with pytest.raises(launch.WorkerError):
            launch.run(fail, 2, port=port)


def test_the_loop_of_the_suite_runs_in_ranks(digits):
    def train(splits):
        torch.manual_seed(dist.get_rank())
        batches = data.Batches(splits.train, 64, rank=dist.get_rank(), world_size=2, drop_last=True)
        model = torch.nn.parallel.DistributedDataParallel(models.LeNet5())
        training.fit(
            model, splits, training.Recipe(epochs=1), device=launch.device(), batches=batches, validate=False
        )
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    first, second = launch.run(train, 2, digits)
    assert torch.equal(first, second)


def test_a_script_without_a_guard_is_run_once(tmp_path, root):
    (tmp_path / "script.py").write_text(
        textwrap.dedent("""
        import torch.distributed as dist
        from companion import launch
        print("top level")
        def work():
            return dist.get_rank()
        print(launch.run(work, 2))
        """)
    )
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "top level\n[0, 1]\n"
    assert done.stderr == ""


def test_under_torchrun_a_rank_finds_its_device(monkeypatch):
    monkeypatch.delenv("COMPANION_DEVICE", raising=False)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert launch.device() == torch.device("cuda:1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert launch.device() == torch.device("cuda:0"), "GPUs in turn"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert launch.device() == torch.device("cpu")


@pytest.mark.parametrize(("gpus", "ranks", "backend"), [(2, 2, "nccl"), (1, 2, "gloo"), (0, 2, "gloo")])
def test_under_torchrun_all_ranks_of_a_machine_take_one_backend(monkeypatch, gpus, ranks, backend):
    monkeypatch.delenv("COMPANION_DEVICE", raising=False)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda place: None)
    taken = []
    monkeypatch.setattr(dist, "init_process_group", lambda name, timeout: taken.append(name))
    for rank in range(ranks):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        launch.join()
    assert taken == [backend] * ranks


def test_each_rank_with_a_gpu_of_its_own_uses_nccl(monkeypatch):
    def check(device, world_size, backend="auto"):
        where = launch.places(world_size, device)
        return where, launch._backend(backend, where)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    gpus = [torch.device("cuda:0"), torch.device("cuda:1")]
    assert check("auto", 2) == (gpus, "cpu:gloo,cuda:nccl")
    assert check("auto", 2, "nccl") == (gpus, "nccl")
    assert check("cuda:0", 2) == ([gpus[0]] * 2, "gloo")
    assert check("cuda", 3) == ([*gpus, gpus[0]], "gloo")
    with pytest.raises(ValueError, match="nccl needs a GPU of its own for each of 3 ranks; there are 2"):
        check("cuda", 3, "nccl")


def test_the_next_launch_survives_the_end_of_the_server():
    launch.run(int, 1)
    server = psutil.Process(forkserver._forkserver._forkserver_pid)
    server.kill()
    while server.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert launch.run(dist.get_rank, 2) == [0, 1]


@pytest.fixture
def kernel(root):
    manager, client = start_new_kernel(kernel_name="python3", extra_arguments=["--log-level=ERROR"])
    yield manager, client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def executed(client, code: str, seconds: float = 60) -> tuple[str, str]:
    """What a cell printed, and the message of its error."""
    said, wrong = [], []

    def hear(message):
        if message["msg_type"] == "stream":
            said.append(message["content"]["text"])
        elif message["msg_type"] == "error":
            wrong.append(f"{message['content']['ename']}: {message['content']['evalue']}")

    client.execute_interactive(textwrap.dedent(code), output_hook=hear, timeout=seconds)
    return "".join(said), "".join(wrong)


CELL = """
    import time, torch.distributed as dist
    from tqdm.auto import tqdm
    from companion import launch

    def work(fail):
        for _ in tqdm(range(2)):
            pass
        if dist.get_rank() == fail:
            raise KeyError("of this cell")  # here
        dist.barrier()
        return dist.get_rank()
"""


def test_a_notebooks_cell(kernel):
    _, client = kernel
    said, wrong = executed(client, CELL + "    print(launch.run(work, 2, None))")
    assert "[0, 1]" in said
    assert "rank" not in said
    assert not wrong
    _, wrong = executed(client, "launch.run(work, 2, 1)")
    assert wrong.startswith("WorkerError: rank 1 failed first: KeyError: 'of this cell'")
    assert 'Cell In[1], line 9, in work\n    raise KeyError("of this cell")  # here' in wrong
    assert "rank 0 was at Cell In[1], line 10, in work: dist.barrier()" in wrong


def test_interrupting_a_notebook_leaves_no_process(kernel):
    manager, client = kernel
    executed(client, CELL + "    launch.run(work, 2, None)")
    before = launch_faults.ours()
    client.execute("launch.run(time.sleep, 2, 1000)")
    while len(ranks := launch_faults.ours() - before) < 2:
        time.sleep(0.05)
    for pid in ranks:
        launch_faults.asleep(psutil.Process(pid))
    manager.interrupt_kernel()
    reply = client.get_shell_msg(timeout=60)["content"]
    assert reply["ename"] == "KeyboardInterrupt"
    deadline = time.monotonic() + 20
    while launch_faults.ours() - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not launch_faults.ours() - before
    assert "[0, 1]" in executed(client, "print(launch.run(work, 2, None))")[0]


@pytest.mark.parametrize("case", launch_faults.FAULTS)
def test_faults(case):
    with launch_faults.no_orphans():
        launch_faults.FAULTS[case]()
