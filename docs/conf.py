"""How Sphinx builds these pages: ``pip install -e . --group docs``, ``sphinx-build -W docs FOLDER``."""

from __future__ import annotations

project = "sse_batcher"
copyright = "the authors of sse_batcher"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "sse_batcher"
default_role = "code"  # single backquotes in docstrings
myst_heading_anchors = 4
autodoc_member_order = "bysource"
