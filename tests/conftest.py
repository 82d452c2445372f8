import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from companion import data, models, training

if threading.current_thread() is threading.main_thread():
    # A shell's background jobs ignore Ctrl-C, and so would what the tests start, some of it to interrupt it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parents[1]
pytest_plugins = ("times",)


def torchrun(module: str, flags: str, ranks: int = 2) -> str:
    """What a module of the package prints in ranks that torchrun starts, from the project's folder."""
    command = f"-m torch.distributed.run --standalone --local-addr=127.0.0.1 --nproc-per-node={ranks}"
    done = subprocess.run(
        [sys.executable, *command.split(), "-m", module, *flags.split()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def root(monkeypatch) -> Path:
    """The project's folder, as the working directory."""
    monkeypatch.chdir(ROOT)
    return ROOT


@pytest.fixture(scope="session")
def digits() -> data.Splits:
    return data.load("digits")


@pytest.fixture(scope="session")
def trained_lenet(digits) -> torch.nn.Module:
    """LeNet5 that reads digits, in eval mode; nobody may change it."""
    torch.set_num_threads(1)  # made before a test's own fixtures; other threads would give other weights
    training.seed_everything(0)
    model = models.LeNet5()
    recipe = training.Recipe(epochs=12, batch_size=64, learning_rate=8e-3)
    training.fit(model, digits, recipe, device="cpu", validate=False, progress=False)
    return model.eval()


@pytest.fixture(autouse=True)
def _same_threads():
    """Each test starts with one thread: results that must be equal bit for bit depend on their number."""
    torch.set_num_threads(1)


@pytest.fixture
def python() -> list[str]:
    return [sys.executable]
