"""Sphinx's settings; the sources are what `build.py` has put together."""

import os
import sys
import tomllib
from pathlib import Path

ROOT = Path(os.environ["SITE_ROOT"])
sys.path.insert(0, str(ROOT))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REPOSITORY = PROJECT["urls"]["Repository"]

project, author, release = "Accelerating PyTorch", "the authors", PROJECT["version"]
copyright = "the authors; Apache-2.0"  # noqa: A001
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx_copybutton", "sphinx_design"]
exclude_patterns = ["_build"]
html_theme, html_title = "sphinx_book_theme", "Accelerating PyTorch"
html_static_path, html_css_files = ["_static"], ["site.css"]
html_theme_options = {
    "repository_url": REPOSITORY,
    "repository_branch": "main",
    "path_to_docs": "",
    "use_repository_button": True,
    "use_download_button": True,
    "launch_buttons": {
        "colab_url": "https://colab.research.google.com",
        "binderhub_url": "https://mybinder.org",
    },
    "show_navbar_depth": 1,
    "home_page_in_toc": True,
}
html_show_sourcelink = html_copy_source = True
nb_execution_mode = "off"  # outputs are the stored ones
nb_merge_streams = True
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4
# What notebooks show besides pictures, tables and text is for a running kernel.
nb_mime_priority_overrides = [("html", "application/vnd.jupyter.widget-view+json", None)]
suppress_warnings = ["mystnb.unknown_mime_type", "myst.header"]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
default_role = "code"  # docstrings write names between single backticks
autodoc_mock_imports = ["torch_xla", "torch_tpu"]
linkcheck_anchors = False


def setup(app):
    """Names that a module has from elsewhere, such as torch's own functions, are not its interface."""

    def elsewhere(app, what, name, thing, skip, options):
        return True if not str(getattr(thing, "__module__", "companion")).startswith("companion") else None

    app.connect("autodoc-skip-member", elsewhere)
    app.connect("autodoc-process-docstring", code_blocks)


def code_blocks(app, what, name, thing, options, lines):
    """An indented example in a docstring is code."""
    found = []
    for line in lines:
        begins = line.startswith("    ") and found and not found[-1].strip()
        before = next((one for one in reversed(found) if one.strip()), "")
        if begins and not before.startswith("    "):
            found += ["::", ""]
        found.append(line)
    lines[:] = found
