import math
import os
import subprocess
import sys
import threading
import time
from concurrent import futures

import psutil
import pytest
import torch
from torch import nn

from companion import data, devices, host, measure, models, training


def test_latency_is_that_of_one_call():
    result = measure.latency(lambda: time.sleep(0.01), min_seconds=0.1)
    assert 0.01 <= result.seconds.low <= result.seconds.median <= result.seconds.high
    assert result.seconds.runs >= 1
    assert result.throughput(50).median == 50 / result.seconds.median
    assert str(result).startswith(f"{result.seconds.median * 1e3:.3g} ")


def test_latency_waits_for_the_device(monkeypatch):
    waited = []
    monkeypatch.setattr(devices, "synchronize", waited.append)
    measure.latency(lambda: None, min_seconds=0.01)
    assert set(waited) == {torch.device("cpu")}


def test_compared_functions_take_turns():
    calls = []
    ways = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = measure.compare(ways, rounds=3, meet=lambda: calls.append("|"), agree=lambda seconds: 7.0)
    order = "ab" + "ba" + "ab" + "ba"  # the warm-up, then the rounds
    assert "".join(calls) == "".join(f"|{name}" for name in order)
    assert times.rounds == {"a": [7.0] * 3, "b": [7.0] * 3}


def test_a_spread_holds_the_median_in_at_least_nine_of_ten_cases():
    generator = torch.Generator().manual_seed(0)
    for runs in (5, 7, 8, 12, 30):
        values = torch.rand(2000, runs, generator=generator).tolist()
        spreads = [measure.Spread.of(row) for row in values]
        inside = sum(spread.low <= 0.5 <= spread.high for spread in spreads) / len(spreads)
        assert inside > 0.88, runs
        assert any(spread.low > min(row) for spread, row in zip(spreads, values, strict=True)) == (runs >= 8)
    few = measure.Spread.of([3.0, 1.0, 2.0])
    assert (few.median, few.low, few.high, few.runs) == (2.0, 1.0, 3.0, 3)
    with pytest.raises(ValueError, match="no value"):
        measure.Spread.of([])


def test_a_spread_of_thousands_of_values():
    for count, normal in ((9, None), (100, None), (2_000, 963), (20_000, 9_883)):
        cut = measure._cut(count)
        outside = 2 * sum(math.comb(count, k) for k in range(cut + 1))
        assert 10 * outside <= 2**count < 10 * (outside + 2 * math.comb(count, cut + 1)), count
        assert normal is None or abs(cut - normal) <= 1, "(n - 1.645 sqrt(n)) / 2"


def test_a_spread_shows_its_range():
    spread = measure.Spread(0.00123, 0.0012, 0.0015, 7)
    assert f"{spread.scaled(1e3):.2f} ms" == "1.23 (1.20-1.50) ms"
    assert spread.rate(3).low == pytest.approx(3 / 0.0015)
    assert str(measure.Spread.of([2.0])) == "2"


def test_ratios_are_taken_round_by_round_and_judged_by_their_spread():
    times = measure.Times({"plain": [2.0, 8.0, 9.0], "fast": [1.0, 2.0, 3.0], "same": [2.1, 7.9, 9.1]})
    assert times.speed_up("fast", over="plain") == measure.Spread(3.0, 2.0, 4.0, 3)
    assert times.part("fast", of="plain").median == pytest.approx(1 / 3)
    assert measure.verdict(times.speed_up("fast", over="plain")) == "faster"
    assert measure.verdict(times.speed_up("plain", over="fast")) == "slower"
    assert measure.verdict(times.speed_up("same", over="plain")) == "no difference"
    assert measure.says(times.speed_up("same", over="plain"), "up", "down", "neither") == "neither"


def test_rounds_that_disagree_wildly_are_not_to_be_trusted():
    assert measure._wild({"a": [1.0, 1.1, 1.0, 0.9, 1.0]}) is None
    assert "'a' lie" in measure._wild({"a": [1.0, 3.0, 1.0, 3.0, 2.0, 1.0]})
    assert measure._wild({"a": [1.0, 9.0]}) is None, "too few to tell"


