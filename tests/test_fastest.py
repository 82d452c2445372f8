"""The search for the fastest variant: what is chosen, what is refused, and that no fault stops it."""

import json
import os
import random
import re
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from companion import __main__ as cli
from companion import (
    artefacts,
    fastest,
    fastest_found,
    fastest_rounds,
    host,
    launch,
    measure,
    models,
    stacks,
    variants,
)
from companion.fastest_found import PLAIN, Row
from companion.fastest_making import Workshop
from companion.fastest_rounds import Lead
from companion.quantization import QuantizationError
from companion.variants import Variant

QUICK = {"batch_sizes": (1, 8), "threads": 1, "progress": False}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return models.LeNet5()


@pytest.fixture
def images():
    return torch.randn(32, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def accuracy(model, images):
    """The share of images of which a model thinks as this one does."""
    with torch.no_grad():
        right = model.eval()(images).argmax(1)

    def accuracy(net):
        place = next(net.parameters()).device  # as many do
        return (net(images.to(place)).argmax(1).cpu() == right).double().mean().item()

    return accuracy


def test_the_winner_is_what_was_measured_and_can_be_saved(model, images, accuracy, tmp_path, capsys):
    names = ("script", "int8 dynamic", "ONNX Runtime")
    found = fastest.search(model, images, accuracy, names=names, **QUICK | {"progress": True})
    assert [row.name for row in found.rows] == [PLAIN, *names]
    assert capsys.readouterr().out.count("accuracy") >= 4, "each row is told of when it is known"
    winner = found.winner.name  # LeNet5 at batch 1 as a script is twice as fast, in ONNX Runtime four times
    assert winner in names, found
    assert found.winner.final
    assert found.winner.accuracy == 1
    assert found.at(8).name in (*names, PLAIN)
    folder = found.save(tmp_path / "made")
    torch.testing.assert_close(
        artefacts.load(folder)(images), model.eval()(images).detach(), atol=1e-4, rtol=1e-4
    )
    assert artefacts.load(folder).about.threads == found.winner.threads
    with pytest.raises(ValueError, match="is there already"):
        found.save(tmp_path / "made")
    report = json.loads(json.dumps(found.report()))
    assert report["winner"] == winner
    assert len(report["rows"]) == 4
    assert "the fastest" in str(found.table())
    assert winner in str(fastest_found.compared([report, report]))
    assert len(found.figure(8).axes) == 2
    assert f"{winner}, on 1 thread:" in str(found)


class Slow(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        y = self.model(x)
        for shift in range(1, 4):  # of other images, or the script would do it once
            y = y + 0 * self.model(x + shift)
        return y


class Other(nn.Module):
    def __init__(self, model, factor):
        super().__init__()
        self.model, self.factor = model, factor

    def forward(self, x):
        return self.factor * self.model(x)


def hog(model, data):
    kept = [torch.ones(2**28) for _ in range(20)]
    return kept[0] and model


FAULTS = (
    Variant("crashes", "script", lambda model, data: os._exit(3)),
    Variant("hangs", "script", lambda model, data: time.sleep(60)),
    Variant("raises", "script", lambda model, data: model.no_such_layer),
    Variant("takes memory", "script", hog),
    Variant("other answers", "script", lambda model, data: Other(model, 2.0), exact=True),
    Variant("no numbers", "script", lambda model, data: Other(model, float("nan"))),
    Variant("forgets all", "script", lambda model, data: Other(model, -1.0)),
    Variant("slow", "script", lambda model, data: Slow(model)),
    Variant("script", "script", exact=True),
)
SAID = {
    "crashes": "exit code 3|exited|ended",
    "hangs": "took longer than 9 s",
    "raises": "no_such_layer",
    "takes memory": "memory|allocate",
    "other answers": "differ by 100.0%",
    "no numbers": "not finite",
}


@pytest.mark.once
def test_faults_are_rows_with_their_reason_and_the_search_goes_on(model, images, accuracy, monkeypatch):
    monkeypatch.setattr(variants, "ON_CPU", FAULTS)
    limits = {"limit_seconds": 9.0, "limit_bytes": 2 * 2**30}
    found = fastest.search(model, images, accuracy, **QUICK, **limits)
    for name, said in SAID.items():
        assert found[name].reason, name
        assert re.search(said, found[name].reason), found[name].reason
    assert found["forgets all"].accuracy < 0.9
    assert found["slow"].speed_up[8].high < 1
    assert found["script"].usable
    assert found.winner.name in ("script", PLAIN)
    assert "beyond the accuracy budget" in str(found.table())


def test_where_nothing_is_faster_it_says_so_and_saves_nothing(model, images, accuracy, monkeypatch, tmp_path):
    monkeypatch.setattr(variants, "ON_CPU", FAULTS[-2:-1])
    found = fastest.search(model, images, accuracy, **QUICK)
    assert found.winner.name == PLAIN
    assert "Keep it as it is" in str(found)
    with pytest.raises(ValueError, match="nothing was faster"):
        found.save(tmp_path / "made")


def test_losers_are_dropped_early(model, images, accuracy, tmp_path):
    script = next(each for each in variants.ON_CPU if each.name == "script")
    script.make(model.eval(), images, tmp_path / "made", 1)
    given = (tmp_path / "made", True, model, images, accuracy)
    dropped = fastest_rounds.measured(*given, Lead(50.0, {1: 9.0, 8: 9.0}), 5, 1.0, None)
    assert dropped.dropped == "others are clearly faster"
    assert dropped.accuracy is None, "it was not evaluated"
    assert list(dropped.speed_up) == [1], "nor looked at further"
    whole = fastest_rounds.measured(*given, Lead(50.0, {1: 1e6, 8: 1e6}), 5, 1.0, None)
    assert whole.dropped == "others are clearly faster"
    assert list(whole.speed_up) == [1, 8], "after one batch size there was hope"
    kept = fastest_rounds.measured(*given, Lead(0.1, {1: 0.1, 8: 0.1}), 5, 1.0, None)
    assert kept.dropped is None
    assert kept.accuracy == 1
    row = Row("script", 1, None, dropped.latency, dropped.speed_up, 1, 1, 0.1, remark=dropped.dropped)
    plain = Row(PLAIN, 1, 1.0, whole.latency, whole.speed_up, 1)
    found = fastest_found.Found((plain, row), (1, 8), {}, {}, 0.01, (1.0, 1.0), 1.0)
    assert "others are clearly faster" in str(found.table()), "a row with figures for one batch size"
    assert found.winner.name == PLAIN


def test_a_lead_counts_all_batch_sizes_together():
    def gains(**high):
        return {int(size[1:]): measure.Spread(h - 0.1, h - 0.2, h, 9) for size, h in high.items()}

    lead = Lead(3.0, {1: 4.0, 8: 2.5})
    assert not lead.beyond(gains(b1=2.1, b8=4.0)), "slow at one, fast at the other"
    assert lead.beyond(gains(b1=2.1, b8=3.0))
    assert not lead.beyond(gains(b1=2.7)), "it may be faster than all others at the one that is left"
    assert lead.beyond(gains(b1=2.1))


def test_what_is_slow_to_make_is_judged_by_the_quick_ones_of_its_kind(model, images, accuracy):
    def row(name, median, high):
        return Row(name, 1, 1.0, {}, {8: measure.Spread(median, median - 0.1, high, 9)})

    one = fastest._Search(model, images, accuracy, 0.01, (8,), (1,), {}, True, False)
    slow = Variant("slow", "program", after=("quick", "other"))
    plain = fastest_rounds.Plain((1.0, 1.0), 1, {}, 1, {})
    one.lead.take({8: measure.Spread(4.1, 3.6, 4.3, 9)})
    assert one._hopeless(slow, plain) is None, "none of them is known"
    one.rows["quick"] = row("quick", 3.7, 3.9)
    assert not one.lead.beyond(one.rows["quick"].speed_up), "which is measured further itself"
    assert "out of reach for quick" in one._hopeless(slow, plain)
    one.rows["other"] = row("other", 4.0, 4.0)
    assert one._hopeless(slow, plain) is None, "one of them is near"
    one.rows["other"] = Row("other", reason="it cannot be exported")
    assert "out of reach for quick" in one._hopeless(slow, plain)
    assert "slow" in one.hopeless, "so it is as slow for those that come after it"
    one.early = False
    assert one._hopeless(slow, plain) is None


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (models.LeNet5, (3, 32, 32)),
        (lambda: models.EncoderClassifier(8, 4, width=32, layers=1), (4, 8)),
        (lambda: models.LSTMClassifier(16, 32), (4, 16)),  # int8 by operators of torchao's own
    ],
    ids=["LeNet5", "encoder", "LSTM"],
)
def test_torchaos_integers_are_written_without_pickle(make, shape, tmp_path):
    pytest.importorskip("torchao", reason="needs torchao: pip install 'accelerating-pytorch[compress]'")
    torch.manual_seed(0)
    model, inputs = make().eval(), torch.randn(4, *shape)
    variant = next(each for each in variants.ON_CPU if each.name == "compiled, int8 torchao")
    if isinstance(model, models.LSTMClassifier) and not stacks.current().has_torch_xla:
        with pytest.raises(QuantizationError, match="cannot follow LSTMClassifier"):  # newer torch, its LSTM
            variant.make(model, inputs, tmp_path / "made", 1)
        return
    variant.make(model, inputs, tmp_path / "made", 1)
    with torch.no_grad():
        right = model(inputs)
    given = (tmp_path / "made" / "model.pt2", inputs)
    found = launch.run(program_says, 1, *given, device="cpu", backend=None)[0]  # a process without torchao
    apart = (found - right).abs().max() / right.abs().max()
    assert 0 < apart < 0.05, "integers, and nearly the same answers"


