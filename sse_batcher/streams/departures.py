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
from ..runtime.locks import new_lock, run_if_free
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

        def look() -> bool:
            while True:
                with self._lock:
                    answer = have_left()
                if not self._leaving:
                    return answer
                self._forget()  # a stream ended while we held the lock: look again

        with self._left_lock:
            return self._left.wait_for(look, timeout)

    def _forget(self) -> None:
        # Look again after the lock was released: another thread may have found it taken in between.
        while self._leaving and run_if_free(self._lock, self._remove_locked):
            while self._farewells:
                with suppress(IndexError):  # another thread was faster
                    self._on_end(*self._farewells.popleft())
            with self._left_lock:
                self._left.notify_all()

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
