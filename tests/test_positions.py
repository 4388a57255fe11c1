"""Positions: a client goes live, or falls behind. Each race between the two is forced."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from sse_batcher import BatchOptions, Client, HistoryOptions, SSEManager
from sse_batcher.manager_state import process_of
from sse_batcher.runtime.locks import is_mine, new_lock
from sse_batcher.streams.client import QueueClient
from sse_batcher.wire import HEARTBEAT, Frame

from .kit.delivery import Delivery, MeetingLock, MeetingQueue, Queues, drive, just_after, just_before, numbers, take
from .kit.threads import in_thread
from .kit.waiting import TIMEOUT

GAP = {"heartbeat": 15.0}


# -- registering and reading -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cursor", [None, "x-1"])
def test_a_frame_that_waits_for_the_lock_while_a_client_registers_reaches_it(cursor: str | None) -> None:
    lock = MeetingLock()
    delivery = Delivery(heartbeat=0.01, lock=lock)
    delivery.deliver()
    late = threading.Thread(target=delivery.deliver, daemon=True)

    def meet() -> None:  # the lock is held, and the client neither registered nor has it looked where the head is
        lock.asked.clear()
        late.start()
        assert lock.asked.wait(TIMEOUT)

    lock.meet(meet)
    client = delivery.connect(cursor=cursor)
    late.join(TIMEOUT)
    delivery.deliver()
    assert [id for _, _, id in take(client, 3)] == ["x-1", "x-2", "x-3"]
    assert next(client) == HEARTBEAT


@pytest.mark.parametrize("moment", ["while the lock is held", "as soon as it is released"])
def test_a_client_that_registers_while_a_frame_is_kept_is_listed_or_stands_after_it(moment: str) -> None:
    lock = MeetingLock()
    delivery = Delivery(lock=lock)
    clients: list[Client] = []
    comer = threading.Thread(target=lambda: clients.append(delivery.connect()), daemon=True)

    def come() -> None:
        lock.asked.clear()
        comer.start()
        assert lock.asked.wait(TIMEOUT)

    if moment == "while the lock is held":
        lock.meet(come)
    else:
        lock.meet_after(lambda: (come(), comer.join(TIMEOUT)))
    delivery.deliver()
    comer.join(TIMEOUT)
    delivery.deliver()
    (client,) = clients
    (_, _, id), (_, data, _) = take(client, 2)
    assert id == f"x-{data - 1}"


def test_a_frame_that_comes_between_registering_and_reading_is_read_once() -> None:
    delivery = Delivery()
    delivery.deliver(2)
    client = delivery.connect(cursor="x-1")
    delivery.deliver()  # the client is registered, and has read nothing yet
    next(client)
    delivery.deliver()
    assert numbers(client, 3) == [2, 3, 4]
    delivery.deliver()
    assert numbers(client, 1) == [5]


def test_a_frame_that_comes_just_before_the_last_look_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    delivery = Delivery(heartbeat=0.01)
    delivery.deliver()
    client = delivery.connect(cursor="x-0")
    next(client)
    assert numbers(client, 1) == [1]
    just_before(monkeypatch, delivery.hub, "advance", lambda: in_thread(delivery.deliver))
    assert numbers(client, 1) == [2]
    assert next(client) == HEARTBEAT


def test_a_frame_that_comes_just_after_the_last_look_is_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    delivery = Delivery(heartbeat=0.01)
    delivery.deliver()
    client = delivery.connect(cursor="x-0")
    next(client)
    assert numbers(client, 1) == [1]
    just_after(monkeypatch, delivery.hub, "advance", lambda: in_thread(delivery.deliver))
    assert numbers(client, 1) == [2]
    assert next(client) == HEARTBEAT


def test_a_client_that_goes_live_between_the_listing_and_the_queueing_gets_the_frame_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lock = new_lock()
    queues = Queues()
    delivery = Delivery(heartbeat=0.01, lock=lock, make_queue=queues)
    first = delivery.connect()
    client = delivery.connect(cursor="x-0")
    client.fall_behind()
    next(client)
    got: list[int] = []

    def go_live() -> None:
        # The frame is in the history, the client is listed, and nothing is queued for it.
        assert not is_mine(lock)
        in_thread(lambda: got.extend(numbers(client, 1)))
        assert next(client) == HEARTBEAT  # it is live

    just_before(monkeypatch, first, "offer", go_live)
    delivery.deliver()
    assert queues[1].qsize() == 1  # the overlap
    delivery.deliver()
    assert got + numbers(client, 1) == [1, 2]


# -- full queues -------------------------------------------------------------------------------------------------------


def overflowing(queue: MeetingQueue | None = None, **options: Any) -> tuple[Delivery, QueueClient]:
    """A live client whose queue of two is full."""
    delivery = Delivery(queue_frames=2, heartbeat=0.01, make_queue=lambda: queue or MeetingQueue(), **options)
    client = delivery.connect()
    next(client)
    delivery.deliver(2)
    return delivery, client


@pytest.mark.parametrize("taken", [1, 2])
def test_a_driver_that_drains_a_queue_found_full_gets_everything_once(
    monkeypatch: pytest.MonkeyPatch, taken: int
) -> None:
    delivery, client = overflowing()
    got: list[int] = []
    just_before(monkeypatch, client, "fall_behind", lambda: in_thread(lambda: got.extend(numbers(client, taken))))
    delivery.deliver()
    delivery.deliver()
    assert got + numbers(client, 4 - taken) == [1, 2, 3, 4]
    assert next(client) == HEARTBEAT


def test_a_driver_that_is_live_again_before_the_queue_is_emptied_gets_everything_once() -> None:
    queue = MeetingQueue()
    delivery, client = overflowing(queue)
    got: list[int] = []

    def meet() -> None:
        in_thread(lambda: got.extend(numbers(client, 3)))
        assert next(client) == HEARTBEAT

    queue.meet_before_look(meet)
    delivery.deliver()
    delivery.deliver(2)
    assert got + numbers(client, 2) == [1, 2, 3, 4, 5]


def test_a_driver_that_waits_for_the_queue_when_its_client_falls_behind_is_woken() -> None:
    queue = MeetingQueue()
    delivery = Delivery(queue_frames=2, heartbeat=3600.0, make_queue=lambda: queue)
    client = delivery.connect()
    next(client)
    queue.meet_before_wait(lambda: delivery.deliver(3))  # the driver has seen that it is live, and the queue empty
    assert in_thread(numbers, client, 3) == [1, 2, 3]


def test_two_threads_and_a_tiny_queue_lose_nothing_and_change_no_order() -> None:
    delivery = Delivery(queue_frames=2)
    client = delivery.connect()
    got: list[int] = []

    def drain() -> None:
        next(client)
        while len(got) < 3_000:
            got.extend(numbers(client, 1))

    driver = threading.Thread(target=drain, daemon=True)
    driver.start()
    delivery.deliver(3_000)
    driver.join(TIMEOUT * 3)
    assert got == list(range(1, 3_001))
    assert delivery.hub.count()["gaps"] == 0


# -- ends and kicks ----------------------------------------------------------------------------------------------------


def ends(client: Client, count: int) -> list[str]:
    got = [event for event, _, _ in take(client, count)]
    assert list(client) == []
    return got


def test_an_end_on_a_full_queue_comes_after_what_is_queued() -> None:
    _, client = overflowing()
    client.end("shutdown")
    assert ends(client, 3) == ["t", "t", "sse_bye"]


def test_an_end_while_behind_comes_after_what_the_history_has() -> None:
    delivery, client = overflowing()
    delivery.deliver(4)
    assert numbers(client, 1) == [1]
    client.end("shutdown")
    assert ends(client, 6) == ["t"] * 5 + ["sse_bye"]


def test_an_end_while_behind_what_is_gone_comes_after_the_gap() -> None:
    delivery, client = overflowing(history=HistoryOptions(history_frames=2))
    delivery.deliver(4)
    client.end("shutdown")
    assert ends(client, 2) == ["sse_gap", "sse_bye"]


def test_an_end_that_comes_while_the_queue_of_a_live_client_is_emptied_ends_the_stream() -> None:
    queue = MeetingQueue()
    delivery, client = overflowing(queue)

    def meet() -> None:
        in_thread(lambda: numbers(client, 3))
        assert next(client) == HEARTBEAT  # live again, while the delivering thread is still about to empty the queue
        client.end("shutdown")

    queue.meet_before_look(meet)
    delivery.deliver()
    assert [event for event, _, _ in take(client, 1)] == ["sse_bye"]


def test_an_end_just_before_the_client_goes_live_ends_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    delivery, client = overflowing()
    delivery.deliver()
    assert numbers(client, 3) == [1, 2, 3]
    just_before(monkeypatch, client, "go_live", lambda: client.end("kicked"))
    assert take(client, 1) == [("sse_bye", {"reason": "kicked"}, "x-3")]


def test_an_end_just_after_the_client_went_live_ends_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    delivery, client = overflowing()
    delivery.deliver()
    assert numbers(client, 3) == [1, 2, 3]
    just_after(monkeypatch, client, "go_live", lambda: client.end("kicked"))
    assert ends(client, 1) == ["sse_bye"]


@pytest.mark.parametrize("further", [0, 1, 10], ids=["full", "just behind", "behind"])
def test_a_kick_ends_the_stream_at_once(further: int) -> None:
    delivery, client = overflowing()
    delivery.deliver(further)
    client.close()
    delivery.deliver(5)
    assert list(client) == []
    assert delivery.left == [(1, "left")]


def test_a_kick_while_the_queue_is_emptied_wakes_a_driver_that_waits() -> None:
    queue, waits = MeetingQueue(), threading.Event()
    delivery = Delivery(queue_frames=2, heartbeat=3600.0, make_queue=lambda: queue)
    queue.meet_before_wait(waits.set)
    client = delivery.connect()
    blocks = drive(client)
    assert b"sse_open" in blocks.get(timeout=TIMEOUT)
    assert waits.wait(TIMEOUT)  # it does not look at the queue without waiting any more
    queue.meet_before_look(client.close)
    client.fall_behind()
    assert blocks.get(timeout=TIMEOUT) == b"the end"


# -- evictions ---------------------------------------------------------------------------------------------------------


def test_an_eviction_between_two_slices_is_a_gap() -> None:
    delivery = Delivery(HistoryOptions(history_frames=6), queue_frames=2)
    client = delivery.connect(cursor="x-0")
    client.fall_behind()
    next(client)
    delivery.deliver(4)
    assert numbers(client, 2) == [1, 2]  # a slice
    delivery.deliver(5)  # 3 is gone
    assert take(client, 1) == [("sse_gap", GAP | {"reason": "overflow"}, "x-9")]
    delivery.deliver()
    assert numbers(client, 1) == [10]


def test_an_eviction_inside_a_slice_is_a_gap_after_what_was_handed_out() -> None:
    delivery = Delivery(HistoryOptions(history_frames=3))
    delivery.deliver(3)
    client = delivery.connect(cursor="x-0")
    next(client)
    assert numbers(client, 1) == [1]
    delivery.deliver(2)  # 2 is gone, which is in the slice, and 3 is still here
    assert take(client, 1) == [("sse_gap", GAP | {"reason": "overflow"}, "x-5")]
    delivery.deliver()
    assert numbers(client, 1) == [6]


def test_an_eviction_of_what_a_client_has_already_is_no_gap() -> None:
    delivery = Delivery(HistoryOptions(history_frames=3))
    delivery.deliver(3)
    client = delivery.connect(cursor="x-0")
    next(client)
    assert numbers(client, 2) == [1, 2]
    delivery.deliver(2)
    assert numbers(client, 3) == [3, 4, 5]


def test_an_eviction_of_a_queued_frame_is_a_gap_and_never_a_hole() -> None:
    delivery = Delivery(HistoryOptions(history_frames=3))
    client = delivery.connect()
    next(client)
    delivery.deliver(4)  # all are queued, and 1 is gone
    assert not client.behind
    assert take(client, 1) == [("sse_gap", GAP | {"reason": "overflow"}, "x-4")]
    delivery.deliver()
    assert numbers(client, 1) == [5]
    assert delivery.hub.count()["gaps"] == 1


def test_a_frame_that_is_queued_while_its_elder_is_found_evicted_comes_once() -> None:
    queue = MeetingQueue()
    delivery = Delivery(HistoryOptions(history_frames=3), heartbeat=0.01, make_queue=lambda: queue)
    client = delivery.connect()
    next(client)
    delivery.deliver(4)
    queue.meet_when_empty(lambda: in_thread(delivery.deliver))
    assert [(event, id) for event, _, id in take(client, 1)] == [("sse_gap", "x-5")]
    delivery.deliver()
    assert numbers(client, 1) == [6]
    assert next(client) == HEARTBEAT


# -- a publish that fails ----------------------------------------------------------------------------------------------


def test_a_live_client_is_told_of_a_lost_frame_and_goes_on() -> None:
    delivery = Delivery()
    client = delivery.connect()
    other = delivery.connect("other")
    next(client), next(other)
    delivery.deliver()
    assert numbers(client, 1) == [1]
    lose(delivery)
    assert take(client, 1) == [("sse_gap", GAP | {"reason": "publish_failed"}, "x-2")]
    delivery.deliver()
    assert numbers(client, 1) == [3]
    delivery.deliver(channel="other")
    assert numbers(other, 1) == [4]  # nothing of its own was lost
    assert delivery.hub.count()["gaps"] == 1


def lose(delivery: Delivery, channel: str = "default") -> None:
    delivery.position += 1
    delivery.hub.lose(channel, delivery.position)


def test_a_client_that_is_behind_is_told_of_a_lost_frame() -> None:
    delivery, client = overflowing()
    delivery.deliver(2)
    lose(delivery)
    delivery.deliver()
    assert take(client, 1) == [("sse_gap", {"heartbeat": 0.01, "reason": "publish_failed"}, "x-6")]


def test_a_client_that_reads_the_history_just_after_a_frame_was_lost_is_told_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    delivery, _ = overflowing()
    delivery.deliver(2)
    told = []

    def read(client: Client) -> None:  # the delivering thread has told the history, and none of the clients
        told.append(take(client, 1))

    monkeypatch.setattr(QueueClient, "fall_behind", read)
    lose(delivery)
    assert told == [[("sse_gap", {"heartbeat": 0.01, "reason": "publish_failed"}, "x-5")]]


@pytest.mark.parametrize(("cursor", "first"), [("x-1", "sse_gap"), ("x-2", "sse_open")])
def test_a_client_that_returns_is_told_of_a_lost_frame_that_it_has_missed(cursor: str, first: str) -> None:
    delivery = Delivery()
    delivery.deliver()
    lose(delivery)
    delivery.deliver()
    assert [event for event, _, _ in take(delivery.connect(cursor=cursor), 1)] == [first]


def test_a_client_that_returns_is_told_of_a_lost_frame_though_older_ones_were_evicted_since() -> None:
    delivery = Delivery(HistoryOptions(history_frames=2))
    delivery.deliver(2)
    lose(delivery)
    delivery.deliver(2)
    assert [event for event, _, _ in take(delivery.connect(cursor="x-2"), 1)] == ["sse_gap"]


def test_a_lost_broadcast_is_told_to_all() -> None:
    delivery = Delivery()
    clients = [delivery.connect(name) for name in ("a", "b")]
    lose(delivery, "*")
    assert [[event for event, _, _ in take(client, 2)] for client in clients] == [["sse_open", "sse_gap"]] * 2


def test_a_batch_that_cannot_be_delivered_is_counted_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with SSEManager(batching=BatchOptions(max_batch_size=1)) as manager:
        client = manager.subscribe()
        next(client)
        hub = process_of(manager).hub
        monkeypatch.setattr(hub, "deliver", failing)
        manager.enqueue("t", 1)
        manager.flush_all(TIMEOUT)
        monkeypatch.undo()
        manager.enqueue("t", 2)
        ((event, data, id),) = take(client, 1)
        assert (event, data["reason"]) == ("sse_gap", "publish_failed")
        assert id.endswith(("-1", "-2"))
        if id.endswith("-1"):
            assert numbers(client, 1) == [2]
        assert manager.get_stats().failed == 1


def failing(frame: Frame) -> None:
    raise RuntimeError("out of order")
