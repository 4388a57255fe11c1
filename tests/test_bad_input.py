"""What `enqueue` refuses: which error says what, and that a refused event loses nothing but itself."""

from __future__ import annotations

import enum
import functools
import json
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

from sse_batcher import (
    BacklogFullError,
    Batch,
    BatchOptions,
    Client,
    ClosedError,
    ConfigurationError,
    EventBatcher,
    InvalidEventError,
    SSEBatcherError,
    SSEManager,
    signals,
)

from .kit.sse_parser import take_events
from .kit.waiting import TIMEOUT

MAX_FRAME_BYTES = 10_000


class Name(str, enum.Enum):  # noqa: UP042  # as apps have them
    ALL = "*"


def dedup_key(event_type: str, data: Any) -> Any:
    """Raises for data that asks for it, and gives a key that is no JSON for data that asks for that."""
    if data == "raise":
        raise KeyError("no such field")
    return {1} if data == "set" else None


OPTIONS = BatchOptions(batch_window=10, max_frame_bytes=MAX_FRAME_BYTES, dedup_key=dedup_key, critical_types=())


@pytest.mark.parametrize("make", [EventBatcher, SSEManager], ids=["batcher", "manager"])
def test_text_of_an_encoder_that_cannot_be_sent_is_refused_in_the_caller(make: Any) -> None:
    arguments = ([].append,) if make is EventBatcher else ()
    with make(*arguments, encode=functools.partial(json.dumps, indent=1)) as target:
        with pytest.raises(InvalidEventError, match="line end"):
            target.enqueue("t", [1])
        target.enqueue("t", 1)
        assert target.flush_all(TIMEOUT)
        stats = target.get_stats()
        assert (stats.refused, stats.enqueued, stats.failed) == (1, 1, 0)


def circular() -> list:
    items: list = []
    items.append(items)
    return items


def deep() -> list:
    """Made by each test that needs it: so many objects would slow the garbage collector in all others."""
    items: list = []
    for _ in range(100_000):
        items = [items]
    return items


# Found as such, or as nesting without an end.
CIRCLE = (ValueError, RecursionError)

# By name: the type, the data, the channel; the field that is wrong, the message, its cause.
BAD: dict[str, tuple[Any, Any, Any, str, str, Any]] = {
    "bytes": ("log", b"x", "default", "data", "bytes is not JSON serializable. json_default=", TypeError),
    "a set": ("log", {"a": {1, 2}}, "default", "data", "set is not JSON serializable", TypeError),
    "an object": ("log", object(), "default", "data", "object is not JSON serializable", TypeError),
    "a tuple as key": ("log", {(1, 2): 3}, "default", "data", "keys must be str, int", TypeError),
    "bytes as key": ("log", {b"a": 3}, "default", "data", "keys must be str, int", TypeError),
    "circular": ("log", circular(), "default", "data", "Circular reference|refers to itself", CIRCLE),
    "100,000 deep": ("log", deep, "default", "data", "nested too deeply", RecursionError),
    "NaN": (
        "log",
        {"a": [1, float("nan")]},
        "default",
        "data",
        r"data\['a'\]\[1\] is nan, and JSON has no NaN",
        ValueError,
    ),
    "infinity": ("log", [float("-inf")], "default", "data", r"data\[0\] is -inf, .* Send None", ValueError),
    "NaN far inside": (
        *("log", functools.reduce(lambda inner, _: {"a long key": inner}, range(100), float("nan"))),
        *("default", "data", r"data(\['a long key'\])+(\['[a-z ]*)?\.\.\. is nan", ValueError),
    ),
    "NaN that a list meets twice": ("log", [[], [], float("nan")], "default", "data", r"data\[2\] is nan", ValueError),
    "NaN as key": ("log", {float("nan"): 1}, "default", "data", "a key of data is nan", ValueError),
    "an int of 5,000 digits": ("log", 10**5000, "default", "data", "Exceeds the limit", ValueError),
    "such an int as key": ("log", {10**5000: 1}, "default", "data", "Exceeds the limit", ValueError),
    "too large": ("log", "x" * 9_999, "default", "data", "10001 bytes of JSON, more than max_frame_bytes=10000", None),
    "too large once escaped": ("log", "é" * 2_000, "default", "data", "12002 bytes of JSON", None),
    "no type": (None, 1, "default", "type", "must be a string, not NoneType", None),
    "bytes as type": (b"log", 1, "default", "type", "must be a string, not bytes", None),
    "an unhashable type": (["log"], 1, "default", "type", "must be a string, not list", None),
    "an empty type": ("", 1, "default", "type", "must have 1 to 128 characters, not 0", None),
    "a type too long": ("x" * 129, 1, "default", "type", "must have 1 to 128 characters, not 129", None),
    "a line end in the type": ("log\ndata: forged", 1, "default", "type", "control characters", None),
    "NUL in the type": ("log\0", 1, "default", "type", "control characters", None),
    "a surrogate in the type": ("log\ud800", 1, "default", "type", "lone surrogates", None),
    "a reserved type": ("sse_open", 1, "default", "type", "reserved", None),
    "a reserved suffix": ("log_batch", 1, "default", "type", "reserved", None),
    "no channel": ("log", 1, None, "channel", "must be a string, not NoneType", None),
    "bytes as channel": ("log", 1, b"default", "channel", "must be a string, not bytes", None),
    "an unhashable channel": ("log", 1, {}, "channel", "must be a string, not dict", None),
    "an empty channel": ("log", 1, "", "channel", "must have 1 to 128 characters, not 0", None),
    "a channel too long": ("log", 1, "x" * 129, "channel", "must have 1 to 128 characters, not 129", None),
    "a line end in the channel": ("log", 1, "a\r", "channel", "control characters", None),
    "a surrogate in the channel": ("log", 1, "\udfff", "channel", "lone surrogates", None),
    "a dedup_key that raises": ("log", "raise", "default", "dedup_key", "KeyError.*no such field", KeyError),
    "a dedup_key that is no JSON": ("log", "set", "default", "dedup_key", "set is not JSON serializable", TypeError),
}
ALL_CHANNEL = {
    "the channel of all": ("log", 1, "*", "channel", r"call broadcast\(\)", None),
    "the channel of all as an enum": ("log", 1, Name.ALL, "channel", r"call broadcast\(\)", None),
}


