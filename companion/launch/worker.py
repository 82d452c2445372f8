"""What runs in a rank: `main` calls the function, and reports to the launching process.

`protocol` has the map.
"""

import faulthandler
import io
import linecache
import multiprocessing
import os
import random
import re
import signal
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from companion import devices
from companion.launch import pickling
from companion.launch.protocol import Order, Report

# Of a pickled result; a larger one is refused before it fills the memory three times over.
RESULT_BYTES = 2**30
# What is said where a DataLoader's worker should have a cell's class or function.
_OF_A_CELL = re.compile(r"pickle.*(on __main__|local object|local function)|DataLoader worker.* exited")
_ADVICE = (
    " (a DataLoader's workers that are started by spawn or forkserver cannot have what a cell defines: put "
    "it in a file and import it, or use num_workers=0 or multiprocessing_context='fork')"
)
# What a rank says when another one has gone, or has not come.
_ECHO = re.compile(
    r"closed by peer|reset by peer|Broken pipe|Timed out waiting|timed out|timeout", re.IGNORECASE
)
_LIBRARY = (str(Path(torch.__file__).parent), sysconfig.get_path("stdlib"), __file__, "<frozen")


def main(control, out, err, payload, cells, variables, start_method, backend, timeout_seconds) -> None:
    """Calls the packed function and reports through the pipe `control`; then waits until all ranks may leave,
    or is killed.
    """
    os.setsid()  # out of reach of Ctrl-C, which is the launching process's to handle; and one group to kill
    # For a DataLoader's workers: as in the launching process.
    multiprocessing.set_start_method(start_method, force=True)
    os.environ.clear()
    os.environ.update(variables)
    for descriptor, pipe in ((1, out), (2, err)):
        os.dup2(pipe.fileno(), descriptor)
        pipe.close()
    text = {"buffering": 1, "encoding": "utf-8", "errors": "backslashreplace", "closefd": False}
    sys.stdout, sys.stderr = open(1, "w", **text), open(2, "w", **text)  # noqa: SIM115 (for as long as the process lives)
    faulthandler.enable(all_threads=False)  # a crash of native code prints its Python line
    linecache.cache.update({name: (1, None, lines, name) for name, (_, lines) in cells.items()})
    lock, leave, rank = threading.Lock(), threading.Event(), int(variables["RANK"])

    def send(*message) -> None:
        with lock:
            control.send(message)

    def obey() -> None:
        try:
            while control.recv() is not Order.LEAVE:
                frames = traceback.extract_stack(sys._current_frames()[threading.main_thread().ident])
                send(Report.PLACE, _place(frames, cells))
            leave.set()
        except (EOFError, OSError):  # the launching process is gone
            os.killpg(0, signal.SIGKILL)

    threading.Thread(target=obey, daemon=True).start()
    _relay_bars(send, rank)
    random.seed()  # or all ranks, in all launches, would draw the numbers of the server they come from
    np.random.seed()
    try:
        torch.set_num_threads(int(variables["OMP_NUM_THREADS"]))
        if variables["COMPANION_DEVICE"].startswith("cuda"):
            torch.cuda.set_device(variables["COMPANION_DEVICE"])
            devices.set_exact(variables["COMPANION_EXACT"] == str(True))
            # The thread of backward passes has no context of its own yet, of which cuBLAS would warn.
            torch.ones(1, device=variables["COMPANION_DEVICE"], requires_grad=True).exp().sum().backward()
        if backend:
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))
        function, args = map(pickling.unpack, payload)
        send(Report.RETURNED, pickling.pack(function(*args), f"the result of rank {rank}", RESULT_BYTES))
    except BaseException as error:  # whatever it is, it is told; SystemExit too
        send(Report.FAILED, time.time(), *_explain(error, cells))
    leave.wait()
    if dist.is_initialized():
        dist.destroy_process_group()


def _explain(error: BaseException, cells: dict) -> tuple[str, str, str, bool]:
    """The error in a line, its traceback below this module, the place in the user's code, and whether it may
    be an echo.
    """
    trace = error.__traceback__
    while trace.tb_next and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    text = "".join(traceback.format_exception(type(error), error, trace))
    for filename, (name, _) in cells.items():
        text = text.replace(f'File "{filename}"', name)
    what = reason(error)
    return what, text, _place(traceback.extract_tb(trace), cells), bool(_ECHO.search(what))


def reason(error: BaseException) -> str:
    """The error in a line, with its notes."""
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", []))
    what = f"{type(error).__name__}: {_said(error)}".rstrip(": ") + notes
    return what + (_ADVICE if _OF_A_CELL.search(what) else "")


def _said(error: BaseException) -> str:
    """The first line of the error's message that says something."""
    try:
        return next((line for line in str(error).splitlines() if line.strip()), "")
    except Exception as failure:
        return f"its message cannot be had, str() raises {type(failure).__name__}"


def _place(frames: traceback.StackSummary, cells: dict) -> str:
    """The innermost line that is not of torch, Python or this module."""
    frame = ([frame for frame in frames if not frame.filename.startswith(_LIBRARY)] or frames)[-1]
    name = cells[frame.filename][0] if frame.filename in cells else f'File "{frame.filename}"'
    return f"{name}, line {frame.lineno}, in {frame.name}: {frame.line}"


def _relay_bars(send: Callable, rank: int) -> None:
    """Makes tqdm's bars appear in the launching process, where there is a screen or a notebook; those of rank
    0 only.
    """
    from tqdm import notebook, std

    bar, start, close = std.tqdm, std.tqdm.__init__, std.tqdm.close

    def silent(self, *args, **options):
        start(
            self,
            *args,
            **(options | {"file": io.StringIO(), "disable": rank > 0 or options.get("disable", False)}),
        )

    def display(self, msg=None, pos=None):
        about = {name: getattr(self, name) for name in ("n", "total", "desc", "unit", "leave", "postfix")}
        send(Report.BAR, id(self), about)

    def closing(self):
        shown = not self.disable
        close(self)  # which displays it a last time
        if shown:
            send(Report.BAR, id(self), None)

    bar.__init__, bar.display, bar.close = silent, display, closing
    notebook.tqdm = notebook.tqdm_notebook = bar  # what a function of a notebook's cell means by tqdm
