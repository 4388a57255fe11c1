"""The key of an event: within a window, a newer event replaces an older one with the same."""

from __future__ import annotations

import enum
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from werkzeug.local import LocalProxy

from sse_batcher import SSE, BatchOptions, EventBatcher, InvalidEventError, SSEManager, Text

from .kit.batching import SteppedBatcher
from .kit.flask_apps import MakeApp, apps_fixture
from .kit.sse_parser import take_events
from .kit.waiting import TIMEOUT

make_app = apps_fixture()


class Name(enum.StrEnum):
    ADA = "ada"


class Number(enum.IntEnum):
    SEVEN = 7


class Shown(str):
    def __str__(self) -> str:
        return "another"


def windows_of(*calls: tuple[Any, Any], **options: Any) -> list[list[Any]]:
    """The data of each batch, after these events (data, key) of one type at once."""
    batcher = SteppedBatcher(**options)
    for data, key in calls:
        batcher.enqueue("row", data, key=key)
    batcher.advance(10)
    return batcher.sent()


# -- what it replaces --------------------------------------------------------------------------------------------------


def test_a_newer_event_replaces_an_older_one_and_comes_last() -> None:
    assert windows_of((1, "a"), (2, "b"), (3, None), (4, "a")) == [[2, 3, 4]]
    assert windows_of(*[(Text(text), key) for text, key in zip("wxyz", ["a", "b", None, "a"], strict=True)]) == [
        ["x", "y", "z"]
    ]


def test_a_replaced_event_is_counted() -> None:
    batcher = SteppedBatcher()
    for number in range(5):
        batcher.enqueue("row", Text(str(number)), key="a")
    batcher.step()
    stats = batcher.get_stats()
    assert (stats.enqueued, stats.replaced, stats.pending_events) == (5, 4, 1)
    batcher.advance(1)
    stats = batcher.get_stats()
    assert (stats.replaced, stats.pending_events, stats.pending_bytes, stats.batches) == (4, 0, 0, 1)


def test_thirty_changes_of_a_table_are_one_text() -> None:
    assert windows_of(*((Text(f"<table>{number}</table>"), "table") for number in range(30))) == [
        ["<table>29</table>"],
    ]


def test_events_without_a_key_replace_nothing() -> None:
    assert windows_of((1, None), (1, None)) == [[1, 1]]
    assert windows_of((Text("a"), None), (Text("a"), None)) == [["a", "a"]]


def test_a_number_and_its_digits_are_two_keys() -> None:
    assert windows_of((1, 7), (2, "7"), (3, 7), (4, "7")) == [[3, 4]]
    assert windows_of((1, -7), (2, 7), (3, 0), (4, "")) == [[1, 2, 3, 4]]


@pytest.mark.parametrize(
    ("key", "same"),
    [
        ("ada", Name.ADA),
        (7, Number.SEVEN),
        ("ada", Shown("ada")),
        ("é\u2028\0\ud800", "é\u2028\0\ud800"),
        ("x" * 1_024, "x" * 1_024),
        (10**4_000, 10**4_000),
    ],
    ids=["enum", "int enum", "subclass", "nasty", "long", "large"],
)
def test_equal_keys_are_one(key: Any, same: Any) -> None:
    assert windows_of((1, key), (2, same)) == [[2]]
    assert windows_of((Text("a"), key), (Text("b"), same)) == [["b"]]


def test_letters_that_only_look_the_same_are_two_keys() -> None:
    assert windows_of((1, "\u00e9"), (2, "e\u0301"), (3, "A"), (4, "a"), (5, "a ")) == [[1, 2, 3, 4, 5]]


@given(st.lists(st.tuples(st.booleans(), st.sampled_from([None, 0, 1, -1, "", "0", "1", "a"])), max_size=30))
def test_what_is_left_is_the_newest_of_each_key(calls: list[tuple[bool, Any]]) -> None:
    for text in (True, False):
        data = [Text(str(number)) if text else str(number) for number in range(len(calls))]
        keys = [key for _, key in calls]
        left = [
            number
            for number, key in enumerate(keys)
            if key is None or not any(type(key) is type(later) and key == later for later in keys[number + 1 :])
        ]
        sent = windows_of(*zip(data, keys, strict=True), max_batch_size=1_000)
        assert sent == ([[data[number] for number in left]] if left else [])


# -- what it does not replace ------------------------------------------------------------------------------------------


def test_a_key_counts_within_its_type_channel_window_and_kind() -> None:
    batcher = SteppedBatcher()
    batcher.enqueue("row", 1, key="a")
    batcher.enqueue("note", 2, key="a")
    batcher.enqueue("row", 3, channel="other", key="a")
    batcher.enqueue("row", Text("4"), key="a")  # its window is another one, since the older event is JSON
    batcher.advance(1)
    batcher.enqueue("row", Text("5"), key="a")
    batcher.advance(1)
    assert sorted(str(data) for batch in batcher.sent() for data in batch) == ["1", "2", "3", "4", "5"]
    assert batcher.get_stats().replaced == 0


def test_a_key_replaces_no_leading_or_critical_event() -> None:
    assert windows_of((1, "a"), (2, "a"), (3, "a"), leading=True) == [[1], [3]]
    assert windows_of((1, "a"), (2, "a"), critical_types={"row"}) == [[1], [2]]
    assert windows_of((1, "a"), (2, "a"), batch_window=0) == [[1], [2]]


