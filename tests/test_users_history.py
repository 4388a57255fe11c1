"""Users in the hub and the history: what is kept for them, what is lost, and where a quiet stream stands."""

from __future__ import annotations

from typing import Any

import pytest

from sse_batcher import HistoryOptions
from sse_batcher.event import BROADCAST, EVERY_USER, Audience, User
from sse_batcher.streams import history as histories
from sse_batcher.streams.client import QueueClient
from sse_batcher.streams.history import History, ResumePoint

from .kit.delivery import Delivery, Queues, bye, connect_user, deliver_all, opened, take
from .kit.sse_parser import parse

SMALL = HistoryOptions(history_frames=5)


def received(client: QueueClient) -> list[tuple[str, str]]:
    """The type and the position of all blocks that there are, up to a goodbye."""
    client.end("lease")
    events = [(event.type, event.id) for block in client for event in parse(block)]
    assert events.pop()[0] == "sse_bye"
    return events


MIXTURE: list[Audience] = ["a", (7,), (8,), "b", (7, 8), BROADCAST, "a", (7,)]
"""All but the third and fourth frame are for a stream of the channel a and the user 7."""


# -- lost frames -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("audience", "missed_by"),
    [((7,), {7}), ((7, 8), {7, 8}), (("7",), {"7"}), (EVERY_USER, {7, 8, "7"}), ("7", set()), ("a", {7, None})],
)
def test_a_lost_frame_is_a_gap_for_its_audience_alone(audience: Audience, missed_by: set[User | None]) -> None:
    delivery = Delivery()
    users: list[User | None] = [7, 8, "7", None]
    channels = {7: ("a",), 8: (), "7": ("b",), None: ("a", "b")}
    clients = {user: connect_user(delivery, *channels[user], user=user) for user in users}
    others = {user: connect_user(delivery, *channels[user], user=user) for user in users}
    cursors = {user: bye(client) for user, client in others.items()}
    delivery.lose(audience)
    delivery.deliver(1, channel=BROADCAST)
    gap, frame = ("sse_gap", "x-2"), ("t", "x-2")
    for user, client in clients.items():
        assert received(client) == ([gap] if user in missed_by else [frame])
        expected = ("sse_gap", "x-2") if user in missed_by else ("sse_open", cursors[user])
        assert opened(delivery, cursors[user], *channels[user], user=user) == expected


def test_a_lost_frame_for_users_gives_its_reason() -> None:
    delivery = Delivery()
    client = connect_user(delivery, user=7)
    delivery.lose((7,))
    ((event, data, _),) = take(client, 1)
    assert (event, data["reason"]) == ("sse_gap", "publish_failed")
    client.close()


def test_a_loss_of_unknown_users_counts_until_the_user_has_gone_on_after_it() -> None:
    delivery = Delivery()
    delivery.deliver(1, channel=(7,))
    delivery.lose(EVERY_USER)
    assert opened(delivery, "x-1", user=7)[0] == "sse_gap"
    assert opened(delivery, "x-1", user="never seen")[0] == "sse_gap"
    assert opened(delivery, "x-2", user=7) == ("sse_open", "x-2")
    delivery.deliver(1, channel=(7,))
    assert opened(delivery, "x-2", user=7) == ("sse_open", "x-2")
    assert opened(delivery, "x-1") == ("sse_open", "x-3")  # it has no user


def test_a_loss_of_unknown_users_counts_for_a_user_who_has_lost_frames_before() -> None:
    delivery = Delivery(SMALL)
    deliver_all(delivery, [(7,), *[(8,)] * 5])
    assert opened(delivery, "x-6", user=7) == ("sse_open", "x-6")
    delivery.lose(EVERY_USER)
    assert opened(delivery, "x-6", user=7)[0] == "sse_gap"


