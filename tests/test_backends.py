"""The contract of all backends: the same tests for memory and for Redis."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sse_batcher.backends import Backend, open_backend
from sse_batcher.event import Batch, Event, check_text
from sse_batcher.wire import Frame

from .kit.redisserver import be_patient, redis_server
from .kit.waiting import TIMEOUT


class Received:
    """A receiver that records what it gets."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.kicked: list[tuple[Hashable, str | None]] = []
        self.changed = threading.Condition()

    def deliver(self, frame: Frame) -> None:
        with self.changed:
            self.frames.append(frame)
            self.changed.notify_all()

    def dismiss(self, reason: str, user: Hashable = None, channel: str | None = None) -> None:
        with self.changed:
            self.kicked.append((user, channel))
            self.changed.notify_all()

    def lose(self, channel: str, position: Any, reason: str = "publish_failed") -> None:
        # A backend reports in this way from where on it knows the history, before it delivers anything.
        assert (reason, self.frames) == ("too_old", []), f"{channel} has lost something: {reason}"

    def wait_for(self, frames: int = 0, kicks: int = 0) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.frames) >= frames and len(self.kicked) >= kicks, TIMEOUT)


@pytest.fixture(params=["memory", pytest.param("redis", marks=pytest.mark.external)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "memory":
        yield "memory://"
        return
    with redis_server(tmp_path) as server:
        yield server.url


@pytest.fixture
def received() -> Received:
    return Received()


@pytest.fixture
def backend(url: str, received: Received, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    be_patient(monkeypatch)
    backend = open_backend(url, 1_000)
    backend.connect(received)
    backend.open(None)
    yield backend
    assert backend.close(TIMEOUT)


def batch(*data: str, channel: str = "a", event_type: str = "t") -> Batch:
    return Batch(
        channel, event_type, tuple(Event(event_type, channel, text) for text in data), "manual", 1_767_225_600_000
    )


def test_what_is_published_is_delivered_as_it_was_and_in_this_order(backend: Backend, received: Received) -> None:
    mixed = Batch("*", "mixed", (Event("t", "*", "1"), Event("ü", "*", '{"a":[1.0,1e400]}')), "time_window", 5)
    batches = [batch("1", '"\\u2028"'), batch("null", channel="ü b"), mixed, *(batch(str(n)) for n in range(50))]
    for each in batches:
        backend.publish(each)
    assert backend.wait_until_delivered(TIMEOUT)
    received.wait_for(frames=len(batches))
    assert [frame.batch for frame in received.frames] == batches


def test_texts_and_events_for_users_are_delivered_as_they_were(backend: Backend, received: Received) -> None:
    texts = [check_text(text) for text in ("<b>\r\né\u2028😀</b>", "", '\n"\\')]
    batches = [
        Batch("a", "t", tuple(Event("t", "a", text) for text in texts), "kind", 5, "\n"),
        Batch("*", "t", tuple(Event("t", "*", text) for text in texts), "kind", 5, ""),
        Batch((7, "7"), "t", (Event("t", (7, "7"), texts[0]),), "critical", 5),
        Batch(("ada",), "t", (Event("t", ("ada",), "1"), Event("t", ("ada",), '"x"')), "manual", 5),
        Batch(("ada",), "mixed", (Event("t", ("ada",), texts[0]), Event("u", ("ada",), '"x"')), "manual", 5),
    ]
    for each in batches:
        backend.publish(each)
    received.wait_for(frames=len(batches))
    delivered = [frame.batch for frame in received.frames]
    assert delivered == batches
    assert [[event.is_text for event in each.events] for each in delivered] == [
        *([True] * 3, [True] * 3, [True]),
        *([False, False], [True, False]),
    ]
    assert [each.users for each in delivered[2:]] == [(7, "7"), ("ada",), ("ada",)]
    assert type(delivered[2].users[0]) is int


def test_positions_rise_and_each_has_an_id_that_leads_back_to_it(backend: Backend, received: Received) -> None:
    for number in range(20):
        backend.publish(batch(str(number)))
    received.wait_for(frames=20)
    positions = [frame.position for frame in received.frames]
    assert positions == sorted(set(positions))
    assert positions[0] > backend.start
    for frame in received.frames:
        assert backend.format(frame.position) == frame.id
        assert backend.parse(frame.id).position == frame.position
        part = backend.parse(frame.id + ".2")
        assert (part.position, part.part) == (frame.position, 2)
        assert backend.normalize(frame.id) == frame.id


@pytest.mark.parametrize(
    "cursor", ["", "x", "-", "1-1", "G" * 8 + "-1-1", "٣" * 8, "0" * 8 + "-01", "x" * 10_000, "\0"]
)
def test_what_is_no_cursor_is_malformed(backend: Backend, cursor: str) -> None:
    assert backend.parse(cursor).refused == "malformed"
    assert backend.normalize(cursor) is None


def test_a_cursor_of_another_history_is_one_and_not_ours(backend: Backend, received: Received) -> None:
    backend.publish(batch("1"))
    received.wait_for(frames=1)
    theirs = "00000000" + received.frames[0].id[8:]
    assert backend.parse(theirs).refused == "epoch"
    assert backend.normalize(theirs) == theirs


def test_a_kick_reaches_the_receiver(backend: Backend, received: Received) -> None:
    for who in [("ada", None), (7, None), (None, "a"), ("ada", "a")]:
        backend.kick(*who)
    received.wait_for(kicks=4)
    assert received.kicked == [("ada", None), (7, None), (None, "a"), ("ada", "a")]


def test_it_owes_no_answer_when_nothing_is_asked(url: str) -> None:
    backend = open_backend(url, 10)
    assert (backend.silent_for, backend.answered_ago, backend.ignored) == (0, 0, 0)
    assert backend.wait_until_delivered(0)
    assert backend.close(0)
