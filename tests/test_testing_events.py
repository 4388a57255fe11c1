"""`record`: what was sent, and what a failed assertion says."""

from __future__ import annotations

import datetime
import os
import threading
import unittest
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import pytest

from sse_batcher import (
    BacklogFullError,
    BatchOptions,
    ClosedError,
    InvalidEventError,
    SSEManager,
    Text,
    UsageError,
    signals,
)
from sse_batcher.testing import Recording, record

from .kit.board import make_board
from .kit.process import AsProcess


def test_an_event_of_a_request_was_sent() -> None:
    board = make_board()
    with record(board.sse) as sent:
        assert board.client.post("/orders", json={"id": 7}).status_code == 200
        event = sent.assert_sent("order", {"id": 7}, channel="team-7")
        sent.assert_not_sent("invoice")
    assert (event.type, event.data, event.channel, event.users, event.user) == ("order", {"id": 7}, "team-7", (), None)
    assert list(sent) == [event] == sent[:]
    assert sent[0] is event
    assert len(sent) == 1


def test_no_thread_is_started() -> None:
    before = threading.active_count()
    board = make_board(SSE_MAX_CLIENTS=5)
    with record() as sent, signals.batch_flushed.connected_to(lambda sender, batch: None):
        board.client.post("/orders", json={"id": 7})
        sent.clock.advance(3_600)
        assert board.sse.manager.flush_all()
        assert threading.active_count() == before


def test_time_stands_still_and_nothing_is_delivered() -> None:
    manager = SSEManager()
    with record() as sent:
        manager.enqueue("order", 1)
        assert manager.get_stats().pending_events == 1
        assert manager.get_stats().batches == 0
        sent.clock.advance(0.1)
        assert manager.get_stats().batches == 1


def test_any_part_may_be_left_out() -> None:
    manager = SSEManager()
    with record(manager) as sent:
        manager.enqueue("order", {"id": 7, "lines": [{"sku": "a"}], "who": {"name": "ada", "age": 36}})
        manager.enqueue("row", Text("<td>ada</td>"), user=["ada", 7])
        manager.enqueue("list", [1, 2, 3], key="k")
        manager.broadcast("news", "hello")
    sent.assert_sent("order")
    sent.assert_sent("order", containing={"who": {"name": "ada"}})
    sent.assert_sent("order", containing={"lines": [{"sku": "a"}]}, channel="default", times=1)
    sent.assert_sent("row", Text("<td>ada</td>"), user="ada")
    sent.assert_sent("row", containing="ada", user=7)
    sent.assert_sent("list", containing=2, key="k")
    sent.assert_sent("news", "hello", channel="*")
    for arguments in [
        {"containing": {"who": {"name": "bob"}}},
        {"containing": {"id": 7, "more": 1}},
        {"channel": "team-7"},
        {"user": "ada"},
        {"key": 7},
    ]:
        sent.assert_not_sent("order", **arguments)
    sent.assert_not_sent("row", user="7")
    sent.assert_not_sent("list", key=1)
    sent.assert_not_sent("list", containing=True)
    sent.assert_not_sent("news", Text("hello"))


def test_a_user_of_the_wrong_type_does_not_pass_as_not_sent() -> None:
    manager = SSEManager()
    with record() as sent:
        manager.enqueue("order", 1, user=7)
        with pytest.raises(UsageError, match="'7' and 7 are two users, and it was sent to 7"):
            sent.assert_not_sent("order", user="7")
        sent.assert_not_sent("order", user="8")
        sent.assert_not_sent("order", 2, user="7")
        manager.enqueue("other", 1, user="ada")
        sent.assert_not_sent("order", user="7")  # the app has users of both types


def test_a_key_of_the_wrong_type_does_not_pass_as_not_sent() -> None:
    manager = SSEManager(batching=BatchOptions(dedup_key="id"))
    with record() as sent:
        manager.enqueue("price", {"eur": 1}, key=7)
        manager.enqueue("share", {"id": 7.0})
        manager.enqueue("row", Text("a"), key="a")  # each type may have keys of another type
        with pytest.raises(UsageError, match='"7" and 7 are two keys, and it was sent with 7'):
            sent.assert_not_sent("price", key="7")
        with pytest.raises(UsageError, match=r"7 and 7\.0 are two keys, and it was sent with 7\.0"):
            sent.assert_not_sent("share", key=7)
        with pytest.raises(AssertionError, match='with the key "7" was not sent'):
            sent.assert_sent("price", key="7")
        sent.assert_not_sent("price", key="8")
        sent.assert_not_sent("price", {"eur": 2}, key="7")
        sent.assert_not_sent("price", key="7", channel="team-7")
        manager.enqueue("price", {"eur": 1}, key="tea")
        sent.assert_not_sent("price", key="7")  # the app has keys of both types


