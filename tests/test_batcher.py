"""The batcher: order, flush, close, faults, and the effects of a broken sink. With real threads."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from functools import partial
from queue import SimpleQueue
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sse_batcher import BacklogFullError, Batch, BatchOptions, ClosedError, EventBatcher, InvalidEventError
from sse_batcher.batching.engine import _Flush
from sse_batcher.batching.window import NOW

from .kit.batching import SteppedBatcher
from .kit.threads import in_thread, start_in_thread
from .kit.waiting import TIMEOUT

LONG = BatchOptions(batch_window=10)
AT_ONCE = BatchOptions(max_batch_size=1)


class Sink:
    """Keeps batches, and can be stuck or broken."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self.arrived = threading.Semaphore(0)
        self.entered = threading.Event()
        self.free = threading.Event()
        self.free.set()
        self.error: BaseException | None = None

    def __call__(self, batch: Batch) -> None:
        self.entered.set()
        assert self.free.wait(TIMEOUT)
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        self.batches.append(batch)
        self.arrived.release()

    def stick(self) -> None:
        self.entered.clear()
        self.free.clear()

    def data(self) -> list[Any]:
        return [event.data for batch in self.batches for event in batch.events]


@pytest.fixture
def sink() -> Sink:
    return Sink()


@pytest.fixture
def open_batcher(sink: Sink) -> Iterator[Callable[..., EventBatcher]]:
    """Makes batchers on `sink`, and closes them in the end."""
    with contextlib.ExitStack() as stack:

        def open_one(options: BatchOptions = LONG) -> EventBatcher:
            return stack.enter_context(EventBatcher(sink, options))

        yield open_one
        sink.free.set()


OpenBatcher = Callable[..., EventBatcher]


# -- waking ------------------------------------------------------------------------------------------------------------


def test_a_lone_event_is_delivered_when_its_window_ends() -> None:
    sink = Sink()
    with EventBatcher(sink, BatchOptions(batch_window=0.02)) as batcher:
        batcher.enqueue("log", 1)
        assert sink.arrived.acquire(timeout=TIMEOUT)
    assert sink.batches[0].reason == "time_window"


def test_an_event_between_the_last_look_and_the_sleep_is_delivered(sink: Sink, open_batcher: OpenBatcher) -> None:
    batcher = open_batcher(AT_ONCE)
    worker = batcher._engine.get()._worker
    batcher.enqueue("log", "start the thread")
    assert sink.arrived.acquire(timeout=TIMEOUT)

    class Seam(SimpleQueue):  # type: ignore[type-arg]
        """Enqueues in the moment when the thread goes to sleep."""

        def get(self, block: bool = True, timeout: float | None = None) -> Any:
            if not self.passed:
                self.passed = True
                in_thread(batcher.enqueue, "log", "in the seam")
            return super().get(block, timeout)

        passed = False

    old, worker._wakeups = worker._wakeups, Seam()
    old.put(worker._owner())
    assert sink.arrived.acquire(timeout=TIMEOUT)
    assert sink.data() == ["start the thread", "in the seam"]


def test_a_batch_that_is_ready_only_after_the_thread_has_delivered_is_delivered_in_the_same_turn() -> None:
    batcher = SteppedBatcher(max_batch_size=1)
    late = iter(["late"])
    # Between the last delivery and the decision to sleep. No caller wakes the thread then: it is awake.
    batcher.engine._log_news_locked = lambda: [batcher.enqueue("log", data) for data in late]  # type: ignore[method-assign]
    batcher.step()
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


def test_a_deadline_of_exactly_now_takes_one_turn() -> None:
    batcher = SteppedBatcher()
    batcher.enqueue("log", 1)
    deadline = batcher.step()
    assert deadline is not None
    batcher.clock.now, batcher.clock.asked = deadline, 0
    assert batcher.step() is None
    assert batcher.clock.asked < 10


def test_an_idle_batcher_sleeps_until_it_is_woken(sink: Sink, open_batcher: OpenBatcher) -> None:
    batcher = open_batcher(AT_ONCE)
    batcher.enqueue("log", 1)
    assert sink.arrived.acquire(timeout=TIMEOUT)
    worker = batcher._engine.get()._worker
    naps: SimpleQueue[float | None] = SimpleQueue()

    class Watched(SimpleQueue):  # type: ignore[type-arg]
        def get(self, block: bool = True, timeout: float | None = None) -> Any:
            naps.put(timeout)
            return super().get(block, timeout)

    old, worker._wakeups = worker._wakeups, Watched()
    old.put(worker._owner())
    assert naps.get(timeout=TIMEOUT) is None
    assert naps.empty()