def test_only_users_whose_frames_are_gone_have_lost_some() -> None:
    delivery, history = Delivery(), History(SMALL, 0)
    users: list[User] = [7, 8, 9, 10, "all"]
    for user in (7, 8, 9, 9, 9, 9, 9):
        history.append(delivery.frame(channel=(user, "all")))

    def gone(point: ResumePoint) -> list[User]:
        return [user for user in users if not history.covers((), point, user)]

    assert gone(ResumePoint(0)) == [7, 8, "all"]
    assert gone(ResumePoint(1)) == [8, "all"]
    assert gone(ResumePoint(1, part=1)) == [7, 8, "all"]


# -- two shelves -------------------------------------------------------------------------------------------------------


def test_frames_for_users_evict_nothing_of_a_channel_and_the_other_way_round() -> None:
    delivery = Delivery(SMALL)
    delivery.deliver(5, channel="a")
    delivery.deliver(5, channel=(7,))
    assert opened(delivery, "x-0", "a", user=7) == ("sse_open", "x-0")
    delivery.deliver(1, channel=(8,))  # the sixth for users
    assert opened(delivery, "x-0", "a") == ("sse_open", "x-0")
    assert opened(delivery, "x-0", "a", user=8) == ("sse_open", "x-0")
    assert opened(delivery, "x-0", "a", user=7)[0] == "sse_gap"
    assert opened(delivery, "x-6", "a", user=7) == ("sse_open", "x-6")
    delivery.deliver(1, channel="b")  # the sixth for channels
    assert opened(delivery, "x-0", "a")[0] == "sse_gap"
    assert opened(delivery, "x-6", "b", user=7) == ("sse_open", "x-6")


def test_the_bytes_of_frames_for_users_are_counted_apart() -> None:
    delivery = Delivery(HistoryOptions(history_bytes=20_000))
    delivery.deliver(1, "x" * 5_000, "a")
    delivery.deliver(10, "x" * 5_000, (7,))
    assert opened(delivery, "x-0", "a") == ("sse_open", "x-0")
    assert opened(delivery, "x-0", user=7)[0] == "sse_gap"
    stats = delivery.hub.count()
    assert stats["history_frames"] == 2
    assert stats["history_bytes"] > 20_000


def test_frames_for_users_expire_too() -> None:
    history = History(HistoryOptions(history_age=10), 0)
    delivery = Delivery()
    frames = [delivery.frame(channel=audience) for audience in ("a", (7,))]
    for frame in frames:
        history.append(frame)
    assert history.oldest is frames[0]
    history.expire(10_001)
    assert (len(history), history.bytes, history.oldest) == (0, 0, None)
    assert not history.covers(("b",), ResumePoint(1), 7)
    assert history.covers(("b",), ResumePoint(1), 8)


def test_the_oldest_frame_may_be_one_for_users() -> None:
    history = History(HistoryOptions(), 0)
    delivery = Delivery()
    frames = [delivery.frame(channel=audience) for audience in ((7,), "a")]
    for frame in frames:
        history.append(frame)
    assert history.oldest is frames[0]


def test_a_frame_for_several_users_is_kept_once_and_gone_for_all_of_them() -> None:
    delivery = Delivery(SMALL)
    delivery.deliver(1, channel=(7, 8))
    delivery.deliver(4, channel=(8, 9))
    assert opened(delivery, "x-0", user=7) == ("sse_open", "x-0")
    delivery.deliver(1, channel=(9,))
    for user, first in ((7, "sse_gap"), (8, "sse_gap"), (9, "sse_open"), (10, "sse_open")):
        assert opened(delivery, "x-0", user=user)[0] == first
    assert delivery.hub.count()["history_frames"] == 5


