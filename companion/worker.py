"""One worker process: `Rank` is what the launching process sees of it, `main` what runs in it; pipes are between them."""

import faulthandler
import io
import linecache
import multiprocessing
import os
import re
import signal
import sys
import sysconfig
import threading
import time
import traceback
import types
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch
import torch.distributed as dist

from companion import pickling

RESULT_BYTES = 2**30  # of a pickled result; a larger one is refused before it fills the memory three times over
_CHATTER = re.compile(r"\[Gloo\] Rank \d+ is connected to")  # what gloo prints whenever a group is made
# What a rank says when another one has gone, or has not come.
_ECHO = re.compile(r"closed by peer|reset by peer|Broken pipe|Timed out waiting|timed out|timeout", re.IGNORECASE)
_LIBRARY = (str(Path(torch.__file__).parent), sysconfig.get_path("stdlib"), __file__, "<frozen")


@dataclass
class Failure:
    seconds: float  # since the epoch
    reason: str
    details: str = ""
    place: str = ""
    echo: bool = False  # may be but the consequence of another rank's


class Rank:
    """One worker process, as seen from the launching one."""

    def __init__(self, number: int):
        self.number, self.process, self.pipes, self.state, self.place = number, None, [], "running", ""
        self.failure: Failure | None = None
        self.result: bytes | None = None
        self.rest, self.bars = {}, {}

    def start(self, context, payload: tuple[bytes, bytes], *about: object) -> None:
        pairs = [context.Pipe(), context.Pipe(False), context.Pipe(False)]
        self.pipes, theirs = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        self.control, self.rest = self.pipes[0], {self.pipes[1]: b"", self.pipes[2]: b""}
        self.process = context.Process(target=main, args=(*theirs, payload, *about))
        script = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")  # else each rank would import, and so run, a script again
        try:
            self.process.start()
        finally:
            sys.modules["__main__"] = script
            for pipe in theirs:
                pipe.close()

    def sources(self) -> list:
        return [*self.pipes, *([self.process.sentinel] if self.state != "ended" else [])]

    def hear(self, source: Connection | int) -> None:
        """Takes what has come from one of `sources`."""
        if source == self.control:
            try:
                self._obey(*source.recv())
            except (EOFError, OSError):
                self._close(source)
        elif source in self.pipes:
            if data := os.read(source.fileno(), 1 << 16):
                *lines, self.rest[source] = (self.rest[source] + data).split(b"\n")
                self._print(source, lines)
            else:
                self._close(source)
        else:
            self._ended()

    def _close(self, pipe: Connection) -> None:
        self.pipes.remove(pipe)
        pipe.close()

    def _ended(self) -> None:
        while ready := wait(self.pipes, 0):  # first what it still had to say
            for pipe in ready:
                self.hear(pipe)
        self.process.join()
        code, state, self.state = self.process.exitcode, self.state, "ended"
        if state == "leaving" and code:
            warnings.warn(f"rank {self.number} returned, and then ended with exit code {code}", stacklevel=2)
        elif state != "leaving" and not self.failure:
            reason = f"killed by {signal.Signals(-code).name}" if code < 0 else f"its process ended with exit code {code}"
            hint = " (the system's way of ending a process when memory runs out)" if code == -signal.SIGKILL else ""
            self.failure = Failure(time.time(), reason + hint)

    def _obey(self, kind: str, *details) -> None:
        if kind == "returned":
            self.state, self.result = "returned", details[0]
        elif kind == "failed":
            self.failure = Failure(*details)
        elif kind == "place":
            self.place = details[0]
        else:
            self._draw(*details)

    def _draw(self, key: int, about: dict | None) -> None:
        """Shows a bar of the worker's, or takes it away."""
        from tqdm.auto import tqdm

        if about is None:
            if key in self.bars:  # not if it was closed before it was ever shown
                self.bars.pop(key).close()
            return
        if key not in self.bars:
            self.bars[key] = tqdm(**{name: about[name] for name in ("total", "desc", "unit", "leave")})
        bar = self.bars[key]
        bar.n, bar.total, bar.desc = about["n"], about["total"], about["desc"]
        bar.set_postfix_str(about["postfix"] or "", refresh=False)
        bar.refresh()

    def _print(self, pipe: Connection, lines: list[bytes]) -> None:
        stream = sys.stdout if pipe is next(iter(self.rest)) else sys.stderr
        for line in (line.decode(errors="backslashreplace").rsplit("\r", 1)[-1] for line in lines):
            if not _CHATTER.match(line):
                print(f"[rank {self.number}] {line}", file=stream, flush=True)

    def tell(self, order: str) -> None:
        with suppress(OSError):  # it may have gone
            self.control.send(order)

    def leave(self) -> None:
        self.state = "leaving" if self.state != "ended" else self.state
        self.tell("leave")

    def whereabouts(self) -> str:
        if self.failure:
            return f"failed too: {self.failure.reason}" + (f", at {self.failure.place}" if self.failure.place else "")
        if self.result is not None:
            return "had returned"
        return f"was at {self.place}" if self.place else "gave no answer"

    def end(self) -> None:
        """Leaves nothing of the rank behind, in whatever state it is, nor of what it started."""
        if self.process and self.process.pid:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.kill()
            if self.state != "ended":
                self.state = "leaving"
                self.process.join()
        for pipe, rest in self.rest.items():
            self._print(pipe, [rest] if rest else [])
        for thing in (*self.bars.values(), *self.pipes):
            thing.close()


