"""A daemon thread that parks until it is woken, is replaced when it dies, and ends with its owner.

`Worker.wake` may be called from anywhere, also from a signal handler or a `__del__` that the garbage collector runs
in the middle of any of our own lines, the parked thread's included. That is why the thread does not park in a
`threading.Condition`: a `notify` that comes while the same thread is inside `wait`, but is not yet listed as waiting,
is lost. `queue.SimpleQueue.put` is documented to be safe there, and remembers.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
import weakref
from contextlib import suppress
from typing import Protocol

from .waiting import take

_log = logging.getLogger("sse_batcher.worker")


class Owner(Protocol):
    def work(self) -> float | None:
        """Do what is due now, on the worker's thread. Returns the seconds until the next turn, or None: when woken.

        The thread holds its owner from `wake` on, and until a turn returns None.
        """


def is_mine(lock: threading.RLock) -> bool:
    """Whether the calling thread holds this lock. Not public, but what `threading.Condition` asks of every lock."""
    return bool(lock._is_owned())  # type: ignore[attr-defined]


class Deadline:
    """One time limit carried through several waits, in real seconds; None: no limit."""

    def __init__(self, timeout: float | None) -> None:
        self._end = None if timeout is None else time.monotonic() + timeout

    def left(self) -> float | None:
        return None if self._end is None else max(0.0, self._end - time.monotonic())


class Worker:
    """The one thread of `owner`. Nothing here takes a lock that the owner takes."""

    def __init__(self, owner: Owner, name: str) -> None:
        self.restarts = 0
        self._name = name
        # A wake-up is the owner itself, so that one that is dropped by everybody else still gets its turn. None: it is
        # gone, and the thread has to end.
        wakeups: queue.SimpleQueue[Owner | None] = queue.SimpleQueue()
        self._wakeups = wakeups
        pid = os.getpid()

        def end(_: object) -> None:
            # Not in a forked child, which has no such thread: CPython 3.13 crashes when it wakes one that is not there,
            # and uWSGI forks without the hook that would make it forget.
            if os.getpid() == pid:
                wakeups.put(None)

        self._owner = weakref.ref(owner, end)
        self._stopping = False
        self._over = False  # the thread is about to end, and takes no more wake-ups
        # Held by who starts the thread. Taken without waiting, except by the thread's own last act. Re-entrant only
        # because such a lock can say whether it is the caller who holds it.
        self._starting = threading.RLock()
        self._ident: int | None = None
        self._thread: threading.Thread | None = None

    def wake(self) -> None:
        """Let the thread take a turn, now or right after the present one. Never blocks; does not start it."""
        self._wakeups.put(self._owner())

    def ensure(self) -> bool:
        """Start the thread unless it runs. False if no thread can be started in this process any more.

        Must be called without any lock held: `Thread.start` waits for the newborn thread, in which the garbage
        collector may run code that needs that lock.
        """
        if self._runs():
            return True
        while True:
            if is_mine(self._starting) or not self._starting.acquire(blocking=False):
                return True  # this very thread is at it, below a signal handler, or another one
            try:
                started = self._start()
            finally:
                self._starting.release()
            if not started:
                return False
            # A thread that was stopped may be over by now; who has woken it since then has left the rest to us.
            if self._runs() or self._wakeups.empty():
                return True

    def stop(self) -> None:
        """End the thread once it has nothing left to do. It may be started again by `ensure`, for one turn."""
        self._stopping = True
        self.wake()

    def join(self, timeout: float | None) -> bool:
        """Wait for the thread's end, at most `timeout` seconds. False if it did not end, or is the caller."""
        thread = self._thread
        if thread is None:
            return True
        if self.is_caller():
            return False
        thread.join(timeout)
        return not thread.is_alive()

    def is_caller(self) -> bool:
        """Whether the thread cannot get on until the caller returns: it is the caller, or is being started by it."""
        return is_mine(self._starting) or threading.get_ident() == self._ident

    def _runs(self) -> bool:
        thread = self._thread
        return thread is not None and thread.is_alive() and not self._over

    def _start(self) -> bool:
        """With `_starting` held."""
        if self._runs():
            return True
        self._over = False
        if self._thread is not None and not self._stopping:
            self.restarts += 1
        try:
            thread = threading.Thread(target=self._main, name=self._name, daemon=True)
            thread.start()
            self._thread = thread
        except RuntimeError:  # "can't start new thread", or "... at interpreter shutdown" (3.12 and later)
            self._thread = None
            return False
        return True

    def _main(self) -> None:
        self._ident = threading.get_ident()
        died = True
        try:
            self._take_turns()
            died = False
        finally:
            self._ident = None  # the system gives it to other threads now
            if died:
                self._replace()

    def _take_turns(self) -> None:
        owner = self._owner()
        while owner is not None:
            pause = owner.work()
            if pause is None:
                if self._stopping and self._wakeups.empty():
                    # In this order: who wakes the thread after the look starts another one.
                    self._over = True
                    if not self._wakeups.empty():
                        self.ensure()
                    return
                owner = None
            with suppress(queue.Empty):
                owner = take(self._wakeups, pause)

    def _replace(self) -> None:
        """The last act of a thread that something has killed."""
        restarts = self.restarts + 1
        if restarts & (restarts - 1) == 0:
            # 1, 2, 4, 8 ... : a logging handler that enqueues must not keep a deadly sink busy for ever.
            _log.error("the thread %s died and is replaced; restarts so far: %d", self._name, restarts, exc_info=True)
        self._starting.acquire()
        try:
            self._thread = None  # it is still alive, but no longer counts
            self.restarts = restarts
            self._start()
        finally:
            self._starting.release()
        if not self._wakeups.empty():
            self.ensure()  # one that was stopped may be over again; who has woken it since then has left the rest to us
