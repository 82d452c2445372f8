"""Runs the notebooks as Colab does: `google.colab` can be imported, and torch is already there.

    python tests/colab.py                      # all notebooks in both runtimes, at their defaults
    python tests/colab.py --runtime tpu --smaller 00 03

Each runtime is an environment of its own with what Colab has, as far as it matters here. The set-up cells
install this checkout's last commit, from where git is told that the project lives. Prints a line for each
notebook; ends with 1 if one failed, or if a package that was there has another version afterwards.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cells

from companion import jobs, links, runner

COMMON = [
    "numpy==2.0.2",
    "nbformat",
    "matplotlib==3.10.0",
    "scikit-learn==1.6.1",
    "pandas",
    "ipykernel",
    "ipywidgets",
]
RUNTIMES = {
    "tpu": (
        "3.13",
        ["torch==2.9.0", "torchvision==0.24.0", "torch_xla==2.9.0", "jax==0.7.2", "jaxlib==0.7.2", "numpy"],
    ),
    "cpu": ("3.12", ["torch==2.11.0", "torchvision==0.26.0", "numpy"]),
}
FAKE = '"""Stands for Colab\'s own package."""\n'


def environment(runtime: str) -> Path:
    """The runtime's Python, in an environment that is made once."""
    version, packages = RUNTIMES[runtime]
    folder = cells.ROOT / f".venv-colab-{runtime}"
    interpreter = folder / "bin" / "python"
    if (folder / ".ready").exists():
        return interpreter
    shutil.rmtree(folder, ignore_errors=True)
    uv = [sys.executable, "-m", "uv"]
    subprocess.run([*uv, "venv", "--quiet", "--seed", "--python", version, str(folder)], check=True)
    wanted = [*packages, *(one for one in COMMON if one.split("==")[0] not in packages)]
    options = ["--quiet", "--compile-bytecode", "--python", str(interpreter)]
    subprocess.run([*uv, "pip", "install", *options, *wanted], check=True)
    place = [str(interpreter), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages_folder = Path(subprocess.run(place, check=True, capture_output=True, text=True).stdout.strip())
    fake = packages_folder / "google" / "colab"
    fake.mkdir(parents=True, exist_ok=True)
    (fake / "__init__.py").write_text(FAKE)
    (folder / ".ready").touch()
    return interpreter


def installed(interpreter: Path) -> dict[str, str]:
    """Packages and versions of an environment."""
    command = [str(interpreter), "-m", "pip", "list", "--format=json", "--disable-pip-version-check"]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {package["name"].lower(): package["version"] for package in found}


@contextmanager
def as_colab(interpreter: Path) -> Iterator[None]:
    """Kernels that start inside use this Python, believe to be in Colab, and install this checkout."""
    before = dict(os.environ)
    with tempfile.TemporaryDirectory() as folder:
        kernel = Path(folder, "kernels", "python3", "kernel.json")
        kernel.parent.mkdir(parents=True)
        command = [str(interpreter), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        kernel.write_text(json.dumps({"argv": command, "display_name": "Colab", "language": "python"}))
        address = f"https://github.com/{links.current(cells.ROOT)}"
        os.environ |= {"COLAB_RELEASE_TAG": "simulated", "JUPYTER_PATH": folder, "GIT_CONFIG_COUNT": "1"}
        os.environ |= {
            "GIT_CONFIG_KEY_0": f"url.file://{cells.ROOT}.insteadOf",
            "GIT_CONFIG_VALUE_0": address,
        }
        os.environ.pop("PYTHONPATH", None)
        try:
            yield
        finally:
            os.environ.clear()
            os.environ |= before


def run(runtime: str, names: list[str], smaller: bool, output: Path) -> int:
    """How many notebooks failed, and preinstalled packages changed, in a runtime."""
    interpreter, failed = environment(runtime), 0
    before = installed(interpreter)
    with as_colab(interpreter):
        wanted = []
        for path in jobs.find(names, cells.ROOT / "notebooks"):
            values = cells.SETTINGS["smaller"].get(path.stem, {}) if smaller else {}
            wanted.append(jobs.Job(path, dict(values), path.stem))
        for outcome in runner.run(wanted, output / runtime, progress=False):
            failed += outcome.error is not None
            took = f"{outcome.seconds:5.0f} s {outcome.memory_bytes / 2**30:5.1f} GiB"
            print(f"{runtime:4} {outcome.job.name:24} {took}  {outcome.error or 'passed'}", flush=True)
    after = installed(interpreter)
    changed = {name: (old, after.get(name)) for name, old in before.items() if after.get(name) != old}
    for name, (old, new) in changed.items():
        print(f"{runtime:4} changed: {name} {old} -> {new}")
    print(f"{runtime:4} added: {', '.join(sorted(set(after) - set(before))) or 'nothing'}", flush=True)
    return failed + len(changed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="numbers or names of notebooks; all if none is given")
    parser.add_argument("--runtime", choices=list(RUNTIMES), help="one of them; else both")
    parser.add_argument("--smaller", action="store_true", help="with the small parameters of the tests")
    parser.add_argument("--output", type=Path, default=cells.ROOT / "results" / "colab")
    arguments = parser.parse_args()
    chosen = [arguments.runtime] if arguments.runtime else list(RUNTIMES)
    return int(sum(run(one, arguments.names, arguments.smaller, arguments.output) for one in chosen) > 0)


if __name__ == "__main__":
    sys.exit(main())
