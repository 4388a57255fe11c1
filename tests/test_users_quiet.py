"""Quiet streams beside many frames of others, in both transports: nothing of theirs is missing, so they get no gap."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from sse_batcher import HistoryOptions
from sse_batcher.event import Audience
from sse_batcher.streams import history as histories

from .kit.delivery import Delivery, bye, connect_user, deliver_all, opened, take
from .kit.site import Site, events, numbers, read, turns_of

MANY_USERS: list[Audience] = [(user,) for user in range(50_000)]
MANY_CHANNELS: list[Audience] = [f"channel-{number % 22_000}" for number in range(25_000)]


@pytest.mark.parametrize("audiences", [MANY_USERS, MANY_CHANNELS], ids=["users", "channels"])
def test_many_frames_of_others_make_no_false_gap(audiences: list[Audience]) -> None:
    delivery = Delivery()
    delivery.deliver(2, channel="quiet")
    delivery.deliver(2, channel=("quiet",))
    clients = [
        connect_user(delivery, "quiet"),
        connect_user(delivery, user="quiet"),
        connect_user(delivery, "quiet", user="quiet"),
    ]
    deliver_all(delivery, audiences)
    head = f"x-{delivery.position}"
    assert [opened(delivery, "x-4", *client.channels, user=client.info.user) for client in clients] == (
        [("sse_open", head)] * 3
    )
    slow = clients[2]
    slow.fall_behind()  # as if it had overflowed
    delivery.deliver(1, "to both", ("quiet", 1))
    delivery.deliver(1, "to both", "quiet")
    assert [data for _, data, _ in take(slow, 2)] == ["to both"] * 2
    for client in clients:
        cursor = bye(client)
        assert opened(delivery, cursor, *client.channels, user=client.info.user)[0] == "sse_open"


def test_a_loop_over_many_users_evicts_nothing_of_a_channel() -> None:
    delivery = Delivery()
    delivery.deliver(3, channel="a")
    client = delivery.connect("a", cursor="x-0")
    deliver_all(delivery, MANY_USERS)
    assert [event for event, _, _ in take(client, 4)] == ["sse_open", "t", "t", "t"]
    assert bye(client) == f"x-{delivery.position}"


def test_a_quiet_stream_that_comes_back_again_and_again_never_meets_a_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even if others have taken all floors, as long as they do not do so between two of its visits."""
    monkeypatch.setattr(histories, "MAX_FLOORS", 4)
    delivery = Delivery(HistoryOptions(history_frames=2))
    cursor = "x-0"
    for number in range(20):
        for step in range(3):
            deliver_all(delivery, [f"channel-{number}-{step}", (f"user-{number}-{step}",)])
        client = delivery.connect("quiet", cursor=cursor, user="quiet")
        ((event, _, _),) = take(client, 1)
        assert event == "sse_open"
        cursor = bye(client)
        assert cursor == f"x-{delivery.position}"


@turns_of(1)
@pytest.mark.parametrize("audiences", [MANY_USERS, MANY_CHANNELS], ids=["users", "channels"])
def test_many_frames_of_others_make_no_false_gap_in_detached_streams(site: Site, audiences: list[Audience]) -> None:
    clients = [site.connect("quiet", user=user) for user in (None, -7, "quiet")]
    site.deliver(1, channel="quiet")
    site.deliver(1, channel=("quiet",))
    assert [numbers(client) for client in clients] == [[1], [1], [1, 2]]
    deliver_all(site.delivery, audiences)
    site.loop.run()
    assert [read(client) for client in clients] == [b""] * 3

    site.clock.now += 15
    site.loop.turn(0)
    site.loop.turn(0)
    (group,) = {ours.group for ours in site.loop.clients.values()}
    assert group.busy  # with a heartbeat; it reads on at its old position
    site.delivery.deliver(1, "to one", ("quiet",))
    site.delivery.deliver(1, "to all", "quiet")
    site.loop.run()
    assert [numbers(client) for client in clients] == [["to all"], ["to all"], ["to one", "to all"]]

    deliver_all(site.delivery, audiences)
    for ours in list(site.loop.clients.values()):
        ours.leave_group()
    site.loop.run()
    assert [read(client) for client in clients] == [b""] * 3
    site.hub.dismiss("lease")
    site.loop.run()
    for client, user in zip(clients, (None, -7, "quiet"), strict=True):
        (goodbye,) = events(client)
        head = f"x-{site.delivery.position}"
        assert (goodbye.type, goodbye.id) == ("sse_bye", head)
        assert opened(site.delivery, head, "quiet", user=user) == ("sse_open", head)


@pytest.mark.parametrize("kind", ["users", "channels"])
def test_a_quiet_user_whose_frame_comes_after_more_others_than_floors_gets_it(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The stream leaves its group, whose position is older than the common floor."""
    monkeypatch.setattr(histories, "MAX_FLOORS", 2)
    site = make_site(history=HistoryOptions(history_frames=3))
    detached, attached = site.connect("quiet", user="quiet"), connect_user(site.delivery, "quiet", user="quiet")
    for number in range(20):
        site.deliver(1, channel=(f"user-{number}",) if kind == "users" else f"channel-{number}")
    site.deliver(1, channel=("quiet",))
    site.deliver(1, channel="quiet")
    assert [(event.type, event.id) for event in events(detached)] == [("t", "x-21"), ("t", "x-22")]
    assert [id for _, _, id in take(attached, 2)] == ["x-21", "x-22"]
    attached.close()


@turns_of(1)
@pytest.mark.parametrize("kind", ["users", "channels"])
def test_a_frame_during_the_heartbeat_of_a_quiet_group_is_no_gap_after_more_others_than_floors(
    site: Site, make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The group reads on by itself, from a position before the others, and so do the streams with a user."""
    monkeypatch.setattr(histories, "MAX_FLOORS", 2)
    site = make_site(history=HistoryOptions(history_frames=3), loop={"sends_per_turn": 1, "turn_seconds": 0})
    users = (None, 7, "7", None)
    clients = [site.connect("quiet", user=user) for user in users] + [site.connect("another", user=8)]
    for number in range(20):
        site.deliver(1, channel=(f"user-{number}",) if kind == "users" else f"channel-{number}")
    site.clock.now += 15
    site.loop.turn(0)
    site.loop.turn(0)
    assert any(ours.group.busy for ours in site.loop.clients.values())
    site.delivery.deliver(1, channel="quiet")
    site.delivery.deliver(1, channel=(7,))
    site.delivery.deliver(1, channel="*")
    site.loop.run()
    assert [[event.id for event in events(client) if event.type == "t"] for client in clients] == [
        ["x-21", "x-23"],
        ["x-21", "x-22", "x-23"],
        ["x-21", "x-23"],
        ["x-21", "x-23"],
        ["x-23"],
    ]
