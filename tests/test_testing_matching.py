"""What counts as the data that was sent, and as a part of it: what an assertion about data must not let pass."""

from __future__ import annotations

import dataclasses
import datetime
import re
from typing import Any
from unittest.mock import ANY

import pytest

from sse_batcher import SSEManager, Text, UsageError
from sse_batcher.testing import Recording, record

from .kit.board import make_board

DAY = datetime.date(2026, 5, 1)


def sent_by_a_manager(data: Any) -> Recording:
    manager = SSEManager()
    with record() as sent:
        manager.enqueue("order", data)
    return sent


def sent_by_an_app(data: Any) -> Recording:
    board = make_board()
    with record() as sent:
        board.sse.enqueue("order", data)
    return sent


def check(sent: Recording, matches: bool, **asked: Any) -> None:
    """Check that exactly one of the two assertions passes."""
    passing, failing = sent.assert_sent, sent.assert_not_sent
    if not matches:
        passing, failing = sent.assert_not_sent, sent.assert_sent
    passing("order", **asked)
    with pytest.raises(AssertionError):
        failing("order", **asked)


SAME = [
    (1, 1.0),
    ([1, 2], (1, 2)),
    ({"pair": (1, (2,))}, {"pair": [1, [2]]}),
    ({2: "a", None: "b", True: "c"}, {"2": "a", "null": "b", "true": "c"}),
    ({"2": "a", "null": "b", "true": "c"}, {2: "a", None: "b", True: "c"}),
    ({"html": Text("<b>")}, {"html": "<b>"}),
    ({"html": "<b>"}, {"html": Text("<b>")}),
    ("a", "a"),
    (Text("a"), "a"),
    (Text("a"), Text("a")),
    (Text("a\r\nb"), Text("a\r\nb")),
    (Text("a\r\nb"), "a\r\nb"),
    (Text("a\r\nb"), "a\nb"),
    ("a\r\nb", "a\r\nb"),
    ({"id": 7, "at": 1.5}, {"id": ANY, "at": pytest.approx(1.5)}),
    ({"paid": True}, {"paid": ANY}),
    (None, None),
    ([], ()),
]

DIFFERENT = [
    (1, True),
    (True, 1),
    (0, False),
    (1.0, True),
    ({"paid": 1}, {"paid": True}),
    ({"paid": True}, {"paid": 1}),
    ({"paid": False}, {"paid": 0.0}),
    ([1, 0], [True, False]),
    ([[1]], [[True]]),
    ([{"rows": [1]}], [{"rows": [True]}]),
    (1, "1"),
    ({"id": 7}, {"id": "7"}),
    ([None], ["None"]),
    ({"id": None}, {}),
    ({}, {"id": None}),
    (None, {}),
    ({}, []),
    ([1], [1, 1]),
    ([1, 2], [2, 1]),
    ("a", Text("a")),
    (Text("7"), 7),
    (Text('{"id": 7}'), {"id": 7}),
    ("a\r\nb", "a\nb"),
    ({"id": 7}, {"id": 8, "at": ANY}),
]


@pytest.mark.parametrize(("data", "expected"), SAME)
def test_equal_values_are_the_same(data: Any, expected: Any) -> None:
    check(sent_by_a_manager(data), True, data=expected)
    check(sent_by_a_manager(data), True, containing=expected)


@pytest.mark.parametrize(("data", "expected"), DIFFERENT)
def test_values_of_another_kind_differ(data: Any, expected: Any) -> None:
    check(sent_by_a_manager(data), False, data=expected)


ROWS = [{"id": 7, "n": 1, "tags": ["new", "tea"]}, {"id": 8}]

