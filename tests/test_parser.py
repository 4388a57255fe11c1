"""The parser for clients: the same as one that was written from the standard and from nothing of ours."""

from __future__ import annotations

import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sse_batcher import parser
from sse_batcher.parser import Block, BlockTooLongError, Comment, Parser

from .kit.sse_parser import EventStreamParser

PIECES = [
    *("event: order", "event:", "data: 1", "data:2", "data", "data:  x", "id: a-1", "id:", "id: a\0b", "retry: 500"),
    *("retry: x", ": heartbeat", "other: x", "d\u00e9j\u00e0", "\n", "\n", "\n", "\r\n", "\r\n", "\r", "\r", "\n\n"),
]


@example(["data: 1", "\r\n", "data:2", "\r\n", "\n"], 8)
@given(st.lists(st.sampled_from(PIECES)), st.integers(1, 20))
def test_both_parsers_find_the_same_blocks(pieces: list[str], step: int) -> None:
    stream = "".join(pieces).encode() + b"\n\n"
    ours, theirs = Parser(), EventStreamParser()
    steps = [stream[at : at + step] for at in range(0, len(stream), step)]
    items = [item for each in steps for item in ours.feed(each)]
    blocks = [item for item in items if isinstance(item, Block)]
    events = [event for each in steps for event in theirs.feed(each)]
    assert [block[:3] for block in blocks] == events
    assert (ours.last_id, ours.retry) == (theirs.last_event_id, theirs.retry)
    comments = [item.text for item in items if isinstance(item, Comment)]
    assert comments == [text.removeprefix(" ") for text in theirs.comments]


def test_a_block_says_whether_it_has_an_id() -> None:
    blocks = Parser("a-1").blocks(b"data: 1\n\ndata: 2\nid: a-2\n\n")
    assert [(block.id, block.has_id) for block in blocks] == [("a-1", False), ("a-2", True)]


def test_a_line_that_ends_with_cr_waits_for_nothing() -> None:
    assert Parser().blocks(b"data: 1\r\r") == [Block("message", "1", "", False)]


def test_comments_keep_their_place_among_the_blocks() -> None:
    items = Parser().feed(b":\ndata: 1\n: a: b\n\n")
    assert items == [Comment(""), Comment("a: b"), Block("message", "1", "", False)]


def test_a_long_line_takes_no_quadratic_time() -> None:
    ours = Parser()
    began = time.process_time()
    assert [ours.feed(b"x" * 1_000) for _ in range(5_000)] == [[]] * 5_000
    assert ours.blocks(b"\n\n") == []
    assert time.process_time() - began < 1  # to search the whole line for each piece takes many seconds


@pytest.mark.parametrize("piece", [b"x" * 10, b"data: abc\n", b"data: 1\r\ndata: 2"])
def test_a_block_that_never_ends_is_an_error(piece: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parser, "MAX_BLOCK_BYTES", 100)
    ours = Parser()
    for _ in range(50):  # many small blocks are no long one
        ours.feed(b"data: 12345678\ndata: x\n\n: 12345678\n")
    with pytest.raises(BlockTooLongError, match="a block of more than"):
        list(map(ours.feed, [piece] * 20))