# -- order and producers -----------------------------------------------------------------------------------------------


def test_thirty_two_producers_lose_nothing_and_keep_their_own_order(sink: Sink, open_batcher: OpenBatcher) -> None:
    batcher = open_batcher(BatchOptions(batch_window=0.001, max_batch_size=7))

    def produce(producer: int) -> None:
        for n in range(500):
            batcher.enqueue("log", (producer, n))

    for result in [start_in_thread(produce, producer) for producer in range(32)]:
        result()
    assert batcher.flush_all(TIMEOUT)
    got: dict[int, list[int]] = {producer: [] for producer in range(32)}
    for producer, n in sink.data():
        got[producer].append(n)
    assert all(numbers == list(range(500)) for numbers in got.values())


def _produce_until_refused(
    batcher: EventBatcher, producer: int, accepted: Counter[int], start: threading.Barrier
) -> None:
    start.wait()
    with contextlib.suppress(ClosedError):
        while True:
            batcher.enqueue("log", producer)
            accepted[producer] += 1


def test_producers_that_meet_the_end_are_refused_or_delivered(sink: Sink) -> None:
    for _ in range(30):
        batcher = EventBatcher(sink, BatchOptions(batch_window=0.001))
        accepted: Counter[int] = Counter()
        start = threading.Barrier(9)

        results = [start_in_thread(_produce_until_refused, batcher, producer, accepted, start) for producer in range(8)]
        start.wait()
        assert batcher.destroy(TIMEOUT)
        for result in results:
            result()
        assert Counter(sink.data()) == accepted
        sink.batches.clear()


class Hooked(deque):  # type: ignore[type-arg]
    """An inbox that lets something happen before or after the next event goes in."""

    before: Callable[[], Any] | None = None
    after: Callable[[], Any] | None = None

    def append(self, entry: Any) -> None:
        (before, after), self.before, self.after = (self.before, self.after), None, None
        if before:
            before()
        super().append(entry)
        if after:
            after()


def test_an_event_that_goes_in_just_before_the_end_is_delivered(sink: Sink) -> None:
    batcher = EventBatcher(sink, LONG)
    inbox = batcher._engine.get()._inbox = Hooked()
    inbox.after = partial(in_thread, batcher.close, TIMEOUT)
    batcher.enqueue("log", 1)
    assert sink.data() == [1]
    assert (batcher.get_stats().enqueued, batcher.get_stats().refused) == (1, 0)


def test_an_event_that_goes_in_just_after_the_end_comes_out_again(sink: Sink) -> None:
    batcher = EventBatcher(sink, LONG)
    inbox = batcher._engine.get()._inbox = Hooked()
    inbox.before = partial(in_thread, batcher.close, TIMEOUT)
    with pytest.raises(ClosedError):
        batcher.enqueue("log", 1)
    assert not inbox
    assert (batcher.get_stats().enqueued, batcher.get_stats().refused) == (0, 1)


def test_an_event_that_goes_in_after_the_end_is_not_taken_in_by_somebody_else_before_it_comes_out(sink: Sink) -> None:
    batcher = EventBatcher(sink, LONG)
    inbox = batcher._engine.get()._inbox = Hooked()
    inbox.before, inbox.after = partial(in_thread, batcher.close, TIMEOUT), partial(in_thread, batcher.get_stats)
    with pytest.raises(ClosedError):
        batcher.enqueue("log", 1)
    assert sink.data() == []


def test_enqueue_waits_for_no_lock(sink: Sink, open_batcher: OpenBatcher) -> None:
    batcher = open_batcher(AT_ONCE)
    engine = batcher._engine.get()
    with engine._turn, engine._counters:
        in_thread(batcher.enqueue, "log", 1)
    assert sink.arrived.acquire(timeout=TIMEOUT)


def test_the_thread_delivers_what_is_ready_before_it_takes_in_the_rest() -> None:
    batcher = SteppedBatcher()
    waiting: list[int] = []
    batcher.engine._sink = lambda batch: waiting.append(len(batcher.engine._inbox))
    for n in range(250):
        batcher.enqueue("log", n)
    batcher.step()
    assert waiting == [150, 150, 50, 50, 0]


