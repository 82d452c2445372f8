import signal
import sys
import threading
from pathlib import Path

import pytest
import torch

from companion import data

if threading.current_thread() is threading.main_thread():
    # A shell's background jobs ignore Ctrl-C, and so would what the tests start, some of it to interrupt it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parents[1]
pytest_plugins = ("times",)


@pytest.fixture
def root(monkeypatch) -> Path:
    """The project's folder, as the working directory."""
    monkeypatch.chdir(ROOT)
    return ROOT


@pytest.fixture(scope="session")
def digits() -> data.Splits:
    return data.load("digits")


@pytest.fixture(autouse=True)
def _same_threads():
    """Each test starts with one thread: results that must be equal bit for bit depend on their number."""
    torch.set_num_threads(1)


@pytest.fixture
def python() -> list[str]:
    return [sys.executable]
