"""A pipeline computes what the uncut model does, under every schedule, and fails in words."""

import copy
import re
from dataclasses import replace

import launch_faults
import pipeline_faults
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import torchrun
from torch import nn

from companion import data, launch, memory, model_parallel, pipeline, schedules, splitting, training
from companion.pipeline import Pipeline

AT = {2: ["features.6"], 3: ["features.3", "features.8"], 4: ["features.3", "features.6", "features.8"]}


def small() -> nn.Module:
    return model_parallel.alexnet(10, 0, width=0.1, hidden=16)


def batch(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, 64, 64, generator=generator), torch.randint(
        0, 10, (count,), generator=generator
    )


def gradients_through(
    schedule: str, micro_batches: int, at: list[str]
) -> tuple[float, dict[str, torch.Tensor], list]:
    pipeline = Pipeline(splitting.split(small(), at), schedule, micro_batches)
    loss = pipeline.step(*batch(16))
    found = {name: p.grad for stage in pipeline.own.values() for name, p in stage.named_parameters()}
    return loss.item(), found, pipeline.spans


CASES = [("gpipe", 2, 2), ("gpipe", 3, 4), ("1f1b", 2, 8), ("1f1b", 3, 4)]
CASES += [("interleaved", 2, 4), ("interleaved", 2, 8), ("zero_bubble", 2, 4), ("zero_bubble", 3, 8)]


@pytest.mark.parametrize(("schedule", "ranks", "micro_batches"), CASES)
def test_gradients_are_those_of_the_uncut_model(schedule, ranks, micro_batches):
    """In float32, with sums in another order."""
    uncut, (images, labels) = small(), batch(16)
    expected = F.cross_entropy(uncut(images), labels)
    expected.backward()
    at = AT[ranks * schedules.SCHEDULES[schedule].stages_per_rank]
    answers = launch.run(gradients_through, ranks, schedule, micro_batches, at, threads=1)
    found = {name: gradient for _, own, _ in answers for name, gradient in own.items()}
    assert found.keys() == dict(uncut.named_parameters()).keys()
    for name, parameter in uncut.named_parameters():
        assert (found[name] - parameter.grad).norm() / parameter.grad.norm() < 1e-5, name
    assert all(loss == pytest.approx(expected.item(), abs=1e-5) for loss, *_ in answers)
    for rank, (_, _, spans) in enumerate(answers):
        assert schedules.in_flight(spans) == schedules.predicted_in_flight(
            schedule, ranks, rank, micro_batches
        )
        forwards = sorted((span.stage, span.micro_batch) for span in spans if span.kind == "F")
        own = range(rank, len(at) + 1, ranks)
        assert forwards == [(stage, piece) for stage in own for piece in range(micro_batches)], "each once"


def test_training_is_that_of_the_uncut_model_with_the_same_micro_batches():
    recipe = training.Recipe(epochs=1, batch_size=64, learning_rate=1e-3, schedule="constant")
    splits = data.resized(data.load("digits"), 64)

    def train(recipe):
        return model_parallel.train(small(), splits, recipe, AT[2], "1f1b", 4)

    ranks = launch.run(train, 2, recipe, threads=1)
    assert ranks[0].accuracy == ranks[1].accuracy > 0.15, "both have the whole model"
    assert ranks[0].history.train_loss == ranks[1].history.train_loss

    def accumulated(model, images, labels, loss_function, optimizer):
        optimizer.zero_grad()
        losses = [F.cross_entropy(model(x), y) for x, y in zip(images.chunk(4), labels.chunk(4), strict=True)]
        (sum(losses) / 4).backward()
        optimizer.step()
        return torch.stack(losses).mean().detach()

    uncut = small()
    history = training.fit(
        uncut, splits, recipe, device="cpu", step=accumulated, validate=False, progress=False
    )
    assert ranks[0].history.train_loss == pytest.approx(history.train_loss, abs=1e-3)
    assert ranks[0].accuracy == pytest.approx(training.evaluate(uncut, splits.test).accuracy, abs=0.01)


def test_the_recipes_loss_is_the_pipelines(digits):
    few = replace(digits, train=data.Split(digits.train.images[:64], digits.train.labels[:64]))

    def losses(smoothing):
        recipe = training.Recipe(epochs=1, batch_size=64, label_smoothing=smoothing)
        model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10), nn.ReLU(), nn.Linear(10, 10))
        torch.manual_seed(0)
        return model_parallel.train(model, few, recipe, ["1"], "gpipe", 2).history.train_loss

    (plain, _), (smooth, _) = (launch.run(losses, 2, smoothing) for smoothing in (0.0, 0.9))
    assert plain != smooth


