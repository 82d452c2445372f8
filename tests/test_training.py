import collections
import math
import random
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import torch

from companion import data, devices, models, training

RECIPE = training.Recipe(epochs=3, batch_size=64, augment=data.Augment(2), label_smoothing=0.05, seed=3)


@pytest.fixture(scope="module")
def few(digits) -> data.Splits:
    return replace(digits, train=data.Split(digits.train.images[:256], digits.train.labels[:256]))


def train(splits, recipe=RECIPE, **options):
    training.seed_everything(0)
    model = models.LeNet5()
    history = training.fit(model, splits, recipe, device="cpu", progress=False, **options)
    return model.state_dict(), history


def assert_equal(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_model_learns_the_digits(digits):
    weights, history = train(digits, training.Recipe(epochs=8))
    model = models.LeNet5()
    model.load_state_dict(weights)
    assert training.evaluate(model, digits.val).accuracy > 0.9
    assert len(history.train_loss) == len(history.val_loss) == len(history.epoch_seconds) == 8
    assert history.train_loss[-1] < history.train_loss[0] / 4
    assert history.epoch_samples == [1257 // 64 * 64] * 8
    assert history.samples_per_second > 0
    assert max(history.learning_rate) <= 4e-3


def test_the_same_seed_gives_the_same_weights_bit_for_bit(few):
    weights, history = train(few)
    again, history_again = train(few)
    assert_equal(weights, again)
    assert history.train_loss == history_again.train_loss
    other, _ = train(few, replace(RECIPE, seed=4))
    assert not torch.equal(weights["fc3.weight"], other["fc3.weight"])


def test_fit_equals_the_loop_written_out(few):
    recipe = training.Recipe(
        epochs=2, schedule="constant", optimizer="sgd", learning_rate=0.01, weight_decay=0.0
    )
    weights, _ = train(few, recipe)
    training.seed_everything(0)
    model = models.LeNet5()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True)
    batches = data.Batches(few.train, 64, drop_last=True)
    for epoch in range(2):
        batches.set_epoch(epoch)
        for images, labels in batches:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
    assert_equal(weights, model.state_dict())


KILLED = """
import os, signal, sys
from dataclasses import replace
import torch
sys.path.insert(0, "tests")
from companion import data, models, training
from test_training import RECIPE
torch.set_num_threads(1)
splits = data.load("digits")
splits = replace(splits, train=data.Split(splits.train.images[:256], splits.train.labels[:256]))
training.seed_everything(0)
steps = 0
def step(*arguments):
    global steps
    steps += 1
    if steps == 11:  # the third step of the third epoch
        os.kill(os.getpid(), signal.SIGKILL)
    return training.plain_step(*arguments)
training.fit(models.LeNet5(), splits, RECIPE, device="cpu", step=step, checkpoint=sys.argv[1], progress=False)
"""


def test_a_killed_run_resumes_to_the_weights_of_an_uninterrupted_one(few, tmp_path, root, python):
    checkpoint = tmp_path / "folder" / "run.pt"
    killed = subprocess.run([*python, "-c", KILLED, str(checkpoint)], cwd=root)
    assert killed.returncode == -9
    assert [path.name for path in checkpoint.parent.iterdir()] == ["run.pt"]
    resumed, history = train(few, checkpoint=checkpoint)
    whole, whole_history = train(few)
    assert_equal(resumed, whole)
    assert history.train_loss == whole_history.train_loss
    finished, _ = train(few, checkpoint=checkpoint)  # nothing is left to do
    assert_equal(finished, whole)


def test_dropout_goes_on_where_it_was(few, tmp_path):
    def model():
        training.seed_everything(1)
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(), torch.nn.Linear(3072, 10))

    class StopError(Exception):
        pass

    def until(last):
        steps = iter(range(last))

        def step(*arguments):
            if next(steps, None) is None:
                raise StopError
            return training.plain_step(*arguments)

        return step

    whole, parts = model(), model()
    training.fit(whole, few, RECIPE, device="cpu", progress=False)
    with pytest.raises(StopError):
        training.fit(
            parts, few, RECIPE, device="cpu", step=until(6), checkpoint=tmp_path / "c.pt", progress=False
        )
    parts = model()
    training.fit(parts, few, RECIPE, device="cpu", checkpoint=tmp_path / "c.pt", progress=False)
    assert_equal(parts.state_dict(), whole.state_dict())


