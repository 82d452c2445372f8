"""A search: what it finds, what it says of trials that fail, and that it can be interrupted."""

import json
import os
import random
import subprocess
import time

import numpy as np
import pytest
import torch
from conftest import ROOT

from companion import ray_results, ray_session, ray_tune

pytest.importorskip("ray", reason="Ray is in the extra 'tune', which this environment was made without")
ray_session.imported()
from ray import tune  # noqa: E402
from ray.tune import schedulers  # noqa: E402
from trials import is_a_ddp_job, misbehaving, recovers, train  # noqa: E402

SPACE = {"lr": tune.loguniform(1e-3, 1.0)}


def search(function=train, space=SPACE, **settings):
    return ray_tune.search(function, space, **{"metric": "accuracy", "progress": False, **settings})


@pytest.fixture(scope="module", autouse=True)
def _ray():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT / "tests"))  # where the trials' processes find this file
        ray_session.start(cpus=2)
    yield
    ray_session.stop()


@pytest.fixture(scope="module")
def found():
    return search(trials=6, shared={"scale": 2.0}, seed=3)


def test_every_trial_is_a_row_with_all_its_reports(found):
    assert [len(trial.reports) for trial in found.trials] == [8] * 6
    assert found.reports == 48
    for trial in found.trials:
        assert trial.status == "finished"
        assert trial.error is None
        assert set(trial.reports[0]) == {"accuracy"}
        assert trial.reports[0]["accuracy"] == pytest.approx(trial.config["lr"])
        assert list(trial.at) == sorted(trial.at)
    assert found.best.config["lr"] == max(trial.config["lr"] for trial in found.trials)
    assert found.table().head == ("lr", "reports", "accuracy", "status")
    assert found.table().rows[0][2] == ray_results._shown(found.best.reports[-1]["accuracy"])


def test_the_best_so_far_only_rises(found):
    spent, best = zip(*found.progress(), strict=True)
    assert spent == tuple(range(1, 49))
    assert list(best) == sorted(best)
    assert best[-1] == found.best.reports[-1]["accuracy"]


def test_the_same_seed_draws_the_same_configurations(found):
    again = search(trials=6, shared={"scale": 2.0}, seed=3)
    assert [trial.config for trial in again.trials] == [trial.config for trial in found.trials]
    other = search(trials=6, seed=4)
    assert [trial.config for trial in other.trials] != [trial.config for trial in found.trials]


def test_the_callers_random_numbers_are_left_alone():
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    search(trials=1, seed=9)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected


def test_early_stopping_spends_less_and_keeps_the_best(found):
    stopped = search(trials=6, shared={"scale": 2.0}, seed=3, scheduler="asha", epochs=8)
    assert stopped.reports < found.reports
    assert stopped.best.config == found.best.config
    assert {trial.status for trial in stopped.trials} == {"finished", "stopped early"}
    assert stopped.curves().axes
    assert stopped.figure().axes


@pytest.mark.once
def test_mode_min_searches_for_the_least():
    smallest = search(trials=6, seed=3, mode="min", scheduler=schedulers.FIFOScheduler())
    assert smallest.best.config["lr"] == min(trial.config["lr"] for trial in smallest.trials)
    assert smallest.progress()[-1][1] <= smallest.progress()[0][1]


@pytest.mark.once
def test_optuna_draws_from_the_space():
    found = search(trials=3, searcher="optuna", space={"lr": tune.uniform(0.5, 1.0)})
    assert all(0.5 <= trial.config["lr"] <= 1.0 for trial in found.trials)


@pytest.mark.once
def test_with_a_searcher_as_many_trials_may_wait_for_their_process_as_there_is_room_for(monkeypatch):
    asked = []
    fit = tune.Tuner.fit

    def noted(tuner):
        limit = tuner._local_tuner._tune_config.max_concurrent_trials
        asked.append((limit, os.environ.get("TUNE_MAX_PENDING_TRIALS_PG")))
        return fit(tuner)

    monkeypatch.setattr(tune.Tuner, "fit", noted)
    assert len(search(trials=3, searcher="optuna").trials) == 3
    search(trials=1, cpus=2, searcher="optuna")
    search(trials=1)
    search(trials=1, searcher="optuna", scheduler=schedulers.HyperBandScheduler(max_t=8))
    assert asked == [(2, "2"), (1, "1"), (None, None), (None, None)]


KINDS = ["raises", "is killed", "diverges", "asks in the old way", "is well"]


@pytest.mark.once
def test_what_goes_wrong_in_a_trial_is_said(capfd):
    found = search(misbehaving, {"kind": tune.grid_search(KINDS)}, trials=1)
    said = {trial.config["kind"]: trial for trial in found.trials}
    assert {kind: trial.status for kind, trial in said.items()} == {
        "raises": "failed",
        "is killed": "failed",
        "diverges": "not finite",
        "asks in the old way": "failed",
        "is well": "finished",
    }
    line = misbehaving.__code__.co_firstlineno + 3
    assert said["raises"].error == f"ValueError: no such layer (line {line}, in misbehaving)"
    assert "its process died" in said["is killed"].error
    assert "TypeError" in said["asks in the old way"].error
    assert len(said["diverges"].reports) == 3, "it went on after NaN"
    assert found.best.config["kind"] == "is well"
    assert "no such layer" in str(found.table())
    assert capfd.readouterr() == ("", "")


