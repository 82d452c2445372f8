"""Quantized models are integers, run, and keep their accuracy; what cannot be is refused in words."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.modules.rnn import GRU  # nn.GRU is torch_xla's, once a test has imported that

from companion import data, devices, fusing, low_bits, memory, models, parity, quantization, training
from companion.quantization import QuantizationError

pytestmark = pytest.mark.skipif(
    not quantization.engines(), reason="torch has no engine of integer kernels here"
)


def accuracy(model: nn.Module, split: data.Split) -> float:
    with torch.no_grad():
        return (model(split.images).argmax(1) == split.labels).double().mean().item()


def batches(splits: data.Splits, count: int = 4) -> list[torch.Tensor]:
    return list(splits.train.images[: 64 * count].split(64))


def network() -> nn.Module:
    torch.manual_seed(0)
    body = [
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
    ]
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 10)).eval()


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        return x + self.conv(x)


def test_static_integers_are_smaller_and_as_accurate(trained_lenet, digits):
    before = parity.fingerprint(trained_lenet)
    made = quantization.static(trained_lenet, batches(digits))
    assert set(quantization.layers(made).quantized) == {
        f"module.{name}" for name in ("conv1", "conv2", "fc1", "fc2", "fc3")
    }
    assert not quantization.layers(made).left
    assert accuracy(made, digits.test) > accuracy(trained_lenet, digits.test) - 0.01
    assert memory.disk_bytes(trained_lenet) / memory.disk_bytes(made) > 3
    assert parity.fingerprint(trained_lenet) == before
    assert not quantization.layers(trained_lenet).quantized


@pytest.mark.parametrize("engine", quantization.engines())
@pytest.mark.parametrize(("per_channel", "observer"), [(True, "histogram"), (False, "minmax")])
def test_each_engine_and_kind_of_scale(trained_lenet, digits, engine, per_channel, observer):
    engine_before = torch.backends.quantized.engine
    made = quantization.static(
        trained_lenet, batches(digits), per_channel=per_channel, observer=observer, engine=engine
    )
    assert torch.backends.quantized.engine == engine_before
    assert accuracy(made, digits.test) > accuracy(trained_lenet, digits.test) - 0.03
    scheme = made.module.fc1.weight().qscheme()
    assert scheme == (torch.per_channel_affine if per_channel else torch.per_tensor_affine)


def test_a_relu_that_several_layers_share_becomes_part_of_each(trained_lenet, digits):
    groups = [["conv1", "relu"], ["conv2", "relu"], ["fc1", "relu"], ["fc2", "relu"]]
    assert not any(isinstance(module, nn.Identity) for module in trained_lenet.modules())
    made = quantization.static(trained_lenet, batches(digits, 1))
    kinds = quantization.layers(made).quantized
    assert list(kinds.values()) == ["ConvReLU2d", "ConvReLU2d", "LinearReLU", "LinearReLU", "Linear"]
    assert isinstance(made.module.relu, nn.Identity)
    assert fusing.fusible(trained_lenet) == groups
    # Here one use follows a sum: the ReLU must stay for it, and so for all.
    residual = models.resnet18().layer1[0]
    assert fusing.fusible(residual) == [["conv1", "bn1"], ["conv2", "bn2"]]
    seen_once = nn.Sequential(nn.Linear(4, 4), shared := nn.ReLU(), nn.Linear(4, 4), shared)
    assert fusing.fusible(seen_once) == [["0", "1"], ["2", "1"]]
    with torch.no_grad():
        x = torch.randn(64, 4)
        found = quantization.static(seen_once, [x], engine="auto")(x)
        assert (found - seen_once(x)).abs().max() < 0.1


def test_a_group_that_does_not_fit_is_refused(trained_lenet, digits):
    model = copy.deepcopy(trained_lenet)
    model.pool = nn.Identity()
    with pytest.raises(QuantizationError, match=r"conv1.*Identity"):
        quantization.static(model, batches(digits, 1), fuse=[["conv1", "pool"]])


def test_layers_that_follow_each_other_become_one(digits):
    net = network()
    assert fusing.fusible(net) == [["0", "1", "2"], ["3", "4"], ["7", "8"]]
    made = quantization.static(net, batches(digits))
    assert list(quantization.layers(made).quantized.values()) == [
        "ConvReLU2d",
        "ConvReLU2d",
        "LinearReLU",
        "Linear",
    ]
    plain = quantization.static(net, batches(digits), fuse=[])
    assert "BatchNorm2d" in quantization.layers(plain).quantized.values()
    assert not quantization.layers(plain).left
    with torch.no_grad():
        expected = net(digits.test.images)
        for model in (made, plain):
            assert (model(digits.test.images) - expected).norm() / expected.norm() < 0.1


def test_a_traced_model_may_have_residual_sums_and_functional_calls(digits):
    torch.manual_seed(0)
    model = nn.Sequential(Residual(), nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(3600, 10)).eval()
    x = digits.test.images[:64]
    made = quantization.traced(model, [x])
    assert len(quantization.layers(made).quantized) == 3
    assert not quantization.layers(made).left
    with torch.no_grad():
        assert 0 < (made(x) - model(x)).norm() / model(x).norm() < 0.1
    with pytest.raises(QuantizationError, match=r"torch\.fx cannot trace Decides"):
        quantization.traced(Decides(), [x])


class Decides(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_a_layer_that_is_used_twice_is_not_fused():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.relu = nn.Linear(4, 4), nn.ReLU()

        def forward(self, x):
            return self.linear(self.relu(self.linear(x)))

    assert fusing.fusible(Twice()) == []


def test_what_cannot_be_traced_is_fused_where_it_is_plain_to_see():
    class Decides(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

        def forward(self, x):
            return self.net(x) if x.sum() > 0 else x

    assert fusing.fusible(Decides()) == [["net.0", "net.1"]]


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.LSTM(8, 16, batch_first=True),
        lambda: GRU(8, 16, num_layers=2),
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False
        ),
        lambda: nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)),
    ],
    ids=["lstm", "gru", "encoder", "mlp"],
)
def test_dynamic_integers_compute_nearly_the_same(make):
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(4, 6, 8)
    made = quantization.dynamic(model)
    assert quantization.layers(made).quantized
    with torch.no_grad():
        found, expected = (
            answer[0] if isinstance(answer, tuple) else answer for answer in (made(x), model(x))
        )
    assert 0 < (found - expected).norm() / expected.norm() < 0.05


def test_the_gru_that_torch_xla_puts_into_torch_gets_integers_too():
    if reason := devices.why_not("xla"):
        pytest.skip(reason)
    devices.select("xla")  # imports torch_xla
    model, x = nn.GRU(8, 16, batch_first=True).eval(), torch.randn(4, 6, 8)
    assert type(model) is not GRU
    on_cpu = GRU(8, 16, batch_first=True).eval()
    on_cpu.load_state_dict(model.state_dict())
    for made in quantization.dynamic(model), quantization.dynamic(model, [nn.GRU]):
        assert quantization.layers(made).quantized
        with torch.no_grad():
            assert 0 < (made(x)[0] - on_cpu(x)[0]).norm() / on_cpu(x)[0].norm() < 0.05
    assert type(model) is nn.GRU, "the given one stays"


def test_attentions_products_get_integers_too():
    torch.manual_seed(0)
    model, x = models.EncoderClassifier(8, 6, width=32, layers=2, heads=2).eval(), torch.randn(4, 6, 8)
    made = quantization.dynamic(model)
    split = quantization.layers(made)
    assert len(split.quantized) == 2 + 2 * 6, "query, key, value, out and two more in each layer"
    assert set(split.left.values()) == {"EncoderClassifier", "LayerNorm"}
    with torch.no_grad():
        assert 0 < (made(x) - model(x)).norm() / model(x).norm() < 0.1
    assert isinstance(model.encoder.layers[0].self_attn, nn.MultiheadAttention), "the given one stays"


def test_training_with_rounding_is_converted(digits):
    def train(model):
        recipe = training.Recipe(epochs=2, batch_size=64, learning_rate=2e-3)
        training.fit(model, digits, recipe, device="cpu", validate=False, progress=False)

    net = network()
    before = parity.fingerprint(net)
    made = quantization.trained(net, train)
    assert list(quantization.layers(made).quantized.values()) == [
        "ConvReLU2d",
        "ConvReLU2d",
        "LinearReLU",
        "Linear",
    ]
    assert accuracy(made, digits.test) > accuracy(net, digits.test) + 0.3, "it has learned"
    assert parity.fingerprint(net) == before
    with pytest.raises(QuantizationError, match="has never called the model"):
        quantization.trained(net, lambda model: None)


def test_half_precision(trained_lenet, digits):
    made = quantization.cast(trained_lenet, torch.bfloat16)
    assert {p.dtype for p in made.parameters()} == {torch.bfloat16}
    assert next(trained_lenet.parameters()).dtype == torch.float32
    with torch.no_grad():
        assert made(digits.test.images[:4].bfloat16()).dtype == torch.bfloat16
    with pytest.raises(QuantizationError, match=r"neither torch.float16 nor torch.bfloat16"):
        quantization.cast(trained_lenet, torch.float64)
    with pytest.raises(QuantizationError, match="no floating point parameters"):
        quantization.cast(nn.ReLU(), torch.bfloat16)


def test_few_bits_cost_accuracy_and_training_gives_it_back(trained_lenet, digits):
    found = {
        bits: accuracy(low_bits.rounded(trained_lenet, bits, False).eval(), digits.test) for bits in (8, 4, 2)
    }
    assert found[8] > accuracy(trained_lenet, digits.test) - 0.01
    assert found[2] < found[8] - 0.2
    made = low_bits.rounded(trained_lenet, 2, per_channel=False)
    recipe = training.Recipe(epochs=6, batch_size=64, learning_rate=2e-3)
    training.fit(made, digits, recipe, device="cpu", validate=False, progress=False)
    assert accuracy(made.eval(), digits.test) > found[2] + 0.1
    levels = made.fc1.weight[0].unique()
    assert len(levels) <= 3


def test_packed_sizes_are_those_of_the_bits():
    linear = nn.Linear(10, 4)
    assert low_bits.packed_bytes(linear, 4) == 20 + 4 * 4 + 4 * 4
    assert low_bits.packed_bytes(linear, 3, per_channel=False) == 15 + 4 + 4 * 4


REFUSED = {
    "no calibration data": lambda net, x: quantization.static(net, []),
    "leave labels out": lambda net, x: quantization.static(net, [(x, x)]),
    "integers are made of float32": lambda net, x: quantization.static(net, [x.double()]),
    r"cannot take a calibration batch \(2, 1, 8, 8\)": lambda net, x: quantization.static(net, [x[:, :1]]),
    "observer='mean' is unknown": lambda net, x: quantization.static(net, [x], observer="mean"),
    "engine='mkl' is not here; use one of": lambda net, x: quantization.static(net, [x], engine="mkl"),
    "fuse names 'conv9', which": lambda net, x: quantization.static(net, [x], fuse=[["conv9", "2"]]),
    "none of its layers has an integer version": lambda net, x: quantization.static(
        nn.Sequential(nn.Flatten()), [x]
    ),
    "it has no Linear or LSTM or GRU": lambda net, x: quantization.dynamic(nn.Conv2d(3, 3, 3)),
    r"integer version does not run \(AttributeError: 'MultiheadAttention'": lambda net, x: (
        quantization.static(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), [x[:, 0]])
    ),
    r"aten::add\.\w+ takes no integers: put a": lambda net, x: quantization.static(Residual(), [x]),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_quantized_is_refused(message):
    net = network()
    before, engine = copy.deepcopy(net.state_dict()), torch.backends.quantized.engine
    with pytest.raises(QuantizationError, match=message):
        REFUSED[message](net, torch.randn(2, 3, 8, 8))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.backends.quantized.engine == engine


@pytest.mark.parametrize("bits", [1, 9, 2.5])
def test_numbers_of_bits_out_of_range_are_refused(bits):
    with pytest.raises(ValueError, match="must be a whole number from 2 to 8"):
        low_bits.rounded(nn.Linear(2, 2), bits)


@pytest.mark.parametrize("way", ["static", "dynamic"])
def test_a_saved_model_comes_back_and_a_damaged_file_does_not(trained_lenet, digits, tmp_path, way):
    def make(model):
        return (
            quantization.static(model, batches(digits, 1)) if way == "static" else quantization.dynamic(model)
        )

    made, other, path = make(trained_lenet), make(models.LeNet5()), tmp_path / "model.pt"
    quantization.save(made, path)
    loaded, x = quantization.load(path, other), digits.test.images[:50]
    with torch.no_grad():
        assert torch.equal(loaded(x), made(x))
        assert not torch.equal(other(x), made(x))
    with pytest.raises(RuntimeError, match="is of another"):
        quantization.load(path, quantization.dynamic(nn.Linear(2, 2)))
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(RuntimeError, match="is damaged"):
        quantization.load(path, other)
    with pytest.raises(FileNotFoundError):
        quantization.load(tmp_path / "nothing.pt", other)
