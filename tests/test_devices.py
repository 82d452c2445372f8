import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from companion import devices, host, machine, stacks


def test_auto_takes_the_first_accelerator_that_is_here():
    expected = next(kind for kind in ("tpu", "cuda", "mps", "cpu") if kind in devices.available())
    assert devices.select("auto").type == expected


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cuda:-1", "", "auto:1"])
def test_unknown_name_is_refused_with_the_known_ones(name):
    with pytest.raises(ValueError, match=r"unknown device .*use one of auto, cpu, cuda, mps, xla, tpu"):
        devices.select(name)


def test_absent_device_is_refused_with_the_reason_and_what_is_here(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    with pytest.raises(
        ValueError, match=r"'cuda' is not available: no NVIDIA GPU or driver was found; available here: cpu"
    ):
        devices.select("cuda")
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ValueError, match="built without CUDA"):
        devices.select("cuda:1")


def test_gpu_that_does_not_exist_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices.select("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="there are 2 GPUs, counted from cuda:0"):
        devices.select("cuda:2")
    assert [str(d) for d in devices.select_list("auto", 3)] == ["cuda:0", "cuda:1", "cuda:0"]


def test_exact_arithmetic_is_set_and_taken_back(monkeypatch):
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(cudnn, "deterministic", True)  # as some packages do, which is not all of it
    assert not devices.is_exact()
    devices.set_exact()
    try:
        assert devices.is_exact()
        assert (cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision) == ("ieee", "ieee")
        assert cudnn.allow_tf32 is False, "torch.compile could not read it"
    finally:
        devices.set_exact(False)
    assert not devices.is_exact()
    assert (cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision) == ("tf32", "tf32"), "not as from the start"
    assert not cudnn.deterministic


def test_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(devices, "_installed", lambda package: False)
    monkeypatch.setattr(stacks, "current", lambda: stacks.TABLE[2, 9])
    with pytest.raises(ValueError, match=r"torch_xla is not installed.*accelerating-pytorch\[xla\]"):
        devices.select("xla")


def test_waiting_for_a_tpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(devices, "_installed", lambda package: True)
    monkeypatch.setattr(host, "tpu_chips", lambda: 0)
    monkeypatch.setenv("PJRT_DEVICE", "TPU")
    with pytest.raises(ValueError, match="PJRT_DEVICE=TPU is set, but there is no TPU chip"):
        devices.select("xla")
    with pytest.raises(ValueError, match="no TPU chip was found"):
        devices.select("tpu")


def test_tpu_without_a_runtime_is_said(monkeypatch):
    monkeypatch.setattr(host, "tpu_chips", lambda: 4)
    monkeypatch.setattr(devices, "_installed", lambda package: False)
    assert "neither torch_tpu nor torch_xla is installed" in devices.why_not("tpu")
    assert devices.select("auto").type != "tpu"


def test_no_tpu_runtime_is_imported_unless_asked_for(python):
    code = (
        "import sys; from companion import devices, machine; machine.describe(); "
        "devices.select(); devices.available();"
        "assert not {'torch_xla', 'torch_tpu'} & set(sys.modules)"
    )
    subprocess.run([*python, "-c", code], check=True)


def test_only_tpu_chips_count_as_tpus(tmp_path):
    for slot, (vendor, model) in enumerate(
        [("0x1ae0", "0x0063"), ("0x1ae0", "0x0042"), ("0x10de", "0x0063")]
    ):  # v5e, network, NVIDIA
        folder = tmp_path / f"bus/pci/devices/0000:00:0{slot}.0"
        folder.mkdir(parents=True)
        (folder / "vendor").write_text(vendor + "\n")
        (folder / "device").write_text(model + "\n")
    assert host.tpu_chips(str(tmp_path)) == 1
    assert host.tpu_chips(str(tmp_path / "nowhere")) == 0


def test_a_list_may_repeat_a_device():
    assert devices.select_list("cpu, cpu") == [torch.device("cpu")] * 2
    assert devices.select_list(["cpu"], count=3) == [torch.device("cpu")] * 3
    with pytest.raises(ValueError, match="2 devices named where 3 are needed"):
        devices.select_list("cpu, cpu", count=3)
    with pytest.raises(ValueError, match="unknown device"):
        devices.select_list("cpu, nonsense")


def _container(root: Path, files: dict[str, str]) -> str:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(root)


def test_limits_of_a_version_2_container_are_respected(tmp_path):
    files = {
        "proc/self/cgroup": "0::/work/inner\n",
        "sys/fs/cgroup/work/inner/cpu.max": "max 100000\n",
        "sys/fs/cgroup/work/cpu.max": "150000 100000\n",
        "sys/fs/cgroup/work/memory.max": "1073741824\n",
    }
    root = _container(tmp_path, files)
    assert host.usable_cores(root) == 1
    assert host.usable_memory_bytes(root) == 2**30


def test_limits_of_a_version_1_container_are_respected(tmp_path):
    files = {
        "proc/self/cgroup": "4:memory:/job\n2:cpu,cpuacct:/outside/of/the/container\n",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "100000\n",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "536870912\n",
    }
    root = _container(tmp_path, files)
    assert host.usable_cores(root) == 1
    assert host.usable_memory_bytes(root) == 2**29


def test_without_limits_the_machine_counts(tmp_path):
    root = _container(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"})
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert host.usable_cores(root) == affinity


def test_threads_never_exceed_the_usable_cores():
    cores = host.usable_cores()
    assert devices.set_threads(1) == torch.get_num_threads() == 1
    torch.set_num_threads(cores + 3)
    assert devices.set_threads() == torch.get_num_threads() == cores
    for wrong in (0, cores + 1):
        with pytest.raises(
            ValueError, match=f"threads={wrong} is not between 1 and the {cores} usable cores"
        ):
            devices.set_threads(wrong)


def test_a_process_uses_the_threads_that_it_was_given_when_it_began():
    code = "import torch; from companion import devices; torch.set_num_threads(7); "
    code += "print(devices.most_threads())"
    for given, expected in (("1", 1), ("1000", host.usable_cores())):
        variables = os.environ | {"OMP_NUM_THREADS": given}
        done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True)
        assert done.stdout == f"{expected}\n", done.stderr


def test_compiling_needs_a_compiler_headers_and_paths_without_spaces(monkeypatch, tmp_path):
    monkeypatch.setattr(devices.shutil, "which", lambda name: None)
    assert devices.why_not("compile") == "needs a C++ compiler (g++ or clang++)"
    monkeypatch.setattr(devices.shutil, "which", lambda name: name)
    monkeypatch.setattr(devices.sysconfig, "get_path", lambda name: "/nowhere")
    assert devices.why_not("compile") == "needs Python's C headers (python3-dev)"
    monkeypatch.undo()
    monkeypatch.setattr(devices.shutil, "which", lambda name: name)
    monkeypatch.setattr(devices.sysconfig, "get_path", lambda name: str(tmp_path))
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(torch, "__file__", "/somewhere/torch/__init__.py")
    assert devices.why_not("compile") is None
    monkeypatch.setattr(torch, "__file__", "/some where/torch/__init__.py")
    assert devices.why_not("compile") == "needs torch and the temporary folder in paths without a space"


def test_the_machine_shows_as_text_and_as_table():
    here = machine.describe()
    assert f"torch {torch.__version__.split('+')[0]}" in str(here)
    assert re.search(rf"^cores +{host.usable_cores()}$", str(here), re.MULTILINE)
    assert here._repr_html_().count("<tr>") == len(here.table().rows) == 9
    for device in map(devices.select, ("cpu",)):
        devices.synchronize(device)
        devices.end_step(device)


def test_the_stack_is_that_of_the_installed_torch(monkeypatch):
    names = {}
    for torch_version in ("2.9.0", "2.9.1+cpu", "2.11.0", "2.15.0+cu132", "2.16.0a0"):
        monkeypatch.setattr(torch, "__version__", torch_version)
        names[torch_version] = stacks.current().name
    assert list(names.values()) == ["reference", "reference", "newest", "newest", "newest"]
    monkeypatch.setattr(devices, "_installed", lambda package: False)
    with pytest.raises(
        ValueError, match=r"torch_xla's last release needs torch 2\.9, not 2\.16\.0a0; torch_tpu"
    ):
        devices.select("xla")
