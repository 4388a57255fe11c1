"""Rare channels of detached streams: their frames are read alone, so that groups of common channels stay large."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import pytest

from sse_batcher import HistoryOptions
from sse_batcher.event import BROADCAST, Audience
from sse_batcher.streams import history as histories
from sse_batcher.transports.detached import feed as feeds
from sse_batcher.transports.detached.connection import SocketClient
from sse_batcher.wire import Frame

from .kit.site import Site, Threaded, events, fail, has_ended, numbers, read, turns_of
from .kit.sse_parser import parse

SEATS: Sequence[tuple[str, ...]] = (("all", "a"), ("all", "b"), ("all", "a", "b"), ("all", "c"), ("c",))
AUDIENCES: list[Audience] = ["all", "a", "b", BROADCAST]


@pytest.fixture
def switches() -> Iterator[None]:
    """Threads take turns as often as possible."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.fixture
def rare(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Set how many readers make a channel common. The first group has no rare channels either."""

    def common_with(readers: int) -> None:
        monkeypatch.setattr(feeds, "COMMON_READERS", readers)

    monkeypatch.setattr(feeds, "MAX_GROUPS_OF_RARE_CHANNELS", 0)
    common_with(3)
    return common_with


def connect_all(site: Site) -> list[socket.socket]:
    """A stream for each of `SEATS`. The first two read ``all`` alone, and the others with their group."""
    clients = [site.connect(*channels) for channels in SEATS]
    assert [ours.group.channels for ours in site.loop.clients.values()] == [(), (), ("all",), ("all",), ()]
    return clients


def expected(channels: Sequence[str], audiences: Sequence[Audience]) -> list[int]:
    """The numbers that such a stream gets, if one frame each was delivered to these audiences, from 1 on."""
    return [number for number, audience in enumerate(audiences, 1) if audience in (*channels, BROADCAST)]


def ours(site: Site, number: int) -> SocketClient:
    return list(site.loop.clients.values())[number]


# -- which channels are rare -------------------------------------------------------------------------------------------


def test_clients_with_a_channel_each_are_one_group_beside_the_first_few(site: Site) -> None:
    clients = [site.connect("all", f"own-{number}") for number in range(50)]
    groups = [client.group for client in site.loop.clients.values()]
    assert len(set(groups[:16])) == 16  # so few groups have all channels of their clients
    assert {group.channels for group in groups[16:]} == {("all",)}
    assert len(set(groups[16:])) == 1
    site.delivery.deliver(1, "before")
    for number in range(50):
        site.delivery.deliver(1, number, f"own-{number}")
    site.deliver(1, "to all", "all")
    assert [numbers(client) for client in clients] == [[number, "to all"] for number in range(50)]
    assert site.hub.count()["clients_by_channel"] == {"all": 50} | {f"own-{number}": 1 for number in range(50)}


def test_a_frame_of_a_common_channel_takes_no_client_out_of_its_group(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    clients = [site.connect("all", f"own-{number}") for number in range(50)]
    monkeypatch.setattr(SocketClient, "leave_group", fail)
    monkeypatch.setattr(site.hub, "advance", fail)
    site.deliver(2, channel="all")
    site.deliver(1, channel=BROADCAST)
    assert [numbers(client) for client in clients] == [[1, 2, 3]] * 50


def test_a_frame_of_a_rare_channel_takes_no_other_client_out_of_its_group(
    site: Site, rare: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect_all(site)
    left: list[SocketClient] = []
    leave = SocketClient.leave_group
    monkeypatch.setattr(SocketClient, "leave_group", lambda client: (left.append(client), leave(client)))
    site.deliver(1, channel="b")
    assert left == [ours(site, 1), ours(site, 2)]


def test_a_channel_that_is_not_rare_any_more_is_read_by_the_group(
    site: Site, rare: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    clients = [site.connect("all", "team") for _ in range(3)]
    assert [client.group.channels for client in site.loop.clients.values()] == [(), (), ("all", "team")]
    site.deliver(1, channel="team")
    assert {client.group.channels for client in site.loop.clients.values()} == {("all", "team")}
    assert site.hub.reader_count("team") == 1  # the feed
    monkeypatch.setattr(SocketClient, "leave_group", fail)
    for audience in ("team", "all", BROADCAST):
        site.deliver(1, channel=audience)
    assert [numbers(client) for client in clients] == [[1, 2, 3, 4]] * 3


def test_a_channel_that_is_common_because_of_attached_streams_is_read_by_the_group(site: Site, rare: object) -> None:
    clients = [site.connect("team") for _ in range(2)]
    attached = [site.delivery.connect("team") for _ in range(2)]
    site.deliver(1, channel="team")
    assert {client.group.channels for client in site.loop.clients.values()} == {("team",)}
    site.deliver(1, channel="team")
    assert [numbers(client) for client in clients] == [[1, 2]] * 2
    for stream in attached:
        stream.close()


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("audiences", [["team"], ["all"], ["team", "all"], ["x"], ["all", "team", BROADCAST]])
def test_a_frame_that_comes_while_a_client_moves_to_another_group_arrives(
    site: Site, rare: object, monkeypatch: pytest.MonkeyPatch, moment: str, audiences: list[Audience]
) -> None:
    clients = [site.connect("all", "team") for _ in range(3)]
    share, moved = site.hub.share, []

    def deliver() -> None:
        for audience in audiences:
            site.delivery.deliver(1, channel=audience)

    def deliver_meanwhile(client: Any, *args: Any) -> None:
        moved.append(client)
        if len(moved) == 1 and moment == "before":
            deliver()
        share(client, *args)
        if len(moved) == 1 and moment == "after":
            deliver()

    monkeypatch.setattr(site.hub, "share", deliver_meanwhile)
    site.deliver(1, channel="team")
    assert moved == [ours(site, 0), ours(site, 1)]
    assert [numbers(client) for client in clients] == [expected(("all", "team"), ["team", *audiences])] * 3


# -- which client gets what, and in which order ------------------------------------------------------------------------


@pytest.mark.parametrize("sends", [1, 2, 1_000])
def test_no_moment_makes_a_frame_come_twice_or_late(rare: object, sends: int) -> None:
    """Each order of three frames, with each number of the loop's turns in between: groups are busy, or they are not."""
    for audiences, turns in product(product(AUDIENCES, repeat=2), product((0, 1, 3), repeat=2)):
        site = Site(loop={"sends_per_turn": sends, "turn_seconds": 0})
        clients = connect_all(site)
        for audience, some in zip(("all", *audiences), (*turns, 0), strict=True):
            site.delivery.deliver(1, channel=audience)
            for _ in range(some):
                site.loop.turn(0)
        site.loop.run()
        got = [numbers(client) for client in clients]
        assert got == [expected(channels, ("all", *audiences)) for channels in SEATS], (audiences, turns)
        site.close()


@pytest.mark.parametrize("moment", ["after the feed", "while the feed reads"])
def test_a_frame_that_a_group_has_before_it_is_noted_for_a_client_arrives(
    site: Site, rare: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """The same channel is read by one client's group, and by another client alone, to which the hub offers it last."""
    rare(1)
    grouped = site.connect("a")
    rare(9)
    alone = site.connect("a")
    assert [client.group.channels for client in site.loop.clients.values()] == [("a",), ()]
    offer, news = SocketClient.offer, site.hub.news
    late: list[Callable[[], None]] = []

    def offer_late(client: SocketClient, frame: Frame) -> None:
        late.append(lambda: offer(client, frame))
        site.loop.run()
        while late:
            late.pop()()

    def look(*args: Any) -> Any:
        if read(grouped) and moment == "while the feed reads":
            late.pop()()
        return news(*args)

    monkeypatch.setattr(SocketClient, "offer", offer_late)
    monkeypatch.setattr(site.hub, "news", look)
    for number in (1, 2, 3):
        site.delivery.deliver(1, channel="a")
        site.loop.run()
        assert numbers(alone) == [number]


def test_a_client_is_noted_before_the_feed_is(site: Site, rare: object) -> None:
    client = site.connect("a")
    (feed,) = site.loop.feeds.values()

    class Notes(dict[SocketClient, None]):
        def __setitem__(self, noted: SocketClient, value: None) -> None:
            site.loop.run()
            super().__setitem__(noted, value)

    feed.noted = Notes()
    for _ in range(3):
        site.delivery.deliver(1, channel="a")
    site.loop.run()
    assert numbers(client) == [1, 2, 3]


def test_with_threads_each_client_gets_its_frames_once_and_in_order(threaded: Threaded, switches: None) -> None:
    """Two clients have each channel but the common one. Some of them begin in the middle."""
    sent: list[Audience] = []
    clients: list[tuple[int, str, socket.socket]] = []

    def publish(times: int) -> None:
        for number in range(times):
            channel = ("all", f"own-{number % 30}", BROADCAST, f"own-{number * 7 % 30}")[number % 4]
            sent.append(channel)
            if channel == BROADCAST:
                threaded.manager.broadcast("t", len(sent))
            else:
                threaded.manager.enqueue("t", len(sent), channel=channel)

    for number in range(60):
        own = f"own-{number // 2}"
        threaded.manager.flush_all()
        clients.append((len(sent), own, threaded.connect("all", own)))
        publish(number % 5)
    publish(400)
    for first, own, client in clients:
        wanted = [number for number, channel in enumerate(sent, 1) if channel in ("all", own, BROADCAST)]
        wanted = [number for number in wanted if number > first]
        data = b""
        while data.count(b"\n\n") < len(wanted):
            data += client.recv(100_000)
        assert [event.json for event in parse(data)] == wanted
        client.close()


@pytest.mark.parametrize("is_busy", [True, False])
def test_a_frame_of_a_rare_channel_that_comes_while_the_feed_reads_comes_first(
    make_site: Callable[..., Site], rare: object, monkeypatch: pytest.MonkeyPatch, is_busy: bool
) -> None:
    site = make_site(loop={"sends_per_turn": 1, "turn_seconds": 0})
    clients = connect_all(site)
    seats = [*SEATS, *[("all",)] * 5]
    clients += [site.connect("all") for _ in range(5)]
    group = ours(site, -1).group
    site.delivery.deliver(1, channel="all")
    while is_busy and not group.busy:
        site.loop.turn(0)
    if is_busy:
        site.delivery.deliver(1, channel="all")
        site.loop.turn(0)
        assert group.busy
    else:
        site.loop.run()
    name = "next_frames" if is_busy else "news"
    look = getattr(site.hub, name)
    audiences: list[Audience] = ["all"] * (1 + is_busy)

    def look_late(*args: Any) -> Any:
        if len(audiences) < 3 + is_busy:
            for audience in ("b", "all"):
                audiences.append(audience)
                site.delivery.deliver(1, channel=audience)
        return look(*args)

    monkeypatch.setattr(site.hub, name, look_late)
    audiences.append("c")
    site.delivery.deliver(1, channel="c")
    site.loop.run()
    assert len(audiences) > 3
    assert [numbers(client) for client in clients] == [expected(channels, audiences) for channels in seats]


@pytest.mark.parametrize("audience", ["b", "all"])
def test_a_lost_frame_of_a_rare_channel_is_a_gap_for_its_readers_alone(site: Site, rare: object, audience: str) -> None:
    clients = connect_all(site)
    site.deliver(1, channel=BROADCAST)
    site.delivery.lose(audience)
    site.delivery.deliver(1, channel=BROADCAST)
    site.loop.run()
    for client, channels in zip(clients, SEATS, strict=True):
        frame, *rest = events(client)
        kinds = [(event.type, event.id, event.json["reason"] if event.type == "sse_gap" else None) for event in rest]
        assert (frame.type, frame.id) == ("t", "x-1")
        assert kinds == ([("sse_gap", "x-3", "publish_failed")] if audience in channels else [("t", "x-3", None)])


def test_frames_of_a_rare_channel_that_are_gone_before_the_loops_turn_are_a_gap(
    make_site: Callable[..., Site], rare: object
) -> None:
    site = make_site(history=HistoryOptions(history_frames=2))
    clients = connect_all(site)
    site.delivery.deliver(1, channel="b")
    site.delivery.deliver(2, channel="all")
    site.loop.run()
    kinds = [[event.type for event in events(client)] for client in clients]
    assert kinds == [["t", "t"], ["sse_gap"], ["sse_gap"], ["t", "t"], []]


def test_a_frame_of_a_rare_channel_arrives_although_it_is_evicted_before_the_streams_turn(
    make_site: Callable[..., Site], rare: object
) -> None:
    site = make_site(history=HistoryOptions(history_frames=5))
    clients = connect_all(site)
    site.delivery.deliver(1, channel="a")
    site.loop.turn(0)  # the feed reads; the streams have their turn in the next one
    site.delivery.deliver(6, channel="nothing")
    site.loop.run()
    assert [numbers(client) for client in clients] == [[1], [], [1], [], []]
    assert site.hub.count()["gaps"] == 0


@pytest.mark.parametrize("audiences", [["a"], ["all", "a"], ["a", "all", "b", BROADCAST, "a"]])
def test_a_client_whose_socket_is_full_reads_both_in_order(site: Site, rare: object, audiences: list[Audience]) -> None:
    others = connect_all(site)
    slow = site.connect("all", "x", "a", small=True)
    big = "x" * 60_000
    site.deliver(1, big, "all")
    assert ours(site, -1).full_since is not None
    for audience in audiences:
        site.deliver(1, channel=audience)
    data = b""
    while part := read(slow):
        data += part
        site.loop.run()
    audiences = ["all", *audiences]
    assert [event.json for event in parse(data)] == [big, *expected(("all", "a"), audiences)[1:]]
    for client, channels in zip(others, SEATS, strict=True):
        assert numbers(client) == [big if number == 1 else number for number in expected(channels, audiences)]


@pytest.mark.parametrize("kind", ["users", "channels"])
def test_a_quiet_rare_channel_meets_no_false_gap_after_more_others_than_floors(
    make_site: Callable[..., Site], rare: object, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(histories, "MAX_FLOORS", 2)
    site = make_site(history=HistoryOptions(history_frames=3))
    clients = connect_all(site)
    for number in range(20):
        site.deliver(1, channel=(f"user-{number}",) if kind == "users" else f"channel-{number}")
    site.deliver(1, channel="a")
    site.deliver(1, channel="all")
    got = [[(event.type, event.id) for event in events(client)] for client in clients]
    both, one = [("t", "x-21"), ("t", "x-22")], [("t", "x-22")]
    assert got == [both, one, both, one, []]


# -- the end -----------------------------------------------------------------------------------------------------------


def test_the_goodbye_names_the_head_if_nothing_of_the_streams_own_lies_between(site: Site, rare: object) -> None:
    clients = connect_all(site)
    for audience in ("all", "a", "z"):
        site.deliver(1, channel=audience)
    site.hub.dismiss("lease")
    site.loop.run()
    assert [events(client)[-1].id for client in clients] == ["x-3"] * len(SEATS)


@pytest.mark.parametrize("lost", [False, True])
def test_the_goodbye_does_not_skip_a_frame_that_the_loop_has_not_read(site: Site, rare: object, lost: bool) -> None:
    client = site.connect("a")
    if lost:
        site.delivery.lose("a")
    else:
        site.delivery.deliver(1, channel="a")
    site.delivery.deliver(1, channel="b")
    ours(site, 0).dismissed = "lease"
    for _ in ours(site, 0).serve():  # before the feed has its turn
        pass
    (bye,) = events(client)
    assert (bye.type, bye.id) == ("sse_bye", "x-0")
    site.loop.run()


@pytest.mark.parametrize("audience", ["a", BROADCAST])
def test_a_poll_of_a_rare_channel_ends_with_its_first_frame(site: Site, rare: object, audience: str) -> None:
    poll = site.delivery.connect("all", "a", cursor="x-0", poll=True)
    theirs = site.hand_over(poll, next(poll))
    site.deliver(1, channel="b")
    assert [event.type for event in events(theirs)] == ["sse_open"]
    site.deliver(1, channel=audience)
    assert [event.id for event in events(theirs)] == ["x-2"]
    assert has_ended(theirs)


@turns_of(1)
def test_a_client_kicked_with_a_frame_of_a_rare_channel_on_its_way_gets_only_the_bye(site: Site, rare: object) -> None:
    client = site.connect("a")
    site.delivery.deliver(1, channel="a")
    site.loop.turn(0)
    site.hub.dismiss("kicked")
    site.loop.run()
    assert [(event.type, event.id) for event in events(client)] == [("sse_bye", "x-0")]