@pytest.mark.once
def test_a_search_without_a_usable_trial_says_why():
    found = search(misbehaving, {"kind": "raises"}, trials=2)
    with pytest.raises(ray_results.SearchError, match=r"none of 2 trials .* no such layer"):
        found.best  # noqa: B018


def test_a_trial_that_died_is_tried_again_from_its_checkpoint():
    found = search(recovers, {"dies": True}, trials=1, retries=1)
    (trial,) = found.trials
    assert trial.status == "finished"
    assert [report["accuracy"] for report in trial.reports] == [0, 1, 2, 3]
    assert trial.reports[-1]["started_at"] == 2


DRIVER = """
from companion import ray_tune
from trials import recovers
space = {"seconds": 0.7, "epochs": 10}
ray_tune.search(recovers, space, metric="accuracy", trials=3, folder=FOLDER, progress=False)
"""


@pytest.mark.once
def test_a_killed_driver_s_search_goes_on_where_it_stopped(python, tmp_path):
    folder = tmp_path / "search"
    code = DRIVER.replace("FOLDER", repr(str(folder)))
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    driver = subprocess.Popen([*python, "-c", code], env=environment, stderr=subprocess.DEVNULL)
    give_up = time.monotonic() + 120
    while sum(path.read_text().count("\n") for path in folder.glob("*/result.json")) < 12:
        assert driver.poll() is None, "the search ended by itself"
        assert time.monotonic() < give_up, "it reports nothing"
        time.sleep(0.1)
    driver.kill()
    driver.wait(30)
    space = {"seconds": 0.7, "epochs": 10}
    with pytest.raises(ValueError, match="holds a search with trials=3, not 5"):
        search(recovers, space, trials=5, folder=folder)
    found = search(recovers, space, trials=3, folder=folder)
    assert [trial.status for trial in found.trials] == ["finished"] * 3
    every = [[report["accuracy"] for report in trial.reports] for trial in found.trials]
    assert every == [list(range(10))] * 3
    assert sum(trial.reports[-1]["started_at"] > 0 for trial in found.trials) >= 1, "all began anew"


@pytest.mark.once
def test_a_search_that_has_lost_trials_says_so(tmp_path):
    folder = tmp_path / "search"
    assert len(search(train, {"lr": 0.25}, trials=3, folder=folder).trials) == 3
    (state,) = folder.glob("experiment_state-*.json")  # as if it were older than the searcher's own
    content = json.loads(state.read_text())
    state.write_text(json.dumps(content | {"trial_data": content["trial_data"][:1]}))
    with pytest.raises(RuntimeError, match="knows only 1 of 3 trials"):
        search(train, {"lr": 0.25}, trials=3, folder=folder)


def test_a_trial_may_be_a_ddp_job():
    (trial,) = search(is_a_ddp_job, {"x": 0.25}, trials=1, cpus=2).trials
    assert trial.reports == ({"accuracy": 0.5, "same": 1.0},), trial.error


def test_halving_in_theory():
    steps = ray_results.rungs(16, 8)
    assert steps == {1: 16, 2: 8, 4: 4, 8: 2}
    assert ray_results.spent(steps) == 16 + 8 + 4 * 2 + 2 * 4
    assert ray_results.rungs(9, 10, factor=3) == {1: 9, 3: 3, 9: 1, 10: 1}


REFUSED = {
    r"mode='most' is unknown": {"mode": "most"},
    r"trials=0 must be": {"trials": 0},
    r"scheduler='ahsa' is unknown; use one of 'fifo', 'asha'": {"scheduler": "ahsa"},
    r"epochs=0 must be": {"scheduler": "asha"},
    r"searcher='grid' is unknown": {"searcher": "grid"},
    r"cpus=0 and gpus=0": {"cpus": 0},
    r"cpus=64 for each trial, but no node": {"cpus": 64},
    r"gpus=1 for each trial, but no node": {"gpus": 1},
    r"the space is empty": {"space": {}},
    r"space\['lr'\] is a function": {"space": {"lr": tune.sample_from(lambda _: 1)}, "searcher": "optuna"},
    r"train\(config, images\) cannot be called": {"shared": {"images": 1}},
    r"must be a function": {"function": int},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_right_is_refused_before_work_starts(message, monkeypatch):
    monkeypatch.delattr(ray_tune._Wanted, "tuner")  # nothing could be started
    with pytest.raises(ValueError, match=message):
        search(**REFUSED[message])


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        search(folder=tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
