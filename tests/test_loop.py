"""The loop: what one thread writes to many connections. Stepped by the test, on real sockets and a clock of ours."""

from __future__ import annotations

import gc
import json
import socket
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from sse_batcher import HistoryOptions
from sse_batcher.event import Batch, Event
from sse_batcher.manager import process_of
from sse_batcher.streams.history import MAX_FLOORS, ResumePoint
from sse_batcher.transports.detached import connection as connections
from sse_batcher.transports.detached import group as groups
from sse_batcher.transports.detached.connection import SocketClient
from sse_batcher.transports.detached.loop import LOOP_TICK_SECONDS
from sse_batcher.wire import LAST_CHUNK, Frame, chunk

from .kit.site import Site, Threaded, events, has_ended, numbers, read, read_again, turns_of
from .kit.sse_parser import parse
from .kit.waiting import TIMEOUT


class Sends:
    """What is sent, and to which descriptor."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.all: list[tuple[int, bytes]] = []
        self._send = groups.send
        monkeypatch.setattr(groups, "send", self)
        monkeypatch.setattr(connections, "send_to", self._send_to)

    def _send_to(self, fd: int, data: bytes) -> int | None:
        return groups.taken(self(fd, data, groups.sized(len(data)), groups.FLAGS))

    def __call__(self, fd: int, data: bytes, size: Any, flags: int) -> int:
        assert flags == groups.FLAGS
        self.all.append((fd, data))
        return self._send(fd, data, size, flags)


# -- what is sent ------------------------------------------------------------------------------------------------------


def test_clients_get_the_frames_of_their_channels_and_broadcasts(site: Site) -> None:
    one, two = site.connect("a"), site.connect("a", "b")
    site.deliver(1, "to a", "a")
    site.deliver(1, "to b", "b")
    site.deliver(1, "to all", "*")
    assert (numbers(one), numbers(two)) == (["to a", "to all"], ["to a", "to b", "to all"])


def test_all_with_the_same_channels_are_sent_the_same_bytes_object(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(5):
        site.connect("a", chunked=True)
    sends = Sends(monkeypatch)
    site.deliver(1, channel="a")
    assert len(sends.all) == 5
    assert len({id(data) for _, data in sends.all}) == 1


def test_frames_that_wait_together_go_out_in_one_piece(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    client = site.connect()
    sends = Sends(monkeypatch)
    site.delivery.deliver(10)
    site.loop.run()
    assert len(sends.all) == 1
    assert numbers(client) == list(range(1, 11))


def test_each_frame_is_a_chunk_where_the_head_says_chunked(site: Site) -> None:
    client = site.connect(chunked=True)
    site.deliver(2, "x")
    blocks = [f'event: t\ndata: "x"\nid: x-{number}\n\n'.encode() for number in (1, 2)]
    assert read(client) == b"".join(map(chunk, blocks))


def test_a_client_without_batches_gets_each_event_as_its_own_block(site: Site) -> None:
    client = site.connect(batches=False)
    batched = tuple(Event("t", "default", str(number)) for number in (1, 2, 3))
    site.delivery.position += 1
    site.hub.deliver(Frame(Batch("default", "t", batched, "manual", 0), 1, "x-1"))
    site.loop.run()
    assert [(event.data, event.id) for event in events(client)] == [("1", "x-1.1"), ("2", "x-1.2"), ("3", "x-1")]


def test_what_batches_save_is_counted_for_each_client_that_gets_them(site: Site) -> None:
    for batches in (True, True, False):
        site.connect(batches=batches)
    site.connect("other")
    batched = tuple(Event("t", "default", str(number)) for number in range(20))
    site.delivery.position += 1
    frame = Frame(Batch("default", "t", batched, "manual", 0), 1, "x-1")
    site.hub.deliver(frame)
    site.loop.run()
    counts = site.hub.count()
    assert (counts["frames"], counts["saved_frames"]) == (3, 2 * 19)
    assert counts["saved_bytes"] == 2 * frame.saved_bytes > 0


def test_a_client_that_returns_gets_what_it_missed_and_then_new_events(site: Site) -> None:
    site.deliver(600)
    client = site.connect(cursor="x-3")
    site.deliver()
    assert read_again(site, client) == list(range(4, 602))


def test_what_was_delivered_between_the_first_block_and_the_take_over_is_sent(site: Site) -> None:
    client = site.hub.connect(("default",))
    first = next(client)
    site.delivery.deliver(3)  # queued, as for an attached one
    theirs = site.hand_over(client, first)
    site.delivery.deliver(2)
    site.loop.run()
    assert numbers(theirs)[1:] == [1, 2, 3, 4, 5]


def test_a_quiet_channel_has_no_gap_where_others_are_many(make_site: Callable[..., Site]) -> None:
    site = make_site(history=HistoryOptions(history_frames=10))
    client = site.connect("quiet")
    site.deliver(1, "first", "quiet")
    for number in range(MAX_FLOORS + 50):
        site.delivery.deliver(1, channel=f"other{number}")
    site.wait(15)  # a heartbeat must not look at the history either
    site.deliver(1, "second", "quiet")
    assert [event.type for event in events(client)] == ["t", "t"]


def test_all_clients_get_a_gap_for_a_lost_frame_and_then_new_events(site: Site) -> None:
    one, two = site.connect(), site.connect()
    site.deliver()
    site.delivery.position += 1
    site.hub.lose("default", site.delivery.position)
    site.loop.run()
    site.wait(15)
    site.deliver()
    for client in (one, two):
        got = events(client)
        assert [event.type for event in got] == ["t", "sse_gap", "t"]
        assert [json.loads(event.data).get("reason") for event in got[1:2]] == ["publish_failed"]
        assert [event.id for event in got] == ["x-1", "x-2", "x-3"]


def test_a_client_ahead_of_its_group_that_takes_nothing_keeps_its_position(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = site.connect()
    site.deliver()
    site.delivery.position += 1
    site.hub.lose("default", site.delivery.position)
    site.loop.run()  # after the gap the client is at 2, and the group still at 1
    read(client)
    monkeypatch.setattr(groups, "send", lambda *_: -1)
    monkeypatch.setattr(groups, "taken", lambda sent: 0)
    site.delivery.deliver()
    site.loop.turn(0)
    site.loop.turn(0)
    monkeypatch.undo()
    site.loop.run()
    assert [(event.type, event.id) for event in events(client)] == [("t", "x-3")]


def test_a_client_ahead_of_its_group_that_takes_no_heartbeat_keeps_its_position(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = site.connect()
    site.delivery.position += 1
    site.hub.lose("default", site.delivery.position)
    site.loop.run()  # after the gap the client is at 1, and the group still at 0
    read(client)
    monkeypatch.setattr(groups, "send", lambda *_: -1)
    monkeypatch.setattr(groups, "taken", lambda sent: 0)
    site.clock.now += 15
    site.loop.turn(0)
    site.loop.turn(0)
    monkeypatch.undo()
    site.deliver()
    assert numbers(client) == [2]


# -- clients that are slow ---------------------------------------------------------------------------------------------


def test_a_client_that_does_not_read_delays_no_other_and_gets_all_in_the_end(site: Site) -> None:
    slow, quick = site.connect(small=True), site.connect()
    for _ in range(20):
        site.deliver(1, "x" * 2_000)
    assert len(events(quick)) == 20
    assert site.hub.count()["clients_by_state"] == {"live": 1, "behind": 1}
    assert site.hub.count()["overflows"] == 1
    assert read_again(site, slow) == ["x" * 2_000] * 20
    site.deliver()
    assert (numbers(slow), numbers(quick)) == ([21], [21])
    assert site.hub.count()["clients_by_state"] == {"live": 2, "behind": 0}


def test_a_client_that_reads_too_late_gets_a_gap_between_two_frames(make_site: Callable[..., Site]) -> None:
    site = make_site(history=HistoryOptions(history_frames=5))
    slow = site.connect(small=True)
    for _ in range(40):
        site.deliver(1, "x" * 1_500)
    data = b""
    while part := read(slow):
        data += part
        site.loop.run()
    got = list(parse(data))
    frames = [event for event in got if event.type == "t"]
    (gap,) = [event for event in got if event.type == "sse_gap"]
    assert all(event.data == json.dumps("x" * 1_500) for event in frames)  # also the one that was cut
    assert got[-1] is gap
    assert gap.id == "x-40"
    site.deliver(1, "on")
    assert numbers(slow) == ["on"]


def test_a_client_that_does_not_read_keeps_no_frames_but_the_one_that_was_cut(make_site: Callable[..., Site]) -> None:
    site = make_site(history=HistoryOptions(history_frames=5))
    for _ in range(10):
        site.connect(small=True)
    kept = []
    for _ in range(100):
        frame = site.delivery.frame("x" * 20_000)
        kept.append(weakref.ref(frame))
        site.hub.deliver(frame)
        del frame
        site.loop.run()
    gc.collect()
    assert sum(reference() is not None for reference in kept) == 5
    rests = [connection.rest for connection in site.loop.clients.values()]
    assert all(isinstance(rest, memoryview) and len(rest) < 20_100 for rest in rests)
    assert len({id(rest.obj) for rest in rests if isinstance(rest, memoryview)}) == 1  # of the same frame, shared


def test_a_client_that_takes_nothing_is_given_up_and_a_slow_one_is_not(make_site: Callable[..., Site]) -> None:
    site = make_site(send_timeout=30.0)
    stalled, slow = site.connect(small=True), site.connect(small=True)
    for _ in range(20):
        site.deliver(1, "x" * 2_000)
    for _ in range(7):
        assert slow.recv(6_000)
        site.wait(5)
    site.wait(1)
    assert read(stalled)
    assert has_ended(stalled)
    assert site.hub.count()["clients"] == 1
    assert site.delivery.left == [(1, "left")]


def test_the_lease_of_a_stalled_client_does_not_keep_it(make_site: Callable[..., Site]) -> None:
    site = make_site(send_timeout=30.0, max_stream_age=10.0)
    site.connect(small=True)
    for _ in range(20):
        site.deliver(1, "x" * 2_000)
    for _ in range(40):
        site.wait(1.5)
    assert site.hub.count()["clients"] == 0


def test_what_waits_of_frames_in_the_history_does_not_count_as_kept(site: Site) -> None:
    client = site.connect(small=True)
    for _ in range(20):
        site.deliver(1, "x" * 2_000)
    read(client)
    site.loop.run()  # it reads the history, and its socket is full again
    (ours,) = site.loop.clients.values()
    assert ours.behind
    assert ours.rest
    assert (site.loop.kept, site.loop.kept_bytes) == ({}, 0)


def test_a_client_is_given_up_at_the_very_end_of_its_time(make_site: Callable[..., Site]) -> None:
    site = make_site(send_timeout=30.0)
    site.connect(small=True)
    for _ in range(20):
        site.deliver(1, "x" * 2_000)
    (ours,) = site.loop.clients.values()
    start = site.clock()
    for seconds in (0.0, 22.5):
        ours.check(start + seconds)
    assert ours.dismissed is None
    ours.check(start + 30.0)
    assert ours.dismissed == "left"


def test_a_client_is_looked_at_a_few_times_in_its_time(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    site = make_site(send_timeout=30.0)
    site.connect()
    looks: list[int] = []
    monkeypatch.setattr(connections, "has_taken_all", lambda fd: looks.append(fd) or True)
    monkeypatch.setattr(connections, "sign_of_life", fail)  # not asked of one that has taken all: it costs more
    site.wait(30)
    (ours,) = site.loop.clients.values()
    assert set(looks) == {ours.fd}
    assert connections.STALL_CHECKS <= len(looks) <= connections.STALL_CHECKS + 1


# -- time --------------------------------------------------------------------------------------------------------------


def test_a_client_ahead_of_its_group_gets_heartbeats_too(site: Site) -> None:
    first = site.connect("quiet")
    site.connect("busy")
    site.deliver(1, channel="busy")
    second = site.connect("quiet")
    for _ in range(2):
        site.wait(15)
        assert (read(first), read(second)) == (b":\n", b":\n")
    site.deliver(1, channel="quiet")
    assert (numbers(first), numbers(second)) == ([2], [2])


@pytest.mark.parametrize(("chunked", "beat"), [(False, b":\n"), (True, b"2\r\n:\n\r\n")])
def test_a_heartbeat_is_sent_after_a_silence(site: Site, chunked: bool, beat: bytes) -> None:
    client = site.connect(chunked=chunked)
    site.wait(14)
    assert read(client) == b""
    site.wait(1)
    assert read(client) == beat
    site.wait(8)
    site.deliver()
    assert read(client)
    site.wait(14)
    assert read(client) == b""
    site.wait(1)
    assert read(client) == beat


@pytest.mark.parametrize("chunked", [False, True])
def test_a_stream_ends_with_a_goodbye_when_its_lease_is_over(site: Site, chunked: bool) -> None:
    client = site.connect(chunked=chunked)
    site.deliver()
    read(client)
    site.wait(1_430)
    assert b"sse_bye" not in read(client)
    site.wait(371)
    site.wait(1)
    data = read(client)
    assert b'data: {"reason":"lease"}\nid: x-1\n\n' in data
    assert data.endswith(LAST_CHUNK) == chunked
    assert has_ended(client)
    assert site.delivery.left == [(1, "lease")]


# -- ends --------------------------------------------------------------------------------------------------------------


def test_a_group_sends_a_heartbeat_only_if_it_is_due_and_the_group_is_not_busy(site: Site) -> None:
    client = site.connect()
    (ours,) = site.loop.clients.values()
    group = ours.group
    due = group.sent_at + group.heartbeat
    for now, busy, expected in [(due - 0.5, False, b""), (due, True, b""), (due, False, b":\n")]:
        site.clock.now, group.busy = now, busy
        list(group.serve())
        assert read(client) == expected


def test_a_lease_is_over_at_its_very_end(site: Site) -> None:
    site.connect()
    (ours,) = site.loop.clients.values()
    ours.lease = site.clock() + 1
    ours.check(site.clock())
    assert ours.dismissed is None
    site.clock.now = ours.lease
    ours.check(site.clock())
    assert ours.dismissed == "lease"


def test_a_client_that_leaves_is_forgotten_at_once(site: Site) -> None:
    client = site.connect()
    site.connect("other")
    client.close()
    site.loop.run()
    assert site.hub.count()["clients_by_channel"] == {"other": 1}
    (feed,) = site.loop.feeds.values()
    assert set(feed.channels) == {"other", "*"}


def test_a_client_that_is_live_or_closed_has_nothing_to_do(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.connect()
    (ours,) = site.loop.clients.values()
    monkeypatch.setattr(site.hub, "advance", fail)  # it must not look at the history
    assert list(ours.serve()) == []
    assert list(ours.group.in_step) == [ours]
    ours.close("left")
    assert list(ours.serve()) == []
    assert list(ours.group.in_step) == []
    assert (ours.fd, ours.rest) == (-1, b"")


def test_a_kick_ends_these_streams_and_no_others(site: Site) -> None:
    one, two = site.connect("a"), site.connect("b")
    site.hub.dismiss("kicked", channel="a")
    site.delivery.deliver(1, channel="a")
    site.loop.run()
    assert [event.type for event in events(one)] == ["sse_bye"]
    assert has_ended(one)
    assert not has_ended(two)


def test_a_client_kicked_in_the_middle_of_a_frame_gets_only_its_rest(site: Site) -> None:
    client = site.connect(small=True)
    for _ in range(20):
        site.deliver(1, "x" * 1_500)
    site.hub.dismiss("kicked")
    site.loop.run()
    data = b""
    while part := read(client):
        data += part
        site.loop.run()
    got = list(parse(data))
    assert len(got) < 20
    assert [event.type for event in got[-2:]] == ["t", "sse_bye"]
    assert got[-1].id == got[-2].id
    assert has_ended(client)


def test_a_kick_before_the_loop_has_the_connection_is_not_lost(site: Site) -> None:
    client = site.hub.connect(("default",))
    theirs = site.hand_over(client, next(client))
    site.hub.dismiss("kicked")
    site.loop.run()
    assert [event.type for event in events(theirs)] == ["sse_open", "sse_bye"]


def test_a_client_that_is_closed_before_the_loop_has_the_connection_ends(site: Site) -> None:
    client = site.hub.connect(("default",))
    theirs = site.hand_over(client, b"")
    client.close()
    site.loop.run()
    assert has_ended(theirs)
    assert len(site.loop) == 0


def test_at_the_end_all_get_what_is_left_and_a_goodbye(site: Site) -> None:
    live, behind = site.connect(), site.connect(small=True)
    for _ in range(10):
        site.deliver(1, "x" * 2_000)
    read(live)
    site.delivery.deliver(1, "last")
    site.hub.close("shutdown")
    site.loop.run()
    assert [event.type for event in events(live)] == ["t", "sse_bye"]
    data = b""
    while part := read(behind):
        data += part
        site.loop.run()
    got = list(parse(data))
    assert [event.type for event in got] == ["t"] * 11 + ["sse_bye"]
    assert has_ended(live)
    assert has_ended(behind)
    assert site.hub.wait_until_left(0)


def test_a_server_that_stops_has_its_manager_drained(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    drained: list[bool] = []
    with site.manager:
        monkeypatch.setattr(process_of(site.manager), "drain", lambda: drained.append(True))
        site.connect()
        site.wait(1)
        assert len(drained) == 0
        site.server.stopping = True
        site.wait(3 * LOOP_TICK_SECONDS)
        assert len(drained) == 1  # once only: it may open again while this connection is still there
        site.connect()
        site.wait(LOOP_TICK_SECONDS)
        assert len(drained) == 2


def test_one_client_that_fails_ends_alone(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = site.connect(), site.connect()
    third = next(iter(site.loop.clients.values()))
    monkeypatch.setattr(site.hub, "advance", fail)
    third.group.leave(third)
    site.loop.post(third)
    site.loop.run()
    monkeypatch.undo()
    site.deliver()
    assert has_ended(one)
    assert numbers(two) == [1]


def test_one_client_that_cannot_be_checked_ends_alone(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = site.connect(), site.connect()
    broken = next(iter(site.loop.clients.values()))
    check = type(broken).check
    monkeypatch.setattr(type(broken), "check", lambda self, now: fail() if self is broken else check(self, now))
    site.wait(5)
    assert broken not in broken.group.in_step
    site.deliver()
    assert has_ended(one)
    assert numbers(two) == [1]


def fail(*_: Any) -> bool:
    raise ZeroDivisionError


# -- many groups -------------------------------------------------------------------------------------------------------


def test_the_history_is_read_once_for_all_groups(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    clients = [site.connect("all", f"user-{number}") for number in range(20)]
    asked: list[Any] = []
    news = site.hub.news
    monkeypatch.setattr(site.hub, "news", lambda *args: (asked.append(args), news(*args))[1])
    monkeypatch.setattr(site.hub, "next_frames", fail)
    site.delivery.deliver(1, "to all", "all")
    for number in range(20):
        site.delivery.deliver(1, number, f"user-{number}")
    site.delivery.deliver(1, "to everybody", "*")
    site.loop.run()
    assert [numbers(client) for client in clients] == [["to all", number, "to everybody"] for number in range(20)]
    assert len(asked) == 2  # and once more, to see that there is nothing left
    assert len(site.loop) == 20  # no group has failed, so none has read the history itself


@turns_of(1)
def test_a_group_reads_the_history_only_for_frames_that_came_while_it_was_busy(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    clients = [site.connect() for _ in range(3)]
    asked: list[Any] = []
    next_frames = site.hub.next_frames
    monkeypatch.setattr(site.hub, "next_frames", lambda *args: (asked.append(args), next_frames(*args))[1])
    site.delivery.deliver(1)
    site.loop.turn(0)  # the group is busy with 1
    site.delivery.deliver(1)
    site.loop.run()
    assert len(asked) == 2  # and once more, to see that there is nothing left
    site.deliver(1)
    assert len(asked) == 2
    assert [numbers(client) for client in clients] == [[1, 2, 3]] * 3


def test_a_group_does_not_send_its_newest_frame_again(site: Site) -> None:
    client = site.connect()
    frame = batched(site, "default", 2)
    site.loop.run()
    (ours,) = site.loop.clients.values()
    assert read(client) == frame.plain
    ours.group.give([frame])
    site.loop.run()
    assert read(client) == b""


def test_a_lost_frame_is_no_gap_for_clients_without_its_channel(site: Site) -> None:
    one, two, both = site.connect("a"), site.connect("b"), site.connect("a", "b")
    site.delivery.deliver(1, channel="b")
    site.delivery.position += 1
    site.hub.lose("a", site.delivery.position)
    site.delivery.deliver(1, channel="b")
    site.loop.run()
    assert [event.type for event in events(one)] == ["sse_gap"]
    assert numbers(two) == [1, 3]
    assert [event.type for event in events(both)] == ["sse_gap"]
    site.deliver(1, channel="a")
    site.deliver(1, channel="b")
    assert [numbers(client) for client in (one, two, both)] == [[4], [5], [4, 5]]
    (feed,) = site.loop.feeds.values()
    for client in (one, both):
        client.close()
    site.loop.run()
    assert feed.lost_in(["a"]) is None  # no client asks for that channel any more


def test_the_reason_of_a_gap_is_that_of_the_clients_own_channels(make_site: Callable[..., Site]) -> None:
    site = make_site(history=HistoryOptions(history_frames=5))
    slow = site.connect("a", small=True)
    site.connect("b")
    for _ in range(40):
        site.deliver(1, "x" * 1_500, "a")
    site.delivery.position += 1
    site.hub.lose("b", site.delivery.position)
    data = b""
    while part := read(slow):
        data += part
        site.loop.run()
    (gap,) = [event for event in parse(data) if event.type == "sse_gap"]
    assert json.loads(gap.data)["reason"] == "overflow"


def test_what_a_client_was_handed_is_what_it_has_read(site: Site) -> None:
    first = site.connect("a")
    site.connect("b")
    site.deliver(1, channel="b")
    second = site.connect("a")  # where its group has not been
    old, new = (connection for connection in site.loop.clients.values() if connection.channels == ("a",))
    before = old.handed, new.handed
    site.wait(15)
    site.deliver(2, channel="a")
    new.group.leave(new)
    site.delivery.deliver(1, channel="a")
    for _ in new.serve():  # it reads that itself before its group does, and is where that will be
        pass
    site.loop.run()
    for client, connection, (frames, size) in zip((first, second), (old, new), before, strict=True):
        assert connection.handed == (frames + 3, size + len(read(client)))


def test_what_a_client_was_handed_does_not_include_what_its_group_sent_before(site: Site) -> None:
    site.connect()
    site.deliver(2)
    client = site.connect()
    _, new = site.loop.clients.values()
    frames, opening = new.handed
    assert frames == 0
    site.deliver(1)
    size = opening + len(read(client))
    assert new.handed == (1, size)
    new.group.leave(new)
    assert new.handed == (1, size)
    site.deliver(1)
    site.loop.post(new)
    site.loop.run()
    assert new.handed == (2, size + len(read(client)))


def test_bytes_that_are_counted_are_those_that_were_sent(site: Site) -> None:
    client = site.connect()
    (ours,) = site.loop.clients.values()
    _, opening = ours.handed
    counted = site.hub.count()["bytes"]
    site.deliver(3)
    ours.group.leave(ours)
    ours.point = ResumePoint(1)  # so it reads two frames again
    site.loop.post(ours)
    site.loop.run()
    site.hub.dismiss("kicked")
    site.loop.run()
    got = read(client)
    assert [event.type for event in parse(got)] == ["t"] * 5 + ["sse_bye"]
    assert (site.hub.count()["bytes"] - counted, ours.handed[1] - opening) == (len(got), len(got))
    assert ours.handed[0] == site.hub.count()["frames"] == 5


@pytest.mark.parametrize("sent", ["frames", "the last block"])
def test_a_client_whose_connection_takes_no_send_is_closed_at_once(
    site: Site, sent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = site.connect()
    site.deliver()
    read(client)
    (ours,) = site.loop.clients.values()
    monkeypatch.setattr(connections, "send_to", lambda fd, data: None)
    if sent == "frames":
        ours.group.leave(ours)
        ours.point = ResumePoint(0)
        site.loop.post(ours)
    else:
        site.hub.dismiss("kicked")
    site.loop.run()
    assert has_ended(client)
    assert len(site.loop) == 0
    assert site.delivery.left == [(1, "left" if sent == "frames" else "kicked")]


def test_a_client_whose_connection_breaks_at_its_first_block_joins_no_group(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = site.connect()
    (group,) = {ours.group for ours in site.loop.clients.values()}
    monkeypatch.setattr(connections, "send_to", lambda fd, data: None)
    with pytest.raises(AssertionError):
        site.connect()
    assert site.delivery.left == [(2, "left")]
    assert len(group.in_step) == len(site.loop) == 1
    site.deliver()
    assert numbers(other) == [1]


def test_the_descriptor_0_is_one_like_others(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.connect()
    (ours,) = site.loop.clients.values()
    ours.check(site.clock())  # whether it has stalled is not checked again at this time
    real, ours.fd, lease, ours.lease = ours.fd, 0, ours.lease, site.clock()
    ours.check(site.clock())
    assert ours.dismissed == "lease"
    ours.fd, ours.lease, ours.dismissed = real, lease, None
    ours.group.leave(ours)
    ours.fd = 0
    assert list(ours.serve()) == []  # it has nothing to read, so it is live again
    ours.fd = real
    assert ours.live
    closed: list[int] = []
    forget, hang_up = site.loop.forget, connections.hang_up

    def forget_real(client: SocketClient) -> None:
        client.fd = real  # the loop knows it by this number
        forget(client)
        client.fd = 0

    monkeypatch.setattr(site.loop, "forget", forget_real)
    monkeypatch.setattr(connections, "hang_up", closed.append)
    ours.fd = 0
    ours.close("left")
    assert closed == [0]
    hang_up(real)


ONE_FRAME = len(b"event: t\ndata: 1\nid: x-1\n\n")


@pytest.mark.parametrize("taken", [0, 1, ONE_FRAME - 1, ONE_FRAME, ONE_FRAME + 1, 2 * ONE_FRAME - 1])
def test_what_a_socket_does_not_take_of_two_frames_follows(
    site: Site, taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clients = [site.connect() for _ in range(2)]
    before = site.hub.count()
    send = groups.send
    with monkeypatch.context() as patch:
        patch.setattr(groups, "send", lambda fd, data, size, flags: send(fd, data[:taken], groups.sized(taken), flags))
        site.delivery.deliver(2)
        for _ in range(3):
            site.loop.turn(0)
    site.loop.run()
    blocks = b"".join(f"event: t\ndata: {number}\nid: x-{number}\n\n".encode() for number in (1, 2))
    assert [read(client) for client in clients] == [blocks] * 2
    after = site.hub.count()
    assert {name: after[name] - before[name] for name in ("frames", "bytes", "overflows")} == {
        "frames": 4,
        "bytes": 2 * len(blocks),
        "overflows": 2,
    }


def test_frames_that_a_broken_connection_did_not_take_are_not_counted(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = site.connect()
    (ours,) = site.loop.clients.values()
    handed, before = ours.handed, site.hub.count()
    monkeypatch.setattr(groups, "send", lambda *_: -1)
    monkeypatch.setattr(groups, "taken", lambda sent: None)
    site.deliver(2)
    assert has_ended(client)
    assert site.delivery.left == [(1, "left")]
    assert ours.handed == handed
    after = site.hub.count()
    assert [after[name] for name in ("frames", "bytes", "overflows")] == [
        before[name] for name in ("frames", "bytes", "overflows")
    ]


def batched(site: Site, channel: str, count: int) -> Frame:
    """A frame of so many events, which was delivered."""
    site.delivery.position += 1
    position = site.delivery.position
    made = tuple(Event("t", channel, str(number)) for number in range(count))
    frame = Frame(Batch(channel, "t", made, "manual", 0), position, f"x-{position}")
    site.hub.deliver(frame)
    return frame


@pytest.mark.parametrize("chunked", [False, True])
def test_live_clients_get_each_batch_in_one_block(site: Site, chunked: bool) -> None:
    clients = [site.connect(chunked=chunked) for _ in range(2)]
    frames = []
    for count in (3, 2):
        frames.append(batched(site, "default", count))
        site.loop.run()
    blocks = [frame.plain for frame in frames]
    assert [read(client) for client in clients] == [b"".join(map(chunk, blocks) if chunked else blocks)] * 2
    counts = site.hub.count()
    assert (counts["frames"], counts["saved_frames"]) == (4, 2 * (2 + 1))
    assert counts["saved_bytes"] == 2 * sum(frame.saved_bytes for frame in frames)


def test_a_first_block_that_the_socket_does_not_take_at_once_is_sent_later(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    send_to, refused = connections.send_to, []

    def send_later(fd: int, data: bytes) -> int | None:
        if refused:
            return send_to(fd, data)
        refused.append(data)
        return 0

    monkeypatch.setattr(connections, "send_to", send_later)
    client = site.connect()  # reads the first block
    assert len(refused) == 1
    site.deliver()
    assert numbers(client) == [1]


@pytest.mark.parametrize("chunked", [False, True])
def test_a_client_that_has_a_part_of_a_frame_gets_its_rest_and_then_whole_frames(site: Site, chunked: bool) -> None:
    first, second = batched(site, "a", 3), batched(site, "a", 2)
    client = site.connect("a", cursor="x-1.1", chunked=chunked)
    blocks = [first.rest(1), second.plain]
    assert read(client) == b"".join(map(chunk, blocks) if chunked else blocks)


def test_a_part_of_a_frame_of_another_channel_takes_nothing_from_the_next_frame(site: Site) -> None:
    batched(site, "a", 3)
    frame = batched(site, "b", 2)
    client = site.connect("b", cursor="x-1.1")  # of a stream that had the channel "a", too
    assert read(client) == frame.plain


def test_a_dismissal_counts_each_stream_once(site: Site) -> None:
    site.connect()
    assert [site.hub.dismiss("kicked"), site.hub.dismiss("kicked")] == [1, 0]


# -- fairness ----------------------------------------------------------------------------------------------------------


@turns_of(10)
def test_another_group_gets_its_turn_while_a_large_one_is_busy(site: Site) -> None:
    large = [site.connect("large") for _ in range(100)]
    small = site.connect("small")
    site.delivery.deliver(1, channel="large")
    site.loop.turn(0)
    site.delivery.deliver(1, channel="small")
    site.loop.turn(0)
    site.loop.turn(0)
    assert numbers(small) == [2]
    assert sum(bool(read(client)) for client in large) < 50
    site.loop.run()


@turns_of(1)
@pytest.mark.parametrize("beat", [False, True], ids=["frame", "heartbeat"])
def test_frames_that_come_while_a_group_is_busy_follow_in_order(site: Site, beat: bool) -> None:
    clients = [site.connect() for _ in range(5)]
    if beat:
        site.clock.now += 15
    else:
        site.delivery.deliver(1)
    site.loop.turn(0)
    site.loop.turn(0)  # some have it
    for _ in range(3):
        site.delivery.deliver(1)
        site.loop.turn(0)
    site.loop.run()
    assert [numbers(client) for client in clients] == [[1, 2, 3] if beat else [1, 2, 3, 4]] * 5


@turns_of(1)
def test_the_loop_gives_others_a_turn_between_small_groups_too(site: Site) -> None:
    clients = [site.connect("all", f"user-{number}") for number in range(10)]
    site.delivery.deliver(1, channel="all")
    for count in range(1, 4):
        site.loop.turn(0)
        assert sum(bool(client.recv(1, socket.MSG_PEEK)) for client in clients[:count]) == count
        with pytest.raises(BlockingIOError):
            clients[count].recv(1)
    site.loop.run()
    assert [numbers(client) for client in clients] == [[1]] * 10


@turns_of(3)
def test_sends_of_several_small_groups_are_one_turn(site: Site) -> None:
    clients = [site.connect("all", f"user-{number}") for number in range(10)]
    site.delivery.deliver(1, channel="all")
    site.loop.turn(0)
    before = sum(map(has_data, clients))
    for turns in (1, 2):
        site.loop.turn(0)
        assert sum(map(has_data, clients)) == before + 3 * turns
    site.loop.run()
    assert [numbers(client) for client in clients] == [[1]] * 10


@turns_of(1)
def test_a_gap_while_a_group_is_busy_comes_after_the_frames_before_it(site: Site) -> None:
    clients = [site.connect() for _ in range(5)]
    site.delivery.deliver(1)
    site.loop.turn(0)
    site.delivery.position += 1
    site.hub.lose("default", site.delivery.position)
    site.delivery.deliver(1)
    site.loop.run()
    for client in clients:
        assert [(event.type, event.id) for event in events(client)] == [("t", "x-1"), ("sse_gap", "x-3")]


@turns_of(1)
def test_clients_of_a_busy_group_get_the_last_frames_before_the_bye(site: Site) -> None:
    clients = [site.connect() for _ in range(5)]
    site.delivery.deliver(1)
    site.loop.turn(0)
    site.delivery.deliver(1)
    site.hub.close("shutdown")
    site.loop.run()
    for client in clients:
        assert [event.type for event in events(client)] == ["t", "t", "sse_bye"]
        assert has_ended(client)


@turns_of(1)
def test_a_group_that_has_read_on_gets_nothing_twice(site: Site) -> None:
    """Its feed has sorted frames for it, and waits for its turn, while it reads them itself."""
    clients = [site.connect("a") for _ in range(3)]
    site.connect("b")
    site.delivery.deliver(1, channel="a")
    site.loop.turn(0)  # the first has it: the group is busy
    site.delivery.deliver(1, channel="a")  # told: the group is late
    site.loop.turn(0)
    site.delivery.deliver(1, channel="b")
    site.delivery.deliver(1, channel="a")
    site.loop.run()
    assert [numbers(client) for client in clients] == [[1, 2, 4]] * 3


@turns_of(1)
def test_a_client_that_is_ahead_of_its_group_reads_on_by_itself_if_it_needs_a_part(site: Site) -> None:
    clients = [site.connect() for _ in range(10)]
    site.delivery.deliver(1)
    site.loop.turn(0)  # the group is busy with 1
    site.delivery.deliver(2)
    new = site.hub.connect(("default",))
    theirs = site.hand_over(new, next(new))
    (group,) = {client.group for client in site.loop.clients.values()}
    while not group.ahead:
        site.loop.turn(0)
    assert (group.busy, [client.point.position for client in group.ahead]) == (True, [3])
    site.delivery.deliver(2)  # now the group reads from 2 to 5 at once
    site.loop.run()
    assert [numbers(client) for client in clients] == [[1, 2, 3, 4, 5]] * 10
    assert numbers_after_opening(theirs) == [4, 5]


def test_a_client_that_has_all_that_its_group_will_send_stays_ahead(site: Site) -> None:
    clients = [site.connect() for _ in range(3)]
    positions = dict(zip(site.loop.clients.values(), (1, 3, 4), strict=True))
    (group,) = {ours.group for ours in positions}
    for ours, position in positions.items():
        group.leave(ours)
        ours.point = ResumePoint(position)
        group.join(ours)
    frames = [site.delivery.frame() for _ in range(4)]
    group.give(frames[1:3])
    assert [ours in group.ahead for ours in positions] == [False, True, True]
    assert [numbers(client) for client in clients] == [[2, 3], [], []]


def numbers_after_opening(connection: socket.socket) -> list[Any]:
    opening, *following = events(connection)
    assert opening.type == "sse_open"
    return [json.loads(event.data) for event in following]


@turns_of(10)
@pytest.mark.parametrize("sent", ["frames", "the last block"])
def test_what_clients_are_sent_one_by_one_counts_as_sends_of_a_turn(site: Site, sent: str) -> None:
    site.deliver(3)
    clients = [site.connect() for _ in range(30)]
    if sent == "frames":
        for client in list(site.loop.clients.values()):
            client.group.leave(client)
            client.point = ResumePoint(0)
            site.loop.post(client)
    else:
        site.hub.dismiss("kicked")
    for turns in (1, 2, 3):
        site.loop.turn(0)
        assert sum(has_data(client) for client in clients) == 10 * turns
    site.loop.run()
    assert {len(events(client)) for client in clients} == {3 if sent == "frames" else 1}


def has_data(connection: socket.socket) -> bool:
    try:
        return bool(connection.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return False


def test_a_group_that_fails_ends_alone(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = site.connect("a"), site.connect("b")
    broken = next(iter(site.loop.clients.values())).group
    encoded = groups.Group.encoded
    monkeypatch.setattr(groups.Group, "encoded", lambda self, frame: fail() if self is broken else encoded(self, frame))
    site.deliver(1, channel="*")
    assert has_ended(one)
    assert numbers(two) == [1]


def test_a_client_of_a_busy_group_waits_until_the_group_serves_it(site: Site) -> None:
    client = site.connect()
    (ours,) = site.loop.clients.values()
    ours.group.busy, ours.dismissed = True, "kicked"
    assert next(ours.serve(), "it waits") == "it waits"
    assert ours.group.postponed == [ours]
    ours.group.busy = False
    site.deliver()  # after each send, the group serves the clients that wait
    assert [event.type for event in events(client)] == ["t", "sse_bye"]


@turns_of(1)
def test_a_client_kicked_while_its_group_is_busy_ends_after_the_present_frame(site: Site) -> None:
    clients = [site.connect() for _ in range(5)]
    site.delivery.deliver(1)
    site.loop.turn(0)  # the first one has it
    site.hub.dismiss("kicked")
    site.delivery.deliver(1)
    site.loop.run()
    for client in clients:
        assert [(event.type, event.id) for event in events(client)] == [("t", "x-1"), ("sse_bye", "x-1")]


# -- the thread --------------------------------------------------------------------------------------------------------


def thread() -> threading.Thread | None:
    return next((thread for thread in threading.enumerate() if thread.name == "sse_batcher-loop"), None)


def test_the_thread_is_there_while_there_are_streams(threaded: Threaded) -> None:
    assert thread() is None
    for _ in range(3):
        client = threaded.connect()
        running = thread()
        assert running is not None
        threaded.manager.enqueue("t", 1)
        assert b"data: 1\n" in client.recv(1_000)
        client.close()
        running.join(TIMEOUT)
        assert not running.is_alive()
    assert threaded.loop.restarts == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_dies_is_replaced_and_its_clients_come_back(
    threaded: Threaded, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    client = threaded.connect()
    turn, died = threaded.loop.turn, threading.Event()

    def die(patience: float) -> None:
        monkeypatch.setattr(threaded.loop, "turn", turn)
        died.set()
        raise SystemExit

    monkeypatch.setattr(threaded.loop, "turn", die)
    threaded.manager.enqueue("t", 1)
    assert died.wait(TIMEOUT)
    assert threaded.manager.flush_all(TIMEOUT)  # or the event may come to the next client
    while client.recv(1_000):
        pass
    client.close()
    again = threaded.connect()
    threaded.manager.enqueue("t", 2)
    assert b"data: 2\n" in again.recv(1_000)
    assert threaded.manager.get_stats().thread_restarts == 1
    assert "died and is replaced" in caplog.text
    again.close()


def test_a_shutdown_waits_until_all_were_told(threaded: Threaded) -> None:
    client = threaded.connect()
    threaded.manager.enqueue("t", 1)
    assert threaded.manager.shutdown(TIMEOUT)
    data = b""
    while part := client.recv(1_000):
        data += part
    assert [event.type for event in parse(data)] == ["t", "sse_bye"]
    client.close()
