"""Slow clients: they fall behind, read on in the history, delay no other client, and hold nothing."""

from __future__ import annotations

import gc
import threading
from queue import SimpleQueue
from typing import Any
from weakref import ref

import pytest

from sse_batcher import HistoryOptions
from sse_batcher.wire import HEARTBEAT, Frame

from .kit.delivery import Delivery, Queues, numbers, take
from .kit.threads import in_thread
from .kit.waiting import TIMEOUT

# -- what a client that is slow gets -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", [{"queue_frames": 3}, {"queue_bytes": 60}], ids=str)
def test_a_client_that_overflows_reads_the_history_and_is_live_again(bound: dict[str, int]) -> None:
    delivery = Delivery(**bound, heartbeat=0.01)
    client = delivery.connect()
    next(client)
    delivery.deliver(10)
    assert numbers(client, 10) == list(range(1, 11))
    assert next(client) == HEARTBEAT  # nothing more to read, so it is live
    delivery.deliver(2)
    assert not client.behind
    assert numbers(client, 2) == [11, 12]
    counts = delivery.hub.count()
    assert (counts["overflows"], counts["gaps"]) == (1, 0)


@pytest.mark.parametrize("bound", [{"queue_frames": 3}, {"queue_bytes": 60}], ids=str)
def test_a_client_that_falls_behind_the_history_is_told_and_goes_on_from_there(bound: dict[str, int]) -> None:
    delivery = Delivery(HistoryOptions(history_frames=5), **bound)
    client = delivery.connect()
    next(client)
    delivery.deliver(10)
    assert take(client, 1) == [("sse_gap", {"heartbeat": 15.0, "reason": "overflow"}, "x-10")]
    delivery.deliver(2)
    assert numbers(client, 2) == [11, 12]
    counts = delivery.hub.count()
    assert (counts["overflows"], counts["gaps"]) == (1, 1)


def test_a_full_queue_without_overflow_loses_nothing() -> None:
    delivery = Delivery(queue_frames=3)
    client = delivery.connect()
    next(client)
    for n in range(0, 30, 3):
        delivery.deliver(3)
        assert numbers(client, 3) == [n + 1, n + 2, n + 3]


def test_one_frame_larger_than_the_bound_is_queued_all_the_same() -> None:
    delivery = Delivery(queue_bytes=10)
    client = delivery.connect()
    next(client)
    delivery.deliver(data="x" * 100)
    assert numbers(client, 1) == ["x" * 100]


def test_a_slow_client_holds_nothing_while_it_is_behind() -> None:
    queue: SimpleQueue[Any] = SimpleQueue()
    delivery = Delivery(queue_frames=3, make_queue=lambda: queue)
    delivery.connect()
    delivery.deliver(10)
    assert queue.qsize() == 1  # the marker


def test_a_frame_taken_while_the_queue_is_being_emptied_is_read_from_the_history_in_its_turn() -> None:
    # The driver is about to take from the queue when the delivering thread begins to empty it, and gets the second
    # frame. Were that sent, the client's cursor would say that it has the first one, too.
    asking, may_take, taken = threading.Event(), threading.Event(), threading.Event()

    class Queue(SimpleQueue[Any]):
        def get_nowait(self) -> Any:
            if threading.current_thread() is driver and not taken.is_set():
                asking.set()
                assert may_take.wait(TIMEOUT)
                frame = super().get_nowait()
                taken.set()
                return frame
            if threading.current_thread() is not driver and not may_take.is_set():
                super().get_nowait()  # frame 1 is gone ...
                may_take.set()  # ... and the driver gets frame 2
                assert taken.wait(TIMEOUT)
            return super().get_nowait()

    delivery = Delivery(queue_frames=3, make_queue=Queue)
    client = delivery.connect()
    next(client)
    delivery.deliver(3)
    got: list[int] = []
    driver = threading.Thread(target=lambda: got.extend(numbers(client, 4)))
    driver.start()
    assert asking.wait(TIMEOUT)
    delivery.deliver()
    driver.join(TIMEOUT)
    assert got == [1, 2, 3, 4]


