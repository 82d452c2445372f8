"""Google's compiler for TPUs in a child process, in an environment of its own, within limits."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib.metadata import metadata
from pathlib import Path

from tqdm.auto import tqdm

from companion import host, scratch
from companion.launch import pickling

ROOT = Path(__file__).parents[1]
FOLDER = ".venv-preflight"
WHERE = "COMPANION_PREFLIGHT"  # an environment variable: another environment's Python
NEEDED = ("jax", "libtpu", "torchax")
LOOK_SECONDS, WEIGH_SECONDS = 0.2, 1.0  # weighing a large process takes a while itself


class PreflightError(RuntimeError):
    """The question could not be answered: something is missing, or the compiler ended without an answer."""


def interpreter() -> Path:
    """The Python that has jax, libtpu and torchax. Raises PreflightError, with the command, without one."""
    told = os.environ.get(WHERE)
    places = [Path(told)] if told else [base / FOLDER / "bin" / "python" for base in (Path.cwd(), ROOT)]
    for place in places:
        if place.exists():
            return place
    if told:
        raise PreflightError(f"{WHERE} is {told}, where there is no Python")
    if (ROOT / "Makefile").exists():
        command = "make preflight"
    else:
        links = dict(line.split(", ", 1) for line in metadata("accelerating-pytorch").get_all("Project-URL"))
        source = f"'accelerating-pytorch[preflight] @ git+{links['Repository']}'"
        command = f"python -m venv {FOLDER} && {FOLDER}/bin/pip install {source} torch==2.9.*"
    raise PreflightError(
        f"the TPU compiler (jax, libtpu, torchax) needs an environment of its own: {command}"
    )


def why_not() -> str | None:
    """The reason why nothing can be compiled here; None if it can."""
    if sys.platform != "linux":
        return f"libtpu is for Linux, not for {sys.platform}"
    try:
        interpreter()
    except PreflightError as error:
        return str(error)
    return None


def ask(request: dict[str, object], limit_seconds: float, limit_bytes: float, progress: bool) -> dict:
    """The child's answer, with the compiled program's text as `program` where there is one.

    Whatever happens, the child is gone afterwards. Raises PreflightError where it gave no answer.
    """
    python, folder = interpreter(), scratch.folder()
    try:
        (folder / "request").write_bytes(pickling.pack(request, "the request"))
        return _answered(python, folder, limit_seconds, limit_bytes, progress)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _answered(python: Path, folder: Path, limit_seconds: float, limit_bytes: float, progress: bool) -> dict:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    # Its threads are its own; XLA's flags of this process, for another XLA, are not for it.
    others = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "PJRT_DEVICE")}
    with (folder / "said").open("wb") as said:
        child = subprocess.Popen(
            [str(python), "-m", "companion.preflight_child", str(folder)],
            stdout=said,
            stderr=said,
            stdin=subprocess.PIPE,  # which it waits for the end of, to go with this process
            env={**others, "PYTHONPATH": path},
            start_new_session=True,
        )
    start, weighed, most = time.monotonic(), 0.0, 0
    bar = tqdm(total=None, bar_format="{desc} {elapsed}", leave=False, disable=not progress)
    try:
        while child.poll() is None:
            if time.monotonic() - weighed > WEIGH_SECONDS:
                most, weighed = max(most, host.memory_bytes(child.pid)), time.monotonic()
            if most > limit_bytes:
                raise PreflightError(f"compiling took more than {limit_bytes / 2**30:.1f} GiB of memory")
            if time.monotonic() - start > limit_seconds:
                raise PreflightError(
                    f"compiling took more than {limit_seconds:g} s; it had come so far: {_stage(folder)}"
                )
            bar.set_description_str(f"the compiler {_stage(folder)}", refresh=True)
            time.sleep(LOOK_SECONDS)
    finally:
        bar.close()
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.stdin.close()
        child.wait()
    if not (folder / "answer.json").exists():
        raise PreflightError(_death(child.returncode, folder))
    answer = json.loads((folder / "answer.json").read_text(encoding="utf-8"))
    texts = sorted(folder.glob("dump/*after_optimizations.txt"), key=lambda path: path.stat().st_size)
    if texts:
        answer["program"] = texts[-1].read_text(encoding="utf-8")
    return answer | {"memory_bytes": most, "seconds": time.monotonic() - start}


def _stage(folder: Path) -> str:
    path = folder / "stage"
    return path.read_text(encoding="utf-8") if path.exists() else "starts"


def _death(code: int, folder: Path) -> str:
    """How a child ended that gave no answer."""
    lines = (folder / "said").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
    return f"the compiler {how} while it {_stage(folder)}: {lines[-1] if lines else 'it said nothing'}"


def versions() -> dict[str, str]:
    """Of the packages in the compiler's environment; part of what a kept answer depends on."""
    found = {}
    for folder in sorted(interpreter().parents[1].glob("lib/python3*/site-packages")):
        for package in (*NEEDED, "torch"):
            for about in folder.glob(f"{package}-*.dist-info"):
                found[package] = about.name.removeprefix(f"{package}-").removesuffix(".dist-info")
    return found
