"""The monitor: a page for operators that shows what happens in one process, and what it shows.

Any thread. `overview` makes the data; the files of the page are in the folder ``page``. See "The monitor" in
docs/explanation/architecture.md.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

_FOLDER = Path(__file__).with_name("page")
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
PAGE = "monitor.html"
"""The name of the page itself."""


class PageFile(NamedTuple):
    """One file of the page, and its ``Content-Type``."""

    content: bytes
    type: str


@functools.cache
def page_files() -> dict[str, PageFile]:
    """Return the files of the page, by name. They are read at the first call: most processes never show the page."""
    return {path.name: PageFile(path.read_bytes(), _TYPES[path.suffix]) for path in sorted(_FOLDER.iterdir())}
