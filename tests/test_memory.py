"""Sizes and peaks are those of the tensors."""

import threading
from concurrent import futures

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from companion import devices, memory


def test_sizes_are_counted_from_the_tensors():
    linear = nn.Linear(100, 10)
    assert memory.parameters(linear) == 1010
    assert memory.model_bytes(linear) == 4040
    assert 4040 < memory.disk_bytes(linear) < 8000
    tied = nn.Sequential(linear, nn.Linear(100, 10))
    tied[1].weight = linear.weight
    assert memory.model_bytes(tied) == 4040 + 40
    # Weight, bias, mean, variance; a counter of 8 bytes.
    assert memory.model_bytes(nn.BatchNorm1d(8)) == 4 * 4 * 8 + 8
    assert memory.model_bytes(linear.half()) == 2020


def test_peak_memory_counts_what_lives_at_once():
    def function():
        a = torch.empty(1000)
        b = torch.empty(2000)
        del a
        view = b.view(2, 1000)  # shares b's memory
        c = torch.empty(1500)
        return view, c

    assert memory.peak_bytes(function) == 4 * 3500
    outside = torch.zeros(500)
    assert memory.peak_bytes(lambda: outside.add_(1)) == 0


def sparse_step() -> None:
    embedding = nn.Embedding(1000, 8, sparse=True)
    optimizer = torch.optim.SparseAdam(embedding.parameters())
    embedding(torch.tensor([1, 2])).sum().backward()
    optimizer.step()


def in_thread() -> None:
    thread = threading.Thread(target=lambda: torch.zeros(10_000).sum())
    thread.start()
    thread.join()


def nested() -> None:
    torch.nested.nested_tensor([torch.zeros(300), torch.zeros(500)], layout=torch.jagged)


PEAKS = {  # bytes, and how many more there may be
    "a sparse gradient and its optimizer": (sparse_step, 3 * 4 * 8 * 1000, 2000),
    "a sparse product": (lambda: torch.eye(50).to_sparse() @ torch.zeros(50, 4), 50 * 50 * 4, 3000),
    "compressed rows": (lambda: torch.eye(50).to_sparse_csr() @ torch.zeros(50, 4), 50 * 50 * 4, 3000),
    "blocks": (lambda: torch.eye(64).to_sparse_bsr((8, 8)), 64 * 64 * 4 + 8 * 8 * 8 * 4, 40_000),
    "nested": (nested, 3200, 4000),
    "growth in place": (lambda: torch.empty(0).resize_(10_000).zero_(), 40_000, 0),
    "a thread": (in_thread, 40_000, 4),
    "a pool": (lambda: futures.ThreadPoolExecutor(1).submit(torch.zeros, 10_000).result(), 40_000, 4),
}


@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta", "ignore:The PyTorch API of nested")
@pytest.mark.parametrize(("function", "least", "more"), PEAKS.values(), ids=PEAKS)
def test_peaks_of_other_layouts_of_growth_and_of_threads(function, least, more):
    assert least <= memory.peak_bytes(function) <= least + more


def test_growth_of_what_was_there_before_counts():
    outside = torch.zeros(500)
    assert memory.peak_bytes(lambda: outside.resize_(2000)) == 4 * 1500


def test_a_pool_that_runs_already_is_seen_and_left_as_it_was():
    with futures.ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()
        submit = futures.ThreadPoolExecutor.submit
        assert memory.peak_bytes(lambda: pool.submit(lambda: torch.zeros(10_000).sum()).result()) >= 40_000
        assert futures.ThreadPoolExecutor.submit is submit
        assert pool.submit(torch.zeros, 3).result().sum() == 0


def models() -> nn.Module:
    return nn.Sequential(nn.Linear(100, 200), nn.ReLU(), nn.Linear(200, 10))


def test_sizes_where_there_is_no_storage():
    expected = 4 * (100 * 200 + 200 + 200 * 10 + 10)
    with torch.device("meta"):
        assert memory.model_bytes(models()) == expected
    with FakeTensorMode():
        assert memory.model_bytes(models()) == expected
    if devices.why_not("xla") is None:
        assert memory.model_bytes(models().to(devices.select("xla"))) == expected
    sparse = nn.Module()
    rows, columns, values = torch.arange(51), torch.arange(50), torch.ones(50)
    sparse.register_buffer("matrix", torch.sparse_csr_tensor(rows, columns, values, check_invariants=True))
    assert memory.model_bytes(sparse) == 51 * 8 + 50 * 8 + 50 * 4


def test_saved_bytes_are_counted_once_and_until_they_go():
    net = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 2))
    x = torch.randn(16, 8)
    with memory.SavedBytes(net) as saved:
        output = net(x)
        assert saved.now == x.nbytes + 16 * 4 * 4, "the input, and tanh's output, which two operators keep"
        output.sum().backward()
        assert saved.now == 0
    assert saved.most == x.nbytes + 16 * 4 * 4
    with memory.SavedBytes(net, x) as saved:
        net(x)
    assert saved.most == 16 * 4 * 4
