"""A result is computed where it can be; elsewhere the stored one is shown, and labelled."""

import json
import re

import nbformat
import pytest
from conftest import ROOT

from companion import stored


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setattr(stored, "FOLDER", tmp_path)
    return tmp_path


def test_a_result_is_kept_only_when_asked_for(folder, monkeypatch, capsys):
    assert stored.result("01", "sum", lambda: {"a": (1, 2)}, None) == {"a": [1, 2]}, (
        "as JSON will give it back"
    )
    assert not list(folder.iterdir())
    monkeypatch.setenv(stored.KEEP, "1")
    stored.result("01", "sum", lambda: 3, None)
    stored.result("01", "order", lambda: {"b": 4, "a": 5}, None)
    assert capsys.readouterr().out == ""
    monkeypatch.delenv(stored.KEEP)

    def impossible():
        raise AssertionError("it must not be called")

    assert stored.result("01", "sum", impossible, "no TPU") == 3
    assert list(stored.result("01", "order", impossible, "no TPU")) == ["b", "a"], (
        "in the order that figures will show"
    )
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2, "a line for each result"
    assert said[0].startswith("not run here: no TPU. STORED result of 20")
    assert "torch " in said[0]


def test_what_was_never_stored_is_an_error(folder):
    with pytest.raises(
        LookupError, match=r"'sum' of 01 cannot run here \(no TPU\) and no result of it is stored"
    ):
        stored.result("01", "sum", lambda: 3, "no TPU")


def test_values_that_json_cannot_hold_are_refused(folder):
    with pytest.raises(ValueError, match="not JSON compliant"):
        stored.result("01", "sum", lambda: float("nan"), None)


@pytest.mark.parametrize("path", sorted(stored.FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_stored_results_belong_to_their_notebook(path):
    notebook = nbformat.read(ROOT / "notebooks" / f"{path.stem}.ipynb", 4)
    kept, source = json.loads(path.read_text()), "".join(cell.source for cell in notebook.cells)
    assert kept
    for name, entry in kept.items():
        asked = re.search(f"(?:here|compiler)\\([\"']{name}[\"'], ", source)
        assert asked, f"no cell of {path.stem} asks for {name!r}: delete it"
        assert entry["versions"] == notebook.metadata.companion.environment.versions, (
            f"{name!r} is older than the outputs"
        )