def test_a_user_and_a_key_of_the_wrong_type_do_not_pass_as_not_sent() -> None:
    manager = SSEManager()
    with record() as sent:
        manager.enqueue("price", {"eur": 1}, key=7, user=8)
        with pytest.raises(UsageError, match="'8' and 8 are two users"):
            sent.assert_not_sent("price", key="7", user="8")
        sent.assert_not_sent("price", key="7", user="9")


def test_what_another_channel_got_was_not_sent_to_this_one() -> None:
    manager = SSEManager()
    with record() as sent:
        manager.enqueue("order", 1, channel="team-7")
        manager.enqueue("order", 1, user="ada")
        sent.assert_not_sent("order", channel="team-8")
        sent.assert_not_sent("order", channel="*")
        with pytest.raises(AssertionError, match="'order' to the channel 'team-7' was sent"):
            sent.assert_not_sent("order", channel="team-7")


def test_a_broadcast_was_sent_to_each_channel_and_user() -> None:
    manager = SSEManager()
    with record() as sent:
        manager.broadcast("order", 1)
        for audience in ({"channel": "team-7"}, {"user": "ada"}, {"channel": "*"}):
            with pytest.raises(AssertionError, match="was sent:\n  <'order' to all clients: 1>"):
                sent.assert_not_sent("order", **audience)
            sent.assert_not_sent("order", 2, **audience)
        sent.assert_sent("order", channel="*")
        with pytest.raises(AssertionError, match="'order' to the channel 'team-7' was not sent"):
            sent.assert_sent("order", channel="team-7")


def test_values_that_json_does_not_have_are_compared_as_they_are_sent() -> None:
    board = make_board()
    day = datetime.date(2026, 5, 1)
    with record() as sent:
        board.sse.enqueue("day", {"day": day, "pair": (1, 2)})
    sent.assert_sent("day", {"day": day, "pair": (1, 2)})
    sent.assert_sent("day", containing={"day": day})
    sent.assert_not_sent("day", {"day": datetime.date(2026, 5, 2), "pair": (1, 2)})


def test_what_dedup_replaces_is_recorded_with_a_mark() -> None:
    manager = SSEManager(batching=BatchOptions(dedup_key="id"))
    with record() as sent:
        for price in (1, 2):
            manager.enqueue("price", {"id": "x", "price": price})
        manager.enqueue("row", Text("a"), key=7)
        sent.clock.advance(0.1)
        manager.enqueue("row", Text("b"), key=7)
    assert [(event.data, event.key, event.replaced) for event in sent] == [
        ({"id": "x", "price": 1}, "x", True),
        ({"id": "x", "price": 2}, "x", False),
        ("a", 7, False),
        ("b", 7, False),  # of another window
    ]
    sent.assert_sent("price", {"id": "x", "price": 1})
    assert sent.assert_sent("price") is sent[1]  # the newest
    assert "replaced by a newer one" in repr(sent[0])


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda manager: manager.enqueue("order_batch", 1), InvalidEventError),
        (lambda manager: manager.enqueue("order", object()), InvalidEventError),
        (lambda manager: manager.enqueue("order", 1, user=None), InvalidEventError),
        (lambda manager: manager.enqueue("order", 1, channel="*"), InvalidEventError),
        (lambda manager: manager.enqueue("order", "x" * 2_000_000), InvalidEventError),
        (lambda manager: manager.shutdown() and manager.enqueue("order", 1), ClosedError),
    ],
)
def test_what_production_refuses_is_refused(call: Callable[[SSEManager], object], error: type[Exception]) -> None:
    manager = SSEManager()
    refused = []
    with record() as sent, signals.event_refused.connected_to(lambda sender, **values: refused.append(values)):
        with pytest.raises(error):
            call(manager)
        manager.get_stats()
    assert len(sent) == 0
    assert len(refused) == 1
    with pytest.raises(AssertionError, match=r"Nothing was sent\. 1 were refused"):
        sent.assert_sent("order")


