"""The site's pages from files of the project: the README's parts, how to contribute and cite, the modules."""

import ast
import re
from pathlib import Path

import yaml

PARTS = {
    "start": ("Start",),
    "use": ("In your own code", "Run many"),
    "modules": ("The modules",),
    "runs-where": ("What runs where",),
    "measured": ("Measured", "Beside other material"),
    "stacks": ("The stacks",),
}
NAMES = {
    "CONTRIBUTING.md": "contributing.md",
    "DEPENDENCIES.md": "dependencies.md",
    "CITATION.cff": "cite.md",
}


def write(root: Path, source: Path) -> None:
    readme = (root / "README.md").read_text(encoding="utf-8")
    cut = sections(readme)
    for page, titles in PARTS.items():
        text = "\n\n".join(cut[title] for title in titles)
        (source / f"{page}.md").write_text(linked(text), encoding="utf-8")
    for name in ("CONTRIBUTING.md", "DEPENDENCIES.md"):
        text = (root / name).read_text(encoding="utf-8")
        (source / NAMES[name]).write_text(linked(text), encoding="utf-8")
    (source / "cite.md").write_text(citation(root), encoding="utf-8")
    (source / "api").mkdir()
    (source / "api" / "index.md").write_text(modules(root, source / "api"), encoding="utf-8")


def sections(readme: str) -> dict[str, str]:
    """The README's parts by their headings of the second and third level, each beginning with a first-level
    heading.
    """
    found, fenced, title = {}, False, None
    for line in readme.splitlines():
        fenced ^= line.startswith("```")
        heading = None if fenced else re.match(r"(##+) (.+)", line)
        if heading and (len(heading[1]) == 2 or heading[2] == "The modules"):
            title = heading[2]
            found[title] = f"# {title}\n"
        elif title:
            found[title] += (line[1:] if heading else line) + "\n"
    return found


def linked(text: str) -> str:
    """With links to the site's own pages where the README links to files."""
    for name, page in NAMES.items():
        text = text.replace(f"]({name})", f"]({page})")
    for page, titles in PARTS.items():
        for title in titles:
            anchor = title.lower().replace(" ", "-")
            text = text.replace(f"](#{anchor})", f"]({page}.md)")
    return text


def citation(root: Path) -> str:
    """How to cite, from CITATION.cff."""
    about = yaml.safe_load((root / "CITATION.cff").read_text(encoding="utf-8"))
    text = (root / "CITATION.cff").read_text(encoding="utf-8")
    return f"# How to cite\n\n{about.get('message', '')}\n\n```yaml\n{text}```\n"


def modules(root: Path, folder: Path) -> str:
    """A page for each module of the package, and the list of them with the first line of each docstring."""
    lines = ["# The companion package", "", "| Module | |", "|---|---|"]
    paths = sorted([*(root / "companion").glob("[!_]*.py"), root / "companion" / "launch" / "__init__.py"])
    names = []
    for path in sorted(paths, key=lambda path: module_name(path)):
        name = module_name(path)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        first = (ast.get_docstring(tree) or "").split("\n\n")[0].replace("\n", " ")
        lines.append(f"| [{name}]({name}.md) | {first.replace('|', ' ')} |")
        page = f"# companion.{name}\n\n```{{eval-rst}}\n.. automodule:: companion.{name}\n   :members:\n```\n"
        (folder / f"{name}.md").write_text(page, encoding="utf-8")
        names.append(name)
    toctree = ["", "```{toctree}", ":hidden:", "", *names, "```", ""]
    return "\n".join([*lines, *toctree])


def module_name(path: Path) -> str:
    return path.parent.name if path.stem == "__init__" else path.stem