def program_says(path, inputs):
    assert "torchao" not in sys.modules
    with torch.no_grad():
        return artefacts._loaded_program(path)(inputs)  # it need not be compiled for this


def test_quicker_ones_of_its_kind_are_tried_before_one_that_looks_at_them():
    for offered in (variants.ON_CPU, variants.ON_GPU):
        names = [variant.name for variant in offered]
        for place, variant in enumerate(offered):
            assert set(variant.after) <= set(names[:place]), variant.name


def workshop(model, images, runs, **limits):
    def run(function, count, *args):
        runs.append(count)
        options = {"device": "cpu", "backend": None, "limit_seconds": limits["limit_seconds"]}
        return launch.run(function, count, *args, **options)

    limits = {"limit_bytes": 2**30, "limit_seconds": 60.0} | limits
    return Workshop(run, model.eval(), images, 1, **limits)


def test_as_many_are_made_at_a_time_as_there_are_cores_and_memory_for(model, images, monkeypatch):
    monkeypatch.setattr(host, "usable_cores", lambda: 2)
    monkeypatch.setattr(host, "usable_memory_bytes", lambda: 2**31)
    runs, script = [], Variant("script", "script", exact=True)
    waiting = {"first": script, "raises": FAULTS[2], "third": script}
    three = workshop(model, images, runs)
    first = three.take(waiting)
    assert first.reason is None
    assert artefacts.load(first.folder)(images).shape == (len(images), 10)
    waiting.pop("first")
    assert "no_such_layer" in three.take(waiting).reason, "the one that is refused spoils no other"
    waiting.pop("raises")
    assert artefacts.read(three.take(waiting).folder).threads == 1
    assert runs == [2, 1], "two together, then the last one"
    assert len({made.folder for made in three.made.values()}) == 3
    assert workshop(model, images, [], limit_bytes=2**31).at_once == 1, "there is no memory for two"
    on_gpu = type("Inputs", (), {"is_cpu": False})
    assert workshop(model, on_gpu, []).at_once == 1, "they would share it"


