"""The engine of a batcher: the lock, the windows, and the one thread that delivers.

Callers of `add` and `flush` put events into windows under `Engine._lock`; the worker's thread calls `work`, which
closes what is due and hands it to the sink, outside the lock. What closes when is decided by `window`.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .errors import BacklogFullError, ClosedError
from .event import Batch, Event
from .options import BatchOptions, TypeRules
from .process import close_at_exit
from .stats import BatcherStats
from .window import NEVER, NOW, Windows
from .worker import Deadline, Worker, is_mine

_log = logging.getLogger("sse_batcher.engine")

SHUTDOWN = "shutdown"

EVENT_OVERHEAD = 200
"""Bytes that a pending event is counted with beside its JSON: about what its Python objects take."""

TAKEN_AT_ONCE = 100
"""How many events a call that wants to get on takes in, its own and those that others left."""

Entry = tuple[Event, TypeRules, str | None]
"""An event on its way into a window, with the rules of its type and the JSON of its dedup key."""


class Engine:
    """One process's part of a batcher. Its lock guards everything below it."""

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
        # The largest event so far. Written without the lock: a harmless race, which may leave it a little too low.
        self._largest = 0

        # Callers put events (and reasons to close all windows) into the inbox, and whoever gets the lock takes in what
        # is there: nobody who enqueues waits for the lock, unless so much lies here that it must be counted first. If
        # all of them waited, a thread that the interpreter suspends inside it would make the others queue up behind it,
        # and eight producers take three times as long.
        self._inbox: deque[Entry | str] = deque()
        # Guards all that follows. Re-entrant: a signal handler, or a __del__ run by the garbage collector, may enqueue
        # on the thread that holds it. `_busy` says that things are half changed: leave it to the frame below.
        self._lock = threading.RLock()
        self._busy = False
        self._stirred = False  # once the lock is let go, somebody has to see that there is a thread
        # First no event is let in any more; then, after those before SHUTDOWN in the inbox, none is taken out.
        self._closed = False
        self._sealed = False
        self._windows = Windows(options)
        self._ready: deque[Batch] = deque()  # closed, and not yet in anybody's hand
        # When the thread will look again by itself. NOW: it is about to.
        self._next_turn = NEVER
        self._pending_events = 0
        self._pending_bytes = 0
        self._enqueued = self._replaced = self._refused = self._failed = self._batches = 0
        self._reasons: Counter[str] = Counter()
        self._replaced_types: set[str] = set()
        self._news: deque[str] = deque()  # types whose first replacement is to be logged, outside the lock

        # Batches are numbered as they become ready; those up to `_done` were taken or have failed.
        self._numbered = 0
        self._done = 0
        # Notified after `_done` has risen; only flushes wait on it. It has a lock of its own, since waiting lets a lock
        # go without `_let_go`.
        self._delivered = threading.Condition()
        self._flushes: list[_Flush] = []

        # Held by whoever delivers: the thread, or a caller where no thread can be started. Never waited for.
        self._delivery = threading.Lock()
        self._deliverer: int | None = None
        self._publishing_since: float | None = None
        self._failing = False
        self._worker = Worker(self, "sse_batcher")
        close_at_exit(self)

    # -- any thread ----------------------------------------------------------------------------------------------------

    def add(self, event: Event, rules: TypeRules, key: str | None) -> None:
        """Take an event. Raises `ClosedError` or `BacklogFullError`."""
        inbox = self._inbox
        size = len(event.json) + EVENT_OVERHEAD
        if size > self._largest:  # noqa: PLR1730 (calling `max` takes longer than all of this)
            self._largest = size
        pending = self._pending_bytes + size
        if inbox:  # it is not counted yet; if it could be too much, it is taken in and counted first
            pending += len(inbox) * self._largest
        if pending > self._max_pending_bytes:
            self._check_backlog(size)
        entry = (event, rules, key)
        inbox.append(entry)
        if self._closed:  # looked at after the append, or an event that meets the end could be accepted and never sent
            self._withdraw(entry)
        if self._lock.acquire(False):  # named, the argument would take as long as the lock
            try:
                taken = self._busy or self._take_in(TAKEN_AT_ONCE)
            finally:
                self._lock.release()
            if inbox or self._stirred:
                self._let_go(taken)

    def flush(self, reason: str, timeout: float | None) -> bool:
        """Close all windows, and wait until what was added before is delivered. True if all of it was."""
        with self._lock:
            if not self._sealed:
                self._inbox.append(reason)
            if self._busy:
                return False
            self._take_in(len(self._inbox))
            flush = _Flush(self._numbered)
            self._flushes.append(flush)
        try:
            self._let_go()
            if self._done < flush.target and self._is_needed_by_delivery():
                return False
            with self._delivered:
                return self._delivered.wait_for(lambda: self._done >= flush.target, timeout) and flush.ok
        finally:
            with self._held():
                self._flushes.remove(flush)

    def close(self, timeout: float | None = 5.0) -> bool:
        """Refuse events, deliver what is pending, end the thread. True if all was delivered and it has ended."""
        if self.pid != os.getpid():
            return True  # the parent's, met by the exit of a forked child
        deadline = Deadline(timeout)
        self._closed = True
        delivered = self.flush(SHUTDOWN, timeout)
        self._worker.stop()
        if self._is_needed_by_delivery():
            return False
        return self._worker.join(deadline.left()) and delivered

    def count_refusal(self) -> None:
        """Count a call that raised."""
        with self._held():
            self._refused += 1

    def stats(self) -> BatcherStats:
        """Counters, as of one moment."""
        with self._held():
            return BatcherStats(
                enqueued=self._enqueued,
                replaced=self._replaced,
                refused=self._refused,
                failed=self._failed,
                batches=self._batches,
                by_reason=dict(self._reasons),
                pending_events=self._pending_events,
                pending_bytes=self._pending_bytes,
                publishing_for=self._publishing_for(),
                thread_restarts=self._worker.restarts,
            )

    def _check_backlog(self, size: int) -> None:
        """Refuse an event of this size if it is too much. Threads that ask at once may exceed the limit by one each."""
        with self._held():
            if not self._busy:
                self._take_in(len(self._inbox))
            pending = self._pending_bytes
        # One event is taken in any case, so that no limit can refuse an event for ever.
        if not pending or pending + size <= self._max_pending_bytes:
            return
        self.count_refusal()
        raise BacklogFullError(self._pending_events, self._pending_bytes, self._publishing_for())

    def _publishing_for(self) -> float:
        since = self._publishing_since
        return 0.0 if since is None else self._clock() - since

    def _withdraw(self, entry: Entry) -> None:
        """Take an event back, since the batcher is closed, unless it was taken in before that."""
        try:
            self._inbox.remove(entry)
        except ValueError:
            return
        self.count_refusal()
        raise ClosedError("this batcher was closed: enqueue before destroy(), close() or shutdown()")

    def _is_needed_by_delivery(self) -> bool:
        """Whether nothing more is delivered until the calling thread returns."""
        return self._deliverer == threading.get_ident() or self._worker.is_caller() or is_mine(self._lock)

    @contextmanager
    def _held(self) -> Iterator[None]:
        """The lock, to look at what it guards."""
        with self._lock:
            yield
        self._let_go()

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """The lock, with the right to change what it guards."""
        with self._lock:
            self._busy = True
            try:
                yield
            finally:
                self._busy = False
        self._let_go()

    def _let_go(self, taken: bool = True) -> None:
        """What everybody owes who has held the lock: take in what others left in the inbox, and see to the thread.

        A frame below on this thread may still hold the lock, where this is a signal handler or a __del__; then all this
        is left to it. No thread must be started under the lock: the newborn may run a __del__ that needs it. `taken` is
        what `_take_in` has answered already.
        """
        if is_mine(self._lock):
            return
        while taken and self._inbox and not self._sealed and self._lock.acquire(blocking=False):
            try:
                taken = self._take_in(TAKEN_AT_ONCE)
            finally:
                self._lock.release()
        if self._stirred:
            self._stirred = False
            self._ensure_thread()

    def _ensure_thread(self) -> None:
        if not self._worker.ensure():
            # No thread can be started any more. Nobody will wait for a window, so all are closed.
            with self._exclusive():
                self._windows.close_all(SHUTDOWN, self._clock())
                self._number_closed()
            self._deliver_ready()

    def _take_in(self, limit: int) -> bool:
        """Put what is in the inbox into the windows, and wake the thread if that is earlier than it would look itself.

        The lock is held, and not `_busy`. With more than `limit` in the inbox the rest is left to the thread, and the
        answer is False: or one caller would work for all others for as long as they go on.
        """
        windows, inbox = self._windows, self._inbox
        self._busy = True
        try:
            now = self._clock()
            while inbox and limit and not self._sealed:
                limit -= 1
                entry = inbox.popleft()
                if isinstance(entry, str):
                    windows.close_all(entry, now)
                    self._sealed = entry == SHUTDOWN
                    continue
                event, rules, key = entry
                self._enqueued += 1
                replaced = windows.add(event, rules, key, now)
                if replaced is None:
                    self._pending_events += 1
                    self._pending_bytes += len(event.json) + EVENT_OVERHEAD
                else:
                    self._replaced += 1
                    self._pending_bytes += len(event.json) - len(replaced.json)
                    if rules.type not in self._replaced_types:
                        self._replaced_types.add(rules.type)
                        self._news.append(rules.type)
            if windows.changed or inbox:
                windows.changed = False
                self._stirred = True
                self._number_closed()
                if (NOW if self._ready or self._is_waiting() else windows.next_deadline()) < self._next_turn:
                    # In this order: if something is raised in between, one wake-up too many is harmless.
                    self._worker.wake()
                    self._next_turn = NOW
            return not inbox
        finally:
            self._busy = False

    def _is_waiting(self) -> bool:
        """Whether there is something to be taken in."""
        return bool(self._inbox) and not self._sealed

    def _number_closed(self) -> None:
        """What has closed is ready, in this order, from now on."""
        if self._windows.closed:
            timestamp = int(self._wall() * 1000)
            self._numbered += len(self._windows.closed)
            self._ready.extend(Batch(*closed, timestamp) for closed in self._windows.closed)
            self._windows.closed.clear()

    # -- the thread ----------------------------------------------------------------------------------------------------

    def work(self) -> float | None:
        """One turn of the thread, for `Worker`."""
        now = self._clock()
        deadline = self.step(now)
        return None if deadline is None else max(0.0, deadline - self._clock())

    def step(self, now: float) -> float | None:
        """Deliver everything that is due. Returns the time of the next deadline, None if there is none."""
        while True:
            with self._exclusive():
                self._next_turn = NOW
                self._windows.close_due(now)
                self._number_closed()
            self._deliver_ready()
            self._tell_news()
            with self._exclusive():
                # What another thread is delivering, it will go on with.
                undelivered = self._ready and not self._delivery.locked()
                deadline = NOW if undelivered or self._is_waiting() else self._windows.next_deadline()
                if deadline > now:
                    self._next_turn = deadline
                    return None if deadline == NEVER else deadline

    def _deliver_ready(self) -> None:
        """Deliver what is ready, in order, unless somebody is at it: then he does it.

        Looks again after letting go of the right to deliver: a batch may have come between the last look and that.
        """
        while self._ready and self._delivery.acquire(blocking=False):
            self._deliverer = threading.get_ident()
            try:
                while True:
                    with self._exclusive():
                        if not self._ready:
                            break
                        batch = self._ready.popleft()
                        self._publishing_since = self._clock()
                    self._deliver(batch)
            finally:
                self._deliverer = None
                self._delivery.release()

    def _deliver(self, batch: Batch) -> None:
        taken = False
        try:
            self._sink(batch)
            taken = True
        except Exception as error:
            self._tell_failure(error, len(batch.events))
        finally:
            # Also for what is no Exception and ends this thread: its batch counts as failed.
            with self._exclusive():
                self._account(batch, taken)
            with self._delivered:
                self._delivered.notify_all()
        if taken and self._failing:
            self._failing = False
            _log.info("the sink takes batches again; %d events were lost since the start", self._failed)

    def _account(self, batch: Batch, taken: bool) -> None:
        self._done += 1
        self._publishing_since = None
        count = len(batch.events)
        self._pending_events -= count
        self._pending_bytes -= sum([len(event.json) for event in batch.events]) + count * EVENT_OVERHEAD
        if taken:
            self._batches += 1
            self._reasons[batch.reason] += 1
        else:
            self._failed += count
            for flush in self._flushes:
                flush.ok = flush.ok and flush.target < self._done

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
            _log.info(
                "A newer %r event replaced an older one with the same key within a window; "
                'per_type={%r: {"dedup_key": None}} keeps both.',
                *[self._news.popleft()] * 2,
            )


class _Flush:
    """One waiting flush: the number of the last batch it waits for, and whether none has failed so far."""

    __slots__ = ("ok", "target")

    def __init__(self, target: int) -> None:
        self.target = target
        self.ok = True
