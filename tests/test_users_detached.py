"""Users on detached streams: a stream leaves its group for a frame of its user, and comes back to it."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import pytest

from sse_batcher import HistoryOptions
from sse_batcher.event import BROADCAST, EVERY_USER, Audience, User
from sse_batcher.streams.history import ResumePoint, Slice
from sse_batcher.transports.detached import group as groups
from sse_batcher.transports.detached.group import Group
from sse_batcher.wire import Frame, Position

from .kit.site import Site, events, fail, has_ended, numbers, read, turns_of
from .kit.sse_parser import parse

USERS: Sequence[User | None] = (None, 7, "7", 7, 8, None)
AUDIENCES: list[Audience] = ["a", (7,), (7, 8), BROADCAST]


def connect_all(site: Site) -> list[socket.socket]:
    """A stream for each of `USERS`, all in one group."""
    clients = [site.connect("a", user=user) for user in USERS]
    assert len({client.group for client in site.loop.clients.values()}) == 1
    return clients


def expected(user: User | None, audiences: Sequence[Audience]) -> list[int]:
    """The numbers that a stream of this user gets, if one frame each was delivered to these audiences, from 1 on."""
    return [
        number
        for number, audience in enumerate(audiences, 1)
        if (audience in ("a", BROADCAST) if isinstance(audience, str) else user in audience)
    ]


def group_of(site: Site) -> Group:
    (group,) = {client.group for client in site.loop.clients.values()}
    return group


def members(site: Site, user: User) -> list[Any]:
    """The detached clients of this user."""
    return [client for client in site.loop.clients.values() if client.info.user == user]


# -- who gets what, and in which order ---------------------------------------------------------------------------------


def test_frames_reach_the_streams_of_their_users_alone(site: Site) -> None:
    clients = connect_all(site)
    for audience in AUDIENCES:
        site.deliver(1, channel=audience)
    assert [numbers(client) for client in clients] == [expected(user, AUDIENCES) for user in USERS]


@pytest.mark.parametrize("sends", [1, 2, 1_000])
def test_no_moment_makes_a_frame_come_twice_or_late(make_site: Callable[..., Site], sends: int) -> None:
    """Each order of four frames, with each number of the loop's turns in between: the group is busy, or it is not."""
    for audiences, turns in product(product(AUDIENCES, repeat=3), product((0, 1, 3), repeat=2)):
        site = Site(loop={"sends_per_turn": sends, "turn_seconds": 0})
        clients = connect_all(site)
        for audience, some in zip(("a", *audiences), (1, *turns, 0), strict=True):
            site.delivery.deliver(1, channel=audience)
            for _ in range(some):
                site.loop.turn(0)
        site.loop.run()
        got = [numbers(client) for client in clients]
        assert got == [expected(user, ("a", *audiences)) for user in USERS], (audiences, turns)
        site.close()


@pytest.mark.parametrize("batches", [True, False])
@pytest.mark.parametrize("chunked", [True, False])
def test_frames_for_users_have_the_framing_of_the_stream(site: Site, batches: bool, chunked: bool) -> None:
    client = site.connect("a", user=7, batches=batches, chunked=chunked)
    frame = site.delivery.frame(channel=(7,))
    site.hub.deliver(frame)
    site.loop.run()
    assert read(client) == frame.encoded(batches=batches, chunked=chunked)


def test_a_stream_with_a_user_and_no_channel_is_detached_too(site: Site) -> None:
    alone, other = site.connect(user=7), site.connect(user=8)
    for audience in ((7,), "a", (7, 8), BROADCAST):
        site.deliver(1, channel=audience)
    assert (numbers(alone), numbers(other)) == ([1, 3, 4], [3, 4])


def test_a_channel_with_the_name_of_none_is_no_group_of_users(site: Site) -> None:
    hostile = site.connect("None", "(7,)", "7", "()")
    user = site.connect("a", user=7)
    site.deliver(1, channel=(7,))
    site.deliver(1, channel="None")
    assert (numbers(hostile), numbers(user)) == ([2], [1])


