"""The workflows, as far as they can be checked without running them: schema, expressions, security."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
pytestmark = pytest.mark.once


def ran(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_they_follow_the_schema(path):
    ran(sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", str(path))


def test_no_weakness_is_known_in_them():
    zizmor = Path(sys.executable).with_name("zizmor")
    ran(str(zizmor), "--offline", "--no-progress", "--min-severity", "low", *map(str, WORKFLOWS))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_their_shell_commands_can_be_read(path, tmp_path):
    script = tmp_path / "step.sh"
    for job in yaml.safe_load(path.read_text())["jobs"].values():
        for step in job["steps"]:
            if "run" in step:
                assert "github.event" not in step["run"].replace("github.event_name", ""), "text of others"
                script.write_text(step["run"])
                ran("bash", "-n", str(script))


def test_every_job_ends_and_may_only_read():
    for path in WORKFLOWS:
        workflow = yaml.safe_load(path.read_text())
        assert workflow["permissions"] == {"contents": "read"}, path.name
        for name, job in workflow["jobs"].items():
            assert job["timeout-minutes"] <= 120, name
            assert set(job.get("permissions", ())) <= {"pages", "id-token"}, f"{name} may write"
