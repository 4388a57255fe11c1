"""What `flush_all` and `close` of a batcher wait for, what they answer, and events that meet them."""

from __future__ import annotations

import threading
import time
from functools import partial

import pytest

from sse_batcher import Batch, ClosedError, EventBatcher, InvalidEventError

from .kit.batching import LONG, Inbox, OpenBatcher, OwnBatcher, Sink, SteppedBatcher
from .kit.threads import in_thread, start_in_thread
from .kit.waiting import TIMEOUT, wait_until

# -- flush -------------------------------------------------------------------------------------------------------------


def test_flush_does_not_wait_out_the_window(sink: Sink, open_batcher: OpenBatcher) -> None:
    batcher = open_batcher()
    batcher.enqueue("log", 1)
    assert batcher.flush_all(TIMEOUT / 2)
    assert [(batch.reason, len(batch.events)) for batch in sink.batches] == [("manual", 1)]


def test_flush_with_nothing_pending_is_true_and_starts_no_thread(open_batcher: OpenBatcher) -> None:
    before = threading.active_count()
    assert open_batcher().flush_all(0)
    assert threading.active_count() == before


def test_flush_gives_up_after_its_timeout(sink: Sink, open_batcher: OpenBatcher) -> None:
    batcher = open_batcher()
    sink.stick()
    batcher.enqueue("log", 1)
    assert not batcher.flush_all(0.01)
    sink.free.set()
    assert batcher.flush_all(TIMEOUT)


def test_flush_waits_for_what_came_before_it_and_not_for_what_comes_after(
    sink: Sink, open_batcher: OpenBatcher
) -> None:
    batcher = open_batcher()
    sink.stick()
    batcher.enqueue("log", 1)
    flushed = start_in_thread(batcher.flush_all, TIMEOUT)
    assert sink.entered.wait(TIMEOUT)
    batcher.enqueue("log", 2)  # its window is open for ten seconds
    sink.free.set()
    assert flushed()
    assert sink.data() == [1]


def test_a_flush_takes_in_everything_before_it() -> None:
    batcher = SteppedBatcher(max_batch_size=1_000)
    for n in range(350):
        batcher.enqueue("log", n)
    assert not batcher.flush_all(0)
    batcher.enqueue("log", "after it")
    batcher.step()
    assert batcher.sent() == [list(range(350))]
    batcher.advance(1)
    assert batcher.flush_all(0)


def test_a_refused_event_is_not_waited_for(open_batcher: OpenBatcher) -> None:
    batcher = open_batcher()
    with pytest.raises(InvalidEventError):
        batcher.enqueue("log", object())
    assert batcher.flush_all(TIMEOUT)


def test_flush_is_false_if_one_of_its_batches_failed_and_true_again_after(
    sink: Sink, open_batcher: OpenBatcher
) -> None:
    batcher = open_batcher()
    sink.error = OSError("no")
    batcher.enqueue("log", 1)
    batcher.enqueue("other", 2)
    assert not batcher.flush_all(TIMEOUT)
    assert sink.data() == [2]
    batcher.enqueue("log", 3)
    assert batcher.flush_all(TIMEOUT)


def test_a_failure_after_the_batches_of_a_flush_is_not_its_own() -> None:
    entered, free = threading.Event(), threading.Event()

    def deliver(batch: Batch) -> None:
        (event,) = batch.events
        if event.data == "first":
            entered.set()
            assert free.wait(TIMEOUT)
        if event.data == "bad":
            raise OSError("no")

    inbox = Inbox()
    with OwnBatcher(deliver, LONG, inbox=inbox) as batcher:
        batcher.enqueue("error", "first")
        assert entered.wait(TIMEOUT)
        # The next turn of the thread delivers a good and then a bad batch.
        batcher.enqueue("log", "good")
        flushed = start_in_thread(batcher.flush_all, TIMEOUT)
        wait_until(lambda: len(inbox) == 2, "the flush is in the inbox")
        batcher.enqueue("hub_state", "bad")
        free.set()
        assert flushed()
        wait_until(lambda: batcher.get_stats().failed == 1, "the bad batch has failed")


def test_a_flush_during_a_delivery_that_fails_is_false(sink: Sink) -> None:
    inbox = Inbox()
    with OwnBatcher(sink, LONG, inbox=inbox) as batcher:
        sink.stick()
        sink.error = OSError("no")
        batcher.enqueue("error", 1)
        assert sink.entered.wait(TIMEOUT)
        inbox.after = sink.free.set  # when the flush is in it
        assert in_thread(batcher.flush_all, TIMEOUT) is False


# -- close -------------------------------------------------------------------------------------------------------------


def test_close_delivers_what_is_pending_without_waiting_for_windows(sink: Sink) -> None:
    batcher = EventBatcher(sink, LONG)
    batcher.enqueue("log", 1)
    started = time.monotonic()
    assert batcher.close(TIMEOUT)
    assert time.monotonic() - started < LONG.batch_window
    assert [batch.reason for batch in sink.batches] == ["shutdown"]
    assert not any(thread.name == "sse_batcher" for thread in threading.enumerate())


