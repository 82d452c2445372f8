"""Ray as this suite starts it: reachable from this machine only, with a secret, and gone afterwards."""

import os
import signal
import subprocess
import sys
import tempfile

import psutil
import pytest
from conftest import ROOT

from companion import ray_session

pytestmark = pytest.mark.once
pytest.importorskip("ray", reason="Ray is in the extra 'tune', which this environment was made without")

STARTED = """
import time
from companion import ray_session
ray_session.start(cpus=1)
print("started", flush=True)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def ray():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "7")  # what a test below looks for
        ray_session.start(cpus=1)
        assert os.environ["OMP_NUM_THREADS"] == "7"
    yield ray_session.imported()
    ray_session.stop()


@pytest.fixture(scope="module", autouse=True)
def killed_drivers(request):
    """What drivers had started that are killed as the tests of this file begin, by the signal.

    Ray's agents wait a minute for a server that is gone: meanwhile the other tests run.
    """
    if not any(item.function is test_a_killed_driver_leaves_no_process for item in request.session.items):
        return {}
    return {how: _killed(how) for how in (signal.SIGTERM, signal.SIGKILL)}


def _killed(how: signal.Signals) -> list[psutil.Process]:
    with subprocess.Popen(
        [sys.executable, "-c", STARTED], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as driver:
        assert driver.stdout.readline() == "started\n"
        started = psutil.Process(driver.pid).children(recursive=True)
        assert len(started) >= 4
        driver.send_signal(how)
        driver.wait(30)
    return started


def own_processes() -> list[psutil.Process]:
    return [child for child in psutil.Process().children(recursive=True) if ray_session._is_rays(child)]


def test_it_listens_on_loopback_only(ray):
    listening = [
        (process.name(), connection.laddr.ip)
        for process in own_processes()
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) >= 4, "its servers were not found"
    outside = [place for place in listening if not place[1].endswith("127.0.0.1")]
    assert not outside


def test_a_process_without_the_secret_is_refused(ray):
    code = f"""
from ray._raylet import GcsClient
GcsClient(address={ray.get_runtime_context().gcs_address!r})
print("let in")
"""
    for token, let_in in ((os.environ["RAY_AUTH_TOKEN"], True), ("0" * 64, False)):
        environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
        asked = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120
        )
        assert ("let in" in asked.stdout) == let_in, asked.stderr
    assert "token" in asked.stderr.lower()


def test_another_process_joins_it_and_leaves_it_running(ray, python):
    code = f"""
from companion import ray_session
print(ray_session.join({ray_session.address()!r}))
try:
    ray_session.join("auto")
except RuntimeError as error:
    print(error)
"""
    ran = subprocess.run([*python, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    first, second = ran.stdout.splitlines()
    assert first == "{'CPU': 1.0}", ran.stderr
    assert "already runs" in second
    assert ray_session.resources() == {"CPU": 1.0}


def test_a_task_has_as_many_threads_as_cpus_whatever_this_process_has(ray):
    task = ray.remote(num_cpus=1)(lambda: os.environ["OMP_NUM_THREADS"])
    assert ray.get(task.remote(), timeout=60) == "1"


def test_it_reports_nothing_to_its_makers(ray):
    from ray._common.usage import usage_lib

    assert not usage_lib.usage_stats_enabled()


def test_what_a_trial_asks_for_must_be_on_one_node(ray):
    ray_session.afford(cpus=1, gpus=0)
    assert [ray_session.at_once(cpus, 0) for cpus in (0.1, 0.25, 1, 2)] == [10, 4, 1, 0]
    with pytest.raises(ValueError, match=r"cpus=3 for each trial, but no node .* more than 1"):
        ray_session.afford(cpus=3, gpus=0)
    with pytest.raises(ValueError, match=r"gpus=0.5 for each trial"):
        ray_session.afford(cpus=1, gpus=0.5)


def test_what_a_trial_asks_for_must_be_together_on_one_node(ray, monkeypatch):
    nodes = [{"CPU": 8.0}, {"CPU": 1.0, "GPU": 2.0}]
    monkeypatch.setattr(ray_session, "_nodes", lambda: nodes)
    ray_session.afford(cpus=1, gpus=2)
    ray_session.afford(cpus=8, gpus=0)
    with pytest.raises(ValueError, match=r"cpus=4 and gpus=1 for each trial: .* no node has both"):
        ray_session.afford(cpus=4, gpus=1)
    assert ray_session.at_once(1, 1) == 1
    assert ray_session.at_once(1, 0) == 9


def test_it_is_started_once(ray):
    with pytest.raises(RuntimeError, match="already runs"):
        ray_session.start()
    with ray_session.running() as resources:
        assert resources == {"CPU": 1.0}
    assert ray.is_initialized(), "running() stopped what it had not started"


def test_afterwards_no_process_and_no_file_is_left(python):
    code = """