def test_events_keep_the_time_at_which_they_came(sink: Sink) -> None:
    batcher = SteppedBatcher()
    for _ in range(4):  # the thread does not run meanwhile
        batcher.enqueue("log", batcher.clock.now)
        batcher.clock.now += 0.06
    batcher.step()
    assert [len(events) for events in batcher.sent()] == [2, 2]


def test_an_event_between_a_flush_and_the_end_is_delivered() -> None:
    batcher = SteppedBatcher()
    batcher.enqueue("log", 1)
    batcher.flush_all(0)
    batcher.enqueue("log", 2)
    batcher.close(0)
    batcher.step()
    assert batcher.sent() == [[1], [2]]


def test_a_flush_that_meets_the_end_is_answered() -> None:
    batcher = SteppedBatcher()
    batcher.enqueue("log", 1)
    batcher.close(0)
    flushes = [_Flush("manual", 0.0, 0), _Flush("manual", 0.0, 0)]
    batcher.engine._inbox.append(flushes[0])
    batcher.step()
    batcher.engine._inbox.append(flushes[1])  # by a caller that had not seen the end
    batcher.step()
    assert [flush.answers.get_nowait() for flush in flushes] == [True, True]


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


def test_an_event_after_the_threads_last_look_wakes_it() -> None:
    batcher = SteppedBatcher()
    batcher.step()

    class Late(deque):  # type: ignore[type-arg]
        """The inbox, with an event that comes right after the thread has found it empty for the last time."""

        passed = False

        def __bool__(self) -> bool:
            answer = len(self) > 0
            if not answer and not self.passed and batcher.engine._next_turn != NOW:
                self.passed = True
                batcher.enqueue("log", "late")
            return answer

    batcher.engine._inbox = Late()
    wakes = batcher.worker.wakes
    batcher.step()
    assert batcher.worker.wakes == wakes + 1
    batcher.advance(1)
    assert batcher.sent() == [["late"]]


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


def test_what_the_sink_keeps_does_not_change(sink: Sink, open_batcher: OpenBatcher) -> None:
    batcher = open_batcher()
    data = {"n": [1]}
    batcher.enqueue("log", data)
    data["n"].append(2)
    batcher.flush_all(TIMEOUT)
    kept = sink.batches[0].events
    batcher.enqueue("log", data)
    batcher.flush_all(TIMEOUT)
    assert [event.data for event in kept] == [{"n": [1]}]


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
    # One turn of the thread delivers a good and then a bad batch, before the caller of flush looks at the answer.
    batcher = SteppedBatcher()
    failing = iter([None, OSError("no")])

    def deliver(batch: Batch) -> None:
        error = next(failing)
        if error:
            raise error

    batcher.engine._sink = deliver
    batcher.enqueue("log", 1)
    flush = _Flush("manual", batcher.clock.now, 0)
    batcher.engine._inbox.append(flush)
    batcher.enqueue("hub_state", 2)
    batcher.step()
    assert batcher.get_stats().failed == 1
    assert flush.answers.get_nowait() is True


def test_a_flush_during_a_delivery_that_fails_is_false(sink: Sink, open_batcher: OpenBatcher) -> None:
    batcher = open_batcher()
    sink.stick()
    sink.error = OSError("no")
    batcher.enqueue("error", 1)
    assert sink.entered.wait(TIMEOUT)
    answers: SimpleQueue[bool] = SimpleQueue()

    class Asked(deque):  # type: ignore[type-arg]
        """The inbox; the sink is freed when the flush is in it."""

        def append(self, item: Any) -> None:
            super().append(item)
            sink.free.set()

    batcher._engine.get()._inbox = Asked()
    in_thread(lambda: answers.put(batcher.flush_all(TIMEOUT)))
    assert answers.get(timeout=TIMEOUT) is False


# -- close -------------------------------------------------------------------------------------------------------------


def test_close_delivers_what_is_pending_without_waiting_for_windows(sink: Sink) -> None:
    batcher = EventBatcher(sink, LONG)
    batcher.enqueue("log", 1)
    started = time.monotonic()
    assert batcher.close()
    assert time.monotonic() - started < 0.5
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


