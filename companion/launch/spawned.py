"""What workers of torch's own `torch.multiprocessing.spawn` need in a notebook."""

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from companion import scratch


def end_with_parent() -> None:
    """Ends this process when the one that started it has gone; does nothing in one that nobody started.

    Ranks of `launch.run` do so anyway. In a file whose functions `mp.spawn` runs this belongs at the top: a
    worker that waits for others would wait on, with its memory, for half an hour after its notebook was
    killed.
    """
    if multiprocessing.current_process().name == "MainProcess":
        return

    def watch() -> None:
        while not (parent := multiprocessing.parent_process()):  # while the file is still being imported
            time.sleep(0.05)
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def overheard() -> Iterator[list[str]]:
    """Keeps from the terminal what processes started inside write there; afterwards it is in the list, line
    by line.
    """
    lines: list[str] = []
    path = scratch.folder() / "written"
    target = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    sys.stdout.flush(), sys.stderr.flush()
    kept = [(descriptor, os.dup(descriptor)) for descriptor in (1, 2)]
    try:
        for descriptor, _ in kept:
            os.dup2(target, descriptor)
        yield lines
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        for descriptor, copy in kept:
            os.dup2(copy, descriptor)
            os.close(copy)
        os.close(target)
        lines += path.read_text(errors="replace").splitlines()
        path.unlink()
        path.parent.rmdir()
