"""How Sphinx builds these pages: ``pip install -e . --group docs``, ``sphinx-build -W docs FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # for generated.py

project = "sse_batcher"
copyright = "the authors of sse_batcher"
extensions = ["myst_parser", "sphinx.ext.autodoc", "generated"]
html_theme = "furo"
html_title = "sse_batcher"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
default_role = "code"  # single backquotes in docstrings
myst_heading_anchors = 4
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 80
