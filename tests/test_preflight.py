"""What a TPU would say: questions refused, answers kept, the compiler's process within limits; and the real
compiler, against what can be counted by hand.
"""

import collections
import functools
import json
import os
import subprocess
import sys
from dataclasses import replace

import psutil
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from companion import models, preflight, preflight_compiler, preflight_key
from companion.preflight import PreflightError

LEFT_OUT = "set COMPANION_PREFLIGHT_ALL=yes (make test-preflight): it takes minutes"
needs_compiler = pytest.mark.skipif(bool(preflight.why_not()), reason=str(preflight.why_not()))
long = pytest.mark.skipif(not os.environ.get("COMPANION_PREFLIGHT_ALL"), reason=LEFT_OUT)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 128))


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


BATCH, TARGET = torch.zeros(64, 256), torch.zeros(64, dtype=torch.long)


# What cannot be asked.


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"chip": "v9"}, "chip='v9': give one of v4, v5e, v5p, v6e, tpu7x"),
        ({"chip": "v5e", "chips": 3}, r"chips=3: of v5e there are slices of 1 \(1x1\), 4 \(2x2\), 8 \(2x4\)"),
        ({"chip": "v5e", "chips": 1024}, "chips=1024: of v5e there are slices"),
        ({"chips": 128}, "a batch of 64 cannot be shared by 128 devices evenly"),
        ({"dtype": "int8"}, "dtype='int8': give one of float32, bfloat16"),
        ({"layout": "split"}, "layout='split': give one of replicated, sharded"),
    ],
)
def test_what_cannot_be_asked_is_refused_at_once(options, said):
    model = mlp()
    with pytest.raises(ValueError, match=said):
        preflight.check(model, BATCH, TARGET, sgd(model), **options)


def test_inputs_that_the_model_does_not_take_are_refused():
    model = mlp()
    with pytest.raises(ValueError, match=r"Sequential does not take \[64, 100\]: .*256"):
        preflight.check(model, torch.zeros(64, 100), TARGET, sgd(model))
    named = {"logits": nn.Linear(256, 10)}

    class Named(nn.ModuleDict):
        def forward(self, x):
            return {name: part(x) for name, part in self.items()}

    net = Named(named)
    with pytest.raises(
        ValueError, match=r"loss\(output, target\) fails for a target \[64\]: .*must be Tensor, not dict"
    ):
        preflight.check(net, BATCH, TARGET, sgd(net))
    with pytest.raises(ValueError, match=r"must be one number, not torch.Size\(\[64\]\)"):
        preflight.check(model, BATCH, TARGET, sgd(model), loss=lambda output, target: output.sum(1))
    with pytest.raises(ValueError, match="example_input is a batch"):
        preflight.check(model, (), TARGET, sgd(model))
    with pytest.raises(ValueError, match="a training step needs a target and an optimizer"):
        preflight.check(model, BATCH, TARGET)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda model: torch.optim.RMSprop(model.parameters()), "the optimizer is RMSprop: SGD, Adam"),
        (lambda model: torch.optim.Adam(model.parameters(), amsgrad=True), r"Adam\(amsgrad=True\)"),
        (lambda model: torch.optim.SGD(model.parameters(), momentum=0.9, dampening=0.1), "dampening=0.1"),
        (lambda model: torch.optim.SGD(mlp().parameters()), "not one of the model's"),
    ],
)
def test_an_optimizer_that_is_not_known_is_refused(make, said):
    model = mlp()
    with pytest.raises(ValueError, match=said):
        preflight.check(model, BATCH, TARGET, make(model))


