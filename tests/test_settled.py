"""The cursor of a quiet live stream that ends is the newest one, however many other channels and users were busy.

The floors of few channels are remembered here. So a cursor from before the others would be too old.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from sse_batcher import HistoryOptions
from sse_batcher.event import Audience, Batch, Event
from sse_batcher.reasons import ByeReason
from sse_batcher.streams import history
from sse_batcher.streams.client import QueueClient
from sse_batcher.wire import Frame

from .kit.delivery import Delivery, MeetingQueue, Queues, connect_user, take
from .kit.site import Site, events
from .kit.sse_parser import parse

OTHERS = pytest.mark.parametrize("others", ["channels", "users"])


@pytest.fixture
def site(make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.setattr(history, "MAX_FLOORS", 2)
    return make_site(history=HistoryOptions(history_frames=3))


def deliver(site: Site, audience: Audience) -> None:
    position = site.delivery.position = site.delivery.position + 1
    batch = Batch(audience, "t", (Event("t", audience, str(position)),), "manual", 0)
    site.hub.deliver(Frame(batch, position, f"x-{position}"))


def busy(site: Site, others: str) -> None:
    for number in range(20):
        deliver(site, f"other-{number}" if others == "channels" else (f"other-{number}",))
        site.loop.run()


@pytest.fixture
def attached(site: Site) -> Iterator[QueueClient]:
    client = site.delivery.connect("default", user=7)
    assert b"sse_open" in next(client)
    yield client
    client.close()


@OTHERS
@pytest.mark.parametrize("reason", ["lease", "kicked"])
def test_an_attached_stream_ends_at_the_head(site: Site, attached: QueueClient, others: str, reason: ByeReason) -> None:
    busy(site, others)
    attached.dismiss(reason)
    (bye,) = parse(next(attached))
    assert (bye.type, bye.id) == ("sse_bye", "x-20")
    assert site.delivery.can_resume(bye.id, "default", user=7)


@OTHERS
@pytest.mark.parametrize("end", ["shutdown", "kicked"])
def test_a_detached_stream_ends_at_the_head(site: Site, others: str, end: str) -> None:
    client = site.delivery.connect("default", user=7)
    theirs = site.hand_over(client, next(client))
    site.loop.run()
    events(theirs)
    busy(site, others)
    if end == "shutdown":
        site.hub.close("shutdown")
    else:
        site.hub.dismiss("kicked", 7)
    site.loop.run()
    (bye,) = events(theirs)
    assert (bye.type, bye.id) == ("sse_bye", "x-20")
    assert site.delivery.can_resume(bye.id, "default", user=7)


@pytest.mark.parametrize("audience", ["default", (7,)])
def test_a_queued_frame_that_others_have_evicted_is_not_skipped(
    site: Site, attached: QueueClient, audience: Audience
) -> None:
    deliver(site, audience)
    for _ in range(5):
        deliver(site, "other" if audience == "default" else (8,))
    attached.dismiss("lease")
    (bye,) = parse(next(attached))
    assert bye.id == "x-0"
    assert not site.delivery.can_resume(bye.id, "default", user=7)


def test_a_frame_that_is_not_offered_yet_is_not_skipped(
    site: Site, attached: QueueClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stream ends between the moment when the history has the frame and the moment when it is queued."""
    byes = []

    def end_first(frame: Frame) -> None:
        attached.dismiss("lease")
        byes.append(next(attached))

    monkeypatch.setattr(QueueClient, "offer", lambda client, frame: end_first(frame))
    deliver(site, "default")
    (bye,) = parse(byes[0])
    assert bye.id == "x-0"


# -- what the goodbye of an attached stream finds in its queue ---------------------------------------------------------


def bye_of(client: QueueClient) -> str:
    """The cursor that the goodbye of a stream names; the stream ends."""
    client.dismiss("kicked")
    (event,) = parse(next(client))
    assert event.type == "sse_bye"
    return event.id


def skipping(history_frames: int) -> tuple[Delivery, QueueClient, MeetingQueue]:
    """A live stream that has skipped to x-3, and in whose queue x-3 still is."""
    queues = Queues()
    delivery = Delivery(HistoryOptions(history_frames=history_frames), make_queue=queues)
    client = connect_user(delivery, "default", user=7)
    delivery.deliver(2)
    gaps: list[str] = []
    # The stream meets a frame that was evicted before its turn, when the newest one is about to be queued.
    queues[0].meet_before_put(lambda: gaps.extend(event.id for event in parse(next(client))))
    delivery.deliver()
    assert gaps == ["x-3"]
    return delivery, client, queues[0]


def test_a_frame_as_large_as_one_that_was_skipped_is_not_skipped() -> None:
    delivery, client, its_queue = skipping(history_frames=1)
    its_queue.meet_before_wait(delivery.deliver)  # x-3 was taken by then
    assert take(client, 1) == [("t", 4, "x-4")]
    delivery.deliver()
    assert bye_of(client) == "x-4"


def test_a_frame_that_the_stream_has_already_does_not_hold_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "MAX_FLOORS", 2)
    delivery, client, _ = skipping(history_frames=2)
    for number in range(20):
        delivery.deliver(channel=(f"other-{number}",))
    assert bye_of(client) == "x-23"


def test_a_frame_that_was_just_taken_when_the_stream_is_dismissed_is_not_skipped() -> None:
    queues = Queues()
    delivery = Delivery(make_queue=queues)
    client = connect_user(delivery, "default")

    def end() -> None:
        delivery.deliver()
        client.dismiss("kicked")

    queues[0].meet_before_wait(end)
    (event,) = parse(next(client))
    assert (event.type, event.id) == ("sse_bye", "x-0")


def test_a_frame_that_is_thrown_away_while_the_queue_is_looked_at_is_not_skipped() -> None:
    queues = Queues()
    delivery = Delivery(queue_frames=1, make_queue=queues)
    client = connect_user(delivery, "default")
    delivery.deliver()
    queues[0].meet_before_look(delivery.deliver)  # there is no room for it, and the client falls behind
    assert bye_of(client) == "x-0"


def test_a_detached_stream_is_not_moved_past_a_frame_that_its_loop_has_not_read(site: Site) -> None:
    client = site.delivery.connect("default", user=7)
    theirs = site.hand_over(client, next(client))
    site.loop.run()
    events(theirs)
    deliver(site, "default")
    site.hub.dismiss("kicked", 7)
    for number in range(20):
        deliver(site, f"other-{number}")
    site.loop.run()
    *_, bye = events(theirs)
    assert bye.type == "sse_bye"
    assert bye.id in {"x-0", "x-1"}