def test_a_checkpoint_of_another_recipe_is_refused(few, tmp_path):
    train(few, replace(RECIPE, epochs=1), checkpoint=tmp_path / "c.pt")
    with pytest.raises(
        RuntimeError,
        match=r"is of another recipe \(epochs=1 then, 3 now; learning_rate=0.004 then, 0.1 now\)",
    ):
        train(few, replace(RECIPE, learning_rate=0.1), checkpoint=tmp_path / "c.pt")


def test_what_cannot_be_trained_is_told_before_it_begins(few):
    frozen = models.LeNet5().requires_grad_(False)
    with pytest.raises(ValueError, match="LeNet5 has no parameter that requires a gradient"):
        training.fit(frozen, few, RECIPE, device="cpu", progress=False)
    with pytest.raises(ValueError, match="Flatten has no parameter that requires a gradient"):
        training.fit(torch.nn.Flatten(), few, RECIPE, device="cpu", progress=False)
    with pytest.raises(ValueError, match="there is no batch to train on"):
        training.fit(models.LeNet5(), few, RECIPE, device="cpu", batches=[], progress=False)
    with pytest.raises(ValueError, match="batch_size=5000"):
        training.fit(models.LeNet5(), few, training.Recipe(batch_size=5000), device="cpu", progress=False)


def test_a_checkpoint_of_an_older_version_is_refused_and_changes_nothing(few, tmp_path):
    recipe = replace(RECIPE, epochs=1)
    train(few, recipe, checkpoint=tmp_path / "c.pt")
    saved = torch.load(tmp_path / "c.pt", weights_only=True)
    del saved["random"]["python"]
    torch.save(saved, tmp_path / "c.pt")
    model = models.LeNet5()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"c.pt is of an older version"):
        training.fit(model, few, recipe, device="cpu", checkpoint=tmp_path / "c.pt", progress=False)
    assert_equal(model.state_dict(), before)


OTHER_FILES = {
    "plain weights": lambda: models.LeNet5().state_dict(),
    "a list": lambda: [1, 2],
    "a number": lambda: 3,
}


@pytest.mark.parametrize("make", OTHER_FILES.values(), ids=OTHER_FILES)
def test_a_file_of_another_kind_is_no_checkpoint(few, tmp_path, make):
    torch.save(make(), tmp_path / "c.pt")
    with pytest.raises(RuntimeError, match=r"c.pt was not written by this training"):
        train(few, checkpoint=tmp_path / "c.pt")


def test_a_checkpoint_of_another_model_is_refused_and_changes_nothing(few, tmp_path):
    train(few, replace(RECIPE, epochs=1), checkpoint=tmp_path / "c.pt")
    other = models.LeNet5(7)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    recipe = replace(RECIPE, epochs=1)
    with pytest.raises(
        RuntimeError, match=r"c.pt is of another model \(fc1.bias was \(120,\), and is \(7,\)"
    ):
        training.fit(other, few, recipe, device="cpu", checkpoint=tmp_path / "c.pt", progress=False)
    assert_equal(other.state_dict(), before)


