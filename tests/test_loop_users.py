"""Detached streams of users: frames of their own, which come faster than the loop sends them."""

from __future__ import annotations

import gc
import socket
import weakref
from collections.abc import Callable

import pytest

from sse_batcher import HistoryOptions
from sse_batcher.event import Audience, Batch, Event
from sse_batcher.transports.detached import feed as feeds
from sse_batcher.wire import Frame

from .kit.site import Site, events, has_data, read_again

KEPT = 5  # frames for users in the history


def connect(site: Site, user: int, *, small: bool = False) -> socket.socket:
    """Return the client's end of a detached stream of this user, after its first block."""
    client = site.delivery.connect("default", user=user)
    first = next(client)
    theirs = site.hand_over(client, first, small=small)
    site.loop.run()
    assert theirs.recv(len(first)) == first
    return theirs


def deliver(site: Site, audience: Audience, body: str = "1") -> Frame:
    """Deliver a frame, and leave the loop's turn to the test."""
    site.delivery.position += 1
    position = site.delivery.position
    event = Event("t", audience, body)
    frame = Frame(Batch(audience, "t", (event,), "manual", 0), position, f"x-{position}")
    site.hub.deliver(frame)
    return frame


def deliver_to_others(site: Site) -> None:
    """Deliver as many frames for users without a stream as evict all older frames for users."""
    for user in range(KEPT):
        deliver(site, (1_000 + user,))


def test_a_frame_for_a_user_arrives_although_it_is_evicted_before_the_streams_turn(
    make_site: Callable[..., Site],
) -> None:
    site = make_site(history=HistoryOptions(history_frames=KEPT))
    clients = {user: connect(site, user) for user in range(3)}
    for user in clients:
        deliver(site, (user,), str(user))
    site.loop.turn(0)  # the feed reads; the streams have their turn in the next one
    deliver_to_others(site)
    site.loop.run()
    deliver(site, "default")
    site.loop.run()
    for user, client in clients.items():
        assert [(event.type, event.data) for event in events(client)] == [("t", str(user)), ("t", "1")]
    assert site.hub.count()["gaps"] == 0


def test_a_frame_for_a_user_of_a_busy_group_arrives_although_it_is_evicted_soon_after(
    make_site: Callable[..., Site],
) -> None:
    site = make_site(history=HistoryOptions(history_frames=KEPT), loop={"sends_per_turn": 1})
    clients = [connect(site, user) for user in range(3)]
    deliver(site, "default", "10")
    site.loop.turn(0)  # the first one has it: the group is busy
    deliver(site, (2,), "20")
    while not any(client.live is False for client in site.loop.clients.values()):
        site.loop.turn(0)
    deliver_to_others(site)
    site.loop.run()
    assert [[event.data for event in events(client)] for client in clients] == [["10"], ["10"], ["10", "20"]]
    assert site.hub.count()["gaps"] == 0


def test_a_frame_for_a_user_is_read_before_the_loop_has_served_all_others(make_site: Callable[..., Site]) -> None:
    site = make_site(history=HistoryOptions(history_frames=KEPT), loop={"sends_per_turn": 1, "turn_seconds": 0})
    clients = [connect(site, user) for user in range(6)]
    for user in range(5):
        deliver(site, (user,), str(user))
    site.loop.turn(0)  # the feed reads for five streams, which have one turn each
    deliver(site, (5,), "5")
    site.loop.turn(0)
    assert not has_data(clients[5])
    deliver_to_others(site)
    site.loop.run()
    assert [[event.data for event in events(client)] for client in clients] == [
        ["0"],
        ["1"],
        ["2"],
        ["3"],
        ["4"],
        ["5"],
    ]


def test_a_stream_whose_socket_is_full_keeps_no_frames_for_its_user(make_site: Callable[..., Site]) -> None:
    site = make_site(history=HistoryOptions(history_frames=KEPT))
    slow = connect(site, 7, small=True)
    kept = []
    for _ in range(40):
        kept.append(weakref.ref(deliver(site, (7,), f'"{"x" * 1_500}"')))
        site.loop.run()
    gc.collect()
    assert sum(reference() is not None for reference in kept) == KEPT
    assert site.hub.count()["clients_by_state"] == {"live": 0, "behind": 1}
    read_again(site, slow)
    assert site.hub.count()["gaps"] == 1  # and not one for each frame that was evicted meanwhile


def test_a_stream_that_is_dismissed_before_its_turn_gets_nothing_of_what_was_read(
    make_site: Callable[..., Site],
) -> None:
    site = make_site()
    client = connect(site, 7)
    deliver(site, (7,))
    site.loop.turn(0)
    site.hub.dismiss("kicked", 7)
    site.loop.run()
    assert [(event.type, event.id) for event in events(client)] == [("sse_bye", "x-0")]


def test_no_more_is_read_for_streams_than_may_be_kept(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeds, "STREAMS_PER_LOCK", 1)
    monkeypatch.setattr(feeds, "MAX_SLICE_BYTES", 1)
    site = make_site(history=HistoryOptions(history_frames=KEPT))
    clients = [connect(site, user) for user in range(3)]
    for user in range(3):
        deliver(site, (user,))
    site.loop.turn(0)
    assert site.loop.slice_bytes > 0
    deliver_to_others(site)
    site.loop.run()
    assert sorted(event.type for client in clients for event in events(client)) == ["sse_gap", "sse_gap", "t"]
    assert site.loop.slice_bytes == 0


def test_a_stream_that_ends_before_its_turn_keeps_nothing(site: Site) -> None:
    client = connect(site, 7)
    deliver(site, (7,))
    site.loop.turn(0)
    assert site.loop.slice_bytes > 0
    client.close()
    site.loop.run()
    assert site.loop.slice_bytes == 0
