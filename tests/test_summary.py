"""Records in common terms: against the plain row, with their spread; figures and advice made of them."""

import json

import pytest
import torch
from torch import nn

from companion import __main__ as cli
from companion import advice, measure, models, scoreboard, summary, summary_figures
from companion.measure import Spread

X = "x"


def note(folder, notebook, technique, **metrics):
    names = {"gain_1": "speed-up, batch 1", "gain_64": "speed-up, batch 64", "speed_up": "speed-up"}
    named = {names.get(name, name): value for name, value in metrics.items()}
    return scoreboard.record(folder, notebook, technique, named, threads=2)


@pytest.fixture
def folder(tmp_path):
    note(tmp_path, "00_baseline", "plain", speed=(100.0, "samples/s"), **{"validation accuracy": (80.0, "%")})
    faster = Spread(300.0, 250.0, 320.0, 5)
    gain = (Spread(3.0, 2.8, 3.1, 5), X)
    note(tmp_path, "00_baseline", "vectorised batches", speed=(faster, "samples/s"), gain=gain)
    note(tmp_path, "00_baseline", "bfloat16 autocast", speed=(290.0, "samples/s"), gain=(0.97, X))
    note(tmp_path, "03_ddp", "DDP, 2 ranks", speed_up=(1.5, X), predicted=(1.6, X))
    note(tmp_path, "03_ddp", "all-reduce, 2 ranks", latency=(500.0, "us"), rate=(1.0, "GB/s"))
    note(tmp_path, "05_hybrid", "tensor 4", speed_up=(0.6, X), predicted=(300.0, "ms"))
    size, accuracy = (200.0, "KiB"), (92.0, "%")
    note(
        tmp_path,
        "08_quantization",
        "float32",
        gain_1=(1.0, X),
        gain_64=(1.0, X),
        size=size,
        accuracy=accuracy,
    )
    small = {"size": (50.0, "KiB"), "accuracy": (91.5, "%")}
    note(tmp_path, "08_quantization", "int8", gain_1=(Spread(0.9, 0.8, 1.1, 7), X), gain_64=(2.0, X), **small)
    scoreboard.record(tmp_path, "02_data_parallel", "nn.DataParallel", skipped="needs 2 CUDA devices")
    return tmp_path


@pytest.fixture
def found(folder):
    return {entry.technique: entry for entry in summary.entries(summary.read(folder))}


def test_every_machine_is_named_once():
    rows = [
        {"device": "cpu", "environment": {"cpu": cpu, "cores": 2}}
        for cpu in ("AMD EPYC", "Intel", "AMD EPYC")
    ]
    assert summary.machines_of(rows) == "AMD EPYC, 2 cores and Intel, 2 cores"


def test_speeds_are_set_against_the_first_row_of_their_notebook(found):
    assert found["plain"].speed_up == Spread(1.0, 1.0, 1.0, 1)
    fast = found["vectorised batches"].speed_up
    assert (fast.low, fast.median, fast.high) == (2.5, 3.0, 3.2)
    assert found["vectorised batches"].points is None


def test_rows_with_several_batches_become_entries(found):
    assert found["int8, batch 1"].speed_up.low == 0.8
    assert found["int8, batch 64"].speed_up.median == 2
    assert found["int8, batch 1"].size == 0.25
    assert found["int8, batch 64"].points == -0.5


def test_predictions_of_speed_are_taken_and_those_of_time_are_not(found):
    assert found["DDP, 2 ranks"].predicted == 1.6
    assert found["tensor 4"].predicted is None


def test_what_was_skipped_or_is_no_comparison_is_no_entry(found):
    assert "nn.DataParallel" not in found
    assert "all-reduce, 2 ranks" not in found


def test_what_was_skipped_is_listed_with_its_reason(folder, capfd):
    assert cli.main(["skips", str(folder)]) == 0
    assert capfd.readouterr().out.splitlines() == [
        "| notebook | technique | not run, because |",
        "| --- | --- | --- |",
        "| 02_data_parallel | nn.DataParallel | needs 2 CUDA devices |",
    ]
    assert cli.main(["skips"]) == 2
    assert "name one folder" in capfd.readouterr().err


def test_the_last_record_of_a_technique_counts(folder):
    note(folder, "03_ddp", "DDP, 2 ranks", speed_up=(1.1, X))
    (again,) = (e for e in summary.entries(summary.read(folder)) if e.technique == "DDP, 2 ranks")
    assert again.speed_up.median == 1.1


def test_a_file_can_be_named_and_a_missing_one_is_refused(folder):
    assert summary.read(folder / scoreboard.FILE) == summary.read(folder)
    with pytest.raises(ValueError, match=r"'.*nowhere' is no scoreboard"):
        summary.read(folder / "nowhere")


def test_a_busy_row_says_so(found):
    from dataclasses import replace

    entry = replace(found["int8, batch 64"], busy="other processes took 1.0 of 2 cores")
    assert str(entry).endswith("on a busy machine")
    assert str(found["int8, batch 64"]).startswith("[08] int8, batch 64: 2.00x, -0.5 points, 25% of the size")


