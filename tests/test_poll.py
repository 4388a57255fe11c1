"""Polls of the hub, attached and detached, with a clock that the test moves: ``poll=1`` is a stream that ends."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

from sse_batcher import ClosedError, HistoryOptions, Text
from sse_batcher.event import Batch, Event
from sse_batcher.streams.history import ResumePoint, Slice
from sse_batcher.streams.opening import Snapshot
from sse_batcher.wire import HEARTBEAT, Frame

from .kit import polls
from .kit.delivery import Numbers
from .kit.polls import MakePoll, Poll, options, retry_of, to_end, types
from .kit.site import Site, batched, has_ended, numbers, turns_of
from .kit.sse_parser import parse

poll = polls.poll
site = polls.site

# -- when it ends ------------------------------------------------------------------------------------------------------


def test_a_poll_without_a_cursor_ends_with_its_first_block_and_gives_one(site: Site, poll: MakePoll) -> None:
    site.deliver(3)
    new = poll()
    (opened,) = new.answer()
    assert (opened.type, opened.id, opened.json["channels"]) == ("sse_open", "x-3", ["default"])
    assert not new.was_detached
    assert site.hub.is_empty()


def test_a_poll_with_a_cursor_waits_for_an_event_and_ends_with_it(site: Site, poll: MakePoll) -> None:
    waiting = poll("x-0")
    site.deliver(channel="other")
    assert waiting.waits()
    site.deliver()
    opened, event = waiting.answer()
    assert (opened.type, opened.id) == ("sse_open", "x-0")
    assert (event.type, event.json, event.id) == ("t", 2, "x-2")
    assert site.hub.is_empty()
    again = poll(event.id)
    assert again.waits()
    site.deliver()
    assert again.numbers() == [3]


def test_a_broadcast_ends_all_polls(site: Site, poll: MakePoll) -> None:
    polls = [poll("x-0", channel) for channel in ("a", "a", "b")]
    site.deliver(channel="*")
    assert [each.numbers() for each in polls] == [[1]] * 3
    assert site.hub.is_empty()


@pytest.mark.parametrize("first", ["poll", "stream"])
def test_a_stream_beside_a_poll_goes_on(site: Site, poll: MakePoll, first: str) -> None:
    waiting = poll("x-0") if first == "poll" else None
    stream = site.connect()
    waiting = waiting or poll("x-0")
    site.deliver()
    assert waiting.numbers() == [1]
    site.deliver()
    assert numbers(stream) == [1, 2]
    assert not has_ended(stream)


def test_a_poll_that_is_behind_ends_at_once_with_all_that_it_has_missed(site: Site, poll: MakePoll) -> None:
    site.deliver(3)
    late = poll("x-1")
    assert not late.was_detached
    assert late.numbers() == [2, 3]


@options(queue_frames=2)
def test_a_poll_brings_one_slice_of_what_there_is(site: Site, poll: MakePoll) -> None:
    site.deliver(5)
    cursor, found = "x-0", []
    for expected in (2, 2, 1):
        events = poll(cursor).answer()[1:]
        assert len(events) == expected
        found += [event.json for event in events]
        cursor = events[-1].id
    assert found == [1, 2, 3, 4, 5]
    assert poll(cursor).waits()


@options(queue_bytes=100)
def test_a_slice_is_limited_in_bytes_too(site: Site, poll: MakePoll) -> None:
    waiting = poll("x-0")
    site.delivery.deliver(3, "x" * 60)
    site.loop.run()
    (event,) = waiting.answer()[1:]
    assert event.id == "x-1"
    assert [each.id for each in poll(event.id).answer()] == ["x-1", "x-2"]


@options(history=HistoryOptions(history_frames=1))
def test_a_poll_brings_what_only_the_backend_still_has(
    site: Site, poll: MakePoll, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames: list[Any] = []

    def replay(cursors: Numbers, channels: Any, point: ResumePoint, user: Any) -> Slice:
        later = [frame for frame in frames if frame.position > point.position][:2]
        return Slice(later, later[-1].position)

    def deliver(count: int) -> None:
        for _ in range(count):
            frames.append(site.delivery.frame())
            site.hub.deliver(frames[-1])
        site.loop.run()

    monkeypatch.setattr(Numbers, "replay", replay)
    deliver(5)
    late = poll("x-1")
    assert not late.was_detached
    assert late.numbers() == [2, 3]
    assert poll("x-3").numbers() == [4, 5]
    waiting = poll("x-5")
    deliver(3)
    assert waiting.numbers() == [6, 7]


@pytest.mark.parametrize(("cursor", "reason"), [("y", "epoch"), ("x-9", "malformed"), ("x-1", "too_old")])
@options(history=HistoryOptions(history_frames=1))
def test_a_poll_whose_cursor_cannot_be_used_ends_at_once_with_the_gap(
    site: Site, poll: MakePoll, cursor: str, reason: str
) -> None:
    site.deliver(4)
    new = poll(cursor)
    assert not new.was_detached
    (gap,) = new.answer()
    assert (gap.type, gap.json["reason"], gap.id) == ("sse_gap", reason, "x-4")
    again = poll(gap.id)
    assert again.waits()
    site.deliver()
    assert again.numbers() == [5]


def test_an_event_that_is_lost_ends_a_waiting_poll_with_the_gap(site: Site, poll: MakePoll) -> None:
    waiting, other = poll("x-0"), poll("x-0", "other")
    site.delivery.position = 1
    site.hub.lose("default", 1)
    site.loop.run()
    opened, gap = waiting.answer()
    assert (opened.type, gap.type, gap.json["reason"], gap.id) == ("sse_open", "sse_gap", "publish_failed", "x-1")
    assert other.waits()
    assert poll(gap.id).waits()


@options(poll_wait=25)
def test_a_poll_that_gets_nothing_ends_after_its_time_without_a_block(site: Site, poll: MakePoll) -> None:
    waiting = poll("x-0")
    site.wait(24)
    assert waiting.waits()
    site.wait(4)  # a detached one is looked at every two seconds
    assert types(waiting.answer()) == ["sse_open"]
    assert site.hub.is_empty()


@options(poll_wait=25, max_stream_age=1)
def test_the_age_of_streams_is_not_that_of_polls(site: Site, poll: MakePoll) -> None:
    waiting = poll("x-0")
    site.wait(10)
    assert waiting.waits()


@options(heartbeat=0.01, poll_wait=3)
def test_a_poll_that_waits_gets_heartbeats(site: Site, poll: MakePoll) -> None:
    waiting = poll("x-0")
    if not waiting.was_detached:
        assert next(waiting.client) == HEARTBEAT
    site.wait(10)
    assert types(waiting.answer()) == ["sse_open"]
    assert not waiting.was_detached or HEARTBEAT in waiting.bytes()


# -- who ends it -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", ["kicked", "revoked"])
def test_a_poll_of_a_user_that_is_sent_away_ends_without_a_block(site: Site, poll: MakePoll, reason: Any) -> None:
    anns, bobs = poll("x-0", user="ann"), poll("x-0", user="bob")
    assert site.hub.dismiss(reason, "ann") == 1
    site.delivery.deliver()  # nothing of it goes out
    site.loop.run()
    assert types(anns.answer()) == ["sse_open"]
    assert bobs.numbers() == [1]


def test_a_poll_that_is_opened_while_its_user_is_kicked_brings_nothing(site: Site, poll: MakePoll) -> None:
    ticket = site.hub.ticket
    site.deliver()
    site.hub.dismiss("kicked", "ann")
    late = poll("x-0", user="ann", ticket=ticket)
    assert not late.was_detached
    assert types(late.answer()) == ["sse_open"]
    assert poll("x-0", user="ann").numbers() == [1]


def test_polls_that_wait_end_when_the_process_does_and_bring_what_came_before(site: Site, poll: MakePoll) -> None:
    waiting, other = poll("x-0"), poll("x-0", "other")
    site.delivery.deliver()
    site.hub.close("shutdown")
    site.loop.run()
    assert waiting.numbers() == [1]
    assert types(other.answer()) == ["sse_open"]
    with pytest.raises(ClosedError):
        poll("x-1")
    assert site.hub.is_empty()


def test_a_poll_whose_client_leaves_is_forgotten(site: Site, poll: MakePoll) -> None:
    waiting = poll("x-0")
    assert site.hub.count()["clients"] == 1
    waiting.leave()
    assert site.hub.is_empty()


# -- what it brings ----------------------------------------------------------------------------------------------------


def test_a_poll_without_batches_goes_on_in_the_middle_of_one(site: Site, poll: MakePoll) -> None:
    waiting = poll("x-0", batches=False)
    batched(site, "default", 3)
    site.loop.run()
    events = waiting.answer()[1:]
    assert [(event.type, event.json, event.id) for event in events] == [
        ("t", 0, "x-1.1"),
        ("t", 1, "x-1.2"),
        ("t", 2, "x-1"),
    ]
    assert poll("x-1.1", batches=False).numbers() == [1, 2]


def test_with_batches_it_is_one_block(site: Site, poll: MakePoll) -> None:
    waiting = poll("x-0")
    batched(site, "default", 3)
    site.loop.run()
    (batch,) = waiting.answer()[1:]
    assert (batch.type, batch.json["events"], batch.id) == ("t_batch", [0, 1, 2], "x-1")


def test_a_poll_gets_the_frames_of_its_user_and_of_no_other(site: Site, poll: MakePoll) -> None:
    anns, bobs, strange = poll("x-0", user="ann"), poll("x-0", user=7), poll("x-0")

    def send(users: tuple[str | int, ...], text: str) -> None:
        site.delivery.position += 1
        position = site.delivery.position
        batch = Batch(users, "message", (Event("message", users, Text(text)),), "manual", 0, "")
        site.hub.deliver(Frame(batch, position, f"x-{position}"))
        site.loop.run()

    send(("ann",), "for\nAnn")
    (event,) = anns.answer()[1:]
    assert (event.type, event.data, event.id) == ("message", "for\nAnn", "x-1")
    assert bobs.waits()
    assert strange.waits()
    send((7, "ann"), "for both")
    assert [event.data for event in bobs.answer()[1:]] == ["for both"]
    assert [event.data for event in poll("x-1", user="ann").answer()[1:]] == ["for both"]
    assert strange.waits()


def test_the_state_comes_with_the_first_block_and_ends_the_poll(site: Site, poll: MakePoll) -> None:
    site.deliver(2)
    snapshot = Snapshot("x-1", b'event: state\ndata: "s"\nid: x-1\n\n')
    new = poll(snapshot=snapshot)
    assert not new.was_detached
    assert [(event.type, event.id) for event in new.answer()] == [("sse_open", ""), ("state", "x-1")]
    assert poll("x-1").numbers() == [2]


@options(queue_bytes=4_000_000)
def test_a_client_that_is_slow_gets_the_whole_answer(site: Site, poll: MakePoll) -> None:
    waiting = poll("x-0", small=True)
    site.delivery.deliver(3, "x" * 300_000)
    site.loop.run()
    assert waiting.numbers() == ["x" * 300_000] * 3


def test_each_poll_is_counted_while_it_is_open(site: Site, poll: MakePoll) -> None:
    polls = [poll("x-0") for _ in range(3)]
    assert site.hub.count()["clients"] == 3
    site.deliver()
    sizes = [len(each.bytes()) for each in polls]
    stats = site.hub.count()
    assert (stats["clients"], stats["frames"]) == (0, 3)
    assert len(set(sizes)) <= 2  # `retry` has three digits or four
    assert stats["bytes"] >= 3 * (len(polls[0].first) - 1)


@turns_of(1)
def test_polls_in_one_group_that_are_served_in_turns_lose_nothing(site: Site, poll: MakePoll) -> None:
    polls = [poll("x-0") for _ in range(5)]
    site.delivery.deliver()
    site.loop.turn(0)
    site.delivery.deliver()
    site.loop.run()
    for each in polls:
        found = [event.json for event in each.answer()[1:]]
        assert found == [1, 2][: len(found)]
        assert found


@pytest.mark.parametrize("seed", range(10))
@options(queue_frames=3)
def test_clients_that_come_back_with_each_id_get_everything_once(site: Site, poll: MakePoll, seed: int) -> None:
    chance = random.Random(seed)
    clients = [Returning(poll) for _ in range(4)]
    for _ in range(50):
        if chance.random() < 0.5:
            site.delivery.deliver(chance.choice([1, 1, 2, 5]))
            site.loop.turn(0)  # a part of what there is to do
        else:
            chance.choice(clients).step(site)
    for client in clients:
        while client.cursor != f"x-{site.delivery.position}":
            client.step(site)
    everything = list(range(1, site.delivery.position + 1))
    assert len(everything) > 20
    assert [client.found for client in clients] == [everything] * 4


class Returning:
    """A client that polls again and again, each time with the newest id it has."""

    def __init__(self, poll: MakePoll) -> None:
        self.cursor = "x-0"
        self.found: list[int] = []
        self._make = poll
        self._poll: Poll | None = None

    def step(self, site: Site) -> None:
        """Poll, and take the answer if there must be one."""
        self._poll = self._poll or self._make(self.cursor)
        site.loop.run()
        if self.cursor == f"x-{site.delivery.position}":
            assert self._poll.waits()
            return
        opened, *events = self._poll.answer()
        assert opened.id == self.cursor
        self.found += [event.json for event in events]
        self.cursor, self._poll = events[-1].id, None


# -- when it comes back ------------------------------------------------------------------------------------------------


def test_a_lone_poll_comes_back_after_half_a_second_to_one(site: Site) -> None:
    found = []
    for cursor in [None, "x-0"] * 500:
        client = site.delivery.connect(cursor=cursor, poll=True)
        found.append(retry_of(next(client)))
        client.close()
    assert 500 <= min(found) < 550
    assert 950 < max(found) <= 1_001


def test_ten_thousand_polls_that_end_at_once_spread_their_return(site: Site) -> None:
    clients, found = [], []
    for _ in range(10_000):
        clients.append(site.delivery.connect(cursor="x-0", poll=True))
        found.append(retry_of(next(clients[-1])))
    site.deliver()
    assert {len(parse(b"".join(to_end(client)))) for client in clients} == {1}
    assert site.hub.is_empty()
    assert min(found) >= 500
    assert 10_000 < max(found) <= 11_000
    # About three in a hundred come within the busiest tenth of a second. It would be one if all had known of all.
    assert max(Counter(retry // 100 for retry in found).values()) < 400


@options(retry_ms=700)
def test_an_app_that_sets_retry_sets_it_for_polls_too(site: Site, poll: MakePoll) -> None:
    assert retry_of(poll().first) == 700
