"""The lessons' pages, and the landing page with one figure and one number of each."""

import base64
import re
from itertools import pairwise
from pathlib import Path

import nbformat

NEEDS = re.compile(r"\*\*Needs\*\* about (.+? GiB) on a 2-core CPU")
WIDTH = 320  # of the landing page's figures, in pixels


def write(root: Path, source: Path) -> None:
    folder, cards = source / "notebooks", []
    folder.mkdir()
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        notebook = nbformat.read(path, 4)
        cards.append(card(path.stem, notebook, source / "_static"))
        nbformat.write(readable(notebook), folder / path.name)
    (source / "index.md").write_text(landing(root, cards), encoding="utf-8")


def chinese(here: Path, source: Path) -> None:
    """The summaries in Chinese, each with its lesson's number, as measured, and the way to the lesson."""
    folder = source / "zh"
    folder.mkdir()
    stems = []
    for path in sorted((here / "zh").glob("[0-9]*.md")):
        notebook = nbformat.read(here.parent / "notebooks" / f"{path.stem}.ipynb", 4)
        text = path.read_text(encoding="utf-8").rstrip()
        measured = f"实测：{sentence(notebook)}"
        (folder / path.name).write_text(
            f"{text}\n\n`{measured}`\n\n[课程（英文）](../notebooks/{path.stem}.ipynb)\n", encoding="utf-8"
        )
        stems.append(path.stem)
    first = (here / "zh" / "index.md").read_text(encoding="utf-8")
    listed = [f"- [{title(here / 'zh' / f'{stem}.md')}]({stem}.md)" for stem in stems]
    (folder / "index.md").write_text(
        "\n".join([first, *listed, "", "```{toctree}", ":hidden:", "", *stems, "```", ""]), encoding="utf-8"
    )


def title(page: Path) -> str:
    return page.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")


def readable(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Without badges, which are the page's buttons, and with a text for each figure."""
    first = notebook.cells[0]
    first.source = "\n".join(line for line in first.source.splitlines() if "badge" not in line)
    said = first.source
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            said = cell.source
        elif any("image/png" in output.get("data", {}) for output in cell.outputs):
            cell.metadata["mystnb"] = {"image": {"alt": f"Figure: {described(said)}"}}
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if "data" not in output or shown(output)]
    return notebook


def shown(output: nbformat.NotebookNode) -> bool:
    """Whether a page can show it."""
    return any(kind.startswith(("image/", "text/")) for kind in output["data"])


def described(markdown: str) -> str:
    """What the text before a figure says, as plain words."""
    text = re.sub(r"<[^>]+>|\[([^\]]*)\]\([^)]*\)|[#*`|>_]", lambda m: m[1] or " ", markdown)
    words = " ".join(text.split())
    return (words[:200].rsplit(" ", 1)[0] + " ..." if len(words) > 200 else words).replace(
        '"', "'"
    ) or "result"


def card(stem: str, notebook: nbformat.NotebookNode, static: Path) -> str:
    """A lesson on the landing page: its question, its figure, its number, and what it takes."""
    text = notebook.cells[0].source
    question = text.splitlines()[0].lstrip("# ")
    needs = NEEDS.search(" ".join(text.split()))
    figure, alt = chosen(notebook)
    name = f"{stem}.png"
    (static / name).write_bytes(figure)
    number = sentence(notebook)
    return "\n".join(
        [
            f":::{{grid-item-card}} {question}",
            f":link: notebooks/{stem}",
            ":link-type: doc",
            f":img-bottom: _static/{name}",
            f":img-alt: {alt}",
            "",
            f"**{stem[:2]}** takes about {needs[1]}. Measured: {number}",
            ":::",
        ]
    )


def chosen(notebook: nbformat.NotebookNode) -> tuple[bytes, str]:
    """The first figure of the measurement, or else of the notebook, and its text."""
    found, said, measuring = [], "", False
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            said = cell.source
            heading = re.findall(r"^## (.+)$", said, re.MULTILINE)
            measuring = heading[-1].startswith("The measurement") if heading else measuring
            continue
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                found.append((not measuring, output["data"]["image/png"], described(said)))
    _, picture, alt = min(found, key=lambda one: one[0])
    return base64.b64decode(picture), alt


def sentence(notebook: nbformat.NotebookNode) -> str:
    """The first line that the notebook's last section has computed."""
    concluding, said = False, []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            concluding |= "## When to use" in cell.source
            continue
        texts = [output.text.strip() for output in cell.outputs if output.output_type == "stream"]
        if concluding and texts:
            return texts[0].splitlines()[0]
        said += [
            line for text in texts for line in text.splitlines() if re.search("predicted.*measured", line)
        ]
    return said[0].strip()


def landing(root: Path, cards: list[str]) -> str:
    readme = (root / "README.md").read_text(encoding="utf-8")
    title, intro = readme.split("\n", 1)[0], readme.split("\n\n")[1]
    parts = ["start", "use", "measured", "runs-where", "modules", "glossary", "stacks"]
    parts += ["contributing", "dependencies", "cite", "api/index", "zh/index"]
    stems = [path.stem for path in sorted((root / "notebooks").glob("*.ipynb"))]
    return "\n".join(
        [
            title,
            "",
            intro,
            "",
            "## Which notebook is for me?",
            "",
            *choice(readme, stems),
            "",
            "## The lessons",
            "",
            "::::{grid} 1 2 2 3",
            ":gutter: 3",
            "",
            *cards,
            "::::",
            "",
            *toctree("Lessons", [f"notebooks/{stem}" for stem in stems]),
            *toctree("About", parts),
        ]
    )


def toctree(caption: str, pages: list[str]) -> list[str]:
    return ["```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```", ""]


def choice(readme: str, stems: list[str]) -> list[str]:
    """The README's diagram as nested questions, which need no program to be drawn."""
    source = re.search(r"```mermaid\n(.*?)```", readme, re.DOTALL)[1]
    names = {key: text.replace("<br/>", " ") for key, text in re.findall(r'(\w+)[\[{]"([^"]+)"[\]}]', source)}
    bare = re.sub(r'[\[{]"[^"]+"[\]}]', "", source)
    edges: dict[str, list[tuple[str, str]]] = {}
    for line in bare.splitlines()[1:]:
        ends = re.split(r"\s*-->\s*", line.strip())
        for one, other in pairwise(ends):
            label = re.match(r"\|([^|]+)\|\s*", other)
            for start in re.sub(r"^\|[^|]+\|\s*", "", one).split(" & "):
                edges.setdefault(start.strip(), []).append(
                    (label[1] if label else "", other[label.end() if label else 0 :])
                )
    pages = {stem[:2]: f"[**{stem[:2]}**](notebooks/{stem}.ipynb)" for stem in stems}
    names = {key: re.sub(r"\d\d", lambda found: pages[found[0]], text) for key, text in names.items()}
    return _below("start", names, edges, 0, set())


def _below(node: str, names: dict, edges: dict, depth: int, seen: set) -> list[str]:
    lines = []
    for label, other in edges.get(node, []):
        if other in seen or other == "score":
            continue
        lines.append(f"{'  ' * depth}- {label + ': ' if label else ''}{names.get(other, other)}")
        lines += _below(other, names, edges, depth + 1, seen | {other})
    return lines
