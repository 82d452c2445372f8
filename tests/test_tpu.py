"""What XLA does is counted right, each fault of a step is found.

XLA runs in processes of its own, before any backward pass.
"""

import re
import subprocess
from importlib import metadata

import pytest
import torch
from torch import nn

from companion import devices, launch, tpu

XLA = pytest.mark.skipif(devices.why_not("xla") is not None, reason=str(devices.why_not("xla")))


def child(function, *args):
    """`function(*args)` in a process where XLA has all to itself."""
    return launch.run(function, 1, *args, device="cpu", backend=None)[0]


@pytest.mark.parametrize(
    ("colab", "chips", "name"),
    [
        (True, 1, "Colab's TPU runtime"),
        (True, 0, "Colab without a TPU"),
        (False, 4, "a TPU VM"),
        (False, 0, "a machine without a TPU"),
    ],
)
def test_the_place_is_told_from_hardware(monkeypatch, tmp_path, colab, chips, name):
    for slot in range(chips):
        folder = tmp_path / "bus" / "pci" / "devices" / str(slot)
        folder.mkdir(parents=True)
        (folder / "vendor").write_text("0x1ae0\n")
        (folder / "device").write_text("0x0063\n")
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release") if colab else monkeypatch.delenv(
        "COLAB_RELEASE_TAG", raising=False
    )
    place = tpu.where(str(tmp_path))
    assert (place.name, place.chips) == (name, chips)
    assert str(place).startswith(f"{name}: {chips} TPU chips, ")


def test_looking_around_imports_nothing(python):
    code = (
        "import os, sys; os.environ['PJRT_DEVICE'] = 'TPU'; from companion import tpu; print(tpu.where());"
        "assert not {'torch_xla', 'torch_tpu', 'jax'} & set(sys.modules)"
    )
    subprocess.run([*python, "-c", code], check=True, timeout=60)


def test_a_torch_xla_for_another_torch_is_said(monkeypatch):
    monkeypatch.setattr(devices, "_installed", lambda package: True)
    monkeypatch.setattr(devices, "version", lambda package: "2.8.1")
    monkeypatch.delenv("PJRT_DEVICE", raising=False)
    with pytest.raises(ValueError, match=r"the installed torch_xla needs torch 2\.8, not 2\.\d+\.\d"):
        devices.select("xla")


def test_without_torch_xla_it_is_said_before_anything_starts(monkeypatch):
    monkeypatch.setattr(devices, "why_not", lambda kind: "there is none")
    with pytest.raises(ValueError, match="there is none"):
        tpu.diagnose(lambda x: x, [torch.ones(1)])
    with pytest.raises(ValueError, match="no XLA devices: there is none"):
        tpu.spmd(2, print)


def test_shares_must_be_equal():
    tpu.check_shares(64, 8)
    with pytest.raises(ValueError, match=r"3 devices do not divide batch_size=64; use 1, 2, 4 of them"):
        tpu.check_shares(64, 3)


@pytest.mark.parametrize(
    ("version", "named"), [({"torch_xla": "2.9.0"}, "torch_xla 2.9.0"), ({}, "neither torch_xla nor")]
)
def test_packages_are_named(monkeypatch, version, named):
    def look_up(package):
        if package not in version:
            raise metadata.PackageNotFoundError(package)
        return version[package]

    monkeypatch.setattr(tpu, "version", look_up)
    assert named in str(tpu.where())


def test_differences_of_counts():
    before = tpu.Counts(1, 0.5, 2, 3, {"aten::median": 1}, 4)
    after = tpu.Counts(2, 2.0, 4, 6, {"aten::median": 1, "aten::nonzero": 2}, 8)
    assert after - before == tpu.Counts(1, 1.5, 2, 3, {"aten::nonzero": 2}, 4)