def test_a_batcher_shows_its_state(sink: Sink) -> None:
    batcher = EventBatcher(sink, LONG)
    assert repr(batcher) == "<EventBatcher unused in this process>"
    batcher.enqueue("log", 1)
    batcher.enqueue("log", 2)
    assert repr(batcher) == "<EventBatcher open, 2 events pending>"
    batcher.close()
    assert repr(batcher) == "<EventBatcher closed, 0 events pending>"


def test_after_close_events_are_refused_and_flush_and_close_are_true(sink: Sink) -> None:
    with EventBatcher(sink) as batcher:
        batcher.enqueue("log", 1)
    with pytest.raises(ClosedError, match="was closed in this process"):
        batcher.enqueue("log", 2)
    assert batcher.flush_all(0)
    assert batcher.destroy(0)
    assert batcher.get_stats().refused == 1


def test_four_closers_and_a_flush_at_once_all_see_the_end(sink: Sink, open_batcher: OpenBatcher) -> None:
    batcher = open_batcher()
    sink.stick()
    batcher.enqueue("log", 1)
    results = [start_in_thread(call, TIMEOUT) for call in (batcher.flush_all, *[batcher.close] * 4)]
    assert sink.entered.wait(TIMEOUT)
    sink.free.set()
    assert all(result() for result in results)
    assert sink.data() == [1]


def test_close_of_a_stuck_batcher_gives_up_after_its_timeout(sink: Sink) -> None:
    batcher = EventBatcher(sink, LONG)
    sink.stick()
    batcher.enqueue("log", 1)
    assert not batcher.close(0.01)
    sink.free.set()
    assert batcher.close(TIMEOUT)


@pytest.mark.parametrize("call", ["flush_all", "close"])
def test_flush_and_close_from_inside_the_sink_answer_at_once_and_the_work_is_done(call: str) -> None:
    batches: list[Batch] = []
    answers: list[bool] = []

    def sink(batch: Batch) -> None:
        batches.append(batch)
        if len(batches) == 1:
            batcher.enqueue("log", 2)
            answers.append(getattr(batcher, call)(None))
            answered.set()

    answered = threading.Event()
    batcher = EventBatcher(sink, LONG)
    batcher.enqueue("error", 1)
    assert answered.wait(TIMEOUT)
    assert batcher.close(TIMEOUT)
    assert answers == [False]
    assert [event.data for batch in batches for event in batch.events] == [1, 2]


# -- events and flushes that meet the end ------------------------------------------------------------------------------


def test_an_event_that_goes_in_just_before_the_end_is_delivered(sink: Sink) -> None:
    inbox = Inbox()
    batcher = OwnBatcher(sink, LONG, inbox=inbox)
    inbox.after = partial(in_thread, batcher.close, TIMEOUT)
    batcher.enqueue("log", 1)
    assert sink.data() == [1]
    assert (batcher.get_stats().enqueued, batcher.get_stats().refused) == (1, 0)


def test_an_event_that_goes_in_just_after_the_end_comes_out_again(sink: Sink) -> None:
    inbox = Inbox()
    batcher = OwnBatcher(sink, LONG, inbox=inbox)
    inbox.before = partial(in_thread, batcher.close, TIMEOUT)
    with pytest.raises(ClosedError):
        batcher.enqueue("log", 1)
    assert not inbox
    assert (batcher.get_stats().enqueued, batcher.get_stats().refused) == (0, 1)


def test_an_event_that_goes_in_after_the_end_is_not_taken_in_by_somebody_else_before_it_comes_out(sink: Sink) -> None:
    inbox = Inbox()
    batcher = OwnBatcher(sink, LONG, inbox=inbox)
    inbox.before, inbox.after = partial(in_thread, batcher.close, TIMEOUT), partial(in_thread, batcher.get_stats)
    with pytest.raises(ClosedError):
        batcher.enqueue("log", 1)
    assert sink.data() == []


def test_an_event_between_a_flush_and_the_end_is_delivered() -> None:
    batcher = SteppedBatcher()
    batcher.enqueue("log", 1)
    batcher.flush_all(0)
    batcher.enqueue("log", 2)
    batcher.close(0)
    batcher.step()
    assert batcher.sent() == [[1], [2]]


def test_a_flush_behind_the_end_is_answered(sink: Sink) -> None:
    inbox = Inbox()
    batcher = OwnBatcher(sink, LONG, inbox=inbox)
    sink.stick()
    batcher.enqueue("error", 1)
    assert sink.entered.wait(TIMEOUT)
    closed = start_in_thread(batcher.close, TIMEOUT)
    wait_until(lambda: len(inbox) == 1, "the end is in the inbox")
    flushed = start_in_thread(batcher.flush_all, TIMEOUT)
    wait_until(lambda: len(inbox) == 2, "the flush is in the inbox")
    sink.free.set()
    assert closed()
    assert flushed()


def test_a_flush_after_the_end_is_answered(sink: Sink) -> None:
    inbox = Inbox()
    batcher = OwnBatcher(sink, LONG, inbox=inbox)
    batcher.enqueue("log", 1)
    inbox.before = partial(in_thread, batcher.close, TIMEOUT)  # by a caller that had not seen the end
    assert batcher.flush_all(TIMEOUT)
    assert sink.data() == [1]