import glob, os, psutil, tempfile
from companion import ray_session
before = set(glob.glob(tempfile.gettempdir() + "/*"))
with ray_session.running(cpus=1):
    there = psutil.Process().children(recursive=True)
    assert len(there) >= 4
    folder = ray_session._started["folder"]
    assert os.listdir(folder)
print(os.path.exists(folder))
print([process.name() for process in there if process.is_running()])
print(sorted(set(glob.glob(tempfile.gettempdir() + "/*")) - before))
print(os.listdir("."))
"""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as temporary:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": temporary}
        ran = subprocess.run(
            [*python, "-c", code], cwd=folder, capture_output=True, text=True, env=environment, timeout=120
        )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == ["False", "[]", "[]", "[]"]
    assert ran.stderr == ""


def test_a_long_folder_for_temporary_files_gives_no_socket_too_long(python, tmp_path):
    long = tmp_path / ("long" * 20)
    long.mkdir()
    code = """
import os
from companion import ray_session
print(ray_session.start(cpus=1), os.path.dirname(ray_session._started["folder"]))
"""
    environment = os.environ | {"TMPDIR": str(long), "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [*python, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=120
    )
    assert ran.stdout == "{'CPU': 1.0} /tmp\n", ran.stderr


def test_several_nodes_on_one_machine(python):
    code = """
from companion import ray_session, ray_tune
ray_session.imported()
from ray import tune
def train(config):
    import ray, time
    time.sleep(1)
    tune.report({"x": config["x"], "node": int(ray.get_runtime_context().get_node_id(), 16) % 10**6})
print(ray_session.start(cpus=1, nodes=2))
found = ray_tune.search(train, {"x": tune.uniform(0, 1)}, metric="x", trials=4, progress=False)
print(len({trial.reports[-1]["node"] for trial in found.trials}), {trial.status for trial in found.trials})
"""
    ran = subprocess.run([*python, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert ran.stdout.splitlines() == ["{'CPU': 2.0}", "2 {'finished'}"], ran.stderr


def test_a_machine_that_was_too_busy_gets_a_second_chance(monkeypatch):
    said = ["The current node timed out during startup. This could happen"]

    def begin(node, nodes):
        if said:
            raise Exception(said.pop())

    monkeypatch.setattr(ray_session, "_begin", begin)
    monkeypatch.setattr(ray_session, "resources", lambda: {"CPU": 1.0})
    monkeypatch.setattr(ray_session.imported(), "is_initialized", lambda: False)
    assert ray_session.start() == {"CPU": 1.0}
    said += ["no such option"]
    with pytest.raises(Exception, match="no such option"):
        ray_session.start()


def test_pythons_path_is_quoted_where_a_shell_would_cut_it(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/a b/bin/python")
    assert ray_session._options()["runtime_env"] == {"py_executable": "'/a b/bin/python'"}
    monkeypatch.setattr(sys, "executable", "/ab/bin/python")
    assert "runtime_env" not in ray_session._options()


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'accelerating-pytorch\[tune\]'"):
        ray_session.imported()


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_driver_leaves_no_process(killed_drivers, how):  # the last in this file
    _, left = psutil.wait_procs(killed_drivers[how], 150)
    for process in left:
        process.kill()
    assert not left