def test_collectives_are_read_from_a_program():
    program = """
      %all-reduce.1 = (f32[10,84]{1,0}, f32[]) all-reduce(f32[10,84]{1,0} %a, f32[] %b), channel_id=1,
      to_apply=%add %all-gather = bf16[8,4]{1,0} all-gather(bf16[1,4]{1,0} %c), dimensions={0} ROOT %add =
      f32[] add(f32[] %x, f32[] %all-reduce.2)
    """
    found = tpu.collectives(program)
    assert found == [tpu.Collective("all-reduce", 4 * (840 + 1), 2), tpu.Collective("all-gather", 64, 1)]
    assert [message.sent_bytes(8) for message in found] == [2 * 7 / 8 * 4 * 841, 7 / 8 * 64]
    assert tpu.Collective("reduce-scatter", 8, 1).sent_bytes(8) == 56, "seven eighths of 64 bytes"


def _steps() -> dict[str, str]:
    """One diagnosis for each kind of step, in one process, since compiling and importing take the time."""
    xla = devices.select("xla")
    import torch_xla

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).to(xla)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    calls = []

    def good(x):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        torch_xla.sync()
        return loss

    def unmarked(x):
        model(x).sum().backward()
        optimizer.step()

    def fetches(x):
        loss = good(x)
        calls.append(loss.item())

    def prints(x):
        loss = good(x)
        calls.append(f"{loss}")

    def copies(x):
        good(x).detach().cpu()

    def masks(x):
        good(x + x[x > 0].sum() * 0)

    def doubles(x):
        good((x.double() + 1).float())

    def grows(x):
        calls.append(None)
        good(x.repeat(len(calls), 1))

    def accumulates(x):
        model(x).square().mean().backward()
        calls.append(None)
        if len(calls) % 3 == 0:
            adam.step()
            adam.zero_grad()
        torch_xla.sync()

    def uniques(x):
        good(x + x.round().unique().sum() * 0)

    def lacks(x):
        x.to_sparse()

    batches, found = [torch.randn(6, 4) for _ in range(4)], {}
    for step in (good, unmarked, fetches, prints, copies, masks, doubles, grows, uniques):
        found[step.__name__] = tpu.diagnose(step, batches)
    adam = torch.optim.AdamW(model.parameters())
    optimizer.zero_grad()
    calls.clear()
    found["accumulates"] = tpu.diagnose(accumulates, 3 * batches)
    found["ragged"] = tpu.diagnose(good, [*batches, torch.randn(5, 4)])
    found["tuples"] = tpu.diagnose(lambda x, y: good(x + y), [(x, x) for x in batches])
    for name, step, given in (("lacks", lacks, batches), ("nothing", good, [])):
        try:
            found[name] = tpu.diagnose(step, given)
        except (RuntimeError, ValueError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


@pytest.fixture(scope="module")
def diagnosed():
    return child(_steps)


FINDINGS = {
    "good": [],
    "tuples": [],
    "unmarked": [("no sync", 4, "")],
    "fetches": [("transfer", 4, "in fetches, line 3: calls.append(loss.item())")],
    "prints": [("transfer", 4, "in prints, line 3: calls.append(f")],
    "copies": [("transfer", 4, "in copies, line 2: good(x).detach().cpu()")],
    "doubles": [("float64", 4, "in doubles, line 2: good((x.double()")],
    "ragged": [("recompilation", 1, "")],
}


@XLA
@pytest.mark.parametrize("name", FINDINGS)
def test_a_diagnosis_names_the_fault_and_its_line(diagnosed, name):
    found = diagnosed[name].findings
    assert [(finding.kind, finding.steps) for finding in found] == [
        (kind, steps) for kind, steps, _ in FINDINGS[name]
    ]
    for finding, (*_, where) in zip(found, FINDINGS[name], strict=True):
        assert finding.where.split(": ")[-1].startswith(where.split(": ")[-1])
        assert finding.where.startswith(where.split(",")[0])


@XLA
def test_a_diagnosis_counts(diagnosed):
    good = diagnosed["good"]
    assert (good.steps, good.counts.transfers, good.counts.fallbacks) == (4, 0, {})
    assert 1 <= good.counts.compilations <= 2, "the first program, and one once the optimizer has its state"
    assert str(good).endswith("\n- nothing to change")
    assert diagnosed["fetches"].counts.transfers == 4


@XLA
def test_masks_fall_back_and_change_the_program(diagnosed):
    masks = diagnosed["masks"]
    assert masks.counts.fallbacks == {"aten::nonzero": 4}
    (fallback,) = (finding for finding in masks.findings if finding.kind == "fallback")
    assert "aten::nonzero runs on the CPU" in fallback.text
    assert "x[x > 0].sum()" in fallback.where


@XLA
@pytest.mark.parametrize(("name", "line"), [("masks", "x[x > 0].sum()"), ("uniques", ".unique()")])
def test_sizes_that_depend_on_values_are_blamed_for_their_programs(diagnosed, name, line):
    (again,) = (finding for finding in diagnosed[name].findings if finding.kind == "recompilation")
    assert "size depends on values" in again.text
    assert line in again.where
    assert again.programs == diagnosed[name].counts.compilations - diagnosed[name].expected > 0


@XLA
def test_accumulated_gradients_make_several_programs_that_are_no_fault(diagnosed):
    found = diagnosed["accumulates"]
    assert found.findings == ()
    assert found.expected == found.counts.compilations >= 4


@XLA
def test_shapes_that_grow_inside_the_step_are_recompilations(diagnosed):
    (finding,) = diagnosed["grows"].findings
    assert (finding.kind, finding.steps) == ("recompilation", 2), "all after the second"
    assert "a Python number or branch" in finding.text
    assert finding.programs == 2
    assert ", 2 steps, 2 programs: " in str(diagnosed["grows"])


@XLA
def test_the_ragged_batch_is_named_with_its_shape(diagnosed):
    (finding,) = diagnosed["ragged"].findings
    assert finding.text.startswith("a batch of 5 x 4 after 6 x 4")


@XLA
def test_what_xla_lacks_is_one_line(diagnosed):
    line = (
        r"RuntimeError: step 1: aten::_sparse_coo_tensor_\w+ does not exist on XLA \[in lacks, line "
        r"\d+: x\.to_sparse\(\)\]: .+"
    )
    assert re.fullmatch(line, diagnosed["lacks"])
    assert diagnosed["nothing"].startswith("ValueError: there are no batches")


def _sharded_sum(rows):
    import numpy as np
    import torch_xla
    import torch_xla.distributed.spmd as xs
    import torch_xla.runtime as xr

    count = xr.global_runtime_device_count()
    x = torch.arange(4.0 * rows).view(rows, 4).to(torch_xla.device())
    sharded = xs.mark_sharding(x, xs.Mesh(np.arange(count), (count,), ("data",)), ("data", None))
    return count, x.sum().item(), sharded.local_shards[0].data.shape


@XLA
def test_spmd_sees_as_many_devices_as_asked_for_and_adds_messages():
    (count, total, shard), programs = tpu.spmd(4, _sharded_sum, 8)
    assert (count, total, tuple(shard)) == (4, sum(range(32)), (2, 4))
    assert [message for program in programs for message in program] == [tpu.Collective("all-reduce", 4, 1)]
    with pytest.raises(ValueError, match="count=0 is not from 1 to 64"):
        tpu.spmd(0, _sharded_sum, 8)


def _recorded():
    xla = devices.select("xla")
    x = torch.ones(2, 3).to(xla)
    lines = tpu.graph((x @ x.T).relu())
    before = tpu.counts()
    x.sum().item()
    return lines, tpu.counts() - before


@XLA
def test_the_graph_is_what_was_recorded_and_not_run():
    lines, did = child(_recorded)
    assert [name for line in lines for name in ("aten::mm", "aten::relu") if name in line] == [
        "aten::mm",
        "aten::relu",
    ]
    assert (did.compilations, did.executions, did.transfers) == (1, 1, 1)


def _too_late():
    torch.ones(1, requires_grad=True).sum().backward()
    weight = torch.ones(3, requires_grad=True, device=devices.select("xla"))
    try:
        tpu.diagnose(lambda x: (weight * x).sum().backward(), [torch.ones(3)])
    except RuntimeError as error:
        return str(error)


@XLA
def test_asking_for_xla_too_late_is_explained():
    assert child(_too_late).startswith(
        "XLA was asked for after a backward pass on the CPU had counted the devices: start again"
    )
