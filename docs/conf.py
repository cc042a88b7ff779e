"""The site that `make docs` builds with Sphinx from the pages of this folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from docs.generated_pages import on_site, write_generated  # noqa: E402
from tlcapture.version import __version__  # noqa: E402

write_generated(HERE / "generated")

project = "tlcapture"
author = "the tlcapture maintainers"
version = release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["generated/fields.md"]  # included by formats.md
html_theme = "furo"
html_title = f"tlcapture {release}"
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]
default_role = "code"  # docstrings have names in single backticks
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
suppress_warnings = ["misc.highlighting_failure"]  # blocks of `ipython` have magics


def setup(app: Sphinx) -> None:
    """Let links to pages outside lead to their copies on the site, and read docstrings of properties as text."""

    def read(app: Sphinx, name: str, source: list[str]) -> None:
        if not name.startswith("generated/"):
            source[0] = on_site(source[0], name.count("/"))

    def not_a_type(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
        if what in ("property", "attribute"):
            lines.insert(0, "")  # otherwise napoleon takes what precedes a colon in the first line for a type

    app.connect("source-read", read)
    app.connect("autodoc-process-docstring", not_a_type, priority=1)