def test_without_the_environment_the_error_names_the_command(monkeypatch, tmp_path):
    monkeypatch.delenv("COMPANION_PREFLIGHT", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(preflight_compiler, "FOLDER", ".venv-nowhere")
    model = mlp()
    with pytest.raises(PreflightError, match="an environment of its own: make preflight"):
        preflight.check(model, BATCH, TARGET, sgd(model))
    monkeypatch.setattr(preflight_compiler, "ROOT", tmp_path)  # as installed, without the project
    with pytest.raises(PreflightError, match=r"pip install 'accelerating-pytorch\[preflight\] @ git\+https"):
        preflight_compiler.interpreter()
    monkeypatch.setenv("COMPANION_PREFLIGHT", str(tmp_path / "python"))
    with pytest.raises(PreflightError, match="where there is no Python"):
        preflight_compiler.interpreter()


# Answers are kept by content.


class Scaled(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.scale, self.inner = scale, nn.Linear(4, 4)

    def forward(self, x):
        return self.scale * self.inner(x)


def test_equal_models_have_equal_keys_whatever_their_weights():
    assert preflight_key.key(mlp()) == preflight_key.key(mlp().to("meta"))
    assert preflight_key.key(Scaled(2)) == preflight_key.key(Scaled(2))
    assert preflight_key.key(models.LeNet5()) == preflight_key.key(models.LeNet5())


def plus_one(x):
    return x + 1


def plus_two(x):
    return x + 2


def different():
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    apart = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    frozen = nn.Linear(4, 4).requires_grad_(False)
    return [
        (Scaled(2), Scaled(3)),
        (nn.Dropout(0.1), nn.Dropout(0.2)),
        (nn.Linear(4, 4), nn.Linear(4, 5)),
        (nn.Linear(4, 4), nn.Linear(4, 4).bfloat16()),
        (nn.Linear(4, 4), frozen),
        (nn.BatchNorm1d(4), nn.BatchNorm1d(4).eval()),
        (tied, apart),
        (nn.ReLU(), nn.GELU()),
        (functools.partial(F.gelu, approximate="tanh"), functools.partial(F.gelu, approximate="none")),
        (collections.deque([1]), collections.deque([2])),
        (collections.OrderedDict(a=1), collections.OrderedDict(a=2)),
        (functools.lru_cache(plus_one), functools.lru_cache(plus_two)),
    ]


@pytest.mark.parametrize(("one", "other"), different())
def test_other_models_have_other_keys(one, other):
    assert preflight_key.key(one) != preflight_key.key(other)


IN_A_NOTEBOOK = """
from torch import nn
from companion import preflight_key
import sys

def helper(x):
    return x * {number}

class Net(nn.Module):
    def forward(self, x):
        return [helper(y) for y in x]

print(preflight_key.key(Net()))
"""


@pytest.mark.once
def test_code_of_a_notebook_counts_with_what_it_calls():
    """A helper of the model's changes the key; another process does not."""

    def asked(number):
        command = [sys.executable, "-c", IN_A_NOTEBOOK.format(number=number)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    assert asked(2) == asked(2)
    assert asked(2) != asked(3)


def test_a_package_of_the_readers_own_counts_as_a_whole(tmp_path, monkeypatch):
    package = tmp_path / "theirs"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "parts.py").write_text("SCALE = 2\n")
    model = "from torch import nn\nfrom theirs.parts import SCALE\nclass Net(nn.Module):\n    pass\n"
    (package / "net.py").write_text(model)
    monkeypatch.syspath_prepend(tmp_path)
    import theirs.net

    before = preflight_key.key(theirs.net.Net())
    (package / "parts.py").write_text("SCALE = 3\n")
    assert preflight_key.key(theirs.net.Net()) != before


def test_what_cannot_be_looked_into_has_no_key():
    model = Scaled(2)
    model.counter = (number for number in [1])
    with pytest.raises(preflight_key.UnknownError, match="generator"):
        preflight_key.key(model)


ANSWER = {
    "devices": 1,
    "flops": 2e9,
    "bytes": 1e7,
    "optimal_seconds": -1.99999,
    "argument_bytes": 3e6,
    "output_bytes": 2e6,
    "temporary_bytes": 1e6,
    "reused_bytes": 2e6,
    "code_bytes": 1e5,
    "read_seconds": 1.0,
    "compile_seconds": 2.0,
    "memory_bytes": 1e9,
    "program": "",
}


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """The questions that reach the compiler, which here always says the same."""
    questions = []

    def ask(request, *limits):
        questions.append(request)
        return dict(ANSWER)

    monkeypatch.setattr(preflight_compiler, "ask", ask)
    monkeypatch.setattr(preflight_compiler, "versions", dict)
    return questions


def test_the_second_time_the_compiler_is_not_asked(asked, tmp_path):
    model = mlp()
    first = preflight.check(model, BATCH, TARGET, sgd(model), cache=tmp_path)
    other = mlp()
    again = preflight.check(other, BATCH, TARGET, sgd(other), cache=tmp_path)
    assert len(asked) == 1
    assert again == first
    preflight.check(other, BATCH, TARGET, sgd(other), cache=tmp_path, dtype="bfloat16")
    preflight.check(other, BATCH[:32], TARGET[:32], sgd(other), cache=tmp_path)
    assert len(asked) == 3
    preflight.check(other, BATCH, TARGET, sgd(other), cache=None)
    assert len(asked) == 4


def test_an_error_that_may_be_the_environments_is_not_kept(monkeypatch, tmp_path):
    said = {"error": "AttributeError", "message": "no such thing", "frames": [], "memory_bytes": 0}
    monkeypatch.setattr(preflight_compiler, "ask", lambda *question: dict(said))
    monkeypatch.setattr(preflight_compiler, "versions", dict)
    assert not preflight.check(mlp(), BATCH, cache=tmp_path).compiles
    assert not list(tmp_path.iterdir())
    said["error"] = "ConcretizationTypeError"
    assert not preflight.check(mlp(), BATCH, cache=tmp_path).compiles
    assert len(list(tmp_path.iterdir())) == 1


def test_weights_are_not_sent(asked):
    model = nn.Linear(4096, 4096)
    preflight.check(model, torch.zeros(8, 4096), cache=None)
    assert len(asked[0]["packed"]) < 10_000
    assert model.weight.device.type == "cpu"


def test_numbers_of_a_verdict(asked):
    model = mlp()
    verdict = preflight.check(model, BATCH, TARGET, sgd(model), cache=None)
    assert verdict.compiles
    assert verdict.fits
    assert verdict.needed_bytes == 3e6 + 2e6 + 1e6 + 1e5 - 2e6
    assert verdict.unknown == 2
    assert verdict.estimate == pytest.approx(1e-5)
    assert verdict.intensity == 200
    assert verdict.bound == "memory"
    assert verdict.roofline == pytest.approx(1e7 / 819e9)
    assert verdict.share_of_peak == pytest.approx(2e9 / 197e12 / verdict.roofline)
    assert "operators unknown to it: 2" in str(verdict)
    faster = replace(verdict, flops=4e9)
    assert faster.bound == "compute"
    assert faster.roofline == pytest.approx(4e9 / 197e12)


# The compiler's process, which here is another program.


def stand_in(tmp_path, monkeypatch, script):
    program, text = tmp_path / "python", tmp_path / "stand_in.py"
    text.write_text(f"import os, sys, time, subprocess\nfolder = sys.argv[3]\n{script}\n")
    # By the shell, since no path with a space can stand after #!.
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{text}" "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("COMPANION_PREFLIGHT", str(program))


def children():
    return [process.pid for process in psutil.Process().children(recursive=True)]


@pytest.mark.parametrize(
    ("script", "limits", "said"),
    [
        ("os.abort()", (60, 2**30), "the compiler was ended by SIGABRT while it starts: it said nothing"),
        ("print('no such thing'); sys.exit(3)", (60, 2**30), "ended with 3 while it starts: no such thing"),
        ("time.sleep(60)", (0.5, 2**30), "took more than 0.5 s; it had come so far: starts"),
        ("held = b'x' * 10**9\ntime.sleep(60)", (60, 2**29), "more than 0.5 GiB of memory"),
        ("subprocess.Popen(['sleep', '60'])\ntime.sleep(60)", (0.5, 2**30), "took more than 0.5 s"),
    ],
)
def test_a_compiler_that_gives_no_answer_is_ended_and_told_of(script, limits, said, tmp_path, monkeypatch):
    stand_in(tmp_path, monkeypatch, script)
    made = tmp_path / "folder"
    made.mkdir()
    monkeypatch.setattr(preflight_compiler.scratch, "folder", lambda: made)
    before = children()
    with pytest.raises(PreflightError, match=said):
        preflight_compiler.ask({}, *limits, False)
    assert children() == before
    assert not made.exists()


def test_an_answer_comes_with_the_program_and_what_it_cost(tmp_path, monkeypatch):
    script = (
        "os.mkdir(folder + '/dump')\n"
        "open(folder + '/dump/a.after_optimizations.txt', 'w').write('HloModule it')\n"
        "open(folder + '/answer.json', 'w').write('{\"flops\": 3}')"
    )
    stand_in(tmp_path, monkeypatch, script)
    answer = preflight_compiler.ask({}, 60, 2**30, False)
    assert answer["flops"] == 3
    assert answer["program"] == "HloModule it"
    assert answer["seconds"] > 0


# The real compiler.


@pytest.mark.once
@needs_compiler
def test_a_step_equals_pytorchs_own():
    command = [str(preflight_compiler.interpreter()), "-m", "tests.preflight_values"]
    done = subprocess.run(command, cwd=preflight_compiler.ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for name, found in json.loads(done.stdout.splitlines()[-1]).items():
        # float32, summed in another order; Adam divides by roots of small numbers.
        assert found["loss"] < 1e-5, name
        assert found["tensors"] < 1e-4, name


@needs_compiler
def test_a_small_step_on_four_chips(tmp_path):
    """FLOP of the matrix products, an all-reduce for each weight; all as counted by hand."""
    model = mlp()
    verdict = preflight.check(model, BATCH, TARGET, sgd(model), chips=4, cache=tmp_path, progress=False)
    assert verdict.fits
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    reduced = sum(one.nbytes for one in verdict.collectives if one.kind == "all-reduce")
    assert weights <= reduced <= weights + 1024  # and the loss
    # Forward, and backward for weights; for inputs too, but not in the first layer.
    products = 2 * 16 * (2 * 256 * 512 + 3 * 512 * 128)
    assert products <= verdict.flops <= 1.2 * products  # and the rest: biases, ReLU, the update
    assert list(tmp_path.glob("*.json"))


class Branch(nn.Module):
    def forward(self, x):
        if x.sum() > 0:  # decides by a value
            return x
        return -x


class Picks(nn.Module):
    def forward(self, x):
        return x[x > 0].sum() + x  # picks by a mask


class Loose(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.ones(256)

    def forward(self, x):
        return x * self.scale  # neither parameter nor buffer


class Missing(nn.Module):
    def forward(self, x):
        return torch.special.bessel_j1(x) + torch.special.airy_ai(x)  # no such operator


@needs_compiler
@pytest.mark.parametrize(
    ("model", "what", "line"),
    [
        pytest.param(Branch(), "a decision by a tensor's value", "if x.sum() > 0:  # decides by a value"),
        pytest.param(Picks(), "a selection whose size depends", "+ x  # picks by a mask", marks=long),
        pytest.param(Loose(), "a tensor that is neither", "# neither parameter nor buffer", marks=long),
        pytest.param(Missing(), "an operator that torchax", "# no such operator", marks=long),
    ],
)
def test_why_a_model_does_not_compile_is_told_with_its_line(model, what, line, tmp_path):
    verdict = preflight.check(model, BATCH, cache=tmp_path, progress=False)
    assert not verdict.compiles
    assert not verdict.fits
    assert verdict.problem.what.startswith(what)
    assert verdict.problem.line.startswith("test_preflight.py:")
    assert verdict.problem.line.endswith(line)
    assert verdict.problem.fix in str(verdict)


def command(*words, **options):
    run = [sys.executable, "-m", "companion", "preflight", *words]
    return subprocess.run(run, capture_output=True, text=True, cwd=preflight_compiler.ROOT, **options)


@pytest.mark.once
def test_the_command_refuses_in_one_line():
    for words, said in (
        (["companion.nowhere:build", "--input", "4x3"], "No module named 'companion.nowhere'"),
        (["companion.models:LeNet5", "--input", "4x3x32x32", "--chips", "3"], "there are slices of"),
        (["companion.models:LeNet5", "--input", "4x1x32x32"], "does not take [4, 1, 32, 32]"),
    ):
        done = command(*words)
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith("error: ")
        assert said in done.stderr
        assert len(done.stderr.splitlines()) == 1


@needs_compiler
@long
def test_the_command_answers_and_writes_its_numbers(tmp_path):
    report = tmp_path / "it.json"
    words = ["companion.models:LeNet5", "--input", "64x3x32x32", "--optimizer", "SGD", "--json", str(report)]
    done = command(*words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("training step, batch 64, on 1 x v5e (1x1), replicated, float32: compiles")
    assert json.loads(report.read_text())["fits"] is True


@needs_compiler
@long
def test_both_sides_of_the_boundary_of_memory(tmp_path):
    """What is said to fit is below the compiler's limit, and what it refuses as too large is above."""
    model = mlp()
    found = preflight.largest_batch(model, BATCH, TARGET, sgd(model), cache=tmp_path, progress=False)
    assert found.fits.needed_bytes <= found.fits.memory_bytes
    assert found.fits.needed_bytes > 0.8 * found.fits.memory_bytes
    assert found.refused.needed_bytes > 0.99 * found.refused.memory_bytes  # it rounds
    assert not found.refused.fits
    assert found.refused.compiles


@needs_compiler
@long
def test_flop_of_a_resnet_against_the_count(tmp_path):
    """ResNet-18 at 64 pixels: multiply-adds of convolutions and the last layer, twice backward as forward."""
    from companion import measure

    model = models.resnet18()
    macs = measure.macs(model, torch.zeros(1, 3, 64, 64))
    batch, labels = torch.zeros(16, 3, 64, 64), torch.zeros(16, dtype=torch.long)
    verdict = preflight.check(model, batch, labels, sgd(model), cache=tmp_path, progress=False)
    counted = 3 * 2 * 16 * macs
    assert 0.8 * counted <= verdict.flops <= 1.2 * counted


@needs_compiler
@long
def test_weights_split_over_devices_take_less_of_each(tmp_path):
    model = nn.Sequential(nn.Linear(1024, 4096), nn.ReLU(), nn.Linear(4096, 1024))
    adam = torch.optim.AdamW(model.parameters())
    options = {"chips": 8, "cache": tmp_path, "progress": False}
    batch = torch.empty(64, 1024, device="meta")
    whole, split = (
        preflight.check(model, batch, TARGET, adam, layout=layout, **options)
        for layout in ("replicated", "sharded")
    )
    assert split.weight_bytes < whole.weight_bytes / 6
    assert "all-gather" in {one.kind for one in split.collectives}
    assert "all-gather" not in {one.kind for one in whole.collectives}


class Everything(nn.Module):
    """BatchNorm, dropout, tied weights, embeddings and attention."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(100, 128)
        self.normal, self.drop = nn.BatchNorm1d(128), nn.Dropout(0.5)
        self.block = nn.TransformerEncoderLayer(128, 4, 256, batch_first=True)
        self.answer = nn.Linear(128, 100, bias=False)
        self.answer.weight = self.words.weight

    def forward(self, x):
        y = self.normal(self.words(x).transpose(1, 2)).transpose(1, 2)
        return self.answer(self.block(self.drop(y))).flatten(0, 1)


@needs_compiler
@long
@pytest.mark.parametrize("chip", ["v4", "v5e", "v5p", "v6e", "tpu7x"])
def test_usual_layers_compile_on_every_chip(chip, tmp_path):
    words = torch.zeros(16, 32, dtype=torch.long)
    model = Everything()
    adam = torch.optim.AdamW(model.parameters())
    options = {"chip": chip, "chips": 4, "cache": tmp_path, "progress": False}
    verdict = preflight.check(model, words, words.flatten(), adam, dtype="bfloat16", **options)
    assert verdict.fits, verdict
    assert verdict.collectives


@needs_compiler
@long
def test_answers_in_bfloat16_move_half_the_bytes(tmp_path):
    """In eval mode too, where nothing is trained, and what BatchNorm normalises by is not renewed."""
    layer = nn.Linear(4096, 4096, device="meta")
    options = {"cache": tmp_path, "progress": False}
    x = torch.empty(4096, 4096, device="meta")
    single, half = (preflight.check(layer, x, dtype=dtype, **options) for dtype in ("float32", "bfloat16"))
    assert half.estimate < single.estimate
    images = torch.empty(8, 3, 64, 64, device="meta")
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 8, 3)).eval()
    assert preflight.check(net, images, dtype="bfloat16", **options).fits


ASKS = """
import torch
from companion import models, preflight
preflight.check(models.resnet18(), torch.empty(64, 3, 64, 64, device="meta"), cache=None, progress=False)
"""


@needs_compiler
@long
def test_the_compiler_goes_with_who_asked(tmp_path):
    asking = subprocess.Popen([sys.executable, "-c", ASKS], cwd=preflight_compiler.ROOT)
    compilers = []
    while not compilers:
        assert asking.poll() is None
        found = psutil.Process(asking.pid).children()
        compilers = [process for process in found if "companion.preflight_child" in process.cmdline()]
    asking.kill()
    asking.wait()
    _, alive = psutil.wait_procs(compilers, timeout=30)
    assert not alive
