"""The pages on troubles, on WSGI, on migrating and on why: what they quote is in the code, and their programs work."""

from __future__ import annotations

import ast
import re

import pytest

from sse_batcher.testing import open_stream

from .kit.repository import ROOT
from .kit.services import pip_install

DOCS = ROOT / "docs"
TROUBLES = (DOCS / "troubleshooting.md").read_text()


def _words(text: str) -> str:
    """A text as it can be compared: what differs from case to case is ``...``."""
    return re.sub(r"\s+", " ", re.sub(r"%[sdrg]|%\.\w+|\.\.\.", "\0", text))


def _texts() -> list[str]:
    """Every string of the package, with the parts that are filled in later as ``...``."""
    texts = []
    for path in sorted((ROOT / "sse_batcher").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "..." for part in node.values]
                texts.append(_words("".join(map(str, parts))))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(_words(node.value))
    texts += [_words(line) for line in (ROOT / "sse_batcher/browser/sse-batcher.js").read_text().splitlines()]
    return texts


TEXTS = _texts()
NOT_OURS = {'EventSource\'s response has a MIME type ("text/html") that is not "text/event-stream"', "blocked by CORS policy"}
"""What browsers say."""


def quoted() -> list[str]:
    """What the page quotes of the log and of errors: everything with several words."""
    page = re.sub(r"^```.*?^```$", "", TROUBLES, flags=re.M | re.S)
    found = [text for text in re.findall(r"`([^`\n]+)`", page) if re.search(r"[a-z:)]\S* \S+ ", text)]
    return [text for text in found if not text.startswith(("SSE_", "pip ")) and text not in NOT_OURS]


def _is_said(quote: str, text: str) -> bool:
    """Whether the parts of the quote are in the text, in this order."""
    place = 0
    for part in re.split("\0", _words(quote)):
        place = text.find(part.strip(), place)
        if place < 0:
            return False
    return True


def test_each_line_that_is_quoted_is_in_the_source() -> None:
    assert len(quoted()) > 50
    assert [quote for quote in quoted() if not any(_is_said(quote, text) for text in TEXTS)] == []


def _logged() -> list[str]:
    """The text of each warning and error that the package logs with a constant text."""
    texts = []
    for path in sorted((ROOT / "sse_batcher").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            call = ast.unparse(node)
            by_level = node.func.attr in {"log", "log_once"} and "INFO" not in call
            if node.func.attr in {"warning", "error", "exception"} or by_level:
                for argument in node.args[:2]:
                    if isinstance(argument, ast.JoinedStr):
                        parts = [part.value if isinstance(part, ast.Constant) else "..." for part in argument.values]
                        texts.append(_words("".join(map(str, parts))))
                    elif isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                        texts.append(_words(argument.value))
    return [text for text in texts if " " in text and "--json" not in text]


def test_each_warning_and_error_of_the_log_has_an_entry() -> None:
    logged = _logged()
    assert len(logged) > 25
    assert [text for text in logged if not any(_is_said(quote, text) for quote in quoted())] == []


@pytest.mark.external
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of these packages
def test_the_programs_for_pyramid_and_falcon_stream(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = tmp_path_factory.mktemp("packages")
    needed = "pyramid falcon webob zope.interface zope.deprecation translationstring venusian plaster"
    pip_install(f"{needed} plaster-pastedeploy PasteDeploy hupper setuptools<81", packages)
    monkeypatch.syspath_prepend(packages)
    page = (DOCS / "guides" / "wsgi.md").read_text()
    for name in ("pyramid_live", "falcon_live"):
        (text,) = re.findall(rf"^```python\n(# {name}\.py\n.*?)^```$", page, flags=re.M | re.S)
        program: dict[str, object] = {"__name__": name}
        exec(text, program)
        with open_stream(program["app"]) as stream:
            program["manager"].enqueue("order", {"id": 7})  # type: ignore[attr-defined]
            stream.clock.advance(0.1)
            assert stream.events() == [("order", {"id": 7})]
        program["manager"].shutdown()  # type: ignore[attr-defined]
