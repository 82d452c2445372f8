"""Runs that a file describes: notebooks, their parameters, and what is swept.

- notebooks: ["03", "04"]
  parameters: {epochs: 2}
  sweep: {batch_size: [64, 256]}
- notebooks: "08"
"""

from pathlib import Path

from companion import jobs
from companion.jobs import Job

KEYS = {"notebooks", "parameters", "sweep"}


def read(path: Path, folder: Path = jobs.NOTEBOOKS) -> list[Job]:
    """The jobs that a YAML file describes, all checked; `folder` has the notebooks.

    Raises ValueError, naming file and entry, for what is no such description; OSError for a file that cannot
    be read.
    """
    import yaml

    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path} must be a list of entries, each with 'notebooks'")
    wanted, taken = [], set()
    for number, entry in enumerate(entries, 1):
        try:
            wanted += _of_entry(entry, folder, taken)
        except ValueError as error:
            raise ValueError(f"{path}, entry {number}: {error}") from error
    return wanted


def _of_entry(entry: object, folder: Path, taken: set[str]) -> list[Job]:
    if not isinstance(entry, dict) or "notebooks" not in entry:
        raise ValueError(f"{entry!r} has no 'notebooks'")
    if unknown := set(entry) - KEYS:
        raise ValueError(f"{', '.join(sorted(unknown))} is unknown; use {', '.join(sorted(KEYS))}")
    named = entry["notebooks"] if isinstance(entry["notebooks"], list) else [entry["notebooks"]]
    # YAML takes 03 for a number.
    names = [f"{name:02}" if isinstance(name, int) else str(name) for name in named]
    fixed, swept = entry.get("parameters") or {}, entry.get("sweep") or {}
    for kind, values in (("parameters", fixed), ("sweep", swept)):
        if not isinstance(values, dict):
            raise ValueError(f"{kind} must be names with values, not {values!r}")
    if both := sorted(set(fixed) & set(swept)):
        raise ValueError(f"{both[0]} is fixed and swept: which of them?")
    for name, values in swept.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"{name} in sweep must be a list of values, not {values!r}")
        if len({_text(value) for value in values}) < len(values):
            raise ValueError(f"{name} in sweep has a value twice: {values!r}")
    texts = {name: _text(value) for name, value in fixed.items()}
    lists = {name: [_text(value) for value in values] for name, values in swept.items()}
    return jobs.plan(jobs.find(names, folder), texts, lists, taken)


def _text(value: object) -> str:
    """A value as the command line would have it."""
    return value if isinstance(value, str) else repr(value)