PARTS = [
    ({"id": 7, "who": {"name": "ada", "age": 36}}, {"who": {"name": "ada"}}),
    (ROWS, {"id": 8}),
    (ROWS, {"id": 7}),
    (ROWS, {"tags": "tea"}),
    (ROWS, [{"id": 7}, {"id": 8}]),
    (ROWS, ({"id": 8},)),
    (ROWS, ROWS),
    ({"rows": ROWS}, {"rows": {"id": 8}}),
    ({"rows": ROWS}, {"rows": [{"id": 7}]}),
    ({"numbers": [1, 2, 3]}, {"numbers": 2}),
    ({"numbers": [1, 2, 3]}, {"numbers": [1, 3]}),
    ([1, 2, 3], [2, 3]),
    ([[1, 2], [3]], [1, 2]),
    ([[1, 2], [3]], 3),
    ([1, 1], [1, 1]),
    ([0, True], True),
    (["<b>"], Text("<b>")),
    ({"id": 7, "day": 1}, {"id": ANY}),
    ("hello world", "hello"),
    (Text("hello\r\nworld"), "hello\r\nworld"),
    (Text("hello\r\nworld"), Text("lo\nwo")),
    (Text(""), ""),
    ([], []),
    ({"errors": []}, {"errors": []}),
    ({"id": None, "n": 1}, {"id": None}),
]

NO_PARTS = [
    ({"id": 7}, {"id": 8}),
    ({"id": 7}, {"id": "7"}),
    ({"id": 7}, {"id": 7, "n": None}),
    ({"paid": 1, "n": 1}, {"paid": True}),
    (ROWS, {"n": True}),
    (ROWS, {"id": 7, "n": 2}),
    (ROWS, [{"id": 8}, {"id": 7}]),
    (ROWS, [{"id": 7}, {"id": 7}]),
    ([1, 2, 3], True),
    ([0, 1], False),
    ([1, 2], [1, 1]),
    ([1, 2], "1"),
    ({"state": "unpaid"}, {"state": "paid"}),
    (["unpaid"], "paid"),
    ({"a": 1}, "a"),
    ({"a": 1}, ["a"]),
    ("hello", Text("hello")),
    ("hello", ["hello"]),
    (Text("7"), 7),
    ({"errors": ["a"]}, {"errors": []}),
    ({"who": {"name": "ada"}}, {"who": {}}),
    ({"id": 7}, {}),
    ([1], []),
    ("hello", ""),
    (Text("hello"), ""),
    (None, {}),
    (7, None),
]


@pytest.mark.parametrize(("data", "part"), PARTS)
def test_a_part_is_found(data: Any, part: Any) -> None:
    check(sent_by_a_manager(data), True, containing=part)


@pytest.mark.parametrize(("data", "part"), NO_PARTS)
def test_what_is_no_part_is_not_found(data: Any, part: Any) -> None:
    check(sent_by_a_manager(data), False, containing=part)


@dataclasses.dataclass
class Line:
    """One that the JSON provider of Flask converts to a dict."""

    sku: str
    day: datetime.date


@pytest.mark.parametrize(
    ("matches", "asked"),
    [
        (True, {"data": {"id": 7, "lines": [Line("tea", DAY)]}}),
        (True, {"data": {"id": ANY, "lines": [Line("tea", DAY)]}}),
        (True, {"data": {"id": 7, "lines": ANY}}),
        (True, {"containing": {"lines": Line("tea", DAY)}}),
        (True, {"containing": {"lines": {"day": DAY}}}),
        (True, {"containing": {"id": ANY, "lines": [{"day": DAY}]}}),
        (False, {"containing": {"lines": {"day": DAY + datetime.timedelta(1)}}}),
        (False, {"data": {"id": ANY, "lines": [Line("milk", DAY)]}}),
    ],
)
def test_values_that_json_does_not_have_are_compared_as_they_are_sent(matches: bool, asked: dict[str, Any]) -> None:
    check(sent_by_an_app({"id": 7, "lines": [Line("tea", DAY)]}), matches, **asked)


@pytest.mark.parametrize("unsendable", [object(), {7}, b"7", float("nan"), Line("tea", DAY).__class__])
@pytest.mark.parametrize("shape", [lambda value: value, lambda value: {"id": 7, "rows": [value]}])
@pytest.mark.parametrize("name", ["data", "containing"])
def test_data_that_cannot_be_sent_does_not_pass_as_not_sent(unsendable: Any, shape: Any, name: str) -> None:
    sent = sent_by_a_manager({"id": 7})
    asked = {name: shape(unsendable)}
    with pytest.raises(UsageError, match=re.escape(f"no event can have {unsendable!r} in its data")):
        sent.assert_not_sent("order", **asked)
    with pytest.raises(AssertionError, match="was not sent"):
        sent.assert_sent("order", **asked)
    sent.assert_not_sent("invoice", **asked)  # of this type, there is nothing that it could be compared with
