"""Graphs get integers, compute nearly the same, compiled too; what cannot be is refused in words."""

import pytest
import torch
from torch import nn

from companion import data, devices, memory, models, parity, quantization_pt2e, stacks, training
from companion.quantization import QuantizationError

pytest.importorskip("torchao", reason="needs torchao: pip install 'accelerating-pytorch[compress]'")


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_graph_of_integers_is_as_accurate(trained_lenet, digits, dynamic):
    before = parity.fingerprint(trained_lenet)
    made = quantization_pt2e.exported(trained_lenet, digits.train.images[:128].split(64), dynamic=dynamic)
    assert len(quantization_pt2e.quantize_nodes(made)) >= 10
    part = data.Split(digits.test.images, digits.test.labels)
    plain = training.evaluate(trained_lenet, part)
    made.eval()
    assert memory.disk_bytes(made) < memory.disk_bytes(trained_lenet) / 2, "float weights are still in it"
    for size in (1, 7, 360):
        with torch.no_grad():
            found = made(part.images[:size])
        assert (found - plain.logits[:size]).norm() / plain.logits[:size].norm() < 0.1
        assert not torch.equal(found, plain.logits[:size]), "is there an integer in it?"
    assert parity.fingerprint(trained_lenet) == before


def test_residual_sums_need_no_change():
    made = quantization_pt2e.exported(models.resnet18(), [torch.randn(2, 3, 32, 32)])
    assert len(quantization_pt2e.quantize_nodes(made)) > 40
    assert made(torch.randn(3, 3, 32, 32)).shape == (3, 10)


def test_compiled_it_computes_the_same_and_leaves_its_input(trained_lenet, digits):
    if reason := devices.why_not("compile"):
        with pytest.raises(QuantizationError, match=r"torch.compile cannot be used here"):
            quantization_pt2e.compiled(trained_lenet)
        pytest.skip(reason)
    made = quantization_pt2e.exported(trained_lenet, digits.train.images[:128].split(64))
    fast, x = quantization_pt2e.compiled(made), digits.test.images[:64].clone()
    with torch.no_grad():
        expected = made(x)
    found = fast(x)
    assert (found - expected).norm() / expected.norm() < 0.05
    assert torch.equal(x, digits.test.images[:64])


@pytest.mark.filterwarnings("ignore:Models quantized with version 1 of")
@pytest.mark.parametrize("kind", quantization_pt2e.KINDS)
def test_weights_of_few_bits(kind):
    torch.manual_seed(0)
    layers = [nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32), nn.Linear(32, 10)]
    model, x = nn.Sequential(*layers).eval(), torch.randn(4, 64)
    if kind == "int4_weights" and not stacks.current().has_torch_xla:
        with pytest.raises(QuantizationError, match="has no int4 weights for the CPU"):
            quantization_pt2e.weights(model, kind)
        return
    made = quantization_pt2e.weights(model, kind)
    with torch.no_grad():
        error = (made(x) - model(x)).norm() / model(x).norm()
    assert 0 < error < (0.2 if kind == "int4_weights" else 0.05)
    assert type(model[0].weight.data) is torch.Tensor
    taken = [type(made[i].weight.data) is not torch.Tensor for i in (0, 2, 3)]
    assert taken == [True, True, kind != "int4_weights"], "int4 takes outputs in multiples of 16"


def test_a_transformer_encoder_is_exported_and_its_fast_path_is_on_again():
    torch.manual_seed(0)
    model, x = models.EncoderClassifier(8, 6, width=32, layers=2, heads=2).eval(), torch.randn(4, 6, 8)
    made = quantization_pt2e.exported(model, [x])
    assert torch.backends.mha.get_fastpath_enabled()
    weights = [node for node in quantization_pt2e.quantize_nodes(made) if "per_channel" in node]
    assert len(weights) == 2 + 4 * 2, "a linear layer stayed in float: four in each layer, before and after"
    with torch.no_grad():
        assert 0 < (made(x) - model(x)).norm() / model(x).norm() < 0.1


class Decides(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


REFUSED = {
    "no calibration data": lambda: quantization_pt2e.exported(nn.Linear(4, 2), []),
    "the first batch has one sample": lambda: quantization_pt2e.exported(nn.Linear(4, 2), [torch.ones(1, 4)]),
    "nothing was quantized: the graph has no": lambda: quantization_pt2e.exported(
        nn.ReLU(), [torch.ones(2, 4)]
    ),
    "torch.export cannot follow Decides: ": lambda: quantization_pt2e.exported(Decides(), [torch.ones(2, 4)]),
    "kind='int2' is unknown": lambda: quantization_pt2e.weights(nn.Linear(4, 2), "int2"),
    "it has no linear layers": lambda: quantization_pt2e.weights(nn.ReLU()),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_quantized_is_refused(message):
    with pytest.raises(QuantizationError, match=message):
        REFUSED[message]()


@pytest.mark.skipif(devices.why_not("compile") is not None, reason="needs torch.compile")
def test_the_compiler_tries_and_says_nothing(capfd):
    made = quantization_pt2e.Compiled(nn.Linear(64, 48).eval(), mode="max-autotune-no-cudagraphs")
    assert made(torch.randn(16, 64)).shape == (16, 48)
    assert capfd.readouterr() == ("", "")
