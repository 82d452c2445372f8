"""Temporary folders go with their process: at its end, and when it is killed."""

import signal
import subprocess
import sys
import time

import pytest

SCRIPT = """import multiprocessing, sys, time
from companion import scratch

def in_worker():
    (scratch.folder() / "theirs").write_text("x")

if __name__ == "__main__":
    made = scratch.folder()
    (made / "mine").write_text("x")
    worker = multiprocessing.get_context("spawn").Process(target=in_worker)
    worker.start()
    worker.join()
    assert made.exists(), "the worker's end has removed it"
    print(made.parent, flush=True)
    assert len(list(made.parent.glob("*/theirs"))) == 1
    time.sleep(float(sys.argv[1]))
"""


@pytest.mark.parametrize("ending", ["returns", signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_is_left_however_the_process_ends(ending, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "t"))
    (tmp_path / "t").mkdir()
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    seconds = "0" if ending == "returns" else "600"
    process = subprocess.Popen(
        [sys.executable, script, seconds], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    place = process.stdout.readline().decode().strip()
    assert place.startswith(str(tmp_path)), process.stderr.read().decode()
    if ending != "returns":
        process.send_signal(ending)
    _, said = process.communicate(timeout=60)
    if ending == "returns":
        assert said == b"", "two removed the same folder"
    end = time.monotonic() + 20
    while list((tmp_path / "t").iterdir()) and time.monotonic() < end:
        time.sleep(0.02)
    assert not list((tmp_path / "t").iterdir())