def main(control, out, err, payload, cells, variables, start_method, backend, timeout_seconds) -> None:
    """Calls the packed function and reports through the pipe `control`; then waits until all ranks may leave, or is killed."""
    os.setsid()  # out of reach of Ctrl-C, which is the launching process's to handle; and one group to kill
    multiprocessing.set_start_method(start_method, force=True)  # for a DataLoader's workers: as in the launching process
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
            while control.recv() != "leave":
                frames = traceback.extract_stack(sys._current_frames()[threading.main_thread().ident])
                send("place", _place(frames, cells))
            leave.set()
        except (EOFError, OSError):  # the launching process is gone
            os.killpg(0, signal.SIGKILL)

    threading.Thread(target=obey, daemon=True).start()
    _relay_bars(send, rank)
    try:
        torch.set_num_threads(int(variables["OMP_NUM_THREADS"]))
        if variables["COMPANION_DEVICE"].startswith("cuda"):
            torch.cuda.set_device(variables["COMPANION_DEVICE"])
        if backend:
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))
        function, args = map(pickling.unpack, payload)
        send("returned", pickling.pack(function(*args), f"the result of rank {rank}", RESULT_BYTES))
    except BaseException as error:  # whatever it is, it is told; SystemExit too
        send("failed", time.time(), *_explain(error, cells))
    leave.wait()
    if dist.is_initialized():
        dist.destroy_process_group()


def _explain(error: BaseException, cells: dict) -> tuple[str, str, str, bool]:
    """The error in a line, its traceback below this module, the place in the user's code, and whether it may be an echo."""
    trace = error.__traceback__
    while trace.tb_next and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    text = "".join(traceback.format_exception(type(error), error, trace))
    for filename, (name, _) in cells.items():
        text = text.replace(f'File "{filename}"', name)
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", []))
    reason = f"{type(error).__name__}: {error}".splitlines()[0] + notes
    return reason, text, _place(traceback.extract_tb(trace), cells), bool(_ECHO.search(reason))


def _place(frames: traceback.StackSummary, cells: dict) -> str:
    """The innermost line that is not of torch, Python or this module."""
    frame = ([frame for frame in frames if not frame.filename.startswith(_LIBRARY)] or frames)[-1]
    name = cells[frame.filename][0] if frame.filename in cells else f'File "{frame.filename}"'
    return f"{name}, line {frame.lineno}, in {frame.name}: {frame.line}"


def _relay_bars(send: Callable, rank: int) -> None:
    """Makes tqdm's bars appear in the launching process, where there is a screen or a notebook; those of rank 0 only."""
    from tqdm import notebook, std

    bar, start, close = std.tqdm, std.tqdm.__init__, std.tqdm.close

    def silent(self, *args, **options):
        start(self, *args, **(options | {"file": io.StringIO(), "disable": rank > 0 or options.get("disable", False)}))

    def display(self, msg=None, pos=None):
        about = {name: getattr(self, name) for name in ("n", "total", "desc", "unit", "leave", "postfix")}
        send("bar", id(self), about)

    def closing(self):
        shown = not self.disable
        close(self)  # which displays it a last time
        if shown:
            send("bar", id(self), None)

    bar.__init__, bar.display, bar.close = silent, display, closing
    notebook.tqdm = notebook.tqdm_notebook = bar  # what a function of a notebook's cell means by tqdm
