"""When the thread of a batcher is woken, and when it takes its next turn by itself."""

from __future__ import annotations

import logging
from collections import deque
from functools import partial
from queue import SimpleQueue

import pytest

from sse_batcher import BacklogFullError, BatchOptions, EventBatcher, Text
from sse_batcher.runtime.worker import Worker

from .kit.batching import AT_ONCE, OwnBatcher, Sink, SteppedBatcher, Wakeups
from .kit.threads import in_thread
from .kit.waiting import TIMEOUT


def test_a_lone_event_is_delivered_when_its_window_ends() -> None:
    sink = Sink()
    with EventBatcher(sink, BatchOptions(batch_window=0.02)) as batcher:
        batcher.enqueue("log", 1)
        assert sink.arrived.acquire(timeout=TIMEOUT)
    assert sink.batches[0].reason == "time_window"


def test_an_event_between_the_last_look_and_the_sleep_is_delivered(sink: Sink) -> None:
    wakeups = Wakeups()
    with OwnBatcher(sink, AT_ONCE, make_worker=partial(Worker, wakeups=wakeups)) as batcher:
        late = iter(["in the seam"])
        # In the moment when the thread goes to sleep.
        wakeups.before_wait = lambda timeout: [in_thread(batcher.enqueue, "log", data) for data in late]
        batcher.enqueue("log", "start the thread")
        assert sink.arrived.acquire(timeout=TIMEOUT)
        assert sink.arrived.acquire(timeout=TIMEOUT)
    assert sink.data() == ["start the thread", "in the seam"]


