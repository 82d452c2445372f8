"""Replicas in threads compute what the one model does, whatever the inputs look like."""

import copy
import socket
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from companion import data_parallel, measure, models, parity
from companion.data_parallel import ThreadedDataParallel


def gradients(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    F.cross_entropy(model(images), labels).backward()
    return parity.gradients(model)


def wrapped(model: nn.Module, replicas: int = 2) -> ThreadedDataParallel:
    return ThreadedDataParallel(copy.deepcopy(model), ["cpu"] * replicas)


@pytest.mark.parametrize(("replicas", "count"), [(1, 8), (2, 8), (2, 7), (3, 8), (3, 2), (2, 1)])
def test_gradients_are_those_of_the_model(replicas, count, digits):
    """In float32, with sums in another order."""
    net, (images, labels) = models.LeNet5(), digits.train
    threaded = wrapped(net, replicas)
    expected = gradients(net, images[:count], labels[:count])
    found = gradients(threaded, images[:count], labels[:count])
    assert parity.difference(found, expected) < 1e-5


def test_outputs_come_in_order_and_in_shape():
    net, x = nn.Linear(3, 2), torch.randn(7, 3)
    assert torch.allclose(wrapped(net, 3)(x), net(x), atol=1e-6)


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 3)

    def forward(self, pair, *more, scale=1.0, table=None):
        left, right = pair
        assert table is None or table["rows"].shape[0] == left.shape[0]
        return {"sum": self.net(left + right) * scale, "more": [extra * 2 for extra in more], "nothing": None}


def test_nested_and_named_inputs_and_outputs():
    net, x, y, z = Nested(), torch.randn(5, 3), torch.randn(5, 3), torch.arange(5)
    options = {"scale": torch.tensor(2.0), "table": {"rows": torch.ones(5, 1)}}
    found, expected = wrapped(net)((x, y), z, **options), net((x, y), z, **options)
    assert torch.allclose(found["sum"], expected["sum"], atol=1e-6)
    assert torch.equal(found["more"][0], torch.arange(5) * 2)
    assert found["nothing"] is None


def test_scalars_come_back_one_for_each_replica():
    class Mean(nn.Module):
        def forward(self, x):
            return x.mean()

    assert torch.equal(wrapped(Mean(), 3)(torch.arange(5.0)), torch.tensor([0.5, 2.5, 4.0]))


def test_inputs_that_disagree_are_refused():
    with pytest.raises(
        ValueError, match=r"one batch dimension; tensors have the shapes \[\(4, 2\), \(3, 2\)\]"
    ):
        data_parallel.scatter((torch.ones(4, 2), torch.ones(3, 2)), [torch.device("cpu")] * 2)
    with pytest.raises(ValueError, match=r"shapes \[\]"):
        data_parallel.scatter((3, torch.tensor(1.0)), [torch.device("cpu")])


def test_outputs_that_cannot_be_joined_are_refused():
    class Length(nn.Module):
        def forward(self, x):
            return len(x)

    with pytest.raises(TypeError, match="outputs of type int cannot be joined"):
        wrapped(Length())(torch.ones(4))


def test_devices_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match="'cuda:99' is not available"):
        ThreadedDataParallel(nn.Linear(2, 2), ["cpu", "cuda:99"])


def test_what_a_replica_raises_says_where():
    class Picky(nn.Module):
        def forward(self, x):
            if (x < 0).any():
                raise ZeroDivisionError("negative")
            return x

    with pytest.raises(ZeroDivisionError, match="negative") as caught:
        wrapped(Picky(), 2)(torch.tensor([1.0, 1.0, -1.0]))
    assert caught.value.__notes__ == ["in replica 1 of 2, on cpu, with inputs of shape (1,)"]


def test_only_the_first_piece_moves_running_statistics():
    norm = nn.BatchNorm1d(2)
    threaded, x = wrapped(norm, 2), torch.randn(10, 2)
    threaded(x)
    norm(x[:5])
    assert torch.equal(threaded.module.running_mean, norm.running_mean)
    assert int(threaded.module.num_batches_tracked) == 1


def test_modes_reach_every_replica():
    class Look(nn.Module):
        def forward(self, x):
            seen.append(
                (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), self.training, (x @ x.T).dtype)
            )
            return x

    seen = []
    threaded, x = ThreadedDataParallel(Look(), ["cpu", "cpu"]), torch.ones(4, 4)
    threaded.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        threaded(x)
    with torch.inference_mode():
        threaded(x)
    threaded.train()(x)
    assert seen[:2] == [(False, False, False, torch.bfloat16)] * 2
    assert seen[2:4] == [(False, True, False, torch.float32)] * 2
    assert seen[4:] == [(True, False, True, torch.float32)] * 2


def test_threads_are_put_back():
    torch.set_num_threads(2)
    ThreadedDataParallel(nn.Linear(2, 2), ["cpu", "cpu"], threads=1)(torch.ones(4, 2))
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.LSTM(4, 3, 2, batch_first=True), (6, 5, 4)),
        (
            lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 2),
            (6, 5, 8),
        ),
    ],
)
def test_other_architectures(make, shape):
    """An LSTM keeps its weights in a list besides; a transformer has views and buffers."""

    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = make()

        def forward(self, x):
            output = self.net(x)
            return output[0] if isinstance(output, tuple) else output

    net, x = First(), torch.randn(*shape)
    threaded = wrapped(net)
    net(x).pow(2).mean().backward()
    threaded(x).pow(2).mean().backward()
    assert parity.difference(parity.gradients(threaded), parity.gradients(net)) < 1e-5


