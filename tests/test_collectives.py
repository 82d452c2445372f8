"""What ranks say to each other is counted, timed and compared."""

import pytest
import torch
import torch.distributed as dist

from companion import collectives, launch, measure


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
