"""Feeds: what the hub offers to a listener that is not a client, and streams that are detached."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from sse_batcher import HistoryOptions
from sse_batcher.event import Audience
from sse_batcher.reasons import GapReason
from sse_batcher.streams.client import QueueClient
from sse_batcher.streams.counts import Counts
from sse_batcher.streams.open_stream import OpenStream
from sse_batcher.streams.registry import Registry
from sse_batcher.wire import Frame, Position

from .kit.delivery import Delivery, just_after


class Fed(OpenStream):
    """A detached stream, as the hub sees it."""

    transport = "detached"
    counts = Counts()
    behind = is_waiting = True
    lost = None
    handed = (0, 0)

    def __init__(self, client: QueueClient) -> None:
        super().__init__(client.info, client.point, client.opened_at, client.lease)
        self.dismissed: list[str] = []
        self.offered: list[int] = []

    def dismiss(self, reason: str) -> bool:
        self.dismissed.append(reason)
        return True

    def offer(self, frame: Frame) -> None:
        self.offered.append(frame.position)

    def lose(self, audience: Audience, position: Position, reason: GapReason) -> None:
        raise NotImplementedError

    def fall_behind(self) -> None:
        raise NotImplementedError

    def read_on(self, frames: Iterable[Frame]) -> None:
        raise NotImplementedError

    def go_live(self) -> None:
        raise NotImplementedError


def test_a_stream_that_is_detached_is_counted_as_such() -> None:
    delivery = Delivery()
    clients = [delivery.connect() for _ in range(3)]
    feed = delivery.connect()
    assert delivery.hub.count()["clients_by_transport"] == {"attached": 4, "detached": 0}
    detached = Fed(clients[0])
    assert delivery.hub.replace(clients[0], detached, feed, detached.channels)
    counts = delivery.hub.count()
    assert counts["clients_by_transport"] == {"attached": 3, "detached": 1}
    assert counts["clients_by_state"] == {"live": 3, "behind": 1}
    delivery.hub.remove(detached, "left")
    assert delivery.hub.count()["clients_by_transport"] == {"attached": 3, "detached": 0}


class Feed:
    """A listener for detached streams, which notes what it is offered."""

    def __init__(self) -> None:
        self.counts = Counts(frames=5)
        self.offered: list[int] = []

    def offer(self, frame: Frame) -> None:
        self.offered.append(frame.position)


def test_a_feed_is_offered_the_frames_of_its_channels_until_it_is_unlisted() -> None:
    delivery = Delivery()
    client, feed = delivery.connect("a", "b"), Feed()
    assert delivery.hub.replace(client, Fed(client), feed, client.channels)
    for channel in ("a", "b", "c", "*"):
        delivery.deliver(channel=channel)
    assert feed.offered == [1, 2, 4]
    delivery.hub.unlisten(feed, ["a"])
    for channel in ("a", "b", "*"):
        delivery.deliver(channel=channel)
    assert feed.offered[3:] == [6, 7]
    feed.counts.frames = 7
    assert delivery.hub.count()["frames"] == 7
    delivery.hub.unlisten(feed, ["b", "*"])
    delivery.deliver(channel="*")
    assert feed.offered[5:] == []
    assert delivery.hub.count()["frames"] == 7
    delivery.hub.unlisten(feed, ["b", "*"])  # it does not listen any more
    assert delivery.hub.count()["frames"] == 7


def test_a_stream_is_offered_the_frames_of_the_channels_that_its_feed_leaves_out() -> None:
    delivery = Delivery()
    client, feed = delivery.connect("a", "b", "c", user=7), Feed()
    stream = Fed(client)
    assert delivery.hub.replace(client, stream, feed, ("a", "c"))
    assert [delivery.hub.reader_count(channel) for channel in ("a", "b", "d")] == [1, 1, 0]
    for audience in ("a", "b", "c", "d", "*", (7,)):
        delivery.deliver(channel=audience)
    assert (feed.offered, stream.offered) == ([1, 3, 5], [2, 6])
    delivery.hub.remove(stream, "left")
    delivery.deliver(channel="b")
    assert stream.offered == [2, 6]
    delivery.hub.unlisten(feed, ("a", "c", "*"))
    assert delivery.hub.is_empty()


def test_the_next_frames_for_a_feed_are_none_if_some_are_gone() -> None:
    delivery = Delivery(HistoryOptions(history_frames=2))
    delivery.deliver(3)
    assert [frame.position for frame in delivery.hub.next_frames(("default",), 1) or ()] == [2, 3]
    assert delivery.hub.next_frames(("default",), 3) == []
    assert delivery.hub.next_frames(("default",), 0) is None


def test_a_hub_whose_feed_still_listens_is_not_empty() -> None:
    delivery = Delivery()
    client, feed = delivery.connect(), Feed()
    detached = Fed(client)
    assert delivery.hub.replace(client, detached, feed, client.channels)
    delivery.hub.remove(detached, "left")
    assert not delivery.hub.is_empty()
    delivery.hub.unlisten(feed, ["default", "*"])
    assert delivery.hub.is_empty()


def test_a_hub_with_a_stream_without_a_listener_is_not_empty() -> None:
    delivery = Delivery()
    client, feed = delivery.connect(), Feed()
    detached = Fed(client)
    assert delivery.hub.replace(client, detached, feed, client.channels)
    delivery.hub.unlisten(feed, ["default", "*"])
    assert not delivery.hub.is_empty()
    delivery.hub.remove(detached, "left")
    assert delivery.hub.is_empty()


def test_a_client_that_has_left_is_not_replaced() -> None:
    delivery = Delivery()
    client = delivery.connect()
    client.close()
    assert not delivery.hub.replace(client, Fed(client), client, client.channels)
    assert delivery.hub.is_empty()


def test_a_user_whose_stream_is_replaced_has_a_stream_all_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other threads look without the lock. `revalidate` would never ask again about a user without a stream."""
    delivery = Delivery()
    client = delivery.connect(user="ada")
    looks: list[bool] = []
    just_after(monkeypatch, Registry, "remove", lambda: looks.append(delivery.hub.has_user("ada")))
    assert delivery.hub.replace(client, Fed(client), client, client.channels)
    assert looks == [True]


def test_a_client_that_was_replaced_hands_its_dismissal_on() -> None:
    delivery = Delivery()
    client = delivery.connect()
    detached = Fed(client)
    assert delivery.hub.replace(client, detached, client, client.channels)
    client.dismiss("kicked")
    assert detached.dismissed == ["kicked"]


def test_a_client_that_is_replaced_hands_on_that_it_was_dismissed_before() -> None:
    delivery = Delivery()
    client = delivery.connect()
    client.dismiss("kicked")
    detached = Fed(client)
    assert delivery.hub.replace(client, detached, client, client.channels)
    assert detached.dismissed == ["kicked"]
