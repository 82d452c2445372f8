"""Models in folders: they answer as the model does, in a process without its class; nothing hidden runs."""

import json
import subprocess
import zipfile

import pytest
import torch
from torch import nn

from companion import artefacts, devices, models, variants
from companion.artefacts import About, ArtefactError


def about(kind, **other):
    return About(kind, "LeNet5", (3, 32, 32), "float32", **other)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return models.LeNet5()


@pytest.fixture
def images():
    return torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))


ASK = """
import sys, torch
from companion import artefacts
model, x = artefacts.load(sys.argv[1]), torch.load(sys.argv[2])
assert "companion.models" not in sys.modules, "it needs the class"
torch.save([model(x), model(x[:1]), model(x[:3])], sys.argv[3])
"""


@pytest.mark.parametrize("kind", ["script", "onnx", "openvino"])
def test_it_answers_as_the_model_does_without_its_class(kind, model, images, tmp_path, python):
    model.train()
    artefacts.save(model, [images], tmp_path / "made", about(kind))
    assert model.training, "the given model stays in its mode"
    torch.save(images, tmp_path / "x.pt")
    command = [*python, "-c", ASK, tmp_path / "made", tmp_path / "x.pt", tmp_path / "y.pt"]
    subprocess.run(command, check=True)
    right = model.eval()(images).detach()
    for answer, size in zip(torch.load(tmp_path / "y.pt"), (8, 1, 3), strict=True):
        torch.testing.assert_close(answer, right[:size], atol=1e-5, rtol=1e-4)


@pytest.mark.once
def test_a_program_is_compiled_when_it_is_loaded(model, images, tmp_path):
    if reason := devices.why_not("compile"):
        pytest.skip(reason)
    artefacts.save(model, [images], tmp_path / "made", about("program"))
    loaded = artefacts.load(tmp_path / "made")
    torch.testing.assert_close(loaded(images), model.eval()(images).detach(), atol=1e-5, rtol=1e-4)


def test_threads_are_the_artefacts_or_the_readers(model, images, tmp_path):
    artefacts.save(model, [images], tmp_path / "made", about("onnx", threads=2))
    assert artefacts.load(tmp_path / "made").about.threads == 2
    assert artefacts.load(tmp_path / "made", threads=1).about.threads == 1


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (torch.randn(2, 3, 16, 16), r"takes float32 \[N, 3, 32, 32\], not torch.float32 \[2, 3, 16, 16\]"),
        (torch.randn(2, 3, 32, 32).double(), "not torch.float64"),
    ],
)
def test_inputs_of_another_kind_are_refused(x, said, model, images, tmp_path):
    artefacts.save(model, [images], tmp_path / "made", about("script"))
    with pytest.raises(ValueError, match=said):
        artefacts.load(tmp_path / "made")(x)


def test_what_is_damaged_missing_or_of_another_version_is_refused(model, images, tmp_path):
    made = tmp_path / "made"
    with pytest.raises(ArtefactError, match="there is no artefact"):
        artefacts.load(made)
    artefacts.save(model, [images], made, about("script"))
    with pytest.raises(ArtefactError, match="is not empty"):
        artefacts.save(model, [images], made, about("script"))
    text = json.loads((made / artefacts.ABOUT).read_text())
    (made / artefacts.ABOUT).write_text(json.dumps(text | {"format": 99}))
    with pytest.raises(ArtefactError, match="format 99"):
        artefacts.load(made)
    (made / artefacts.ABOUT).write_text(json.dumps(text))
    damaged = bytearray((made / "model.ts").read_bytes())
    damaged[1000] ^= 1
    (made / "model.ts").write_bytes(damaged)
    with pytest.raises(ArtefactError, match=r"model\.ts is missing or damaged"):
        artefacts.load(made)


class Evil:
    """Its pickle writes a file when it is read."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_code_that_is_hidden_for_pickle_does_not_run(model, images, tmp_path):
    made, trap, other = tmp_path / "made", tmp_path / "trap", tmp_path / "other.pt2"
    artefacts.save(model, [images], made, about("program"))
    torch.save(Evil(trap), tmp_path / "evil.pt")
    path = made / "model.pt2"
    with zipfile.ZipFile(path) as before, zipfile.ZipFile(other, "w") as after:
        hidden = [name for name in before.namelist() if "sample_inputs" in name]
        assert hidden, "this torch writes no sample inputs: hide it elsewhere"
        for name in before.namelist():
            after.writestr(name, (tmp_path / "evil.pt").read_bytes() if name in hidden else before.read(name))
    other.replace(path)
    text = json.loads((made / artefacts.ABOUT).read_text())
    text["sha256"]["model.pt2"] = artefacts._checksum(path)
    (made / artefacts.ABOUT).write_text(json.dumps(text))
    torch.load(tmp_path / "evil.pt", weights_only=False).close()
    assert trap.exists(), "the trap works"
    trap.unlink()
    with pytest.raises(ArtefactError, match="cannot be read"):
        artefacts.load(made)
    assert not trap.exists()


class Branches(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Dictionary(nn.Module):
    def forward(self, x):
        return {"y": x, 3: [x]}


def test_a_script_that_fails_when_it_runs_says_why(tmp_path):
    sequences = torch.randn(2, 28, 28)
    model = variants.Autocast(models.LSTMClassifier(28), torch.bfloat16, "cpu").eval()
    with pytest.raises(ArtefactError, match="not run as a script: mat1 and mat2 must have the same"):
        artefacts.save(model, [sequences], tmp_path / "it", About("script", "it", (28, 28), "float32"))


@pytest.mark.parametrize(
    ("kind", "model", "said"),
    [
        ("script", Dictionary(), "Dictionary cannot be traced"),
        ("program", Branches(), "torch.export cannot follow Branches"),
        ("onnx", Branches(), "Branches cannot be exported to ONNX"),
    ],
)
def test_a_model_that_cannot_be_written_is_named(kind, model, said, images, tmp_path):
    with pytest.raises(ValueError, match=said):
        artefacts.save(model, [images], tmp_path / "made", about(kind))


def test_tf32_is_on_inside_only():
    def now():
        places = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)
        return [place.fp32_precision for place in places]

    before = now()
    with artefacts.tf32():
        assert now() == ["tf32"] * 3
    assert now() == before
    assert before[0] != "tf32"