def made(data: Any) -> Any:
    return data() if data is deep else data


def cases(bad: dict) -> list:
    return [pytest.param(*case, id=name) for name, case in bad.items()]


def refused_among_49_others(enqueue: Callable[..., None], event_type: Any, data: Any, channel: Any) -> Any:
    """The error of a call that comes in the middle of 49 good ones."""
    for number in range(25):
        enqueue("log", number)
    with pytest.raises(InvalidEventError) as caught:
        enqueue(event_type, made(data), channel=channel)
    for number in range(25, 49):
        enqueue("log", number)
    return caught.value


def check(error: Any, field: str, message: str, cause: Any) -> None:
    assert isinstance(error, ValueError)
    assert isinstance(error, SSEBatcherError)
    assert error.field == field
    assert isinstance(error.__cause__, cause or type(None))
    with pytest.raises(InvalidEventError, match=message):
        raise error
    assert len(str(error)) < 1_000


@pytest.fixture
def batches() -> list[Batch]:
    return []


@pytest.fixture
def batcher(batches: list[Batch]) -> Iterator[EventBatcher]:
    with EventBatcher(batches.append, OPTIONS) as batcher:
        yield batcher


@pytest.fixture
def manager() -> Iterator[SSEManager]:
    with SSEManager(batching=OPTIONS) as manager:
        yield manager


@pytest.fixture
def client(manager: SSEManager) -> Client:
    return manager.subscribe()


@pytest.fixture
def told(manager: SSEManager) -> Iterator[list]:
    """What the signal `event_refused` of the manager said, and in which thread."""
    calls = []

    def receiver(sender: object, **values: Any) -> None:
        calls.append((sender, values, threading.get_ident()))

    with signals.event_refused.connected_to(receiver, sender=manager):
        yield calls


# -- events that cannot be ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("event_type", "data", "channel", "field", "message", "cause"), cases(BAD))
def test_the_batcher_refuses_one_event_and_loses_no_other(
    batcher: EventBatcher,
    batches: list[Batch],
    event_type: Any,
    data: Any,
    channel: Any,
    field: str,
    message: str,
    cause: Any,
) -> None:
    check(refused_among_49_others(batcher.enqueue, event_type, data, channel), field, message, cause)
    assert batcher.flush_all(TIMEOUT)
    (batch,) = batches
    assert [event.data for event in batch.events] == list(range(49))
    stats = batcher.get_stats()
    assert (stats.refused, stats.enqueued, stats.failed, stats.pending_events) == (1, 49, 0, 0)


@pytest.mark.parametrize(("event_type", "data", "channel", "field", "message", "cause"), cases(BAD | ALL_CHANNEL))
def test_the_manager_refuses_one_event_loses_no_other_and_sends_the_signal(
    manager: SSEManager,
    client: Client,
    told: list,
    event_type: Any,
    data: Any,
    channel: Any,
    field: str,
    message: str,
    cause: Any,
) -> None:
    error = refused_among_49_others(manager.enqueue, event_type, data, channel)
    check(error, field, message, cause)
    assert manager.flush_all(TIMEOUT)
    opened, batch = take_events(client, 2)
    assert (opened.type, batch.type) == ("sse_open", "log_batch")
    assert batch.json["events"] == list(range(49))
    assert manager.get_stats().enqueued == 49
    (call,) = told
    values = {"error": error, "event_type": event_type, "channel": channel, "user": None}
    assert call == (manager, values, threading.get_ident())


