"""A daemon thread that waits until it is woken, is replaced if it dies, and ends with its owner.

`Worker.wake` may be called from anywhere, also from a signal handler or a `__del__`, which the garbage collector may
run between any two lines, also in the waiting thread. So the thread does not wait on a `threading.Condition`: a
`notify` is lost if it comes while the same thread is inside `wait` but not yet registered. `queue.SimpleQueue.put` is
documented to be safe there, and keeps the wake-up.

`Worker.ensure` takes no lock, since an exception of a signal handler could leave it held. Several callers may start a
thread at the same time. The threads themselves decide which one works, and the others end at once.
"""

from __future__ import annotations

import logging
import os
import queue
import sys
import threading
import time
import weakref
from contextlib import suppress
from types import FrameType
from typing import Protocol, TypeVar

from .log_fields import log_fields
from .log_once import is_logged
from .process import PerProcess
from .weak_registry import WeakRegistry

_log = logging.getLogger("sse_batcher.worker")

T = TypeVar("T")


class Owner(Protocol):
    """An object that a worker's thread works for."""

    def work(self) -> float | None:
        """Do what is due now, on the worker's thread. Return the seconds until the next turn; None: when woken.

        The thread has a strong reference to its owner from `wake` until a turn returns None.
        """


class Deadline:
    """One time limit for several waits, in real seconds; None: no limit."""

    def __init__(self, timeout: float | None) -> None:
        self._end = None if timeout is None else time.monotonic() + timeout

    def left(self) -> float | None:
        """Return the seconds that are left, 0 or more; None: no limit."""
        return None if self._end is None else max(0.0, self._end - time.monotonic())


def take(source: queue.SimpleQueue[T], timeout: float | None) -> T:
    """Take the next item of a queue that has only this consumer. Raises `queue.Empty` after `timeout` seconds.

    Not just ``source.get(timeout=timeout)``. With that, CPython up to 3.12 waits forever if the previous `get` did not
    wait and the time is over before it first checks the queue: the remaining time is negative, which means no limit.
    This cannot happen after a `get_nowait` that has found the queue empty.
    """
    try:
        return source.get_nowait()
    except queue.Empty:
        return source.get(timeout=timeout)


class _Term:
    """The time in which one thread works. Threads claim a term, and create the next one, with `dict.setdefault`.

    That is atomic: if several threads claim the same term, one gets it, and all agree on the next term.
    """

    __slots__ = ("_claims", "over")

    def __init__(self) -> None:
        self._claims: dict[str, threading.Thread | _Term] = {}
        self.over = False
        """Whether the thread is about to end and takes no more wake-ups. Set by the thread."""

    @property
    def thread(self) -> threading.Thread | None:
        """The thread that has claimed it."""
        return self._claims.get("thread")  # type: ignore[return-value]

    def claim(self) -> bool:
        """Claim it for the calling thread. Return False if another thread has it."""
        me = threading.current_thread()
        return self._claims.setdefault("thread", me) is me

    def next(self) -> _Term:
        """Return the term after this one."""
        return self._claims.get("next") or self._claims.setdefault("next", _Term())  # type: ignore[return-value]

    def runs(self) -> bool:
        """Return whether its thread takes wake-ups."""
        # Not `Thread.is_alive`. Up to CPython 3.12, it may take a running thread for stopped if a signal handler
        # interrupts it.
        return self.thread is not None and not self.over


