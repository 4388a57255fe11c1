"""Where the files of the repository are, and what its README says."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """The programs in the README that are marked as this language."""
    return [text for mark, text in re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.M | re.S) if mark == language]
