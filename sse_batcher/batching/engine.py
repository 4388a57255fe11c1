"""The engine of a batcher: the windows, and the one thread that works on them and delivers.

Callers append to the inbox, and wake the thread if it would look too late. The thread alone takes in what is there,
closes what is due and hands it to the sink; what closes when is decided by `window`. So a signal handler that raises in
the middle of a call, an exhausted stack or a suspended thread can harm that call, and nothing else: appending to a
deque is one step, and everything of several steps is done on a thread that no signal handler interrupts.
"""

from __future__ import annotations

import logging
import os
import queue
from collections import Counter, deque
from collections.abc import Callable
from typing import Final

from ..errors import BacklogFullError, ClosedError
from ..event import Batch, Event
from ..options import BatchOptions, TypeRules
from ..reasons import BatchReason
from ..runtime.locks import is_mine, new_lock, run_if_free
from ..runtime.process import close_at_exit
from ..runtime.worker import Deadline, Worker, take
from ..stats import BatcherStats
from .window import NEVER, NOW, Windows

_log = logging.getLogger("sse_batcher.engine")

SHUTDOWN: Final = "shutdown"

EVENT_OVERHEAD = 200
"""Bytes that a pending event is counted with beside its JSON: about what its Python objects take."""

SLICE = 100
"""Events that the thread takes in at once. Then it delivers what has become ready, and counters can be read."""

MAX_REPLACED_TYPES = 10_000
"""Types of which it is remembered that the first replacement was logged."""


_Entry = tuple[Event, TypeRules, str | None, float]
"""An event on its way into a window: with the rules of its type, the JSON of its dedup key, and when it came."""


class _Flush:
    """A request to close all windows, in its place among the events; and later its answer."""

    __slots__ = ("answers", "ok", "reason", "since", "target", "time")

    def __init__(self, reason: BatchReason, time: float, since: int) -> None:
        self.reason = reason
        self.time = time
        self.since = since
        """How many batches were done before."""
        self.target = 0
        """The number of the last batch that it waits for. By the thread."""
        self.ok = True
        """Whether none of the batches that it waits for has failed so far. By the thread."""
        # Not an `Event`: a thread that is interrupted inside `wait` could leave its lock held, and `put` never blocks.
        self.answers: queue.SimpleQueue[bool] = queue.SimpleQueue()


