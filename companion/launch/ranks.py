"""A rank as the launching process sees it: started, heard, told, and ended. `protocol` has the map."""

import os
import re
import signal
import sys
import threading
import time
import types
import warnings
from contextlib import suppress
from multiprocessing.connection import Connection, wait

from companion.launch import worker
from companion.launch.protocol import Failure, Order, Report, State

_starting = threading.Lock()  # one at a time, since `start` puts another module in the place of __main__
_CHATTER = re.compile(r"\[Gloo\] Rank \d+ is connected to")  # what gloo prints whenever a group is made


class Rank:
    """One worker process, as seen from the launching one."""

    def __init__(self, number: int):
        self.number, self.process, self.pipes = number, None, []
        self.state, self.place = State.RUNNING, ""
        self.failure: Failure | None = None
        self.result: bytes | None = None
        self.rest, self.bars = {}, {}

    def start(self, context, payload: tuple[bytes, bytes], *about: object) -> None:
        pairs = [context.Pipe(), context.Pipe(False), context.Pipe(False)]
        self.pipes, theirs = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        self.control, self.rest = self.pipes[0], {self.pipes[1]: b"", self.pipes[2]: b""}
        self.process = context.Process(target=worker.main, args=(*theirs, payload, *about))
        try:
            with _starting:
                script = sys.modules["__main__"]
                # Else each rank would import, and so run, a script again.
                sys.modules["__main__"] = types.ModuleType("__main__")
                try:
                    self.process.start()
                finally:
                    sys.modules["__main__"] = script
        finally:
            for pipe in theirs:
                pipe.close()

    def sources(self) -> list:
        return [*self.pipes, *([self.process.sentinel] if self.state is not State.ENDED else [])]

    def hear(self, source: Connection | int) -> None:
        """Takes what has come from one of `sources`."""
        if source == self.control:
            try:
                self._note(*source.recv())
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
        code, state, self.state = self.process.exitcode, self.state, State.ENDED
        if state is State.LEAVING and code:
            warnings.warn(f"rank {self.number} returned, and then ended with exit code {code}", stacklevel=2)
        elif state is not State.LEAVING and not self.failure:
            reason = (
                f"killed by {signal.Signals(-code).name}"
                if code < 0
                else f"its process ended with exit code {code}"
            )
            hint = (
                " (the system's way of ending a process when memory runs out)"
                if code == -signal.SIGKILL
                else ""
            )
            self.failure = Failure(time.time(), reason + hint)

    def _note(self, report: Report, *details) -> None:
        if report is Report.RETURNED:
            self.state, self.result = State.RETURNED, details[0]
        elif report is Report.FAILED:
            self.failure = Failure(*details)
        elif report is Report.PLACE:
            self.place = details[0]
        elif report is Report.BAR:
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

    def tell(self, order: Order) -> None:
        with suppress(OSError):  # it may have gone
            self.control.send(order)

    def leave(self) -> None:
        if self.state is not State.ENDED:
            self.state = State.LEAVING
        self.tell(Order.LEAVE)

    def whereabouts(self) -> str:
        if self.failure:
            return f"failed too: {self.failure.reason}" + (
                f", at {self.failure.place}" if self.failure.place else ""
            )
        if self.result is not None:
            return "had returned"
        return f"was at {self.place}" if self.place else "gave no answer"

    def end(self) -> None:
        """Leaves nothing of the rank behind, in whatever state it is, nor of what it started."""
        if self.process and self.process.pid:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.kill()
            if self.state is not State.ENDED:
                self.state = State.LEAVING
                self.process.join()
        for pipe, rest in self.rest.items():
            self._print(pipe, [rest] if rest else [])
        for thing in (*self.bars.values(), *self.pipes):
            thing.close()