def test_a_batch_that_is_ready_only_after_the_thread_has_delivered_is_delivered_in_the_same_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batcher = SteppedBatcher()
    late = iter(["late"])

    class Forward(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            for data in late:
                batcher.enqueue("error", data)

    # The first replacement is logged between the last delivery and the decision to sleep. No caller wakes the thread
    # then: it is awake.
    logger = logging.getLogger("sse_batcher.engine")
    monkeypatch.setattr(logger, "handlers", [Forward()])
    for _ in range(2):
        batcher.enqueue("tools", {"server": "a"})
    wakes = batcher.worker.wakes
    batcher.step()
    assert batcher.sent() == [[{"server": "a"}], ["late"]]
    assert batcher.worker.wakes == wakes


def test_an_event_after_the_threads_last_look_wakes_it() -> None:
    class Late(deque):  # type: ignore[type-arg]
        """The inbox, with an event that comes right after the thread has found it empty for the last time."""

        looks = 0

        def __bool__(self) -> bool:
            answer = len(self) > 0
            self.looks += 1
            if self.looks == late_at:
                batcher.enqueue("log", "late")
            return answer

    late_at = 0
    inbox = Late()
    batcher = SteppedBatcher(inbox=inbox)
    inbox.looks = 0
    batcher.step()
    # The last look of the next turn, which is as long as this one.
    late_at, inbox.looks = inbox.looks, 0
    wakes = batcher.worker.wakes
    batcher.step()
    assert batcher.worker.wakes == wakes + 1
    batcher.advance(1)
    assert batcher.sent() == [["late"]]


def test_the_thread_is_woken_for_the_first_event_of_a_window_and_not_for_those_that_join_it() -> None:
    batcher = SteppedBatcher()
    batcher.step()
    for n in range(49):
        batcher.enqueue("log", n)
    assert batcher.worker.wakes == 1
    batcher.step()
    batcher.enqueue("other", 1)  # ends later than the first window: the thread will look before that
    assert batcher.worker.wakes == 1
    batcher.enqueue("log", 50)
    assert batcher.worker.wakes == 2


def test_a_thread_that_was_woken_and_has_not_come_yet_is_not_woken_again() -> None:
    batcher = SteppedBatcher(max_batch_size=1)
    for n in range(10):
        batcher.enqueue("log", n)
    assert batcher.worker.wakes == 1


def test_an_event_with_an_earlier_deadline_wakes_the_thread() -> None:
    batcher = SteppedBatcher(batch_window=1.0, per_type={"fast": {"batch_window": 0.01}})
    batcher.enqueue("slow", 1)
    assert batcher.step() == batcher.clock.now + 1.0
    batcher.enqueue("fast", 1)
    assert batcher.worker.wakes == 2


def test_a_full_window_wakes_the_thread_whatever_else_waits() -> None:
    batcher = SteppedBatcher(max_batch_size=5)
    for n in range(3):
        batcher.enqueue("log", n)
    batcher.step()
    wakes = batcher.worker.wakes
    batcher.enqueue("log", 3)
    assert batcher.worker.wakes == wakes
    batcher.enqueue("log", 4)
    assert batcher.worker.wakes == wakes + 1
    batcher.step()
    assert batcher.sent() == [[0, 1, 2, 3, 4]]


def test_a_window_with_too_many_bytes_wakes_the_thread() -> None:
    batcher = SteppedBatcher(max_frame_bytes=2_000)
    batcher.enqueue("log", "x" * 900)
    batcher.step()
    wakes = batcher.worker.wakes
    batcher.enqueue("log", "x" * 900)
    assert batcher.worker.wakes == wakes + 1
    batcher.enqueue("log", "x" * 900)
    batcher.step()
    assert [len(events) for events in batcher.sent()] == [2]


def test_the_first_events_of_a_type_wake_the_thread_if_they_fill_a_frame_before_another_window_ends() -> None:
    batcher = SteppedBatcher(max_frame_bytes=2_000)
    batcher.enqueue("quiet", 1)
    batcher.step()
    wakes = batcher.worker.wakes
    batcher.enqueue("log", "x" * 900)
    assert batcher.worker.wakes == wakes
    batcher.enqueue("log", "y" * 900)
    assert batcher.worker.wakes == wakes + 1
    batcher.enqueue("log", "z" * 900)
    batcher.step()
    assert batcher.sent() == [["x" * 900, "y" * 900]]


def test_a_refusal_wakes_the_thread_for_what_is_still_in_the_inbox() -> None:
    batcher = SteppedBatcher(max_pending_bytes=2_000)
    batcher.enqueue("quiet", 1)
    batcher.step()
    for data in (1, Text("2"), 3, Text("4"), 5, Text("6"), 7):  # each closes the window of the one before
        batcher.enqueue("log", data)
    wakes = batcher.worker.wakes
    for _ in range(2):
        with pytest.raises(BacklogFullError):
            batcher.enqueue("log", "x" * 500)
    assert batcher.worker.wakes == wakes + 1
    batcher.step()
    batcher.enqueue("log", "x" * 500)
    assert batcher.sent() == [[1], ["2"], [3], ["4"], [5], ["6"]]


def test_a_refusal_does_not_wake_the_thread_for_what_waits_in_windows() -> None:
    batcher = SteppedBatcher(max_pending_bytes=500)
    batcher.enqueue("log", 1)
    batcher.enqueue("log", 2)
    batcher.step()
    wakes = batcher.worker.wakes
    with pytest.raises(BacklogFullError):
        batcher.enqueue("log", 3)
    assert batcher.worker.wakes == wakes


def test_a_leading_event_wakes_the_thread_and_those_after_it_do_not() -> None:
    batcher = SteppedBatcher(leading=True)
    batcher.enqueue("log", 1)
    batcher.step()
    assert batcher.sent() == [[1]]
    wakes = batcher.worker.wakes
    batcher.enqueue("log", 2)
    assert batcher.worker.wakes == wakes
    batcher.advance(1)
    assert batcher.sent() == [[1], [2]]


def test_a_deadline_of_exactly_now_takes_one_turn() -> None:
    batcher = SteppedBatcher()
    batcher.enqueue("log", 1)
    deadline = batcher.step()
    assert deadline is not None
    batcher.clock.now, batcher.clock.asked = deadline, 0
    assert batcher.step() is None
    assert batcher.clock.asked < 10


def test_an_idle_batcher_sleeps_until_it_is_woken(sink: Sink) -> None:
    naps: SimpleQueue[float | None] = SimpleQueue()
    wakeups = Wakeups()
    wakeups.before_wait = naps.put
    with OwnBatcher(sink, AT_ONCE, make_worker=partial(Worker, wakeups=wakeups)) as batcher:
        batcher.enqueue("log", 1)
        assert sink.arrived.acquire(timeout=TIMEOUT)
        assert naps.get(timeout=TIMEOUT) is None
        assert naps.empty()