def test_a_manager_that_was_shut_down_before_refuses_events() -> None:
    manager = SSEManager()
    manager.shutdown()
    with record(), pytest.raises(ClosedError):
        manager.enqueue("order", 1)


def test_a_test_without_time_has_no_backlog() -> None:
    manager = SSEManager(batching=BatchOptions(max_pending_bytes=10_000))
    with record() as sent:
        for number in range(100):
            manager.enqueue("order", "x" * 900 + str(number))
    assert len(sent) == 100
    with SSEManager(batching=BatchOptions(max_pending_bytes=10_000, batch_window=9)) as real:
        real.enqueue("order", "x" * 9_000)
        with pytest.raises(BacklogFullError):
            real.enqueue("order", "x" * 900)


def test_redis_is_not_asked() -> None:
    manager = SSEManager(backend="redis://127.0.0.1:1/0")
    with record() as sent:
        manager.enqueue("order", 1)
        assert manager.flush_all()
        assert manager.kick(user=7) == 0
    sent.assert_sent("order", 1)


# -- which managers ----------------------------------------------------------------------------------------------------


def test_managers_that_are_made_later_are_recorded_too() -> None:
    with record() as sent:
        board = make_board()
        board.client.post("/orders", json={"id": 7})
        SSEManager().enqueue("other", 1)
    assert [event.type for event in sent] == ["order", "other"]


def test_only_one_sse_or_one_manager_can_be_recorded() -> None:
    board, other = make_board(), SSEManager()
    received: list[str] = []
    other.enqueue("earlier", 1)
    with record(board.sse) as sent, other:
        with signals.batch_flushed.connected_to(lambda sender, batch: received.append(batch.type), sender=other):
            other.enqueue("real", 1)
            board.sse.enqueue("order", 1)
            assert other.flush_all()
            assert other.get_stats().enqueued == 2  # it goes on as it was
            assert other.shutdown()
    assert [event.type for event in sent] == ["order"]
    assert received[-1] == "real"


def test_blocks_may_be_nested() -> None:
    manager, other = SSEManager(), SSEManager()
    with record(manager) as outer:
        manager.enqueue("a", 1)
        with record() as inner:
            manager.enqueue("b", 1)
            other.enqueue("c", 1)
        manager.enqueue("d", 1)
        assert manager.get_stats().enqueued == 3  # the outer block goes on as it was
    assert [event.type for event in outer] == ["a", "b", "d"]
    assert [event.type for event in inner] == ["b", "c"]


def test_everything_is_undone_after_an_error() -> None:
    with SSEManager() as manager:
        stream = manager.subscribe()
        next(stream)
        with pytest.raises(InvalidEventError), record() as sent:
            manager.enqueue("recorded", 1) or manager.enqueue("refused_batch", 1)
        manager.enqueue("delivered", 2)
        assert b"event: delivered\ndata: 2\n" in next(stream)
        assert len(sent) == 1


