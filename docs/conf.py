"""The site that `make docs` builds of these pages, with Sphinx. The pages are plain Markdown, to be read as files too.

Navigation is what docs/index.md lists, section by section, so a page is named in one place.
"""

import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

project = "rope_probe"
author = "The rope_probe authors"
project_copyright = author
release = metadata.version("rope_probe")

extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns: list[str] = []
root_doc = "index"
html_theme = "furo"
html_title = f"rope_probe {release}"
html_show_sphinx = False
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}

myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # a page of one question begins with its claim, under the title

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # shapes stand in the docstrings, and jaxtyping's annotations are long
autodoc_default_options = {"members": True, "show-inheritance": False}
autodoc_preserve_defaults = True

_SECTION = re.compile(r"^## (.+)$", re.MULTILINE)
_ENTRY = re.compile(r"^- \[[^\]]+\]\(([\w./]+)\.(?:md|rst)\)", re.MULTILINE)


def contents_of(index: str) -> str:
    """A hidden table of contents for each section of the index that lists pages, and one for those it does not list."""
    titles_and_bodies = _SECTION.split(index)[1:]
    sections = {
        title: _ENTRY.findall(body) for title, body in zip(titles_and_bodies[::2], titles_and_bodies[1::2], strict=True)
    }
    listed = {root_doc, *(entry for entries in sections.values() for entry in entries)}
    sections["More"] = sorted(page.stem for page in HERE.glob("*.md") if page.stem not in listed)
    return "\n".join(
        "\n".join(["```{toctree}", ":hidden:", f":caption: {title}", "", *entries, "```", ""])
        for title, entries in sections.items()
        if entries
    )


def add_contents(app: Any, name: str, source: list[str]) -> None:
    """Give the index its navigation, which readers of the plain file see as lists of links."""
    if name == root_doc:
        source[0] += "\n" + contents_of(source[0])


def as_markdown(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Let a docstring's backquotes and lists be read as in Markdown; of a module's, its first paragraph alone."""
    text = "\n".join(lines)
    if what == "module":
        text = text.split("\n\n")[0]
    outside_and_code = text.split("`")
    for place in range(0, len(outside_and_code), 2):
        outside_and_code[place] = re.sub(r"[*|]|(?<=\w)_(?!\w)", r"\\\g<0>", outside_and_code[place])
    text = "``".join(outside_and_code)
    lines[:] = re.sub(r"(?m)^(?!- |\s)(.+)\n(?=- )", r"\1\n\n", text).splitlines()


def setup(app: Any) -> None:
    """Connect the two."""
    app.connect("source-read", add_contents)
    app.connect("autodoc-process-docstring", as_markdown)