class Worker:
    """The one thread of `owner`, of which it has a weak reference. Thread-safe; takes no lock.

    `name` is that of the thread. `wakeups` is an empty queue for the wake-ups; None: a new one.
    """

    def __init__(self, owner: Owner, name: str, wakeups: queue.SimpleQueue[Owner | None] | None = None) -> None:
        self.restarts = 0
        """How often a dead thread was replaced. Written by the threads, one after the other."""
        self.name = name
        # A wake-up is the owner itself, so that an owner without other references still gets its turn. None: the owner
        # is gone, and the thread has to end.
        if wakeups is None:
            wakeups = queue.SimpleQueue()
        self._wakeups = wakeups
        getpid = os.getpid
        pid = getpid()

        def end(_: object) -> None:
            # Not in a forked child, which does not have the thread: CPython 3.13 crashes when it wakes a thread that
            # does not exist, and uWSGI forks without Python's hooks, which would clear the queue. No global names here:
            # at the end of the process the owner may outlive the names of this module, and without the GIL it does.
            if getpid() == pid:
                wakeups.put(None)

        self._owner = weakref.ref(owner, end)
        self._stopping = False
        self._failed = False
        """Whether a dead thread could not be replaced. Written by threads that die and by `recover`; a harmless race,
        since `ensure` finds out what is true."""
        # The newest term, or an older one. Written by threads that work or start to. A harmless race: a thread that is
        # overtaken may set an older term again, from which the newer ones are found.
        self._term = _Term()
        _workers.get().add(self)

    def wake(self) -> None:
        """Make the thread take a turn, now or right after the present one. Never blocks; does not start the thread."""
        # One waiting wake-up is enough: the thread takes it before it checks what there is to do.
        if self._wakeups.empty():
            self._wakeups.put(self._owner())

    def is_woken(self) -> bool:
        """Return whether there is a wake-up that the thread has not taken yet."""
        return not self._wakeups.empty()

    def ensure(self) -> bool:
        """Start the thread unless it runs. Return False if no thread can be started in this process any more.

        Must be called without any lock held: `Thread.start` waits for the new thread, in which the garbage collector
        may run code that needs that lock.
        """
        return self.runs or self._start() or self.runs

    def recover(self) -> bool:
        """Start the thread if it has died, or could not be started for a wake-up. Return False if that fails, too.

        Must be called without any lock held, as `ensure`.
        """
        if self._failed or not self._wakeups.empty():
            self._failed = not self.ensure()
        return not self._failed

    def stop(self) -> None:
        """End the thread as soon as it has nothing left to do. `ensure` may start it again, for one turn."""
        self._stopping = True
        if self.runs:  # a thread that starts now sees by itself that it has to end
            self.wake()

    def join(self, timeout: float | None) -> bool:
        """Wait for the thread's end, at most `timeout` seconds. Return False if it did not end, or is the caller."""
        deadline = Deadline(timeout)
        while True:
            thread = self.thread
            if thread is None:
                return True
            if self.is_caller():
                return False
            thread.join(deadline.left())
            if thread.is_alive():
                return False
            if self.thread is thread:
                return True

    def is_caller(self) -> bool:
        """Return whether the caller is the thread, or is starting it: then the thread cannot go on until it returns."""
        term = self._newest()
        works_here = term.runs() and term.thread is not None and term.thread.ident == threading.get_ident()
        return works_here or self._is_being_started()

    @property
    def thread(self) -> threading.Thread | None:
        """The thread that works, or the last one that did. None if there was none."""
        return self._newest().thread

    @property
    def runs(self) -> bool:
        """Whether there is a thread that takes wake-ups."""
        return self._term.runs() or self._newest().runs()

    def _is_being_started(self) -> bool:
        """Return whether the calling thread is inside `_start`, interrupted by a signal handler or a `__del__`."""
        frame: FrameType | None = sys._getframe()
        while frame is not None:
            if frame.f_code is Worker._start.__code__ and frame.f_locals["self"] is self:
                return True
            frame = frame.f_back
        return False

    def _newest(self) -> _Term:
        """Return the newest term that a thread has claimed."""
        term = self._term
        while (following := term.next()).thread is not None:
            term = following
        return term

    def _start(self) -> bool:
        """Start a thread, which works if no other thread does."""
        try:
            threading.Thread(target=self._main, name=self.name, daemon=True).start()
        except RuntimeError:  # "can't start new thread", or "... at interpreter shutdown" (3.12 and later)
            return False
        return True

    def _main(self) -> None:
        term = self._claim_term()
        if term is None:
            return
        died = True
        try:
            self._take_turns(term)
            died = False
        finally:
            if died:
                self._replace(term)

    def _claim_term(self) -> _Term | None:
        """Return the term in which the calling thread is to work, or None if another thread works."""
        term = self._term
        while not term.claim():
            if term.runs():
                return None
            term = term.next()
        self._term = term
        return term

    def _take_turns(self, term: _Term) -> None:
        owner = self._owner()
        while owner is not None:
            pause = owner.work()
            if pause is None:
                if self._stopping and self._wakeups.empty():
                    # In this order: a caller that wakes the thread after the second check starts another one.
                    term.over = True
                    if not self._wakeups.empty():
                        self.ensure()
                    return
                owner = None
            with suppress(queue.Empty):
                owner = take(self._wakeups, pause)
        term.over = True

    def _replace(self, term: _Term) -> None:
        """Start another thread. Called by a thread that dies of an exception."""
        restarts = self.restarts + 1
        if is_logged(restarts):  # seldom: a logging handler that enqueues must not keep a deadly sink busy forever
            _log.error(
                "the thread %s died and is replaced; restarts so far: %d",
                self.name,
                restarts,
                exc_info=True,
                extra=log_fields("thread_died", thread=self.name, restarts=restarts),
            )
        self.restarts = restarts
        term.over = True  # the thread is still alive, but no longer counts
        self._failed = not self._start()


_workers: PerProcess[WeakRegistry[Worker]] = PerProcess(WeakRegistry)
"""The workers of this process."""


def failed_thread() -> str | None:
    """Return the name of a thread of this process that has died and cannot be started again; None if there is none.

    Tries to start those that have died. Must be called without any lock held.
    """
    return next((worker.name for worker in _workers.get().all() if not worker.recover()), None)
