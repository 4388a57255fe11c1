"""What a batcher accepted is delivered once and in order, whatever producers, the thread and the end do meanwhile."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sse_batcher import BacklogFullError, Batch, BatchOptions, ClosedError, EventBatcher

from .kit import locks
from .kit.batching import AT_ONCE, Inbox, OpenBatcher, OwnBatcher, Sink, SteppedBatcher
from .kit.threads import in_thread, start_in_thread
from .kit.waiting import TIMEOUT

# -- producers ---------------------------------------------------------------------------------------------------------


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


def test_enqueue_waits_for_no_lock(sink: Sink) -> None:
    with locks.recorded() as made:
        batcher = OwnBatcher(sink, AT_ONCE)
    with made.held(at_least=2):
        in_thread(batcher.enqueue, "log", 1)
    assert sink.arrived.acquire(timeout=TIMEOUT)
    assert batcher.close(TIMEOUT)


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


# -- one turn ----------------------------------------------------------------------------------------------------------


def test_the_thread_delivers_what_is_ready_before_it_takes_in_the_rest() -> None:
    waiting: list[int] = []
    inbox = Inbox()
    batcher = SteppedBatcher(lambda batch: waiting.append(len(inbox)), inbox=inbox)
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


def test_nothing_but_the_sink_keeps_more_than_ten_thousand_names() -> None:
    batcher = SteppedBatcher(lambda batch: None, batch_window=0)
    names = [f"{kind}{n}" for kind in ("type", "channel") for n in range(2)]

    def references() -> list[int]:
        return [sys.getrefcount(name) for name in names]

    before = references()
    batcher.enqueue(names[0], 0, channel=names[2])
    batcher.enqueue(names[1], 1, channel=names[3])
    batcher.step()
    assert all(now > then for now, then in zip(references(), before, strict=True))  # they are not checked again
    for n in range(2, 10_001):
        batcher.enqueue(f"type{n}", n, channel=f"channel{n}")
    batcher.step()
    assert references() == before


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
