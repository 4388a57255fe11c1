"""The engine of a batcher: the windows, and the one thread that works on them and delivers.

Callers append to the inbox, and wake the thread if its next turn would be too late. Only the thread moves events from
the inbox into windows, closes windows and calls the sink. `window` has the rules for closing. A signal handler that
raises in the middle of a call, an exhausted stack or a suspended thread can therefore harm that one call only:
appending to a deque is atomic, and everything that takes several steps runs on a thread that no signal handler
interrupts.

Each lock's comment in `Engine.__init__` lists what it guards.
"""

from __future__ import annotations

import queue
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from ..errors import BacklogFullError, ClosedError
from ..event import Batch, Event, Key, audience_bytes, body_bytes
from ..options import BatchOptions, TypeRules
from ..reasons import BatchReason
from ..runtime.locks import is_mine, new_lock, run_if_free
from ..runtime.process import close_at_exit
from ..runtime.worker import Deadline, Owner, Worker, take
from ..stats import BatcherStats
from .flushes import Flush, Flushes
from .log_lines import log_replaced, log_sink_failed, log_sink_works
from .window import NEVER, NOW, Windows

SHUTDOWN: Final = "shutdown"

EVENT_OBJECT_BYTES = 200
"""About the memory of a pending event's Python objects, which counts as pending in addition to its body and users."""

EVENTS_PER_PASS = 100
"""Maximum number of events that the thread takes out of the inbox before it delivers what is ready. Between two passes,
counters can be read."""

MAX_REPLACED_TYPES = 10_000
"""Maximum number of types for which the engine remembers that the first replacement was logged."""


_Entry = tuple[Event, int, TypeRules, str | None, float]
"""An event on its way into a window, its size, the rules of its type, the JSON of its key, and when it came."""


