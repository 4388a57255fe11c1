"""A daemon thread that parks until it is woken, is replaced when it dies, and ends with its owner.

`Worker.wake` may be called from anywhere, also from a signal handler or a `__del__` that the garbage collector runs
in the middle of any of our own lines, the parked thread's included. That is why the thread does not park in a
`threading.Condition`: a `notify` that comes while the same thread is inside `wait`, but is not yet listed as waiting,
is lost. `queue.SimpleQueue.put` is documented to be safe there, and remembers.

`Worker.ensure` takes no lock, which an exception of a signal handler could leave held. Callers that meet may start more
than one thread; the threads themselves settle which one works, and the others end at once.
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

_log = logging.getLogger("sse_batcher.worker")

T = TypeVar("T")


class Owner(Protocol):
    def work(self) -> float | None:
        """Do what is due now, on the worker's thread. Returns the seconds until the next turn, or None: when woken.

        The thread holds its owner from `wake` on, and until a turn returns None.
        """


class Deadline:
    """One time limit carried through several waits, in real seconds; None: no limit."""

    def __init__(self, timeout: float | None) -> None:
        self._end = None if timeout is None else time.monotonic() + timeout

    def left(self) -> float | None:
        return None if self._end is None else max(0.0, self._end - time.monotonic())


def take(source: queue.SimpleQueue[T], timeout: float | None) -> T:
    """Take the next thing out of a queue that nobody else takes from, within `timeout` seconds (None: no limit).

    Raises `queue.Empty`. Not just ``source.get(timeout=timeout)``: CPython up to 3.12 then waits for ever, if the last
    take had not waited and the time is up before the first look (the rest of the time is negative then, which means
    no limit). A look that finds nothing leaves the queue in a state in which this cannot be.
    """
    try:
        return source.get_nowait()
    except queue.Empty:
        return source.get(timeout=timeout)


class _Term:
    """The time for which one thread works. Threads claim a term, and name the one after it, by `dict.setdefault`.

    That is atomic: of several threads that claim the same term, one gets it, and all agree on the next one.
    """

    __slots__ = ("_claims", "over")

    def __init__(self) -> None:
        self._claims: dict[str, threading.Thread | _Term] = {}
        self.over = False
        """The thread is about to end, and takes no more wake-ups. By the thread."""

    @property
    def thread(self) -> threading.Thread | None:
        """The thread that has it."""
        return self._claims.get("thread")  # type: ignore[return-value]

    def claim(self) -> bool:
        """Let the calling thread have it. False if another one does."""
        me = threading.current_thread()
        return self._claims.setdefault("thread", me) is me

    def next(self) -> _Term:
        return self._claims.get("next") or self._claims.setdefault("next", _Term())  # type: ignore[return-value]

    def runs(self) -> bool:
        # Not `Thread.is_alive`: up to CPython 3.12, one that a signal handler interrupts takes the thread for stopped.
        return self.thread is not None and not self.over


class Worker:
    """The one thread of `owner`. Takes no lock."""

    def __init__(self, owner: Owner, name: str) -> None:
        self.restarts = 0
        """How often a thread that died was replaced. Written by the threads, one after the other."""
        self._name = name
        # A wake-up is the owner itself, so that one that is dropped by everybody else still gets its turn. None: it is
        # gone, and the thread has to end.
        wakeups: queue.SimpleQueue[Owner | None] = queue.SimpleQueue()
        self._wakeups = wakeups
        getpid = os.getpid
        pid = getpid()

        def end(_: object) -> None:
            # Not in a forked child, which has no such thread: CPython 3.13 crashes when it wakes one that is not there,
            # and uWSGI forks without the hook that would make it forget. No global name: at the end of the process the
            # owner may outlive the names of this module, and without the GIL it does.
            if getpid() == pid:
                wakeups.put(None)

        self._owner = weakref.ref(owner, end)
        self._stopping = False
        # The newest term that is known. Written by threads that work or are about to: one that is overtaken may name an
        # older term again, whose successors are found from there.
        self._term = _Term()

    def wake(self) -> None:
        """Let the thread take a turn, now or right after the present one. Never blocks; does not start it."""
        # A wake-up that waits stands for all that follow: the thread takes it before it looks at what there is to do.
        if self._wakeups.empty():
            self._wakeups.put(self._owner())

    def is_woken(self) -> bool:
        """Whether there is a wake-up that the thread has not taken yet."""
        return not self._wakeups.empty()

    def ensure(self) -> bool:
        """Start the thread unless it runs. False if no thread can be started in this process any more.

        Must be called without any lock held: `Thread.start` waits for the newborn thread, in which the garbage
        collector may run code that needs that lock.
        """
        return self.runs or self._start() or self.runs

    def stop(self) -> None:
        """End the thread as soon as it has nothing left to do. It may be started again by `ensure`, for one turn."""
        self._stopping = True
        if self.runs:  # one that starts now sees by itself that it has to end
            self.wake()

    def join(self, timeout: float | None) -> bool:
        """Wait for the thread's end, at most `timeout` seconds. False if it did not end, or is the caller."""
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
        """Whether the thread cannot get on until the caller returns: it is the caller, or is being started by it."""
        term = self._newest()
        works_here = term.runs() and term.thread is not None and term.thread.ident == threading.get_ident()
        return works_here or self._is_being_started()

    @property
    def thread(self) -> threading.Thread | None:
        """The thread that works, or was the last one to. None before the first."""
        return self._newest().thread

    @property
    def runs(self) -> bool:
        """Whether there is a thread that takes wake-ups."""
        return self._term.runs() or self._newest().runs()

    def _is_being_started(self) -> bool:
        """Whether `_start` is below on this thread, which a signal handler or a `__del__` has interrupted."""
        frame: FrameType | None = sys._getframe()
        while frame is not None:
            if frame.f_code is Worker._start.__code__ and frame.f_locals["self"] is self:
                return True
            frame = frame.f_back
        return False

    def _newest(self) -> _Term:
        """The newest term that a thread has had."""
        term = self._term
        while (following := term.next()).thread is not None:
            term = following
        return term

    def _start(self) -> bool:
        """Start a thread, which works if no other one does."""
        try:
            threading.Thread(target=self._main, name=self._name, daemon=True).start()
        except RuntimeError:  # "can't start new thread", or "... at interpreter shutdown" (3.12 and later)
            return False
        return True

    def _main(self) -> None:
        term = self._take_office()
        if term is None:
            return
        died = True
        try:
            self._take_turns(term)
            died = False
        finally:
            if died:
                self._replace(term)

    def _take_office(self) -> _Term | None:
        """The term in which the calling thread is to work; None if another thread works."""
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
                    # In this order: a caller that wakes the thread after the look starts another one.
                    term.over = True
                    if not self._wakeups.empty():
                        self.ensure()
                    return
                owner = None
            with suppress(queue.Empty):
                owner = take(self._wakeups, pause)
        term.over = True

    def _replace(self, term: _Term) -> None:
        """The last act of a thread that something has killed."""
        restarts = self.restarts + 1
        if restarts & (restarts - 1) == 0:
            # 1, 2, 4, 8 ... : a logging handler that enqueues must not keep a deadly sink busy for ever.
            _log.error("the thread %s died and is replaced; restarts so far: %d", self._name, restarts, exc_info=True)
        self.restarts = restarts
        term.over = True  # it is still alive, but no longer counts
        self._start()
