"""The judge: a record of what browsers got is accepted or rejected, in the manner of Jepsen, by `tests.kit.checker`."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sse_batcher import Text
from sse_batcher.event import User

from .kit.checker import Browser, Connection, Facts, Got, Sent, Violation, judge, judge_publishing
from .kit.sse_parser import ServerEvent

SENT = [
    Sent("e-1", "a", (("t", 1),)),
    Sent("e-2", "b", (("t", 2),)),
    Sent("e-3", "a", (("t", 3), ("t", 4), ("t", 5))),
    Sent("e-4", "*", (("u", 6),)),
    Sent("e-5", "a", (("t", 7),), lost=True),
    Sent("e-6", "a", (("t", 8),)),
    Sent("e-7", (7, 8), (("t", 9),)),
    Sent("e-8", "c", (("row", Text("ten\n")), ("row", Text("eleven")), ("row", Text("twelve"))), join="--"),
    Sent("e-9", ("7",), (("t", "thirteen"),)),
    Sent("e-10", "d", (("row", Text("14th")), ("t", "fifteen"))),
]
ALL = len(SENT)


def block(event: str, id: str, data: Any = None, sent: int = ALL, gone: int = 0, gone_of_users: int = 0) -> Got:
    text = data if isinstance(data, Text) else json.dumps(data)
    return Got(ServerEvent(event, text, id), Facts(sent, gone, gone_of_users))


ONE = block("t", "e-1", 1)
THREE = block("t_batch", "e-3", {"events": [3, 4, 5]})
FOUR = block("u", "e-4", 6)
SIX = block("t", "e-6", 8)
GAP = block("sse_gap", "e-5")
PARTS = [block("t", "e-3.1", 3), block("t", "e-3.2", 4), block("t", "e-3", 5)]


def opened(id: str, *got: Got, **more: Any) -> Connection:
    return Connection(("a",), got=[block("sse_open", id), *got], **more)


SEVEN = block("t", "e-7", 9)
ROWS = block("row", "e-8", Text("ten\n--eleven--twelve"))
ROWS_ALONE = [block("row", id, Text(text)) for id, text in (("e-8.1", "ten\n"), ("e-8.2", "eleven"), ("e-8", "twelve"))]
STRING = block("t", "e-9", "thirteen")
BOTH_KINDS = {"events": [{"type": "row", "text": "14th"}, {"type": "t", "data": "fifteen"}]}


def user_opened(user: User, id: str, *got: Got, **more: Any) -> Connection:
    """A stream of a user, without a channel."""
    return Connection((), got=[block("sse_open", id), *got], user=user, **more)


def rows(*got: Got, channel: str = "c", **more: Any) -> Connection:
    return Connection((channel,), got=[block("sse_open", "e-7"), *got], **more)


def poll(asked: str | None, *got: Got, **more: Any) -> Connection:
    opening = block("sse_open", asked or "e-0")
    return Connection(("a",), asked, poll=True, got=[opening, *got], answered=True, **more)


def verdict(*life: Connection) -> str | None:
    try:
        judge("e-0", SENT, life)
    except Violation as violation:
        return violation.kind
    return None


@pytest.mark.parametrize(
    "life",
    [
        [opened("e-0", ONE, THREE, FOUR, GAP, SIX, drained=ALL)],
        [opened("e-0", ONE, block("sse_bye", "e-1")), opened("e-1", THREE, asked="e-1")],
        [opened("e-0", ONE, THREE), opened("e-1", THREE, FOUR, asked="e-1")],
        [opened("e-0", ONE), opened("e-2", THREE, FOUR, asked="e-1", drained=4)],
        [opened("e-1", *PARTS, FOUR, batches=False, drained=4)],
        [opened("e-1", PARTS[0], batches=False), opened("e-3.1", *PARTS[1:], FOUR, asked="e-3.1", drained=4)],
        [opened("e-0", ONE), Connection(("a",), "e-1", got=[block("sse_gap", "e-4", gone=3)], drained=4)],
        [Connection(("a",), "other-7", got=[block("sse_gap", "e-4")])],
        [opened("e-0", ONE), Connection(("a",), "e-1", got=[block("sse_busy", "e-1")])],
        [Connection(("a",))],
        [user_opened(7, "e-4", SEVEN, drained=ALL)],
        [user_opened("7", "e-4", STRING, drained=ALL)],
        [user_opened(9, "e-4", drained=ALL)],
        [user_opened(7, "e-4"), Connection((), "e-4", user=7, got=[block("sse_gap", "e-8", gone_of_users=7)])],
        [rows(ROWS, drained=9)],
        [rows(*ROWS_ALONE, batches=False, drained=9)],
        [rows(block("mixed_batch", "e-10", BOTH_KINDS), channel="d", drained=ALL)],
        [poll(None), poll("e-0", ONE), poll("e-1", THREE, FOUR, GAP), poll("e-5", SIX, drained=ALL)],
        [poll(None), Connection(("a",), "e-0", poll=True, got=[block("sse_gap", "e-4", gone=1)], answered=True)],
        [poll(None), Connection(("a",), "e-0", poll=True, got=[block("sse_open", "e-0")])],
    ],
    ids=[
        *("whole", "returns", "rewinds", "nothing in between", "no batches", "inside a batch", "gap"),
        *("another history", "busy", "nothing", "a user", "another user", "neither", "a gap of a user", "texts"),
        *("texts alone", "texts and JSON", "polls", "a gap of a poll", "a poll that waits"),
    ],
)
def test_a_good_record_is_accepted(life: list[Connection]) -> None:
    assert verdict(*life) is None


@pytest.mark.parametrize(
    ("kind", "life"),
    [
        ("loss", [opened("e-0", THREE)]),
        ("loss", [opened("e-0", ONE, THREE, FOUR, SIX)]),
        ("loss", [opened("e-0", ONE, drained=3)]),
        ("loss", [opened("e-0", ONE, drained=1), opened("e-1", FOUR, asked="e-1")]),
        ("loss", [opened("e-1", PARTS[0], PARTS[2], batches=False)]),
        ("loss", [opened("e-1", *PARTS[1:], batches=False)]),
        ("duplicate", [opened("e-0", ONE, ONE)]),
        ("duplicate", [opened("e-0", ONE), opened("e-1", ONE, asked="e-1")]),
        ("duplicate", [opened("e-1", PARTS[0], PARTS[0], batches=False)]),
        ("duplicate", [opened("e-0", ONE), opened("e-1", THREE, GAP, THREE, asked="e-1")]),
        ("order", [opened("e-0", THREE, ONE)]),
        ("order", [opened("e-0", ONE, FOUR, THREE)]),
        ("audience", [opened("e-0", ONE, block("t", "e-2", 2))]),
        ("audience", [opened("e-6", SEVEN)]),
        ("audience", [user_opened("7", "e-4", SEVEN)]),
        ("audience", [user_opened(9, "e-4", SEVEN)]),
        ("audience", [user_opened(7, "e-4", SEVEN, STRING)]),
        ("loss", [user_opened(8, "e-4", drained=ALL)]),
        ("duplicate", [user_opened(7, "e-4", SEVEN, SEVEN)]),
        ("false gap", [user_opened(7, "e-4"), Connection((), "e-4", user=7, got=[block("sse_gap", "e-8", gone=8)])]),
        (
            "false gap",
            [opened("e-6", drained=6), Connection(("a",), "e-6", got=[block("sse_gap", "e-8", gone_of_users=8)])],
        ),
        ("cursor", [user_opened(7, "e-4", block("sse_bye", "e-8"))]),
        ("content", [rows(block("row", "e-8", Text("ten\n\neleven\ntwelve")))]),
        ("content", [rows(block("row", "e-8", "ten\n--eleven--twelve"))]),
        ("content", [user_opened("7", "e-4", block("t", "e-9", Text("thirteen")))]),
        ("content", [rows(block("row_batch", "e-8", {"events": ["ten\n", "eleven", "twelve"]}))]),
        (
            "content",
            [
                rows(
                    block("mixed_batch", "e-10", BOTH_KINDS | {"events": [{"type": "row", "data": "14th"}]}),
                    channel="d",
                )
            ],
        ),
        ("loss", [rows(ROWS_ALONE[0], ROWS_ALONE[2], batches=False)]),
        ("poll", [poll(None), poll("e-0")]),
        ("poll", [poll(None), poll("e-0", ONE, block("sse_bye", "e-1"))]),
        ("poll", [Connection(("a",), poll=True, answered=True)]),
        ("content", [poll(None, ONE)]),
        ("content", [poll(None), poll("e-0", block("sse_open", "e-0"))]),
        ("content", [poll(None), poll("e-0", ONE, THREE, FOUR, GAP, SIX)]),
        ("loss", [poll(None), poll("e-0", ONE), poll("e-1", FOUR)]),
        ("loss", [poll(None), poll("e-0", ONE, drained=3)]),
        ("duplicate", [poll(None), poll("e-0", ONE), poll("e-1", ONE)]),
        ("cursor", [opened("e-0", ONE), opened("e-3", asked="e-1")]),
        ("cursor", [opened("e-0", ONE, THREE), opened("e-0", asked="e-3")]),
        ("cursor", [opened("e-0", ONE, THREE, FOUR), opened("e-6", asked="e-4")]),
        ("cursor", [opened("e-1", PARTS[0], batches=False), opened("e-2", asked="e-3.1")]),
        ("cursor", [opened("e-1", PARTS[0], batches=False), opened("e-3", asked="e-3.1")]),
        ("cursor", [opened("e-1", *PARTS[:2], batches=False), opened("e-3.1", asked="e-3.2", batches=False)]),
        ("cursor", [Connection(("a",), "other-7", got=[block("sse_open", "e-0")])]),
        ("cursor", [Connection(("a",), got=[block("sse_open", "e-4", sent=3)])]),
        ("cursor", [opened("e-0", ONE, block("sse_bye", "e-3"))]),
        ("cursor", [opened("e-0", ONE, THREE, FOUR, block("sse_gap", "e-3", gone=6))]),
        ("cursor", [opened("e-0", ONE), opened("e-3", asked="e-3")]),
        ("cursor", [opened("f-0")]),
        ("false gap", [opened("e-0", ONE, block("sse_gap", "e-4", sent=4, gone=1))]),
        ("false gap", [Connection(("a",), got=[GAP])]),
        ("false gap", [opened("e-0", ONE), Connection(("b",), "e-1", got=[block("sse_gap", "e-4", gone=1)])]),
        ("content", [opened("e-0", block("t", "e-1", 10))]),
        ("content", [opened("e-0", ONE, block("t_batch", "e-3", {"events": [3, 4]}))]),
        ("content", [opened("e-0", block("t", "e-99", 1))]),
        ("content", [opened("e-0", block("sse_bye", "e-0"), ONE)]),
        ("content", [Connection(("a",), got=[ONE])]),
        ("content", [opened("e-0", block("sse_open", "e-0"))]),
    ],
)
def test_a_record_of_a_broken_promise_is_rejected(kind: str, life: list[Connection]) -> None:
    assert verdict(*life) == kind


def test_what_was_published_has_to_be_in_the_frames_once_and_in_order() -> None:
    judge_publishing([("a", "t", [1, 3, 4, 5, 7, 8]), ("b", "t", [2]), ("a", "t", [3, 8]), ((7, 8), "t", [9])], SENT)
    for wrong in ([3, 1], [1, 3, 4, 5, 6], [1, 9]):
        with pytest.raises(Violation, match="publishing"):
            judge_publishing([("a", "t", wrong)], SENT)


def test_a_block_that_is_cut_anywhere_is_none_and_leaves_the_cursor_alone() -> None:
    data = b"event: t\ndata: 1\nid: e-1\n\nevent: t\ndata: 2\nid: e-2\n\n"
    for end in range(len(data)):
        browser = Browser(("a",), Facts)
        browser.connect()
        browser.feed(data[:end])
        complete = data[:end].count(b"\n\n")
        assert len(browser.life[0].got) == complete
        assert browser.connect() == (None, "e-1")[complete]
