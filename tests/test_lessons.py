"""What the notebooks claim: absolute words are asserted, numbers come from code, links lead somewhere."""

import ast
import hashlib
import re

import cells
import nbformat
import pytest
from cells import NOTEBOOKS, ROOT

from companion import runner

ABSOLUTE = re.compile(r"\b(never|for ever|forever|at most|always|exactly)\b", re.IGNORECASE)
# Accepted where a cell asserts it: notebook -> words of the sentence, and a piece of the assertion.
BACKED = {
    "00_baseline": {"the vectorised batch must hold exactly one of them": "(matches == 1).all()"},
}
# What a sentence may not say of a machine that its reader does not have: it belongs into code.
MEASURED = re.compile(
    r"(?<![\w.])\d+(\.\d+)? ?(x(?! ?\d)|ms|us|GB/s|samples/s|images/s)(?!\w)|\b\d+(\.\d+)? times as fast"
)


def words(stem_or_path) -> list[str]:
    """The sentences of a notebook's Markdown cells, without code and tables of references."""
    notebook = nbformat.read(stem_or_path, 4)
    texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    return [re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL) for text in texts]


def asserted(path) -> str:
    """The source of all assertions in a notebook's code."""
    notebook = nbformat.read(path, 4)
    found = []
    for cell in cells.code(notebook):
        tree = ast.parse(cells.plain(cell.source))
        found += [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    return "\n".join(found)


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request):
    return request.param


def test_absolute_claims_are_backed_by_an_assertion(path):
    backed, sources = BACKED.get(path.stem, {}), asserted(path)
    for text in words(path):
        for sentence in re.split(r"(?<=[.:;!?])\s+|\n\n|\n[-|]", text):
            if not ABSOLUTE.search(sentence):
                continue
            flat = " ".join(sentence.split())
            reason = next((proof for said, proof in backed.items() if said in flat), None)
            assert reason, f"say it less absolutely, or name the assertion in {__file__}: {flat!r}"
            assert reason in sources, f"no assertion has {reason!r}, which should back {flat!r}"


def test_measured_numbers_stand_in_code_and_not_in_sentences(path):
    for text in words(path):
        for found in MEASURED.finditer(text):
            around = " ".join(text[max(0, found.start() - 60) : found.end() + 30].split())
            pytest.fail(f"a cell should compute and print this: ...{around}...")


def test_notebooks_that_are_named_exist(path):
    numbers = {each.stem.split("_")[0] for each in NOTEBOOKS} | {"10"}
    for text in words(path):
        for listed in re.findall(r"notebooks? ((?:\d\d)(?:(?:, | and | to )\d\d)*)", text):
            assert set(re.findall(r"\d\d", listed)) <= numbers, listed


def test_links_to_files_and_headings_lead_somewhere(path):
    texts = words(path)
    headings = {
        line.lstrip("# ").strip().replace(" ", "-")
        for text in texts
        for line in text.splitlines()
        if line.startswith("#")
    }
    for target in re.findall(r"\]\(([^)\s]+)\)", "\n".join(texts)):
        if target.startswith(("http://", "https://")):
            continue
        file, _, heading = target.partition("#")
        assert not file or (path.parent / file).exists(), target
        assert not heading or heading in headings, target


def test_the_readme_tells_the_minutes_and_the_memory_of_each_notebook(path):
    minutes, gib = runner.NEEDS.search(nbformat.read(path, 4).cells[0].source).groups()
    (row,) = re.findall(rf"^\| \[{path.stem}\].*$", (ROOT / "README.md").read_text(), re.MULTILINE)[:1]
    assert row.endswith(f"| {minutes}, {gib} |"), row


def test_the_readmes_figure_is_that_of_the_stored_records():
    records = (ROOT / "companion" / "stored-results" / "scoreboard.jsonl").read_bytes()
    drawn = (ROOT / "docs" / "scoreboard.svg").read_text(encoding="utf-8")
    assert f"records {hashlib.sha256(records).hexdigest()}" in drawn, "draw it again: python docs/figure.py"


def test_links_of_the_readme_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    headings = {
        re.sub(r"[^\w\- ]", "", line.lstrip("# ").strip().lower()).replace(" ", "-")
        for line in text.splitlines()
        if line.startswith("#")
    }
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        file, _, heading = target.partition("#")
        assert not file or (ROOT / file).exists(), target
        assert not heading or heading in headings, target


def test_an_absolute_claim_is_found(tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("It never fails.")])
    nbformat.write(notebook, tmp_path / "99_wrong.ipynb")
    with pytest.raises(AssertionError, match="less absolutely"):
        test_absolute_claims_are_backed_by_an_assertion(tmp_path / "99_wrong.ipynb")
    notebook.cells = [nbformat.v4.new_markdown_cell("It is 3.2 times as fast, 12 ms.")]
    nbformat.write(notebook, tmp_path / "99_wrong.ipynb")
    with pytest.raises(pytest.fail.Exception, match="compute and print"):
        test_measured_numbers_stand_in_code_and_not_in_sentences(tmp_path / "99_wrong.ipynb")


LONGEST = 20  # lines of a cell, so that it is read in one look; imports do not count


def test_a_cell_is_one_thought(path):
    for cell in cells.code(nbformat.read(path, 4)):
        tree = ast.parse(cells.plain(cell.source))
        own = [node for node in tree.body if not isinstance(node, (ast.Import, ast.ImportFrom))]
        lines = own[-1].end_lineno - own[0].lineno + 1 if own else 0
        # A drawing, a table of values or a call is one thing, on however many lines.
        one_thing = sum(len(ast.unparse(node).splitlines()) for node in own) <= 4
        setup = "COLAB_RELEASE_TAG" in cell.source
        assert lines <= LONGEST or one_thing or setup, f"cut it: {cell.source[:200]}"
