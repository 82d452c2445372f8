"""Other runtimes compute what the model does, in float32 and nearly in int8, at any batch size."""

import builtins
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from companion import models, parity
from companion import quantization_peers as peers
from companion.quantization import QuantizationError

MAKERS = [peers.onnx_runtime, peers.openvino]


@pytest.fixture
def calibration(digits):
    return list(digits.train.images[:128].split(64))


@pytest.mark.parametrize("make", MAKERS)
@torch.no_grad()
def test_it_computes_what_the_model_does(make, trained_lenet, digits, calibration):
    before = parity.fingerprint(trained_lenet)
    images, labels = digits.test
    expected = trained_lenet(images)
    exact, small = make(trained_lenet, calibration, int8=False), make(trained_lenet, calibration)
    assert torch.allclose(exact(images), expected, atol=1e-4)
    assert torch.allclose(exact(images[:1]), expected[:1], atol=1e-4)
    off = (small(images) - expected).norm() / expected.norm()
    assert 1e-4 < off < 0.1, "int8 rounds"
    assert ((small(images).argmax(1) == labels).double().mean()) > 0.95
    assert small.disk_bytes < exact.disk_bytes / 2
    assert parity.fingerprint(trained_lenet) == before


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(
    "model",
    [models.LSTMClassifier(12, hidden=16), models.EncoderClassifier(12, 7, width=16, layers=2, heads=2)],
    ids=["LSTM", "encoder"],
)
@torch.no_grad()
def test_sequences_in_batches_of_any_size(make, model):
    x = torch.randn(9, 7, 12)
    exported = make(model.eval(), [x], int8=False)
    for size in (1, 2, 9):
        assert torch.allclose(exported(x[:size]), model(x[:size]), atol=1e-5)


def test_between_two_calls_no_thread_waits_busily(trained_lenet, calibration, tmp_path):
    session = peers.onnx_session(peers.onnx_file(trained_lenet, calibration, tmp_path, int8=False), 2)
    spent = []
    for _ in range(3):
        session(calibration[0])
        before = time.process_time()
        time.sleep(0.2)
        spent.append(time.process_time() - before)
    assert min(spent) < 0.01, "what is measured beside it would have one core less"


def test_nobody_is_told_of_the_use(trained_lenet, calibration):
    """The makers' reporter of its use counts as not installed, in a process of its own."""
    code = """if True:
        import torch, sys
        from companion import models, quantization_peers as peers
        peers.openvino(models.LeNet5(), [torch.randn(8, 3, 32, 32)])
        print(sys.modules["openvino_telemetry"], sys.modules["nncf"].telemetry.telemetry)
    """
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "None" in said.split()[0]
    assert "NNCFTelemetry object" not in said


@pytest.mark.parametrize("make", MAKERS)
def test_a_model_that_cannot_be_exported_is_refused(make):
    class Decides(nn.Module):
        def forward(self, x):
            return x.new_tensor([len(str(x.sum().item()))]).sort(stable=object())[0]

    with pytest.raises(QuantizationError, match="Decides"):
        make(Decides(), [torch.ones(2, 3)], int8=False)


@pytest.mark.parametrize(("make", "module"), list(zip(MAKERS, ["onnxruntime", "openvino"], strict=True)))
def test_without_the_runtime_the_error_names_the_extra(make, module, monkeypatch):
    real = builtins.__import__
    monkeypatch.setattr(peers.importlib, "import_module", lambda name: _missing(name, module, real))
    with pytest.raises(ImportError, match=r"pip install 'accelerating-pytorch\[peers\]'"):
        make(nn.Linear(2, 2), [torch.ones(2, 2)])


def _missing(name, module, real):
    if name == module:
        raise ImportError(f"No module named {name!r}")
    return real(name, fromlist=["*"])