def test_channels_and_users_have_floors_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(histories, "MAX_FLOORS", 2)
    delivery, history, start = Delivery(), History(HistoryOptions(history_frames=1), 0), ResumePoint(0)
    for user in range(5):
        history.append(delivery.frame(channel=(user,)))
    assert not history.covers((), start, "quiet")  # more users than floors
    assert history.gone(["quiet", BROADCAST], start) == []
    for channel in range(5):
        history.append(delivery.frame(channel=str(channel)))
    assert history.gone(["quiet", BROADCAST], start) == ["quiet", BROADCAST]
    assert history.covers((), ResumePoint(10), "quiet")


# -- where a stream stands when it ends, and when it comes back --------------------------------------------------------


def frames_of_others(delivery: Delivery) -> None:
    delivery.deliver(1, channel="b")
    delivery.deliver(1, channel=(8,))


@pytest.mark.parametrize("user", [None, 7])
def test_the_goodbye_names_the_head_if_nothing_of_the_streams_own_lies_between(user: User | None) -> None:
    delivery = Delivery()
    client = connect_user(delivery, "a", user=user)
    delivery.deliver(1, channel="a")
    take(client, 1)
    frames_of_others(delivery)
    assert bye(client) == "x-3"
    assert opened(delivery, "x-1", "a", user=user) == ("sse_open", "x-3")


OWN: list[Audience] = ["a", BROADCAST, (7,), (1, 7)]


@pytest.mark.parametrize("audience", OWN)
def test_the_goodbye_does_not_skip_a_frame_that_is_still_queued(audience: Audience) -> None:
    delivery = Delivery()
    client = connect_user(delivery, "a", user=7)
    frames_of_others(delivery)
    delivery.deliver(1, channel=audience)
    frames_of_others(delivery)
    cursor = bye(client)
    assert cursor == "x-0"
    back = delivery.connect("a", cursor=cursor, user=7)
    assert [id for _, _, id in take(back, 2)] == ["x-0", "x-3"]


@pytest.mark.parametrize("audience", OWN)
def test_the_goodbye_does_not_skip_a_frame_that_comes_in_between(audience: Audience) -> None:
    """The hub has it in the history, and has not offered it yet, when the stream asks where it stands."""
    delivery = Delivery()
    client = connect_user(delivery, "a", user=7)
    frames_of_others(delivery)
    offer = client.offer
    said: list[str] = []

    def end_first(frame: Any) -> None:
        said.append(bye(client))
        offer(frame)

    client.offer = end_first  # type: ignore[method-assign]
    delivery.deliver(1, channel=audience)
    assert said == ["x-2"]  # the newest one that was offered to all
    assert [id for _, _, id in take(delivery.connect("a", cursor="x-2", user=7), 2)] == ["x-2", "x-3"]


@pytest.mark.parametrize("audience", OWN)
def test_the_goodbye_does_not_skip_a_loss_that_comes_in_between(audience: Audience) -> None:
    """The history knows of it, and the stream does not, when the stream asks where it stands."""
    delivery = Delivery()
    client = connect_user(delivery, "a", user=7)
    frames_of_others(delivery)
    fall_behind = client.fall_behind
    said: list[str] = []

    def end_first() -> None:
        said.append(bye(client))
        fall_behind()

    client.fall_behind = end_first  # type: ignore[method-assign]
    delivery.lose(audience)
    assert said == ["x-2"]
    assert opened(delivery, "x-2", "a", user=7)[0] == "sse_gap"


@pytest.mark.parametrize("audience", OWN)
def test_the_goodbye_does_not_skip_a_frame_that_was_lost(audience: Audience) -> None:
    delivery = Delivery()
    client = connect_user(delivery, "a", user=7)
    delivery.lose(audience)
    frames_of_others(delivery)
    cursor = bye(client)
    assert cursor == "x-0"
    assert opened(delivery, cursor, "a", user=7)[0] == "sse_gap"


@pytest.mark.parametrize("audience", OWN)
def test_the_goodbye_does_not_skip_a_frame_that_was_evicted(audience: Audience) -> None:
    delivery = Delivery(HistoryOptions(history_frames=1))
    client = connect_user(delivery, "a", user=7)
    delivery.deliver(1, channel=audience)
    frames_of_others(delivery)
    cursor = bye(client)
    assert cursor == "x-0"
    assert opened(delivery, cursor, "a", user=7)[0] == "sse_gap"