class Engine:
    """One process's part of a batcher. All methods in the first section are thread-safe.

    `make_worker` makes the `Worker` of an owner with this name. `inbox` is an empty deque; None: a new one.
    """

    def __init__(
        self,
        sink: Callable[[Batch], None],
        options: BatchOptions,
        clock: Callable[[], float],
        wall: Callable[[], float],
        *,
        make_worker: Callable[[Owner, str], Worker] = Worker,
        inbox: deque[_Entry | Flush] | None = None,
    ) -> None:
        self._sink = sink
        self._clock = clock
        self._wall = wall
        self._max_pending_bytes = options.max_pending_bytes

        # No lock guards these five.
        # Callers append, and the thread removes. Each step is atomic.
        self._inbox: deque[_Entry | Flush] = deque() if inbox is None else inbox
        # The bytes of the events in the inbox. Callers add to it before they append, and the thread sets it. A harmless
        # race: it can be wrong during a burst and is exact after it, and it only has to bound the memory. Without
        # the GIL, and with four producers that were faster than the delivery, it was 0.9 to 1.3 times the real number.
        self._inbox_bytes = 0
        # When the thread takes its next turn by itself. NOW: at once. The thread sets it and then checks the inbox
        # again. Callers append and then read it. So the thread sees the event, or the caller sees the time.
        self._next_turn = NEVER
        # Set by `close`: no more events are accepted.
        self._closed = False
        # Set by the thread at the SHUTDOWN in the inbox: no more events are taken out.
        self._sealed = False

        # `_turn` guards everything up to `_counters`. The thread holds it during a turn. If no thread can be started, a
        # caller holds it and does the work. Read without it, which is harmless: `_publishing_since` and `Flushes.done`,
        # which are one reference each, the windows in `Windows.due` and `Windows.open_since`, whose docstrings give the
        # reason, and what `pending_age` reads.
        self._turn = new_lock()
        self._windows = Windows(options)
        self._ready: deque[tuple[Batch, float]] = deque()  # closed, not delivered yet; and when the first event came
        self._flushes = Flushes()
        self._publishing_since: float | None = None
        self._publishing_came = 0.0  # when the first event of the batch came that is being published
        self._failing = False
        self._news: deque[TypeRules] = deque()  # of types whose first replacement is to be logged
        self._replaced_types: set[str] = set()

        # `_counters` guards the counters below, so that `stats` is as of one moment: an event is either in the inbox or
        # counted as pending. Read without it, which is harmless: `_pending_bytes` in `add`, where threads that add at
        # the same time may exceed the limit by one event each, and `_failed` by the thread, which is the only one
        # that sets it.
        self._counters = new_lock()
        self._pending_events = 0
        self._pending_bytes = 0
        self._enqueued = self._replaced = self._refused = self._failed = self._batches = 0
        self._reasons: Counter[BatchReason] = Counter()

        self._worker = make_worker(self, "sse_batcher")
        close_at_exit(self)

    # -- any thread ----------------------------------------------------------------------------------------------------

    def add(self, event: Event, size: int, rules: TypeRules, key: str | None) -> None:
        """Take an event whose body and users take `size` bytes. Raises `ClosedError` or `BacklogFullError`."""
        inbox = self._inbox
        size += EVENT_OBJECT_BYTES
        if self._pending_bytes + self._inbox_bytes + size > self._max_pending_bytes:
            self._check_backlog(size)
        now = self._clock()
        entry = (event, size, rules, key, now)
        self._inbox_bytes += size
        inbox.append(entry)
        if self._closed:  # checked after the append, or an event could be accepted during `close` and never be sent
            self._withdraw(entry)
        next_turn = self._next_turn
        if (
            next_turn != NOW
            and not self._worker.is_woken()
            and self._windows.due(event, rules, len(inbox), self._inbox_bytes, now) < next_turn
        ):
            self._wake()

    def flush(self, reason: BatchReason, timeout: float | None) -> bool:
        """Close all windows, and wait until everything that was added before is delivered. Return whether it was.

        `timeout` is in seconds; None: no limit.
        """
        if reason != SHUTDOWN and self._is_settled():
            return True
        # Not an `Event`: a thread that is interrupted inside `wait` could leave its lock held. `put` never blocks.
        answers: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._inbox.append(Flush(reason, self._clock(), self._flushes.done, answers.put))
        self._wake()
        try:
            return take(answers, 0 if self._is_needed_by_delivery() else timeout)
        except queue.Empty:
            return False

    def close(self, timeout: float | None = 5.0) -> bool:
        """Refuse further events, deliver what is pending, and end the thread. Return whether both were done in time."""
        deadline = Deadline(timeout)
        self._closed = True
        delivered = (self._is_settled() and not self._worker.runs) or self.flush(SHUTDOWN, timeout)
        self._worker.stop()
        return self._worker.join(0 if self._is_needed_by_delivery() else deadline.left()) and delivered

    def count_refusal(self) -> None:
        """Count an event that was refused."""
        with self._counters:
            self._refused += 1

    def stats(self) -> BatcherStats:
        """Return the counters, as of one moment."""
        with self._counters:
            entries = [] if self._sealed else [item for item in self._inbox_items() if isinstance(item, tuple)]
            waiting = [entry[1] for entry in entries]
            has_pending = bool(self._pending_events or waiting)
            return BatcherStats(
                enqueued=self._enqueued + len(waiting),
                replaced=self._replaced,
                refused=self._refused,
                failed=self._failed,
                batches=self._batches,
                by_reason=dict(self._reasons),
                pending_events=self._pending_events + len(waiting),
                pending_bytes=self._pending_bytes + sum(waiting),
                pending_age=self._pending_age(entries) if has_pending else 0.0,
                publishing_for=self.publishing_for(),
                thread_restarts=self._worker.restarts,
            )

    def publishing_for(self) -> float:
        """Return for how many seconds the current call of the sink has run; 0 if there is none. Takes no lock."""
        since = self._publishing_since
        return 0.0 if since is None else self._clock() - since

    def _pending_age(self, entries: list[_Entry]) -> float:
        """Return for how many seconds the oldest event has been pending. `entries`: those in the inbox.

        Takes no lock: what moves on meanwhile may count as if it were gone already.
        """
        came = [self._windows.open_since(), *(entry[4] for entry in entries[:1])]
        with suppress(IndexError):
            came.append(self._ready[0][1])
        if self._publishing_since is not None:
            came.append(self._publishing_came)
        return max(0.0, self._clock() - min(came))

    @property
    def description(self) -> str:
        """Its state in a few words, for a `repr`. Takes no lock, so it may be off by what other threads do just now."""
        return f"{'closed' if self._closed else 'open'}, {self._pending_events + len(self._inbox)} events pending"

    def _check_backlog(self, size: int) -> None:
        """Raise `BacklogFullError` if an event of this size would exceed the limit."""
        with self._counters:
            count = self._pending_events + len(self._inbox)
            pending = self._pending_bytes + self._inbox_bytes
        # If nothing is pending, the event is taken in any case. Otherwise a low limit could refuse an event forever.
        if not count or pending + size <= self._max_pending_bytes:
            return
        self.count_refusal()
        if self._inbox and self._next_turn != NOW and not self._worker.is_woken():
            self._wake()  # what is still in the inbox may fill or close windows, which makes room for later events
        raise BacklogFullError(count, pending, self.publishing_for())

    def _withdraw(self, entry: _Entry) -> None:
        """Remove an event from the inbox and raise `ClosedError`, unless the thread took it before the end."""
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
            "the batcher or manager was closed in this process, and stays closed. If events may follow, such as those "
            "of a worker's next task, call flush_all() instead of shutdown(), close() or destroy()"
        )

    def _is_settled(self) -> bool:
        """Return whether all accepted events were delivered, or have failed."""
        with self._counters:
            return not self._inbox and not self._pending_events

    def _is_needed_by_delivery(self) -> bool:
        """Return whether delivery cannot go on until the calling thread returns."""
        return self._worker.is_caller() or is_mine(self._turn)

    def _wake(self) -> None:
        """Make the thread take a turn now. If no thread can be started any more, do its work here."""
        if self._worker.runs:
            self._worker.wake()
        # A thread that starts takes a turn at once. So other callers can rely on a thread if a wake-up waits.
        if not self._worker.ensure():
            # Checked again after `_turn` was released, since an event may have come just before that. A harmless race:
            # `_pending_events` is read without its lock, and each thread that adds an event checks after it.
            while (self._is_waiting() or self._pending_events) and run_if_free(self._turn, self._finish_locked):
                pass

    def _finish_locked(self) -> None:
        """Deliver everything. Closes all windows, since no thread would wait for their end. Needs `_turn`."""
        try:
            self._step_locked(self._clock())
            self._windows.close_all(SHUTDOWN, self._clock())
            self._number_closed_locked()
            self._deliver_ready_locked()
        finally:  # also if a signal handler has raised
            self._next_turn = NEVER  # no thread comes: the next event finds no turn that it could wait for

    def _inbox_items(self) -> list[_Entry | Flush]:
        """Return what is in the inbox now."""
        while True:
            try:
                return list(self._inbox)
            except RuntimeError:
                continue  # another thread has changed it meanwhile

    # -- the thread ----------------------------------------------------------------------------------------------------

    def work(self) -> float | None:
        """Take one turn of the thread, for `Worker`. Return the seconds until the next one; None: when woken."""
        deadline = self.step(self._clock())
        return None if deadline is None else max(0.0, deadline - self._clock())

    def step(self, now: float) -> float | None:
        """Deliver everything that is due. Return the time of the next deadline, or None if there is none."""
        with self._turn:
            return self._step_locked(now)

    # All methods from here on that end in `_locked` need `_turn`.

    def _step_locked(self, now: float) -> float | None:
        while True:
            self._next_turn = NOW
            self._take_in_locked()
            if not self._is_waiting():
                self._windows.close_due(now)
            self._number_closed_locked()
            self._deliver_ready_locked()
            self._log_news_locked()
            deadline = NOW if self._is_waiting() else self._windows.next_deadline()
            if deadline > now:
                # In this order: an event that comes after the check finds the time of the next turn.
                self._next_turn = deadline
                if not self._is_waiting():
                    return None if deadline == NEVER else deadline

    def _is_waiting(self) -> bool:
        """Return whether there is something to take out of the inbox."""
        return bool(self._inbox) and not self._sealed

    def _take_in_locked(self) -> None:
        """Move the next events from the inbox into the windows."""
        inbox, add = self._inbox, self._windows.add
        with self._counters:
            events = size = 0  # what was taken out
            while inbox and events < EVENTS_PER_PASS and not self._sealed:
                item = inbox.popleft()
                if isinstance(item, Flush):
                    self._begin_flush_locked(item)
                    continue
                event, event_size, rules, key, now = item
                events += 1
                size += event_size
                replaced = add(event, rules, key, now)
                if replaced is not None:
                    self._count_replaced_locked(replaced, rules, key)
            self._enqueued += events
            self._pending_events += events
            self._pending_bytes += size
            self._inbox_bytes = self._inbox_bytes - size if inbox else 0
            if self._sealed:
                self._take_flushes_locked()

    def _count_replaced_locked(self, event: Event, rules: TypeRules, key: str | None) -> None:
        """Count an event that was replaced because of this key. Needs `_counters`, too."""
        self._replaced += 1
        self._pending_events -= 1
        self._pending_bytes -= _size(event)
        if isinstance(key, Key):
            return  # not logged: the caller has asked for it
        if rules.type not in self._replaced_types and len(self._replaced_types) < MAX_REPLACED_TYPES:
            self._replaced_types.add(rules.type)
            self._news.append(rules)

    def _take_flushes_locked(self) -> None:
        """Take the flushes out of the inbox after the end. The callers of `add` withdraw the events."""
        for item in self._inbox_items():
            if isinstance(item, Flush):
                self._inbox.remove(item)
                self._begin_flush_locked(item)

    def _begin_flush_locked(self, flush: Flush) -> None:
        """Close all windows for a flush, and let it wait for their batches."""
        self._windows.close_all(flush.reason, flush.time)
        self._number_closed_locked()
        self._flushes.begin(flush)
        self._sealed = self._sealed or flush.reason == SHUTDOWN

    def _number_closed_locked(self) -> None:
        """Make batches of what has closed, in this order, and number them."""
        if self._windows.closed:
            timestamp = int(self._wall() * 1000)
            self._flushes.note_ready(len(self._windows.closed))
            self._ready.extend(
                (Batch(audience, event_type, events, reason, timestamp, join), since)
                for audience, event_type, events, reason, since, join in self._windows.closed
            )
            self._windows.closed.clear()

    def _deliver_ready_locked(self) -> None:
        """Deliver the batches that are ready, in order."""
        self._flushes.answer()
        while self._ready:
            batch, self._publishing_came = self._ready.popleft()
            self._publishing_since = self._clock()
            self._deliver_locked(batch)

    def _deliver_locked(self, batch: Batch) -> None:
        taken = False
        try:
            self._sink(batch)
            taken = True
        except Exception as error:
            self._note_failure_locked(error, len(batch.events))
        finally:
            # Also if a BaseException ends this thread: the batch counts as failed.
            self._count_delivered_locked(batch, taken)
            self._flushes.answer()
        if taken and self._failing:
            self._failing = False
            log_sink_works(self._failed)

    def _count_delivered_locked(self, batch: Batch, taken: bool) -> None:
        count = len(batch.events)
        self._publishing_since = None
        with self._counters:
            self._flushes.note_done(taken)
            self._pending_events -= count
            self._pending_bytes -= sum(map(_size, batch.events))
            if taken:
                self._batches += 1
                self._reasons[batch.reason] += 1
            else:
                self._failed += count

    def _note_failure_locked(self, error: Exception, count: int) -> None:
        # Once until it works again: a logging handler that enqueues would otherwise keep a broken sink busy forever.
        if not self._failing:
            self._failing = True
            log_sink_failed(error, count)

    def _log_news_locked(self) -> None:
        """Log the first replacement of each type."""
        while self._news:
            log_replaced(self._news.popleft())


def _size(event: Event) -> int:
    """Return how many bytes an event counts as long as it is pending."""
    _, audience, body = event
    size = EVENT_OBJECT_BYTES + (len(body) if body.__class__ is str else body_bytes(body))
    return size if audience.__class__ is str else size + audience_bytes(audience)
