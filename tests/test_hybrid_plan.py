"""What is planned: a model is described rightly, a machine measured, layouts ranked."""

import pytest
import torch
from test_hybrid import BATCH, WIDTH, network, trained

from companion import collectives, hybrid_plan, launch
from companion.layouts import Cluster, Layout, Link

EXAMPLE = torch.randn(8, WIDTH)
CLUSTER = Cluster(4, 4, 1e10, 1e9, Link(1e-5, 1e9), Link(1e-5, 1e9), "a test's")


def test_a_model_is_described_by_its_numbers():
    model = network()
    work = hybrid_plan.workload(model, EXAMPLE, list(model)[:4], splits=WIDTH)
    weights = 4 * 2 * 4 * WIDTH * WIDTH + 10 * WIDTH
    assert work.parameters == sum(p.numel() for p in model.parameters())
    assert work.forward_flops == 2 * weights
    assert work.boundary_bytes == 4 * WIDTH
    # Of each block its input and the hidden values (before and after ReLU share their bytes or not).
    assert 4 * 4 * 5 * WIDTH <= work.saved_bytes <= 4 * 4 * 10 * WIDTH
    assert work.layers == 4


def test_describing_leaves_the_model_as_it_was():
    model = network()
    hybrid_plan.workload(model, EXAMPLE, list(model)[:4])
    assert all(not module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("layout", [Layout(2), Layout(2, sharding="parameters")], ids=str)
def test_predicted_bytes_are_those_that_ranks_hold(layout):
    """To 2 %: shards of the last layer's ten outputs are padded."""
    model = network()
    held = hybrid_plan.layouts.held_bytes(
        layout, hybrid_plan.workload(model, EXAMPLE, list(model)[:4]), BATCH
    )
    predicted = sum(held.values()) - held["activations"]
    for _, counted in launch.run(trained, 2, layout, device="cpu", threads=1):
        assert sum(counted.values()) == pytest.approx(predicted, rel=0.02)


def test_a_link_gives_back_the_line_that_it_was_made_from():
    line = collectives.AllReduce(2e-4, 5e8)
    for ranks in (2, 4, 7):
        link = hybrid_plan.link_of(line, ranks)
        for size in (1e3, 1e6):
            assert link.reduce(size, ranks) == pytest.approx(line.seconds(size))


def test_this_machine_is_measured():
    found = launch.run(
        lambda: hybrid_plan.measured_cluster(network(), EXAMPLE, 3), 2, device="cpu", threads=1
    )
    for cluster in found:
        assert cluster.devices == cluster.per_node == 2
        assert 1e5 < cluster.flops < 1e14
        assert cluster.inside.bytes_per_second > 1e5
        assert cluster.memory_bytes > 2**28


def test_a_plan_ranks_what_is_possible():
    model = network()
    found = hybrid_plan.plan(model, EXAMPLE, 32, CLUSTER, blocks=list(model)[:4], splits=WIDTH)
    assert len(found.fit) > 5
    assert not found.too_large
    assert [one.step_seconds for one in found.fit] == sorted(one.step_seconds for one in found.fit)
    assert found.table(3).head[:2] == ("layout (model, not measurement)", "ms")
    assert len(found.table(3).rows) == 3


def test_bad_input_is_refused():
    model = network()
    with pytest.raises(ValueError, match="blocks must be modules of the model"):
        hybrid_plan.workload(model, EXAMPLE, list(network()))
    with pytest.raises(ValueError, match="no layout of 4 devices divides batch_size=7"):
        hybrid_plan.plan(model, EXAMPLE, 7, CLUSTER, blocks=list(model)[:3])
