"""docs/guides/testing.md: each of its programs runs, and what it shows is true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sse_batcher import Text
from sse_batcher.testing import Recording, Sent, Stream, record

from .kit.board import make_board
from .kit.documents import blocks, text_of
from .kit.pytest_runs import run_pytest

PAGE = text_of("guides/testing")
PROGRAMS = blocks(PAGE, "python")


def test_its_programs_are_an_app_and_tests_that_pass(tmp_path: Path) -> None:
    app, *tests = PROGRAMS
    assert app.startswith("# app.py\n")
    (tmp_path / "app.py").write_text(app)
    text = "\n\n".join(tests)
    names = re.findall(r"^ *def (test_\w+)", text, flags=re.M)
    assert len(names) == len(set(names))
    assert f"{len(names)} passed" in run_pytest(tmp_path, text)


def test_the_message_that_it_shows_is_that_of_a_failure() -> None:
    shown = re.findall(r"^```text\n(AssertionError.*?)^```$", PAGE, flags=re.M | re.S)
    board = make_board()
    with record() as sent:
        board.sse.enqueue("order", {"id": 7}, channel="team-7")
        board.sse.enqueue("row", Text("<li>order 7</li>"), channel="team-7")
        board.sse.enqueue("hint", {"orders": 1}, user="ada")
    with pytest.raises(AssertionError) as caught:
        sent.assert_sent("order", {"id": 8}, channel="team-7")
    assert [f"AssertionError: {caught.value}\n"] == shown


def test_the_attributes_that_it_names_are_there() -> None:
    named = set(re.findall(r"`(stream|sse_events)\.(\w+)", PAGE))
    assert len(named) > 10
    owners = {"stream": Stream, "sse_events": Recording}
    assert [name for owner, name in named if not hasattr(owners[owner], name)] == []
    of_an_event = re.findall(r"Each element has (.*?)\. ", PAGE)[0]
    assert [name for name in re.findall(r"`(\w+)`", of_an_event) if not hasattr(Sent, name)] == []


def test_it_says_where_the_reasons_stand() -> None:
    wire_format = text_of("reference/wire-format")
    for name in ("busy", "bye", "gaps"):
        (block,) = re.findall(rf"\[`{name}`\]\(\.\./reference/wire-format\.md#(\w+)\)", PAGE)
        section = wire_format.split(f"\n### {block}\n")[1].split("\n### ")[0]
        assert "```{generated} reasons " in section
