"""Parameters of a notebook, checked before work starts. Errors name parameter, value and rule."""

import math
import os
from collections.abc import Sequence
from pathlib import Path


def number(
    name: str,
    value: float,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
) -> None:
    """Raises ValueError unless the value is a finite number, `least` or more, greater than `above`, and
    `most` or less.
    """
    rules = [
        (f"{least:g} or more" if least is not None else "", least is None or value >= least),
        (f"greater than {above:g}" if above is not None else "", above is None or value > above),
        (f"{most:g} or less" if most is not None else "", most is None or value <= most),
    ]
    if isinstance(value, bool) or not math.isfinite(value) or not all(holds for _, holds in rules):
        raise ValueError(f"{name}={value!r} must be a number, {', '.join(text for text, _ in rules if text)}")


def whole(name: str, value: int, least: int = 1, most: int | None = None) -> None:
    """Raises ValueError unless the value is a whole number from `least` to `most`."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be a whole number")
    number(name, value, least=least, most=most)


def choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raises ValueError unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; use one of {', '.join(map(repr, choices))}")


def whole_numbers(name: str, text: str, least: int = 1, most: int | None = None) -> list[int]:
    """The whole numbers of a list in text, such as "8,64,512", each from `least` to `most`.

    Raises ValueError for text that is no such list, or an empty one.
    """
    parts = [part.strip() for part in str(text).split(",")]
    try:
        found = [int(part) for part in parts]
    except ValueError:
        raise ValueError(f"{name}={text!r} must be whole numbers with commas between, like '8,64'") from None
    for value in found:
        whole(name, value, least, most)
    return found


def folder(name: str, path: str | Path) -> Path:
    """The folder, made if need be. Raises ValueError if it cannot be made or written to."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{name}={str(path)!r} cannot be made: {error.strerror}") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise ValueError(f"{name}={str(path)!r} cannot be written to")
    return path