@pytest.fixture
def clocks(monkeypatch):
    """CPU-seconds of the whole machine and of this process, to be set; two usable cores, two in all."""
    clocks = {"machine": 0.0, "own": 0.0, "cores": 2}
    monkeypatch.setattr(host.Watch, "sure", True)
    monkeypatch.setattr(host, "_machine_seconds", lambda: clocks["machine"])
    monkeypatch.setattr(host, "cpu_seconds", lambda pid: clocks["own"])
    monkeypatch.setattr(host, "usable_cores", lambda: 2)
    monkeypatch.setattr(host.os, "cpu_count", lambda: clocks["cores"])
    return clocks


@pytest.mark.parametrize(
    ("machine", "cores", "said"),
    [
        (24.0, 2, None),  # others took 0.4 of a core
        (30.0, 2, "other processes took 1.0 of 2 cores"),
        (82.0, 8, None),  # of six cores that this process may not use
        (92.0, 8, "other processes took 1.2 of 2 cores"),
    ],
)
def test_what_others_take_of_the_usable_cores_is_seen(clocks, machine, cores, said):
    watch = host.Watch()
    watch.start -= 10
    clocks.update(machine=machine, own=20.0, cores=cores)
    assert watch.busy() == said
    assert watch.busy(again=True) == said
    assert watch.busy() is None, "from here on nothing has been seen yet"