class Holding(nn.Module):
    """A model with something that cannot be copied, or must not be."""

    def __init__(self, **held):
        super().__init__()
        self.layer, self.calls = nn.Linear(4, 3), 0
        self.__dict__.update(held)

    def forward(self, x):
        self.calls += 1
        self.kept = self.layer(x)
        if hasattr(self, "sizes"):
            self.sizes.append(len(x))
        return self.kept


HELD = {
    "a lock": threading.Lock,
    "a condition": threading.Condition,
    "a module": lambda: threading,
    "a generator": lambda: (i for i in range(9)),
    "a random generator": torch.Generator,
    "a socket": socket.socket,
    "an intermediate tensor": lambda: torch.ones(3, requires_grad=True) * 2,
}


@pytest.mark.parametrize("make", HELD.values(), ids=HELD)
def test_what_a_model_holds_is_shared_by_its_replicas(make):
    held = make()
    net, x = Holding(held=held), torch.randn(6, 4)
    threaded = ThreadedDataParallel(net, ["cpu"] * 2)
    for _ in range(3):  # from the second on, it holds what forward has kept
        net.zero_grad()
        threaded(x).sum().backward()
    found = parity.gradients(net)
    net.zero_grad()
    net(x).sum().backward()
    assert parity.difference(found, parity.gradients(net)) < 1e-5
    assert net.held is held
    if isinstance(held, socket.socket):
        held.close()


def test_what_forward_sets_is_lost_and_what_it_changes_in_place_stays():
    net = Holding(sizes=[])
    ThreadedDataParallel(net, ["cpu"] * 3)(torch.randn(7, 4))
    assert sorted(net.sizes) == [1, 3, 3]
    assert net.calls == 0
    assert not hasattr(net, "kept")


def test_a_hook_sees_each_replicas_samples():
    class Collector:
        def __init__(self, module):
            self.seen = []
            module.register_forward_hook(self.hook)

        def hook(self, module, args, output):
            self.seen.append(len(output))

    net, closure = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), []
    collector = Collector(net[0])
    net[1].register_forward_hook(lambda module, args, output: closure.append(len(output)))
    ThreadedDataParallel(net, ["cpu"] * 2)(torch.randn(7, 4))
    assert sorted(collector.seen) == sorted(closure) == [3, 4]


def pruned() -> nn.Module:
    layer = nn.Linear(4, 3)
    prune.l1_unstructured(layer, "weight", amount=0.5)
    return layer


CHANGED = {
    "weight_norm": lambda: nn.utils.weight_norm(nn.Linear(4, 3)),
    "spectral_norm": lambda: nn.utils.spectral_norm(nn.Linear(4, 3)),
    "pruned": pruned,
    "parametrized": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)),
    "orthogonal": lambda: nn.utils.parametrizations.orthogonal(nn.Linear(4, 3)),
    "spectral, parametrized": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)),
    "without a bias": lambda: nn.Linear(4, 3, bias=False),
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("make", CHANGED.values(), ids=CHANGED)
def test_layers_whose_weights_are_computed(make):
    net, x = nn.Sequential(make(), nn.ReLU(), nn.Linear(3, 2)).eval(), torch.randn(6, 4)
    threaded = ThreadedDataParallel(net, ["cpu"] * 2)
    for _ in range(2):
        net.zero_grad()
        expected = net(x)
        expected.sum().backward()
        gradients = parity.gradients(net)
        net.zero_grad()
        output = threaded(x)
        output.sum().backward()
        assert torch.allclose(output, expected, atol=1e-6)
        assert parity.difference(parity.gradients(net), gradients) < 1e-5
    net.train()
    threaded(x).sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # of torch 2.15
def test_a_scripted_part_is_refused():
    net = nn.Sequential(nn.Linear(4, 3), torch.jit.script(nn.Linear(3, 2)))
    with pytest.raises(TypeError, match="1 is scripted: replicate the module"):
        ThreadedDataParallel(net, ["cpu"] * 2)(torch.randn(6, 4))


def test_tied_weights_stay_tied():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    replica = data_parallel.replicate(net, [torch.device("cpu")] * 2)[1]
    assert replica[1].weight is replica[0].weight
    assert replica[0].weight is not net[0].weight


def test_parts_of_a_step_and_the_prediction():
    net, x, y = models.LeNet5(), torch.randn(8, 3, 32, 32), torch.zeros(8, dtype=torch.long)
    plain, threaded = data_parallel.step_parts(net, x, y, 2), data_parallel.step_parts(wrapped(net), x, y, 2)
    assert list(plain) == ["forward", "backward"]
    assert list(threaded) == ["scatter", "replicate", "forward", "gather", "backward"]
    assert all(seconds > 0 for seconds in (*plain.values(), *threaded.values()))
    models_by_name = {"one": net, "many": wrapped(net)}
    series = data_parallel.parts_in_turn(models_by_name, x, y, 3)
    assert {len(seconds) for parts in series.values() for seconds in parts.values()} == {3}
    assert list(series["many"]) == list(threaded)
    slow, fast = (
        {"forward": [2.0, 4.0], "backward": [2.0, 4.0]},
        {"forward": [1.0, 1.0], "backward": [1.0, 1.0]},
    )
    assert data_parallel.gain_in_turn(slow, fast) == measure.Spread(3.0, 2.0, 4.0, 2)
    times = {"scatter": 1.0, "replicate": 2.0, "forward": 99.0, "gather": 3.0, "backward": 99.0}
    assert data_parallel.predicted_step({"forward": 10.0, "backward": 20.0}, times, 2) == 5 + 20 + 6