class Engine:
    """One process's part of a batcher."""

    def __init__(
        self,
        sink: Callable[[Batch], None],
        options: BatchOptions,
        clock: Callable[[], float],
        wall: Callable[[], float],
    ) -> None:
        self.pid = os.getpid()
        self._sink = sink
        self._clock = clock
        self._wall = wall
        self._max_pending_bytes = options.max_pending_bytes

        # What callers put in, and the thread takes out. Its single steps are atomic.
        self._inbox: deque[_Entry | _Flush] = deque()
        # The bytes of the events in it. Added to by callers, before they append; set by the thread. A harmless race:
        # after each burst it is exact again, and it only has to bound the memory. Seen without
        # the GIL, with four producers that send more than can be delivered: 0.9 to 1.3 times the real number.
        self._inbox_bytes = 0
        # When the thread will look by itself. NOW: it is about to. Set by the thread, which looks into the inbox once
        # more after that; callers append first and then look at this. So one of the two sees the other.
        self._next_turn = NEVER
        # First no event is let in any more (by `close`); then, after those before SHUTDOWN in the inbox, none is taken
        # out (by the thread).
        self._closed = False
        self._sealed = False

        # Held by the thread while it works; or by a caller, where no thread can be started. Whoever holds it has all
        # that follows for itself, but for readers of the counters, and `Windows.due`.
        self._turn = new_lock()
        self._windows = Windows(options)
        self._ready: deque[Batch] = deque()  # closed, and not delivered yet
        self._numbered = 0  # batches that were ready so far
        self._newest_failed = 0  # the number of the last batch that has failed
        self._flushes: deque[_Flush] = deque()  # that wait for batches to be done
        self._publishing_since: float | None = None
        self._failing = False
        self._news: deque[TypeRules] = deque()  # of types whose first replacement is to be logged
        self._replaced_types: set[str] = set()

        # Guards the counters, and that each event is in one place: in the inbox, or counted as pending.
        self._counters = new_lock()
        self._pending_events = 0
        self._pending_bytes = 0
        self._enqueued = self._replaced = self._refused = self._failed = self._batches = 0
        self._done = 0  # batches that the sink took, or that failed
        self._reasons: Counter[BatchReason] = Counter()

        self._worker = Worker(self, "sse_batcher")
        close_at_exit(self)

    # -- any thread ----------------------------------------------------------------------------------------------------

    def add(self, event: Event, rules: TypeRules, key: str | None) -> None:
        """Take an event. Raises `ClosedError` or `BacklogFullError`."""
        inbox = self._inbox
        size = len(event.json) + EVENT_OVERHEAD
        if self._pending_bytes + self._inbox_bytes + size > self._max_pending_bytes:
            self._check_backlog(size)
        now = self._clock()
        entry = (event, rules, key, now)
        self._inbox_bytes += size
        inbox.append(entry)
        if self._closed:  # looked at after the append, or an event that meets the end could be accepted and never sent
            self._withdraw(entry)
        next_turn = self._next_turn
        if (
            next_turn != NOW
            and not self._worker.is_woken()
            and self._windows.due(event, rules, len(inbox), self._inbox_bytes, now) < next_turn
        ):
            self._wake()

    def flush(self, reason: BatchReason, timeout: float | None) -> bool:
        """Close all windows, and wait until what was added before is delivered. True if all of it was."""
        if reason != SHUTDOWN and self._is_settled():
            return True
        flush = _Flush(reason, self._clock(), self._done)
        self._inbox.append(flush)
        self._wake()
        try:
            return take(flush.answers, 0 if self._is_needed_by_delivery() else timeout)
        except queue.Empty:
            return False

    def close(self, timeout: float | None = 5.0) -> bool:
        """Refuse events, deliver what is pending, end the thread. True if all was delivered and it has ended."""
        if self.pid != os.getpid():
            return True  # the parent's, met by the exit of a forked child
        deadline = Deadline(timeout)
        self._closed = True
        delivered = (self._is_settled() and not self._worker.runs) or self.flush(SHUTDOWN, timeout)
        self._worker.stop()
        return self._worker.join(0 if self._is_needed_by_delivery() else deadline.left()) and delivered

    def count_refusal(self) -> None:
        """Count a call that raised."""
        with self._counters:
            self._refused += 1

    def stats(self) -> BatcherStats:
        """Counters, as of one moment."""
        with self._counters:
            waiting = [] if self._sealed else [item[0] for item in self._look() if isinstance(item, tuple)]
            return BatcherStats(
                enqueued=self._enqueued + len(waiting),
                replaced=self._replaced,
                refused=self._refused,
                failed=self._failed,
                batches=self._batches,
                by_reason=dict(self._reasons),
                pending_events=self._pending_events + len(waiting),
                pending_bytes=self._pending_bytes + sum(map(_size, waiting)),
                publishing_for=self.publishing_for(),
                thread_restarts=self._worker.restarts,
            )

    def publishing_for(self) -> float:
        """Seconds for which the sink has been taking the present batch; 0 if there is none. Takes no lock."""
        since = self._publishing_since
        return 0.0 if since is None else self._clock() - since

    def _check_backlog(self, size: int) -> None:
        """Refuse an event of this size if it is too much. Threads that ask at once may exceed the limit by one each."""
        with self._counters:
            count = self._pending_events + len(self._inbox)
            pending = self._pending_bytes + self._inbox_bytes
        # One event is taken in any case, so that no limit can refuse an event for ever.
        if not count or pending + size <= self._max_pending_bytes:
            return
        self.count_refusal()
        raise BacklogFullError(count, pending, self.publishing_for())

    def _withdraw(self, entry: _Entry) -> None:
        """Take an event back, since the batcher is closed, unless it was taken in before that."""
        while True:
            try:
                self._inbox.remove(entry)
                break
            except ValueError:
                return
            except IndexError:
                continue  # another thread has changed the inbox meanwhile
        self.count_refusal()
        raise ClosedError(
            "this was shut down in this process, and stays closed. If something goes on after it, such as the next "
            "task of a worker, call flush_all() instead of shutdown(), close() or destroy()"
        )

    def _is_settled(self) -> bool:
        """Whether all that was accepted has been delivered, or has failed."""
        with self._counters:
            return not self._inbox and not self._pending_events

    def _is_needed_by_delivery(self) -> bool:
        """Whether nothing more is delivered until the calling thread returns."""
        return self._worker.is_caller() or is_mine(self._turn)

    def _wake(self) -> None:
        """Let the thread look now. Where none can be started any more, do its work here."""
        if self._worker.runs:
            self._worker.wake()
        # One that starts looks at once. So a wake-up that waits means to other callers that there is a thread.
        if not self._worker.ensure():
            # Looks again after the turn was released: an event may have come between the last look and that.
            while (self._is_waiting() or self._pending_events) and run_if_free(self._turn, self._finish):
                pass

    def _finish(self) -> None:
        """Deliver all that there is. No thread will wait for a window, so all of them are closed."""
        self.step(self._clock())
        self._windows.close_all(SHUTDOWN, self._clock())
        self._number_closed()
        self._deliver_ready()

    def _look(self) -> list[_Entry | _Flush]:
        """What is in the inbox now."""
        while True:
            try:
                return list(self._inbox)
            except RuntimeError:
                continue  # another thread has changed it meanwhile

    # -- the thread ----------------------------------------------------------------------------------------------------

    def work(self) -> float | None:
        """One turn of the thread, for `Worker`."""
        with self._turn:
            deadline = self.step(self._clock())
        return None if deadline is None else max(0.0, deadline - self._clock())

    def step(self, now: float) -> float | None:
        """Deliver everything that is due. Returns the time of the next deadline, None if there is none."""
        while True:
            self._next_turn = NOW
            self._take_in()
            if not self._is_waiting():
                self._windows.close_due(now)
            self._number_closed()
            self._deliver_ready()
            self._tell_news()
            deadline = NOW if self._is_waiting() else self._windows.next_deadline()
            if deadline > now:
                # In this order: an event that comes after the look finds the time at which there will be another one.
                self._next_turn = deadline
                if not self._is_waiting():
                    return None if deadline == NEVER else deadline

    def _is_waiting(self) -> bool:
        """Whether there is something to be taken in."""
        return bool(self._inbox) and not self._sealed

    def _take_in(self) -> None:
        """Put the next events of the inbox into the windows."""
        inbox, add = self._inbox, self._windows.add
        with self._counters:
            events = size = 0  # how much was taken out
            while inbox and events < SLICE and not self._sealed:
                item = inbox.popleft()
                if isinstance(item, _Flush):
                    self._begin(item)
                    continue
                event, rules, key, now = item
                events += 1
                size += len(event.json) + EVENT_OVERHEAD
                replaced = add(event, rules, key, now)
                if replaced is not None:
                    self._count_replaced(replaced, rules)
            self._enqueued += events
            self._pending_events += events
            self._pending_bytes += size
            self._inbox_bytes = self._inbox_bytes - size if inbox else 0
            if self._sealed:
                self._take_flushes()

    def _count_replaced(self, event: Event, rules: TypeRules) -> None:
        self._replaced += 1
        self._pending_events -= 1
        self._pending_bytes -= _size(event)
        if rules.type not in self._replaced_types and len(self._replaced_types) < MAX_REPLACED_TYPES:
            self._replaced_types.add(rules.type)
            self._news.append(rules)

    def _take_flushes(self) -> None:
        """After the end: events are withdrawn by their callers, but flushes are answered."""
        for item in self._look():
            if isinstance(item, _Flush):
                self._inbox.remove(item)
                self._begin(item)

    def _begin(self, flush: _Flush) -> None:
        """Close all windows for a flush, which from then on waits for the batches."""
        self._windows.close_all(flush.reason, flush.time)
        self._number_closed()
        flush.target = self._numbered
        flush.ok = self._newest_failed <= flush.since
        self._flushes.append(flush)
        self._sealed = self._sealed or flush.reason == SHUTDOWN

    def _number_closed(self) -> None:
        """What has closed is ready, in this order, from now on."""
        if self._windows.closed:
            timestamp = int(self._wall() * 1000)
            self._numbered += len(self._windows.closed)
            self._ready.extend(Batch(*closed, timestamp) for closed in self._windows.closed)
            self._windows.closed.clear()

    def _deliver_ready(self) -> None:
        """Deliver what is ready, in order."""
        self._answer_flushes()
        while self._ready:
            batch = self._ready.popleft()
            self._publishing_since = self._clock()
            self._deliver(batch)

    def _deliver(self, batch: Batch) -> None:
        taken = False
        try:
            self._sink(batch)
            taken = True
        except Exception as error:
            self._tell_failure(error, len(batch.events))
        finally:
            # Also for what is no Exception and ends this thread: its batch counts as failed.
            self._account(batch, taken)
            self._answer_flushes()
        if taken and self._failing:
            self._failing = False
            _log.info("the sink takes batches again; %d events were lost since the start", self._failed)

    def _account(self, batch: Batch, taken: bool) -> None:
        count = len(batch.events)
        self._publishing_since = None
        with self._counters:
            self._done += 1
            self._pending_events -= count
            self._pending_bytes -= sum(map(_size, batch.events))
            if taken:
                self._batches += 1
                self._reasons[batch.reason] += 1
                return
            self._failed += count
        self._newest_failed = self._done
        for flush in self._flushes:
            flush.ok = flush.ok and flush.target < self._done

    def _answer_flushes(self) -> None:
        flushes = self._flushes  # their targets rise
        while flushes and flushes[0].target <= self._done:
            flush = flushes.popleft()
            flush.answers.put(flush.ok)

    def _tell_failure(self, error: Exception, count: int) -> None:
        # Once until it works again: a logging handler that enqueues would otherwise keep a broken sink busy for ever.
        if not self._failing:
            self._failing = True
            _log.error(
                "the sink failed for a batch of %d events, which are lost; further failures are counted, "
                "and not logged until it works again",
                count,
                exc_info=error,
            )

    def _tell_news(self) -> None:
        while self._news:
            rules = self._news.popleft()
            if rules.dedup_by_default:
                _log.warning(
                    "A newer %r event replaced an older one with the same %r within a window, because that field is "
                    "the default dedup_key. If this is what you want, set dedup_key=%r (in Flask: SSE_DEDUP_KEY). "
                    'To keep both events, set dedup_key=None, or per_type={%r: {"dedup_key": None}}.',
                    *(rules.type, rules.dedup_key, rules.dedup_key, rules.type),
                )
            else:
                _log.info(
                    "A newer %r event replaced an older one with the same key within a window; "
                    'per_type={%r: {"dedup_key": None}} keeps both.',
                    *(rules.type, rules.type),
                )


def _size(event: Event) -> int:
    """The bytes that an event is counted with while it is pending."""
    return len(event.json) + EVENT_OVERHEAD
