"""Replay: what only the backend still has reaches detached clients, and no thread of the server waits for it.

The loop and the thread that asks the backend are stepped by the test; the last tests have real ones.
"""

from __future__ import annotations

import gc
import json
import math
import socket
import threading
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest

from sse_batcher import BackendError, HistoryOptions
from sse_batcher.event import BROADCAST, Batch, Event, User
from sse_batcher.manager_state import process_of
from sse_batcher.streams.history import ResumePoint, Slice
from sse_batcher.streams.hub import Hub
from sse_batcher.transports.detached import connection as connections
from sse_batcher.transports.detached.replay import FIRST_RETRY_SECONDS, MAX_RETRY_SECONDS
from sse_batcher.wire import HEARTBEAT, Frame, chunk

from .kit.delivery import Numbers
from .kit.site import Site, SteppedWorker, Threaded, events, has_ended, numbers, read, read_again
from .kit.sse_parser import ServerEvent, parse
from .kit.waiting import TIMEOUT, wait_until

FRAMES_PER_SLICE = 4


class Archive(Numbers):
    """A backend that keeps every batch, and makes a frame of it for each that asks."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, Batch]] = []
        self.asked: list[int] = []
        self.made: list[weakref.ref[Frame]] = []
        self.answers = math.inf  # so many, and then it is away
        self.error: Exception = BackendError("it is away")
        self.first = 0  # what it has no more ends here

    def replay(self, channels: Iterable[str], cursor: ResumePoint, user: User | None) -> Slice | None:  # type: ignore[override]
        self.asked.append(cursor.position)
        self.answers -= 1
        if self.answers < 0:
            raise self.error
        if cursor.position < self.first:
            return None
        after = cursor.position - bool(cursor.part)
        some = [(position, batch) for position, batch in self.batches if position > after][:FRAMES_PER_SLICE]
        frames = [
            Frame(batch, position, f"x-{position}")
            for position, batch in some
            if batch.channel in {*channels, BROADCAST}
        ]
        self.made += map(weakref.ref, frames)
        return Slice(frames, frames[-1].position if frames else some[-1][0])


class ReplayingSite(Site):
    """One whose history has five frames, and whose backend has all."""

    def __init__(self, **options: Any) -> None:
        self.archive = Archive()
        super().__init__(history=HistoryOptions(history_frames=5), cursors=self.archive, **options)
        frame = self.delivery.frame

        def kept(data: Any = None, channel: str = "default") -> Frame:
            made = frame(data, channel)
            self.archive.batches.append((made.position, made.batch))
            return made

        self.delivery.frame = kept  # type: ignore[method-assign]

    @property
    def waiting(self) -> int:
        return sum(connection.waits for connection in self.loop.clients.values())

    def waits(self, *channels: str, **options: Any) -> socket.socket:
        """A client that waits: the backend has gone away since it was asked whether the client can go on."""
        self.archive.answers = 1
        client = self.connect(*channels, cursor="x-0", **options)
        assert self.waiting == 1
        del self.archive.asked[0]
        return client


@pytest.fixture
def make(make_site: Callable[..., Any]) -> Callable[..., ReplayingSite]:
    return partial(make_site, ReplayingSite)


@pytest.fixture
def site(make: Callable[..., ReplayingSite]) -> ReplayingSite:
    return make()


def all_bytes(site: Site, client: socket.socket) -> bytes:
    """All that comes while the loop goes on."""
    data = b""
    while part := read(client):
        data += part
        site.loop.run()
    return data


def everything(site: Site, client: socket.socket) -> list[ServerEvent]:
    return list(parse(all_bytes(site, client)))


# -- what comes --------------------------------------------------------------------------------------------------------


def test_an_old_cursor_gets_all_in_order_and_then_new_events(site: ReplayingSite) -> None:
    site.deliver(30)
    client = site.connect(cursor="x-3")
    site.deliver(3)
    assert read_again(site, client) == list(range(4, 34))
    site.deliver()
    assert numbers(client) == [34]
    counts = site.hub.count()
    assert (counts["frames"], counts["gaps"], counts["clients_by_state"]) == (31, 0, {"live": 1, "behind": 0})
    assert len(site.archive.asked) == 1 + -(
        -22 // FRAMES_PER_SLICE
    )  # at the opening, and for each slice up to the history


def test_a_client_that_falls_out_of_the_history_has_no_gap(site: ReplayingSite) -> None:
    slow, quick = site.connect(small=True), site.connect()
    for _ in range(40):
        site.deliver(1, "x" * 1_500)
    assert len(events(quick)) == 40
    got = everything(site, slow)
    assert [event.id for event in got] == [f"x-{number}" for number in range(1, 41)]
    assert site.hub.count()["gaps"] == 0


@pytest.mark.parametrize("chunked", [False, True])
def test_frames_from_the_backend_are_framed_as_the_others(site: ReplayingSite, chunked: bool) -> None:
    site.deliver(9, "x")
    client = site.connect(cursor="x-0", chunked=chunked)
    blocks = [f'event: t\ndata: "x"\nid: x-{number}\n\n'.encode() for number in range(1, 10)]
    assert read(client) == b"".join(map(chunk, blocks) if chunked else blocks)


def test_frames_of_other_channels_are_passed_over(site: ReplayingSite) -> None:
    for _ in range(5):
        site.deliver(10, channel="other")
        site.deliver(1, channel="mine")
    client = site.connect("mine", cursor="x-0")
    assert numbers(client) == [11, 22, 33, 44, 55]


@pytest.mark.parametrize("batches", [False, True])
def test_the_rest_of_a_batch_comes_from_the_backend_too(site: ReplayingSite, batches: bool) -> None:
    parts = tuple(Event("t", "default", str(number)) for number in (1, 2, 3))
    site.delivery.position += 1
    site.archive.batches.append((1, Batch("default", "t", parts, "manual", 0)))
    site.hub.deliver(Frame(site.archive.batches[0][1], 1, "x-1"))
    site.deliver(9, "later")
    client = site.connect(cursor="x-1.1", batches=batches)
    assert [(event.data, event.id) for event in events(client)][:3] == [
        ("2", "x-1.2"),
        ("3", "x-1"),
        ('"later"', "x-2"),
    ]


def test_what_the_backend_has_no_more_is_a_gap(site: ReplayingSite) -> None:
    site.deliver(30)
    client = site.connect(cursor="x-3")
    assert read(client)
    slow = site.connect(small=True)
    for _ in range(40):
        site.deliver(1, "x" * 1_500)
    site.archive.first = 60
    got = everything(site, slow)
    assert [event.type for event in got[-2:]] == ["t", "sse_gap"]
    assert (json.loads(got[-1].data)["reason"], got[-1].id) == ("overflow", "x-70")
    site.deliver(1, "on")
    assert numbers(slow) == ["on"]


# -- the backend is away -----------------------------------------------------------------------------------------------


def test_a_backend_that_is_away_is_asked_again_and_nothing_is_lost(
    site: ReplayingSite, caplog: pytest.LogCaptureFixture
) -> None:
    site.deliver(30)
    client = site.waits()
    pauses = []
    for _ in range(7):
        before, at = len(site.archive.asked), site.clock.now
        while len(site.archive.asked) == before:
            site.clock.now += 0.01
            site.loop.run()
        pauses.append(round(site.clock.now - at, 2))
    assert pauses[:5] == pytest.approx([FIRST_RETRY_SECONDS * 2**n for n in range(5)], abs=0.011)
    assert pauses[5:] == pytest.approx([MAX_RETRY_SECONDS] * 2, abs=0.011)
    site.deliver(5)
    site.archive.answers = math.inf
    site.wait(MAX_RETRY_SECONDS)
    assert read_again(site, client)[-1] == 35
    assert site.hub.count()["gaps"] == 0
    assert caplog.text.count("cannot be read now: it is away") == 1


def test_a_client_that_waits_asks_once(site: ReplayingSite) -> None:
    site.deliver(30)
    client = site.waits()
    (connection,) = site.loop.clients.values()
    for _ in range(3):
        site.loop.post(connection)
        site.loop.run()
    assert site.archive.asked == [0]
    site.archive.answers = math.inf
    site.wait(MAX_RETRY_SECONDS)
    assert site.archive.asked[:3] == [0, 0, FRAMES_PER_SLICE]
    assert read_again(site, client) == list(range(1, 31))


def test_a_client_that_waits_gets_heartbeats(site: ReplayingSite) -> None:
    site.deliver(30)
    client = site.waits()
    for _ in range(3):
        site.wait(17)  # each is looked at every two seconds
        assert read(client) == HEARTBEAT


def test_a_kick_ends_a_stream_that_waits(site: ReplayingSite) -> None:
    site.deliver(30)
    client = site.waits()
    site.hub.dismiss("kicked")
    site.loop.run()
    (bye,) = events(client)
    assert (bye.type, bye.id) == ("sse_bye", "x-0")
    assert has_ended(client)
    site.archive.answers = math.inf
    site.wait(MAX_RETRY_SECONDS)
    assert site.archive.asked == [0]  # the answer is of no use any more


def test_an_answer_that_comes_after_a_kick_is_not_sent(site: ReplayingSite) -> None:
    site.deliver(30)
    client = site.waits()
    (connection,) = site.loop.clients.values()
    site.hub.dismiss("kicked")
    connection.answer(Slice([site.delivery.frame()], 31))
    site.loop.run()
    assert [event.type for event in events(client)] == ["sse_bye"]


def test_a_client_that_leaves_while_it_waits_is_forgotten_at_once(site: ReplayingSite) -> None:
    site.deliver(30)
    client = site.waits()
    client.close()
    site.loop.run()
    assert (len(site.loop), site.hub.count()["clients"]) == (0, 0)
    site.archive.answers = math.inf
    site.wait(MAX_RETRY_SECONDS)
    assert site.archive.asked == [0]


def test_a_stream_that_waits_ends_with_its_lease(make: Callable[..., ReplayingSite]) -> None:
    site = make(max_stream_age=60.0)
    site.deliver(30)
    client = site.waits()
    site.wait(63)
    got = events(client)
    assert [(event.type, event.id) for event in got] == [("sse_bye", "x-0")]
    assert json.loads(got[0].data) == {"reason": "lease"}
    assert has_ended(client)


@pytest.mark.parametrize("away", [False, True], ids=["answers", "away"])
def test_at_shutdown_a_client_that_is_far_behind_gets_a_bye_with_its_own_id(
    make: Callable[..., ReplayingSite], away: bool
) -> None:
    site = make()
    for _ in range(30):
        site.deliver(1, "x" * 1_500)
    site.archive.answers = 3 if away else math.inf
    client = site.connect(cursor="x-0", small=True)
    data = b""
    while away and not site.waiting:
        data += read(client)
        site.loop.run()
    site.hub.close("shutdown")
    site.wait(2.2)
    got = list(parse(data + all_bytes(site, client)))
    assert got[-1].type == "sse_bye"
    assert json.loads(got[-1].data) == {"reason": "shutdown"}
    assert got[-1].id == got[-2].id
    assert [event.id for event in got[:-1]] == [f"x-{number}" for number in range(1, len(got))]
    assert len(got) < 30
    assert has_ended(client)
    assert site.hub.wait_until_left(0)


@pytest.mark.parametrize("looks", range(8))
@pytest.mark.parametrize("kind", ["live", "waiting", "far behind"])
def test_a_stream_ends_properly_or_goes_on_when_the_hub_opens_again_at_any_moment(
    site: ReplayingSite, kind: str, looks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub is open again after so many looks at why it is closing."""
    site.deliver(30)
    client = site.waits() if kind == "waiting" else site.connect()
    if kind == "far behind":
        (connection,) = site.loop.clients.values()
        connection.group.leave(connection)
        connection.point = ResumePoint(0)
        site.loop.post(connection)
    site.hub.close("shutdown", for_good=False)
    reasons = iter(["shutdown"] * looks)
    monkeypatch.setattr(Hub, "closing", property(lambda _: next(reasons, None)), raising=False)
    site.archive.answers = math.inf
    site.wait(2.2)
    site.deliver()
    got = everything(site, client)
    byes = [json.loads(event.data) for event in got if event.type == "sse_bye"]
    if has_ended(client):
        assert byes == [{"reason": "shutdown"}]
        assert got[-1].type == "sse_bye"
    else:
        assert byes == []
        assert got[-1].id == "x-31"