def test_where_one_ends_its_process_the_others_are_made_alone(model, images, monkeypatch):
    monkeypatch.setattr(host, "usable_cores", lambda: 2)
    runs, script = [], Variant("script", "script", exact=True)
    place = workshop(model, images, runs, limit_seconds=8.0)
    assert "ended" in place.take({"crashes": FAULTS[0], "script": script}).reason
    assert place.take({"script": script}).reason is None
    assert runs == [2, 1, 1]
    assert "longer than 8 s" in place.take({"hangs": FAULTS[1], "again": script}).reason
    assert place.take({"again": script}).reason is None


def test_the_profile_saves_the_search_a_compilation():
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(512, 2048), nn.ReLU(), nn.Linear(2048, 10)).eval()
    given = (wide, torch.randn(64, 512), lambda net: 1.0, (64,), (1,), 3)
    shares = fastest_rounds.plain(*given).products
    assert 0.5 < shares[64] <= 1, "nearly all of it is two products"
    assert Lead(3.0 / fastest_rounds.BEHIND, {64: 3.0}).beyond_fusing({64: 0.9})
    assert not Lead(2.0 / fastest_rounds.BEHIND, {64: 2.0}).beyond_fusing({64: 0.9}), "it may gain 2.2"
    assert not Lead(9.0, {64: 9.0}).beyond_fusing({}), "nothing is known, on a GPU"


