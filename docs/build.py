"""Builds the site from the notebooks with their stored outputs, the README's parts and the docstrings.

    python docs/build.py [--output build/site]

Nothing is executed and nothing is fetched. Ends with 1 if Sphinx warns of anything.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import lessons
import sources

HERE = Path(__file__).parent
ROOT = HERE.parent
WARNED = "warnings.txt"


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "site")
    output = parser.parse_args(words).output.absolute()
    source = output.with_name(output.name + "-sources")
    for folder in (source, output):
        shutil.rmtree(folder, ignore_errors=True)
    source.mkdir(parents=True)
    shutil.copytree(HERE / "_static", source / "_static")
    sources.write(ROOT, source)
    lessons.write(ROOT, source)
    lessons.chinese(HERE, source)
    for page in (HERE / "pages").glob("*.md"):
        shutil.copy(page, source)
    shutil.copy(HERE / "conf.py", source)
    command = [sys.executable, "-m", "sphinx", "-q", "-b", "html", "-w", str(source / WARNED)]
    done = subprocess.run([*command, str(source), str(output)], env=os.environ | {"SITE_ROOT": str(ROOT)})
    if done.returncode:
        return 1
    for template in (output / "_static").glob("*.html"):  # the theme's own, which are no pages
        template.unlink()
    for page in output.rglob("*.html"):
        finish(page)
    warned = (source / WARNED).read_text(encoding="utf-8").strip()
    print(f"{len(list(output.rglob('*.html')))} pages in {output}")
    return int(bool(warned))


def finish(page: Path) -> None:
    """Pictures load when they come into view, and none is without a text that stands for it."""
    text = page.read_text(encoding="utf-8")
    text = re.sub(r"<img (?![^>]*loading=)", '<img loading="lazy" ', text)
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