def test_a_frame_for_users_leaves_the_other_clients_in_their_group(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    clients = connect_all(site)
    others = [client for client in site.loop.clients.values() if client.info.user != 7]
    for each in others:
        monkeypatch.setattr(type(each), "leave_group", only_for(members(site, 7), type(each).leave_group))
    site.deliver(1, channel=(7,))
    group = group_of(site)
    assert all(client in group.in_step for client in others)
    assert all(client in group.ahead for client in members(site, 7))
    site.deliver(1, channel="a")
    assert not group.ahead  # with the next frame of the channel all are in step again
    assert [numbers(client) for client in clients] == [expected(user, [(7,), "a"]) for user in USERS]


def test_attached_streams_of_the_same_user_are_left_alone_by_the_loop(site: Site) -> None:
    attached, theirs = site.delivery.connect("a", user=7), site.connect("a", user=7)
    first = next(attached)
    site.deliver(1, channel=(7,))
    assert not attached.behind
    assert parse(first + next(attached))[1:] == events(theirs)
    attached.close()


def test_a_frame_for_several_users_is_noted_for_each_of_their_streams(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect_all(site)
    (feed,) = site.loop.feeds.values()
    noted: list[tuple[User | None, Position | None]] = []
    monkeypatch.setattr(feed, "note", lambda client, position: noted.append((client.info.user, position)))
    monkeypatch.setattr(feed, "offer", fail)
    site.delivery.deliver(1, channel=(7, 8, "7"))
    site.delivery.deliver(1, channel=(9,))
    assert noted == [(7, 1), (7, 1), (8, 1), ("7", 1)]


def only_for(some: list[Any], method: Callable[[Any], None]) -> Callable[[Any], None]:
    """A method that only these may call."""

    def call(self: Any) -> None:
        assert self in some
        method(self)

    return call


# -- while the group is busy -------------------------------------------------------------------------------------------


def busy(site: Site) -> Group:
    """The group has sent the first frame to one client, and not yet to the others."""
    site.delivery.deliver(1, channel="a")
    site.loop.turn(0)
    group = group_of(site)
    assert group.busy
    return group


@turns_of(1)
@pytest.mark.parametrize("audiences", [[(7,)], [(7,), "a"], ["a", (7,)], ["a", (7,), "a"], [(7,), (7, 8), "a"]])
@pytest.mark.parametrize("together", [True, False])
def test_a_frame_that_comes_while_the_group_is_busy_waits_for_its_place(
    site: Site, audiences: list[Audience], together: bool
) -> None:
    clients = connect_all(site)
    group = busy(site)
    for audience in audiences:
        site.delivery.deliver(1, channel=audience)
        if not together:
            site.loop.turn(0)
    assert group.busy
    site.loop.run()
    assert [numbers(client) for client in clients] == [expected(user, ["a", *audiences]) for user in USERS]


@turns_of(1)
def test_a_group_that_reads_on_lets_users_go_first(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The frame for a user comes before one of the channel, which the busy group reads itself: its feed has no turn."""
    clients = connect_all(site)
    group = busy(site)
    site.delivery.deliver(1, channel="a")
    site.loop.turn(0)  # the feed has noted that the group has missed frames
    (feed,) = site.loop.feeds.values()
    monkeypatch.setattr(feed, "serve", lambda: iter(()))
    site.delivery.deliver(1, channel=(7,))
    site.delivery.deliver(1, channel="a")
    while group.position < 4 or group.busy:
        site.loop.turn(0)
    monkeypatch.undo()
    site.loop.post(feed)
    site.loop.run()
    audiences: list[Audience] = ["a", "a", (7,), "a"]
    assert [numbers(client) for client in clients] == [expected(user, audiences) for user in USERS]


@turns_of(1)
def test_a_frame_for_a_user_that_is_dismissed_waits_for_the_next_stream(site: Site) -> None:
    clients = connect_all(site)
    busy(site)
    site.delivery.deliver(1, channel=(7,))
    site.hub.dismiss("lease", 7)
    site.loop.run()
    got = [events(client) for client, user in zip(clients, USERS, strict=True) if user == 7]
    for frame, bye in got:
        assert ((frame.type, frame.id), (bye.type, bye.id)) == (("t", "x-1"), ("sse_bye", "x-1"))
        back = site.delivery.connect("a", user=7, cursor=bye.id)
        assert [event.id for event in parse(next(back) + next(back))] == ["x-1", "x-2"]
        back.close()


@turns_of(1)
@pytest.mark.parametrize(
    ("audience", "missed_by"), [((7,), {7}), ((7, 8), {7, 8}), (EVERY_USER, {7, 8, "7"}), ("a", {7, 8, "7", None})]
)
@pytest.mark.parametrize("is_busy", [True, False])
def test_a_lost_frame_is_a_gap_for_its_audience_alone(
    site: Site, audience: Audience, missed_by: set[User | None], is_busy: bool
) -> None:
    clients = connect_all(site)
    if is_busy:
        busy(site)
    else:
        site.deliver(1, channel="a")
    site.delivery.lose(audience)
    site.delivery.deliver(1, channel="a")
    site.loop.run()
    for client, user in zip(clients, USERS, strict=True):
        frame, *rest = events(client)
        assert (frame.type, frame.id) == ("t", "x-1")
        kinds = [(event.type, event.id, event.json["reason"] if event.type == "sse_gap" else None) for event in rest]
        assert kinds == ([("sse_gap", "x-3", "publish_failed")] if user in missed_by else [("t", "x-3", None)])
    site.deliver(1, channel=BROADCAST)
    assert [numbers(client) for client in clients] == [[4]] * len(USERS)


@pytest.mark.parametrize("is_busy", [True, False])
def test_a_frame_that_is_gone_before_the_loops_turn_is_a_gap_for_its_users_alone(
    make_site: Callable[..., Site], is_busy: bool
) -> None:
    site = make_site(history=HistoryOptions(history_frames=2), loop={"sends_per_turn": 1, "turn_seconds": 0})
    clients = connect_all(site)
    if is_busy:
        busy(site)
    else:
        site.deliver(1, channel="a")
    site.delivery.deliver(1, channel=(7,))
    site.delivery.deliver(2, channel=(99,))
    site.delivery.deliver(1, channel="a")
    site.loop.run()
    for client, user in zip(clients, USERS, strict=True):
        assert [event.type for event in events(client)] == (["t", "sse_gap"] if user == 7 else ["t", "t"])


def test_a_gap_of_one_user_has_the_reason_of_a_users_loss(site: Site) -> None:
    client = site.connect("a", user=7)
    site.delivery.lose((7,))
    site.loop.run()
    (gap,) = events(client)
    assert gap.json["reason"] == "publish_failed"
    (feed,) = site.loop.feeds.values()
    assert feed.lost_in(["a"]) is None
    assert feed.lost_in(["a"], alone=True) == (1, "publish_failed")


# -- clients that are ahead, behind, full, new, or wait ----------------------------------------------------------------


@turns_of(1)
@pytest.mark.parametrize("audiences", [["a"], [(7,)], [(7,), "a"], ["a", (7,), "a"], [BROADCAST, (7, 8), (8,), "a"]])
def test_a_client_that_is_ahead_gets_what_follows(site: Site, audiences: list[Audience]) -> None:
    clients = connect_all(site)
    site.deliver(1, channel=(7,))
    assert [client in group_of(site).ahead for client in members(site, 7)] == [True] * 2
    for audience in audiences:
        site.delivery.deliver(1, channel=audience)
    site.loop.run()
    assert [numbers(client) for client in clients] == [expected(user, [(7,), *audiences]) for user in USERS]


def test_a_client_that_is_ahead_gets_heartbeats_and_then_the_frames_of_its_group(site: Site) -> None:
    clients = connect_all(site)
    site.deliver(1, channel=(7,))
    for client in clients:
        read(client)
    for _ in range(2):
        site.wait(15)
        assert [read(client) for client in clients] == [b":\n"] * len(USERS)
    site.deliver(1, channel="a")
    assert [numbers(client) for client in clients] == [[2]] * len(USERS)


@turns_of(1)
def test_a_user_whose_frame_comes_during_a_heartbeat_gets_it_once(site: Site) -> None:
    clients = connect_all(site)
    site.clock.now += 15
    site.loop.turn(0)
    site.loop.turn(0)
    assert group_of(site).busy
    site.delivery.deliver(1, channel=(7,))
    site.delivery.deliver(1, channel="a")
    site.loop.run()
    assert [numbers(client) for client in clients] == [expected(user, [(7,), "a"]) for user in USERS]


@pytest.mark.parametrize("audiences", [[(7,)], ["a", (7,)], [(7,), "a", (8,), BROADCAST, (7,)]])
def test_a_client_whose_socket_is_full_reads_both_in_order(site: Site, audiences: list[Audience]) -> None:
    slow, other = site.connect("a", user=7, small=True), site.connect("a", user=8)
    big = "x" * 60_000
    site.deliver(1, big, "a")
    (ours,) = members(site, 7)
    assert ours.full_since is not None
    for audience in audiences:
        site.deliver(1, channel=audience)
    data = b""
    while part := read(slow):
        data += part
        site.loop.run()
    first, *rest = [event.json for event in parse(data)]
    assert first == big
    assert rest == [number + 1 for number in expected(7, audiences)]
    assert numbers(other)[1:] == [number + 1 for number in expected(8, audiences)]
    site.deliver(1, "live again", "a")
    assert (numbers(slow), numbers(other)) == (["live again"], ["live again"])


@turns_of(1)
def test_a_stream_whose_socket_fills_up_with_a_frame_for_its_user_loses_nothing(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    clients = connect_all(site)
    monkeypatch.setattr(groups, "send", lambda *_: -1)
    monkeypatch.setattr(groups, "taken", lambda sent: 0)
    site.delivery.deliver(1, channel="a")
    site.delivery.deliver(1, channel=(7,))
    for _ in range(2 * len(USERS)):
        site.loop.turn(0)
    monkeypatch.undo()
    site.delivery.deliver(1, channel="a")
    site.loop.run()
    assert [numbers(client) for client in clients] == [expected(user, ["a", (7,), "a"]) for user in USERS]


@turns_of(1)
@pytest.mark.parametrize("moment", ["before", "on its way", "taken in"])
def test_a_stream_that_is_new_gets_the_frames_for_its_user(site: Site, moment: str) -> None:
    connect_all(site)
    client = site.delivery.connect("a", user=7)
    first = next(client)
    if moment == "before":
        site.delivery.deliver(1, channel=(7,))
    theirs = site.hand_over(client, first)
    if moment == "on its way":
        site.delivery.deliver(1, channel=(7,))
        site.delivery.deliver(1, channel="a")
    else:
        site.loop.turn(0)
        site.delivery.deliver(1, channel="a")
        site.delivery.deliver(1, channel=(7,))
    site.loop.run()
    ids = [event.id for event in events(theirs)]
    assert ids == ["x-0", *(f"x-{number}" for number in range(1, site.delivery.position + 1))]


class Replays:
    """Stands in for a backend that still has every frame, and answers when the test says so."""

    def __init__(self, site: Site) -> None:
        self.frames: list[Frame] = []
        self.asked: list[tuple[ResumePoint, User | None]] = []
        deliver = site.hub.deliver
        site.hub.deliver = lambda frame: (self.frames.append(frame), deliver(frame))[1]  # type: ignore[method-assign]
        site.delivery.cursors.replay = self.replay

    def replay(self, channels: Sequence[str], point: ResumePoint, user: User | None) -> Slice | None:
        self.asked.append((point, user))
        wanted = [
            frame
            for frame in self.frames
            if frame.position > point.position
            and (frame.batch.channel in (*channels, BROADCAST) or user in frame.batch.users)
        ][:1]
        return Slice(wanted, wanted[-1].position if wanted else self.frames[-1].position)


@pytest.fixture
def forgetful(make_site: Callable[..., Site]) -> Site:
    """A site whose history has one frame of channels and one for users."""
    return make_site(history=HistoryOptions(history_frames=1), loop={"sends_per_turn": 1, "turn_seconds": 0})


@pytest.mark.parametrize("while_it_waits", [[], [(7,)], ["a"], [(8,), "b"], [(7,), "a", (7, 8)]])
def test_a_client_that_waits_for_a_replay_gets_all_in_order(forgetful: Site, while_it_waits: list[Audience]) -> None:
    site = forgetful
    replays = Replays(site)
    audiences: list[Audience] = [(7,), "a", (8,), "b", (7,), "a"]
    for audience in audiences:
        site.delivery.deliver(1, channel=audience)
    client = site.delivery.connect("a", user=7, cursor="x-0")
    theirs = site.hand_over(client, next(client))
    before = len(replays.asked)
    site.loop.turn(0)
    (ours,) = members(site, 7)
    assert ours.waits
    for audience in while_it_waits:
        site.delivery.deliver(1, channel=audience)
        site.loop.turn(0)
    site.loop.run()
    opening, *rest = events(theirs)
    assert (opening.type, [event.json for event in rest]) == ("sse_open", expected(7, [*audiences, *while_it_waits]))
    assert {user for _, user in replays.asked[before:]} == {7}


# -- the end -----------------------------------------------------------------------------------------------------------


def test_the_goodbye_names_the_head_if_nothing_of_the_streams_own_lies_between(site: Site) -> None:
    clients = connect_all(site)
    for audience in ("a", (7,), "b", (99,)):
        site.deliver(1, channel=audience)
    site.hub.dismiss("lease")
    site.loop.run()
    assert [events(client)[-1].id for client in clients] == ["x-4"] * len(USERS)


@pytest.mark.parametrize("audience", ["a", BROADCAST, (7,), (7, 8)])
@pytest.mark.parametrize("lost", [False, True])
def test_the_goodbye_does_not_skip_a_frame_that_the_loop_has_not_read(
    site: Site, audience: Audience, lost: bool
) -> None:
    client = site.connect("a", user=7)
    if lost:
        site.delivery.lose(audience)
    else:
        site.delivery.deliver(1, channel=audience)
    site.delivery.deliver(1, channel="b")
    (ours,) = members(site, 7)
    ours.dismissed = "lease"
    for _ in ours.serve():  # before the feed has its turn
        pass
    (bye,) = events(client)
    assert (bye.type, bye.id) == ("sse_bye", "x-0")
    back = site.delivery.connect("a", user=7, cursor=bye.id)
    assert parse(next(back))[0].type == ("sse_gap" if lost else "sse_open")
    back.close()
    site.loop.run()


@pytest.mark.parametrize("audience", [(7,), (7, 8), "a", BROADCAST])
def test_a_poll_of_a_user_ends_with_its_first_frame(site: Site, audience: Audience) -> None:
    poll = site.delivery.connect("a", user=7, cursor="x-0", poll=True)
    theirs = site.hand_over(poll, next(poll))
    other = site.connect("a", user="7")
    site.deliver(1, channel=(8,))
    assert [event.type for event in events(theirs)] == ["sse_open"]
    site.deliver(1, channel=audience)
    assert [event.id for event in events(theirs)] == ["x-2"]
    assert has_ended(theirs)
    assert numbers(other) == ([2] if isinstance(audience, str) else [])
