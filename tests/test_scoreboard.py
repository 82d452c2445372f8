import json
import multiprocessing

import pytest

from companion import measure, scoreboard


def _record(folder, worker):
    for i in range(50):
        scoreboard.record(
            folder, "00_baseline", f"worker {worker}", {"speed": (i, "samples/s")}, note="x" * 3000
        )


def test_several_processes_record_whole_lines(tmp_path):
    workers = [
        multiprocessing.get_context("spawn").Process(target=_record, args=(tmp_path, i)) for i in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    rows = scoreboard.read(tmp_path)
    for i in range(4):
        values = [row["metrics"]["speed"]["value"] for row in rows if row["technique"] == f"worker {i}"]
        assert values == list(range(50))


def test_a_row_has_everything_to_compare_it_with_others(tmp_path):
    row = scoreboard.record(
        tmp_path / "new", "03_ddp", "2 ranks", {"speed": (10, "samples/s")}, device="cuda:0", threads=1
    )
    assert scoreboard.read(tmp_path / "new") == [row]
    assert row["metrics"] == {"speed": {"value": 10.0, "unit": "samples/s"}}
    assert row["status"] == "measured"
    assert row["device"] == "cuda:0"
    assert row["settings"] == {"threads": 1}
    assert {"cpu", "cores", "threads", "versions"} <= set(row["environment"])


def test_what_was_skipped_has_its_reason(tmp_path):
    row = scoreboard.record(tmp_path, "03_ddp", "nccl", skipped="needs 2 CUDA devices")
    assert row["status"] == "skipped: needs 2 CUDA devices"
    assert "skipped: needs 2 CUDA devices" in str(scoreboard.table([row]))
    assert "12,346 samples/s" in str(
        scoreboard.table([row | {"metrics": {"a": {"value": 12345.6, "unit": "samples/s"}}}])
    )
    assert "<td style='text-align:left'>nccl</td>" in scoreboard.table([row])._repr_html_()


def test_a_measured_range_is_kept_and_shown(tmp_path):
    speed = measure.Spread.of([90.0, 100.0, 120.0])
    row = scoreboard.record(tmp_path, "00", "x", {"speed": (speed, "samples/s")})
    assert row["metrics"] == {"speed": {"value": 100.0, "low": 90.0, "high": 120.0, "unit": "samples/s"}}
    assert "speed 100 (90-120) samples/s" in str(scoreboard.table([row]))


def test_rows_of_a_busy_machine_say_so(tmp_path, monkeypatch):
    quiet = scoreboard.record(tmp_path, "00", "x", {"a": (1, "s")})
    said = "other processes took 1.5 of 2 cores"
    monkeypatch.setattr(scoreboard._watch, "busy", lambda again: said)
    busy = scoreboard.record(tmp_path, "00", "y", {"a": (1, "s")})
    assert busy["busy"] == said
    assert "doubt" not in str(scoreboard.table([quiet | {"busy": None}]))
    shown = str(scoreboard.table([quiet | {"busy": None}, busy])).splitlines()
    assert shown[2].endswith(f"this machine was busy, not to be trusted: {said}")
    assert not shown[1].endswith(said)


def test_rows_that_say_nothing_are_refused(tmp_path):
    with pytest.raises(ValueError, match="either metrics or the reason"):
        scoreboard.record(tmp_path, "00", "x")
    with pytest.raises(ValueError, match="either metrics or the reason"):
        scoreboard.record(tmp_path, "00", "x", {"a": (1, "s")}, skipped="why")
    with pytest.raises(ValueError, match="is not finite"):
        scoreboard.record(tmp_path, "00", "x", {"a": (float("nan"), "s")})
    assert scoreboard.read(tmp_path) == []


def test_a_damaged_line_is_named(tmp_path):
    scoreboard.record(tmp_path, "00", "x", {"a": (1, "s")})
    with (tmp_path / scoreboard.FILE).open("a") as file:
        file.write(json.dumps({"a": 1})[:-2] + "\n")
    with pytest.raises(ValueError, match=r"scoreboard.jsonl, line 2 is damaged"):
        scoreboard.read(tmp_path)
