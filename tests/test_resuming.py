"""Resuming: clients that come with a cursor, of whatever kind, also in the middle of a batch."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from sse_batcher import BatchOptions, HistoryOptions, Snapshot, SSEManager, stream
from sse_batcher.event import Batch, Event
from sse_batcher.streams.history import ResumePoint
from sse_batcher.wire import Frame

from .kit.delivery import Delivery, Numbers, take
from .kit.scripts import run
from .kit.sse_parser import EventStreamParser, parse
from .kit.waiting import TIMEOUT

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
    assert manager.flush_all(15)
    cursor = manager.cursor()
    def first():
        manager.enqueue("t", 2)
        assert manager.flush_all(15)
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


# -- another history begins meanwhile ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("cursor", "reason"), [("y-2", "epoch"), ("x-4", "malformed")])
@pytest.mark.parametrize("blocks", [b"", b"event: state\ndata: 1\nid: y-2\n\n"], ids=["no state", "a state"])
@pytest.mark.parametrize("poll", [False, True], ids=["stream", "poll"])
def test_a_state_of_another_history_is_followed_by_a_gap(cursor: str, reason: str, blocks: bytes, poll: bool) -> None:
    delivery = Delivery()
    delivery.deliver(3)
    client = delivery.connect(snapshot=Snapshot(cursor, blocks), poll=poll)
    first, *state, gap = parse(next(client))
    assert (first.type, first.id) == ("sse_open", "")
    assert [event.type for event in state] == ["state"] * bool(blocks)
    # Without channels: the page must not expect that a state follows.
    assert (gap.type, gap.json, gap.id) == ("sse_gap", {"heartbeat": 15.0, "reason": reason}, "x-3")
    assert client.counts.gaps == 1
    if not poll:
        delivery.deliver()
        assert take(client, 1) == [("t", 4, "x-4")]


def test_a_client_whose_history_ends_while_it_connects_gets_a_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    delivery = Delivery(HistoryOptions(history_frames=1))
    delivery.deliver(3)
    points = iter([ResumePoint(1)])  # the backend begins another history after the first look
    monkeypatch.setattr(Numbers, "parse", lambda self, cursor: next(points, ResumePoint(refused="epoch")))
    replayed = []
    monkeypatch.setattr(Numbers, "replay", lambda self, channels, point, user: replayed.append(point))
    client = delivery.connect(cursor="x-1")
    assert client.missed == "epoch"
    assert take(client, 1)[0][0] == "sse_gap"
    assert replayed == []  # a backend cannot look up a cursor that it has refused


# -- in the middle of a batch ------------------------------------------------------------------------------------------


def batch_of(delivery: Delivery, size: int) -> None:
    delivery.position += 1
    events = tuple(Event("t", "default", json.dumps(number)) for number in range(1, size + 1))
    batch = Batch("default", "t", events, "time_window", 0)
    delivery.hub.deliver(Frame(batch, delivery.position, f"x-{delivery.position}"))


def test_without_batches_each_event_has_a_block_and_an_id_that_says_how_many_have_arrived() -> None:
    delivery = Delivery()
    client = delivery.connect(batches=False)
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
    client = delivery.connect(cursor=f"x-1.{part}", batches=batches)
    assert [(event, id) for event, _, id in take(client, 1)] == [("sse_open", f"x-1.{part}")]
    if newest:
        delivery.deliver(data=5)
    blocks = parse(next(client) + next(client))
    assert [(event.type, event.json) for event in blocks] == [("t", number) for number in range(part + 1, 6)]
    assert [event.id for event in blocks][-2:] == ["x-1", "x-2"]


def test_a_client_that_left_in_the_middle_of_a_batch_and_gets_no_more_stands_where_it_stood() -> None:
    delivery = Delivery()
    batch_of(delivery, 4)
    client = delivery.connect("other", cursor="x-1.2")
    delivery.hub.close("shutdown")
    assert [id for _, _, id in take(client, 2)] == ["x-1.2", "x-1.2"]


@pytest.mark.parametrize("batches", [True, False])
@pytest.mark.parametrize("part", [1, 2, 3])
def test_the_rest_of_a_batch_that_was_evicted_is_a_gap(part: int, batches: bool) -> None:
    delivery = Delivery(HistoryOptions(history_frames=1))
    batch_of(delivery, 4)
    delivery.deliver()
    for cursor, first in ((f"x-1.{part}", "sse_gap"), ("x-1", "sse_open")):
        client = delivery.connect(cursor=cursor, batches=batches)
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
