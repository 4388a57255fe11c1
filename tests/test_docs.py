"""The documents for developers: the files, classes and methods that they name are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "docs" / "architecture.md", ROOT / "CONTRIBUTING.md"]
SOURCE = "\n".join(path.read_text() for path in sorted((ROOT / "sse_batcher").rglob("*.py")))
pytestmark = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


def _code(document: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.M | re.S))


def test_each_file_that_is_named_is_there(document: Path) -> None:
    named = [text for text in _code(document) if re.fullmatch(r"(sse_batcher|tests)/[\w/*]*(\.py)?", text)]
    assert named
    assert [path for path in named if not list(ROOT.glob(path))] == []


def test_each_class_and_method_that_is_named_is_there(document: Path) -> None:
    named = [text for text in _code(document) if re.fullmatch(r"[A-Z][A-Za-z]+[a-z](\.\w+)?", text) and text != "None"]
    missing = []
    for name in named:
        owner, _, attribute = name.partition(".")
        known = re.search(rf"^(class {owner}\b|{owner} = )", SOURCE, flags=re.M)
        if not known or (attribute and not re.search(rf"\b(def {attribute}\b|self\.{attribute}\b)", SOURCE)):
            missing.append(name)
    assert named
    assert missing == []


def test_each_link_leads_to_a_file_or_a_heading(document: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", document.read_text())
    assert links
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, heading = link.partition("#")
        target = document.parent / path if path else document
        assert target.is_file(), link
        headings = re.findall(r"^#+ (.*)$", target.read_text(), flags=re.M)
        anchors = {re.sub(r"[^\w -]", "", text).lower().replace(" ", "-") for text in headings}
        assert not heading or heading in anchors, link
