"""The project's address stands in one place, and everywhere the same."""

import re
import shutil

import nbformat
import pytest
from conftest import ROOT

from companion import __main__ as cli
from companion import executed, links

ADDRESS = re.compile(r"github(?:\.com)?/(?:github/|gh/)?([\w-]+/accelerating-pytorch)")
pytestmark = pytest.mark.once


@pytest.fixture
def copy(tmp_path):
    for pattern in links.FILES:
        for path in ROOT.glob(pattern):
            target = tmp_path / path.relative_to(ROOT)
            target.parent.mkdir(exist_ok=True)
            shutil.copy(path, target)
    return tmp_path


def addresses(root) -> dict[str, set[str]]:
    """By file, the repositories of this name that it links to."""
    paths = [path for pattern in links.FILES for path in root.glob(pattern)]
    found = {path.name: set(ADDRESS.findall(path.read_text())) for path in paths}
    return {name: repositories for name, repositories in found.items() if repositories}


def test_all_files_have_the_address_of_pyproject():
    found = addresses(ROOT)
    assert {repository for repositories in found.values() for repository in repositories} == {
        links.current(ROOT)
    }
    assert {path.name for path in ROOT.glob("notebooks/*.ipynb")} <= set(found)


def test_another_address_is_written_everywhere(copy):
    before = len(addresses(copy))
    changed = links.rewrite(copy, "someone/speed")
    assert links.current(copy) == "someone/speed"
    assert len(changed) == before
    left = [path for pattern in links.FILES for path in copy.glob(pattern)]
    assert not [path for path in left if links.current(ROOT) in path.read_text()]


def test_stored_outputs_stay_those_of_their_code(copy):
    path = copy / "notebooks" / "03_ddp.ipynb"
    before = nbformat.read(path, 4)
    links.rewrite(copy, "someone/speed")
    after = nbformat.read(path, 4)
    stored = {name: each.metadata.companion.source_sha256 for name, each in (("b", before), ("a", after))}
    fresh = stored["b"] == executed.source_hash(before)
    assert (stored["a"] == executed.source_hash(after)) == fresh
    assert [cell.get("outputs") for cell in after.cells] == [cell.get("outputs") for cell in before.cells]


def test_the_same_address_changes_nothing(copy):
    assert links.rewrite(copy, links.current(copy)) == []


@pytest.mark.parametrize("wrong", ["", "owner", "owner/name/more", "ow ner/name", "https://github.com/a/b"])
def test_what_is_no_repository_is_refused(copy, wrong):
    with pytest.raises(ValueError, match="is no repository: write owner/name"):
        links.rewrite(copy, wrong)


def test_the_command(copy, capfd, monkeypatch):
    monkeypatch.chdir(copy)
    assert cli.main(["links", "someone/speed"]) == 0
    assert "now say someone/speed" in capfd.readouterr().out
    assert cli.main(["links", "nonsense"]) == 2
    assert "error: 'nonsense' is no repository" in capfd.readouterr().err
