"""The project's files say the same thing, and a fresh machine can use them."""

import json
import re
import shutil
import subprocess
import sys
import tomllib

import pytest
import yaml
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from companion import stacks

pytestmark = pytest.mark.once
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = {
    extra: [Requirement(text) for text in texts] for extra, texts in PROJECT["optional-dependencies"].items()
}
CORE = [Requirement(text) for text in PROJECT["dependencies"]]
REFERENCE, NEWEST = stacks.TABLE[2, 9], stacks.TABLE[2, 15]


def pins(name: str, stack: stacks.Stack = REFERENCE) -> list[Requirement]:
    lines = (ROOT / stack.constraints).read_text().splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return [pin for pin in found if canonicalize_name(pin.name) == canonicalize_name(name)]


def pinned(name: str, stack: stacks.Stack = REFERENCE) -> str:
    """The version that this machine gets; others may get another."""
    (pin,) = (pin for pin in pins(name, stack) if pin.marker is None or pin.marker.evaluate())
    return str(pin.specifier).removeprefix("==")


def test_the_stacks_are_those_that_fit_together():
    assert [pinned(name) for name in ("torch", "torchvision", "torch_xla", "torchao")] == [
        "2.9.0",
        "0.24.0",
        "2.9.0",
        "0.15.0",
    ]
    assert [pinned(name, NEWEST) for name in ("torch", "torchvision", "torchao")] == [
        "2.15.0",
        "0.29.2",
        "0.18.0",
    ]
    for stack in (REFERENCE, NEWEST):
        assert pinned("torchao", stack).startswith(stack.torchao.removesuffix("*"))
    assert not pins("torch_xla", NEWEST)
    makefile = (ROOT / "Makefile").read_text()
    assert re.findall(r"^CONSTRAINTS\.(\w+) := (.+)$", makefile, re.MULTILINE) == [
        (stack.name, stack.constraints) for stack in stacks.TABLE.values()
    ]


@pytest.mark.parametrize(
    ("stack", "absent"),
    [(REFERENCE, set()), (NEWEST, {"xla", "preflight", "site"})],
    ids=["reference", "newest"],
)
def test_every_requirement_is_pinned_within_its_bounds(stack, absent):
    assert set(EXTRAS) == {"xla", "tune", "compress", "peers", "preflight", "notebooks", "dev", "site"}
    extras = [
        requirement for extra, needed in EXTRAS.items() if extra not in absent for requirement in needed
    ]
    for requirement in (*CORE, *extras):
        assert pins(requirement.name, stack), f"{requirement.name} is not in {stack.constraints}"
        for pin in pins(requirement.name, stack):
            (exact,) = pin.specifier
            assert exact.operator == "=="
            assert requirement.specifier.contains(exact.version), f"{pin} is outside {requirement}"


def test_bounds_are_loose_and_the_name_is_not_a_strangers():
    bounds = {requirement.name: str(requirement.specifier) for requirement in CORE}
    assert bounds["torch"] == ">=2.9"
    assert bounds["torchvision"] == ">=0.24"
    assert PROJECT["requires-python"] == ">=3.11"
    assert PROJECT["name"] != "companion"


def test_no_file_holds_the_address_of_a_package_index():
    for name in (
        "constraints.txt",
        "constraints-newest.txt",
        "pyproject.toml",
        "environment.yml",
        "setup.sh",
        "Makefile",
    ):
        assert not re.search(r"://(?!github\.com/)|index-url|find-links", (ROOT / name).read_text()), name


def test_conda_names_the_same_stack():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python, pip, packages = environment["dependencies"]
    assert pip == "pip"
    assert packages["pip"] == [
        "--constraint constraints.txt",
        "--editable .[notebooks,dev,compress,peers,tune,xla]",
    ]
    assert Requirement("python" + PROJECT["requires-python"]).specifier.contains(
        python.removeprefix("python=")
    )
    assert environment["name"] == PROJECT["name"]
    assert "    wanted='.[notebooks,dev,compress,peers,tune,site,xla]'" in (ROOT / "setup.sh").read_text()