@pytest.mark.once
def test_pruned_models_are_trained_again_and_judged(model, images, accuracy):
    def fine_tune(net):
        assert sum(p.numel() for p in net.parameters()) < sum(p.numel() for p in model.parameters())

    found = fastest.search(model, images, accuracy, 0.95, names=["script"], fine_tune=fine_tune, **QUICK)
    names = [row.name for row in found.rows]
    assert "pruned 30%, script" in names, names
    assert found["pruned 50%, script"].disk_bytes < 0.6 * found["script"].disk_bytes
    strict = fastest.search(model, images, accuracy, 0.0, names=["script"], fine_tune=fine_tune, **QUICK)
    assert "beyond the budget" in strict["pruned 50%"].reason


@pytest.mark.once
def test_time_that_is_over_and_ctrl_c_keep_what_is_known(model, images, accuracy, monkeypatch):
    found = fastest.search(model, images, accuracy, names=["script"], seconds=1e-6, **QUICK)
    assert "not tried" in found["script"].reason
    attempt = fastest._Search._attempt

    def interrupted(self, name, *others):
        if name == "int8 dynamic":
            raise KeyboardInterrupt
        attempt(self, name, *others)

    monkeypatch.setattr(fastest._Search, "_attempt", interrupted)
    found = fastest.search(model, images, accuracy, names=["script", "int8 dynamic"], **QUICK)
    assert found.interrupted
    assert found["script"].usable
    assert "interrupted" in str(found)


def test_an_evaluate_that_depends_on_chance_is_told_of(model, images):
    found = fastest.search(model, images, lambda net: random.random(), 0.99, names=["script"], **QUICK)
    assert found.noise > 0
    assert "apart: so much is chance" in str(found)


class Two(nn.Module):
    def forward(self, x):
        return x, x


def fails(net):
    raise KeyError("no labels")


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"evaluate": fails}, ValueError, "no labels"),
        ({"evaluate": lambda net: 91.2}, ValueError, "gave 91.2: give a share from 0 to 1"),
        ({"evaluate": lambda net: float("nan")}, ValueError, "gave nan"),
        ({"evaluate": 0.9}, TypeError, "a function evaluate"),
        ({"model": Two()}, ValueError, "gave a tuple: wrap the model"),
        ({"example_inputs": torch.randn(4, 3, 31, 31)}, ValueError, "the model as it is cannot be measured"),
        ({"example_inputs": [1, 2]}, ValueError, "one tensor"),
        ({"example_inputs": torch.ones(2, 3, device="meta")}, ValueError, "put both on one"),
        ({"budget": 1.5}, ValueError, "budget=1.5"),
        ({"batch_sizes": (0,)}, ValueError, "batch_sizes"),
        ({"threads": 0}, ValueError, "threads=0"),
        ({"names": ["scrypt"]}, ValueError, "unknown variants .'scrypt'"),
    ],
)
def test_bad_input_is_an_error_before_anything_is_tried(change, error, said, model, images):
    given = {"model": model, "example_inputs": images, "evaluate": lambda net: 1.0} | QUICK | change
    with pytest.raises(error, match=said):
        fastest.search(**given)