def test_all_threads_are_recorded() -> None:
    manager = SSEManager()

    def send(name: str) -> None:
        for number in range(200):
            manager.enqueue(name, number)

    with record() as sent:
        threads = [threading.Thread(target=send, args=(f"t{number}",)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stats = manager.get_stats()
    assert len(sent) == stats.enqueued == 800
    for number in range(4):
        assert [event.data for event in sent if event.type == f"t{number}"] == list(range(200))


def test_a_forked_child_delivers_as_usual(as_process: AsProcess) -> None:
    manager = SSEManager()
    received: SimpleQueue[str] = SimpleQueue()
    with record() as sent, signals.batch_flushed.connected_to(lambda sender, batch: received.put(batch.type)):
        manager.enqueue("parent", 1)
        with as_process(os.getpid() + 1):
            manager.enqueue("child", 1)
            assert manager.shutdown()
    assert received.get_nowait() == "child"
    assert [event.type for event in sent] == ["parent"]


def test_receivers_of_signals_run_in_the_test() -> None:
    manager = SSEManager()
    batches, flushed = [], []

    def receive(sender: SSEManager, batch: Any) -> None:
        batches.append(batch.type)
        if batch.type == "order":
            sender.enqueue("answer", 1)
            flushed.append(sender.flush_all())

    with record() as sent, signals.batch_flushed.connected_to(receive):
        manager.enqueue("order", 1)
        sent.clock.advance(0.1)
    assert batches == ["order", "answer"]
    assert flushed == [True]


# -- messages ----------------------------------------------------------------------------------------------------------


def message(sent: Recording, *args: Any, **options: Any) -> str:
    with pytest.raises(AssertionError) as caught:
        sent.assert_sent(*args, **options)
    return str(caught.value)


def test_a_failed_assertion_shows_what_was_sent_the_nearest_first() -> None:
    manager = SSEManager()
    with record() as sent:
        manager.enqueue("invoice", {"id": 7})
        manager.enqueue("order", {"id": 8}, channel="team-8")
        manager.enqueue("order", {"id": 6}, channel="team-7")
        manager.enqueue("order", Text("7"), user=7)
    assert message(sent, "order", {"id": 7}, channel="team-7").splitlines() == [
        "'order' with the data {'id': 7} to the channel 'team-7' was not sent. This was sent, the nearest first:",
        "  <'order' to the channel 'team-7': {'id': 6}>",
        "  <'order' to the channel 'team-8': {'id': 8}>",
        "  <'order' to the user 7: Text '7'>",
        "  <'invoice' to the channel 'default': {'id': 7}>",
    ]
    assert "'order' was sent 3 times, not 1." in message(sent, "order", times=1)
    assert "'ordr' was not sent. This was sent, the nearest first:\n  <'order'" in message(sent, "ordr")
    assert "'order' with the data Text '8' was not sent." in message(sent, "order", Text("8"))
    assert "'order' containing Text '8' was not sent." in message(sent, "order", containing=Text("8"))
    with pytest.raises(AssertionError, match=r"'invoice' was sent:\n  <'invoice' to the channel 'default'"):
        sent.assert_not_sent("invoice")


def test_a_long_message_is_cut() -> None:
    manager = SSEManager()
    with record() as sent:
        for number in range(30):
            manager.enqueue("log", "x" * 5_000, key=number)
    text = message(sent, "order")
    assert text.endswith("... and 20 more")
    assert len(text) < 5_000


def test_nothing_was_sent() -> None:
    with record() as sent:
        assert message(sent, "order") == "'order' was not sent. Nothing was sent."


@pytest.mark.parametrize(
    ("arguments", "options", "text"),
    [
        (("order", 1), {"containing": 1}, "give one of them"),
        (("order",), {"channel": "a", "user": 7}, "never both"),
        (("order_batch",), {}, "the type 'order_batch' is reserved"),
        (("",), {}, "no event can be like that"),
        (("order",), {"channel": ["a"]}, "the channel must be a string"),
        (("order",), {"user": None}, "user is None"),
        (("order",), {"key": 1.5}, "a key is a str or an int"),
        (("order",), {"times": 0}, "call assert_not_sent"),
    ],
)
def test_wrong_uses_are_explained(arguments: Any, options: Any, text: str) -> None:
    with record() as sent, pytest.raises(UsageError, match=text):
        sent.assert_sent(*arguments, **options)


@pytest.mark.parametrize("seconds", [-1, "1", None, float("nan"), float("inf"), True])
def test_time_passes_by_a_number_of_seconds(seconds: Any) -> None:
    with record() as sent, pytest.raises(UsageError, match="time passes by a number of seconds"):
        sent.clock.advance(seconds)


def test_what_cannot_be_recorded_is_refused() -> None:
    with pytest.raises(UsageError, match="takes an SSE or an SSEManager"), record("orders"):
        pass


def test_clear_forgets_what_was_sent() -> None:
    with record() as sent:
        SSEManager().enqueue("order", 1)
        sent.clear()
        assert len(sent) == 0


class UnittestTest(unittest.TestCase):
    """The kit in a test of `unittest`."""

    def setUp(self) -> None:
        self.board = make_board()
        self.sent = self.enterContext(record(self.board.sse))

    def test_an_event_is_recorded(self) -> None:
        self.board.sse.enqueue("order", {"id": 7})
        self.sent.assert_sent("order", {"id": 7})
        assert len(self.sent) == 1
