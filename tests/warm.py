"""Runs a notebook's cells without a kernel, in a process forked from a server that has imported what they
import: most slices of a notebook that tests run take less time than a kernel's start.

The server is this file as a program. It reads orders from its input and writes answers, JSON in a line each.
"""

import atexit
import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import nbformat
import psutil
from cells import code

IMPORTED = ("torch", "torch._dynamo", "torchvision", "sklearn.datasets", "sklearn.model_selection")
IMPORTED += ("matplotlib.pyplot", "pandas", "IPython.core.interactiveshell", "companion.host")
LIMIT_SECONDS = 600


@dataclass(frozen=True)
class Run:
    """What came of it: the position of the cell that failed and its error in a line, or None twice."""

    failed: int | None
    error: str | None
    seconds: float
    cpu_seconds: float


class Server:
    """The process that is forked for each run."""

    def __init__(self):
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, notebook: nbformat.NotebookNode, folder: Path) -> Run:
        """Runs the code cells in `folder`, up to the first that fails; what they write is in `written`."""
        order = {"cells": [cell.source for cell in code(notebook)], "folder": str(folder)}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        in_time, _, _ = select.select([self._process.stdout], [], [], LIMIT_SECONDS)
        answer = json.loads(self._process.stdout.readline() or "null") if in_time else self._kill()
        if answer is None:
            written = folder / "written"
            last = written.read_text()[-2000:] if written.exists() else "it has written nothing"
            raise RuntimeError(f"the run gave no answer:\n{last}")
        return Run(**answer)

    def _kill(self) -> None:
        server = psutil.Process(self._process.pid)
        for process in [*server.children(recursive=True), server]:
            process.kill()

    def stop(self) -> None:
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()


def serve() -> None:
    for module in IMPORTED:
        __import__(module)
    for line in sys.stdin:
        order = json.loads(line)
        answer = Path(order["folder"], "answer")
        if not (child := os.fork()):
            _run(order["cells"], order["folder"], answer)
        os.waitpid(child, 0)
        _end_group(child)
        print(answer.read_text() if answer.exists() else "null", flush=True)


def _run(cells: list[str], folder: str, answer: Path) -> None:
    """In the forked process, which ends here: runs the cells and writes the answer."""
    os.setsid()  # what is left over afterwards can be ended by its group
    os.chdir(folder)
    for descriptor, flags in ((0, os.O_RDONLY), (1, os.O_WRONLY), (2, os.O_WRONLY)):
        path = "written" if descriptor else os.devnull
        os.dup2(os.open(path, flags | (os.O_CREAT | os.O_APPEND if descriptor else 0)), descriptor)
    try:
        answer.write_text(json.dumps(_ran(cells)))
        atexit._run_exitfuncs()
    except BaseException:  # whatever it is, this process must not go on as the server
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(0)


def _ran(cells: list[str]) -> dict:
    import matplotlib
    from IPython.core.interactiveshell import InteractiveShell

    from companion import host

    matplotlib.use("agg")
    shell, start = InteractiveShell.instance(), time.perf_counter()
    failed = error = None
    for number, source in enumerate(cells):
        found = shell.run_cell(source)
        if not found.success:
            failure = found.error_before_exec or found.error_in_exec
            failed, error = number, f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]}"
            break
    taken = {"seconds": time.perf_counter() - start, "cpu_seconds": host.cpu_seconds(os.getpid())}
    return {"failed": failed, "error": error, **taken}


def _end_group(leader: int) -> None:
    """Ends what a run has left running."""
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        return


if __name__ == "__main__":
    serve()
