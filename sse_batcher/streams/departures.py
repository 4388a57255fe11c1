"""Departures: the streams that have ended, until they are out of the registry and were reported.

Thread-safe. A stream that ends must not wait for the hub's lock: the garbage collector may end it on the very thread
that holds the lock. So it leaves a note, and the thread that holds the lock handles the notes after it has released it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from ..reasons import EndReason
from ..runtime.locks import is_mine, new_lock, run_if_free
from ..runtime.worker import Deadline
from .open_stream import ClientInfo, OpenStream
from .registry import Registry


class Farewell(NamedTuple):
    """How a stream ended. `reason` is ``left``, or that of its ``sse_bye``; `duration` is in seconds.

    `frames` and `bytes` were handed to the stream.
    """

    reason: EndReason
    duration: float
    frames: int
    bytes: int


class Departures:
    """Forgets streams that have ended. `lock` guards the registry, and is always taken as ``with departures, lock:``.

    In this order, the notes are handled after the lock was released by its own exit (see `runtime.locks`), whatever was
    raised. `on_end` is called once for each stream that is no poll, without the lock, by any thread.
    """

    def __init__(
        self,
        lock: threading.RLock,
        registry: Registry,
        clock: Callable[[], float],
        on_end: Callable[[ClientInfo, Farewell], None],
    ) -> None:
        self._lock = lock
        self._registry = registry
        self._clock = clock
        self._on_end = on_end
        # No lock guards these two: single steps of a deque are atomic.
        self._leaving: deque[tuple[OpenStream, EndReason]] = deque()
        self._farewells: deque[tuple[ClientInfo, Farewell]] = deque()  # of forgotten streams, not yet reported
        # Guards nothing. The condition has a lock of its own, because its `wait` would release the other lock without
        # handling the notes. Taken before the other lock, never while that is held.
        self._left_lock = new_lock()
        self._left = threading.Condition(self._left_lock)

    def add(self, stream: OpenStream, reason: EndReason) -> None:
        """Forget a stream, now or when the lock is released. Never waits. May be called more than once for a stream."""
        self._leaving.append((stream, reason))
        self._forget()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exc_info: object) -> None:
        if self._leaving:
            self._forget()

    def wait(self, have_left: Callable[[], bool], timeout: float | None) -> bool:
        """Wait until `have_left` returns True, for up to `timeout` seconds. It is called with the lock held.

        Return its last answer.
        """
        deadline = Deadline(timeout)
        is_first = not is_mine(self._left_lock)  # False in a signal handler that has interrupted `wait`
        answer = False

        def look() -> bool:
            nonlocal answer
            while True:
                with self._lock:
                    answer = have_left()
                if not self._leaving:
                    return answer or (is_first and bool(self._farewells))
                # A stream ended while we held the lock: look again.
                if run_if_free(self._lock, self._remove_locked):
                    self._left.notify_all()  # others that wait

        while True:
            with self._left_lock:
                is_in_time = self._left.wait_for(look, deadline.left())
            self._report()
            if answer or not is_in_time:
                return answer

    def _forget(self) -> None:
        # Look again after the lock was released: another thread may have found it taken in between.
        while self._leaving and run_if_free(self._lock, self._remove_locked):
            self._report()
            with self._left_lock:
                self._left.notify_all()

    def _report(self) -> None:
        """Call `on_end` for the streams that were forgotten, unless this thread is in `wait`, which reports them then.

        `on_end` may start a thread, and that waits until the thread runs. If the garbage collector ends a stream in the
        new thread first, that needs `_left_lock`.
        """
        if is_mine(self._left_lock):
            return
        while self._farewells:
            with suppress(IndexError):  # another thread was faster
                self._on_end(*self._farewells.popleft())

    def _remove_locked(self) -> None:
        """Take the streams out of the registry. If this is interrupted, the next call goes on from there."""
        while self._leaving:
            stream, reason = self._leaving[0]
            if stream in self._registry:
                farewell = Farewell(reason, self._clock() - stream.opened_at, *stream.handed)
                self._registry.remove(stream, reason, farewell.duration)
                if not stream.poll:  # there are many, and each ends soon
                    self._farewells.append((stream.info, farewell))
            self._leaving.popleft()
