"""Positions: live and behind, each race between the two forced; clients that stall, return, or come with anything."""

from __future__ import annotations

import gc
import json
import threading
from collections.abc import Iterator
from typing import Any
from weakref import ref

import pytest

from sse_batcher import BatchOptions, Client, HistoryOptions, SSEManager, stream
from sse_batcher.event import Batch, Event
from sse_batcher.manager import process_of
from sse_batcher.runtime.locks import is_mine, new_lock
from sse_batcher.streams.client import QueueClient
from sse_batcher.wire import HEARTBEAT, Frame

from .kit.delivery import Delivery, MeetingLock, MeetingQueue, Queues, drive, just_after, just_before, numbers, take
from .kit.scripts import run
from .kit.sse_parser import EventStreamParser, parse
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


# -- cursors -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def full() -> Iterator[tuple[SSEManager, str]]:
    """A manager whose history of five has 6 to 10, and its epoch."""
    with SSEManager(batching=BatchOptions(max_batch_size=1), history=HistoryOptions(history_frames=5)) as manager:
        for number in range(1, 11):
            manager.enqueue("t", number)
        assert manager.flush_all(TIMEOUT)
        yield manager, manager.cursor().partition("-")[0]


@pytest.mark.parametrize(
    ("cursor", "first", "then"),
    [
        ("{epoch}-6", "sse_open", [7, 8, 9, 10, 11]),  # the oldest
        ("{epoch}-5", "sse_open", [6, 7, 8, 9, 10, 11]),  # oldest - 1, which is the floor
        ("{epoch}-4", "too_old", [11]),
        ("{epoch}-0", "too_old", [11]),
        ("{epoch}-9", "sse_open", [10, 11]),
        ("{epoch}-10", "sse_open", [11]),  # the head
        ("{epoch}-11", "malformed", [11]),  # the future
        ("{epoch}-9999999999999999999", "malformed", [11]),
        ("00000000-7", "epoch", [11]),
        ("{epoch}-7-7", "malformed", [11]),
        ("{epoch}-6.1", "sse_open", [7, 8, 9, 10, 11]),
        ("{epoch}-5.1", "too_old", [11]),  # its rest is gone
        ("x" * 10_240, "malformed", [11]),
        ("{epoch}-" + "7" * 10_240, "malformed", [11]),
        ("\xff\xfe\x00", "malformed", [11]),
        ("é".encode().decode("latin-1"), "malformed", [11]),
    ],
    ids=[
        "oldest",
        "oldest - 1",
        "below the floor",
        "the start",
        "head - 1",
        "head",
        "future",
        "far future",
        "another epoch",
        "malformed",
        "all parts",
        "a part that is gone",
        "10 kB",
        "10 kB of digits",
        "not UTF-8",
        "not ASCII",
    ],
)
def test_each_cursor_is_honoured_or_told_and_then_the_stream_goes_on(
    full: tuple[SSEManager, str], cursor: str, first: str, then: list[int]
) -> None:
    manager, epoch = full
    environ = {"REQUEST_METHOD": "GET", "HTTP_LAST_EVENT_ID": cursor.replace("{epoch}", epoch)}
    chunks = iter(stream(manager, environ)[2])
    parser = EventStreamParser(strict=True)
    (opening,) = parser.feed(next(chunks))
    told = opening.json.get("reason", opening.type)
    assert told == first
    assert opening.id == (environ["HTTP_LAST_EVENT_ID"] if first == "sse_open" else f"{epoch}-10")
    manager.enqueue("t", 11)
    events = []
    while len(events) < len(then):
        events += parser.feed(next(chunks))
    assert [event.json for event in events] == then
    chunks.close()  # type: ignore[attr-defined]


def test_a_cursor_from_before_a_restart_is_a_gap_and_the_new_one_is_not() -> None:
    with SSEManager() as manager:
        old = manager.cursor()
    with SSEManager() as manager:
        ((event, data, new),) = take(manager.subscribe(last_event_id=old), 1)
        assert (event, data["reason"]) == ("sse_gap", "epoch")
        assert new == manager.cursor() != old
        assert [event for event, _, _ in take(manager.subscribe(last_event_id=new), 1)] == ["sse_open"]