def test_a_fault_while_it_is_replayed_ends_that_stream_only(
    site: ReplayingSite, caplog: pytest.LogCaptureFixture
) -> None:
    site.deliver(30)
    other = site.connect()
    client = site.waits()
    site.archive.error = ZeroDivisionError("a fault")
    site.wait(FIRST_RETRY_SECONDS * 2)
    assert has_ended(client)
    assert "cannot be replayed" in caplog.text
    site.deliver()
    assert numbers(other) == [31]


def test_if_no_thread_can_be_started_the_client_comes_back(
    site: ReplayingSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SteppedWorker, "can_start", False)
    site.deliver(30)
    client = site.connect(cursor="x-0")
    assert has_ended(client)
    assert site.delivery.left == [(1, "left")]


# -- clients that are slow ---------------------------------------------------------------------------------------------


def test_a_client_that_reads_nothing_has_no_slice_made_for_it_and_holds_one_frame(site: ReplayingSite) -> None:
    for _ in range(60):
        site.deliver(1, "x" * 1_500)
    clients = [site.connect(cursor="x-0", small=True) for _ in range(5)]
    asked = len(site.archive.asked)
    site.wait(20)
    assert len(site.archive.asked) == asked
    gc.collect()
    assert sum(frame() is not None for frame in site.archive.made) == 0
    rests = [connection.rest for connection in site.loop.clients.values()]
    assert all(len(rest) <= 1_600 for rest in rests)
    for client in clients:
        assert len(read_again(site, client)) == 60


