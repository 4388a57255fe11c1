"""Windows of events for users: whose windows a critical event closes, and which events share one."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from sse_batcher import BatchOptions
from sse_batcher.batching.batcher import put
from sse_batcher.batching.window import Windows
from sse_batcher.event import BROADCAST, Audience, Event, check_users

from .kit.batching import SteppedBatcher


def add(batcher: SteppedBatcher, *audiences: Any, event_type: str = "t", key: int | None = None) -> None:
    """Enqueue an event for each of these: a channel, ``*``, or a list of users. Its data say for whom it is."""
    for audience in audiences:
        users: Audience = audience if isinstance(audience, str) else check_users(audience)
        put(batcher, event_type, {"for": audience}, users, key)


def sent(batcher: SteppedBatcher) -> list[tuple[str, Any]]:
    """Why each window has closed so far, and for whom it was."""
    batcher.step()
    return [(batch.reason, batch.events[0].data["for"]) for batch in batcher.batches]


def test_a_critical_event_for_users_comes_after_all_that_is_pending_for_them() -> None:
    batcher = SteppedBatcher(dedup_key=None)
    add(batcher, [1, 7], [8], "a", BROADCAST, [7], [8, 9], ["7"], [9, 8, 7])
    add(batcher, [7], event_type="error")
    assert sent(batcher) == [("critical", each) for each in ([1, 7], BROADCAST, [7], [9, 8, 7], [7])]
    batcher.advance(0.1)
    assert sent(batcher)[5:] == [("time_window", each) for each in ([8], "a", [8, 9], ["7"])]


def test_a_critical_event_for_several_users_comes_after_what_is_pending_for_each() -> None:
    batcher = SteppedBatcher(dedup_key=None)
    add(batcher, [8], [1], [7, 1], [9])
    add(batcher, [7, 8], event_type="error")
    assert sent(batcher) == [("critical", each) for each in ([8], [7, 1], [7, 8])]


@pytest.mark.parametrize(("channel", "closed"), [("a", ["a"]), (BROADCAST, [[7], "a", [8, 9]])])
def test_a_critical_event_of_a_channel_closes_windows_of_users_only_if_it_is_for_all(
    channel: str, closed: list[Any]
) -> None:
    batcher = SteppedBatcher(dedup_key=None)
    add(batcher, [7], "a", [8, 9])
    add(batcher, channel, event_type="error")
    assert sent(batcher) == [("critical", each) for each in [*closed, channel]]


def test_a_window_that_has_closed_is_pending_for_nobody() -> None:
    batcher = SteppedBatcher(dedup_key=None)
    add(batcher, [7, 8])
    batcher.advance(0.1)
    add(batcher, [7])
    add(batcher, [7], event_type="error")
    add(batcher, [8], event_type="error")
    assert sent(batcher) == [("time_window", [7, 8]), ("critical", [7]), ("critical", [7]), ("critical", [8])]


def test_the_windows_of_a_user_and_of_lists_with_this_user_are_apart() -> None:
    batcher = SteppedBatcher(dedup_key=None)
    add(batcher, [7], [7, 8], [7], ["7"], "7", [8, 7], [7])
    batcher.advance(0.1)
    assert [[event["for"] for event in events] for events in batcher.sent()] == [
        [[7], [7], [7]],
        [[7, 8], [8, 7]],
        [["7"]],
        ["7"],
    ]


def test_a_key_replaces_among_the_same_users_alone() -> None:
    batcher = SteppedBatcher()
    for audience in ([7], [8], [7, 8], [8, 7], "7", [7]):
        add(batcher, audience, key=1)
    batcher.advance(0.1)
    assert batcher.sent() == [[{"for": [7]}], [{"for": [8]}], [{"for": [8, 7]}], [{"for": "7"}]]
    assert batcher.get_stats().replaced == 2


@pytest.mark.parametrize("options", [{"mixed": True}, {"leading": True}, {}])
def test_windows_leave_no_trace_of_their_users(options: dict[str, Any]) -> None:
    batch_options = BatchOptions(dedup_key=None, **options)
    windows = Windows(batch_options)
    user = "".join(["a", "da"])
    before = sys.getrefcount(user)

    def add(event_type: str, audience: Audience, now: float) -> None:
        windows.add(Event(event_type, audience, "1"), batch_options.rules(event_type), None, now)

    for number in range(100):
        add("t", (number, user), number / 1000)
        add("u", (user,), number / 1000)
    add("error", (user,), 0.1)
    assert sys.getrefcount(user) > before
    windows.close_due(10)
    windows.close_due(20)  # those that `leading` has opened
    windows.next_deadline()
    windows.closed.clear()
    assert sys.getrefcount(user) == before
