"""Groups of detached clients: each group sends its frames, and they take turns."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from typing import Any

import pytest

from sse_batcher import HistoryOptions
from sse_batcher.streams.history import ResumePoint
from sse_batcher.transports.detached import group as groups
from sse_batcher.transports.detached.connection import LEFT

from .kit.site import Site, batched, events, fail, has_data, has_ended, numbers, read, turns_of
from .kit.sse_parser import parse

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


@turns_of(1)
def test_what_has_the_descriptor_of_a_client_that_was_closed_meanwhile_gets_nothing(site: Site) -> None:
    """As after a failed check of one client, between two turns of its group."""
    clients = [site.connect() for _ in range(3)]
    *_, last = site.loop.clients.values()
    site.delivery.deliver(1)
    site.loop.turn(0)  # the group is busy with 1
    fd = last.fd
    ours, theirs = socket.socketpair()
    with ours, theirs:
        last.close(LEFT)
        os.dup2(ours.fileno(), fd)
        try:
            site.loop.run()
            theirs.setblocking(False)
            with pytest.raises(BlockingIOError):
                theirs.recv(1)
        finally:
            os.close(fd)
    assert [numbers(client) for client in clients[:2]] == [[1]] * 2
    assert has_ended(clients[2])
    assert len(site.loop) == 2


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


def test_a_group_that_fails_ends_alone(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = site.connect("a"), site.connect("b")
    broken = next(iter(site.loop.clients.values())).group
    encoded = groups.Group.encoded
    monkeypatch.setattr(groups.Group, "encoded", lambda self, frame: fail() if self is broken else encoded(self, frame))
    site.deliver(1, channel="*")
    assert has_ended(one)
    assert numbers(two) == [1]


# -- clients ahead of their group --------------------------------------------------------------------------------------


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


@turns_of(1)
def test_a_client_that_is_ahead_of_its_group_reads_on_by_itself_if_it_needs_a_part(site: Site) -> None:
    clients = [site.connect() for _ in range(10)]
    site.delivery.deliver(1)
    site.loop.turn(0)  # the group is busy with 1
    site.delivery.deliver(2)
    new = site.delivery.connect()
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
