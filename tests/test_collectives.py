"""What ranks say to each other is counted, timed and compared."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional

from companion import collectives, ddp, launch, measure


def test_equality_is_seen_from_every_rank():
    def look():
        same, other = torch.ones(3), torch.ones(3)
        other[2] += dist.get_rank() * 1e-7
        return collectives.equal_everywhere(same), collectives.equal_everywhere(other)

    assert launch.run(look, 3) == [(True, False)] * 3


def test_bytes_are_those_of_the_tensors():
    def send():
        with collectives.counted_bytes() as sizes:
            dist.all_reduce(torch.ones(10))
            dist.all_reduce(torch.ones(10, dtype=torch.bfloat16))
        dist.all_reduce(torch.ones(5))
        return sizes

    assert launch.run(send, 2) == [[40, 20]] * 2


def test_bytes_sent_are_those_of_rings_by_kind():
    def send():
        pairs = dist.new_group([0, 1])
        with collectives.SentBytes() as sent:
            dist.all_reduce(torch.ones(12))
            dist.all_gather_into_tensor(torch.empty(12), torch.ones(3))
            dist.all_gather([torch.empty(3) for _ in range(4)], torch.ones(3))
            dist.reduce_scatter_tensor(torch.empty(3), torch.ones(12))
            functional.all_reduce(torch.ones(12), "sum", dist.group.WORLD).sum()
            if dist.get_rank() < 2:
                dist.all_reduce(torch.ones(12), group=pairs)
            if dist.get_rank() == 0:
                dist.send(torch.ones(5), 1)
            elif dist.get_rank() == 1:
                dist.recv(torch.ones(5), 0)
            dist.broadcast(torch.ones(7), 0)
        return sent.sizes, sent.total

    found = launch.run(send, 4, device="cpu", threads=1)
    ring = {"all_reduce": 2 * 72.0, "all_gather": 2 * 36.0, "reduce_scatter": 36.0}
    assert found[0][0] == ring | {"all_reduce": 2 * 72 + 48, "send": 20}
    assert found[1][0] == ring | {"all_reduce": 2 * 72 + 48}
    assert found[2][0] == ring
    assert found[2][1] == sum(ring.values())


def test_buckets_of_ddp_are_seen():
    def train():
        model = ddp.wrap(torch.nn.Linear(10, 3))
        with collectives.SentBytes() as sent:
            model(torch.ones(2, 10)).sum().backward()
        return sent.total

    assert launch.run(train, 2, device="cpu", threads=1) == [4 * 33.0] * 2


def test_the_line_is_found_again():
    line = collectives.AllReduce(2e-4, 1e9)
    fitted = collectives.AllReduce.fitted(
        {size: measure.Spread.of([line.seconds(size)]) for size in (1_000, 100_000, 10_000_000)}
    )
    assert fitted.latency_seconds == pytest.approx(2e-4)
    assert fitted.bytes_per_second == pytest.approx(1e9)
    assert line.seconds(2e6, calls=3) == pytest.approx(3 * 2e-4 + 2e-3)


def test_the_slowest_ranks_time_counts():
    def look():
        rank = dist.get_rank()
        times = collectives.compare({"a": lambda: None}, rounds=2)
        return collectives.slowest(float(rank)), times.rounds

    (first, second) = launch.run(look, 2)
    assert first == second
    assert first[0] == 1.0


def test_times_between_measured_sizes():
    line = collectives.AllReduce(1e-3, 1e9, ((1e4, 1e-3), (1e6, 1e-1)))
    assert line.between(1e5) == pytest.approx(1e-2), "halfway on logarithmic scales"
    assert line.between(2e5, calls=2) == pytest.approx(2e-2)
    assert line.between(1e8) == line.seconds(1e8), "beyond what was measured: the line"
    assert collectives.AllReduce(1e-3, 1e9).between(1e5) == pytest.approx(1e-3 + 1e-4)
