"""Files from which a training goes on: plain dictionaries of tensors and settings, replaced in one move, read
without trust.
"""

import os
import pickle
import zipfile
import zlib
from pathlib import Path

import torch


def save(path: Path, contents: dict[str, object]) -> None:
    """Replaces the file in one move, so that a process killed meanwhile leaves the previous one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        _write(contents, partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _write(contents: dict[str, object], path: Path) -> None:
    """With a checksum of each part, whatever the process has set: `load` relies on them."""
    wanted = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)
    try:
        torch.save(contents, path)
    finally:
        torch.serialization.set_crc32_options(wanted)


def _damaged(path: Path) -> str | None:
    """What is wrong with the file, by the checksums of its parts, which torch does not look at; or None."""
    try:
        with zipfile.ZipFile(path) as file:
            part = file.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, ValueError) as error:
        return type(error).__name__
    return f"checksum of {part}" if part else None


def load(path: Path, must_agree: dict[str, object] | None = None) -> dict[str, object] | None:
    """What `save` wrote, on the CPU; None if there is no file.

    Its entry "settings" must agree with `must_agree`. Raises RuntimeError for a file that is damaged or has
    other settings, ValueError for a place that cannot be written to, before a training has begun for nothing.
    """
    existing = next(folder for folder in path.absolute().parents if folder.exists())
    if path.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(
            f"checkpoint {path} cannot be written: name a file in a folder that you may write to"
        )
    if not path.exists():
        return None
    if reason := _damaged(path):
        raise RuntimeError(f"checkpoint {path} is damaged ({reason}): delete it to start again")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise RuntimeError(
            f"checkpoint {path} is damaged ({type(error).__name__}): delete it to start again"
        ) from error
    if not isinstance(saved, dict) or "settings" not in saved:
        raise RuntimeError(
            f"checkpoint {path} was not written by this training: name another file, or delete it"
        )
    differences = [
        f"{name}={saved['settings'].get(name)!r} then, {value!r} now"
        for name, value in (must_agree or {}).items()
        if saved["settings"].get(name) != value
    ]
    if differences:
        raise RuntimeError(
            f"checkpoint {path} is of another recipe ({'; '.join(differences)}): name another file or "
            f"delete it"
        )
    return saved
