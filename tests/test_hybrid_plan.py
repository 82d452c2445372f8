"""What is planned: a job is described rightly, a machine measured, layouts ranked."""

from dataclasses import replace

import pytest
import torch
from test_hybrid import WIDTH, job

from companion import collectives, hybrid_machine, hybrid_plan, launch, models
from companion.clusters import Cluster, Link
from companion.hybrid_steps import Job
from companion.measure import Spread

CLUSTER = Cluster(4, 4, 1e10, 1e9, Link(1e-5, 1e9), Link(1e-5, 1e9), "a test's")


def test_a_model_is_described_by_its_numbers():
    work = hybrid_plan.workload(job())
    model, block = job().make(), 2 * 4 * WIDTH * WIDTH
    assert work.parameters == sum(p.numel() for p in model.parameters())
    assert work.forward_flops == 2 * (4 * block + WIDTH * WIDTH + 10 * WIDTH)
    assert work.boundary_bytes == 4 * WIDTH
    # Of each block its input and the hidden values (before and after ReLU share their bytes or not).
    assert 4 * 4 * 5 * WIDTH <= work.saved_bytes <= 4 * 4 * 10 * WIDTH
    assert (work.layers, work.splits) == (4, WIDTH)
    assert work.outside_parameters == ((WIDTH + 1) * WIDTH, (WIDTH + 1) * 10)


def test_what_tensor_parallelism_leaves_whole_is_found():
    """Biases of rows, the first and the last layer are whole; hidden values are split, blocks' inputs not."""
    work = hybrid_plan.workload(job())
    assert work.whole_parameters == 4 * WIDTH + sum(work.outside_parameters)
    assert work.whole_flops == 2 * (10 + WIDTH) * WIDTH
    assert 0 < work.whole_saved_bytes < work.saved_bytes / 2


def test_attention_is_split_by_heads():
    def make() -> models.VisionTransformer:
        return models.VisionTransformer(width=32, layers=2, heads=4)

    images, blocks = torch.zeros(8, 3, 32, 32), ["blocks.0", "blocks.1"]
    split = Job(make, images, torch.zeros(8, dtype=torch.long), blocks, make().split(), 4)
    work = hybrid_plan.workload(split)
    # Two normalisations, and the biases of two layers that add up, in each block; all that is outside.
    outside = sum(p.numel() for p in make().parameters()) - sum(p.numel() for p in make().blocks.parameters())
    assert work.whole_parameters == outside + 2 * (4 * 32 + 2 * 32)
    assert sum(work.outside_parameters) == outside
    assert work.outside_parameters[1] == 10 * 33


def test_a_link_gives_back_the_line_that_it_was_made_from():
    line = collectives.AllReduce(2e-4, 5e8)
    for ranks in (2, 4, 7):
        link = hybrid_machine.ring(line, 2 * (ranks - 1), ranks)
        for size in (1e3, 1e6):
            assert link.reduce(size, ranks) == pytest.approx(line.seconds(size))


def test_this_machine_is_measured():
    for cluster in launch.run(hybrid_machine.measured, 2, job(), 3, device="cpu", threads=1):
        assert cluster.devices == cluster.per_node == 2
        assert 1e5 < cluster.flops < 1e14
        assert cluster.inside.bytes_per_second > 1e5
        assert set(cluster.inside.kinds) == {"reduce", "gather", "scatter"}
        assert cluster.memory_bytes > 2**28
        assert cluster.updates > 1e3


def test_a_plan_ranks_what_is_possible():
    found = hybrid_plan.plan(replace(job(), images=torch.zeros(32, WIDTH)), CLUSTER)
    assert len(found.fit) > 5
    assert not found.too_large
    assert [one.step_seconds for one in found.fit] == sorted(one.step_seconds for one in found.fit)
    assert found.table(3).head[:2] == ("layout (model, not measurement)", "ms")
    assert len(found.table(3).rows) == 3


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="must be names of the model's equal layers"):
        hybrid_plan.workload(replace(job(), blocks=["9"]))
    with pytest.raises(ValueError, match="no layout of 4 devices divides the batch of 7, 3 blocks"):
        hybrid_plan.plan(
            replace(job(), images=torch.zeros(7, WIDTH), blocks=["1", "2", "3"], splits=1), CLUSTER
        )


def test_predictions_are_held_to_measurements():
    measured = {name: Spread(t, 0.9 * t, 1.1 * t, 5) for name, t in {"a": 1.0, "b": 2.0, "c": 4.0}.items()}
    right = hybrid_plan.agreement(measured, {"a": 1.1, "b": 2.0, "c": 3.0})
    assert right.median_error == pytest.approx(0.1)
    assert right.errors["c"] == -0.25
    assert right.rank_correlation == 1
    assert right.best_found
    wrong = hybrid_plan.agreement(measured, {"a": 4.0, "b": 2.0, "c": 1.0})
    assert wrong.rank_correlation == -1
    assert not wrong.best_found
    with pytest.raises(ValueError, match="2 measurements cannot be ranked"):
        hybrid_plan.agreement({"a": measured["a"], "b": measured["b"]}, {"a": 1.0, "b": 1.0})
