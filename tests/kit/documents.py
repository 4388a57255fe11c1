"""What the README and the pages of the documentation show: blocks of code, files, and scripts."""

from __future__ import annotations

import re
import subprocess
import textwrap
from collections.abc import Iterable
from pathlib import Path

from .repository import DOCS
from .services import program


def text_of(page: str) -> str:
    """A page, by its path in `docs` without ``.md``."""
    return (DOCS / f"{page}.md").read_text()


def blocks(text: str, language: str = r"\w*") -> list[str]:
    """The blocks of a page that are marked as this language, without the indent that they have in a list."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```$", text, flags=re.M | re.S)
    return [textwrap.dedent(block) for _, block in found]


def block(text: str, language: str, part: str) -> str:
    """The only block of a page that has this part."""
    (found,) = (each for each in blocks(text, language) if part in each)
    return found


def files(text: str) -> dict[str, str]:
    """The blocks that are files, by the path that their first line names."""
    found = {}
    for each in blocks(text):
        named = re.match(r"(?:#|//|<!--|{#) ([\w./-]+\.\w+)(?: -->| -#})?\n", each)
        if named:
            found[named[1]] = each
    return found


def check_scripts(scripts: Iterable[str], folder: Path) -> None:
    """Fail if one of these is not JavaScript."""
    node = program("node", package="Debian: nodejs")
    for number, script in enumerate(scripts):
        file = folder / f"{number}.mjs"
        file.write_text(script)
        done = subprocess.run([node, "--check", file], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
