"""Notebooks' cells in a process that was forked, as broken notebooks are run."""

import psutil
import pytest
import warm
from nbformat.v4 import new_code_cell, new_notebook

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def server():
    server = warm.Server()
    yield server
    server.stop()


def ran(server, folder, *sources) -> warm.Run:
    return server.run(new_notebook(cells=[new_code_cell(source) for source in sources]), folder)


def test_the_cell_that_fails_is_told_and_the_next_run_knows_nothing_of_it(server, tmp_path):
    run = ran(server, tmp_path, "x = 1", "print(x)", "assert x == 2, f'x is {x}'", "print('too far')")
    assert (run.failed, run.error) == (2, "AssertionError: x is 1")
    assert (tmp_path / "written").read_text().startswith("1\n")
    assert "too far" not in (tmp_path / "written").read_text().split("AssertionError")[-1]
    (tmp_path / "next").mkdir()
    run = ran(server, tmp_path / "next", "import os\nprint(os.getcwd(), 'x' in globals())")
    assert (run.failed, run.error) == (None, None)
    assert (tmp_path / "next" / "written").read_text() == f"{tmp_path / 'next'} False\n"


def ended(process: int) -> bool:
    """Whether it ends within ten seconds; one that nobody has waited for counts as ended."""
    if not psutil.pid_exists(process):
        return True
    psutil.wait_procs([psutil.Process(process)], 10)
    return not psutil.pid_exists(process) or psutil.Process(process).status() == psutil.STATUS_ZOMBIE


def test_what_a_run_leaves_running_is_ended(server, tmp_path):
    ran(server, tmp_path, "import subprocess\nprint(subprocess.Popen(['sleep', '600']).pid)")
    assert ended(int((tmp_path / "written").read_text()))


def test_a_run_that_hangs_or_dies_says_what_it_has_written(server, tmp_path, monkeypatch):
    with pytest.raises(RuntimeError, match="no answer:\\nbefore"):
        ran(server, tmp_path, "import os\nprint('before', flush=True)\nos._exit(1)")
    monkeypatch.setattr(warm, "LIMIT_SECONDS", 5.0)
    (tmp_path / "next").mkdir()
    pids = "print(os.getpid(), os.getppid(), flush=True)"
    with pytest.raises(RuntimeError, match=r"no answer:\n\d+ \d+"):
        ran(server, tmp_path / "next", f"import os, time\n{pids}\ntime.sleep(600)")
    assert all(ended(int(pid)) for pid in (tmp_path / "next" / "written").read_text().split())