def test_the_table_has_verdicts(found):
    lines = {row[1]: row for row in summary.table(list(found.values())).rows}
    assert lines["int8, batch 1"][3] == "no difference"
    assert lines["int8, batch 64"][3] == "faster"
    assert lines["tensor 4"][3] == "slower"


def test_what_two_machines_have_measured_is_put_side_by_side(found):
    here = list(found.values())
    pairs = summary.side_by_side(here, here[:3])
    assert len(pairs) == 3
    assert all(own == other for own, other in pairs.values())


def test_figures_are_drawn(found):
    entries = list(found.values())
    drawn = summary_figures.gains(entries)
    assert len(drawn.axes[0].lines) >= 3
    assert drawn.get_supxlabel().startswith("1  [08] int8, batch 64")
    (axis,) = summary_figures.predicted(entries).axes
    assert axis.get_xlabel() == "predicted speed-up (x)"
    pairs = summary.side_by_side(entries, entries)
    assert summary_figures.machines(pairs, "a", "b").axes[0].get_xlabel() == "speed-up on: b"
    assert summary_figures.machines({}, "a", "b").axes
    assert summary_figures.predicted([]).axes


@pytest.fixture(scope="module")
def facts():
    return advice.facts(models.LeNet5, (3, 32, 32), 8, rounds=2)


def about(given, what):
    return next(one for one in given if one.about == what)


def test_advice_cites_the_rows_behind_it(folder, facts):
    rows = summary.read(folder)
    given = advice.advise(summary.entries(rows), rows, facts, 1.0)
    assert (
        "vectorised batches made a small model's loop 3.0 (2.5-3.2) times as fast"
        in about(given, "data").text
    )
    assert about(given, "data").cites == ("[00] vectorised batches: 3.00 (2.50-3.20)x",)
    assert about(given, "one device").text == "leave bfloat16 autocast"
    assert about(given, "inference").text.startswith("int8, batch 64 was the fastest within 1 points")
    assert about(given, "size").text == "the smallest within 1 points keeps 25%: int8, batch 1"
    assert about(given, "several ranks").cites[0] == "[03] all-reduce of 2 ranks: 500 us, 1.00 GB/s"
    assert about(given, "search").text == "not measured here: run notebook 07"
    assert "no need to cut it" in about(given, "memory").text
    assert len(advice.table(given).rows) == len(given)


def test_a_way_that_costs_too_much_accuracy_is_not_advised(folder, facts):
    rows = summary.read(folder)
    given = advice.advise(summary.entries(rows), rows, facts, 0.1)
    assert "int8" not in about(given, "inference").text.split(" (")[0]
    assert "keep float32" in about(given, "inference").text


@pytest.mark.parametrize(("bytes_", "says"), [(10**3, "use DDP"), (10**10, "grow the batch first")])
def test_ranks_are_advised_where_the_all_reduce_is_short(folder, bytes_, says):
    seconds = {32: Spread.of([0.1]), 64: Spread.of([0.2])}
    model = advice.Facts(bytes_, "linear", 1, seconds, 2**40)
    rows = summary.read(folder)
    assert says in about(advice.advise(summary.entries(rows), rows, model, 1.0), "several ranks").text


def test_a_model_that_does_not_fit_is_to_be_cut(folder):
    model = advice.Facts(2**30, "linear", 1, {1: Spread.of([1.0]), 2: Spread.of([1.0])}, 2**32)
    rows = summary.read(folder)
    assert "cut or shard" in about(advice.advise(summary.entries(rows), rows, model, 1.0), "memory").text


@pytest.mark.parametrize(
    ("make", "shape", "kind"),
    [
        (models.LeNet5, (3, 32, 32), "linear"),
        (lambda: models.create("resnet18"), (3, 32, 32), "convolutional"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(48, 10)), (3, 4, 4), "linear"),
    ],
)
def test_facts_of_a_model(make, shape, kind):
    found = advice.facts(make, shape, 2, rounds=1)
    assert found.kind == kind
    assert found.weight_bytes == sum(p.nbytes for p in make().parameters()) + sum(
        b.nbytes for b in make().buffers()
    )
    assert set(found.step_seconds) == {1, 2}
    assert found.macs == measure.macs(make(), torch.randn(1, *shape))


def test_a_model_that_cannot_be_trained_with_one_sample_has_facts_too():
    def make():
        return nn.Sequential(nn.Conv2d(3, 8, 4), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 10))

    assert advice.facts(make, (3, 4, 4), 4, rounds=1).macs == 3 * 8 * 16 + 80


def test_a_batch_that_cannot_be_shared_is_refused():
    with pytest.raises(ValueError, match="batch_size=1 must be 2 or more"):
        advice.facts(models.LeNet5, (3, 32, 32), 1)


def test_the_stored_scoreboard_is_of_all_notebooks_that_record():
    rows = summary.stored()
    assert {row["notebook"][:2] for row in rows} >= {f"{number:02}" for number in range(10)}
    assert len({json.dumps(row["environment"]["cpu"]) for row in rows}) == 1, "of one machine"
    assert [entry for entry in summary.entries(rows) if entry.predicted]
