"""Temporary folders that go with the process that made them, however it ends."""

import multiprocessing
import subprocess
import sys
import tempfile
from multiprocessing import util
from pathlib import Path

# Waits for the end of its input, which is the end of this process, killed or not; then removes a folder.
_AFTERWARDS = "import shutil, sys; sys.stdin.read(); shutil.rmtree(sys.argv[1], ignore_errors=True)"
_watched: dict[str, subprocess.Popen] = {}


def folder() -> Path:
    """A new, empty folder, which is removed when this process ends, also when it is killed.

    In a worker process of `multiprocessing` it goes with the process that started the worker.
    """
    return Path(tempfile.mkdtemp(dir=own()))


def own() -> str:
    """The folder in which multiprocessing has its sockets, watched from now on: multiprocessing removes it
    after an orderly end only.
    """
    place = util.get_temp_dir()
    if place not in _watched and multiprocessing.parent_process() is None:
        # In a session of its own: Ctrl-C is not for it.
        command = [sys.executable, "-I", "-S", "-c", _AFTERWARDS, place]
        _watched[place] = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        # After multiprocessing has removed the folder by itself, whose finalizer has priority -100.
        util.Finalize(None, _ended, args=(_watched[place],), exitpriority=-200)
    return place


def _ended(watcher: subprocess.Popen) -> None:
    """At an orderly end: the watcher does its work, and is waited for."""
    watcher.stdin.close()
    watcher.wait()
