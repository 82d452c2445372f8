"""Sizes and peaks are those of the tensors."""

import torch
from torch import nn

from companion import memory


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