def test_variants_that_cannot_pay_here_are_not_tried(monkeypatch, images):
    def where(sets):
        monkeypatch.setattr(variants.machine, "describe", lambda: type("M", (), {"instruction_sets": sets}))

    by_name = {variant.name: variant for variant in variants.ON_CPU}
    where("AVX2")
    assert "none of AVX512-BF16" in variants.why_not(by_name["bfloat16"], images)
    where("AVX2, AVX512-BF16")
    assert variants.why_not(by_name["bfloat16"], images) is None
    where("unknown")
    assert variants.why_not(by_name["float16"], images) is None
    tokens = torch.ones(2, 5, dtype=torch.long)
    assert "whole numbers" in variants.why_not(by_name["int8 static"], tokens)
    assert "only images" in variants.why_not(by_name["script, channels_last"], torch.ones(2, 5))


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("variant", variants.ON_GPU, ids=lambda variant: variant.name)
def test_gpu_variants_are_right_as_far_as_a_cpu_can_tell(variant, model, images):
    if variant.kind == "program":
        changed = variant.change(model.eval(), [images])
    else:
        changed = torch.jit.trace(variant.change(model.eval(), [images]), images)
    with torch.no_grad():
        torch.testing.assert_close(changed(images), model(images), atol=3e-2, rtol=0.1)


def test_the_best_is_the_best_within_the_budget_by_the_lower_end():
    def row(name, accuracy, low, final=False):
        gains = {1: measure.Spread(low + 0.5, low, low + 1, 9)}
        return Row(name, 1, accuracy, gains, gains, 1, final=final)

    plain = row(PLAIN, 0.90, 1.0)
    rows = (plain, row("a", 0.895, 1.5), row("b", 0.85, 9.0), row("c", 0.91, 1.2), Row("d", reason="no"))
    found = fastest_found.Found(rows, (1,), {}, {}, 0.01, (0.9, 0.9), 1.0)
    assert found.winner.name == "a"
    again = (*rows[:3], row("c", 0.91, 1.2, final=True))
    found = fastest_found.Found(again, (1,), {}, {}, 0.01, (0.9, 0.9), 1.0)
    assert found.winner.name == "c", "only c was confirmed"


MODULE = """
import torch
from companion import models

def build():
    torch.manual_seed(0)
    return models.LeNet5()

def accuracy(model):
    return float(model(torch.ones(4, 3, 32, 32)).isfinite().all())
"""


@pytest.mark.once
def test_the_command_saves_the_fastest_and_its_report(tmp_path, python):
    (tmp_path / "mine.py").write_text(MODULE)
    words = ["-m", "companion", "fastest", "mine:build", "--input", "8x3x32x32", "--threads", "1"]
    words += ["--evaluate", "mine:accuracy"]
    words += [
        "--only",
        "script; ONNX Runtime",
        "--save",
        "made",
        "--json",
        "report.json",
        "--batch-sizes",
        "1,8",
    ]
    done = subprocess.run([*python, *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "saved: made" in done.stdout
    assert json.loads((tmp_path / "report.json").read_text())["winner"] in ("script", "ONNX Runtime")
    assert artefacts.load(tmp_path / "made")(torch.ones(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("mine:make --input 8x3x32x32 --evaluate mine:accuracy", "there is no 'make' in mine"),
        ("mine --input 8x3x32x32 --evaluate mine:accuracy", "not of the form package.module:name"),
        ("mine:build --input 8xthree --evaluate mine:accuracy", "neither a shape"),
        ("nowhere:build --input 8x3 --evaluate mine:accuracy", "No module named 'nowhere'"),
        ("mine:build --input 8x3 --evaluate mine:accuracy --batch-sizes 1,x", "give whole numbers"),
        ("mine:build --input 8x3 --evaluate mine:accuracy --json mine.py", "mine.py is there already"),
    ],
)
def test_the_command_says_what_is_wrong_with_its_words(words, said, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    assert cli.main(["fastest", *words.split()]) == 2
    assert said in capsys.readouterr().err