def test_time_of_children_is_ones_own(python):
    before = host.cpu_seconds(os.getpid())
    code = "import time\nwhile time.process_time() < 0.5: pass\nprint('done', flush=True)\ntime.sleep(60)"
    with subprocess.Popen([*python, "-c", code], stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        alive = host.cpu_seconds(os.getpid()) - before
        child.kill()
    assert alive > 0.4
    assert host.cpu_seconds(os.getpid()) - before > 0.4, "ended and waited for, it still counts"
    assert host.cpu_seconds(2**22 + 1) == 0


def test_memory_that_processes_share_counts_once(python):
    code = """
import os, time
kept = bytearray(os.urandom(1)) * 300_000_000
for _ in range(2):
    if not os.fork():
        print("ready", flush=True)
        time.sleep(60)
print("ready", flush=True)
time.sleep(60)
"""
    with subprocess.Popen([*python, "-c", code], stdout=subprocess.PIPE) as parent:
        for _ in range(3):
            parent.stdout.readline()
        taken = host.memory_bytes(parent.pid)
        for process in [*psutil.Process(parent.pid).children(), parent]:
            process.kill()
    if sys.platform == "linux":  # elsewhere what is shared counts for nobody
        assert 290e6 < taken < 400e6
    assert host.memory_bytes(2**22 + 1) == 0


@pytest.mark.parametrize(("ranks", "suspected"), [("2", False), ("1", True)])
def test_a_rank_suspects_nobody_where_it_has_fellows(clocks, monkeypatch, ranks, suspected):
    watch = host.Watch()
    watch.start -= 10
    clocks.update(machine=30.0, own=0.0)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", ranks)
    assert bool(watch.busy()) == suspected


def test_where_children_end_without_being_waited_for_nobody_is_suspected(clocks):
    watch = host.Watch()
    watch.start -= 10
    clocks.update(machine=30.0, own=0.0)
    assert watch.busy()
    host.lose_children()
    assert watch.busy() is None


def test_laps_are_kept_by_name_and_wait_for_each_device(monkeypatch):
    waited, places = [], [torch.device("cpu"), torch.device("meta")]
    monkeypatch.setattr(devices, "synchronize", waited.append)
    laps = measure.Laps(places)
    assert [laps("add", lambda a, b: a + b, 1, 2) for _ in range(3)] == [3, 3, 3]
    assert waited == places * 6
    assert laps.spreads()["add"].runs == 2, "the first is a warm-up"


def test_the_profile_of_a_step_has_all_its_parts(digits):
    model = models.LeNet5()
    optimizer = training.make_optimizer(model, training.Recipe())
    before = model.fc3.weight.clone()
    batches = data.Batches(data.Split(digits.train.images[:128], digits.train.labels[:128]), 64)
    # Runs through the batches twice.
    profile = measure.step_profile(model, batches, optimizer, torch.device("cpu"), steps=5)
    assert {name: len(series) for name, series in profile.items()} == dict.fromkeys(
        ("data", "forward", "backward", "optimizer", "whole"), 5
    )
    sums = [
        sum(parts)
        for parts in zip(
            *(profile[name] for name in ("data", "forward", "backward", "optimizer")), strict=True
        )
    ]
    assert sums == pytest.approx(profile["whole"])
    assert not torch.equal(before, model.fc3.weight)


def test_operators_are_found_longest_first():
    a = torch.randn(300, 300)
    found = measure.operators(lambda: (a @ a).relu())
    assert {"aten::mm", "aten::relu"} <= set(found)
    assert list(found.values()) == sorted(found.values(), reverse=True)


def test_macs_are_those_of_the_formula():
    assert measure.macs(nn.Linear(100, 10), torch.zeros(4, 100)) == 4000
    assert measure.macs(nn.Conv2d(3, 6, 5), torch.zeros(1, 3, 32, 32)) == 6 * 28 * 28 * 3 * 5 * 5


class Threaded(nn.Module):
    """Runs its layer in a thread of its own, or in a pool."""

    def __init__(self, pool: bool):
        super().__init__()
        self.layer, self.pool = nn.Linear(100, 10), futures.ThreadPoolExecutor(1) if pool else None

    def forward(self, x):
        if self.pool:
            return self.pool.submit(self.layer, x).result()
        found = []
        thread = threading.Thread(target=lambda: found.append(self.layer(x)))
        thread.start()
        thread.join()
        return found[0]


class Products(nn.Module):
    def forward(self, x):
        return (x @ x[0]) + torch.dot(x[0], x[1]) + torch.addmv(x[:, 0], x, x[0])


@pytest.mark.parametrize(
    ("model", "example", "macs"),
    [
        (Threaded(pool=False), torch.zeros(4, 100), 4000),
        (Threaded(pool=True), torch.zeros(4, 100), 4000),
        (Products(), torch.ones(4, 8), 4 * 8 + 8 + 4 * 8),
        (nn.LSTM(4, 8, batch_first=True), torch.zeros(3, 5, 4), 15 * (32 * 4 + 32 * 8)),
        (nn.LSTM(4, 8, bidirectional=True), torch.zeros(5, 3, 4), 2 * 15 * (32 * 4 + 32 * 8)),
        (nn.GRU(4, 8), torch.zeros(5, 3, 4), 15 * (24 * 4 + 24 * 8)),
        (nn.MultiheadAttention(8, 2).eval(), None, 5 * 8 * 24 + 5 * 8 * 8 + 2 * 5 * 5 * 8),
        (nn.Sequential(nn.Hardswish(), nn.ReLU6(inplace=True), nn.Softmax(1)), torch.zeros(4, 100), 0),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_macs_of_operators_without_a_formula_of_torchs_and_in_threads(model, example, macs):
    if example is None:
        attention, example = model, torch.zeros(5, 1, 8)
        model = nn.Module()
        model.forward = lambda x: attention(x, x, x, need_weights=False)
    assert measure.macs(model, example) == macs


class Unknown(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x) + x @ x.T


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda x: torch.fft.fft(x, n=4).real, "aten._fft_r2c"),
        (lambda x: torch.cdist(x, x), "aten._cdist_forward"),
        (lambda x: torch.linalg.solve(torch.eye(4), x @ x.T), "aten._linalg_solve_ex"),
    ],
)
def test_operators_that_cannot_be_counted_are_named(function, name):
    with pytest.warns(UserWarning, match=name):
        assert measure.macs(Unknown(function), torch.ones(4, 8)) >= 4 * 4 * 8


@torch.library.custom_op("indexing::product", mutates_args=())
def product(x: torch.Tensor) -> torch.Tensor:
    """An operator of somebody's own; its name begins as that of one without MACs."""
    return x @ x.T


def test_an_operator_of_ones_own_is_named_whatever_it_is_called():
    with pytest.warns(UserWarning, match=r"indexing.product"):
        measure.macs(Unknown(product), torch.ones(4, 8))


def test_counting_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten())
    model[0].weight.grad = gradient = torch.ones_like(model[0].weight)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    measure.macs(model, torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert model.training
    assert model[0].weight.grad is gradient


def test_spreads_measured_apart_give_the_widest_range():
    found = measure.Spread(2.0, 1.0, 4.0, 5).speed_up(over=measure.Spread(6.0, 4.0, 8.0, 3))
    assert (found.median, found.low, found.high, found.runs) == (3.0, 1.0, 8.0, 3)