def test_binder_names_the_same_stack_for_cpu():
    lines = [
        line
        for line in (ROOT / "binder/requirements.txt").read_text().splitlines()
        if not line.startswith("#")
    ]
    assert "--constraint ../constraints.txt" in lines
    assert f"torch=={pinned('torch')}+cpu" in lines
    assert f"torchvision=={pinned('torchvision')}+cpu" in lines
    assert lines[-1] == ".[notebooks,compress,tune]"
    python = (ROOT / "binder/runtime.txt").read_text().strip().removeprefix("python-")
    assert Requirement("python" + PROJECT["requires-python"]).specifier.contains(python)


def test_what_binder_starts_gives_memory_back(tmp_path):
    says = "import os, sys; print(os.environ['MALLOC_ARENA_MAX'], sys.argv[1])"
    command = [ROOT / "binder/start", sys.executable, "-c", says, "of two words"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ran.stdout == "2 of two words\n"


def test_repo2docker_understands_binder(tmp_path, python):
    shutil.copytree(ROOT / "binder", tmp_path / "binder")
    for name in ("pyproject.toml", "constraints.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    command = [*python, "-m", "repo2docker", "--no-build", "--debug", str(tmp_path)]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    dockerfile = made.stdout + made.stderr
    assert "FROM " in dockerfile
    copied, installed = dockerfile.rfind("COPY --chown"), dockerfile.find("pip install --no-cache-dir -r")
    assert installed > 0, "Binder would not install binder/requirements.txt"
    assert "binder/requirements.txt" in dockerfile
    assert "binder/start" in dockerfile
    assert dockerfile.find("src/ ${REPO_DIR}") < installed, (
        "the package would be installed before it is copied"
    )
    assert copied > 0


def test_installing_beside_an_existing_torch_changes_nothing(python, tmp_path):
    command = [
        "-m",
        "pip",
        "install",
        "--dry-run",
        "--quiet",
        "--no-build-isolation",
        "--report",
        str(tmp_path / "report.json"),
    ]
    copy = tmp_path / "project"
    shutil.copytree(
        ROOT, copy, ignore=shutil.ignore_patterns(".venv*", ".git", "results", "data", "build", "*.egg-info")
    )
    subprocess.run([*python, *command, str(copy)], check=True, cwd=tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert [entry["metadata"]["name"] for entry in report["install"]] == [PROJECT["name"]]


def test_dependencies_are_listed_with_their_licences_and_versions():
    lines = [line.strip("| ").split(" | ") for line in (ROOT / "DEPENDENCIES.md").read_text().splitlines()]
    listed = {line[0]: line for line in lines if len(line) == 6}

    def version(name, stack):
        found = pins(name, stack)
        return str(found[0].specifier).removeprefix("==") if found else "-"

    for requirement in [*CORE, *(one for some in EXTRAS.values() for one in some)]:
        name = canonicalize_name(requirement.name)
        assert name in listed, f"add {name} to DEPENDENCIES.md"
        _, _, old, new, released, licence = listed[name]
        assert (old, new) == (version(name, REFERENCE), version(name, NEWEST)), name
        assert re.fullmatch(r"\S+, \d{4}-\d\d-\d\d", released), name
        assert licence, name


COLAB = {
    "torch": "2.9.0+cpu",
    "torchvision": "0.24.0+cpu",
    "numpy": "2.0.2",
    "matplotlib": "3.10.0",
    "scikit-learn": "1.6.1",
}


@pytest.mark.parametrize("name", COLAB)
def test_colabs_versions_satisfy_the_package(name):
    (requirement,) = (r for r in CORE if r.name == name)
    assert requirement.specifier.contains(COLAB[name])


def test_citation_and_licence():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"] == "Apache-2.0"
    assert citation["repository-code"] == PROJECT["urls"]["Repository"]
    assert "Apache License" in (ROOT / "LICENSE").read_text()
