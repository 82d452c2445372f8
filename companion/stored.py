"""Results kept with the package: measured where the real thing runs; shown, labelled, where it cannot."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from companion import machine

FOLDER = Path(__file__).parent / "stored-results"  # a hyphen, so that it is no package
# the environment variable under which `companion store` has results written here
KEEP = "COMPANION_KEEP_RESULTS"


def result(notebook: str, name: str, compute: Callable[[], object], without: str | None):
    """`compute()`, whose value JSON can hold; or, if `without` gives a reason why that is impossible here,
    the stored one.

    A stored result is announced in a line that says why, when and on what it was measured, at the notebook's
    defaults. Raises LookupError if none was stored.
    """
    path = FOLDER / f"{notebook}.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    if without is None:
        # What a reader of the stored one would see.
        value = json.loads(json.dumps(compute(), allow_nan=False))
        if os.environ.get(KEEP):
            environment = machine.environment()
            about = {
                "date": time.strftime("%Y-%m-%d"),
                "cpu": environment["cpu"],
                "versions": environment["versions"],
            }
            text = json.dumps({**kept, name: {**about, "value": value}}, indent=1)
            path.write_text(text + "\n")
        return value
    if name not in kept:
        raise LookupError(f"{name!r} of {notebook} cannot run here ({without}) and no result of it is stored")
    about = kept[name]
    versions = ", ".join(
        f"{what} {number}" for what, number in about["versions"].items() if number != "not installed"
    )
    print(f"not run here: {without}. STORED result of {about['date']}, {about['cpu']}, {versions}")
    return about["value"]