@pytest.mark.parametrize(("event_type", "data", "channel", "field", "message", "cause"), cases(BAD | ALL_CHANNEL))
def test_the_manager_counts_a_refused_event(
    manager: SSEManager, event_type: Any, data: Any, channel: Any, field: str, message: str, cause: Any
) -> None:
    with pytest.raises(InvalidEventError):
        manager.enqueue(event_type, made(data), channel=channel)
    assert manager.get_stats().refused == 1


def test_a_broadcast_is_refused_in_the_same_way(manager: SSEManager, told: list) -> None:
    with pytest.raises(InvalidEventError, match="bytes is not JSON") as caught:
        manager.broadcast("log", b"x")
    assert told[0][:2] == (manager, {"error": caught.value, "event_type": "log", "channel": "*", "user": None})
    assert manager.get_stats().refused == 1


def test_an_event_that_just_fits_is_sent(batcher: EventBatcher, batches: list[Batch]) -> None:
    batcher.enqueue("log", "x" * 9_998)
    assert batcher.flush_all(TIMEOUT)
    assert len(batches[0].events[0].json) == MAX_FRAME_BYTES


def test_the_limit_of_digits_is_the_interpreters(batcher: EventBatcher) -> None:
    assert 0 < sys.get_int_max_str_digits() < 5_000
    batcher.enqueue("log", 10 ** (sys.get_int_max_str_digits() - 1))


def test_a_bare_batcher_takes_the_channel_of_all(batcher: EventBatcher, batches: list[Batch]) -> None:
    batcher.enqueue("log", 1, channel="*")
    assert batcher.flush_all(TIMEOUT)
    assert batches[0].channel == "*"


async def later(*_: Any) -> None:
    raise AssertionError("never awaited")


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("sink", lambda: EventBatcher(later)),  # type: ignore[arg-type]
        ("encode", lambda: EventBatcher(print, encode=later)),  # type: ignore[arg-type]
        ("encode", lambda: SSEManager(encode=later)),  # type: ignore[arg-type]
        ("json_default", lambda: SSEManager(json_default=later)),
        ("dedup_key", lambda: BatchOptions(dedup_key=later)),
        ("dedup_key", lambda: BatchOptions(per_type={"log": {"dedup_key": later}})),
    ],
)
def test_an_async_function_is_refused_where_it_would_be_called(name: str, make: Callable[[], object]) -> None:
    with pytest.raises((TypeError, ConfigurationError), match=rf"{name} must not be async"):
        make()


def test_a_mistake_in_a_default_is_the_callers() -> None:
    def default(value: object) -> object:
        raise ValueError("not this one")

    with SSEManager(json_default=default) as manager:
        with pytest.raises(InvalidEventError, match="not this one") as caught:
            manager.enqueue("log", object())
        assert isinstance(caught.value.__cause__, ValueError)


def test_a_nan_that_a_default_makes_is_refused_also_in_data_that_holds_itself() -> None:
    data: list[object] = [object()]
    data.append(data)
    with SSEManager(json_default=lambda value: float("nan")) as manager:
        with pytest.raises(InvalidEventError, match="the data cannot be sent as JSON: Out of range float"):
            manager.enqueue("log", data)


def test_changing_data_after_the_call_changes_nothing(batcher: EventBatcher, batches: list[Batch]) -> None:
    data = {"a": [1]}
    batcher.enqueue("log", data)
    data["a"].append(2)
    assert batcher.flush_all(TIMEOUT)
    assert batches[0].events[0].data == {"a": [1]}


# -- closed ------------------------------------------------------------------------------------------------------------


def test_a_closed_batcher_says_so_and_has_delivered_the_rest(batcher: EventBatcher, batches: list[Batch]) -> None:
    for number in range(49):
        batcher.enqueue("log", number)
    assert batcher.destroy()
    with pytest.raises(ClosedError, match="was closed in this process") as caught:
        batcher.enqueue("log", 49)
    assert isinstance(caught.value, RuntimeError)
    assert isinstance(caught.value, SSEBatcherError)
    assert [event.data for batch in batches for event in batch.events] == list(range(49))
    assert (batcher.get_stats().refused, batcher.get_stats().enqueued) == (1, 49)