def test_a_queued_frame_that_the_history_evicts_counts_as_an_overflow() -> None:
    delivery = Delivery(HistoryOptions(history_frames=1))
    client = delivery.connect()
    next(client)
    delivery.deliver(2)
    assert take(client, 1) == [("sse_gap", {"heartbeat": 15.0, "reason": "overflow"}, "x-2")]
    assert (client.counts.overflows, client.counts.gaps) == (1, 1)
    delivery.deliver(2)
    assert take(client, 1) == [("sse_gap", {"heartbeat": 15.0, "reason": "overflow"}, "x-4")]
    assert (client.counts.overflows, client.counts.gaps) == (2, 2)


def test_a_queue_takes_exactly_its_bound_of_bytes_and_again_after_it_was_emptied() -> None:
    size = len(Delivery().frame("x").plain)
    delivery = Delivery(queue_bytes=3 * (size + 2), heartbeat=0.01)
    delivery.position = 100  # so that all ids have the same length, two more than the first
    client = delivery.connect()
    next(client)

    def overflows() -> int:
        return client.counts.overflows

    delivery.deliver(3, "x")
    assert overflows() == 0
    take(client, 2)
    delivery.deliver(2, "x")
    assert overflows() == 0
    delivery.deliver(1, "x")
    assert overflows() == 1
    take(client, 4)
    assert next(client) == HEARTBEAT  # live again
    delivery.deliver(3, "x")
    assert overflows() == 1
    delivery.deliver(1, "x")
    assert overflows() == 2


def test_an_end_that_meets_an_overflow_is_told_after_all_frames() -> None:
    delivery = Delivery(queue_frames=3)
    client = delivery.connect()
    next(client)
    delivery.deliver(3)
    client.end("shutdown")  # its marker is thrown away with the queue
    delivery.deliver()
    assert [event for event, _, _ in take(client, 5)] == ["t", "t", "t", "t", "sse_bye"]
    assert list(client) == []


def test_one_slow_client_does_not_touch_another() -> None:
    delivery = Delivery(queue_frames=3)
    slow, quick = delivery.connect(), delivery.connect()
    next(quick)
    got = []
    for _ in range(20):
        delivery.deliver()
        got += numbers(quick, 1)
    assert got == list(range(1, 21))
    assert (slow.counts.overflows, quick.counts.overflows) == (1, 0)


# -- what it holds -----------------------------------------------------------------------------------------------------


def test_a_thousand_stalled_readers_pin_no_more_than_the_history() -> None:
    delivery = Delivery(HistoryOptions(history_frames=50), queue_frames=20)
    clients = [delivery.connect() for _ in range(1_000)]
    for client in clients[::2]:
        next(client)
    born: list[ref[Frame]] = []
    for number in range(1_000):
        frame = delivery.frame()
        born.append(ref(frame))
        delivery.hub.deliver(frame)
        del frame
        if number == 10:
            for client in clients[::4]:
                next(client)  # some have a frame in their hands, or read the history
    gc.collect()
    assert sum(frame() is not None for frame in born) == 50
    for client in clients[::100]:
        got = [event for event, _, _ in take(client, 1)]
        while got[-1] not in {"sse_gap", "t"}:
            got += [event for event, _, _ in take(client, 1)]
        assert got[-1] == "sse_gap"


def test_a_client_in_the_middle_of_a_slice_pins_nothing() -> None:
    delivery = Delivery(HistoryOptions(history_frames=10))
    frames = [delivery.frame() for _ in range(10)]
    born = [ref(frame) for frame in frames]
    while frames:
        delivery.hub.deliver(frames.pop(0))
    client = delivery.connect(cursor="x-0")
    next(client)
    assert numbers(client, 1) == [1]
    delivery.deliver(10)
    gc.collect()
    assert [frame() for frame in born] == [None] * 10


def test_one_stalled_reader_among_a_hundred_holds_up_nobody() -> None:
    queues = Queues()
    delivery = Delivery(queue_frames=10, make_queue=queues)
    stalled = delivery.connect()
    others = [delivery.connect() for _ in range(99)]
    for client in (stalled, *others):
        next(client)
    delivered: list[int] = []

    def publish() -> None:
        for number in range(1, 101):
            delivery.deliver()
            delivered.append(number)
            for client in others:
                assert numbers(client, 1) == [number]

    in_thread(publish)  # no client ever waits for the one that takes nothing
    assert len(delivered) == 100
    assert [client.counts.overflows for client in others] == [0] * 99
    assert stalled.counts.overflows == 1
    assert queues[0].qsize() == 1
    assert numbers(stalled, 100) == delivered  # and it has missed nothing, as long as the history goes back
    assert delivery.hub.count()["gaps"] == 0