def test_a_cursor_from_before_a_fork_is_a_gap_in_the_child_and_none_in_the_parent() -> None:
    out = run(
        """
    manager = SSEManager(batching=False)
    manager.enqueue("t", 1)
    assert manager.flush_all(10)
    cursor = manager.cursor()
    def first():
        manager.enqueue("t", 2)
        assert manager.flush_all(10)
        client = manager.subscribe(last_event_id=cursor)
        block = next(client).decode()
        client.close()
        return block
    pid = os.fork()
    if pid == 0:
        block = first()
        ok = "sse_gap" in block and '"epoch"' in block and cursor.partition("-")[0] not in block
        os._exit(0 if ok else 1)
    assert os.waitpid(pid, 0)[1] == 0
    print(first().splitlines()[0])
    """
    )
    assert out == "event: sse_open\n"


# -- in the middle of a batch ------------------------------------------------------------------------------------------


def batch_of(delivery: Delivery, size: int) -> None:
    delivery.position += 1
    events = tuple(Event("t", "default", json.dumps(number)) for number in range(1, size + 1))
    batch = Batch("default", "t", events, "time_window", 0)
    delivery.hub.deliver(Frame(batch, delivery.position, f"x-{delivery.position}"))


def test_without_batches_each_event_has_a_block_and_an_id_that_says_how_many_have_arrived() -> None:
    delivery = Delivery()
    client = delivery.hub.connect(("default",), batches=False)
    next(client)
    batch_of(delivery, 4)
    delivery.deliver(data="alone")
    assert [(event.json, event.id) for event in parse(next(client) + next(client))] == [
        (1, "x-1.1"),
        (2, "x-1.2"),
        (3, "x-1.3"),
        (4, "x-1"),
        ("alone", "x-2"),
    ]


@pytest.mark.parametrize("batches", [True, False])
@pytest.mark.parametrize("part", [1, 2, 3])
@pytest.mark.parametrize("newest", [True, False])
def test_a_client_that_was_cut_inside_a_batch_gets_the_rest_as_plain_events(
    part: int, batches: bool, newest: bool
) -> None:
    delivery = Delivery()
    batch_of(delivery, 4)
    if not newest:
        delivery.deliver(data=5)
    client = delivery.hub.connect(("default",), f"x-1.{part}", batches=batches)
    assert [(event, id) for event, _, id in take(client, 1)] == [("sse_open", f"x-1.{part}")]
    if newest:
        delivery.deliver(data=5)
    blocks = parse(next(client) + next(client))
    assert [(event.type, event.json) for event in blocks] == [("t", number) for number in range(part + 1, 6)]
    assert [event.id for event in blocks][-2:] == ["x-1", "x-2"]


def test_a_client_that_left_in_the_middle_of_a_batch_and_gets_no_more_stands_where_it_stood() -> None:
    delivery = Delivery()
    batch_of(delivery, 4)
    client = delivery.hub.connect(("other",), "x-1.2")
    delivery.hub.close("shutdown")
    assert [id for _, _, id in take(client, 2)] == ["x-1.2", "x-1.2"]


@pytest.mark.parametrize("batches", [True, False])
@pytest.mark.parametrize("part", [1, 2, 3])
def test_the_rest_of_a_batch_that_was_evicted_is_a_gap(part: int, batches: bool) -> None:
    delivery = Delivery(HistoryOptions(history_frames=1))
    batch_of(delivery, 4)
    delivery.deliver()
    for cursor, first in ((f"x-1.{part}", "sse_gap"), ("x-1", "sse_open")):
        client = delivery.hub.connect(("default",), cursor, batches=batches)
        assert [event for event, _, _ in take(client, 1)] == [first]


def test_the_rest_of_a_batch_that_is_evicted_after_the_connect_is_a_gap() -> None:
    delivery = Delivery(HistoryOptions(history_frames=1))
    batch_of(delivery, 4)
    client = delivery.connect(cursor="x-1.2")
    delivery.deliver()
    assert [event for event, _, _ in take(client, 2)] == ["sse_open", "sse_gap"]


def test_a_part_that_is_more_than_the_batch_has_is_all_of_it() -> None:
    delivery = Delivery()
    batch_of(delivery, 2)
    client = delivery.connect(cursor="x-1.99")
    delivery.deliver()
    blocks: list[bytes] = []
    while len(parse(b"".join(blocks))) < 2:
        blocks.append(next(client))
    assert [event.id for event in parse(b"".join(blocks))] == ["x-1.99", "x-2"]


# -- slow clients ------------------------------------------------------------------------------------------------------


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
