"""DDP: the training of all ranks is that of one, and what its step costs is measured as it is."""

import math
import re

import pytest
import torch
import torch.distributed as dist
from conftest import torchrun
from torch import nn

from companion import collectives, data, ddp, launch, measure, models, parity, training

RECIPE = training.Recipe(epochs=2, batch_size=64, schedule="constant", optimizer="sgd", learning_rate=0.01)


def test_two_ranks_train_the_model_of_one(digits):
    """In float32, with sums in another order: the weights agree to a thousandth after 38 steps."""

    def weights(splits):
        training.seed_everything(0)
        net = ddp.wrap(models.LeNet5())
        share = {"rank": dist.get_rank(), "world_size": dist.get_world_size(), "drop_last": True}
        batches = data.Batches(splits.train, 64 // dist.get_world_size(), **share)
        training.fit(net, splits, RECIPE, device="cpu", batches=batches, validate=False, progress=False)
        return torch.cat([p.detach().flatten() for p in net.parameters()])

    (one,), (first, second) = launch.run(weights, 1, digits, threads=1), launch.run(weights, 2, digits)
    assert torch.equal(first, second)
    assert not torch.equal(one, first), "were there two ranks?"
    assert (one - first).norm() / one.norm() < 1e-3


def trained(recipe, save_to=None):
    """Of each rank, from weights of its own: DDP makes them equal."""
    splits = data.load("digits")
    training.seed_everything(recipe.seed + dist.get_rank())
    return ddp.train(models.LeNet5(), splits, recipe, save_to, progress=False)


def test_train_gives_one_model_and_saves_it_once(tmp_path):
    path = tmp_path / "new" / "weights.pt"
    ranks = launch.run(trained, 2, training.Recipe(epochs=3, batch_size=64), path)
    assert ranks[0].fingerprint == ranks[1].fingerprint
    assert ranks[0].accuracy == ranks[1].accuracy > 0.5
    saved = models.LeNet5()
    saved.load_state_dict(torch.load(path))
    assert parity.fingerprint(saved) == ranks[0].fingerprint
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_batch_that_cannot_be_shared_is_refused():
    with pytest.raises(launch.WorkerError, match=r"world_size=3 does not divide batch_size=64; use 2 ranks"):
        launch.run(trained, 3, RECIPE)


def test_torchrun_trains_the_same_model_as_launch(tmp_path):
    recipe = training.Recipe(epochs=2, batch_size=64, label_smoothing=0.05)
    ranks = launch.run(trained, 2, recipe, threads=1)
    said = torchrun("companion.ddp", f"--epochs 2 --save-to {tmp_path / 'weights.pt'}")
    found = re.search(r"2 ranks: test accuracy ([\d.]+)%, [\d,]+ samples/s, (\w+)", said)
    assert found[2] == ranks[0].fingerprint
    assert float(found[1]) == pytest.approx(100 * ranks[0].accuracy, abs=0.01)
    saved = models.LeNet5()
    saved.load_state_dict(torch.load(tmp_path / "weights.pt"))
    assert parity.fingerprint(saved) == found[2]


def test_all_reduces_and_steps_are_timed():
    sizes = [4096, 2**20]
    (reduced, other) = launch.run(collectives.all_reduce_seconds, 2, sizes, 3)
    assert reduced == other, "ranks report the slowest"
    assert list(reduced) == sizes
    assert all(seconds.low > 0 for seconds in reduced.values())

    (rows, _) = launch.run(ddp.scaling, 2, models.LeNet5, (3, 32, 32), [8, 64], 1)
    assert [row.batch_size for row in rows] == [8, 64]
    for row in rows:
        assert (row.world_size, row.calls) == (2, 1)
        assert row.gradient_bytes == 4 * sum(p.numel() for p in models.LeNet5().parameters())
        assert all(row.times[way].low > 0 for way in ("alone", "share", "wrapped", "ddp"))


def test_models_that_are_measured_in_turn_share_their_weights_and_keep_no_gradients():
    plain = models.LeNet5()
    other = ddp._of_the_same_weights(models.LeNet5(), plain)
    for mine, its in zip(other.parameters(), plain.parameters(), strict=True):
        assert mine is not its
        assert mine.data_ptr() == its.data_ptr()
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    before = parity.fingerprint(plain)
    losses = [float(training.stepper(model, images, labels)()) for model in (plain, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert all(p.grad is None for model in (plain, other) for p in model.parameters())
    assert parity.fingerprint(plain) == parity.fingerprint(other) != before, "a step of each moves both"


def test_predicted_and_measured_speed_up():
    ways = {"alone": [0.4, 0.8], "share": [0.2, 0.4], "wrapped": [0.3, 0.5], "ddp": [0.25, 0.5]}
    times = measure.Times(ways)
    row = ddp.Scaling(64, 2, times, gradient_bytes=10**8, calls=5)
    assert row.speed_up == measure.Spread(1.6, 1.6, 1.6, 2)
    assert row.predicted(collectives.AllReduce(0.0, math.inf)) == pytest.approx(2)
    assert row.predicted(collectives.AllReduce(0.02, 1e9)) == pytest.approx(0.6 / (0.3 + 0.1 + 0.1))
    # What the wrapper costs, and an all-reduce of 20 MB as it was measured, not as the line says.
    line = collectives.AllReduce(0.02, 1e9, ((1e6, 0.03), (2e7, 0.06), (1e9, 1.0)))
    assert row.refined(line) == pytest.approx(0.6 / (0.4 + 5 * 0.06))


def test_buckets_are_those_that_ddp_makes():
    def count(width):
        net, seen = ddp.wrap(nn.Sequential(*(nn.Linear(width, width) for _ in range(9)))), []

        def hook(state, bucket):
            seen.append(bucket.buffer().nbytes)
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        net.register_comm_hook(None, hook)
        for _ in range(2):
            seen.clear()
            net(torch.ones(1, width)).sum().backward()
        return len(seen), ddp.buckets(net)

    for width in (100, 1500):
        ((made, predicted),) = launch.run(count, 1, width)
        assert abs(made - predicted) <= 1, "a bucket is full only at the end of a parameter"


def test_where_speed_ups_cross():
    assert ddp.crossing([8, 32, 128], [0.5, 0.75, 1.25]) == pytest.approx(64)
    assert ddp.crossing([8, 32], [1.1, 1.2]) == 0
    assert ddp.crossing([8, 32], [0.5, 0.9]) == math.inf
    assert ddp.crossing([8, 32, 128], [1.1, 0.5, 1.5]) == pytest.approx(64), (
        "only from where on it stays above"
    )


def test_the_timeline_has_every_bucket_once():
    def step():
        net = nn.Sequential(
            nn.Flatten(), nn.Linear(3 * 8 * 8, 2000), nn.Linear(2000, 2000), nn.Linear(2000, 10)
        )
        return ddp.timeline(net, torch.ones(4, 3, 8, 8), torch.zeros(4, dtype=torch.long), bucket_cap_mb=1)

    spans = launch.run(step, 2)[0]
    assert [what for what, *_ in spans["compute"]] == ["forward", "backward", "wait"]
    assert sorted(what.split("\n")[0] for what, *_ in spans["all-reduce"]) == ["bucket 0", "bucket 1"]
    assert all(end > start >= 0 for lane in spans.values() for _, start, end in lane)
    assert spans["compute"][0][1] == 0
    assert all(end <= spans["compute"][2][2] for _, _, end in spans["all-reduce"])
