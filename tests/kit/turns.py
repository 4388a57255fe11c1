"""Threads that take turns, as greenlets, and a lock and a queue of theirs: which one goes on is for the test to say."""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import greenlet  # type: ignore[import-untyped]

from .checker import Violation


class Turns:
    """Threads that take turns, as greenlets: each goes on until it comes to a place where another may come in."""

    def __init__(self) -> None:
        self._places = 0
        self.failed = False

    def place(self) -> None:
        self._places += 1
        if self._places > MOST_PLACES:
            raise Violation("livelock", "a thread waits forever")
        here = greenlet.getcurrent()
        if here.parent is not None and not self.failed:
            here.parent.switch()

    def run(self, works: Iterable[Callable[[], object]], turns: Iterable[int]) -> None:
        """Each goes on for as many places as its turn says, and after the last turn to its end."""
        running = [greenlet.greenlet(work) for work in works]
        places = iter(turns)
        try:
            while running:
                for thread in running:
                    for _ in range(next(places, 100)):
                        if not thread.dead:
                            thread.switch()
                running = [thread for thread in running if not thread.dead]
        finally:
            self.failed = bool(running)  # one of them; the others end where they are
            for thread in running:
                with suppress(Violation):
                    thread.throw()


MOST_PLACES = 10_000
"""More places than all that happens has."""


class SteppedLock:
    """A lock of greenlets. What it is asked for, it answers as `threading.RLock` does."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._owner: Any = None

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        self._turns.place()
        while blocking and timeout < 0 and self._owner is not None:
            self._turns.place()
        if self._owner is not None:
            return False
        self._owner = greenlet.getcurrent()
        return True

    def release(self) -> None:
        if not self._is_owned():
            raise RuntimeError("cannot release un-acquired lock")
        self._owner = None
        self._turns.place()

    def _is_owned(self) -> bool:
        return self._owner is greenlet.getcurrent()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *exc_info: object) -> None:
        self.release()


class SteppedQueue:
    """Waits for nothing: where it is empty, the time for a heartbeat has come."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._items: deque[Any] = deque()

    def put(self, item: Any) -> None:
        self._turns.place()
        self._items.append(item)

    def get_nowait(self) -> Any:
        self._turns.place()
        if not self._items:
            raise queue.Empty
        item = self._items.popleft()
        self._turns.place()  # with the item in hand
        return item

    def get(self, *, timeout: float) -> Any:
        return self.get_nowait()

    def qsize(self) -> int:
        return len(self._items)