@pytest.mark.parametrize("audience", OWN)
@pytest.mark.parametrize("evicted", [False, True], ids=["kept", "evicted"])
def test_the_goodbye_does_not_skip_the_rest_of_a_frame(audience: Audience, evicted: bool) -> None:
    """A client without batches, which was cut off after the first of two events, is dismissed when it comes back."""
    delivery = Delivery(HistoryOptions(history_frames=1))
    delivery.deliver(1, channel=audience)
    if evicted:
        deliver_all(delivery, ["b", (8,)])
        assert opened(delivery, "x-1.1", "a", user=7, batches=False)[0] == "sse_gap"
        return
    delivery.deliver(1, channel=(8,) if isinstance(audience, str) else "b")
    client = connect_user(delivery, "a", cursor="x-1.1", user=7, batches=False)
    assert bye(client) == "x-1.1"


def test_the_goodbye_of_a_stream_that_reads_the_history_names_what_it_has_got() -> None:
    delivery = Delivery(queue_frames=2)
    client = connect_user(delivery, "a", user=7)
    for _ in range(3):
        delivery.deliver(1, channel=(7,))
        delivery.deliver(1, channel="a")
    assert [id for _, _, id in take(client, 3)] == ["x-1", "x-2", "x-3"]
    frames_of_others(delivery)
    assert bye(client) == "x-3"


def test_a_frame_that_comes_while_the_stream_comes_back_is_not_skipped() -> None:
    """In one step, the hub looks for frames in between and lists the stream: a later frame is offered to it."""
    queues = Queues()
    delivery = Delivery(make_queue=queues)
    frames_of_others(delivery)
    client = connect_user(delivery, "a", cursor="x-0", user=7)
    queues[0].meet_before_wait(lambda: delivery.deliver(1, channel=(7,)))
    assert [id for _, _, id in take(client, 1)] == ["x-3"]


@pytest.mark.parametrize("cursor", ["x-0", "x-1", "x-2"])
@pytest.mark.parametrize("audience", OWN)
def test_a_stream_comes_back_at_the_head_only_from_after_its_newest_frame(cursor: str, audience: Audience) -> None:
    delivery = Delivery()
    frames_of_others(delivery)
    delivery.deliver(1, channel=audience)
    delivery.deliver(1, channel="b")
    assert opened(delivery, cursor, "a", user=7) == ("sse_open", cursor)
    assert opened(delivery, "x-3", "a", user=7) == ("sse_open", "x-4")


def test_whether_a_client_can_resume_depends_on_its_user() -> None:
    delivery = Delivery()
    delivery.lose((7,))
    answers = [delivery.can_resume("x-0", "a", user=user) for user in (7, "7", 8, None)]
    assert answers == [False, True, True, True]


def test_a_slow_user_reads_frames_for_users_and_of_channels_in_order() -> None:
    delivery = Delivery(queue_frames=2)
    client = connect_user(delivery, "a", user=7)
    deliver_all(delivery, MIXTURE)
    assert [id for _, id in received(client)] == ["x-1", "x-2", "x-5", "x-6", "x-7", "x-8"]


def test_a_user_that_polls_gets_slices_of_both_in_order() -> None:
    delivery = Delivery(queue_frames=2)
    deliver_all(delivery, MIXTURE)
    got, cursor = [], "x-0"
    for _ in range(3):
        client = delivery.connect("a", user=7, cursor=cursor, poll=True)
        first, *rest = [event.id for block in client for event in parse(block)]
        assert (first, len(rest)) == (cursor, 2)
        got += rest
        cursor = rest[-1]
    assert got == ["x-1", "x-2", "x-5", "x-6", "x-7", "x-8"]