def test_those_that_read_have_their_turn_one_after_the_other(site: ReplayingSite) -> None:
    site.deliver(200)
    site.archive.asked.clear()
    site.loop.replays = lambda: False  # type: ignore[method-assign]
    clients = [site.connect(cursor=f"x-{number}") for number in range(3)]
    site.archive.asked.clear()
    (replay,) = (worker.owner for worker in site.loop.workers if worker.name == "sse_batcher-replay")
    for _ in range(3):
        replay.work()
        site.loop.run()
    assert site.archive.asked == [place + FRAMES_PER_SLICE * turn for turn in range(3) for place in range(3)]
    del site.loop.replays
    site.loop.run()
    assert [len(numbers(client)) for client in clients] == [200, 199, 198]


def test_a_client_whose_socket_is_full_gets_the_gap_before_new_events(
    site: ReplayingSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.deliver(30)
    client = site.waits()
    site.archive.answers, site.archive.first = 1, 20
    with monkeypatch.context() as patch:
        patch.setattr(connections, "send_to", lambda fd, data: 0)
        site.clock.now += FIRST_RETRY_SECONDS
        site.loop.replays()
        for _ in range(3):
            site.loop.turn(0)
        site.delivery.deliver()
        for _ in range(3):
            site.loop.turn(0)
    site.loop.run()
    assert [(event.type, event.id) for event in everything(site, client)] == [("sse_gap", "x-30"), ("t", "x-31")]


def test_a_heartbeat_is_due_at_its_very_time_while_a_client_waits(site: ReplayingSite) -> None:
    site.deliver(30)
    client = site.waits()
    (waiting,) = site.loop.clients.values()
    waiting.check(site.clock() + waiting.group.heartbeat)
    assert read(client) == b":\n"


def test_a_client_that_takes_nothing_of_its_replay_is_given_up(make: Callable[..., ReplayingSite]) -> None:
    site = make(send_timeout=30.0)
    for _ in range(60):
        site.deliver(1, "x" * 1_500)
    client = site.connect(cursor="x-0", small=True)
    site.wait(38)
    read(client)
    assert has_ended(client)
    assert site.delivery.left == [(1, "left")]


def test_what_is_kept_for_clients_that_take_nothing_is_bounded(
    make: Callable[..., ReplayingSite], caplog: pytest.LogCaptureFixture
) -> None:
    site = make(loop={"max_kept_bytes": 70_000})
    for _ in range(60):
        site.deliver(1, "x" * 20_000)
    one, two = (site.connect(cursor="x-0", small=True) for _ in range(2))
    data = b""
    while len(data) < 10_000:
        data += one.recv(1_000)
        site.loop.run()
    three, four = (site.connect(cursor="x-0", small=True) for _ in range(2))
    assert sum(len(connection.rest) for connection in site.loop.clients.values()) <= 70_000
    read(two)
    assert has_ended(two)  # one has taken some since
    for client in (three, four):
        assert read(client)
        assert not has_ended(client)
        client.close()
    site.loop.run()
    assert len(list(parse(data + all_bytes(site, one)))) == 60
    assert caplog.text.count("bytes wait for clients that take nothing") == 1
    assert (site.loop.kept, site.loop.kept_bytes) == ({}, 0)


@pytest.mark.parametrize("size", [10_000, 1_000_000])
def test_a_first_block_that_is_taken_little_by_little_arrives_whole(
    make: Callable[..., ReplayingSite], size: int
) -> None:
    site = make(loop={"max_kept_bytes": 1_000})  # one client may always have more
    client = site.delivery.connect()
    first = next(client) + b"event: state\ndata: " + b"x" * size + b"\n\n"
    theirs = site.hand_over(client, first)
    site.loop.run()
    heard = b""
    while len(heard) < len(first):
        (connection,) = site.loop.clients.values()
        assert site.loop.kept_bytes == (len(first) if connection.rest else 0)
        heard += theirs.recv(3_000)
        site.loop.run()
    assert heard == first
    assert site.loop.kept_bytes == 0


# -- the thread --------------------------------------------------------------------------------------------------------


def replay_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "sse_batcher-replay"]


def test_the_thread_is_there_while_a_client_waits(threaded: Threaded, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = threading.Event()
    hub = process_of(threaded.manager).hub

    def replay(channels: tuple[str, ...], cursor: ResumePoint, user: User | None) -> Slice | None:
        assert answers.wait(TIMEOUT)
        return Slice([], hub.head)

    monkeypatch.setattr(hub, "replay", replay)
    client = threaded.connect()
    (connection,) = threaded.loop.clients.values()
    wait_until(lambda: connection.live, "it is live")
    advance = hub.advance
    monkeypatch.setattr(hub, "advance", lambda member: False)
    connection.group.leave(connection)
    threaded.loop.post(connection)
    wait_until(lambda: bool(connection.waits and replay_threads()), "it waits")
    (thread,) = replay_threads()
    monkeypatch.setattr(hub, "advance", advance)
    threaded.manager.enqueue("t", 1)
    threaded.manager.flush_all()
    answers.set()
    thread.join(TIMEOUT)
    assert not thread.is_alive()
    threaded.manager.enqueue("t", 2)
    data = b""
    while b"data: 2\n" not in data:
        data += client.recv(1_000)
    client.close()