class Reader(torch.nn.Module):
    """Takes tokens and a mask, and gives a dictionary."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = torch.nn.Embedding(20, 8), torch.nn.Linear(8, 3)

    def forward(self, tokens, mask):
        read = self.embedding(tokens) * mask[..., None]
        return {"logits": self.head(read.mean(1)), "features": [read]}


Pair = collections.namedtuple("Pair", "tokens mask")


def reader_step(model, inputs, labels, loss_function, optimizer):
    optimizer.zero_grad()
    inputs = inputs._asdict() if isinstance(inputs, Pair) else inputs
    inputs = dict(zip(("tokens", "mask"), inputs, strict=True)) if isinstance(inputs, list) else inputs
    labels = labels["classes"] if isinstance(labels, dict) else labels
    loss = loss_function(model(**inputs)["logits"], labels)
    loss.backward()
    optimizer.step()
    return loss.detach()


@pytest.mark.parametrize(
    "nest",
    [
        lambda tokens, mask, labels: ({"tokens": tokens, "mask": mask}, labels),
        lambda tokens, mask, labels: ([tokens, mask], {"classes": labels}),
        lambda tokens, mask, labels: (Pair(tokens, mask), labels),
    ],
)
def test_a_step_of_ones_own_may_have_nested_batches(few, nest):
    generator = torch.Generator().manual_seed(0)
    tokens, labels = torch.randint(0, 20, (12, 5), generator=generator), torch.arange(12) % 3
    batches = [nest(tokens[i : i + 4], torch.ones(4, 5), labels[i : i + 4]) for i in (0, 4, 8)]
    recipe = training.Recipe(epochs=2, batch_size=4, channels_last=True)
    options = {"step": reader_step, "batches": batches, "validate": False, "progress": False}
    history = training.fit(Reader(), few, recipe, device="cpu", **options)
    assert history.epoch_samples == [12, 12]
    assert history.train_loss[1] < history.train_loss[0]


class Gives(torch.nn.Module):
    def __init__(self, what):
        super().__init__()
        self.layer, self.what = torch.nn.Linear(3 * 32 * 32, 10), what

    def forward(self, x):
        return self.what(self.layer(x.flatten(1)))


@pytest.mark.parametrize(
    ("what", "kind"),
    [(lambda x: {"logits": x}, "dict"), (lambda x: (x, x), "tuple"), (lambda x: [x], "list")],
)
def test_a_model_that_gives_no_logits_is_told_so_at_once(few, what, kind):
    message = f"the model gives a {kind} where one tensor of logits .* is needed"
    with pytest.raises(TypeError, match=message):
        training.fit(Gives(what), few, RECIPE, device="cpu", progress=False)
    with pytest.raises(TypeError, match=message):
        training.evaluate(Gives(what), few.val)


def test_a_batch_without_a_tensor_is_told_so(few):
    options = {"batches": [("text", 3)], "step": lambda *parts: torch.zeros(()), "validate": False}
    recipe = training.Recipe(epochs=1, schedule="constant")
    with pytest.raises(TypeError, match="a batch of tuple holds no tensor"):
        training.fit(models.LeNet5(), few, recipe, device="cpu", progress=False, **options)


class StopNowError(Exception):
    pass


def interrupt_after(steps: int, step=training.plain_step):
    done = 0

    def counted(*parts):
        nonlocal done
        done += 1
        if done > steps:
            raise StopNowError
        return step(*parts)

    return counted


DAMAGES = {
    "a page of zeros": lambda raw, at: raw[:at] + bytes(4096) + raw[at + 4096 :],
    "a flipped bit": lambda raw, at: raw[:at] + bytes([raw[at] ^ 0x40]) + raw[at + 1 :],
    "the rest is missing": lambda raw, at: raw[:at],
    "a byte too many": lambda raw, at: raw[:at] + b"x" + raw[at:],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_refused_or_harmless(few, tmp_path, damage):
    path = tmp_path / "c.pt"
    with pytest.raises(StopNowError):
        train(few, checkpoint=path, step=interrupt_after(5))
    good = path.read_bytes()
    whole, _ = train(few, checkpoint=path)
    refused, said = 0, f"checkpoint {path} is damaged"
    for place in range(1, 20):
        path.write_bytes(damage(good, len(good) * place // 20 + place))
        try:
            weights, _ = train(few, checkpoint=path)
            assert_equal(weights, whole)
        except RuntimeError as error:
            if said not in str(error):
                raise
            refused += 1
    assert refused >= 15


def test_checksums_are_written_even_where_the_process_does_without(few, tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        train(few, replace(RECIPE, epochs=1), checkpoint=tmp_path / "c.pt")
        assert not torch.serialization.get_crc32_options()
    finally:
        torch.serialization.set_crc32_options(True)
    train(few, replace(RECIPE, epochs=1), checkpoint=tmp_path / "c.pt")


DRAWS = {
    "torch": lambda: float(torch.rand(())),
    "random": random.random,
    "numpy": lambda: float(np.random.rand()),
    "numpy, normal": lambda: float(np.random.normal()),
    "random, normal": lambda: random.gauss(0, 1),
    "shuffle": lambda: random.sample(range(9), 9)[0] / 9,
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_random_numbers_go_on_where_a_training_was_interrupted(few, tmp_path, draw):
    def mixed(model, images, labels, loss_function, optimizer):
        images = images + 0.1 * draw() * images.flip(0)
        return training.plain_step(model, images, labels, loss_function, optimizer)

    whole, _ = train(few, step=mixed)
    again, _ = train(few, step=mixed)
    assert_equal(whole, again)
    with pytest.raises(StopNowError):
        train(few, checkpoint=tmp_path / "c.pt", step=interrupt_after(6, mixed))
    random.seed(999), np.random.seed(999)  # another process begins with other numbers
    resumed, _ = train(few, checkpoint=tmp_path / "c.pt", step=mixed)
    assert_equal(whole, resumed)


def test_a_damaged_checkpoint_is_named(few, tmp_path):
    (tmp_path / "c.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(RuntimeError, match=r"c.pt is damaged .*: delete it to start again"):
        train(few, checkpoint=tmp_path / "c.pt")
    with pytest.raises(ValueError, match="cannot be written: name a file"):
        train(few, checkpoint=tmp_path)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_with_step_and_learning_rate(few, bad):
    losses = iter([1.0, 1.0, 1.0, 1.0, 1.0, bad])

    def step(model, images, labels, loss_function, optimizer):
        return torch.tensor(next(losses))

    with pytest.raises(
        FloatingPointError, match=rf"the loss is {bad} at step 6 \(epoch 2\), learning rate 0.001"
    ):
        train(few, replace(RECIPE, schedule="constant", learning_rate=1e-3), step=step)


def test_a_divergence_among_several_steps_checked_at_once_is_located():
    with pytest.raises(FloatingPointError, match=r"the loss is nan at step 8 \(epoch 2\), learning rate 0.2"):
        training._check_finite(
            [torch.tensor(x) for x in (1.0, math.nan, math.inf)], [0.1, 0.2, 0.3], epoch=1, last_step=9
        )


def test_mixed_precision_trains(few):
    _, history = train(few, replace(RECIPE, amp="bfloat16", channels_last=True))
    _, plain = train(few)
    assert history.train_loss != plain.train_loss
    # Bfloat16 keeps 8 bits: 0.4 % a product.
    assert history.train_loss == pytest.approx(plain.train_loss, rel=0.05)


def test_a_step_of_your_own_is_used_and_contradictions_are_refused(few):
    calls = []

    def step(*arguments):
        calls.append(arguments[1].shape)
        return training.plain_step(*arguments)

    weights, _ = train(few, step=step)
    assert calls == [(64, 3, 32, 32)] * 12
    assert_equal(weights, train(few)[0])
    with pytest.raises(ValueError, match="has no effect on a step of your own"):
        train(few, replace(RECIPE, amp="bfloat16"), step=step)


def test_other_batches_may_replace_the_recipes(few):
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*few.train), 50)
    _, history = train(few, batches=loader)
    assert history.epoch_samples == [256] * 3


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"optimizer": "adamm"}, r"optimizer='adamm' is unknown; use one of 'adamw', 'sgd'"),
        ({"schedule": "cosine"}, "schedule='cosine' is unknown"),
        ({"amp": "int8"}, "amp='int8' is unknown; use one of None, 'bfloat16', 'float16'"),
        ({"epochs": 0}, "epochs=0 must be above 0"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0 must be above 0"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        training.Recipe(**wrong)


def test_a_batch_larger_than_the_data_is_refused(few):
    with pytest.raises(ValueError, match="batch_size=300 is not between 1 and the 256 samples"):
        train(few, replace(RECIPE, batch_size=300))


def test_evaluation_is_exact_and_keeps_the_mode(digits):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.9), torch.nn.Linear(3072, 10)).train()
    result = training.evaluate(model, digits.val, batch_size=77)
    assert model.training
    with torch.no_grad():
        logits = model.eval()(digits.val.images)
    torch.testing.assert_close(result.logits, logits)
    assert result.accuracy == int((logits.argmax(1) == digits.val.labels).sum()) / 180
    assert result.loss == pytest.approx(torch.nn.functional.cross_entropy(logits, digits.val.labels).item())


@pytest.mark.skipif(devices.why_not("xla") is not None, reason=str(devices.why_not("xla")))
def test_training_on_xla_gives_the_cpus_result(python, root):
    code = """
import sys
from dataclasses import replace
import torch
from companion import data, devices, models, training
splits = data.load("digits")
splits = replace(splits, train=data.Split(splits.train.images[:256], splits.train.labels[:256]))
recipe = training.Recipe(epochs=2, optimizer="sgd", learning_rate=0.01, augment=data.Augment(2))
losses = []
for device in (devices.select("xla"), devices.select("cpu")):
    training.seed_everything(0)
    model = models.LeNet5()
    losses.append(training.fit(model, splits, recipe, device=device, progress=False).train_loss)
    assert next(model.parameters()).device == device
torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-5, atol=0)  # the same sums in another order
"""
    subprocess.run([*python, "-c", code], check=True, cwd=root)
