"""The hub: what its clients are given, in which order, how they end, and what is counted."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any

import pytest

from sse_batcher import BackendError, Client, ClientOptions, ClosedError, HistoryOptions, TooManyClientsError
from sse_batcher.event import Batch, Event, User
from sse_batcher.reasons import ByeReason
from sse_batcher.streams.counts import Counts
from sse_batcher.streams.history import ResumePoint, Slice
from sse_batcher.streams.hub import Hub
from sse_batcher.wire import HEARTBEAT, Frame

from .kit.delivery import Delivery, MeetingLock, Numbers, connect, drive, numbers, take
from .kit.waiting import TIMEOUT

# -- frames ------------------------------------------------------------------------------------------------------------


def test_a_client_gets_the_frames_of_its_channels_and_every_broadcast_once() -> None:
    delivery = Delivery()
    client = delivery.connect("a", "b")
    next(client)
    for channel in ("a", "c", "b", "*", "a"):
        delivery.deliver(channel=channel)
    assert numbers(client, 4) == [1, 3, 4, 5]
    assert client.point == ResumePoint(5)


def test_all_clients_of_a_channel_are_given_the_same_bytes_object() -> None:
    delivery = Delivery()
    clients = [delivery.connect() for _ in range(3)]
    for client in clients:
        next(client)
    delivery.deliver()
    first, *others = [next(client) for client in clients]
    assert all(other is first for other in others)


def test_a_frame_that_was_listed_before_the_client_went_live_is_not_given_twice() -> None:
    delivery = Delivery()
    client = delivery.connect()
    delivery.deliver()
    late = delivery.frame()
    delivery.hub.deliver(late)
    client.offer(late)  # as a delivering thread does that was suspended between listing and queueing
    delivery.deliver()
    next(client)
    assert numbers(client, 3) == [1, 2, 3]


def test_a_part_of_a_frame_of_another_channel_takes_nothing_from_the_next_one() -> None:
    delivery = Delivery()
    delivery.deliver(channel="a")
    delivery.deliver(channel="b")
    client = delivery.connect("b", cursor="x-1.1")  # it has asked for "a", too, before it was cut off
    next(client)
    assert numbers(client, 1) == [2]


def test_a_silent_stream_gets_a_heartbeat() -> None:
    client = Delivery(heartbeat=0.01).connect()
    next(client)
    assert [next(client) for _ in range(2)] == [HEARTBEAT, HEARTBEAT]


def test_a_driver_that_waits_is_woken_by_a_frame() -> None:
    delivery = Delivery()
    client = delivery.connect()
    blocks = drive(client)
    assert b"sse_open" in blocks.get(timeout=TIMEOUT)
    delivery.deliver()
    assert b"data: 1\n" in blocks.get(timeout=TIMEOUT)
    client.close()
    assert blocks.get(timeout=TIMEOUT) == b"the end"


# -- the first block ---------------------------------------------------------------------------------------------------


def test_the_first_block_of_a_new_client_has_the_head_as_its_id() -> None:
    delivery = Delivery(retry_ms=1234)
    delivery.deliver(3)
    client = delivery.connect()
    assert next(client) == b'event: sse_open\nretry: 1234\ndata: {"heartbeat":15.0,"channels":["default"]}\nid: x-3\n\n'


def test_the_time_to_return_is_drawn_for_each_connection_and_grows_with_their_number() -> None:
    delivery = Delivery()
    clients = [delivery.connect() for _ in range(50)]
    retries = {int(next(client).split(b"retry: ")[1].split(b"\n")[0]) for client in clients}
    assert len(retries) > 25
    assert min(retries) >= 1_000
    assert max(retries) <= 2_050


def test_a_client_shows_users_no_more_than_its_iteration_its_end_and_who_it_is() -> None:
    assert [name for name in dir(Client) if not name.startswith("_")] == ["close", "info"]
    client = Delivery().connect("a", "b", user="ada")
    assert isinstance(client, Client)
    assert (client.info.channels, client.info.user) == (("a", "b"), "ada")
    assert repr(client) == "<Client 1: 'a', 'b', user 'ada', live>"
    client.close()
    assert repr(client) == "<Client 1: 'a', 'b', user 'ada', closed>"
    delivery = Delivery(queue_frames=1)
    client = delivery.connect()
    delivery.deliver(2)
    assert repr(client) == "<Client 1: 'default', behind>"


# -- ends --------------------------------------------------------------------------------------------------------------


def test_a_stream_that_is_ended_gets_what_is_queued_and_then_its_farewell() -> None:
    delivery = Delivery()
    client = delivery.connect()
    delivery.deliver(2)
    delivery.hub.close("shutdown")
    blocks = take(client, 4)
    assert [event for event, _, _ in blocks] == ["sse_open", "t", "t", "sse_bye"]
    assert blocks[-1] == ("sse_bye", {"reason": "shutdown"}, "x-2")
    assert list(client) == []
    assert delivery.left == [(1, "shutdown")]


def test_a_stream_has_ended_only_when_its_farewell_was_taken_from_it() -> None:
    delivery = Delivery()
    client = delivery.connect()
    delivery.hub.close("shutdown")
    assert [event for event, _, _ in take(client, 2)] == ["sse_open", "sse_bye"]
    assert delivery.left == []  # the server is still writing it
    client.close()
    assert delivery.left == [(1, "shutdown")]


def test_closing_is_idempotent_and_ends_the_iteration() -> None:
    delivery = Delivery()
    client = delivery.connect()
    next(client)
    delivery.deliver()
    client.close()
    client.close()
    assert list(client) == []
    assert delivery.left == [(1, "left")]
    assert delivery.hub.count()["clients"] == 0


def test_a_closed_hub_takes_no_more_clients() -> None:
    delivery = Delivery()
    delivery.hub.close("shutdown")
    with pytest.raises(ClosedError):
        delivery.connect()


def test_a_hub_opens_again_after_some_time_unless_it_was_closed_for_good() -> None:
    now = [100.0]
    hub = Delivery(clock=lambda: now[0]).hub
    assert not hub.reopen(2)  # it is open
    hub.close("shutdown", for_good=False)
    now[0] += 1.9
    assert not hub.reopen(2)
    now[0] += 0.1
    assert hub.reopen(2)
    assert hub.closing is None
    hub.close("shutdown")
    now[0] += 100
    assert not hub.reopen(2)


def test_a_client_that_cannot_be_announced_is_forgotten() -> None:
    def fail(client: object) -> None:
        raise RuntimeError

    left: list[str] = []
    hub = Hub(
        ClientOptions(),
        HistoryOptions(),
        Numbers(),
        on_connect=fail,
        on_disconnect=lambda client, farewell: left.append(farewell.reason),
    )
    with pytest.raises(RuntimeError):
        connect(hub)
    assert hub.is_empty()
    assert left == ["left"]


def test_a_client_that_leaves_while_the_hub_is_locked_does_not_wait_and_is_forgotten_after() -> None:
    # As when the garbage collector ends a stream on the very thread that holds the lock.
    lock = MeetingLock()
    delivery = Delivery(lock=lock)
    client = delivery.connect()
    seen = []

    def leave() -> None:
        client.close()
        seen.extend(delivery.left)

    lock.meet(leave)
    assert delivery.hub.survey(0).users == 0
    assert seen == []
    assert delivery.left == [(1, "left")]


def test_to_look_for_the_streams_of_a_user_takes_no_lock() -> None:
    lock = MeetingLock()
    delivery = Delivery(lock=lock)
    delivery.connect(user="ada")
    lock.asked.clear()
    assert [delivery.hub.has_user(user) for user in ("ada", "eve")] == [True, False]
    assert not lock.asked.is_set()


@pytest.mark.parametrize("error", [TooManyClientsError, ClosedError])
def test_a_client_that_leaves_while_another_is_refused_is_forgotten(error: type[Exception]) -> None:
    lock = MeetingLock()
    delivery = Delivery(max_clients=1, lock=lock)
    client = delivery.connect()
    if error is ClosedError:
        delivery.hub.close("shutdown")

    def leave() -> None:
        leaving = threading.Thread(target=client.close)  # it does not get the lock, and must not wait for it
        leaving.start()
        leaving.join(TIMEOUT)
        assert not leaving.is_alive()
        assert delivery.left == []

    lock.meet(leave)
    with pytest.raises(error):
        delivery.connect()
    assert delivery.left == [(1, "left")]
    assert delivery.hub.wait_until_left(0)


@pytest.mark.parametrize("reason", ["shutdown", "revoked"])
def test_the_end_of_a_hub_has_its_reason(reason: ByeReason) -> None:
    delivery = Delivery()
    client = delivery.connect()
    next(client)
    delivery.deliver()
    delivery.hub.close(reason)
    assert [(event, data) for event, data, _ in take(client, 2)] == [("t", 1), ("sse_bye", {"reason": reason})]


def test_channels_of_clients_that_left_leave_nothing_behind() -> None:
    delivery = Delivery()
    for n in range(100):
        delivery.connect(f"channel{n}").close()
    assert delivery.hub.is_empty()


def test_waiting_for_streams_waits_for_driven_ones_alone() -> None:
    delivery = Delivery()
    delivery.connect()  # never iterated
    mine = delivery.connect()
    next(mine)
    assert delivery.hub.wait_until_left(0)
    blocks = drive(delivery.connect())
    assert blocks.get(timeout=TIMEOUT)
    assert not delivery.hub.wait_until_left(0)
    delivery.hub.close("shutdown")
    assert delivery.hub.wait_until_left(TIMEOUT)


def in_thread(function: Callable[[], object]) -> None:
    """Call this in another thread, which must not have to wait for this one."""
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    thread.join(TIMEOUT)
    assert not thread.is_alive()


def test_a_client_that_leaves_while_the_wait_for_it_looks_is_seen_to_have_left() -> None:
    lock = MeetingLock()
    delivery = Delivery(lock=lock)
    client = delivery.connect()
    client.driver = -1  # another thread

    lock.meet(lambda: in_thread(client.close))  # when the wait has the lock, and is about to look
    assert delivery.hub.wait_until_left(TIMEOUT)
    assert delivery.left == [(1, "left")]


@pytest.mark.parametrize("where", ["in another thread", "in the waiting thread"])
def test_an_end_that_is_seen_in_the_wait_is_reported_at_once_and_without_a_lock(where: str) -> None:
    """What is called for it may start a thread, in which the garbage collector ends another stream."""
    lock = MeetingLock()
    delivery = Delivery(lock=lock, on_left=lambda: delivery.left[1:] or in_thread(other.close))
    client, other = delivery.connect(), delivery.connect()
    client.driver = other.driver = -1  # other threads
    if where == "in another thread":
        lock.meet(lambda: in_thread(client.close))
    else:
        lock.meet_after(client.close)
    assert delivery.hub.wait_until_left(TIMEOUT)  # for the other one, too
    assert delivery.left == [(1, "left"), (2, "left")]


def test_a_wait_in_a_signal_handler_that_interrupts_another_wait_ends_in_time() -> None:
    lock = MeetingLock()
    delivery = Delivery(lock=lock)
    client, other = delivery.connect(), delivery.connect()
    client.driver = other.driver = -1
    answers: list[bool] = []

    def handle() -> None:
        client.close()
        answers.append(delivery.hub.wait_until_left(0))
        other.close()

    lock.meet_after(handle)
    assert delivery.hub.wait_until_left(TIMEOUT)
    assert answers == [False]
    assert delivery.left == [(1, "left"), (2, "left")]


def test_a_dropped_hub_is_freed_without_the_garbage_collector() -> None:
    hub = Hub(
        ClientOptions(),
        HistoryOptions(),
        Numbers(),
        on_connect=lambda client: None,
        on_disconnect=lambda client, farewell: None,
    )
    client = connect(hub)
    next(client)
    client.close()
    reference = weakref.ref(hub)
    gc.disable()
    try:
        del client, hub
        assert reference() is None
    finally:
        gc.enable()


# -- what only the backend still has, and what is too old --------------------------------------------------------------


def test_a_client_goes_on_with_what_only_the_backend_still_has(monkeypatch: pytest.MonkeyPatch) -> None:
    delivery = Delivery(HistoryOptions(history_frames=1))
    frames = [delivery.frame() for _ in range(3)]
    for frame in frames:
        delivery.hub.deliver(frame)
    asked: list[tuple[Iterable[str], ResumePoint]] = []

    def replay(self: Numbers, channels: Iterable[str], point: ResumePoint, user: User | None) -> Slice:
        asked.append((channels, point))
        return Slice(frames[point.position :], 3)

    monkeypatch.setattr(Numbers, "replay", replay)
    assert delivery.can_resume("x-2")
    assert asked == []  # the history has it
    client = delivery.connect(cursor="x-1")
    assert [event for event, _, _ in take(client, 3)] == ["sse_open", "t", "t"]
    assert asked == [(("default",), ResumePoint(1))] * 2


def test_a_client_gets_a_gap_if_the_backend_cannot_be_asked_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    delivery = Delivery(HistoryOptions(history_frames=1))
    delivery.deliver(3)
    monkeypatch.setattr(Numbers, "replay", lambda self, channels, point, user: Slice([], 3))
    client = delivery.connect(cursor="x-1")
    assert [(event, id) for event, _, id in take(client, 1)] == [("sse_open", "x-1")]

    def fail(*_: Any) -> None:
        raise BackendError("it is away")

    monkeypatch.setattr(Numbers, "replay", fail)
    assert take(client, 1) == [("sse_gap", {"heartbeat": 15.0, "reason": "overflow"}, "x-3")]


def test_what_only_the_backend_still_has_can_be_resumed(monkeypatch: pytest.MonkeyPatch) -> None:
    delivery = Delivery(HistoryOptions(history_frames=1))
    delivery.deliver(3)
    assert not delivery.can_resume("x-1")
    monkeypatch.setattr(Numbers, "replay", lambda self, channels, point, user: Slice([], 3))
    assert delivery.can_resume("x-1")


def test_a_replay_of_frames_that_are_too_old_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    delivery = Delivery(HistoryOptions(history_age=60.0))
    delivery.deliver(3)
    batch = delivery.frame().batch
    for age_ms, resumes in [(70_000, False), (50_000, True)]:
        older = Slice([Frame(batch, 2, "x-2", int(time.time() * 1000) - age_ms)], 2)
        monkeypatch.setattr(Numbers, "replay", lambda self, channels, point, user, older=older: older)
        assert delivery.can_resume("x-1") is resumes


def test_frames_that_get_too_old_while_a_client_is_behind_are_a_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    delivery = Delivery(HistoryOptions(history_age=60.0))
    monkeypatch.setattr(Numbers, "now", lambda self: 60_000)
    delivery.deliver(3)  # frames of the time 0
    client = delivery.connect(cursor="x-1")
    assert [(event, id) for event, _, id in take(client, 1)] == [("sse_open", "x-1")]
    monkeypatch.setattr(Numbers, "now", lambda self: 60_001)
    assert take(client, 1) == [("sse_gap", {"heartbeat": 15.0, "reason": "overflow"}, "x-3")]


def test_a_gap_that_follows_another_one_has_its_own_reason() -> None:
    delivery = Delivery(HistoryOptions(history_frames=1))
    client = delivery.connect()
    next(client)
    delivery.position += 1
    delivery.hub.lose("default", delivery.position)
    assert take(client, 1) == [("sse_gap", {"heartbeat": 15.0, "reason": "publish_failed"}, "x-1")]
    delivery.deliver(2)
    assert take(client, 1) == [("sse_gap", {"heartbeat": 15.0, "reason": "overflow"}, "x-3")]


def test_a_replay_without_frames_of_its_channels_moves_a_client_on(monkeypatch: pytest.MonkeyPatch) -> None:
    delivery = Delivery(HistoryOptions(history_frames=1))
    delivery.deliver(1)
    delivery.deliver(2, channel="other")
    monkeypatch.setattr(Numbers, "replay", lambda self, channels, point, user: Slice([], point.position + 1))
    client = delivery.connect(cursor="x-0")
    assert [(event, id) for event, _, id in take(client, 1)] == [("sse_open", "x-0")]
    delivery.deliver(1)
    assert [(event, id) for event, _, id in take(client, 1)] == [("t", "x-4")]


def test_a_client_that_returns_after_the_age_of_the_history_gets_a_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    delivery = Delivery(HistoryOptions(history_age=10))
    monkeypatch.setattr(Numbers, "now", lambda self: 10_000.0)
    delivery.deliver()
    assert delivery.can_resume("x-0")
    monkeypatch.setattr(Numbers, "now", lambda self: 10_001.0)
    assert not delivery.can_resume("x-0")
    assert take(delivery.connect(cursor="x-0"), 1)[0][0] == "sse_gap"
    assert take(delivery.connect(cursor="x-1"), 1)[0][0] == "sse_open"  # it has everything


# -- counts ------------------------------------------------------------------------------------------------------------


def test_what_batches_save_is_counted_for_each_frame() -> None:
    delivery = Delivery()
    client = delivery.connect()
    frames = []
    for _ in range(3):
        frame = delivery.frame()
        events = tuple(Event("t", "default", str(number)) for number in range(20))
        frames.append(Frame(Batch("default", "t", events, "manual", 0), frame.position, frame.id))
        delivery.hub.deliver(frames[-1])
    sent = [next(client) for _ in range(4)]
    counts = delivery.hub.count()
    assert (counts["frames"], counts["bytes"]) == (3, len(b"".join(sent)))
    assert (counts["saved_frames"], counts["saved_bytes"]) == (3 * 19, sum(frame.saved_bytes for frame in frames))


def test_counts_outlive_the_client() -> None:
    delivery = Delivery()
    client = delivery.connect()
    first = next(client)
    delivery.deliver()
    frame = next(client)
    while_open = delivery.hub.count()
    client.close()
    after = delivery.hub.count()
    assert after["clients"] == 0
    for item in fields(Counts):
        assert after[item.name] == while_open[item.name]
    assert (while_open["frames"], while_open["bytes"]) == (1, len(first) + len(frame))


def test_streams_of_the_same_channel_and_user_stay_when_one_of_them_leaves() -> None:
    delivery = Delivery()
    first, second = (delivery.connect("default", user="ada") for _ in range(2))
    assert [len(next(client)) > 0 for client in (first, second)] == [True, True]
    first.close()
    delivery.deliver()
    assert numbers(second, 1) == [1]
    assert delivery.hub.has_user("ada")
    assert delivery.hub.dismiss("kicked", user="ada") == 1
    second.close()
    assert not delivery.hub.has_user("ada")


def test_the_age_of_the_history_is_that_of_its_oldest_frame_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    delivery = Delivery()
    assert delivery.hub.count()["history_age"] == 0
    delivery.deliver()  # its time is 0
    monkeypatch.setattr(Numbers, "now", lambda self: 3_500.0)
    assert delivery.hub.count()["history_age"] == 3.5
    monkeypatch.setattr(Numbers, "now", lambda self: -1.0)  # the clock of another machine
    assert delivery.hub.count()["history_age"] == 0


def test_the_age_of_the_oldest_stream_is_in_seconds_and_0_without_any() -> None:
    now = [100.0]
    delivery = Delivery(clock=lambda: now[0])
    counts = delivery.hub.count()
    assert (counts["oldest_stream"], counts["clients_by_transport"]) == (0, {"attached": 0, "detached": 0})
    delivery.connect()
    now[0] += 5
    delivery.connect()
    assert delivery.hub.count()["oldest_stream"] == 5
