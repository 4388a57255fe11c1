"""The module for browsers, `sse-batcher.js`, and its types for TypeScript.

Pure. The files are read once, when this package is imported. See "In the page" in docs/explanation/architecture.md.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

SCRIPT_NAME = "sse-batcher.js"
TYPES_NAME = "sse-batcher.d.ts"
# Not by importlib.resources: importing that takes as long as a twentieth of the whole library.
SOURCE = Path(__file__).with_name(SCRIPT_NAME).read_text("utf-8")
"""The module as it was written, for people and for bundlers."""
TYPES = Path(__file__).with_name(TYPES_NAME).read_text("utf-8")


def _served(source: str) -> str:
    """Leave out comments, indentation, empty lines, and spaces around operators.

    The module has no strings that look like one of them.
    """
    without_comments = re.sub(r"/\*\*.*?\*/|(?<!\S)// [^\n]*", "", source, flags=re.DOTALL)
    lines = re.sub(r"\s*\n\s*", "\n", without_comments).strip()
    # Not around + and -, since `a + +b` would become `a++b`.
    return re.sub(r" (=>|={1,3}|!==|\?\?|&&|\|\||[?:]) ", r"\1", lines) + "\n"


SCRIPT = _served(SOURCE).encode()
"""What browsers get: the same without what `_served` leaves out, which is nearly a third of its bytes."""

VERSION = hashlib.sha256(SCRIPT).hexdigest()[:12]
"""Names the content of the script, so that a cache may keep it forever under a URL with this version."""