def test_a_sink_that_enqueues_is_served(open_batcher: OpenBatcher, sink: Sink) -> None:
    def chain(batch: Batch) -> None:
        (event,) = batch.events
        if event.data:
            batcher.enqueue("error", event.data - 1)
        sink(batch)

    with EventBatcher(chain) as batcher:
        batcher.enqueue("error", 5)
        for _ in range(6):
            assert sink.arrived.acquire(timeout=TIMEOUT)
    assert sink.data() == [5, 4, 3, 2, 1, 0]


# -- faults ------------------------------------------------------------------------------------------------------------


def test_a_sink_that_raises_costs_its_batch_and_is_logged_once_until_it_works(
    sink: Sink, open_batcher: OpenBatcher, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "sse_batcher")
    batcher = open_batcher()
    for n in range(3):
        sink.error = OSError(f"no {n}")
        batcher.enqueue("log", n)
        assert not batcher.flush_all(TIMEOUT)
    batcher.enqueue("log", 3)
    assert batcher.flush_all(TIMEOUT)
    assert sink.data() == [3]
    stats = batcher.get_stats()
    assert (stats.enqueued, stats.failed, stats.batches, stats.pending_events) == (4, 3, 1, 0)
    assert batcher.close()
    levels = [record.levelname for record in caplog.records]
    assert levels == ["ERROR", "INFO"]
    assert "3 events were lost" in caplog.text


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(("error", "failures"), [(OSError, 2), (SystemExit, 3)])
def test_a_logging_handler_that_enqueues_does_not_keep_a_broken_sink_busy(
    error: type[BaseException], failures: int
) -> None:
    def broken(batch: Batch) -> None:
        raise error

    batcher = EventBatcher(broken, AT_ONCE)

    class Forward(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            batcher.enqueue("log", record.getMessage())

    handler = Forward()
    logger = logging.getLogger("sse_batcher")
    logger.addHandler(handler)
    try:
        batcher.enqueue("log", "first")
        while batcher.get_stats().failed < failures:
            batcher.flush_all(TIMEOUT)
        batcher.close(TIMEOUT)
    finally:
        logger.removeHandler(handler)
    # The first event, and the log lines about it: not a line for each line.
    assert batcher.get_stats().failed == failures


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("error", [SystemExit(), KeyboardInterrupt(), GeneratorExit()], ids=repr)
def test_a_thread_that_dies_in_the_sink_is_replaced_and_its_batch_has_failed(
    sink: Sink, open_batcher: OpenBatcher, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    batcher = open_batcher()
    sink.error = error
    batcher.enqueue("log", 1)
    batcher.enqueue("other", 2)
    assert not batcher.flush_all(TIMEOUT)
    batcher.enqueue("log", 3)
    assert batcher.flush_all(TIMEOUT)
    assert sink.data() == [2, 3]
    stats = batcher.get_stats()
    assert (stats.failed, stats.thread_restarts, stats.pending_events) == (1, 1, 0)
    assert "died and is replaced" in caplog.text


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_is_killed_while_it_sleeps_is_replaced(sink: Sink, open_batcher: OpenBatcher) -> None:
    batcher = open_batcher(BatchOptions(batch_window=0.01))
    batcher.enqueue("log", 1)
    assert batcher.flush_all(TIMEOUT)
    worker = batcher._engine.get()._worker
    thread = worker.thread
    assert thread is not None

    class Deadly(SimpleQueue):  # type: ignore[type-arg]
        def get(self, block: bool = True, timeout: float | None = None) -> Any:
            worker._wakeups = SimpleQueue()
            raise SystemExit

    sleeping, worker._wakeups = worker._wakeups, Deadly()
    sleeping.put(worker._owner())
    thread.join(TIMEOUT)
    batcher.enqueue("log", 2)
    assert batcher.flush_all(TIMEOUT)
    assert sink.data() == [1, 2]
    assert batcher.get_stats().thread_restarts == 1


def test_when_no_thread_can_be_started_the_caller_delivers(sink: Sink, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    batcher = EventBatcher(sink, LONG)
    batcher.enqueue("log", 1)
    assert sink.data() == [1]
    batcher.enqueue("log", 2)
    batcher.enqueue("error", 3)
    assert sink.data() == [1, 2, 3]
    assert batcher.flush_all(TIMEOUT)
    assert batcher.close(TIMEOUT)


def test_callers_that_deliver_themselves_take_turns(sink: Sink, monkeypatch: pytest.MonkeyPatch) -> None:
    batcher = EventBatcher(sink, LONG)
    monkeypatch.setattr(batcher._engine.get()._worker, "ensure", lambda: False)
    sink.stick()
    first = start_in_thread(batcher.enqueue, "log", 0)
    assert sink.entered.wait(TIMEOUT)
    # One thread delivers. The others leave their events to it, and do not wait.
    for n in range(1, 4):
        batcher.enqueue("log", n)
    sink.free.set()
    first()
    assert sorted(sink.data()) == [0, 1, 2, 3]


def _enqueue(batcher: EventBatcher, times: int) -> None:
    for _ in range(times):
        batcher.enqueue("log", "x" * 50)


def test_an_event_that_comes_when_a_caller_has_just_delivered_the_last_one_is_delivered(sink: Sink) -> None:
    batcher = EventBatcher(sink, AT_ONCE)
    engine = batcher._engine.get()
    engine._worker.ensure = lambda: False  # type: ignore[method-assign]
    finish = engine._finish_locked
    late = iter([partial(in_thread, batcher.enqueue, "log", "late")])

    def finish_and_meet() -> None:
        """Let another caller come while the turn is still held. It does not get the turn."""
        finish()
        next(late, lambda: None)()

    engine._finish_locked = finish_and_meet  # type: ignore[method-assign]
    batcher.enqueue("log", "first")
    assert sink.data() == ["first", "late"]
    assert batcher.close()


def test_a_backlog_is_bounded_and_says_how_much_waits_and_for_how_long(sink: Sink) -> None:
    batcher = EventBatcher(sink, BatchOptions(max_pending_bytes=100_000))
    sink.stick()
    batcher.enqueue("error", 0)
    assert sink.entered.wait(TIMEOUT)  # from here on the thread takes nothing in
    with pytest.raises(BacklogFullError) as caught:
        _enqueue(batcher, 100_000)
    accepted = batcher.get_stats().enqueued
    assert accepted * 50 < 100_000
    stats = batcher.get_stats()
    assert stats.pending_bytes <= 100_000
    assert caught.value.pending_events == stats.pending_events == accepted
    assert caught.value.pending_bytes == stats.pending_bytes
    assert "the backend is stuck" in str(caught.value)
    sink.free.set()
    assert batcher.flush_all(TIMEOUT)
    batcher.enqueue("log", "again")
    assert batcher.close(TIMEOUT)
    assert len(sink.data()) == accepted + 1


def test_events_that_were_not_taken_in_yet_count_in_the_backlog_too() -> None:
    batcher = SteppedBatcher(max_pending_bytes=100_000, max_batch_size=1_000)
    for _ in range(83):
        batcher.enqueue("log", "x" * 998)
    with pytest.raises(BacklogFullError) as caught:
        batcher.enqueue("log", "x" * 998)
    assert (caught.value.pending_events, caught.value.pending_bytes) == (83, 83 * 1_200)
    batcher.step()
    with pytest.raises(BacklogFullError):
        batcher.enqueue("log", "x" * 998)
    batcher.advance(1)
    batcher.enqueue("log", "x" * 998)


def test_the_backlog_error_says_how_long_publish_has_not_returned() -> None:
    batcher = SteppedBatcher(max_pending_bytes=1)
    errors: list[BacklogFullError] = []

    def stuck(batch: Batch) -> None:
        batcher.clock.now += 7
        with pytest.raises(BacklogFullError) as caught:
            batcher.enqueue("log", 2)
        errors.append(caught.value)

    batcher.engine._sink = stuck
    batcher.enqueue("error", 1)
    batcher.step()
    assert errors[0].publishing_for == 7
    assert "for 7.0 s" in str(errors[0])


LEVELS_OF_A_FIRST_REPLACEMENT = [
    ({}, logging.WARNING),
    ({"per_type": {"tools": {"batch_window": 0.2}}}, logging.WARNING),
    ({"dedup_key": "server"}, logging.INFO),
    ({"per_type": {"tools": {"dedup_key": "server"}}}, logging.INFO),
    ({"dedup_key": lambda event_type, data: 1}, logging.INFO),
]


@pytest.mark.parametrize(("options", "level"), LEVELS_OF_A_FIRST_REPLACEMENT)
def test_a_replacement_by_the_default_key_is_a_warning(
    options: dict[str, Any], level: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "sse_batcher")
    batcher = SteppedBatcher(**options)
    batcher.enqueue("tools", {"server": "a"})
    batcher.enqueue("tools", {"server": "a"})
    batcher.advance(1)
    (record,) = caplog.records
    assert record.levelno == level
    assert "'tools'" in record.message
    assert "per_type={'tools': {\"dedup_key\": None}}" in record.message
    assert ("dedup_key='server' (in Flask: SSE_DEDUP_KEY)" in record.message) == (level == logging.WARNING)


def test_the_first_replacement_of_each_type_is_logged_and_no_further_one(caplog: pytest.LogCaptureFixture) -> None:
    batcher = SteppedBatcher(mixed=True)
    for event_type in ("tools", "tools", "tools", "prompts", "prompts"):
        batcher.enqueue(event_type, {"server": "a"})
    batcher.advance(1)
    assert [("'tools'" in record.message, "'prompts'" in record.message) for record in caplog.records] == [
        (True, False),
        (False, True),
    ]


def test_the_type_error_is_explained_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "sse_batcher")
    batcher = SteppedBatcher()
    batcher.enqueue("error", 1)
    batcher.enqueue("error", 2)
    batcher.enqueue("open", 2)
    assert ["onerror" in record.message for record in caplog.records] == [True, False]


def test_nothing_but_the_sink_sees_more_than_ten_thousand_names() -> None:
    batcher = SteppedBatcher(batch_window=0)
    for n in range(10_001):
        batcher.enqueue(f"type{n}", n, channel=f"channel{n}")
    assert len(batcher._rules) == len(batcher._channels) == 1
    batcher.step()
    assert len(batcher.batches) == 10_001


# -- everything at once ------------------------------------------------------------------------------------------------


class Shell(RuleBasedStateMachine):
    """A batcher under any sequence of calls. Its thread takes a turn whenever the state machine says so.

    Every event accepted is in exactly one place, and what was delivered of one type is in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.delivered: list[int] = []
        self.failed: list[int] = []
        self.accepted: list[int] = []
        self.fail_next = False
        self.enqueue_next = False
        self.closed = False
        self.batcher = SteppedBatcher(self.sink, max_batch_size=3, max_pending_bytes=3_000)

    def sink(self, batch: Batch) -> None:
        if self.enqueue_next:
            self.enqueue_next = False
            self.enqueue("from the sink", None)
        if self.fail_next:
            self.fail_next = False
            self.failed += [event.data["n"] for event in batch.events]
            raise OSError("no")
        self.delivered += [event.data["n"] for event in batch.events]

    @rule(event_type=st.sampled_from(["a", "b", "error"]), server=st.one_of(st.none(), st.integers(0, 1)))
    def enqueue(self, event_type: str, server: int | None) -> None:
        number = len(self.accepted)
        try:
            self.batcher.enqueue(event_type, {"n": number, "server": server})
        except (ClosedError, BacklogFullError):
            return
        self.accepted.append(number)

    @rule(seconds=st.sampled_from([0.0, 0.05, 0.1]))
    def look(self, seconds: float) -> None:
        self.batcher.clock.now += seconds
        self.batcher.step()

    @rule()
    def flush(self) -> None:
        self.batcher.flush_all(0)

    @precondition(lambda self: not self.closed)
    @rule()
    def close(self) -> None:
        self.closed = True
        self.batcher.close(0)

    @rule()
    def break_the_sink(self) -> None:
        self.fail_next = True

    @rule()
    def call_from_the_sink(self) -> None:
        self.enqueue_next = True

    @invariant()
    def each_event_is_in_one_place(self) -> None:
        stats = self.batcher.get_stats()
        assert stats.enqueued == len(self.accepted)
        assert stats.failed == len(self.failed)
        assert stats.enqueued == len(self.delivered) + stats.failed + stats.replaced + stats.pending_events
        assert (stats.pending_bytes == 0) == (stats.pending_events == 0)
        assert len(set(self.delivered)) == len(self.delivered)

    def teardown(self) -> None:
        self.fail_next = False
        self.batcher.close(0)
        self.batcher.step()
        stats = self.batcher.get_stats()
        assert (stats.pending_events, stats.pending_bytes) == (0, 0)


TestShell = Shell.TestCase
TestShell.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
