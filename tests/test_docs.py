"""The documents for developers: the files, classes and methods that they name are there, and packages point to them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "docs" / "explanation" / "architecture.md", ROOT / "CONTRIBUTING.md"]
SOURCE = "\n".join(path.read_text() for path in sorted((ROOT / "sse_batcher").rglob("*.py")))
PAGES = [*DOCUMENTS, ROOT / "docs" / "guides" / "browser.md", ROOT / "README.md"]
PACKAGES = sorted((ROOT / "sse_batcher").rglob("__init__.py"))
each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


def _code(document: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.M | re.S))


@each_document
def test_each_file_that_is_named_is_there(document: Path) -> None:
    named = [text for text in _code(document) if re.fullmatch(r"(sse_batcher|tests)/[\w/*]*(\.py)?", text)]
    assert named
    assert [path for path in named if not list(ROOT.glob(path))] == []


@each_document
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


@pytest.mark.parametrize("document", PAGES, ids=lambda path: path.name)
def test_each_link_leads_to_a_file_or_a_heading(document: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", document.read_text())
    assert links
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, heading = link.partition("#")
        target = document.parent / path if path else document
        assert target.exists(), link
        if not heading:
            continue
        headings = re.findall(r"^#+ (.*)$", target.read_text(), flags=re.M)
        anchors = {re.sub(r"[^\w -]", "", text).lower().replace(" ", "-") for text in headings}
        assert heading in anchors, link


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.parent.name)
def test_a_package_points_to_a_part_of_the_architecture(package: Path) -> None:
    docstring = ast.get_docstring(ast.parse(package.read_text())) or ""
    assert "docs/explanation/architecture.md" in docstring
    parts = re.findall(r'"([^"]+)"', docstring)
    assert parts or package.parent.name == "sse_batcher"
    headings = re.findall(r"^## (.*)$", (ROOT / "docs" / "explanation" / "architecture.md").read_text(), flags=re.M)
    assert set(parts) <= set(headings)


def test_each_lock_of_a_site_is_in_the_table_of_locks() -> None:
    locks = set()
    for path in (ROOT / "sse_batcher").rglob("*.py"):
        if {"demo", "testing"}.isdisjoint(path.parts):
            owner = ""
            for line in path.read_text().splitlines():
                owner = name[1] if (name := re.match(r"class (\w+)", line)) else owner
                if lock := re.search(r"self\.(\w+) = new_lock\(", line):
                    locks.add(f"{owner}.{lock[1]}")
    _, _, table = DOCUMENTS[0].read_text().partition("\n## Locks\n")
    assert len(locks) > 10
    assert set(re.findall(r"^\| `(\w+\.\w+)` ", table.partition("\n## ")[0], flags=re.M)) == locks
