"""A batcher whose sink fails or is stuck, whose thread dies or cannot start; its backlog, and what it logs."""

from __future__ import annotations

import logging
import threading
from functools import partial
from typing import Any

import pytest

from sse_batcher import BacklogFullError, Batch, BatchOptions, EventBatcher, Text
from sse_batcher.runtime.worker import Worker

from .kit import locks
from .kit.batching import AT_ONCE, LONG, NoWorker, OpenBatcher, OwnBatcher, Sink, SteppedBatcher, Wakeups
from .kit.threads import in_thread, start_in_thread
from .kit.waiting import TIMEOUT

# -- the sink and the thread -------------------------------------------------------------------------------------------


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
    assert batcher.close(TIMEOUT)
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
def test_a_thread_that_is_killed_while_it_sleeps_is_replaced(sink: Sink) -> None:
    wakeups = Wakeups()
    options = BatchOptions(batch_window=0.01)
    with OwnBatcher(sink, options, make_worker=partial(Worker, wakeups=wakeups)) as batcher:
        batcher.enqueue("log", 1)
        assert batcher.flush_all(TIMEOUT)
        thread = batcher.worker.thread
        assert thread is not None

        def die(timeout: float | None) -> None:
            wakeups.before_wait = None
            raise SystemExit

        wakeups.before_wait = die
        batcher.worker.wake()
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
    assert sink.data() == [1, 2]
    batcher.enqueue("error", 3)
    assert sink.data() == [1, 2, 3]
    assert batcher.flush_all(TIMEOUT)
    assert batcher.close(TIMEOUT)


def test_a_caller_whose_delivery_is_interrupted_leaves_the_next_event_to_its_own_caller(sink: Sink) -> None:
    batcher = OwnBatcher(sink, LONG, make_worker=NoWorker)
    sink.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        batcher.enqueue("log", 1)
    batcher.enqueue("log", 2)
    assert sink.data() == [2]
    assert batcher.get_stats().failed == 1


def test_callers_that_deliver_themselves_take_turns(sink: Sink) -> None:
    batcher = OwnBatcher(sink, LONG, make_worker=NoWorker)
    sink.stick()
    first = start_in_thread(batcher.enqueue, "log", 0)
    assert sink.entered.wait(TIMEOUT)
    # One thread delivers. The others leave their events to it, and do not wait.
    for n in range(1, 4):
        batcher.enqueue("log", n)
    sink.free.set()
    first()
    assert sorted(sink.data()) == [0, 1, 2, 3]


def test_an_event_that_comes_when_a_caller_has_just_delivered_the_last_one_is_delivered(sink: Sink) -> None:
    with locks.recorded() as made:
        batcher = OwnBatcher(sink, AT_ONCE, make_worker=NoWorker)
    late = iter(["late"])
    for lock in made.all:
        # Another caller comes while the turn is still held, and does not get it.
        lock.before_release = lambda: [in_thread(batcher.enqueue, "log", data) for data in late]
    batcher.enqueue("log", "first")
    assert sink.data() == ["first", "late"]
    assert batcher.close(TIMEOUT)


# -- the backlog -------------------------------------------------------------------------------------------------------


def _enqueue(batcher: EventBatcher, times: int) -> None:
    for _ in range(times):
        batcher.enqueue("log", "x" * 50)


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
    errors: list[BacklogFullError] = []

    def stuck(batch: Batch) -> None:
        batcher.clock.now += 7
        with pytest.raises(BacklogFullError) as caught:
            batcher.enqueue("log", 2)
        errors.append(caught.value)
        assert batcher.publishing_for == 7

    batcher = SteppedBatcher(stuck, max_pending_bytes=1)
    batcher.enqueue("error", 1)
    batcher.step()
    assert errors[0].publishing_for == 7
    assert "for 7.0 s" in str(errors[0])
    assert batcher.publishing_for == 0


# -- the log -----------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("options", [{}, {"dedup_key": "server"}, {"dedup_key": None}])
def test_a_replacement_by_a_key_of_the_call_is_not_logged(
    options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "sse_batcher")
    batcher = SteppedBatcher(**options)
    for data in ({"server": "a"}, {"server": "a"}, Text("a"), Text("b")):
        batcher.enqueue("tools", data, key="a")
        batcher.enqueue("tools", data, key=1)
    batcher.advance(1)
    assert batcher.get_stats().replaced == 4
    assert not caplog.records


def test_the_type_error_is_explained_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "sse_batcher")
    batcher = SteppedBatcher()
    batcher.enqueue("error", 1)
    batcher.enqueue("error", 2)
    batcher.enqueue("open", 2)
    assert ["onerror" in record.message for record in caplog.records] == [True, False]
