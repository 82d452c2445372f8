import json
import multiprocessing

import pytest

from companion import scoreboard


def _record(folder, worker):
    for i in range(50):
        scoreboard.record(folder, "00_baseline", f"worker {worker}", {"speed": (i, "samples/s")}, note="x" * 3000)


def test_several_processes_record_whole_lines(tmp_path):
    workers = [multiprocessing.get_context("spawn").Process(target=_record, args=(tmp_path, i)) for i in range(4)]
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
    row = scoreboard.record(tmp_path / "new", "03_ddp", "2 ranks", {"speed": (10, "samples/s")}, device="cuda:0", threads=1)
    assert scoreboard.read(tmp_path / "new") == [row]
    assert row["metrics"] == {"speed": {"value": 10.0, "unit": "samples/s"}}
    assert row["status"] == "measured"
    assert row["device"] == "cuda:0"
    assert row["settings"] == {"threads": 1}
    assert {"cpu", "cores", "threads", "versions"} <= set(row["environment"])


def test_what_was_skipped_has_its_reason(tmp_path):
    row = scoreboard.record(tmp_path, "03_ddp", "nccl", skipped="needs 2 CUDA devices")
    assert row["status"] == "skipped: needs 2 CUDA devices"
    assert "skipped: needs 2 CUDA devices" in str(scoreboard.Table([row]))
    assert "12,346 samples/s" in str(scoreboard.Table([row | {"metrics": {"a": {"value": 12345.6, "unit": "samples/s"}}}]))
    assert "<td style=text-align:left>nccl</td>" in scoreboard.Table([row])._repr_html_()


def test_rows_that_say_nothing_are_refused(tmp_path):
    with pytest.raises(ValueError, match="either metrics or the reason"):
        scoreboard.record(tmp_path, "00", "x")
    with pytest.raises(ValueError, match="either metrics or the reason"):
        scoreboard.record(tmp_path, "00", "x", {"a": (1, "s")}, skipped="why")
    with pytest.raises(ValueError, match="not JSON compliant"):
        scoreboard.record(tmp_path, "00", "x", {"a": (float("nan"), "s")})
    assert scoreboard.read(tmp_path) == []


def test_a_damaged_line_is_named(tmp_path):
    scoreboard.record(tmp_path, "00", "x", {"a": (1, "s")})
    with (tmp_path / scoreboard.FILE).open("a") as file:
        file.write(json.dumps({"a": 1})[:-2] + "\n")
    with pytest.raises(ValueError, match=r"scoreboard.jsonl, line 2 is damaged"):
        scoreboard.read(tmp_path)