def test_a_closed_manager_says_so_and_sends_the_signal(manager: SSEManager, told: list) -> None:
    assert manager.shutdown(TIMEOUT)
    for send in (manager.enqueue, manager.broadcast):
        with pytest.raises(ClosedError, match="was closed in this process"):
            send("log", 1)
    assert [(type(values["error"]), values["channel"]) for _, values, _ in told] == [
        (ClosedError, "default"),
        (ClosedError, "*"),
    ]
    assert manager.get_stats().refused == 2


def test_a_closed_manager_takes_no_client(manager: SSEManager) -> None:
    assert manager.shutdown(TIMEOUT)
    with pytest.raises(ClosedError, match="takes no more clients"):
        manager.subscribe()


# -- full --------------------------------------------------------------------------------------------------------------


class StuckSink:
    """Takes nothing until it is released."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self.entered = threading.Event()
        self.released = threading.Event()

    def __call__(self, batch: Batch) -> None:
        self.entered.set()
        assert self.released.wait(TIMEOUT)
        self.batches.append(batch)


def test_a_full_backlog_says_how_much_waits_and_how_long_and_loses_nothing() -> None:
    now = [100.0]
    sink = StuckSink()
    options = BatchOptions(batch_window=0, max_pending_bytes=49 * 201)
    with EventBatcher(sink, options, clock=lambda: now[0]) as batcher:
        for number in range(49):
            batcher.enqueue("log", number % 10)
        assert sink.entered.wait(TIMEOUT)
        now[0] += 7
        with pytest.raises(
            BacklogFullError, match=r"49 events \(9849 bytes\) wait .* for 7.0 s.*max_pending"
        ) as caught:
            batcher.enqueue("log", 0)
        sink.released.set()
        assert batcher.flush_all(TIMEOUT)
        batcher.enqueue("log", "room again")
    assert isinstance(caught.value, RuntimeError)
    assert isinstance(caught.value, SSEBatcherError)
    assert vars(caught.value) == {"pending_events": 49, "pending_bytes": 9849, "publishing_for": 7.0}
    assert vars(pickle.loads(pickle.dumps(caught.value))) == vars(caught.value)
    sent = [event.data for batch in sink.batches for event in batch.events]
    assert sent == [*(number % 10 for number in range(49)), "room again"]
    assert (batcher.get_stats().refused, batcher.get_stats().enqueued) == (1, 50)


def test_a_full_backlog_of_a_manager_sends_the_signal() -> None:
    calls = []

    def receiver(sender: object, error: Exception, event_type: str, channel: str, user: object) -> None:
        calls.append((sender, error, event_type, channel, user))

    with SSEManager(batching=BatchOptions(batch_window=10, max_pending_bytes=300)) as manager:
        signals.event_refused.connect(receiver, sender=manager)
        manager.enqueue("log", 1)
        with pytest.raises(BacklogFullError) as caught:
            manager.enqueue("log", 2)
        assert caught.value.publishing_for == 0.0
        assert calls == [(manager, caught.value, "log", "default", None)]
        assert manager.get_stats().refused == 1


def test_one_event_is_taken_however_small_the_backlog_may_be(batches: list[Batch]) -> None:
    with EventBatcher(batches.append, BatchOptions(max_pending_bytes=1)) as batcher:
        batcher.enqueue("log", "x" * 1_000)
    assert len(batches) == 1


def test_the_users_of_pending_events_count_as_pending() -> None:
    users = [f"user-{number}" for number in range(1_000)]
    with SSEManager(batching=BatchOptions(batch_window=10, dedup_key=None, max_pending_bytes=1_000_000)) as manager:
        for _ in range(2):
            manager.enqueue("t", 1, user=users[:10], key=1)
        manager.enqueue("t", 1, user="ada")
        assert manager.get_stats().pending_bytes == 2 * (1 + 200 + 10 * 100) + (1 + 200 + 100)
        for _ in range(9):
            manager.enqueue("t", 1, user=users)
        with pytest.raises(BacklogFullError):
            manager.enqueue("t", 1, user=users)
        assert manager.flush_all(TIMEOUT)
        stats = manager.get_stats()
        assert (stats.replaced, stats.pending_events, stats.pending_bytes) == (1, 0, 0)


def test_a_row_of_a_database_is_not_taken_for_several_users() -> None:
    class Row(NamedTuple):
        id: int
        name: str

    row: Any = Row(7, "ada")
    with SSEManager() as manager:
        with pytest.raises(InvalidEventError, match="a user is a str or an int, not Row"):
            manager.enqueue("t", 1, user=row)
        manager.enqueue("t", 1, user=[row.id])
        manager.enqueue("t", 1, user={row.id: row.name}.keys())  # any set is several users
