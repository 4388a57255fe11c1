"""Detached streams that leave their group to read alone: those of users with frames of their own, and polls."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from sse_batcher import HistoryOptions
from sse_batcher.event import Audience, Batch, Event, User
from sse_batcher.streams import history
from sse_batcher.streams.history import ResumePoint, Slice
from sse_batcher.wire import Frame, chunk

from .kit.delivery import Delivery, Numbers
from .kit.site import Site, events, fail, numbers, read, turns_of
from .kit.sse_parser import parse


def connect(
    site: Site, user: User | None = None, *, cursor: str | None = None, poll: bool = False, **more: bool
) -> socket.socket:
    """The client's end of a detached stream of the channel ``default``. Its first block is read."""
    client = site.delivery.connect("default", cursor=cursor, user=user, poll=poll)
    first = next(client)
    theirs = site.hand_over(client, chunk(first) if more.get("chunked") else first, **more)
    site.loop.run()
    assert b"sse_open" in read(theirs)
    return theirs


def frame(site: Site, audience: Audience, data: str | None = None) -> Frame:
    position = site.delivery.position = site.delivery.position + 1
    event = Event("t", audience, str(position) if data is None else data)
    return Frame(Batch(audience, "t", (event,), "manual", 0), position, f"x-{position}")


def deliver(site: Site, audience: Audience, data: str | None = None) -> None:
    site.hub.deliver(frame(site, audience, data))
    site.loop.run()


# -- users -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("others", ["users", "channels"])
def test_frames_of_many_others_make_no_gap_before_a_frame_for_a_user(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch, others: str
) -> None:
    monkeypatch.setattr(history, "MAX_FLOORS", 2)
    site = make_site(history=HistoryOptions(history_frames=3))
    client = connect(site, 7)
    for number in range(20):
        deliver(site, (f"other-{number}",) if others == "users" else f"other-{number}")
    deliver(site, (7,))
    deliver(site, "default")
    assert numbers(client) == [21, 22]


def test_a_frame_for_a_user_that_is_really_gone_is_a_gap(make_site: Callable[..., Site]) -> None:
    site = make_site(history=HistoryOptions(history_frames=3))
    client = connect(site, 7)
    for user in (7, 7, 7, 7, 8):
        site.hub.deliver(frame(site, (user,)))
    site.loop.run()
    (gap,) = events(client)
    assert (gap.type, gap.id) == ("sse_gap", "x-5")


@turns_of(1)
def test_a_frame_for_a_user_in_a_busy_group_loses_nothing_of_the_channel(site: Site) -> None:
    clients = [connect(site, user) for user in (1, 2, 3)]
    site.hub.deliver(frame(site, "default"))
    site.loop.turn(0)  # the group is busy with 1
    for audience in ((1,), "default", (3,), (2, 3), "default"):
        site.hub.deliver(frame(site, audience))
        site.loop.turn(0)
    site.loop.run()
    assert [numbers(client) for client in clients] == [[1, 2, 3, 6], [1, 3, 5, 6], [1, 3, 4, 5, 6]]


def test_a_stream_that_is_behind_is_not_sent_to_for_each_frame_of_its_user(site: Site) -> None:
    connect(site, 7, small=True)
    for _ in range(20):
        deliver(site, "default", "1" * 2_000)
    (ours,) = site.loop.clients.values()
    assert ours.behind
    site.loop.sends = 0
    for _ in range(10):
        deliver(site, (7,))
    assert site.loop.sends == 0  # its socket is full: epoll says when it is not


# -- polls -------------------------------------------------------------------------------------------------------------


def test_what_is_made_for_one_poll_alone_counts_as_kept(site: Site) -> None:
    connect(site, cursor="x-0", poll=True, small=True, chunked=True)
    large = frame(site, "default", "1" * 200_000)
    site.hub.deliver(large)
    site.loop.run()
    (ours,) = site.loop.clients.values()
    assert ours.rest
    assert site.loop.kept_bytes == len(large.encoded(batches=True, chunked=True) + b"0\r\n\r\n")


def test_old_frames_in_chunks_count_as_kept(make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "FRESH_FRAMES", 1)
    site = make_site()
    site.delivery.deliver(2, "x" * 200_000)
    connect(site, cursor="x-0", small=True, chunked=True)
    (ours,) = site.loop.clients.values()
    assert ours.rest
    assert site.loop.kept_bytes == len(chunk(bytes(200_000))) + len('event: t\ndata: ""\nid: x-1\n\n')


@turns_of(1)
def test_polls_read_the_history_once_for_frames_that_came_while_their_group_was_busy(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect(site, cursor="x-0", poll=True, small=True)  # it does not read, so that its group stays
    quick = [connect(site, cursor="x-0", poll=True) for _ in range(2)]
    site.clock.now += 15.0
    site.loop.tick(site.clock.now)
    site.loop.turn(0)  # the group is busy with a heartbeat
    deliver(site, "default", "1" * 200_000)
    for poll in quick:
        while read(poll):
            site.loop.run()
    assert site.hub.stream_count() == 1
    for _ in range(3):
        connect(site, cursor="x-1", poll=True)
    monkeypatch.setattr(site.hub, "advance", fail)
    site.wait(15.2)  # another heartbeat
    assert site.hub.stream_count() == 4


class Kicking(Numbers):
    """A backend that has all older frames, and during whose second answer a user is kicked."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.kicks: list[Callable[[], object]] = []

    def replay(self, channels: Iterable[str], cursor: ResumePoint, user: User | None) -> Any:
        if self.kicks:
            self.kicks.pop()()
        frames = [frame for frame in self.frames if frame.position > cursor.position]
        return Slice(frames, self.frames[-1].position)


def test_a_poll_whose_user_is_kicked_while_it_reads_brings_nothing() -> None:
    cursors = Kicking()
    delivery = Delivery(HistoryOptions(history_frames=1), cursors=cursors)
    cursors.frames = [delivery.frame() for _ in range(3)]
    for each in cursors.frames:
        delivery.hub.deliver(each)
    poll = delivery.connect("default", cursor="x-0", user=7, poll=True)
    cursors.kicks = [lambda: delivery.hub.dismiss("kicked", 7)]
    (opened,) = parse(b"".join(poll))
    assert (opened.type, opened.id) == ("sse_open", "x-0")
    assert cursors.kicks == []
    assert delivery.hub.is_empty()


def test_a_poll_that_has_missed_something_comes_back_as_soon_as_other_polls() -> None:
    delivery = Delivery()
    delivery.deliver()
    for _ in range(50):
        poll = delivery.connect(cursor=f"x-{delivery.position}", poll=True)
        next(poll)
        delivery.position += 1
        delivery.hub.lose("default", delivery.position)
        block = next(poll)
        assert b"sse_gap" in block
        delay = int(re.findall(rb"retry: (\d+)\n", block)[0])
        assert 500 <= delay <= 1_001
        poll.close()