WEIGHTS = torch.tensor([1.0, 5.0])
LOSSES = {
    "class weights": lambda x, labels: F.cross_entropy(x, labels, weight=WEIGHTS),
    "ignored labels": lambda x, labels: F.cross_entropy(x, labels, ignore_index=0),
    "a sum": lambda x, labels: F.cross_entropy(x, labels, reduction="sum"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_that_is_no_plain_mean_is_refused(name):
    def step():
        stages = [nn.Linear(4, 4), nn.Linear(4, 2)]
        Pipeline(stages, "1f1b", 2, LOSSES[name]).step(torch.ones(6, 4), torch.tensor([0, 0, 0, 1, 1, 1]))

    with pytest.raises(launch.WorkerError, match=r"the loss of the batch is .* use a plain mean over"):
        launch.run(step, 2)


def test_the_first_run_moves_neither_statistics_nor_random_numbers():
    def steps():
        torch.manual_seed(0)
        norm = nn.BatchNorm1d(4)
        stages = [nn.Sequential(nn.Linear(4, 4), norm), nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 2))]
        before = torch.get_rng_state()
        pipeline = Pipeline(stages, "gpipe", 2)
        pipeline._prepare(torch.zeros(4, 4))
        return (
            torch.equal(before, torch.get_rng_state()),
            int(norm.num_batches_tracked),
            norm.running_mean.abs().sum().item(),
        )

    assert launch.run(steps, 2) == [(True, 0, 0.0)] * 2


def test_collect_gives_every_rank_every_stage():
    def collected():
        torch.manual_seed(dist.get_rank())
        stages = [nn.BatchNorm1d(3), nn.Linear(3, 3)]
        with torch.no_grad():
            for tensor in (*stages[dist.get_rank()].parameters(), stages[0].running_mean):
                tensor.fill_(1.0 + dist.get_rank())
        Pipeline(stages, "gpipe", 2).collect()
        return [stages[0].weight[0].item(), stages[0].running_mean[0].item(), stages[1].weight[0, 0].item()]

    assert launch.run(collected, 2) == [[1.0, 1.0, 2.0]] * 2


def test_zero_grad_between_steps_starts_again():
    def twice():
        stages = [nn.Linear(4, 4), nn.Linear(4, 2)]
        own, pipeline = stages[dist.get_rank()], Pipeline(stages, "1f1b", 2)
        x, labels = torch.ones(4, 4), torch.zeros(4, dtype=torch.long)
        pipeline.step(x, labels)
        once = own.weight.grad.clone()
        own.zero_grad()
        pipeline.step(x, labels)
        return torch.equal(own.weight.grad, once)

    assert launch.run(twice, 2) == [True, True]


def test_a_stage_on_a_device_sends_through_main_memory():
    """What ranks that share a GPU do; the device is the CPU here, and gradients come back through the same
    way.
    """
    staged = pipeline._Sendable(nn.Linear(3, 2), torch.device("cpu"), staged=True)
    x = torch.ones(2, 3, requires_grad=True)
    staged(x).sum().backward()
    assert torch.equal(x.grad, staged.module.weight.sum(0).detach().expand(2, 3))


class Turned(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2)


def test_a_stage_may_hand_on_what_is_not_in_one_piece():
    def through() -> bool:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), Turned(), nn.Linear(5, 3), nn.Flatten(), nn.Linear(18, 2))
        x, labels = torch.randn(8, 5, 4), torch.arange(8) % 2
        F.cross_entropy(model(x), labels).backward()
        expected = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        pipeline = Pipeline(splitting.split(model, "1"), "1f1b", 4)
        pipeline.step(x, labels)
        half = slice(0, 2) if dist.get_rank() == 0 else slice(2, None)
        pairs = zip(pipeline.own.parameters(), expected[half], strict=True)
        return all(torch.allclose(p.grad, e, atol=1e-6) for p, e in pairs)

    assert launch.run(through, 2, device="cpu") == [True, True]


def test_activations_are_as_many_as_predicted():
    def kept(schedule):
        stages = splitting.split(small(), AT[2])
        pipeline, (images, labels) = Pipeline(stages, schedule, 4), batch(16)
        steps = model_parallel.measure_steps(pipeline, images, labels, 1)
        value = images[:4]
        for index, stage in enumerate(stages):
            with memory.SavedBytes(stage, *([images] if not index else [])) as saved:
                value = stage(value.detach().requires_grad_(index > 0))
            if str(index) in pipeline.own:
                one = saved.most
        return steps.saved_bytes / one

    for schedule in ("gpipe", "1f1b"):
        for rank, ratio in enumerate(launch.run(kept, 2, schedule, threads=1)):
            assert ratio == pytest.approx(schedules.predicted_in_flight(schedule, 2, rank, 4), rel=0.1)


def test_a_rehearsal_shows_the_schedule():
    steps = launch.run(model_parallel.rehearse, 2, "zero_bubble", 4, 0.002, 1)
    for rank, step in enumerate(steps):
        assert {span.stage for span in step.spans} == {rank}
        assert {(span.kind, span.micro_batch) for span in step.spans} == {
            (kind, m) for kind in "FIW" for m in range(4)
        }
        assert step.seconds.low > 4 * 3 * 0.002
    assert 0 < schedules.bubble([step.spans for step in steps]) < 1


def test_torchrun_trains_through_a_pipeline():
    flags = "--epochs 1 --micro-batches 4 --width 0.1 --schedule gpipe"
    said = torchrun("companion.model_parallel", flags)
    assert re.search(r"2 ranks: test accuracy [\d.]+%, [\d,]+ samples/s", said)


@pytest.mark.parametrize("case", pipeline_faults.FAULTS)
def test_faults(case):
    with launch_faults.no_orphans():
        pipeline_faults.FAULTS[case]()


def test_cutting_leaves_the_model_as_it_was():
    model = small()
    before = copy.deepcopy(model.state_dict())
    splitting.split(model, AT[4])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