def test_users_have_keys_of_their_own() -> None:
    with SSEManager(batching=BatchOptions(batch_window=10)) as manager:
        ada, bob = (manager.subscribe((), user=user) for user in ("ada", "bob"))
        for number in range(3):
            manager.enqueue("row", Text(f"ada {number}"), user="ada", key="a")
            manager.enqueue("row", Text(f"bob {number}"), user="bob", key="a")
            manager.enqueue("row", Text(f"both {number}"), user=["bob", "ada"], key="a")
            manager.enqueue("row", Text(f"both {number}"), user=("ada", "bob"), key="a")
            manager.broadcast("row", Text(f"all {number}"), key="a")
        assert manager.flush_all(TIMEOUT)
        for client, name in [(ada, "ada"), (bob, "bob")]:
            texts = [event.data for event in take_events(client, 4)[1:]]
            assert sorted(texts) == sorted([f"{name} 2", "both 2", "all 2"])


def test_mixed_windows_have_keys_for_each_type() -> None:
    batcher = SteppedBatcher(mixed=True)
    for event_type, data in [("row", 1), ("note", 2), ("row", Text("3")), ("row", 4), ("note", Text("5"))]:
        batcher.enqueue(event_type, data, key="a")
    batcher.advance(1)
    assert batcher.sent() == [[4, "5"]]


# -- beside dedup_key --------------------------------------------------------------------------------------------------


def test_a_key_wins_over_the_field_that_dedup_key_names() -> None:
    calls = [({"server": "a", "n": 1}, "x"), ({"server": "a", "n": 2}, "y"), ({"server": "b", "n": 3}, "x")]
    assert [[data["n"] for data in window] for window in windows_of(*calls)] == [[2, 3]]
    assert [[data["n"] for data in window] for window in windows_of(*calls, dedup_key=None)] == [[2, 3]]


def test_a_key_and_a_field_that_are_equal_replace_each_other() -> None:
    assert windows_of(({"server": "a"}, None), (1, "a")) == [[1]]
    assert windows_of((1, 7), ({"server": 7}, None)) == [[{"server": 7}]]


def test_dedup_key_is_asked_neither_with_a_key_nor_for_a_text() -> None:
    asked: list[Any] = []
    options = {"dedup_key": lambda event_type, data: asked.append(data)}
    assert windows_of((1, "a"), (2, None), (3, 0), **options) == [[1, 2, 3]]
    assert windows_of((Text("a"), "a"), (Text("b"), None), **options) == [["a", "b"]]
    assert asked == [2]


def test_a_text_that_is_json_has_no_field_to_be_replaced_by() -> None:
    assert windows_of((Text('{"server": "a"}'), None), (Text('{"server": "a"}'), None)) == [['{"server": "a"}'] * 2]


# -- what is refused ---------------------------------------------------------------------------------------------------

WRONG = [
    True,
    False,
    1.5,
    7.0,
    float("nan"),
    b"a",
    ("a", 1),
    ["a"],
    {"a": 1},
    object(),
    Text,
    LocalProxy(lambda: "a"),
    LocalProxy(lambda: 7),
]


@pytest.mark.parametrize("key", WRONG, ids=lambda key: type(key).__name__)
@pytest.mark.parametrize("data", [1, Text("a")], ids=["JSON", "text"])
def test_a_key_of_another_type_is_refused(key: Any, data: Any) -> None:
    message = rf"^a key is a str or an int, not {type(key).__name__}$"
    with SSEManager() as manager:
        for call in (
            lambda: manager.enqueue("row", data, key=key),
            lambda: manager.enqueue("row", data, key=key, user=7),
            lambda: manager.broadcast("row", data, key=key),
        ):
            with pytest.raises(InvalidEventError, match=message) as caught:
                call()
            assert caught.value.field == "key"
        assert (manager.get_stats().refused, manager.get_stats().enqueued) == (3, 0)
    with EventBatcher(print) as batcher:
        with pytest.raises(InvalidEventError, match=message):
            batcher.enqueue("row", data, key=key)
        assert batcher.get_stats().refused == 1


def test_an_int_of_too_many_digits_is_refused() -> None:
    assert 0 < sys.get_int_max_str_digits() < 5_000
    batcher = SteppedBatcher()
    with pytest.raises(InvalidEventError, match=r"^a key that is an int has fewer digits: Exceeds the limit") as caught:
        batcher.enqueue("row", 1, key=10**5_000)
    assert caught.value.field == "key"
    assert batcher.get_stats().refused == 1


def test_an_sse_passes_keys_on(make_app: MakeApp) -> None:
    app, sse = make_app(SSE(), SSE_BATCH_WINDOW=10)
    with app.app_context():
        client = sse.manager.subscribe()
        for number in range(3):
            sse.enqueue("row", number, key="a")
            sse.broadcast("row", Text(str(number)), key="a")
        assert sse.manager.flush_all(TIMEOUT)
        assert sorted(event.data for event in take_events(client, 3)[1:]) == ["2", "2"]
        with pytest.raises(InvalidEventError, match="not float"):
            sse.broadcast("row", 1, key=1.5)  # type: ignore[arg-type]


def test_a_key_of_too_many_characters_is_refused() -> None:
    with SSEManager() as manager:
        manager.enqueue("t", 1, key="x" * 1_024)
        with pytest.raises(InvalidEventError, match=r"^a key has at most 1024 characters, not 1025$") as caught:
            manager.enqueue("t", 1, key="x" * 1_025)
        assert caught.value.field == "key"
